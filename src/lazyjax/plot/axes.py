"""The style of all figures: panels one column wide, an alpha axis that ends in inf, legends above the data."""

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import matplotlib.axes
    import matplotlib.figure

BLUE, ORANGE, BLACK, GRAY = "#0072B2", "#D55E00", "#000000", "#999999"
FONT = 8
"""Points, at a figure width of one column."""


class AlphaAxis:
    """A logarithmic axis of output scales on which alpha = inf has its own place, to the right of a break.

    Attributes:
        alphas: The scales, rising.
        positions: Where each of them is drawn: itself, or for inf a place beyond the largest finite one.
    """

    def __init__(self, alphas: Any):
        self.alphas = np.asarray(alphas, dtype=np.float64)
        finite = self.alphas[np.isfinite(self.alphas)]
        self._finite = finite if finite.size else np.ones(1)
        decades = np.log10(self._finite.max() / self._finite.min())
        self._end = float(self._finite.max() * 10 ** max(0.16 * decades, 0.6))
        self.positions = np.where(np.isfinite(self.alphas), self.alphas, self._end)

    def plot(self, ax: Any, values: np.ndarray, *, color: str, marker: str, label: str) -> None:
        """Draw one value per scale: a line through the finite ones, a separate marker at inf."""
        values = np.asarray(values, dtype=np.float64)
        finite = np.isfinite(self.alphas)
        style = {"color": color, "marker": marker, "markersize": 4, "linewidth": 1.2}
        ax.plot(self.positions[finite], values[finite], label=label, **style)
        ax.plot(self.positions[~finite], values[~finite], linestyle="none", **style)

    def finish(self, ax: Any) -> None:
        """Set scale, ticks, label and the break, on the lowest of the panels that share the axis."""
        ax.set_xscale("log")
        ax.set_xlabel(r"output scale $\alpha$")
        positions, labels = self._ticks()
        ax.set_xticks(positions, labels)
        ax.minorticks_off()
        decades = np.log10(self.positions.max() / self._finite.min()) or 1.0
        margin = 10 ** (0.05 * decades)
        ax.set_xlim(self._finite.min() / margin, self.positions.max() * margin)
        if np.isinf(self.alphas).any():
            self._draw_break(ax)

    def _ticks(self) -> tuple[list[float], list[str]]:
        low, high = np.log10(self._finite.min()), np.log10(self._finite.max())
        exponents = np.arange(int(np.ceil(low - 1e-9)), int(np.floor(high + 1e-9)) + 1)
        exponents = exponents[:: max(1, -(-exponents.size // 6))]
        if exponents.size >= 2:
            positions, labels = [10.0**e for e in exponents], [f"$10^{{{e}}}$" for e in exponents]
        else:
            positions, labels = [float(a) for a in self._finite], [f"{a:g}" for a in self._finite]
        if np.isinf(self.alphas).any():
            positions, labels = [*positions, self._end], [*labels, r"$\infty$"]
        return positions, labels

    def _draw_break(self, ax: Any) -> None:
        """Draw two strokes across the lower edge, where the axis jumps to inf."""
        middle = np.sqrt(self._finite.max() * self._end)
        apart = 10 ** (0.012 * np.log10(self._end / self._finite.min()))
        places = {"transform": ax.get_xaxis_transform(), "clip_on": False, "zorder": 5, "linestyle": "none"}
        ax.plot([middle], [0], marker="s", markersize=5, color="white", **places)
        strokes = [middle / apart, middle * apart]
        ax.plot(strokes, [0, 0], marker=[(-0.5, -1), (0.5, 1)], markersize=8, color=BLACK, markeredgewidth=1, **places)


def make_axes(rows: int, *, share: bool = True) -> "tuple[matplotlib.figure.Figure, list[matplotlib.axes.Axes]]":
    """Return a figure one column wide (3.5 inches) and its panels, one below the other.

    Args:
        rows: Number of panels.
        share: Whether the panels share their horizontal axis.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.5, 0.7 + 1.9 * rows), layout="constrained")
    axes = list(figure.subplots(rows, 1, sharex=share, squeeze=False)[:, 0])
    for ax in axes:
        style_axes(ax)
    return figure, axes


def encode(figure: "matplotlib.figure.Figure", kind: str, *, dpi: int = 200) -> bytes:
    """Return a figure as the bytes of a "png" or "svg" file; the same figure gives the same bytes.

    Args:
        figure: The figure.
        kind: "png" or "svg".
        dpi: Dots per inch of a png.
    """
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    buffer = io.BytesIO()
    # No date and ids from a fixed salt: what a rerun writes differs only where its numbers do.
    metadata = {"Date": None} if kind == "svg" else {"Software": None}
    with mpl.rc_context({"svg.hashsalt": "lazyjax"}):
        FigureCanvasAgg(figure).print_figure(buffer, format=kind, dpi=dpi, facecolor="white", metadata=metadata)
    return buffer.getvalue()


def style_axes(ax: Any) -> None:
    """Set small type, a light grid, no box."""
    ax.tick_params(labelsize=FONT, which="both")
    ax.grid(visible=True, color="0.9", linewidth=0.6)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    for label in (ax.xaxis.label, ax.yaxis.label):
        label.set_fontsize(FONT + 1)


def draw_legend(ax: Any, *, columns: int = 2) -> None:
    """Put the legend above the axes, where it covers nothing."""
    if ax.get_legend_handles_labels()[0]:
        ax.legend(
            loc="lower center",
            bbox_to_anchor=(0.5, 1.0),
            ncols=columns,
            fontsize=FONT,
            frameon=False,
            handlelength=1.8,
            columnspacing=1.2,
            borderaxespad=0.2,
        )


def draw_band(ax: Any, x: Any, values: Any, *, color: str, marker: str, label: str) -> None:
    """Draw the mean of an xarray over seeds as a line, and a band of one standard deviation to either side."""
    mean, spread = (np.asarray(part, np.float64) for part in (values.mean("seed"), values.std("seed")))
    places = np.asarray(x, np.float64)
    ax.fill_between(places, mean - spread, mean + spread, color=color, alpha=0.2, linewidth=0)
    ax.plot(places, mean, color=color, marker=marker, markersize=3.5, linewidth=1.2, label=label)


def mark_failed(ax: Any, axis: AlphaAxis, failed: Any) -> None:
    """Draw crosses on the lower edge at scales whose flow failed: they have no value to draw."""
    failed = np.asarray(failed, dtype=bool)
    if failed.any():
        ax.plot(
            axis.positions[failed],
            np.full(int(failed.sum()), 0.04),
            "x",
            color=BLACK,
            transform=ax.get_xaxis_transform(),
            label="flow failed",
        )


def choose_scale(ax: Any, values: Sequence[float]) -> None:
    """Choose a logarithmic y axis if the values are positive and span more than one decade, else a linear one."""
    shown = np.asarray(values, dtype=np.float64)
    shown = shown[np.isfinite(shown)]
    if shown.size and shown.min() > 0 and shown.max() > 10 * shown.min():
        ax.set_yscale("log")


def only_positive(values: Any) -> np.ndarray:
    """Return the values that a logarithmic axis can show, NaN (a gap in the line) for the others."""
    values = np.asarray(values, dtype=np.float64)
    return np.where(values > 0, values, np.nan)


def add_note(ax: Any, text: str) -> None:
    """Write a line of small type below the axis label."""
    ax.annotate(
        text,
        (0.5, 0),
        (0, -32),
        xycoords="axes fraction",
        textcoords="offset points",
        ha="center",
        va="top",
        fontsize=FONT - 1.5,
        color="0.3",
    )


def note_stopped(ax: Any, data: Any) -> None:
    """Say below the axis how many flows and descents did not finish; a mean that lacks some is not drawn."""
    parts = []
    for name, text in (("failed", "flows stopped early: not drawn"), ("descent_failed", "descents diverged: left out")):
        count = int(data[name].sum()) if name in data else 0
        if count:
            parts.append(f"{count} of {data[name].size} {text}")
    if parts:
        add_note(ax, "; ".join(parts))
