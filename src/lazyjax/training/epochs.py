"""A training epoch by epoch: chunks of lanes in turn, what was measured, checkpoints, who diverged."""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import numpy as np
from tqdm import tqdm

from lazyjax.training.arguments import Prepared
from lazyjax.training.checkpoint import Checkpoints, digest_of, versions
from lazyjax.training.lanes import begin, choose_size, chunks, count_lanes, pick, program_digest, run_epoch
from lazyjax.training.step import State


class Run(NamedTuple):
    """What a training is after some epochs: the states of the chunks, the measures of the lanes, who diverged."""

    states: tuple[State, ...]
    history: dict[str, np.ndarray]
    failed: np.ndarray


def split(prepared: Prepared, chunk: int | None, memory: int | None) -> list[np.ndarray]:
    size = choose_size(prepared.course, prepared.lanes, chunk, memory)
    return chunks(count_lanes(prepared.lanes), size)


def begin_run(prepared: Prepared, parts: list[np.ndarray]) -> Run:
    """No epoch yet."""
    course, lanes = prepared.course, prepared.lanes
    names = ["train_loss"] + ["train_accuracy"] * (course.task.right is not None)
    if prepared.exam is not None:
        names += ["test_loss"] + ["test_accuracy"] * (prepared.exam.task.right is not None)
    total = count_lanes(lanes)
    states = tuple(begin(course, pick(lanes, course.axes, index)) for index in parts)
    return Run(states, {name: np.empty((0, total), lanes.alpha.dtype) for name in names}, np.zeros(total, bool))


def configuration(prepared: Prepared, parts: list[np.ndarray], run: Run, loss: Any) -> dict[str, Any]:
    """What a checkpoint belongs to."""
    course, lanes, exam, _ = prepared
    some = pick(lanes, course.axes, parts[0])
    return {
        "alpha": [float(a) for a in lanes.alpha],
        "batch_size": course.batch_size,
        "chunk": len(parts[0]),
        "difference": "plain" if course.plain else "exact",
        "loss": loss if isinstance(loss, str) else "a function",
        "w0": digest_of((lanes.coordinates, course.rest)),
        "key": digest_of(lanes.key),
        "data": digest_of((course.x, course.task.targets)),
        "arrays of f, augment, optimizer or loss": digest_of((course.f, course.augment, course.optimizer, course.task)),
        "test": None if exam is None else digest_of((exam.x, exam.task.targets)),
        "program": program_digest(course, some, run.states[0]),
        "versions": {**versions(), "backend": jax.default_backend()},
    }


def run_epochs(
    prepared: Prepared,
    parts: list[np.ndarray],
    run: Run,
    epochs: int,
    kept: Checkpoints | None,
    *,
    progress: bool,
    throw: bool,
) -> Run:
    """All epochs that a checkpoint does not have yet."""
    done = (None if kept is None else kept.latest()) or 0
    if done > epochs:
        msg = f"epochs must be at least the {done} that the checkpoint in folder has, got {epochs}."
        raise ValueError(msg)
    if kept is not None and done:
        shaped = {name: np.empty((done, *values.shape[1:]), values.dtype) for name, values in run.history.items()}
        run = kept.load(done, run._replace(history=shaped))
    _raise_failed(prepared, run, throw)
    with tqdm(total=epochs, initial=done, unit="epoch", desc="train", disable=not progress) as bar:
        for epoch in range(done, epochs):
            run = _advance(prepared, parts, run, epoch)
            if kept is not None:
                kept.store(epoch + 1, run)
            bar.set_postfix_str(_describe(run))
            bar.update()
            _raise_failed(prepared, run, throw)
    return run


def _advance(prepared: Prepared, parts: list[np.ndarray], run: Run, epoch: int) -> Run:
    """One more epoch of all chunks; one whose lanes have all diverged rests."""
    course, lanes, exam, _ = prepared
    states, failed = list(run.states), run.failed.copy()
    rows = {name: np.full((1, failed.size), np.nan, values.dtype) for name, values in run.history.items()}
    for i, index in enumerate(parts):
        if run.failed[index].all():
            continue
        states[i], measures, finite = run_epoch(course, pick(lanes, course.axes, index), states[i], epoch, exam)
        failed[index] |= ~finite
        for name, values in measures.items():
            rows[name][0, index] = values
    # Whatever the numbers of a diverged lane are: outputs that are NaN still are right by chance.
    for row in rows.values():
        row[0, failed] = np.nan
    return Run(tuple(states), {name: np.concatenate([run.history[name], row]) for name, row in rows.items()}, failed)


def _describe(run: Run) -> str:
    """The last losses, for the progress bar."""
    last = run.history["train_loss"][-1]
    fine = last[~run.failed]
    text = "" if fine.size == 0 else f"loss {fine.min():.3g}" + (f" to {fine.max():.3g}" if fine.size > 1 else "")
    return text + (f", {int(run.failed.sum())} diverged" if run.failed.any() else "")


def _raise_failed(prepared: Prepared, run: Run, throw: bool) -> None:
    if not (throw and run.failed.any()):
        return
    alphas = [f"{float(a):g}" for a in np.asarray(prepared.lanes.alpha)[run.failed]]
    msg = (
        f"train diverged within {len(run.history['train_loss'])} epochs at alpha = {', '.join(alphas)}: a loss or "
        "parameters became NaN or infinite; take a smaller learning rate, or throw=False to go on with other lanes."
    )
    raise eqx.EquinoxRuntimeError(msg)
