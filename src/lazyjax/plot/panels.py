"""The panels of a report's figures, and spectra: each is drawn on axes that it is handed; `plot` makes them."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lazyjax.plot.axes import BLACK, BLUE, GRAY, ORANGE, AlphaAxis, choose_scale, only_positive
from lazyjax.report.verdict import Slope

PARTS = {"train": (BLUE, "o"), "test": (ORANGE, "s")}
STYLES = ((BLUE, "-", "o"), (ORANGE, "--", "s"), (BLACK, ":", "^"), (GRAY, "-.", "v"))
"""Colour, dashes and marker of the spectra of one figure, repeated where there are more."""
FEW = 30
"""Up to so many eigenvalues each gets a marker."""


def draw_scores(ax: Any, axis: AlphaAxis, data: Any, kind: str) -> None:
    """Accuracy or loss at the end of training against alpha, the tangent model's as dashed lines."""
    scale = 100.0 if kind == "accuracy" else 1.0
    last, shown = data.isel(time=-1), []
    for part, (color, marker) in PARTS.items():
        if f"{part}_{kind}" not in data:
            continue
        values = scale * np.asarray(last[f"{part}_{kind}"], dtype=np.float64)
        tangent = scale * float(last[f"tangent_{part}_{kind}"])
        axis.plot(ax, values, color=color, marker=marker, label=part)
        ax.axhline(tangent, color=color, linestyle="--", linewidth=1, label=f"{part}, tangent model", zorder=1)
        shown += [*values, tangent]
    if kind == "loss":
        choose_scale(ax, shown)
    ax.set_ylabel("accuracy (%)" if kind == "accuracy" else "loss R")


def draw_gap(ax: Any, axis: AlphaAxis, values: np.ndarray, floor: np.ndarray, slope: Slope | None) -> None:
    """A gap against alpha, its fitted power law, and the numerical floor shaded."""
    ax.set_yscale("log")
    axis.plot(ax, only_positive(values), color=BLUE, marker="o", label="largest over time")
    if slope is not None and np.isfinite(slope.value):
        used = (axis.alphas >= slope.first) & (axis.alphas <= slope.last) & (values > 0)
        level = np.mean(np.log(values[used]) - slope.value * np.log(axis.alphas[used]))
        ends = np.array([slope.first, slope.last])
        label = rf"fit: $\alpha^{{{slope.value:.2f}}}$"
        ax.plot(ends, np.exp(level) * ends**slope.value, color=ORANGE, linewidth=4, alpha=0.5, label=label, zorder=1)
    floor = only_positive(floor)
    if np.isfinite(floor).any():
        bottom = min(ax.get_ylim()[0], float(np.nanmin(floor)) / 3)
        ax.set_ylim(bottom=bottom)
        label = r"numerical floor ($\alpha=\infty$)"
        ax.fill_between(axis.positions, bottom, floor, color=GRAY, alpha=0.35, linewidth=0, label=label)


def draw_curve(ax: Any, data: Any, name: str, lanes: Sequence[int], colors: Any) -> None:
    """One measure along training: the model at a few alphas, later ones thinner, and its tangent model."""
    times = np.asarray(data["time"], dtype=np.float64)
    later = times > 0  # the start has no place on a logarithmic axis
    scale = 100.0 if name.endswith("accuracy") else 1.0
    shown = []
    for lane, color, width in zip(lanes, colors, (3.5, 2.6, 1.9, 1.3), strict=False):
        values = scale * np.asarray(data[name].isel(alpha=lane), dtype=np.float64)
        label = rf"$\alpha={_power(float(data['alpha'][lane]))}$"
        ax.plot(times[later], values[later], color=color, linewidth=width, label=label)
        shown += [*values[later]]
    tangent = scale * np.asarray(data[f"tangent_{name}"], dtype=np.float64)
    ax.plot(times[later], tangent[later], color=BLACK, linestyle="--", linewidth=1, label="tangent model")
    ax.set_xscale("log")
    if name.endswith("loss"):
        choose_scale(ax, [*shown, *tangent[later]])
    labels = {"train_loss": "training loss R", "test_loss": "test loss R", "test_accuracy": "test accuracy (%)"}
    ax.set_ylabel(labels[name])


def choose_lanes(data: Any) -> list[int]:
    """The three smallest scales, where the curves differ, and the largest finite one."""
    alphas = np.asarray(data["alpha"], dtype=np.float64)
    usable = [i for i in range(alphas.size) if np.isfinite(alphas[i]) and not bool(data["failed"][i])]
    return usable if len(usable) <= 4 else [*usable[:3], usable[-1]]


def _power(alpha: float) -> str:
    exponent = np.log10(alpha)
    whole = round(exponent)
    return f"10^{{{whole}}}" if abs(exponent - whole) < 1e-6 and abs(whole) > 2 else f"{alpha:g}"


def draw_spectra(ax: Any, spectra: Mapping[str, tuple[Any, Any]]) -> None:
    """Figure 7(b): normalized eigenvalues against the fraction of their index, log-log; zeros are left out."""
    first = 1.0
    for place, (label, curve) in enumerate(spectra.items()):
        fraction, value = (np.asarray(part, dtype=np.float64) for part in curve)
        color, dashes, marker = STYLES[place % len(STYLES)]
        ax.plot(
            fraction,
            only_positive(value),
            color=color,
            linestyle=dashes,
            marker=marker if fraction.size <= FEW else None,
            markersize=3,
            linewidth=1.5,
            label=label,
        )
        first = min(first, float(fraction[0]))
    ax.set_xscale("log")
    ax.set_yscale("log")
    decades = np.arange(np.ceil(np.log10(first) - 1e-9), 1)
    ticks, labels = [*10.0**decades], [f"$10^{{{e:.0f}}}$" if e else "1" for e in decades]
    if len(ticks) < 2 and first < 1:  # matplotlib would write 2 x 10^-1, 3 x 10^-1, ... on top of each other
        ticks, labels = [first, *ticks], [f"1/{round(1 / first)}", *labels]
    ax.set_xticks(ticks, labels)
    ax.tick_params(axis="x", which="minor", labelbottom=False)
    ax.set_xlabel("index of the eigenvalue / their number")
    ax.set_ylabel("eigenvalue / largest")
