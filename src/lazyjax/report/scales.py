"""The scales of a report side by side; those whose steps collapse at kinks are followed again, through the kinks."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import diffrax
import jax
import numpy as np
from jaxtyping import Array
from tqdm import tqdm

from lazyjax.flow.through_kinks import ThroughKinks
from lazyjax.report.lane import MEASURES, Reference, Solver, has_gates, run_lane
from lazyjax.report.problem import Problem
from lazyjax.report.sweep import replace_points, sweep

if TYPE_CHECKING:
    import xarray

THROUGH_KINKS = ThroughKinks(diffrax.Tsit5())


def follow_scales(
    problem: Problem,
    reference: Reference,
    alphas: Sequence[float],
    ts: Array,
    solver: Solver,
    progress: bool,
    folder: str | Path | None,
) -> tuple["xarray.Dataset", dict[float, Solver]]:
    """Follow the model at each alpha, and measure everything along its flows; finished scales are kept in a folder.

    Returns:
        The sweep, and the solver whose flow stands in it at each alpha: of a model with kinks the scales that failed
        with `solver` are followed again, through the kinks.
    """

    def follow(alphas: Sequence[float], solver: Solver, part: str) -> "xarray.Dataset":
        return sweep(
            run_lane,
            over={"alpha": alphas},
            shared={"problem": problem, "ts": ts, "solver": solver, "reference": reference},
            dims=dict.fromkeys(MEASURES, ("time",)),
            coords={"time": np.asarray(ts)},
            # On a CPU lanes in one batch are no faster than one by one, which shows more progress.
            chunk=1 if jax.default_backend() == "cpu" else None,
            progress=progress,
            folder=None if folder is None else Path(folder) / part,
        )

    announce(f"the flows of the model at {len(alphas)} scales alpha (compiled first)", progress)
    data = follow(alphas, solver, "scales")
    failed = [float(alpha) for alpha in data["alpha"][data["failed"]]]
    solvers = dict.fromkeys(alphas, solver)
    if failed and has_gates(problem):
        announce(f"{len(failed)} of the flows again, through the kinks of the model", progress)
        data = replace_points(data, follow(failed, THROUGH_KINKS, "kinks"), "alpha")
        solvers |= dict.fromkeys(failed, THROUGH_KINKS)
    return data, solvers


def announce(text: str, progress: bool) -> None:
    """Write one line before seconds or minutes of silence, if progress is asked for."""
    if progress:
        tqdm.write(f"lazyjax: {text}", file=sys.stderr)
