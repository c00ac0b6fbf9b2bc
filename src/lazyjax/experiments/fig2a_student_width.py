r"""Figure 2(a): the test loss of a student against its width m, at output scale 1/sqrt(m) (lazy) and 1/m (not).

Gradient descent on $F_\alpha$ with $\alpha(m)$ has the steps of the paper's code, 1/m and 0.05/m, and its target, 100
times the teacher. The exact flow at scale 1/sqrt(m) goes up to the same time. With this teacher even that scale is not
lazy: its kernel changes all the time, so that an explicit solver is faster than the exponential one here.
"""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import diffrax
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import optax
from jaxtyping import Array
from tqdm import tqdm

from lazyjax._core.types import Params
from lazyjax.data.population_risk import population_inner
from lazyjax.experiments.descent import descend, even_frames, mark_lanes
from lazyjax.experiments.figure import (
    Figure,
    Number,
    check_counts,
    check_dtype,
    check_positive,
    record,
    same_settings,
)
from lazyjax.experiments.student import Problem, check_double, risk_at, sample_problem
from lazyjax.flow.gradient_flow import gradient_flow
from lazyjax.flow.through_kinks import ThroughKinks
from lazyjax.losses.square import square_loss
from lazyjax.models.maps import on_data
from lazyjax.models.shallow import two_layer
from lazyjax.plot.axes import BLACK, BLUE, FONT, ORANGE, draw_band, draw_legend, make_axes, note_stopped
from lazyjax.report.sweep import replace_points, sweep

if TYPE_CHECKING:
    import matplotlib.figure
    import xarray

SCALINGS = {"1/sqrt(m)": 0.5, "1/m": 1.0}
"""Output scale alpha(m) = m^-power."""

REFERENCE = {
    "1/sqrt(m)": {2: 14.5, 4: 0.000, 8: 0.004, 16: 2.02, 32: 5.24, 64: 6.04, 128: 7.26},
    "1/m": {2: 20.1, 4: 0.013, 8: 0.076, 16: 0.453, 32: 0.790, 64: 1.358, 128: 1.439},
}
"""Mean test loss of two seeds after 10^4 steps, from an independent NumPy run; those of scale 1/m still fall."""

SMALL_WIDTH = 32
"""Number of units whose products take as long as everything else in a step."""

BAR = "{desc}: {percentage:3.0f}%|{bar}| {elapsed} gone, about {remaining} to go"


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings of Figure 2(a).

    Attributes:
        d: Dimension of the inputs.
        n: Training samples.
        widths: Values of m.
        seeds: Experiments, each with its own teacher, inputs and start.
        steps: Steps of gradient descent.
        step_root: eta m at scale 1/sqrt(m).
        step_mean: eta m at scale 1/m.
        teacher_scale: Multiple of the teacher that is learned.
        frames: Number of steps after which the risk is measured.
        flow_steps: Solver steps after which an exact flow is given up.
        dtype: The dtype of descent and flow.

    Raises:
        ValueError: One of them is out of its range.
    """

    d: int = 100
    n: int = 1000
    widths: tuple[int, ...] = (2, 4, 8, 16, 32, 64, 128)
    seeds: int = 2
    steps: int = 10_000
    step_root: float = 1.0
    step_mean: float = 0.05
    teacher_scale: float = 100.0
    frames: int = 51
    flow_steps: int = 16_384
    dtype: str = "float32"

    def __post_init__(self):
        check_counts(self, d=1, n=1, seeds=1, steps=1, frames=2, flow_steps=1)
        check_counts(self, widths=1)
        check_positive(self, "widths", "step_root", "step_mean", "teacher_scale")
        check_dtype(self)


PRESETS = {
    "small": Settings(d=50, n=60, widths=(2, 8, 32), steps=300, step_root=0.3, step_mean=0.015, frames=11),
    "default": Settings(),
    "paper": Settings(widths=(2, 3, 5, 8, 13, 20, 32, 51, 81, 128, 203, 323, 512), seeds=10, steps=25_000),
}


def sample(settings: Settings, width: int, seed: Any) -> Problem:
    """Draw the problem of a seed."""
    options = {"symmetric": False, "scale": settings.teacher_scale, "dtype": settings.dtype}
    return sample_problem(seed, settings.n, settings.d, width, **options)


def run_descent(settings: Settings, problem: Problem, alpha: Array, step: Array) -> dict[str, Array]:
    r"""Follow gradient descent on $R(\alpha f)/\alpha^2$: each step moves w by $-\eta J^T r/(n\alpha)$."""
    x, y, teacher, w0 = problem
    h, loss = on_data(two_layer(), x), square_loss(y)
    alpha, step = alpha.astype(x.dtype), step.astype(x.dtype)

    def measure(v: Params) -> dict[str, Array]:
        w = jtu.tree_map(jnp.add, w0, v)
        return {"risk": risk_at(w0, v, teacher, alpha), "train_loss": loss(alpha * h(w))}

    gradient = jax.grad(lambda w: loss(alpha * h(w)) / alpha**2)
    frames = even_frames(settings.steps, settings.frames)
    v, seen = descend(lambda w, _: gradient(w), w0, optax.sgd(step), frames, measure)
    zero = 0.5 * population_inner(teacher, teacher)
    return {**seen, "moved": optax.tree.norm(v) / optax.tree.norm(w0), "zero_risk": zero}


def run_flow(
    settings: Settings, width: int, seed: Array, solver: diffrax.AbstractSolver | ThroughKinks
) -> dict[str, Any]:
    """Follow the exact flow at scale 1/sqrt(m) to the end of training."""
    x, y, teacher, w0 = sample(settings, width, seed)
    alpha = width**-0.5
    times = jnp.asarray([0.0, settings.steps * settings.step_root / width], x.dtype)
    options = {"solver": solver, "rtol": 1e-3, "atol": 1e-6, "max_steps": settings.flow_steps}
    options |= {"save": ("displacement",), "throw": False}
    flow = gradient_flow(on_data(two_layer(), x), square_loss(y), w0, times, alpha=alpha, **options)
    v = jtu.tree_map(lambda u: u[-1] / alpha, flow.displacement)
    steps = flow.stats["num_steps"]
    return {"flow_risk": risk_at(w0, v, teacher, alpha), "flow_steps": steps, "result": flow.result}


def run(
    settings: Settings | None = None, *, seed: int = 0, folder: Path | None = None, progress: bool = False
) -> "xarray.Dataset":
    """Compute Figure 2(a): both scalings by gradient descent and one by the exact flow, for every width and seed.

    Args:
        settings: None for those of the default size: about three minutes on two cores.
        seed: The first of the seeds.
        folder: Where finished parts are kept, so that an interrupted run can continue.
        progress: Show progress bars, one for each width and method.

    Returns:
        A dataset over width, seed, scaling and step: "risk", "train_loss", "moved", "zero_risk" (of the zero
        predictor); over width and seed: "flow_risk", "flow_steps", "failed" and "message" of flows. "descent_failed"
        over width, seed and scaling: the descent diverged, and its numbers are NaN.

    Raises:
        ValueError: JAX's default dtype is not float64.

    Source:
        Chizat, Oyallon, Bach (2019), section 3.1, Figure 2(a); steps and teacher from their code.
    """
    import xarray

    check_double()
    settings = Settings() if settings is None else settings
    seeds = list(range(seed, seed + settings.seeds))
    found: dict[str, list[xarray.Dataset]] = {method: [] for method in METHODS}
    work = {(m, method): weight * (m + SMALL_WIDTH) for m in settings.widths for method, (_, weight) in METHODS.items()}
    with tqdm(total=sum(work.values()), desc="all widths", disable=not progress, bar_format=BAR) as bar:
        for (m, method), units in work.items():
            part = None if folder is None else folder / f"{method}-{m}"
            found[method].append(METHODS[method][0](settings, m, seeds, part, progress))
            bar.update(units)
    widths = xarray.IndexVariable("width", list(settings.widths))
    parts = [xarray.concat(each, widths) for each in found.values()]
    variant = "the code's teacher times 100, grid and steps; the paper's objective"
    return record(xarray.merge(parts), settings, seed, variant=variant)


def _run_descents(
    settings: Settings, width: int, seeds: list[int], folder: Path | None, progress: bool
) -> "xarray.Dataset":
    alphas = jnp.asarray([width**-power for power in SCALINGS.values()])
    steps = jnp.asarray([settings.step_root, settings.step_mean]) / width
    dims = {"risk": ("scaling", "step"), "train_loss": ("scaling", "step"), "moved": ("scaling",)}
    coords = {"scaling": list(SCALINGS), "step": even_frames(settings.steps, settings.frames)}

    def descents(seed: Array) -> dict[str, Array]:
        problem = sample(settings, width, seed)
        return jax.vmap(lambda alpha, step: run_descent(settings, problem, alpha, step))(alphas, steps)

    found = sweep(
        descents,
        over={"seed": seeds},
        dims=dims | {"zero_risk": ("scaling",)},
        coords=coords,
        chunk=1,
        folder=folder,
        settings={**dataclasses.asdict(settings), "width": width},
        progress=progress,
    )
    return mark_lanes(found, "scaling")


def _run_flows(
    settings: Settings, width: int, seeds: list[int], folder: Path | None, progress: bool
) -> "xarray.Dataset":
    """Follow the flows; those whose steps collapse at kinks, as at small widths, once more through the kinks."""

    def follow(
        solver: diffrax.AbstractSolver | ThroughKinks, seeds: list[int], folder: Path | None
    ) -> "xarray.Dataset":
        return sweep(
            lambda seed: run_flow(settings, width, seed, solver),
            over={"seed": seeds},
            chunk=1,
            folder=folder,
            settings={**dataclasses.asdict(settings), "width": width},
            progress=progress,
        )

    # Stability bounds the steps, and of the explicit solvers Bosh3 gets the farthest with an evaluation.
    solver = diffrax.Bosh3()
    found = follow(solver, seeds, folder)
    failed = [int(seed) for seed in found["seed"][found["failed"]]]
    if not failed:
        return found
    again = folder and folder.with_name(f"{folder.name}-through-kinks")
    return replace_points(found, follow(ThroughKinks(solver), failed, again), "seed")


METHODS = {"descent": (_run_descents, 2), "flow": (_run_flows, 1)}
"""What runs at every width, and its share of the time: descents are at both scalings, the flow takes larger steps."""


def numbers(data: "xarray.Dataset") -> list[Number]:
    """List the mean losses at the end next to their references, by width."""
    rows = []
    full = same_settings(data, Settings(), "widths", "seeds", "steps", "frames", "flow_steps", "dtype")
    steps = data.attrs["setting_steps"]
    last = data["risk"].isel(step=-1)
    for scaling, known in REFERENCE.items():
        for width in data["width"].values:
            value = float(last.sel(scaling=scaling, width=width).mean("seed"))
            reference = known.get(int(width)) if full else None
            note = "" if reference is None or steps == 10_000 else "reference after 10000 steps"
            rows.append(Number(f"test loss, alpha = {scaling}, m = {width}", value, reference, note))
    zero = float(data["zero_risk"].mean())
    rows.append(Number("loss of the zero predictor", zero, *([60.0, "two seeds there: 57.4 and 62.5"] if full else [])))
    flows = data["flow_risk"].mean("seed", skipna=True)
    rows += [
        Number(f"test loss, exact flow, 1/sqrt(m), m = {m}", float(flows.sel(width=m))) for m in data["width"].values
    ]
    gap = abs(data["flow_risk"] - last.sel(scaling="1/sqrt(m)")) / data["zero_risk"]
    rows.append(Number("largest gap of flow and descent over the zero predictor's loss", float(gap.max())))
    rows.append(Number("flows that stopped early", float(data["failed"].sum())))
    rows.append(Number("descents that diverged (left out)", float(data["descent_failed"].sum())))
    return rows


def draw(data: "xarray.Dataset") -> "matplotlib.figure.Figure":
    """Draw the loss at the end against the width, mean and standard deviation over seeds."""
    figure, (ax,) = make_axes(1)
    last = data["risk"].isel(step=-1)
    styles = {"1/sqrt(m)": (BLUE, "o", r"$\alpha=1/\sqrt{m}$"), "1/m": (ORANGE, "s", r"$\alpha=1/m$")}
    for scaling, (color, marker, label) in styles.items():
        draw_band(ax, data["width"], last.sel(scaling=scaling), color=color, marker=marker, label=label)
    flows = data["flow_risk"].mean("seed", skipna=False)
    ax.plot(data["width"], flows, "x", color=BLACK, markersize=5, label=r"exact flow, $1/\sqrt{m}$", zorder=4)
    ax.axhline(float(data["zero_risk"].mean()), color=BLACK, linestyle=":", linewidth=1, label="zero predictor")
    ax.set_xscale("log", base=2)
    ax.set_xlabel("width $m$", fontsize=FONT + 1)
    ax.set_ylabel("population loss", fontsize=FONT + 1)
    ax.set_yscale("symlog", linthresh=1)
    ax.set_ylim(bottom=0)
    note_stopped(ax, data)
    draw_legend(ax)
    return figure


FIGURE = Figure(
    title="test loss against the width m at two scales of the output",
    presets=PRESETS,
    run=run,
    numbers=numbers,
    draw=draw,
)
