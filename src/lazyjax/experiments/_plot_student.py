"""Figures 1(c), 2(a), 2(b) drawn: the loss of students against the scale of their start, and against their width."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from lazyjax.plot.axes import BLACK, BLUE, FONT, ORANGE, draw_legend, note_stopped

BAND = 0.2
"""Opacity of a standard deviation."""


def draw_student_scale(axes: Sequence[Any], data: Any) -> None:
    """Figure 1(c) on one axis: last and best loss, mean and standard deviation over seeds, the tangent model, flows."""
    (ax,) = axes
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


def draw_band(ax: Any, x: Any, values: Any, *, color: str, marker: str, label: str) -> None:
    """Mean over seeds as a line, one standard deviation to either side as a band."""
    mean, spread = (np.asarray(part, np.float64) for part in (values.mean("seed"), values.std("seed")))
    places = np.asarray(x, np.float64)
    ax.fill_between(places, mean - spread, mean + spread, color=color, alpha=BAND, linewidth=0)
    ax.plot(places, mean, color=color, marker=marker, markersize=3.5, linewidth=1.2, label=label)


def draw_student_width(axes: Sequence[Any], data: Any) -> None:
    """Figure 2(a) on one axis: loss at the end against the width, mean and standard deviation over seeds."""
    (ax,) = axes
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


def draw_population(axes: Sequence[Any], data: Any, slow: Any) -> None:
    """Figure 2(b) on one axis: final loss over the zero predictor's; hatched where it was still falling."""
    (ax,) = axes
    series = (("risk", BLUE, "o", "SGD"), ("flow_risk", ORANGE, "s", "exact population flow"))
    for name, color, marker, label in series:
        values = data[name].isel(step=-1) / data["zero_risk"]
        if name == "flow_risk":
            values = values.where(~data["failed"].any("seed"))
        draw_band(ax, data["tau"], values, color=color, marker=marker, label=label)
    taus = np.asarray(data["tau"], np.float64)
    edges = np.sqrt(np.concatenate([[taus[0] ** 2], taus[1:] * taus[:-1], [taus[-1] ** 2]]))
    label = "still falling"
    for place in np.flatnonzero(np.asarray(slow)):
        ax.axvspan(
            edges[place], edges[place + 1], facecolor="none", edgecolor="0.7", hatch="//", linewidth=0, label=label
        )
        label = None
    ax.set_xscale("log")
    ax.set_xlabel(r"standard deviation $\tau$ of the start", fontsize=FONT + 1)
    ax.set_ylabel("population loss /\nzero predictor's", fontsize=FONT + 1)
    ax.set_ylim(bottom=0)
    note_stopped(ax, data)
    draw_legend(ax)
