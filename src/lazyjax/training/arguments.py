"""From the arguments of `lazyjax.train` to what its programs take: each is checked before anything is compiled."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import optax
from jax.typing import ArrayLike
from jaxtyping import Array

from lazyjax._core.checks import check_alpha, check_inputs, check_outputs, is_concrete, split_params
from lazyjax._core.keys import is_key
from lazyjax._core.types import Model, Params
from lazyjax.flow.displacement_step import check_optimizer, check_proportional
from lazyjax.flow.start import check_start
from lazyjax.losses.loss import Loss
from lazyjax.losses.targets import Task, split_task
from lazyjax.models.maps import center, on_data, without_constant
from lazyjax.training.lanes import Lanes
from lazyjax.training.step import Augment, Lane, TestSet, TrainingSetup

LossOf = str | Callable[[Array], Loss]
"""The name of a loss, or a function of the targets of a batch that returns one."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    r"""Options that few trainings need; the `options` of `train`.

    Attributes:
        augment: (key, x) to changed inputs of a batch, such as `pad_and_crop`.
        difference: "exact", or "plain": train w itself, with $\alpha(f(w, x_B) - f(w_0, x_B))$ subtracted plainly as
            the paper did. It costs less, is right while alpha times the rounding of f and of w is small, and shows
            what is lost beyond.
        stacked: Whether every floating array of w0 has a first axis (lanes,): one start per lane. Its other arrays
            are shared by all lanes.
        chunk: The number of lanes that one compiled program takes side by side; None for as many as fit `memory`, or
            as a checkpoint in `folder` has.
        memory: The bytes that lanes side by side may take, without the data; None: on an accelerator most of what is
            free, on a CPU one lane at a time, which is no slower there.
        folder: Where to keep a checkpoint of the last finished epoch (by orbax): the same call continues after it,
            also with more epochs, to the same bits as without an interruption. Another training there is refused.
        progress: Whether to show a progress bar, one tick per epoch.

    Raises:
        ValueError, TypeError: an option out of its range, or of another type.

    Example:
        >>> TrainingOptions(chunk=2, progress=True).difference
        'exact'
    """

    augment: Augment | None = None
    difference: str = "exact"
    stacked: bool = False
    chunk: int | None = None
    memory: int | None = None
    folder: str | Path | None = None
    progress: bool = False

    def __post_init__(self) -> None:
        if self.augment is not None and not callable(self.augment):
            msg = (
                "augment must be a function of (key, x) that returns a batch of changed inputs, got "
                f"{type(self.augment).__name__}."
            )
            raise TypeError(msg)
        check_difference(self.difference)
        for name in ("chunk", "memory"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name), "or None")
        for name in ("stacked", "progress"):
            if not isinstance(getattr(self, name), (bool, np.bool_)):
                msg = f"{name} must be True or False, got {getattr(self, name)!r}."
                raise TypeError(msg)
        if not isinstance(self.folder, (str, Path, type(None))):
            msg = f"folder must be a path or None, got {type(self.folder).__name__}."
            raise TypeError(msg)


def check_count(name: str, value: Any, otherwise: str = "") -> None:
    """Check that a value is a whole number of at least 1.

    Raises:
        ValueError: it is something else.
    """
    if not isinstance(value, (int, np.integer)) or value < 1:
        rule = ", ".join(filter(None, ("a whole number of at least 1", otherwise)))
        msg = f"{name} must be {rule}, got {value!r}."
        raise ValueError(msg)


def check_difference(difference: Any, alpha: Any = 1.0) -> None:
    """Check the name of a difference, and that the plain one is asked for at finite scales only.

    Raises:
        ValueError: another name; "plain" and an infinite alpha.
    """
    if difference not in ("exact", "plain"):
        msg = f'difference must be "exact" or "plain", got {difference!r}.'
        raise ValueError(msg)
    if difference == "plain" and np.isinf(np.asarray(alpha)).any():
        msg = 'difference="plain" needs finite alpha, got inf; use difference="exact", which has that limit.'
        raise ValueError(msg)


DEFAULTS = TrainingOptions()
"""The options of most trainings."""


def make_lanes(alpha: ArrayLike, key: Array, w0: Params, *, stacked: bool = False) -> Lanes:
    """Lay out scales, keys and starts as lanes.

    Raises:
        ValueError, TypeError: a scale or a key that is none; different numbers of lanes; traced arguments.
    """
    if not is_concrete((alpha, w0, key)):
        msg = "train runs its epochs from Python: call it outside jit and vmap, with a vector of scales for several."
        raise ValueError(msg)
    if np.ndim(alpha) > 1 or np.size(alpha) == 0:
        msg = f"alpha must be one scale or a vector of scales, one per lane, got shape {np.shape(alpha)}."
        raise ValueError(msg)
    for one in np.ravel(alpha):
        check_alpha(one)
    alphas = np.asarray(alpha, np.float64)
    key = _check_key(key)
    coordinates, rest = split_params(w0)
    leaves = jtu.tree_leaves(coordinates)
    if stacked:
        _check_stacked(coordinates, rest)
    lengths = {"alpha": alphas.shape, "key": key.shape, "w0": leaves[0].shape[:1] if stacked else ()}
    counts = {name: shape[0] for name, shape in lengths.items() if shape}
    if len(set(counts.values())) > 1:
        found = ", ".join(f"{count} of {name}" for name, count in counts.items())
        msg = f"alpha, key and a stacked w0 must have as many lanes as each other, or be shared by all, got {found}."
        raise ValueError(msg)
    dtype = max((leaf.dtype for leaf in leaves), key=lambda d: jnp.finfo(d).bits)
    _check_range(alphas, min((leaf.dtype for leaf in leaves), key=_largest), "the narrowest dtype of w0's arrays")
    scales = jnp.asarray(np.broadcast_to(alphas, max(counts.values(), default=1)), dtype)
    axes = Lane(0, 0 if key.ndim else None, 0 if stacked else None)
    return Lanes(Lane(scales, key, coordinates), axes, not counts)


def _check_key(key: Any) -> Array:
    """Return typed keys, () or (lanes,)."""
    if eqx.is_array(key) and key.dtype == jnp.uint32 and key.ndim in (1, 2):
        key = jr.wrap_key_data(key)
    if not is_key(key):
        msg = f"key must be a random key such as jax.random.key(0), or a vector of them, one per lane, got {key!r}."
        raise TypeError(msg)
    if key.ndim > 1 or key.size == 0:
        msg = f"key must be one random key or a vector of them, one per lane, got shape {key.shape}."
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


def _largest(dtype: Any) -> float:
    return float(jnp.finfo(dtype).max)


def _check_range(alphas: np.ndarray, dtype: Any, whose: str) -> None:
    """Check that a dtype has numbers for the squares of the scales."""
    largest = _largest(dtype) ** 0.5
    too_large = alphas[np.isfinite(alphas) & (alphas > largest)]
    if too_large.size:
        msg = (
            f"alpha must be at most {largest:.1e} in {dtype}, {whose}, whose numbers do not hold alpha^2, or inf, got "
            f"{too_large.max():g}; use alpha=jnp.inf."
        )
        raise ValueError(msg)


def make_setup(
    f: Model,
    w0: Params,
    x: ArrayLike,
    y: ArrayLike,
    optimizer: optax.GradientTransformation,
    lanes: Lanes,
    *,
    loss: LossOf,
    batch_size: int,
    test: tuple[ArrayLike, ArrayLike] | None,
    options: TrainingOptions,
) -> TrainingSetup:
    """Collect what all lanes share, and refuse what cannot be trained, first of all what shapes alone tell.

    Raises:
        ValueError, TypeError: with the argument, the rule, the value got and a remedy.
    """
    if not is_concrete(eqx.filter((x, y), eqx.is_array)):
        msg = "train runs its epochs from Python: call it outside jit and vmap, with x and y as arrays."
        raise ValueError(msg)
    check_optimizer(optimizer)
    alphas = np.asarray(lanes.alpha)
    check_difference(options.difference, alphas)
    rest = eqx.filter(w0, eqx.is_inexact_array, inverse=True)
    # The shapes of one start.
    start = eqx.combine(_shapes(lanes.parts.w0, lane=options.stacked), rest)
    # A constant of the model's own is taken away with f(w0, x).
    f = without_constant(f)
    x, shape = check_inputs(f, start, x, "x")
    task = split_task(loss, y, shape)
    if not isinstance(batch_size, (int, np.integer)) or not 1 <= batch_size <= shape[0]:
        msg = f"batch_size must be a whole number from 1 to the {shape[0]} samples of x, got {batch_size!r}."
        raise ValueError(msg)
    batch_size = int(batch_size)
    batch = jax.ShapeDtypeStruct((batch_size, *x.shape[1:]), x.dtype)
    _check_augment(f, start, options.augment, batch, (batch_size, *shape[1:]))
    _check_range(alphas, check_outputs(f, start, x, name="f").dtype, "the dtype of f's outputs")
    setup = TrainingSetup(
        f=f,
        rest=rest,
        optimizer=optimizer,
        task=task,
        x=x,
        augment=options.augment,
        test=None if test is None else _test_set(f, start, loss, y, test),
        batch_size=batch_size,
        plain=options.difference == "plain",
        scan=may_scan(f, start, batch),
    )
    _check_first_step(setup, lanes, task)
    return setup


def _shapes(tree: Params, *, lane: bool) -> Params:
    """Return the shapes and dtypes of arrays, without their axis of lanes if they have one."""
    return jtu.tree_map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:] if lane else leaf.shape, leaf.dtype), tree)


def _check_augment(f: Model, start: Params, augment: Augment | None, batch: Any, expected: tuple[int, ...]) -> None:
    if augment is None:
        return
    changed = eqx.filter_eval_shape(augment, jr.key(0), batch)
    found = check_outputs(f, start, changed, name="f")
    if found.shape != expected:
        msg = (
            f"augment must keep one input per sample: f maps {batch.shape} to {expected}, but what augment makes of "
            f"them, {getattr(changed, 'shape', changed)}, to {found.shape}."
        )
        raise ValueError(msg)


def _test_set(f: Model, start: Params, loss: LossOf, y: ArrayLike, test: Any) -> TestSet:
    if not isinstance(test, tuple | list) or len(test) != 2:
        msg = f"test must be a pair (x_test, y_test), got {type(test).__name__}."
        raise ValueError(msg)
    x_test, shape = check_inputs(f, start, test[0], "x_test")
    return TestSet(split_task(loss, test[1], shape, "y_test", like=y), x_test)


def may_scan(f: Model, start: Params, batch: Any) -> bool:
    """Check whether an epoch may be one scan: on a CPU convolutions are 20 times slower in one (jax issue 12868)."""
    if jax.default_backend() != "cpu":
        return True
    shapes, static = eqx.partition((start, batch), lambda leaf: hasattr(leaf, "dtype"))
    program = jax.make_jaxpr(lambda shapes: f(*eqx.combine(shapes, static)))(shapes)
    return "conv_general_dilated" not in str(program)


def _check_first_step(setup: TrainingSetup, lanes: Lanes, task: Task) -> None:
    """Refuse what goes wrong on the first batch, at the price of one gradient."""
    first, (x, targets) = _first(lanes, (setup.x, task.targets), setup.batch_size)
    w0 = eqx.combine(first, setup.rest)
    check_start(on_data(center(setup.f, w0), x), task.build(targets), w0, 1.0, rtol=1e-6)
    if np.isinf(np.asarray(lanes.alpha)).any():
        check_proportional(setup.optimizer, first)


@eqx.filter_jit
def _first(lanes: Lanes, data: tuple[Array, Array], batch_size: int) -> tuple[Params, tuple[Array, Array]]:
    """Return the start of the first lane and the first samples."""
    w0 = lanes.parts.w0
    if lanes.axes.w0 == 0:
        w0 = jtu.tree_map(lambda leaf: leaf[0], w0)
    return w0, jtu.tree_map(lambda leaf: leaf[:batch_size], data)
