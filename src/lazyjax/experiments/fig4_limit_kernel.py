r"""Figure 4: tangent kernels of random two-layer ReLU nets beside their limit, equation (8).

$K_m$ of a net of m units is the mean of m independent terms, so it is off by $\sqrt{V(\varphi)/m}$ with V the variance
of one term: the rate is exactly $m^{-1/2}$, and with N(0, 1) weights V is known too.
"""

import dataclasses
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

if TYPE_CHECKING:
    import xarray

JACOBIAN_BYTES = 2**26
"""Memory for the Jacobians of the nets that are taken together."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """What Figure 4 is computed from.

    Attributes:
        d: Dimension of the inputs, at least 2.
        widths: Widths m at which the error is measured, at least two.
        shown: Those of them whose kernels are kept one by one.
        num_shown: Nets kept at each of these.
        num_seeds: Nets that each error is a mean over.
        num_angles: Angles from 0 to pi, equally spaced, both ends among them.

    Raises:
        ValueError: one of them out of its range.
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


class LimitKernel(eqx.Module):
    r"""Realizations of the tangent kernel, its limit, and the distance between them; made by `run`.

    Attributes:
        settings: What it was computed from.
        angles: $\varphi$ in [0, pi].
        limit: $K(\varphi)$ of equation (8) at unit vectors.
        realizations: $K_m(\varphi)$, one row a net, for each of the widths shown.
        errors: Root mean square of $K_m - K$ over nets and angles, one a width.
        expected: What theory has for it, $\sqrt{\bar V / m}$.
        slope: Fitted power of m in `errors`; -1/2 in theory.
    """

    settings: Settings = eqx.field(static=True)
    angles: Float[Array, " angles"]
    limit: Float[Array, " angles"]
    realizations: Float[Array, "shown nets angles"]
    errors: Float[Array, " widths"]
    expected: Float[Array, " widths"]
    slope: Float[Array, ""]


def run(settings: Settings | None = None, *, key: PRNGKeyArray) -> LimitKernel:
    r"""Measure how $K_m$ of nets with N(0, 1) weights and scale $m^{-1/2}$ tends to its limit, on a circle.

    Args:
        settings: None for those of the figure: about six seconds on two cores, most of it to compile.
        key: For the section of the sphere and the weights of the nets.

    Returns:
        `LimitKernel`, of JAX's default floating dtype.

    Source:
        Chizat, Oyallon, Bach (2019), supplement A.2 and Figure 4 (which leaves the widths open). The variance is ours.

    Example:
        >>> result = run(Settings(widths=(10, 100), shown=(), num_seeds=20, num_angles=5), key=jr.key(0))
        >>> print(f"{result.limit[2]:.4f}")
        0.1592
    """
    settings = Settings() if settings is None else settings
    key_section, key_nets = jr.split(key)
    angles = jnp.linspace(0, jnp.pi, settings.num_angles)
    circle = _section(key_section, settings.d, angles)
    limit = arccos_kernel(circle[0], circle, layer="both")
    widths = jnp.asarray(settings.widths, angles.dtype)
    errors, kept = [], {}
    options = {"units": max(settings.widths), "num": settings.num_seeds}
    for width, one in zip(settings.widths, jr.split(key_nets, len(settings.widths)), strict=True):
        kernels = sample_kernels(one, jnp.asarray(width), circle[:1], circle, **options)
        errors.append(jnp.sqrt(jnp.mean((kernels - limit[None]) ** 2)))
        kept[width] = kernels[: settings.num_shown]
    errors = jnp.stack(errors)
    empty = jnp.zeros((0, settings.num_shown, settings.num_angles), angles.dtype)
    return LimitKernel(
        settings=settings,
        angles=angles,
        limit=limit,
        realizations=jnp.stack([kept[width] for width in settings.shown]) if settings.shown else empty,
        errors=errors,
        expected=jnp.sqrt(jnp.mean(term_variance(angles)) / widths),
        slope=jnp.polyfit(jnp.log(widths), jnp.log(errors), 1)[0],
    )


def _section(key: PRNGKeyArray, d: int, angles: Float[Array, " n"]) -> Float[Array, "n d"]:
    """Points at these angles from the first one, on a random great circle of the unit sphere."""
    frame, _ = jnp.linalg.qr(jr.normal(key, (d, 2), angles.dtype))
    return jnp.stack([jnp.cos(angles), jnp.sin(angles)], axis=1) @ frame.T


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
    r"""$K_m(x, \cdot)$ of independent nets $m^{-1/2} \sum_j b_j \max(a_j \cdot x, 0)$ with N(0, 1) weights.

    One program serves all widths: nets have `units` units, and those after the first m have zero weights, which add
    nothing to the kernel.

    Args:
        key: For the weights.
        width: m, at most `units`.
        x: The fixed input, in a row.
        others: The inputs beside it.
        units: Units of every net.
        num: Nets.
    """
    f = rescale(two_layer(), jnp.sqrt(1 / width.astype(x.dtype)))

    def one(key: PRNGKeyArray) -> Array:
        w = two_layer().init(key, d=x.shape[1], width=units, dtype=x.dtype)
        used = (jnp.arange(units) < width).astype(x.dtype)
        return gram(f, {"a": used * w["a"], "b": used[:, None] * w["b"]}, x, others)[0]

    together = JACOBIAN_BYTES // (others.shape[0] * (x.shape[1] + 1) * units * x.dtype.itemsize)
    # A divisor of num: what is left over would be compiled once more.
    batch = next(size for size in range(min(max(together, 1), num), 0, -1) if num % size == 0)
    return jax.lax.map(one, jr.split(key, num), batch_size=batch)


def term_variance(angles: Float[Array, " n"]) -> Float[Array, " n"]:
    r"""V, the variance of one unit's term $b^2 \cos\varphi\, 1_+ + \max(a \cdot x, 0) \max(a \cdot x', 0)$ of $K_m$.

    $1_+$ says that both products are positive; unit x and x', N(0, 1) weights, so $E(b^4) = 3$.

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


def run_table(
    settings: Settings | None = None, *, seed: int = 0, folder: Path | None = None, progress: bool = False
) -> "xarray.Dataset":
    """`run` as a labeled dataset: its fields over angle, width, shown width and net.

    Args:
        settings: As of `run`.
        seed: For the key.
        folder: Not used: a run takes seconds.
        progress: Not used.
    """
    import xarray

    del folder, progress
    result = run(settings, key=jr.key(seed))
    chosen = result.settings
    data = {
        "limit": ("angle", result.limit),
        "realizations": (("shown", "net", "angle"), result.realizations),
        "errors": ("width", result.errors),
        "expected": ("width", result.expected),
        "slope": ((), result.slope),
    }
    coords = {"angle": result.angles, "width": list(chosen.widths), "shown": list(chosen.shown)}
    return record(xarray.Dataset(jax.device_get(data), jax.device_get(coords)), chosen, seed, variant="the paper's")


def from_table(data: "xarray.Dataset") -> LimitKernel:
    """The result behind a dataset of `run_table`."""
    stored = {field.name: data.attrs[f"setting_{field.name}"] for field in dataclasses.fields(Settings)}
    # An empty tuple is stored as its text.
    several = {name: () if stored[name] == "()" else stored[name] for name in ("widths", "shown")}
    chosen: dict[str, Any] = {name: int(value) for name, value in stored.items() if name not in several}
    chosen |= {name: tuple(int(width) for width in np.atleast_1d(value)) for name, value in several.items()}
    fields = {name: jnp.asarray(data[name].values) for name in ("limit", "realizations", "errors", "expected", "slope")}
    return LimitKernel(settings=Settings(**chosen), angles=jnp.asarray(data["angle"].values), **fields)


def numbers(data: "xarray.Dataset") -> list[Number]:
    """The rate beside theory, the errors over the expected ones, the limit at quarters of the half circle."""
    rows = [Number("power of m in the error", float(data["slope"]), -0.5)]
    for width in data["width"].values:
        one = data.sel(width=width)
        rows.append(Number(f"error / expected, m = {width}", float(one["errors"] / one["expected"]), 1.0))
    known = (1.0, 0.6428696254, 0.1591549431, -0.0642371558, 0.0)
    for quarter, value in enumerate(known):
        place = quarter * (data.sizes["angle"] - 1) / 4
        if place == int(place):
            rows.append(Number(f"K({quarter} pi/4)", float(data["limit"][int(place)]), value))
    return rows


PRESETS = {
    "small": Settings(widths=(10, 100, 300), shown=(10, 100), num_shown=3, num_seeds=50, num_angles=13),
    "default": Settings(),
    "paper": Settings(widths=(10, 30, 100, 300, 1000, 3000, 10_000), num_seeds=400),
}
FIGURE = Figure("tangent kernels of random nets and their limit", PRESETS, run_table, numbers)
