r"""Figure 1(c): the test loss of a two-layer ReLU student against the standard deviation tau of its start.

Gradient descent has the steps of the paper's code, min(10, 0.1/tau^2), and all tau of a seed run in one program. For
the lazy half of the curve the exact flow is computed too, up to the same time. Both are measured by the exact
population risk. The tangent model's descent has a closed form; by homogeneity it is one curve for all tau whose step
is not capped, and it is the limit of the curve as tau grows.
"""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import optax
from jaxtyping import Array

from lazyjax._core.types import Params
from lazyjax.data.population_risk import tangent_population_risk
from lazyjax.experiments.descent import descend, even_frames, log_frames, mark_lanes
from lazyjax.experiments.figure import (
    Figure,
    Number,
    check_counts,
    check_dtype,
    check_even,
    check_positive,
    record,
    same_settings,
)
from lazyjax.experiments.student import Problem, check_double, risk_at, sample_problem
from lazyjax.flow.exponential import TangentExponential
from lazyjax.flow.gradient_flow import gradient_flow
from lazyjax.kernels.gram import gram
from lazyjax.laziness.compare import activation_stability
from lazyjax.losses.square import square_loss
from lazyjax.models.maps import on_data, symmetrize
from lazyjax.models.shallow import two_layer
from lazyjax.models.tangent import linearize
from lazyjax.plot.axes import BLACK, BLUE, FONT, ORANGE, draw_band, draw_legend, make_axes, note_stopped
from lazyjax.report.sweep import sweep

if TYPE_CHECKING:
    import matplotlib.figure
    import xarray

TAUS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.8, 1.0, 2.0, 5.0, 10.0)
FINAL = (0.065, 0.209, 0.794, 1.525, 2.239, 2.580, 2.758, 2.817, 2.844, 2.869, 2.882, 2.881)
BEST = (0.065, 0.209, 0.770, 1.373, 1.705, 1.775, 1.812, 1.819, 1.821, 1.823, 1.824, 1.824)
SPREAD = (0.044, 0.054, 0.054, 0.079, 0.016, 0.174, 0.356, 0.476, 0.512, 0.543, 0.550, 0.548)
REFERENCE = {
    name: dict(zip(TAUS, values, strict=True))
    for name, values in (("final", FINAL), ("best", BEST), ("spread", SPREAD))
}
"""Losses times 1000 by tau: mean of the last and of the best, and standard deviation of the last, over three seeds.

From an independent float64 NumPy run at the paper's size with other random draws and 1000 test samples.
"""
TANGENT_REFERENCE = {"final": 2.880, "best": 1.824}


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings of Figure 1(c).

    Attributes:
        d: Dimension of the inputs.
        n: Training samples.
        width: m, units of the student; even, for the start is symmetrized.
        taus: Standard deviations of the start.
        seeds: Experiments, each with its own teacher, inputs and start.
        steps: Steps of gradient descent.
        step: eta tau^2, so that eta = step/tau^2 ...
        largest_step: ... but at most this.
        frames: Number of steps after which the risk is measured.
        lazy_from: From this tau on the flow is computed too.
        flow_times: Number of times at which its risk is measured.
        dtype: The dtype of descent and flow; the risk is always computed in float64.

    Raises:
        ValueError: One of them is out of its range.
    """

    d: int = 100
    n: int = 1000
    width: int = 50
    taus: tuple[float, ...] = TAUS
    seeds: int = 3
    steps: int = 10_000
    step: float = 0.1
    largest_step: float = 10.0
    frames: int = 201
    lazy_from: float = 0.5
    flow_times: int = 25
    dtype: str = "float32"

    def __post_init__(self):
        check_counts(self, d=1, n=1, width=2, seeds=1, steps=1, frames=2, flow_times=2)
        check_positive(self, "taus", "step", "largest_step", "lazy_from")
        check_even(self, "width")
        check_dtype(self)


PRESETS = {
    "small": Settings(
        d=20, n=60, width=10, taus=(0.05, 0.2, 1.0, 4.0), seeds=2, steps=400, frames=21, lazy_from=1.0, flow_times=6
    ),
    "default": Settings(),
    "paper": Settings(taus=tuple(float(f"{10**e:.4g}") for e in np.arange(-22, 11) / 10), seeds=10),
}


def sample(settings: Settings, seed: Any) -> Problem:
    """Draw the problem of a seed."""
    return sample_problem(seed, settings.n, settings.d, settings.width, dtype=settings.dtype)


def step_of(settings: Settings, tau: Array) -> Array:
    """Return the step of gradient descent at a tau."""
    return jnp.minimum(settings.largest_step, settings.step / tau**2)


def run_descent(settings: Settings, problem: Problem, tau: Array) -> dict[str, Array]:
    """Follow gradient descent from tau times the start; return losses along the way and how far the weights moved."""
    x, y, teacher, start = problem
    f = two_layer()
    h, loss = on_data(f, x), square_loss(y)
    tau = tau.astype(x.dtype)
    w0 = jtu.tree_map(lambda leaf: tau * leaf, start)

    def measure(v: Params) -> dict[str, Array]:
        w = jtu.tree_map(jnp.add, w0, v)
        return {"risk": risk_at(w0, v, teacher), "train_loss": loss(h(w))}

    gradient = jax.grad(lambda w: loss(h(w)))
    frames = even_frames(settings.steps, settings.frames)
    v, seen = descend(lambda w, _: gradient(w), w0, optax.sgd(step_of(settings, tau)), frames, measure)
    moved = optax.tree.norm(v) / optax.tree.norm(w0)
    stability = activation_stability(f, w0, jtu.tree_map(jnp.add, w0, v), x)
    return {**seen, "moved": moved, "stability": stability}


def run_tangent(settings: Settings, problem: Problem) -> dict[str, Array]:
    r"""Return the risk along the descent of the tangent model at the start.

    After k steps $v_k = J^T U \frac{1 - (1 - \eta\lambda)^k}{n\lambda} U^T y^*$ with $K = JJ^T/n = U \lambda U^T$; its
    outputs at the start are zero. Computed in float64 and at tau = 1, which by homogeneity stands for every tau whose
    step is not capped.
    """
    dtype = problem.teacher["b"].dtype
    x, y, start = jtu.tree_map(lambda leaf: leaf.astype(dtype), (problem.x, problem.y, problem.start))
    values, vectors = jnp.linalg.eigh(gram(two_layer(), start, x) / x.shape[0])
    values = jnp.maximum(values, 0)
    tangent = linearize(on_data(two_layer(), x), start)
    coefficients = vectors.T @ y / x.shape[0]

    def risk(k: Array) -> Array:
        # A whole power: a mode that the step overshoots changes sign.
        left = jax.lax.pow(1 - settings.step * values, jnp.full(values.shape, k))
        shares = (1 - left) / jnp.where(values > 0, values, 1)
        cotangent = vectors @ (jnp.where(values > 0, shares, settings.step * k.astype(dtype)) * coefficients)
        return tangent_population_risk(start, tangent.vjp(cotangent), problem.teacher)

    return {"tangent_risk": jax.lax.map(risk, jnp.asarray(even_frames(settings.steps, settings.frames)))}


def run_flow(settings: Settings, seed: Array, tau: Array) -> dict[str, Any]:
    """Follow the exact flow from the same start, up to the time of the last step of gradient descent."""
    x, y, teacher, start = sample(settings, seed)
    tau = tau.astype(x.dtype)
    half = jtu.tree_map(lambda leaf: tau * leaf[: settings.width // 2], start)
    f2, w2 = symmetrize(two_layer(), half)
    times = jnp.asarray(log_frames(settings.steps, settings.flow_times - 1), tau.dtype) * step_of(settings, tau)
    # Looser than the default: near kinks of ReLU the steps are as short as the tolerance makes them.
    options = {"solver": TangentExponential(), "rtol": 1e-3, "atol": 1e-6, "max_steps": 1024, "throw": False}
    flow = gradient_flow(on_data(f2, x), square_loss(y), w2, times, save=("displacement",), **options)

    def risk(u: tuple[Params, Params]) -> Array:
        first, second = u
        v = {"a": jnp.concatenate([first["a"], -second["a"]]), "b": jnp.concatenate([first["b"], second["b"]])}
        return risk_at(jtu.tree_map(lambda leaf: tau * leaf, start), v, teacher)

    steps = flow.stats["num_steps"]
    return {"flow_risk": jax.lax.map(risk, flow.displacement), "flow_steps": steps, "result": flow.result}


def run(
    settings: Settings | None = None, *, seed: int = 0, folder: Path | None = None, progress: bool = False
) -> "xarray.Dataset":
    """Compute Figure 1(c): descent, flow and tangent model, for every seed and tau.

    Args:
        settings: None for those of the default size: about two minutes on two cores.
        seed: The first of the seeds.
        folder: Where finished seeds are kept, so that an interrupted run can continue.
        progress: Show progress bars.

    Returns:
        A dataset over seed, tau and step (of gradient descent): "risk", "train_loss", "moved" (the displacement over
        the start, in norm), "stability" (of activations), "tangent_risk"; over seed, lazy_tau and flow_step:
        "flow_risk", "flow_steps" (of the solver), "failed" and "message" of flows. "descent_failed" over seed and tau:
        the descent diverged, and its numbers are NaN.

    Raises:
        ValueError: JAX's default dtype is not float64, in which the risks are computed.

    Source:
        Chizat, Oyallon, Bach (2019), section 3.1, Figure 1(c); steps and grid from their code.
    """
    import xarray

    settings = Settings() if settings is None else settings
    check_double()
    seeds = list(range(seed, seed + settings.seeds))
    options = {"settings": dataclasses.asdict(settings), "progress": progress, "chunk": 1}
    found = _sweep_descents(settings, seeds, folder=None if folder is None else folder / "descent", **options)
    lazy = [tau for tau in settings.taus if tau >= settings.lazy_from]
    if lazy:
        flows = sweep(
            lambda seed, lazy_tau: run_flow(settings, seed, lazy_tau),
            over={"seed": seeds, "lazy_tau": lazy},
            dims={"flow_risk": ("flow_step",)},
            coords={"flow_step": log_frames(settings.steps, settings.flow_times - 1)},
            folder=None if folder is None else folder / "flow",
            **options,
        )
        found = xarray.merge([found, flows])
    return record(found, settings, seed, variant="steps and grid of the code, whose start |a|, -|a| is the paper's")


def _sweep_descents(chosen: Settings, seeds: list[int], **options: Any) -> "xarray.Dataset":
    taus = jnp.asarray(chosen.taus)

    def column(seed: Array) -> dict[str, Array]:
        problem = sample(chosen, seed)
        return jax.vmap(lambda tau: run_descent(chosen, problem, tau))(taus) | run_tangent(chosen, problem)

    dims = {"risk": ("tau", "step"), "train_loss": ("tau", "step"), "moved": ("tau",), "stability": ("tau",)}
    coords = {"tau": np.asarray(chosen.taus), "step": even_frames(chosen.steps, chosen.frames)}
    # One seed at a time: all tau share its inputs, so that their products are a single large one.
    found = sweep(column, over={"seed": seeds}, dims=dims | {"tangent_risk": ("step",)}, coords=coords, **options)
    return mark_lanes(found, "tau")


def numbers(data: "xarray.Dataset") -> list[Number]:
    """List the losses times 1000 next to their references, by tau and of the tangent model."""
    rows = []
    full = same_settings(data, Settings(), "taus", "seeds", "frames", "lazy_from", "flow_times", "dtype")
    losses = {"final": data["risk"].isel(step=-1), "best": data["risk"].min("step")}
    for kind, values in losses.items():
        for tau in data["tau"].values:
            near = [t for t in REFERENCE[kind] if abs(np.log(tau / t)) < 0.01] if full else []
            here = 1e3 * values.sel(tau=tau)
            note = f"over seeds +- {float(here.std('seed', ddof=1)):.3f} here" if data.sizes["seed"] > 1 else ""
            if near and note and kind == "final":
                note += f", {REFERENCE['spread'][near[0]]} there"
            reference = REFERENCE[kind][near[0]] if near else None
            rows.append(Number(f"{kind} loss x 1000, tau = {tau:g}", float(here.mean()), reference, note))
    tangent = {"final": data["tangent_risk"].isel(step=-1), "best": data["tangent_risk"].min("step")}
    for kind, values in tangent.items():
        reference = TANGENT_REFERENCE[kind] if full else None
        rows.append(Number(f"{kind} loss x 1000, tangent model", 1e3 * float(values.mean("seed")), reference))
    if "flow_risk" in data:
        last = data["flow_risk"].isel(flow_step=-1) / data["risk"].isel(step=-1).sel(tau=data["lazy_tau"]).drop_vars(
            "tau"
        )
        rows.append(Number("largest relative gap of flow and descent at the end", float(abs(last - 1).max())))
        rows.append(Number("flows that stopped early", float(data["failed"].sum())))
    return [*rows, Number("descents that diverged (left out)", float(data["descent_failed"].sum()))]


def draw(data: "xarray.Dataset") -> "matplotlib.figure.Figure":
    """Draw last and best loss, mean and standard deviation over seeds, with the tangent model's and those of flows."""
    figure, (ax,) = make_axes(1)
    last, best = data["risk"].isel(step=-1), data["risk"].min("step")
    for values, color, marker, label in ((last, BLUE, "o", "end of training"), (best, ORANGE, "s", "best throughout")):
        draw_band(ax, data["tau"], 1e3 * values, color=color, marker=marker, label=label)
    tangent = 1e3 * data["tangent_risk"].mean("seed")
    for value, color in ((tangent.isel(step=-1), BLUE), (tangent.min("step"), ORANGE)):
        label = "tangent model" if color == BLUE else None
        ax.axhline(float(value), color=color, linestyle="--", linewidth=1, label=label, zorder=1)
    if "flow_risk" in data:
        flows = 1e3 * data["flow_risk"].isel(flow_step=-1).mean("seed", skipna=False)
        ax.plot(data["lazy_tau"], flows, "x", color=BLACK, markersize=5, label="exact flow", zorder=4)
    ax.set_xscale("log")
    ax.set_xlabel(r"standard deviation $\tau$ of the start", fontsize=FONT + 1)
    ax.set_ylabel(r"population loss $\times\,10^3$", fontsize=FONT + 1)
    ax.set_ylim(bottom=0)
    note_stopped(ax, data)
    draw_legend(ax)
    return figure


FIGURE = Figure(
    title="test loss against the scale tau of the start", presets=PRESETS, run=run, numbers=numbers, draw=draw
)
