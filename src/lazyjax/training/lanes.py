"""Lanes of a training through compiled programs: all at once where memory allows, else in equal chunks.

The states of the chunks are handed over to the program and come back changed (their memory is used again).
"""

import hashlib
import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array

from lazyjax.training.arguments import TestSet
from lazyjax.training.step import (
    Lane,
    State,
    TrainingSetup,
    batch_rows,
    outputs_of,
    over_lanes,
    plan,
    start,
    sum_up,
    train_epoch,
    train_step,
)

SHARE = 0.8
"""Of an accelerator's free memory that lanes side by side may take."""


_NEEDS: dict[str, int] = {}
"""What programs need, by device and text: one that is compiled to be asked does not run, and compiling takes long."""


@eqx.filter_jit
def begin(course: TrainingSetup, lanes: Lane) -> State:
    """The states of some lanes before the first step."""
    return over_lanes(lambda lane: start(course, lane), course.axes, lanes)


# The course is kept, the states are handed over.
@eqx.filter_jit(donate="all-except-first")
def _epoch(kept: tuple[TrainingSetup, Lane, Array], states: State) -> tuple[State, dict[str, Array], Array]:
    course, lanes, epoch = kept
    return over_lanes(lambda lane, state: train_epoch(course, lane, state, epoch), course.axes, lanes, states)


@eqx.filter_jit
def _plan(course: TrainingSetup, lanes: Lane, epoch: Array) -> tuple[Array, Array]:
    return over_lanes(lambda lane: plan(course, lane, epoch), course.axes, lanes)


@eqx.filter_jit(donate="all-except-first")
def _step(kept: tuple[TrainingSetup, Lane, Any, Array], states: State) -> tuple[State, dict[str, Array]]:
    course, lanes, batches, i = kept

    def one(lane: Lane, state: State, batches: Any) -> tuple[State, dict[str, Array]]:
        return train_step(course, lane, state, jtu.tree_map(lambda leaf: leaf[i], batches))

    return over_lanes(one, course.axes, lanes, states, batches)


@eqx.filter_jit
def _sum_up(states: State, measures: list[dict[str, Array]]) -> tuple[dict[str, Array], Array]:
    together = jtu.tree_map(lambda *values: jnp.stack(values, axis=1), *measures)
    return jax.vmap(sum_up)(states, together)


def _epoch_by_steps(kept: tuple[TrainingSetup, Lane, Array], states: State) -> tuple[State, dict[str, Array], Array]:
    """As `_epoch`, a program a step."""
    course, lanes, epoch = kept
    batches, measures = _plan(course, lanes, epoch), []
    for i in range(course.num_steps):
        states, found = _step((course, lanes, batches, jnp.asarray(i)), states)
        measures.append(found)
    return states, *_sum_up(states, measures)


@eqx.filter_jit
def _outputs(course: TrainingSetup, lanes: Lane, states: State, x: Array, first: Array) -> Array:
    """The outputs on a batch of x."""
    some = x[batch_rows(first, course.batch_size, x.shape[0])]
    return over_lanes(lambda lane, state: outputs_of(course, lane, state.position, some), course.axes, lanes, states)


@eqx.filter_jit
def _judge(exam: TestSet, outputs: list[Array]) -> dict[str, Array]:
    """Loss and share of right answers on the test data."""
    targets = exam.task.targets

    def one(y: Array) -> dict[str, Array]:
        measures = {"test_loss": exam.task.build(targets)(y)}
        if exam.task.right is not None:
            measures["test_accuracy"] = exam.task.share(y, targets).astype(y.dtype)
        return measures

    return jax.vmap(one)(jnp.concatenate(outputs, axis=1)[:, : targets.shape[0]])


def run_epoch(
    course: TrainingSetup, lanes: Lane, states: State, epoch: int, exam: TestSet | None
) -> tuple[State, dict[str, np.ndarray], np.ndarray]:
    """One more epoch of some lanes: their states, what was measured, and whether each is finite throughout."""
    run = _epoch if course.scan else _epoch_by_steps
    states, measures, finite = run((course, lanes, jnp.asarray(epoch, jnp.uint32)), states)
    if exam is not None:
        starts = range(0, exam.x.shape[0], course.batch_size)
        outputs = [_outputs(course, lanes, states, exam.x, jnp.asarray(first)) for first in starts]
        measures = {**measures, **_judge(exam, outputs)}
    measures, finite = jax.device_get((measures, finite))
    for values in measures.values():
        finite = finite & np.isfinite(values)
    return states, measures, finite


def program_digest(course: TrainingSetup, lanes: Lane, states: State) -> str:
    """A short name of the compiled program: of the model, the loss, the optimizer and the augmentation in it."""
    program: Any = _epoch
    text = program.lower((course, lanes, jnp.zeros((), jnp.uint32)), states).as_text()
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def count_lanes(lanes: Lane) -> int:
    """How many there are."""
    return lanes.alpha.shape[0]


def pick(lanes: Lane, axes: Lane, index: np.ndarray) -> Lane:
    """Some of the lanes; what all share stays shared."""

    def take(part: Any, axis: int | None) -> Any:
        return part if axis is None else jtu.tree_map(lambda leaf: leaf[index], part)

    return Lane(*(take(part, axis) for part, axis in zip(lanes, axes, strict=True)))


def chunks(total: int, size: int) -> list[np.ndarray]:
    """Indices of the lanes of each chunk, the last one filled up with its last lane again."""
    return [np.minimum(np.arange(first, first + size), total - 1) for first in range(0, total, size)]


def choose_size(course: TrainingSetup, lanes: Lane, chunk: int | None, memory: int | None) -> int:
    """Lanes in a chunk: as told, or as many as fit the memory.

    On a CPU one by one unless a memory is given: side by side they are no faster there, since convolutions whose
    weights have an axis of lanes are slower.
    """
    total = count_lanes(lanes)
    if chunk is not None:
        return min(chunk, total)
    if total == 1 or (memory is None and jax.default_backend() == "cpu"):
        return 1
    limit = _free_memory() if memory is None else memory
    size = total
    while size > 1 and (used := memory_of(course, lanes, size)) > limit:
        parts = math.ceil(total / max(1, int(size * limit / used)))
        size = min(size - 1, math.ceil(total / parts))
    return size


def _free_memory() -> int:
    """Bytes for lanes on the default accelerator."""
    stats = jax.local_devices()[0].memory_stats() or {}
    # A backend that does not tell gets what every accelerator has.
    return int(SHARE * (stats.get("bytes_limit", 8 * 2**30) - stats.get("bytes_in_use", 0)))


def memory_of(course: TrainingSetup, lanes: Lane, size: int) -> int:
    """Bytes that an epoch of so many lanes side by side takes, the data that all share apart."""
    some = pick(lanes, course.axes, np.minimum(np.arange(size), count_lanes(lanes) - 1))
    states = eqx.filter_eval_shape(begin, course, some)
    arrays, static = eqx.partition((course, some, jnp.zeros((), jnp.uint32)), eqx.is_array)

    def epoch(arrays: Any, states: State) -> Any:
        course, lanes, epoch = eqx.combine(arrays, static)
        return over_lanes(lambda lane, state: train_epoch(course, lane, state, epoch), course.axes, lanes, states)

    lowered = jax.jit(epoch).lower(arrays, states)
    name = f"{jax.local_devices()[0].device_kind} {hashlib.sha256(lowered.as_text().encode()).hexdigest()}"
    if name not in _NEEDS:
        need = lowered.compile().memory_analysis()
        _NEEDS[name] = 0 if need is None else need.temp_size_in_bytes + need.output_size_in_bytes
    return _NEEDS[name]
