r"""Minibatch descent of one lane: a step on a batch, an epoch as one scan, outputs on any inputs.

With $h_B(w) = f(w, x_B) - f(w_0, x_B)$ on a batch B, SGD on $F_\alpha(w) = R(\alpha h_B(w))/\alpha^2$ is SGD in
$u = \alpha(w - w_0)$ along $-Dh_B(w_0 + \varepsilon u)^T \nabla R(y)$, $\varepsilon = 1/\alpha$, where y comes from
`finite_jvp` forward and the derivative from a plain vjp of f at $w_0 + \varepsilon u$: the constant $f(w_0, x_B)$ has
no part in either, so that the batch is centered exactly.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import optax
from jaxtyping import Array

from lazyjax._core.trees import move
from lazyjax._core.types import Model, Outputs, Params
from lazyjax.difference.finite_jvp import finite_jvp
from lazyjax.losses.losses import Loss
from lazyjax.losses.targets import Task
from lazyjax.models.maps import Centered

Augment = Callable[[Any, Array], Any]


class Lane(NamedTuple):
    """What one lane has for itself, or shares with the others: its scale, its randomness, its start."""

    alpha: Any
    key: Any
    coordinates: Any


class State(NamedTuple):
    """Where a lane is: u (or w itself, for the plain difference), and what the optimizer remembers."""

    position: Any
    optimizer: Any


class TrainingSetup(eqx.Module):
    """What all lanes share.

    `rest` is what of w0 is no coordinate; `plain` stands for the plain difference, `scan` for an epoch in one scan;
    `axes` says which parts of a `Lane` are one each.
    """

    f: Model
    rest: Params
    optimizer: optax.GradientTransformation
    task: Task
    x: Array
    augment: Augment | None
    batch_size: int = eqx.field(static=True)
    plain: bool = eqx.field(static=True)
    scan: bool = eqx.field(static=True)
    axes: Lane = eqx.field(static=True)

    @property
    def num_steps(self) -> int:
        """Whole batches in an epoch."""
        return self.x.shape[0] // self.batch_size

    def at(self, coordinates: Params) -> Params:
        """All parameters."""
        return eqx.combine(coordinates, self.rest)


def start(course: TrainingSetup, lane: Lane) -> State:
    """Before the first step."""
    position = lane.coordinates if course.plain else jtu.tree_map(jnp.zeros_like, lane.coordinates)
    return State(position, course.optimizer.init(lane.coordinates))


def params_of(course: TrainingSetup, lane: Lane, position: Params) -> Params:
    """The coordinates of w."""
    return position if course.plain else move(lane.coordinates, 1 / lane.alpha, position)


def displacement_of(course: TrainingSetup, lane: Lane, position: Params) -> Params:
    r"""$u = \alpha(w - w_0)$."""
    if not course.plain:
        return position
    return jtu.tree_map(lambda w, w0: lane.alpha.astype(w.dtype) * (w - w0), position, lane.coordinates)


def outputs_of(course: TrainingSetup, lane: Lane, position: Params, x: Array) -> Outputs:
    r"""$\alpha h(w)$ on any inputs."""
    w0 = course.at(lane.coordinates)
    if course.plain:
        out = Centered(course.f, w0)(course.at(position), x)
        return lane.alpha.astype(out.dtype) * out
    return finite_jvp(lambda w: course.f(w, x), w0, position, 1 / lane.alpha)


def _value_and_gradient(
    course: TrainingSetup, lane: Lane, position: Params, x: Array, loss: Loss
) -> tuple[Array, Outputs, Params]:
    r"""R(y), the outputs y, and $Dh(w)^T \nabla R(y)$."""
    model = Centered(course.f, course.at(lane.coordinates)) if course.plain else course.f
    outputs, vjp = jax.vjp(lambda c: model(course.at(c), x), params_of(course, lane, position))
    y = lane.alpha.astype(outputs.dtype) * outputs if course.plain else outputs_of(course, lane, position, x)
    (gradient,) = vjp(loss.cotangent(y))
    return loss(y), y, gradient


def _step(course: TrainingSetup, lane: Lane, state: State, x: Array, targets: Array) -> tuple[State, dict[str, Array]]:
    """One step of the optimizer on a batch, and what was measured before it."""
    loss = course.task.build(targets)
    value, outputs, gradient = _value_and_gradient(course, lane, state.position, x, loss)
    # At alpha = inf a proportional optimizer has the same steps in u as at alpha = 1.
    scale = jnp.where(jnp.isinf(lane.alpha), 1, lane.alpha)
    gradient = jtu.tree_map(lambda g: g / scale.astype(g.dtype), gradient)

    def objective(w: Params) -> Array:
        u = jtu.tree_map(lambda a, b: scale.astype(b.dtype) * (a - b), w, lane.coordinates)
        y = outputs_of(course, lane, w if course.plain else u, x)
        return loss(y) / scale.astype(y.dtype) ** 2

    updates, memory = optax.with_extra_args_support(course.optimizer).update(
        gradient,
        state.optimizer,
        params_of(course, lane, state.position),
        value=value / scale.astype(value.dtype) ** 2,
        grad=gradient,
        value_fn=objective,
    )
    size = jnp.ones_like(scale) if course.plain else scale
    position = jtu.tree_map(lambda v, d: v + size.astype(v.dtype) * d.astype(v.dtype), state.position, updates)
    measures = {"train_loss": value}
    if course.task.right is not None:
        measures["train_accuracy"] = course.task.share(outputs, targets).astype(value.dtype)
    return State(position, memory), measures


def plan(course: TrainingSetup, lane: Lane, epoch: Array) -> tuple[Array, Array]:
    """The rows of every batch of an epoch, (steps, batch_size), and the keys of their augmentations.

    The samples that fill no batch are left out, others in every epoch.
    """
    key_order, key_augment = jr.split(jr.fold_in(lane.key, epoch))
    order = jr.permutation(key_order, course.x.shape[0])[: course.num_steps * course.batch_size]
    return order.reshape(course.num_steps, -1), jr.split(key_augment, course.num_steps)


def train_step(
    course: TrainingSetup, lane: Lane, state: State, batch: tuple[Array, Array]
) -> tuple[State, dict[str, Array]]:
    """One step of the optimizer on a batch of the plan, and what was measured before it."""
    rows, key = batch
    x = course.x[rows] if course.augment is None else course.augment(key, course.x[rows])
    return _step(course, lane, state, x, course.task.targets[rows])


def sum_up(state: State, measures: dict[str, Array]) -> tuple[dict[str, Array], Array]:
    """Means of what was measured at the steps of an epoch; whether they and the parameters are finite."""
    means = {name: jnp.mean(values) for name, values in measures.items()}
    finite = [jnp.all(jnp.isfinite(leaf)) for leaf in jtu.tree_leaves((means, state.position))]
    return means, jnp.all(jnp.stack(finite))


def train_epoch(course: TrainingSetup, lane: Lane, state: State, epoch: Array) -> tuple[State, dict[str, Array], Array]:
    """All batches of an epoch in one scan."""
    batches = plan(course, lane, epoch)
    state, measures = jax.lax.scan(lambda state, batch: train_step(course, lane, state, batch), state, batches)
    return state, *sum_up(state, measures)


def batch_rows(first: Array, batch_size: int, n: int) -> Array:
    """The rows of a batch that begins at one of them; beyond the last of n it is filled up with that one."""
    return jnp.minimum(first + jnp.arange(min(batch_size, n)), n - 1)


def over_lanes(function: Callable[..., Any], axes: Lane, lanes: Lane, *args: Any) -> Any:
    """A function of one lane and arguments of its own, on several lanes at once.

    A lane alone is not vmapped: a convolution whose weights have an axis of lanes is slower.
    """
    if lanes.alpha.shape[0] > 1:
        return jax.vmap(function, in_axes=(axes, *(0 for _ in args)))(lanes, *args)
    lane = Lane(*(part if axis is None else _first(part) for part, axis in zip(lanes, axes, strict=True)))
    return jtu.tree_map(lambda leaf: jnp.asarray(leaf)[None], function(lane, *_first(args)))


def _first(tree: Any) -> Any:
    return jtu.tree_map(lambda leaf: leaf[0], tree)
