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
from jaxtyping import Array, PRNGKeyArray

from lazyjax._core.trees import move
from lazyjax._core.types import Model, Outputs, Params
from lazyjax.difference.finite_jvp import finite_jvp
from lazyjax.flow.displacement_step import displacement_step
from lazyjax.losses.targets import Task
from lazyjax.models.maps import Centered

Augment = Callable[[PRNGKeyArray, Array], Array]
"""(key, x) to changed inputs of a batch."""

Measures = dict[str, Array]
"""What is measured, by the names of the fields of `Training`."""


class Lane(NamedTuple):
    """One lane of a training: its scale, its random key, and the coordinates of its start."""

    alpha: Any
    key: Any
    w0: Any


class State(NamedTuple):
    """The state of a lane: u (or w itself, for the plain difference), and the state of the optimizer."""

    position: Params
    optimizer: Any


class TestSet(NamedTuple):
    """The data and measures that are evaluated after every epoch."""

    task: Task
    x: Array


class TrainingSetup(eqx.Module):
    """The setup that all lanes of a training share.

    Attributes:
        f: The model, without a constant of its own.
        rest: Everything in w0 that is no coordinate.
        optimizer: Any optax optimizer.
        task: Training targets and the loss on any of them.
        x: Training inputs.
        augment: Changes the inputs of a batch at random, or None.
        test: Test data, or None.
        batch_size: Samples in a batch.
        plain: Whether w itself is trained, with the plain difference.
        scan: Whether an epoch is one scan.
    """

    f: Model
    rest: Params
    optimizer: optax.GradientTransformation
    task: Task
    x: Array
    augment: Augment | None
    test: TestSet | None
    batch_size: int = eqx.field(static=True)
    plain: bool = eqx.field(static=True)
    scan: bool = eqx.field(static=True)

    @property
    def num_steps(self) -> int:
        """The number of whole batches in an epoch."""
        return self.x.shape[0] // self.batch_size

    @property
    def measures(self) -> list[str]:
        """The names of what is measured in every epoch."""
        names = ["loss"] + ["accuracy"] * (self.task.right is not None)
        if self.test is not None:
            names += ["test_loss"] + ["test_accuracy"] * (self.test.task.right is not None)
        return names

    def start(self, lane: Lane) -> State:
        """Return the state before the first step."""
        position = lane.w0 if self.plain else jtu.tree_map(jnp.zeros_like, lane.w0)
        # Of the types that a step returns, so that the first epoch is the program of the others.
        arrays = jtu.tree_map(jnp.asarray, self.optimizer.init(lane.w0))
        memory = jtu.tree_map(lambda leaf: jax.lax.convert_element_type(leaf, leaf.dtype), arrays)
        return State(position, memory)

    def coordinates(self, lane: Lane, position: Params) -> Params:
        """Return the coordinates of w."""
        return position if self.plain else move(lane.w0, 1 / lane.alpha, position)

    def displacement(self, lane: Lane, position: Params) -> Params:
        r"""Return $u = \alpha(w - w_0)$."""
        if not self.plain:
            return position
        return jtu.tree_map(lambda w, w0: lane.alpha.astype(w.dtype) * (w - w0), position, lane.w0)

    def outputs(self, lane: Lane, position: Params, x: Array) -> Outputs:
        r"""Return $\alpha h(w)$ on any inputs."""
        return outputs_of(self.f, eqx.combine(lane.w0, self.rest), position, lane.alpha, x, plain=self.plain)


def outputs_of(f: Model, w0: Params, position: Params, alpha: Array, x: Array, *, plain: bool) -> Outputs:
    r"""Return $\alpha[f(w, x) - f(w_0, x)]$ from u, or from w itself for the plain difference."""
    if plain:
        out = Centered(f, w0)(eqx.combine(position, w0), x)
        return alpha.astype(out.dtype) * out
    return finite_jvp(lambda w: f(w, x), w0, position, 1 / alpha)


def train_step(setup: TrainingSetup, lane: Lane, state: State, batch: tuple[Array, Array]) -> tuple[State, Measures]:
    """Take one step on a batch of the plan; return the new state and what was measured before it."""
    rows, key = batch
    x = setup.x[rows] if setup.augment is None else setup.augment(key, setup.x[rows])
    targets = setup.task.targets[rows]
    loss = setup.task.build(targets)
    model = Centered(setup.f, eqx.combine(lane.w0, setup.rest)) if setup.plain else setup.f
    coordinates = setup.coordinates(lane, state.position)
    outputs, vjp = jax.vjp(lambda c: model(eqx.combine(c, setup.rest), x), coordinates)
    y = lane.alpha.astype(outputs.dtype) * outputs if setup.plain else setup.outputs(lane, state.position, x)
    value = loss(y)
    (slope,) = vjp(loss.cotangent(y))

    # The plain difference trains w itself: a displacement from 0 at the scale 1, whose objective is R/alpha^2.
    one = jnp.ones_like(lane.alpha)
    w0, alpha, divisor = lane.w0, lane.alpha, one
    if setup.plain:
        w0, alpha, divisor = jtu.tree_map(jnp.zeros_like, lane.w0), one, lane.alpha

    def objective(position: Params) -> Array:
        found = loss(setup.outputs(lane, position, x))
        return found / divisor.astype(found.dtype) ** 2

    position, memory = displacement_step(
        setup.optimizer,
        state.optimizer,
        state.position,
        jtu.tree_map(lambda g: g / divisor.astype(g.dtype), slope),
        w0=w0,
        alpha=alpha,
        value=value / divisor.astype(value.dtype) ** 2,
        value_of=objective,
    )
    measures = {"loss": value}
    if setup.task.right is not None:
        measures["accuracy"] = setup.task.share(y, targets).astype(value.dtype)
    return State(position, memory), measures


def plan(setup: TrainingSetup, lane: Lane, epoch: Array) -> tuple[Array, Array]:
    """Return the rows of every batch of an epoch, (steps, batch_size), and the keys of their augmentations.

    The samples that fill no batch are left out, others in every epoch.
    """
    key_order, key_augment = jr.split(jr.fold_in(lane.key, epoch))
    order = jr.permutation(key_order, setup.x.shape[0])[: setup.num_steps * setup.batch_size]
    return order.reshape(setup.num_steps, -1), jr.split(key_augment, setup.num_steps)


def average(state: State, measures: Measures) -> tuple[Measures, Array]:
    """Return the means of what was measured in the steps of an epoch, and whether they and the state are finite."""
    means = {name: jnp.mean(values) for name, values in measures.items()}
    finite = [jnp.all(jnp.isfinite(leaf)) for leaf in jtu.tree_leaves((means, state.position))]
    return means, jnp.all(jnp.stack(finite))


def train_epoch(setup: TrainingSetup, lane: Lane, state: State, epoch: Array) -> tuple[State, Measures, Array]:
    """Go through all batches of an epoch in one scan."""
    batches = plan(setup, lane, epoch)
    state, measures = jax.lax.scan(lambda state, batch: train_step(setup, lane, state, batch), state, batches)
    return state, *average(state, measures)


def batch_rows(first: Array, batch_size: int, n: int) -> Array:
    """Return the rows of the batch that begins at `first`, the last of n repeated beyond the end."""
    return jnp.minimum(first + jnp.arange(min(batch_size, n)), n - 1)
