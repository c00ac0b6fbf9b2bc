r"""Theorem 2.2 measured: how fast the flow of a model tends to that of its tangent model as alpha grows.

On [0, T], $\sup|w - w_0| = O(1/\alpha)$, $\sup|w - \bar w| = O(1/\alpha^2)$ and $\sup\|y - \bar y\| = O(1/\alpha)$;
`lazy_correction` gives the constants of the last two with one solve. For a symmetrized net the constant of the outputs
vanishes, and their gap is $O(1/\alpha^2)$.
"""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import diffrax
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array

from lazyjax._core.types import Model, Params
from lazyjax.data.datasets import draw_teacher, sphere
from lazyjax.experiments.figure import (
    Figure,
    Number,
    check_counts,
    check_even,
    check_increasing,
    check_positive,
    record,
)
from lazyjax.experiments.student import check_double
from lazyjax.flow.lazy_correction import lazy_correction
from lazyjax.laziness.compare import compare
from lazyjax.losses.square import square_loss
from lazyjax.models.maps import center, on_data, symmetrize
from lazyjax.models.shallow import two_layer
from lazyjax.plot.axes import BLACK, BLUE, FONT, ORANGE, draw_legend, make_axes, note_stopped, only_positive
from lazyjax.report.sweep import sweep

if TYPE_CHECKING:
    import matplotlib.figure
    import xarray

MODELS = ("centered", "symmetrized")
GAPS = {"displacement_norm": (-1, -1), "param_gap": (-2, -2), "output_gap": (-1, -2)}
"""What is measured, and its power of alpha for the models in this order."""

LABELS = {
    "displacement_norm": r"$\sup_t |w-w_0|$",
    "param_gap": r"$\sup_t |w-\bar w|$",
    "output_gap": r"$\sup_t \|y-\bar y\|$",
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings of the figure.

    Attributes:
        d: Dimension of the inputs.
        n: Samples.
        width: m, units of the tanh net; even: half of them are doubled for the symmetrized net.
        alphas: Output scales, increasing.
        horizon: T.
        times: Number of times in [0, T] over which the largest gap is taken.
        fit_from: Slopes are fitted from this alpha on.

    Raises:
        ValueError: One of them is out of its range.
    """

    d: int = 10
    n: int = 20
    width: int = 50
    alphas: tuple[float, ...] = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)
    horizon: float = 10.0
    times: int = 21
    fit_from: float = 100.0

    def __post_init__(self):
        check_counts(self, d=1, n=1, width=2, times=2)
        check_positive(self, "alphas", "horizon", "fit_from")
        check_even(self, "width")
        check_increasing(self, "alphas")
        if sum(alpha >= self.fit_from for alpha in self.alphas) < 2:
            msg = f"alphas must hold at least two from fit_from={self.fit_from} on, for a slope, got {self.alphas}."
            raise ValueError(msg)


PRESETS = {
    "small": Settings(n=5, d=3, width=10, alphas=(10.0, 100.0, 1000.0), horizon=2.0, times=5),
    "default": Settings(),
    "paper": Settings(d=100, n=200, alphas=tuple(10.0 ** (e / 4) for e in range(17)), horizon=100.0, times=41),
}


def build(settings: Settings, seed: int, name: str) -> tuple[Model, Params, Array]:
    """Return one of the models on its data, its start, and the targets."""
    key_teacher, key_x, key_start = jr.split(jr.key(seed), 3)
    x = settings.d**0.5 * sphere(key_x, settings.n, settings.d)
    y = two_layer()(draw_teacher(key_teacher, settings.d), x)
    width = settings.width if name == "centered" else settings.width // 2
    w0 = two_layer().init(key_start, d=settings.d, width=width, tau=settings.width**-0.25)
    if name == "centered":
        return on_data(center(two_layer(jnp.tanh), w0), x), w0, y
    doubled, start = symmetrize(two_layer(jnp.tanh), w0)
    return on_data(doubled, x), start, y


def run(
    settings: Settings | None = None, *, seed: int = 0, folder: Path | None = None, progress: bool = False
) -> "xarray.Dataset":
    """Compare both models with their tangent models at every alpha, and compute the limits of their gaps.

    Args:
        settings: None for those of the default size: about a minute on two cores, most of it to compile.
        seed: The seed of data and starts.
        folder: Where finished models are kept, so that an interrupted run can continue.
        progress: Show progress bars.

    Returns:
        A dataset over model and alpha: the largest over time of "displacement_norm", "param_gap", "output_gap",
        "failed" and "message"; over model: "param_constant", "output_constant", the limits of the gaps times alpha^2
        and alpha, and "displacement_bound", sqrt(T R(0)), which bounds alpha times the displacement.

    Raises:
        ValueError: JAX's default dtype is not float64.

    Source:
        Chizat, Oyallon, Bach (2019), Theorem 2.2; the constants and the rate of symmetrized nets are ours.
    """
    import xarray

    check_double()
    settings = Settings() if settings is None else settings
    parts: list[xarray.Dataset] = []
    for name in MODELS:
        kept = None if folder is None else folder / name
        parts.append(_run_model(settings, seed, name, kept, progress=progress))
    found = xarray.concat(parts, xarray.IndexVariable("model", list(MODELS)))
    return record(found, settings, seed, variant="two-layer tanh nets")


def _run_model(settings: Settings, seed: int, name: str, kept: Path | None, *, progress: bool) -> "xarray.Dataset":
    h, w0, y = build(settings, seed, name)
    times, loss = jnp.linspace(0, settings.horizon, settings.times), square_loss(y)
    options: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-13, "solver": diffrax.Tsit5()}

    def one(alpha: Array) -> dict[str, Any]:
        both = compare(h, loss, w0, times, alpha=alpha, throw=False, **options)
        return {gap: jnp.max(getattr(both, gap)) for gap in GAPS} | {"result": both.flow.result}

    found = sweep(
        one,
        over={"alpha": list(settings.alphas)},
        chunk=1,
        folder=kept,
        progress=progress,
        settings={**dataclasses.asdict(settings), "seed": seed, "model": name},
    )
    limit = lazy_correction(h, loss, w0, times, **options)
    bound = jnp.sqrt(settings.horizon * loss(jnp.zeros_like(y)))
    constants = jax.device_get((limit.param_gap.max(), limit.output_gap.max(), bound))
    names = ("param_constant", "output_constant", "displacement_bound")
    return found.assign({name: ((), value) for name, value in zip(names, constants, strict=True)})


def slope_of(data: "xarray.Dataset", gap: str, model: str) -> float:
    """Return the fitted power of alpha in a gap at large alpha; NaN if fewer than two gaps are positive."""
    far = data.sel(model=model, alpha=data["alpha"] >= data.attrs["setting_fit_from"])
    alphas, values = np.asarray(far["alpha"], np.float64), np.asarray(far[gap], np.float64)
    good = np.isfinite(values) & (values > 0)
    return float(np.polyfit(np.log(alphas[good]), np.log(values[good]), 1)[0]) if good.sum() > 1 else float("nan")


def numbers(data: "xarray.Dataset") -> list[Number]:
    """List the slopes next to theory, and the gaps at the largest alpha over their first-order constants."""
    rows = []
    for place, model in enumerate(MODELS):
        for gap, powers in GAPS.items():
            rows.append(Number(f"power of alpha in {gap}, {model}", slope_of(data, gap, model), powers[place]))
        last, alpha = data.sel(model=model).isel(alpha=-1), float(data["alpha"][-1])
        ratio = alpha**2 * float(last["param_gap"] / last["param_constant"])
        rows.append(Number(f"alpha^2 param_gap / its constant, {model}", ratio, 1.0))
        if model == "centered":
            ratio = alpha * float(last["output_gap"] / last["output_constant"])
            rows.append(Number(f"alpha output_gap / its constant, {model}", ratio, 1.0))
    return [*rows, Number("flows that stopped early", float(data["failed"].sum()))]


def draw(data: "xarray.Dataset") -> "matplotlib.figure.Figure":
    """Draw one panel per gap with both models, and the first-order constants as dashed lines."""
    figure, axes = make_axes(3, share=False)
    alphas = np.asarray(data["alpha"], np.float64)
    constants = {"param_gap": ("param_constant", 2), "output_gap": ("output_constant", 1)}
    for ax, (gap, label) in zip(axes, LABELS.items(), strict=True):
        for model, color, marker in (("centered", BLUE, "o"), ("symmetrized", ORANGE, "s")):
            one = data.sel(model=model)
            values = only_positive(one[gap])
            ax.plot(alphas, values, color=color, marker=marker, markersize=3.5, linewidth=1.2, label=model)
            name, power = constants.get(gap, ("displacement_bound", 1))
            constant = float(one[name])
            # In the limit the outputs of a symmetrized net have no gap: what is computed for it is rounding.
            if (gap, model) != ("output_gap", "symmetrized"):
                dashes = ":" if name == "displacement_bound" else "--"
                ax.plot(alphas, constant / alphas**power, color=color, linestyle=dashes, linewidth=1, zorder=1)
        kind, what = (":", "bound of Theorem 2.2") if gap == "displacement_norm" else ("--", "first-order limit")
        ax.plot([], [], color=BLACK, linestyle=kind, linewidth=1, label=what)
        ax.set_xscale("log")
        ax.set_yscale("log")
        ax.set_ylabel(label, fontsize=FONT + 1)
        draw_legend(ax, columns=3)
    axes[-1].set_xlabel(r"output scale $\alpha$", fontsize=FONT + 1)
    note_stopped(axes[-1], data)
    return figure


FIGURE = Figure(
    title="rates of Theorem 2.2, centered and symmetrized nets", presets=PRESETS, run=run, numbers=numbers, draw=draw
)
