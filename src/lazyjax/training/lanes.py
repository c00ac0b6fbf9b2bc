"""Lanes of a training: scales, keys and starts side by side, and the compiled programs that they go through.

All lanes go through a program at once if memory allows, else in equal chunks. The states of a chunk are handed over to
its program and come back changed, so that their memory is used again.
"""

import dataclasses
import hashlib
import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Float

from lazyjax.training.step import (
    Lane,
    Measures,
    State,
    TestSet,
    TrainingSetup,
    average,
    batch_rows,
    plan,
    train_epoch,
    train_step,
)

MEMORY_SHARE = 0.8
"""The share of an accelerator's free memory that lanes side by side may take."""


class Lanes(eqx.Module):
    """The lanes of a training.

    Attributes:
        parts: Their scales (lanes,), keys and starts, each with an axis of lanes or shared by all of them.
        axes: 0 for each part with an axis of lanes, None for each that is shared.
        single: Whether no argument of `train` had an axis of lanes, so that its results have none either.
    """

    parts: Lane
    axes: Lane = eqx.field(static=True)
    single: bool = eqx.field(static=True, default=False)

    @property
    def count(self) -> int:
        """The number of lanes."""
        return self.parts.alpha.shape[0]

    @property
    def alpha(self) -> Float[Array, " lanes"]:
        """The scales."""
        return self.parts.alpha

    def pick(self, index: np.ndarray | Array) -> "Lanes":
        """Select lanes; shared parts are returned unchanged."""
        pairs = zip(self.parts, self.axes, strict=True)
        return Lanes(Lane(*(part if axis is None else _rows(part, index) for part, axis in pairs)), self.axes)

    def chunks(self, size: int) -> list[np.ndarray]:
        """Return the indices of the lanes of each chunk of one size, the last one filled up with its last lane."""
        firsts = range(0, self.count, size)
        return [np.minimum(np.arange(first, first + size), self.count - 1) for first in firsts]

    def map(self, function: Callable[..., Any], *args: Any) -> Any:
        """Apply a function of one lane, and of arguments that have an axis of lanes, to all lanes at once.

        A lane alone is not vmapped: a convolution whose weights have an axis of lanes is slower.
        """
        if self.count > 1:
            return jax.vmap(function, in_axes=(self.axes, *(0 for _ in args)))(self.parts, *args)
        pairs = zip(self.parts, self.axes, strict=True)
        lane = Lane(*(part if axis is None else _rows(part, 0) for part, axis in pairs))
        return jtu.tree_map(lambda leaf: jnp.asarray(leaf)[None], function(lane, *_rows(args, 0)))


def _rows(tree: Any, index: Any) -> Any:
    return jtu.tree_map(lambda leaf: leaf[index], tree)


_pick = eqx.filter_jit(Lanes.pick)


def pick_lanes(lanes: Lanes, index: np.ndarray) -> Lanes:
    """Select lanes by one program, or by none if it is all of them."""
    return Lanes(lanes.parts, lanes.axes) if len(index) == lanes.count else _pick(lanes, jnp.asarray(index))


@eqx.filter_jit
def begin(setup: TrainingSetup, lanes: Lanes) -> State:
    """Return the states of lanes before the first step."""
    return lanes.map(setup.start)


# The setup is kept, the states are handed over.
@eqx.filter_jit(donate="all-except-first")
def _epoch(kept: tuple[TrainingSetup, Lanes, Array], states: State) -> tuple[State, Measures, Array]:
    setup, lanes, epoch = kept
    return lanes.map(lambda lane, state: train_epoch(setup, lane, state, epoch), states)


@eqx.filter_jit
def _plan(setup: TrainingSetup, lanes: Lanes, epoch: Array) -> tuple[Array, Array]:
    return lanes.map(lambda lane: plan(setup, lane, epoch))


@eqx.filter_jit(donate="all-except-first")
def _step(kept: tuple[TrainingSetup, Lanes, Any, Array], states: State) -> tuple[State, Measures]:
    setup, lanes, batches, i = kept
    return lanes.map(lambda lane, state, batches: train_step(setup, lane, state, _rows(batches, i)), states, batches)


@eqx.filter_jit
def _average(states: State, measures: list[Measures]) -> tuple[Measures, Array]:
    together = jtu.tree_map(lambda *values: jnp.stack(values, axis=1), *measures)
    return jax.vmap(average)(states, together)


def _epoch_by_steps(kept: tuple[TrainingSetup, Lanes, Array], states: State) -> tuple[State, Measures, Array]:
    """Do what `_epoch` does, one program per step."""
    setup, lanes, epoch = kept
    batches, measures = _plan(setup, lanes, epoch), []
    for i in range(setup.num_steps):
        states, found = _step((setup, lanes, batches, jnp.asarray(i)), states)
        measures.append(found)
    return states, *_average(states, measures)


@eqx.filter_jit
def _outputs(setup: TrainingSetup, lanes: Lanes, states: State, x: Array, first: Array) -> Array:
    """Return the outputs on a batch of x."""
    batch = x[batch_rows(first, setup.batch_size, x.shape[0])]
    return lanes.map(lambda lane, state: setup.outputs(lane, state.position, batch), states)


@eqx.filter_jit
def _evaluate(test: TestSet, outputs: list[Array]) -> Measures:
    """Return the loss and the share of right answers on the test data."""
    targets = test.task.targets

    def one(y: Array) -> Measures:
        measures = {"test_loss": test.task.build(targets)(y)}
        if test.task.right is not None:
            measures["test_accuracy"] = test.task.share(y, targets).astype(y.dtype)
        return measures

    return jax.vmap(one)(jnp.concatenate(outputs, axis=1)[:, : targets.shape[0]])


def run_epoch(
    setup: TrainingSetup, lanes: Lanes, states: State, epoch: int
) -> tuple[State, dict[str, np.ndarray], np.ndarray]:
    """Train lanes for one more epoch.

    Returns:
        The new states, what was measured, and whether each lane is finite throughout.
    """
    # With and without test data an epoch is the same program.
    test, setup = setup.test, dataclasses.replace(setup, test=None)
    run = _epoch if setup.scan else _epoch_by_steps
    states, measures, finite = run((setup, lanes, jnp.asarray(epoch, jnp.uint32)), states)
    if test is not None:
        starts = range(0, test.x.shape[0], setup.batch_size)
        outputs = [_outputs(setup, lanes, states, test.x, jnp.asarray(first)) for first in starts]
        measures = {**measures, **_evaluate(test, outputs)}
    measures, finite = jax.device_get((measures, finite))
    for values in measures.values():
        finite = finite & np.isfinite(values)
    return states, measures, finite


def program_digest(setup: TrainingSetup, lanes: Lanes, states: State) -> str:
    """Return a short name of the compiled program: of the model, loss, optimizer and augmentation in it."""
    program: Any = _epoch
    setup = dataclasses.replace(setup, test=None)
    text = program.lower((setup, lanes, jnp.zeros((), jnp.uint32)), states).as_text()
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def choose_size(setup: TrainingSetup, lanes: Lanes, chunk: int | None, memory: int | None) -> int:
    """Return the lanes in a chunk: as told, or as many as fit the memory.

    On a CPU lanes go one by one unless a memory is given: side by side they are no faster there, since convolutions
    whose weights have an axis of lanes are slower.
    """
    total = lanes.count
    if chunk is not None:
        return min(chunk, total)
    if total == 1 or (memory is None and jax.default_backend() == "cpu"):
        return 1
    limit = _free_memory() if memory is None else memory
    size = total
    while size > 1 and (used := memory_of(setup, lanes, size)) > limit:
        parts = math.ceil(total / max(1, int(size * limit / used)))
        size = min(size - 1, math.ceil(total / parts))
    return size


def _free_memory() -> int:
    """Return the bytes for lanes on the default accelerator."""
    stats = jax.local_devices()[0].memory_stats() or {}
    # A backend that does not tell gets what every accelerator has.
    return int(MEMORY_SHARE * (stats.get("bytes_limit", 8 * 2**30) - stats.get("bytes_in_use", 0)))


_NEEDS: dict[str, int] = {}
"""What programs need, by device and text: one that is compiled to be asked does not run, and compiling takes long."""


def memory_of(setup: TrainingSetup, lanes: Lanes, size: int) -> int:
    """Return the bytes that an epoch of so many lanes side by side takes, without the data that all share."""
    some = eqx.filter_eval_shape(lambda lanes: lanes.pick(np.minimum(np.arange(size), lanes.count - 1)), lanes)
    states = eqx.filter_eval_shape(begin, setup, some)
    arrays, static = eqx.partition((setup, some, jax.ShapeDtypeStruct((), jnp.uint32)), _has_shape)

    def epoch(arrays: Any, states: State) -> Any:
        setup, lanes, epoch = eqx.combine(arrays, static)
        return lanes.map(lambda lane, state: train_epoch(setup, lane, state, epoch), states)

    lowered = jax.jit(epoch).lower(arrays, states)
    name = f"{jax.local_devices()[0].device_kind} {hashlib.sha256(lowered.as_text().encode()).hexdigest()}"
    if name not in _NEEDS:
        need = lowered.compile().memory_analysis()
        _NEEDS[name] = 0 if need is None else need.temp_size_in_bytes + need.output_size_in_bytes
    return _NEEDS[name]


def _has_shape(leaf: Any) -> bool:
    return eqx.is_array(leaf) or isinstance(leaf, jax.ShapeDtypeStruct)
