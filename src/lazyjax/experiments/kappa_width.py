r"""How the criterion kappa of a random two-layer net decreases with its width m, at output scale 1/m, 1/sqrt(m) and 1.

For $h_m = \alpha(m) \sum_j \phi(\theta_j)$ with independent units of mean zero,
$E\kappa \lesssim m^{-1/2} + (m\,\alpha(m))^{-1}$: wide nets are lazy unless $\alpha(m) = 1/m$.
"""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array

from lazyjax.data.datasets import draw_teacher, sphere
from lazyjax.experiments.figure import Figure, Number, check_counts, check_positive, record
from lazyjax.experiments.student import check_double
from lazyjax.laziness.kappa import kappa
from lazyjax.losses.square import square_loss
from lazyjax.models.maps import on_data, rescale
from lazyjax.models.shallow import two_layer
from lazyjax.plot.axes import BLACK, BLUE, FONT, ORANGE, draw_legend, make_axes
from lazyjax.report.sweep import sweep

if TYPE_CHECKING:
    import matplotlib.figure
    import xarray

POWERS = {"1/m": 1.0, "1/sqrt(m)": 0.5, "1": 0.0}
"""Output scale alpha(m) = m^-power."""

REFERENCE = {"1/m": 0.003, "1/sqrt(m)": -0.498, "1": -0.532}
"""Powers of m, from an independent run with bounded weights, tanh, m from 10 to 3000; in theory 0, -1/2, -1/2."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings of the figure.

    Attributes:
        d: Dimension of the inputs.
        n: Samples.
        widths: Values of m, at least two.
        seeds: Nets per width.
        starts: Random starts of each search for the largest second derivative.
        fit_from: Slopes are fitted from this width on.

    Raises:
        ValueError: One of them is out of its range.
    """

    d: int = 5
    n: int = 20
    widths: tuple[int, ...] = (10, 30, 100, 300, 1000)
    seeds: int = 10
    starts: int = 10
    fit_from: int = 100

    def __post_init__(self):
        check_counts(self, d=1, n=1, seeds=1, starts=1, fit_from=1)
        check_counts(self, widths=1)
        check_positive(self, "widths")
        if sum(width >= self.fit_from for width in self.widths) < 2:
            msg = f"widths must hold at least two from fit_from={self.fit_from} on, for a slope, got {self.widths}."
            raise ValueError(msg)


PRESETS = {
    "small": Settings(d=2, n=5, widths=(10, 40, 160), seeds=4, starts=4, fit_from=10),
    "default": Settings(),
    "paper": Settings(d=20, n=100, widths=(10, 30, 100, 300, 1000, 3000), seeds=20),
}


def measure(settings: Settings, width: int, seed: Array, power: Array) -> dict[str, Any]:
    """Return kappa of a random tanh net with weights uniform in [-1, 1], so that its second derivatives are bounded."""
    key_teacher, key_x, key_w, key_search = jr.split(jr.key(seed), 4)
    x = settings.d**0.5 * sphere(key_x, settings.n, settings.d)
    y = two_layer()(draw_teacher(key_teacher, settings.d), x)
    shape = two_layer().init(key_w, d=settings.d, width=width)
    keys = dict(zip(shape, jr.split(key_w), strict=True))
    w0 = {name: jr.uniform(keys[name], leaf.shape, minval=-1) for name, leaf in shape.items()}
    h = on_data(rescale(two_layer(jnp.tanh), width**-power), x)
    found = kappa(h, square_loss(y), w0, starts=settings.starts, key=key_search)
    return {"kappa": found.value}


def run(
    settings: Settings | None = None, *, seed: int = 0, folder: Path | None = None, progress: bool = False
) -> "xarray.Dataset":
    """Compute kappa for every width, scale and seed.

    Args:
        settings: None for those of the default size.
        seed: The first of the seeds.
        folder: Where finished widths are kept, so that an interrupted run can continue.
        progress: Show progress bars.

    Returns:
        A dataset over width, power (of 1/m in the scale) and seed: "kappa".

    Raises:
        ValueError: JAX's default dtype is not float64.

    Source:
        Chizat, Oyallon, Bach (2019), section 1.2 and supplement A.2.
    """
    import xarray

    check_double()
    settings = Settings() if settings is None else settings
    over = {"power": list(POWERS.values()), "seed": list(range(seed, seed + settings.seeds))}
    parts = [_run_width(settings, width, over, folder, progress=progress) for width in settings.widths]
    found = xarray.concat(parts, xarray.IndexVariable("width", list(settings.widths)))
    return record(found, settings, seed, variant="tanh nets with weights uniform in [-1, 1]")


def _run_width(
    settings: Settings, width: int, over: dict[str, list[Any]], folder: Path | None, *, progress: bool
) -> "xarray.Dataset":
    return sweep(
        lambda power, seed: measure(settings, width, seed, power),
        over=over,
        chunk=1,
        progress=progress,
        folder=None if folder is None else folder / f"width-{width}",
        settings={**dataclasses.asdict(settings), "width": width},
    )


def slope_of(data: "xarray.Dataset", power: float) -> float:
    """Return the fitted power of m in the mean of kappa."""
    far = data["kappa"].sel(power=power, width=data["width"] >= data.attrs["setting_fit_from"]).mean("seed")
    return float(np.polyfit(np.log(far["width"]), np.log(far), 1)[0])


def numbers(data: "xarray.Dataset") -> list[Number]:
    """List the powers of m next to those of an independent run."""
    rows = [
        Number(
            f"power of m in E kappa, alpha(m) = {name}", slope_of(data, power), REFERENCE[name], "there m = 10 to 3000"
        )
        for name, power in POWERS.items()
    ]
    return [*rows, Number("nets that failed", float(data["failed"].sum()))]


def draw(data: "xarray.Dataset") -> "matplotlib.figure.Figure":
    """Draw the mean of kappa over random nets against the width, one line per scale, with the fitted powers."""
    figure, (ax,) = make_axes(1)
    widths = np.asarray(data["width"], np.float64)
    styles = ((1.0, BLUE, "o", "1/m"), (0.5, ORANGE, "s", r"1/\sqrt{m}"), (0.0, BLACK, "^", "1"))
    for power, color, marker, scale in styles:
        mean = np.asarray(data["kappa"].sel(power=power).mean("seed"), np.float64)
        label = rf"$\alpha={scale}$: $m^{{{slope_of(data, power):.2f}}}$"
        ax.plot(widths, mean, color=color, marker=marker, markersize=3.5, linewidth=1.2, label=label)
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xlabel("width $m$", fontsize=FONT + 1)
    ax.set_ylabel(r"mean of $\kappa$", fontsize=FONT + 1)
    draw_legend(ax)
    return figure


FIGURE = Figure(title="kappa of random nets against their width", presets=PRESETS, run=run, numbers=numbers, draw=draw)
