"""From the arguments of `lazyjax.train` to what its programs take: each looked at before any long computation."""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import optax
from jaxtyping import Array

from lazyjax._core.checks import check_alpha, check_inputs, check_outputs, is_concrete, split_params
from lazyjax._core.types import Model, Params
from lazyjax.flow.field import check_start
from lazyjax.flow.gradient_descent import check_proportional
from lazyjax.losses.targets import Task, split_task
from lazyjax.models.maps import center, on_data, without_constant
from lazyjax.training.step import Lane, TrainingSetup


class TestSet(NamedTuple):
    """What is evaluated after every epoch."""

    task: Task
    x: Any


class Prepared(NamedTuple):
    """Everything that `train` was told, checked; `single` says that no argument has an axis of lanes."""

    course: TrainingSetup
    lanes: Lane
    exam: TestSet | None
    single: bool


def prepare(
    f: Model,
    w0: Params,
    x: Any,
    y: Any,
    optimizer: Any,
    *,
    loss: Any,
    alpha: Any,
    batch_size: Any,
    key: Any,
    augment: Any,
    test: Any,
    difference: Any,
    stacked: bool,
) -> Prepared:
    """Refuse what cannot be trained.

    Raises:
        ValueError, TypeError: with the argument, the rule, the value got and a remedy.
    """
    if not is_concrete((alpha, w0, key, eqx.filter(x, eqx.is_array))):
        msg = "train runs its epochs from Python: call it outside jit and vmap, with a vector of scales for several."
        raise ValueError(msg)
    _check_choices(optimizer, augment)
    alphas, keys, (coordinates, rest) = _check_alphas(alpha), _check_key(key), split_params(w0)
    check_difference(difference, alphas)
    first = coordinates
    if stacked:
        _check_stacked(coordinates, rest)
        first = jtu.tree_map(lambda leaf: leaf[0], coordinates)
    lanes, axes, single = _lay_out(alphas, keys, coordinates, stacked)
    start = eqx.combine(first, rest)
    # A constant of the model's own is taken away with f(w0, x).
    f = without_constant(f)
    x, shape = check_inputs(f, start, x, "x")
    task = split_task(loss, y, shape)
    _check_batch_size(batch_size, shape[0])
    scan = _may_scan(f, start, x[:batch_size])
    course = TrainingSetup(f, rest, optimizer, task, x, augment, int(batch_size), difference == "plain", scan, axes)
    _check_batch(course, start, shape)
    exam = None
    if test is not None:
        x_test, test_shape = _check_test(f, start, test)
        exam = TestSet(split_task(loss, test[1], test_shape, "y_test", like=y), x_test)
    if np.isinf(alphas).any():
        check_proportional(optimizer, first)
    _check_range(alphas, [leaf.dtype for leaf in jtu.tree_leaves(first)] + [check_outputs(f, start, x, name="f").dtype])
    return Prepared(course, lanes, exam, single)


def check_difference(difference: Any, alpha: Any) -> None:
    """Refuse a difference that there is not, and the plain one where it has no limit.

    Raises:
        ValueError: another name; "plain" and an infinite alpha.
    """
    if difference not in ("exact", "plain"):
        msg = f'difference must be "exact" or "plain", got {difference!r}.'
        raise ValueError(msg)
    if difference == "plain" and np.isinf(np.asarray(alpha)).any():
        msg = 'difference="plain" needs finite alpha, got inf; use difference="exact", which has that limit.'
        raise ValueError(msg)


def _check_choices(optimizer: Any, augment: Any) -> None:
    if augment is not None and not callable(augment):
        msg = (
            "augment must be a function of (key, x) that returns a batch of changed inputs, got "
            f"{type(augment).__name__}."
        )
        raise TypeError(msg)
    if not isinstance(optimizer, optax.GradientTransformation):
        msg = f"optimizer must be an optax optimizer such as optax.sgd(0.1), got {type(optimizer).__name__}."
        raise TypeError(msg)


def _check_alphas(alpha: Any) -> np.ndarray:
    """The scales, () or (lanes,), in double precision."""
    if np.ndim(alpha) > 1 or np.size(alpha) == 0:
        msg = f"alpha must be one scale or a vector of scales, one a lane, got shape {np.shape(alpha)}."
        raise ValueError(msg)
    for one in np.ravel(alpha):
        check_alpha(one)
    return np.asarray(alpha, np.float64)


def _check_key(key: Any) -> Array:
    """Typed keys, () or (lanes,)."""
    if eqx.is_array(key) and key.dtype == jnp.uint32 and key.ndim in (1, 2):
        key = jr.wrap_key_data(key)
    if not (eqx.is_array(key) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)):
        msg = f"key must be a random key such as jax.random.key(0), or a vector of them, one a lane, got {key!r}."
        raise TypeError(msg)
    if key.ndim > 1 or key.size == 0:
        msg = f"key must be one random key or a vector of them, one a lane, got shape {key.shape}."
        raise ValueError(msg)
    return key


def _check_stacked(coordinates: Params, rest: Params) -> None:
    sizes = {leaf.shape[0] if leaf.ndim else None for leaf in jtu.tree_leaves(coordinates)}
    if len(sizes) > 1 or None in sizes:
        msg = (
            "with stacked=True every floating array of w0 must have a first axis of one length, the lanes, got "
            f"lengths {sorted(sizes, key=str)}; stack the starts with jax.tree.map(lambda *a: jnp.stack(a), ...) or "
            "make them with jax.vmap over keys."
        )
        raise ValueError(msg)
    (lanes,) = sizes
    for path, leaf in jtu.tree_leaves_with_path(eqx.filter(rest, eqx.is_array)):
        # jax.vmap stacks them too, and f would see all lanes of them at once.
        if leaf.ndim and leaf.shape[0] == lanes:
            msg = (
                f"with stacked=True only the floating arrays of w0 have lanes, all else is shared by the {lanes} of "
                f"them, got w0{jtu.keystr(path)} of shape {leaf.shape} and dtype {leaf.dtype}; keep one lane of it, "
                "or put it into f."
            )
            raise ValueError(msg)


def _lay_out(alphas: np.ndarray, keys: Array, coordinates: Params, stacked: bool) -> tuple[Lane, Lane, bool]:
    """The lanes, which of their parts are one each, and whether there is only one because nothing has lanes."""
    leaves = jtu.tree_leaves(coordinates)
    lengths = {"alpha": alphas.shape, "key": keys.shape, "w0": leaves[0].shape[:1] if stacked else ()}
    counts = {name: shape[0] for name, shape in lengths.items() if shape}
    if len(set(counts.values())) > 1:
        found = ", ".join(f"{count} of {name}" for name, count in counts.items())
        msg = f"alpha, key and a stacked w0 must have as many lanes as each other, or be shared by all, got {found}."
        raise ValueError(msg)
    total = max(counts.values(), default=1)
    dtype = max((leaf.dtype for leaf in leaves), key=lambda d: jnp.finfo(d).bits)
    axes = Lane(0, 0 if keys.ndim else None, 0 if stacked else None)
    return Lane(jnp.asarray(np.broadcast_to(alphas, total), dtype), keys, coordinates), axes, not counts


def _check_batch_size(batch_size: Any, n: int) -> None:
    if not isinstance(batch_size, (int, np.integer)) or not 1 <= batch_size <= n:
        msg = f"batch_size must be a whole number from 1 to the {n} samples of x, got {batch_size!r}."
        raise ValueError(msg)


def _may_scan(f: Model, w0: Params, x: Array) -> bool:
    """Whether an epoch may be one scan: on a CPU convolutions are 20 times and more slower in one (jax issue 12868)."""
    if jax.default_backend() != "cpu":
        return True
    program, _, _ = eqx.filter_make_jaxpr(f)(w0, x)
    return "conv_general_dilated" not in str(program)


def _check_batch(course: TrainingSetup, w0: Params, shape: tuple[int, ...]) -> None:
    """Refuse, at the price of one gradient, what goes wrong on the first batch."""
    x, targets = course.x[: course.batch_size], course.task.targets[: course.batch_size]
    expected = (course.batch_size, *shape[1:])
    if course.augment is not None:
        changed = eqx.filter_eval_shape(course.augment, jr.key(0), x)
        found = check_outputs(course.f, w0, changed, name="f")
        if found.shape != expected:
            msg = (
                f"augment must keep one input a sample: f maps {x.shape} to {expected}, but what augment makes of "
                f"them, {getattr(changed, 'shape', changed)}, to {found.shape}."
            )
            raise ValueError(msg)
    check_start(on_data(center(course.f, w0), x), course.task.build(targets), w0, 1.0, rtol=1e-6)


def _check_test(f: Model, w0: Params, test: Any) -> tuple[Array, tuple[int, ...]]:
    if not isinstance(test, tuple | list) or len(test) != 2:
        msg = f"test must be a pair (x_test, y_test), got {type(test).__name__}."
        raise ValueError(msg)
    return check_inputs(f, w0, test[0], "x_test")


def _check_range(alphas: np.ndarray, dtypes: list[Any]) -> None:
    """Refuse scales that one of the dtypes has no number for: a coordinate's, or the outputs'."""
    dtype = min(dtypes, key=lambda dtype: float(jnp.finfo(dtype).max))
    largest = float(jnp.finfo(dtype).max) ** 0.5
    too_large = alphas[np.isfinite(alphas) & (alphas > largest)]
    if too_large.size:
        msg = (
            f"alpha must be at most {largest:.1e} in {dtype}, the narrowest dtype of w0's arrays and of f's outputs, "
            f"whose numbers do not hold alpha^2, or inf, got {too_large.max():g}; use alpha=jnp.inf."
        )
        raise ValueError(msg)
