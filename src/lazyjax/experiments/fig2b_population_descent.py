r"""Figure 2(b): the population loss that an under-parameterized student ends with, against the scale tau of its start.

The paper's SGD on fresh batches is compared with the exact population gradient flow up to the same time, which needs no
sampling. In the paper's code outputs are divided by m and targets by 200, the gradient lacks its 1/m, and the step of
the input layer is d times that of the other. With w twice the code's that is the paper's model with tau twice the
code's and steps $\eta = \min(0.005/\tau^2, 0.125)$ for a and $d\eta$ for b, which is how it is run here. The flow
follows the same metric: $b = \sqrt d\,\beta$ with $(a, \beta)$ Euclidean.
"""

import dataclasses
from collections.abc import Hashable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import diffrax
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array

from lazyjax._core.types import Params
from lazyjax.data.datasets import sphere
from lazyjax.data.population_risk import population_inner, population_risk
from lazyjax.experiments.descent import descend, even_frames, mark_lanes
from lazyjax.experiments.figure import (
    Figure,
    Number,
    check_counts,
    check_dtype,
    check_even,
    check_increasing,
    check_positive,
    record,
    same_settings,
)
from lazyjax.experiments.student import check_double, risk_at, sample_problem
from lazyjax.flow.gradient_flow import gradient_flow
from lazyjax.losses.square import square_loss
from lazyjax.models.maps import on_data
from lazyjax.models.shallow import two_layer
from lazyjax.plot.axes import BLUE, FONT, ORANGE, draw_band, draw_legend, make_axes, note_stopped
from lazyjax.report.sweep import sweep

if TYPE_CHECKING:
    import matplotlib.figure
    import xarray

REFERENCE = {0.02: 0.0003, 0.08: 0.0008, 0.2: 0.0017, 0.4: 0.114, 0.8: 0.207, 2.0: 0.223, 4.0: 0.221, 16.0: 0.202}
"""Final loss over that of the zero predictor by tau (twice the code's): two seeds of 10^4 steps, an independent NumPy
run."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings of Figure 2(b).

    Attributes:
        d: Dimension of the inputs.
        width: m; even, for the start is symmetrized.
        taus: Standard deviations of the start, increasing, twice the code's.
        seeds: Experiments, each with its own teacher and start.
        steps: Steps of SGD.
        batch: Samples per step.
        step: eta tau^2, so that eta = step/tau^2 ...
        largest_step: ... but at most this.
        layer_factor: Step of the input layer over that of the output layer; 0 for d, the code's; 1 for the
            paper's Euclidean metric.
        frames: Number of steps after which the risk is measured.
        slow: A loss that falls by more than this share of the zero predictor's in the last quarter has not converged.
        flow_steps: Solver steps after which an exact flow is given up.
        dtype: The dtype of SGD.

    Raises:
        ValueError: One of them is out of its range.
    """

    d: int = 100
    width: int = 50
    taus: tuple[float, ...] = (0.02, 0.08, 0.2, 0.4, 0.8, 2.0, 4.0, 16.0)
    seeds: int = 2
    steps: int = 10_000
    batch: int = 200
    step: float = 0.005
    largest_step: float = 0.125
    layer_factor: float = 0.0
    frames: int = 51
    slow: float = 0.01
    flow_steps: int = 4096
    dtype: str = "float32"

    def __post_init__(self):
        check_counts(self, d=1, width=2, seeds=1, steps=1, batch=1, frames=5, flow_steps=1)
        check_positive(self, "taus", "step", "largest_step", "slow")
        check_even(self, "width")
        check_increasing(self, "taus")
        check_dtype(self)
        if not 0 <= self.layer_factor < np.inf:
            msg = f"layer_factor must be a finite number >= 0 (0 for d, the code's), got {self.layer_factor}."
            raise ValueError(msg)

    @property
    def factor(self) -> float:
        """The step of the input layer over that of the output layer."""
        return self.layer_factor or float(self.d)


PRESETS = {
    "small": Settings(d=10, width=8, taus=(0.1, 0.5, 2.0), steps=400, batch=50, frames=9, flow_steps=1024),
    "default": Settings(),
    "paper": Settings(
        taus=(0.02, 0.04, 0.08, *(round(2 * 10 ** (e / 10), 4) for e in range(-10, 1)), 4.0, 8.0, 16.0),
        seeds=10,
        steps=20_000,
    ),
}


def step_of(settings: Settings, tau: Array) -> Array:
    """Return the step of the output layer at a tau."""
    return jnp.minimum(settings.largest_step, settings.step / tau**2)


def run_sgd(settings: Settings, seed: Array) -> dict[str, Array]:
    """Follow SGD for all tau of a seed, on the same batches."""
    _, _, teacher, start = sample_problem(seed, 1, settings.d, settings.width, dtype=settings.dtype)
    key = jr.fold_in(jr.key(seed), 1)
    f = two_layer()
    rounded = jtu.tree_map(lambda leaf: leaf.astype(settings.dtype), teacher)
    frames = even_frames(settings.steps, settings.frames)

    def lane(tau: Array) -> dict[str, Array]:
        w0 = jtu.tree_map(lambda leaf: tau.astype(leaf.dtype) * leaf, start)
        step = step_of(settings, tau.astype(settings.dtype))
        rates: dict[Hashable, Array] = {"a": step, "b": settings.factor * step}
        layers = {name: optax.sgd(rate) for name, rate in rates.items()}
        optimizer = optax.partition(layers, {"a": "a", "b": "b"})

        def gradient(w: Params, i: Array) -> Params:
            x = sphere(jr.fold_in(key, i), settings.batch, settings.d, dtype=settings.dtype)
            h = on_data(f, x)
            return jax.grad(lambda w: square_loss(h(rounded))(h(w)))(w)

        v, risk = descend(gradient, w0, optimizer, frames, lambda v: risk_at(w0, v, teacher))
        return {"risk": risk, "moved": optax.tree.norm(v) / optax.tree.norm(w0)}

    zero = 0.5 * population_inner(teacher, teacher)
    return {**jax.vmap(lane)(jnp.asarray(settings.taus)), "zero_risk": zero, "teacher_sign": jnp.sign(teacher["a"])}


def run_flow(settings: Settings, seed: Array, tau: Array) -> dict[str, Any]:
    """Follow the exact gradient flow of the population risk, whose model has the parameters themselves as outputs."""
    _, _, teacher, start = sample_problem(seed, 1, settings.d, settings.width)
    root = settings.factor**0.5
    w0 = {"a": tau * start["a"], "b": tau * start["b"] / root}
    _, unravel = ravel_pytree(w0)

    def risk(outputs: Array) -> Array:
        w = unravel(outputs)
        return population_risk({"a": w["a"], "b": root * w["b"]}, teacher)

    times = step_of(settings, tau) * jnp.asarray(even_frames(settings.steps, settings.frames), tau.dtype)
    options = {"solver": diffrax.Tsit5(), "rtol": 1e-3, "atol": 1e-6, "max_steps": settings.flow_steps}
    flow = gradient_flow(lambda w: ravel_pytree(w)[0], risk, w0, times, throw=False, **options)
    return {"flow_risk": flow.loss, "flow_steps": flow.stats["num_steps"], "result": flow.result}


def run(
    settings: Settings | None = None, *, seed: int = 0, folder: Path | None = None, progress: bool = False
) -> "xarray.Dataset":
    """Compute Figure 2(b): SGD and the exact population flow, for every seed and tau.

    Args:
        settings: None for those of the default size: about a minute on two cores.
        seed: The first of the seeds.
        folder: Where finished seeds are kept, so that an interrupted run can continue.
        progress: Show progress bars.

    Returns:
        A dataset over seed, tau and step: "risk" (exact, of the SGD iterates), "flow_risk", "moved", "zero_risk",
        "teacher_sign"; "flow_steps", "failed" and "message" of flows, which are the gradient flow in the metric of the
        steps of SGD; "descent_failed": SGD diverged, and its numbers are NaN.

    Raises:
        ValueError: JAX's default dtype is not float64.

    Source:
        Chizat, Oyallon, Bach (2019), section 3.1, Figure 2(b); steps and grid from their code.
    """
    import xarray

    check_double()
    settings = Settings() if settings is None else settings
    seeds, taus = list(range(seed, seed + settings.seeds)), list(settings.taus)
    coords = {"step": even_frames(settings.steps, settings.frames)}
    options = {"settings": dataclasses.asdict(settings), "progress": progress, "chunk": 1}
    dims = {"risk": ("tau", "step"), "moved": ("tau",), "teacher_sign": ("teacher_unit",)}
    found = sweep(
        lambda seed: run_sgd(settings, seed),
        over={"seed": seeds},
        dims=dims,
        coords=coords | {"tau": taus},
        folder=None if folder is None else folder / "sgd",
        **options,
    )
    flows = sweep(
        lambda seed, tau: run_flow(settings, seed, tau),
        over={"seed": seeds, "tau": taus},
        dims={"flow_risk": ("step",)},
        coords=coords,
        folder=None if folder is None else folder / "flow",
        **options,
    )
    variant = "the code's metric and steps" if settings.factor == settings.d else "another metric than the code's"
    return record(
        xarray.merge([mark_lanes(found, "tau"), flows]),
        settings,
        seed,
        variant=variant,
        layer_factor_used=settings.factor,
    )


def unconverged(data: "xarray.Dataset") -> "xarray.DataArray":
    """Return by tau whether the flow's mean loss (that of SGD if it stopped) still fell in the last quarter."""
    loss = data["flow_risk"].fillna(data["risk"]).mean("seed")
    last, earlier = loss.isel(step=-1), loss.isel(step=round(0.75 * (data.sizes["step"] - 1)))
    return earlier - last > data.attrs["setting_slow"] * data["zero_risk"].mean("seed")


def numbers(data: "xarray.Dataset") -> list[Number]:
    """List the final losses over that of the zero predictor next to their references, by tau."""
    free = ("taus", "seeds", "steps", "frames", "slow", "flow_steps", "dtype", "layer_factor")
    known = REFERENCE if same_settings(data, Settings(), *free) and data.attrs["layer_factor_used"] == 100 else {}
    there = "" if data.attrs["setting_steps"] == 10_000 else "reference after 10000 steps"
    rows, slow, near = [], unconverged(data), []
    for method, name in {"SGD": "risk", "exact flow": "flow_risk"}.items():
        ratio = data[name].isel(step=-1) / data["zero_risk"]
        for tau in data["tau"].values:
            near = [v for t, v in known.items() if abs(np.log(tau / t)) < 0.01]
            notes = ["still falling"] * bool(slow.sel(tau=tau)) + [there] * bool(near and there)
            value = float(ratio.sel(tau=tau).mean("seed"))
            rows.append(
                Number(f"loss / zero predictor's, {method}, tau = {tau:g}", value, *near[:1], note=", ".join(notes))
            )
        label = f"the same at the largest tau, {method}, teachers of mixed signs"
        mixed = mixed_signs(data)
        value = float(ratio.isel(tau=-1).where(mixed).mean("seed")) if mixed.any() else float("nan")
        rows.append(Number(label, value, *near[:1], note=f"{int(mixed.sum())} of {mixed.size} seeds"))
    rows.append(Number("flows that stopped early", float(data["failed"].sum())))
    return [*rows, Number("descents that diverged (left out)", float(data["descent_failed"].sum()))]


def mixed_signs(data: "xarray.Dataset") -> "xarray.DataArray":
    """Return by seed whether the teacher's neurons have both signs, as those of the reference have by their ratios.

    Neurons of one sign add up: the zero predictor loses about twice as much, and every ratio is half as large.
    """
    return abs(data["teacher_sign"].sum("teacher_unit")) < data.sizes["teacher_unit"]


def draw(data: "xarray.Dataset") -> "matplotlib.figure.Figure":
    """Draw the final loss over that of the zero predictor against tau, hatched where it was still falling."""
    figure, (ax,) = make_axes(1)
    series = (("risk", BLUE, "o", "SGD"), ("flow_risk", ORANGE, "s", "exact population flow"))
    for name, color, marker, label in series:
        values = data[name].isel(step=-1) / data["zero_risk"]
        if name == "flow_risk":
            values = values.where(~data["failed"].any("seed"))
        draw_band(ax, data["tau"], values, color=color, marker=marker, label=label)
    taus = np.asarray(data["tau"], np.float64)
    edges = np.sqrt(np.concatenate([[taus[0] ** 2], taus[1:] * taus[:-1], [taus[-1] ** 2]]))
    style = {"facecolor": "none", "edgecolor": "0.7", "hatch": "//", "linewidth": 0}
    for count, place in enumerate(np.flatnonzero(np.asarray(unconverged(data)))):
        ax.axvspan(edges[place], edges[place + 1], label=None if count else "still falling", **style)
    ax.set_xscale("log")
    ax.set_xlabel(r"standard deviation $\tau$ of the start", fontsize=FONT + 1)
    ax.set_ylabel("population loss /\nzero predictor's", fontsize=FONT + 1)
    ax.set_ylim(bottom=0)
    note_stopped(ax, data)
    draw_legend(ax)
    return figure


FIGURE = Figure(
    title="population loss against the scale tau of the start, m = 50 units",
    presets=PRESETS,
    run=run,
    numbers=numbers,
    draw=draw,
)
