r"""Figure 4: tangent kernels of random two-layer ReLU nets compared with their limit, equation (8).

$K_m$ of a net of m units is the mean of m independent terms, so its standard deviation is $\sqrt{V(\varphi)/m}$ with V
the variance of one term: the rate is exactly $m^{-1/2}$, and with N(0, 1) weights V is known too.
"""

import dataclasses
import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float, Integer, PRNGKeyArray

from lazyjax.experiments.figure import Figure, Number, record
from lazyjax.kernels.gram import gram
from lazyjax.kernels.infinite_width import arccos_kernel
from lazyjax.models.maps import rescale
from lazyjax.models.shallow import two_layer
from lazyjax.plot.axes import BLACK, BLUE, FONT, GRAY, ORANGE, draw_legend, make_axes

if TYPE_CHECKING:
    import matplotlib.figure
    import xarray

JACOBIAN_BYTES = 2**26
"""Memory for the Jacobians of the nets that are computed together."""

LIMITS = (1.0, 0.6428696254, 0.1591549431, -0.0642371558, 0.0)
"""K at 0, pi/4, pi/2, 3 pi/4 and pi, by equation (8)."""

STYLES = ((GRAY, ":", 1.0), (BLUE, "--", 0.9), (ORANGE, "-", 0.8))
"""Color, dashes and thickness of the nets of one width, from narrow to wide, repeated if there are more."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings of Figure 4.

    Attributes:
        d: Dimension of the inputs, at least 2.
        widths: Widths m at which the error is measured, at least two.
        shown: The widths whose kernels are kept one by one.
        num_shown: Number of nets kept for each of these.
        num_seeds: Number of nets that each error is a mean over.
        num_angles: Number of angles from 0 to pi, equally spaced, both ends included.

    Raises:
        ValueError: One of them is out of its range.
    """

    d: int = 10
    widths: tuple[int, ...] = (10, 30, 100, 300, 1000, 3000)
    shown: tuple[int, ...] = (10, 100, 1000)
    num_shown: int = 5
    num_seeds: int = 200
    num_angles: int = 61

    def __post_init__(self):
        if self.d < 2:
            msg = f"d must be at least 2, so that the sphere has a section with all angles, got {self.d}."
            raise ValueError(msg)
        if len(set(self.widths)) < 2 or min(self.widths) < 1:
            msg = f"widths must be at least two positive numbers, for a rate, got {self.widths}."
            raise ValueError(msg)
        if not set(self.shown) <= set(self.widths):
            msg = f"shown must be some of widths {self.widths}, got {self.shown}."
            raise ValueError(msg)
        if self.num_angles < 2:
            msg = f"num_angles must be at least 2 (the angles 0 and pi), got {self.num_angles}."
            raise ValueError(msg)
        if not 1 <= self.num_shown <= self.num_seeds:
            msg = f"num_shown must lie in 1..num_seeds, got {self.num_shown} of {self.num_seeds}."
            raise ValueError(msg)


PRESETS = {
    "small": Settings(widths=(10, 100, 300), shown=(10, 100), num_shown=3, num_seeds=50, num_angles=13),
    "default": Settings(),
    "paper": Settings(widths=(10, 30, 100, 300, 1000, 3000, 10_000), num_seeds=400),
}


def run(
    settings: Settings | None = None, *, seed: int = 0, folder: Path | None = None, progress: bool = False
) -> "xarray.Dataset":
    r"""Measure how $K_m$ of nets with N(0, 1) weights and scale $m^{-1/2}$ tends to its limit, on a circle.

    Args:
        settings: None for those of the default size: about six seconds on two cores, most of it to compile.
        seed: The seed of the section of the sphere and of the nets.
        folder: Not used: a run takes seconds.
        progress: Not used.

    Returns:
        A dataset over angle, width, and shown width and net: "limit", $K(\varphi)$ of equation (8) at unit vectors;
        "realizations", $K_m(\varphi)$ of single nets of the widths shown; "errors", the root mean square of $K_m - K$
        over nets and angles for each width; "expected", what theory predicts for it, $\sqrt{\bar V / m}$; "slope", the
        fitted power of m in "errors", in theory -1/2.

    Source:
        Chizat, Oyallon, Bach (2019), supplement A.2 and Figure 4 (which leaves the widths open). The variance is ours.
    """
    import xarray

    del folder, progress
    settings = Settings() if settings is None else settings
    key_section, key_nets = jr.split(jr.key(seed))
    angles, circle, limit, variance = jax.device_get(_limits(key_section, settings.d, settings.num_angles))
    errors, kept = [], {}
    options = {"units": max(settings.widths), "num": settings.num_seeds}
    for width, key in zip(settings.widths, jr.split(key_nets, len(settings.widths)), strict=True):
        kernels = np.asarray(sample_kernels(key, jnp.asarray(width), circle[:1], circle, **options))
        errors.append(np.sqrt(np.mean((kernels - limit) ** 2)))
        kept[width] = kernels[: settings.num_shown]
    shown = [kept[width] for width in settings.shown]
    shape = (len(shown), settings.num_shown, settings.num_angles)
    widths = np.asarray(settings.widths, angles.dtype)
    data = {
        "limit": ("angle", limit),
        "realizations": (("shown", "net", "angle"), np.asarray(shown, angles.dtype).reshape(shape)),
        "errors": ("width", errors),
        "expected": ("width", np.sqrt(np.mean(variance) / widths)),
        "slope": ((), np.polyfit(np.log(widths), np.log(errors), 1)[0]),
    }
    coords = {"angle": angles, "width": list(settings.widths), "shown": list(settings.shown)}
    return record(xarray.Dataset(data, coords), settings, seed, variant="the paper's")


@functools.partial(jax.jit, static_argnames=("d", "num_angles"))
def _limits(key: PRNGKeyArray, d: int, num_angles: int) -> tuple[Array, Array, Array, Array]:
    """Return angles, points at these angles on a random great circle of the sphere, and K and V there."""
    angles = jnp.linspace(0, jnp.pi, num_angles)
    frame, _ = jnp.linalg.qr(jr.normal(key, (d, 2), angles.dtype))
    circle = jnp.stack([jnp.cos(angles), jnp.sin(angles)], axis=1) @ frame.T
    return angles, circle, arccos_kernel(circle[0], circle, layer="both"), term_variance(angles)


@eqx.filter_jit
def sample_kernels(
    key: PRNGKeyArray,
    width: Integer[Array, ""],
    x: Float[Array, "1 d"],
    others: Float[Array, "n d"],
    *,
    units: int,
    num: int,
) -> Float[Array, "num n"]:
    r"""Return $K_m(x, \cdot)$ of independent nets $m^{-1/2} \sum_j b_j \max(a_j \cdot x, 0)$ with N(0, 1) weights.

    One program serves all widths: nets have `units` units, and those after the first m have zero weights, which add
    nothing to the kernel.

    Args:
        key: The key of the weights.
        width: m, at most `units`.
        x: The fixed input, in a row.
        others: The other inputs.
        units: Number of units of every net.
        num: Number of nets.
    """
    f = rescale(two_layer(), jnp.sqrt(1 / width.astype(x.dtype)))

    def one(key: PRNGKeyArray) -> Array:
        w = two_layer().init(key, d=x.shape[1], width=units, dtype=x.dtype)
        used = (jnp.arange(units) < width).astype(x.dtype)
        return gram(f, {"a": used * w["a"], "b": used[:, None] * w["b"]}, x, others)[0]

    together = JACOBIAN_BYTES // (others.shape[0] * (x.shape[1] + 1) * units * x.dtype.itemsize)
    # A divisor of num: a remainder would be compiled as a second program.
    batch = next(size for size in range(min(max(together, 1), num), 0, -1) if num % size == 0)
    return jax.lax.map(one, jr.split(key, num), batch_size=batch)


def term_variance(angles: Float[Array, " n"]) -> Float[Array, " n"]:
    r"""Return V, the variance of one unit's term of $K_m$, at unit vectors x and x' and with N(0, 1) weights.

    The term is $b^2 \cos\varphi\, 1_+ + \max(a \cdot x, 0) \max(a \cdot x', 0)$; $1_+$ says that both products are
    positive, and $E(b^4) = 3$.

    Args:
        angles: $\varphi$ in [0, pi].

    Source:
        The orders 0, 1 and 2 of Cho and Saul (2009): $2\pi E[1_+] = \pi - \varphi$,
        $2\pi E[\sigma\sigma'] = \sin\varphi + (\pi - \varphi) \cos\varphi$,
        $2\pi E[\sigma^2\sigma'^2] = 3 \sin\varphi \cos\varphi + (\pi - \varphi)(1 + 2\cos^2\varphi)$.
    """
    cosine, sine, rest = jnp.cos(angles), jnp.sin(angles), jnp.pi - angles
    first = sine + rest * cosine
    second = 3 * sine * cosine + rest * (1 + 2 * cosine**2)
    mean = (cosine * rest + first) / (2 * jnp.pi)
    return (3 * cosine**2 * rest + 2 * cosine * first + second) / (2 * jnp.pi) - mean**2


def numbers(data: "xarray.Dataset") -> list[Number]:
    """List the rate next to theory, the errors over the expected ones, and the limit at quarters of the half circle."""
    rows = [Number("power of m in the error", float(data["slope"]), -0.5)]
    for width in data["width"].values:
        one = data.sel(width=width)
        rows.append(Number(f"error / expected, m = {width}", float(one["errors"] / one["expected"]), 1.0))
    for quarter, value in enumerate(LIMITS):
        place = quarter * (data.sizes["angle"] - 1) / 4
        if place == int(place):
            rows.append(Number(f"K({quarter} pi/4)", float(data["limit"][int(place)]), value))
    return rows


def draw(data: "xarray.Dataset") -> "matplotlib.figure.Figure":
    r"""Draw $K_m(\varphi)$ of single nets and the limit, and below them their distance against m."""
    figure, (upper, lower) = make_axes(2, share=False)
    _draw_realizations(upper, data)
    _draw_rate(lower, data)
    return figure


def _draw_realizations(ax: Any, data: "xarray.Dataset") -> None:
    angles, shown = np.asarray(data["angle"]), np.asarray(data["shown"])
    for place, i in enumerate(np.argsort(shown)):
        color, dashes, thickness = STYLES[place % len(STYLES)]
        for j, values in enumerate(np.asarray(data["realizations"][i])):
            label = f"$m={shown[i]}$" if j == 0 else None
            ax.plot(angles, values, color=color, linestyle=dashes, linewidth=thickness, label=label)
    ax.plot(angles, np.asarray(data["limit"]), color=BLACK, linewidth=1.8, label=r"limit $K$", zorder=3)
    quarters = [0, 0.25, 0.5, 0.75, 1]
    ax.set_xticks([np.pi * q for q in quarters], ["0", r"$\pi/4$", r"$\pi/2$", r"$3\pi/4$", r"$\pi$"])
    ax.set_xlim(0, np.pi)
    ax.set_xlabel(r"angle $\varphi$ of $x$ and $x'$", fontsize=FONT + 1)
    ax.set_ylabel(r"tangent kernel $K_m(x, x')$", fontsize=FONT + 1)
    draw_legend(ax)


def _draw_rate(ax: Any, data: "xarray.Dataset") -> None:
    widths, errors = np.asarray(data["width"], np.float64), np.asarray(data["errors"], np.float64)
    slope = float(data["slope"])
    level = np.mean(np.log(errors) - slope * np.log(widths))
    ends = np.array([widths.min(), widths.max()])
    ax.set_xscale("log")
    ax.set_yscale("log")
    fit = rf"fit: $m^{{{slope:.3f}}}$"
    ax.plot(ends, np.exp(level) * ends**slope, color=ORANGE, linewidth=4, alpha=0.5, label=fit, zorder=1)
    order = np.argsort(widths)
    theory = np.asarray(data["expected"], np.float64)[order]
    ax.plot(widths[order], theory, color=BLACK, linestyle="--", linewidth=1, label=r"theory: $(\bar V/m)^{1/2}$")
    nets = f"{data.attrs['setting_num_seeds']} nets per width"
    ax.plot(widths, errors, "o", color=BLUE, markersize=4, label=nets, zorder=3)
    ax.set_xlabel("width $m$", fontsize=FONT + 1)
    ax.set_ylabel("root mean square\nof $K_m - K$", fontsize=FONT + 1)
    draw_legend(ax)
    # Last, when the range is known: less than two decades would get crowded labels like 2 x 10^-2.
    low, high = ax.get_ylim()
    digits = (1, 2, 5) if high < 300 * low else (1,)
    ticks = [digit * 10.0**power for power in range(-9, 9) for digit in digits]
    ticks = [tick for tick in ticks if low <= tick <= high]
    ax.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    ax.set_yticks([], minor=True)


FIGURE = Figure(
    title="tangent kernels of random nets and their limit", presets=PRESETS, run=run, numbers=numbers, draw=draw
)
