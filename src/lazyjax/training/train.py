r"""Minibatch training at any scale alpha, of deep networks too, in the displacement coordinates of the flows."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Float

from lazyjax._core.checks import check_inputs, split_params
from lazyjax._core.types import Model, Params
from lazyjax.difference.finite_jvp import finite_jvp
from lazyjax.flow.result import RESULTS, as_result
from lazyjax.losses.loss import Loss
from lazyjax.models.maps import Centered
from lazyjax.training.arguments import Prepared, check_difference, prepare
from lazyjax.training.checkpoint import Checkpoints
from lazyjax.training.epochs import Run, begin_run, configuration, run_epochs, split
from lazyjax.training.lanes import count_lanes, pick
from lazyjax.training.step import Lane, State, TrainingSetup, batch_rows, displacement_of, over_lanes, params_of


class Training(eqx.Module):
    r"""The end of a training; made by `train`. "lanes?" is an axis of lanes where `train` was given one.

    Attributes:
        params: The final w, of w0's structure, (lanes?, ...) a leaf.
        displacement: The final $u = \alpha(w - w_0)$, a tree of w0's coordinates: exact where w - w0 rounds.
        train_loss: Mean of R over the batches of an epoch, as they came and before their steps, (lanes?, epochs).
        train_accuracy: The same of the share of right answers; None where the targets are no classes.
        test_loss: R on the test data after every epoch, (lanes?, epochs); None without test data.
        test_accuracy: The same of the share of right answers.
        alpha: The scales, (lanes?,).
        result: `RESULTS.successful` or `RESULTS.nonfinite` (a loss or parameters that became NaN or infinite),
            a value a lane.
        epochs: How many were trained, those before an interruption too.
    """

    params: Params
    displacement: Params
    train_loss: Float[Array, "*lanes epochs"]
    train_accuracy: Float[Array, "*lanes epochs"] | None
    test_loss: Float[Array, "*lanes epochs"] | None
    test_accuracy: Float[Array, "*lanes epochs"] | None
    alpha: Float[Array, "*lanes"]
    result: Any
    epochs: int = eqx.field(static=True)


def train(
    f: Model,
    w0: Params,
    x: Any,
    y: Any,
    optimizer: Any,
    *,
    loss: str | Callable[[Array], Loss] = "square",
    alpha: Any = 1.0,
    epochs: Any,
    batch_size: Any = 128,
    key: Any,
    augment: Any = None,
    test: Any = None,
    difference: str = "exact",
    stacked: bool = False,
    chunk: Any = None,
    memory: Any = None,
    folder: str | Path | None = None,
    progress: bool = False,
    throw: bool = True,
) -> Training:
    r"""Train $F_\alpha(w) = R(\alpha h(w))/\alpha^2$ on minibatches, h = f - f(w0) the centered model.

    On a batch B, $h_B(w) = f(w, x_B) - f(w_0, x_B)$, exactly zero at w0. The training runs in
    $u = \alpha(w - w_0)$ along $-Dh_B(w_0 + u/\alpha)^T \nabla R(y)$ with $y = \alpha h_B(w)$ from `finite_jvp`, so
    that it keeps its digits at every alpha in float32; at alpha = inf it trains the tangent model. A step at a finite
    alpha costs about two of plain training: two evaluations of f more.

    The optimizer sees the true gradient $\nabla F_\alpha(w)$ and the parameters w, and its updates of w are added to
    u times alpha. So every optax optimizer takes the steps that it takes in w, up to the rounding of w: SGD, momentum
    and schedules are linear in the gradients, and the same in u and w with the same rates. Those that divide by the
    gradient's size (Adam) do not become lazy, since their steps in w do not shrink with alpha; weight decay pulls w
    to 0 and not to w0.

    Batches are drawn without replacement, in a new order every epoch; the samples that fill no batch are left out,
    others in every epoch.

    Args:
        f: Model f(w, x) with outputs (n,) or (n, k) for a batch x of any size.
        w0: Its parameters; any pytree, the floating arrays are the coordinates.
        x: Training inputs, samples first.
        y: Training targets: classes (n,) or real values of the outputs' shape.
        optimizer: Any optax optimizer. Schedules count steps, of which an epoch has n // batch_size
            (`inverse_time_decay` is the paper's).
        loss: "square" (classes become one-hot rows), "softmax", "logistic" (two classes), or a function of the
            targets of a batch to a loss, such as `lambda y: lj.square_loss(y, mean=False)`.
        alpha: Output scale in (0, inf], or a vector (lanes,) of them; inf needs an optimizer whose updates are
            proportional to the gradients.
        epochs: How often to go through the data.
        batch_size: Samples in a batch, also of the test data.
        key: Random key of the orders and augmentations, shared by all lanes; or a vector (lanes,) of keys.
        augment: (key, x) to changed inputs of a batch, such as `pad_and_crop`.
        test: (x_test, y_test), for loss and accuracy after every epoch.
        difference: "exact", or "plain": train w itself, with $\alpha(f(w, x_B) - f(w_0, x_B))$ subtracted plainly as
            the paper did. It costs less, is right while alpha times the rounding of f and of w is small, and shows
            what is lost beyond.
        stacked: Whether every floating array of w0 has a first axis (lanes,): a start a lane. Its other arrays are
            shared by all lanes.
        chunk: Lanes in one compiled program side by side; None for as many as fit `memory`, or as a checkpoint in
            `folder` has.
        memory: Bytes that lanes side by side may take, the data apart; None: on an accelerator most of what is free,
            on a CPU one lane at a time, which is no slower there.
        folder: Where to keep a checkpoint of the last finished epoch (by orbax): the same call continues after it,
            also with more epochs, to the same bits as without an interruption. Another training there is refused.
        progress: Show a progress bar, one tick an epoch.
        throw: Raise after the epoch in which a lane diverged. False: go on with the other lanes; all measures of the
            diverged one are NaN from that epoch on, its `result` says so.

    Returns:
        `Training`.

    Raises:
        ValueError, TypeError: bad arguments, seen before any step is taken; a folder that holds something else.
        equinox.EquinoxRuntimeError: `throw`, and a loss or parameters became NaN or infinite.

    Source:
        Chizat, Oyallon, Bach (2019), section 3.2 and supplement C.2.

    Example:
        >>> import jax.random as jr
        >>> import optax
        >>> from lazyjax.models import two_layer
        >>> x, w0 = jr.normal(jr.key(1), (32, 3)), two_layer().init(jr.key(0), d=3, width=8)
        >>> options = {"alpha": jnp.array([1.0, jnp.inf]), "epochs": 20, "batch_size": 8, "key": jr.key(2)}
        >>> training = train(two_layer(jnp.tanh), w0, x, x[:, 0], optax.sgd(0.1), **options)
        >>> training.train_loss.shape
        (2, 20)
        >>> bool((training.train_loss[:, -1] < 0.2 * training.train_loss[:, 0]).all())
        True
    """
    _check_run(epochs, chunk, memory)
    prepared = prepare(
        f,
        w0,
        x,
        y,
        optimizer,
        loss=loss,
        alpha=alpha,
        batch_size=batch_size,
        key=key,
        augment=augment,
        test=test,
        difference=difference,
        stacked=stacked,
    )
    with contextlib.nullcontext() if folder is None else Checkpoints(folder) as kept:
        if chunk is None and kept is not None:
            # As many as before, whatever is free now: in other groups the bits are others.
            chunk = kept.there().get("chunk")
        parts = split(prepared, chunk, memory)
        run = begin_run(prepared, parts)
        if kept is not None:
            kept.claim(configuration(prepared, parts, run, loss))
        run = run_epochs(prepared, parts, run, int(epochs), kept, progress=progress, throw=throw)
    return _finish(prepared, parts, run)


def trained_outputs(
    f: Model, w0: Params, training: Training, x: Any, *, batch_size: Any = 128, difference: str = "exact"
) -> Array:
    r"""$\alpha h(w) = \alpha[f(w, x) - f(w_0, x)]$ after a training, on any inputs.

    Args:
        f: The model that was trained.
        w0: Its start, with lanes if it had them.
        training: From `train`.
        x: Inputs, samples first.
        batch_size: So many at a time.
        difference: "exact": from the displacement, with its digits at every alpha. "plain": subtracted plainly at
            the final w, as a training with `difference="plain"` measures them, whatever primitives f has.

    Returns:
        (lanes?, n) or (lanes?, n, k).

    Raises:
        ValueError, TypeError: inputs unfit for f; a bad batch size or difference; a primitive without a rule.

    Source:
        Chizat, Oyallon, Bach (2019), section 3.2.

    Example:
        >>> import jax.random as jr
        >>> import optax
        >>> x, w0 = jnp.eye(3), jnp.zeros(3)
        >>> def f(w, x):
        ...     return x @ w
        >>> training = train(f, w0, x, jnp.ones(3), optax.sgd(3.0), epochs=1, batch_size=3, key=jr.key(0))
        >>> print(trained_outputs(f, w0, training, 2 * x))
        [2. 2. 2.]
    """
    if not isinstance(batch_size, (int, np.integer)) or batch_size < 1:
        msg = f"batch_size must be a whole number of at least 1, got {batch_size!r}."
        raise ValueError(msg)
    check_difference(difference, training.alpha)
    coordinates, rest = split_params(w0)
    starts = _starts(coordinates, training)
    x, _ = check_inputs(f, eqx.combine(starts[0], rest), x, "x")
    # By the plain difference w itself was trained, and by the other one u.
    end = eqx.filter(training.params, eqx.is_inexact_array) if difference == "plain" else training.displacement
    found = []
    for lane, start in enumerate(starts):
        alpha, position = (training.alpha, end)
        if training.alpha.ndim:
            alpha, position = jtu.tree_map(lambda leaf, lane=lane: leaf[lane], (alpha, position))
        given = (f, eqx.combine(start, rest), position, alpha, x, int(batch_size), difference == "plain")
        parts = [_outputs(*given, jnp.asarray(first)) for first in range(0, x.shape[0], int(batch_size))]
        found.append(jnp.concatenate(parts)[: x.shape[0]])
    return jnp.stack(found) if training.alpha.ndim else found[0]


def _starts(coordinates: Params, training: Training) -> list[Params]:
    """The start of every lane."""
    shapes, moved = ([leaf.shape for leaf in jtu.tree_leaves(t)] for t in (coordinates, training.displacement))
    lanes = training.alpha.shape
    if lanes and shapes == moved:
        return [jtu.tree_map(lambda leaf, i=i: leaf[i], coordinates) for i in range(lanes[0])]
    if [(*lanes, *shape) for shape in shapes] != moved:
        msg = f"w0 must be the start of the training, whose displacement has shapes {moved}, got shapes {shapes}."
        raise ValueError(msg)
    return [coordinates] * training.alpha.size


@eqx.filter_jit
def _outputs(
    f: Model, w0: Params, position: Params, alpha: Array, x: Array, batch_size: int, plain: bool, first: Array
) -> Array:
    """On a batch of x."""
    some = x[batch_rows(first, batch_size, x.shape[0])]
    if plain:
        out = Centered(f, w0)(eqx.combine(position, w0), some)
        return alpha.astype(out.dtype) * out
    return finite_jvp(lambda w: f(w, some), w0, position, 1 / alpha)


def _check_run(epochs: Any, chunk: Any, memory: Any) -> None:
    if not isinstance(epochs, (int, np.integer)) or epochs < 1:
        msg = f"epochs must be a whole number of at least 1, got {epochs!r}."
        raise ValueError(msg)
    for name, value in (("chunk", chunk), ("memory", memory)):
        if value is not None and (not isinstance(value, (int, np.integer)) or value < 1):
            msg = f"{name} must be a whole number of at least 1, or None, got {value!r}."
            raise ValueError(msg)


def _finish(prepared: Prepared, parts: list[np.ndarray], run: Run) -> Training:
    """The states of the chunks as those of the lanes."""
    course, lanes, _, single = prepared
    total = count_lanes(lanes)
    some = [pick(lanes, course.axes, index) for index in parts]
    ends = [_end(course, *pair) for pair in zip(some, run.states, strict=True)]
    params, displacement = jtu.tree_map(lambda *leaves: jnp.concatenate(leaves)[:total], *ends)
    history = {name: jnp.asarray(values.T) for name, values in run.history.items()}
    results = jax.vmap(_result)(jnp.asarray(run.failed))
    out = (params, displacement, history, lanes.alpha, results)
    if single:
        out = jtu.tree_map(lambda leaf: leaf[0], out)
    params, displacement, history, alpha, result = out
    measures = {name: history.get(name) for name in ("train_accuracy", "test_loss", "test_accuracy")}
    return Training(
        params=course.at(params),
        displacement=displacement,
        train_loss=history["train_loss"],
        **measures,
        alpha=alpha,
        result=result,
        epochs=len(run.history["train_loss"]),
    )


def _result(failed: Array) -> Any:
    where = RESULTS.where(failed, RESULTS.nonfinite, RESULTS.successful)  # pyright: ignore[reportArgumentType]
    return as_result(where)


@eqx.filter_jit
def _end(course: TrainingSetup, lanes: Lane, states: State) -> tuple[Params, Params]:
    def one(lane: Lane, state: State) -> tuple[Params, Params]:
        return params_of(course, lane, state.position), displacement_of(course, lane, state.position)

    return over_lanes(one, course.axes, lanes, states)
