"""Results as figures: one function a figure, each one column (3.5 inches) wide.

matplotlib is imported here only, inside the functions, by its object interface: no window, no global state.
Colours are those of Okabe and Ito, which color-blind readers can tell apart; no line is told by color alone.
"""

import io
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from lazyjax.kernels.spectrum import normalized_spectrum
from lazyjax.plot.axes import (
    BLACK,
    BLUE,
    ORANGE,
    AlphaAxis,
    draw_legend,
    make_axes,
    mark_failed,
    only_positive,
)
from lazyjax.plot.panels import choose_lanes, draw_curve, draw_gap, draw_scores, draw_spectra
from lazyjax.report.diagnose import LazinessReport
from lazyjax.report.verdict import relative_gap

if TYPE_CHECKING:
    import matplotlib.figure
    import xarray

Source = LazinessReport | Any
"""A report, or its dataset."""


def report_figures(report: LazinessReport) -> "dict[str, matplotlib.figure.Figure]":
    """All figures of a report, by name, in the order to read them in.

    Args:
        report: From `lazyjax.diagnose`.

    Returns:
        "scores", "gaps", "drift", "eigenvalues", "curves", each a `matplotlib.figure.Figure`.
    """
    return {
        "scores": plot_scores(report),
        "gaps": plot_gaps(report),
        "drift": plot_drift(report),
        "eigenvalues": plot_eigenvalues(report),
        "curves": plot_curves(report),
    }


def encode(figure: "matplotlib.figure.Figure", kind: str, *, dpi: int = 200) -> bytes:
    """A figure as the bytes of a "png" or "svg" file; the same figure gives the same bytes.

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


def plot_scores(report: Source) -> "matplotlib.figure.Figure":
    """Accuracy (where there are classes) and loss at the end of training against alpha, beside the tangent model.

    Args:
        report: A `LazinessReport` or its dataset.
    """
    data = _dataset(report)
    kinds = [kind for kind in ("accuracy", "loss") if f"train_{kind}" in data]
    axis = AlphaAxis(data["alpha"])
    figure, axes = make_axes(len(kinds))
    for ax, kind in zip(axes, kinds, strict=True):
        draw_scores(ax, axis, data, kind)
        mark_failed(ax, axis, data["failed"])
    draw_legend(axes[0])
    axis.finish(axes[-1])
    return figure


def plot_gaps(report: Source) -> "matplotlib.figure.Figure":
    """Distance of the model from its tangent model against alpha, in outputs and in parameters.

    Args:
        report: A `LazinessReport`, whose fitted slopes are drawn too, or its dataset.
    """
    data = _dataset(report)
    slopes = report.slopes if isinstance(report, LazinessReport) else {}
    axis = AlphaAxis(data["alpha"])
    norm, unit = _parameter_unit(data)
    alphas = np.asarray(data["alpha"], dtype=np.float64)
    floor = float(relative_gap(data)[-1]) if np.isinf(alphas[-1]) else np.nan
    # The parameters' error is one of u = alpha (w - w0), so in w it falls with alpha.
    scaled = float(data["scaled_param_gap"].isel(alpha=-1).max("time")) if np.isinf(alphas[-1]) else np.nan
    with np.errstate(divide="ignore"):
        param_floor = scaled / alphas / norm
    figure, axes = make_axes(2)
    draw_gap(axes[0], axis, relative_gap(data), np.full(alphas.size, floor), slopes.get("output_gap"))
    param_gap = np.asarray(data["param_gap"].max("time"), dtype=np.float64) / norm
    draw_gap(axes[1], axis, param_gap, param_floor, slopes.get("param_gap"))
    axes[0].set_ylabel("output gap /\ninitial residual")
    axes[1].set_ylabel(f"parameter gap{unit}")
    for ax in axes:
        mark_failed(ax, axis, data["failed"])
        draw_legend(ax)
    axis.finish(axes[-1])
    return figure


def plot_drift(report: Source) -> "matplotlib.figure.Figure":
    """How far parameters, tangent kernel and activations move until the end of training, against alpha.

    Args:
        report: A `LazinessReport` or its dataset.
    """
    data = _dataset(report)
    axis = AlphaAxis(data["alpha"])
    norm, unit = _parameter_unit(data)
    moved = np.asarray(data["displacement"].isel(time=-1), dtype=np.float64) / norm
    lines = [(rf"parameters: $\|w-w_0\|${unit}", moved, BLUE, "o")]
    if "kernel_drift" in data:
        values = np.asarray(data["kernel_drift"], dtype=np.float64)
        lines.append((r"kernel: $\|K-K_0\|$ / $\|K_0\|$", values, ORANGE, "s"))
    if "stability" in data:
        values = 1 - np.asarray(data["stability"], dtype=np.float64)
        lines.append(("activations that changed sign", values, BLACK, "^"))
    figure, (ax,) = make_axes(1)
    ax.set_yscale("log")
    for label, values, color, marker in lines:
        axis.plot(ax, only_positive(values), color=color, marker=marker, label=label)
    mark_failed(ax, axis, data["failed"])
    ax.set_ylabel("relative change")
    draw_legend(ax, columns=1)
    axis.finish(ax)
    return figure


def plot_curves(report: Source) -> "matplotlib.figure.Figure":
    """Training loss and test accuracy (or loss) of the model at a few alphas and of its tangent model, over time.

    Args:
        report: A `LazinessReport` or its dataset.
    """
    import matplotlib as mpl

    data = _dataset(report)
    test = next((name for name in ("test_accuracy", "test_loss") if name in data), None)
    names = ["train_loss", *([] if test is None else [test])]
    lanes = choose_lanes(data)
    colors = mpl.colormaps["viridis"](np.linspace(0.0, 0.85, max(len(lanes), 2)))
    figure, axes = make_axes(len(names))
    for ax, name in zip(axes, names, strict=True):
        draw_curve(ax, data, name, lanes, colors)
    axes[-1].set_xlabel("flow time t (learning rate x steps)")
    draw_legend(axes[0], columns=3)
    return figure


def plot_eigenvalues(report: Source) -> "matplotlib.figure.Figure":
    """Spectrum of the tangent kernel at the start as in Figure 7(b), and which of its modes are learned in time.

    Args:
        report: A `LazinessReport` or its dataset.
    """
    data = _dataset(report)
    # In the precision they were computed in, which says what of them is rounding.
    values = np.asarray(data["kernel_eigenvalue"], dtype=data.attrs["dtype"])
    largest = float(values[0])
    curve = normalized_spectrum(values, size=data.attrs["num_train"] * data.attrs["outputs"])
    figure, (ax,) = make_axes(1)
    draw_spectra(ax, {rf"$\lambda_i/\lambda_1$, $\lambda_1={largest:.3g}$": curve})
    learned = r"$\lambda_i T=1$: learned above, by the end $T$"
    ax.axhline(1 / (largest * data.attrs["horizon"]), color=ORANGE, linestyle="--", linewidth=1, label=learned)
    ax.set_ylabel("kernel eigenvalue /\nlargest")
    draw_legend(ax, columns=1)
    return figure


def plot_spectrum(spectra: Mapping[str, tuple[Any, Any]]) -> "matplotlib.figure.Figure":
    r"""Spectra of tangent kernels in one figure, as in Figure 7(b): $\lambda_i/\lambda_1$ over $i/(nk)$, log-log.

    Args:
        spectra: Label to (fraction, value), each (m,), from `lazyjax.normalized_spectrum`.

    Raises:
        ValueError: no spectrum.

    Source:
        Chizat, Oyallon, Bach (2019), supplement C.3, Figure 7(b).

    Example:
        >>> figure = plot_spectrum({"two modes": normalized_spectrum(np.array([4.0, 1.0]))})
        >>> print(figure.axes[0].get_xscale())
        log
    """
    if not spectra:
        msg = "spectra must hold at least one curve, label to lazyjax.normalized_spectrum(eigenvalues), got none."
        raise ValueError(msg)
    figure, (ax,) = make_axes(1)
    draw_spectra(ax, spectra)
    draw_legend(ax, columns=1 if max(map(len, spectra)) > 20 else 2)
    return figure


def _parameter_unit(data: "xarray.Dataset") -> tuple[float, str]:
    """What to measure distances of parameters in: the norm at the start, unless they start from zero."""
    norm = float(data.attrs["w0_norm"])
    return (norm, r" / $\|w_0\|$") if norm > 0 else (1.0, "")


def _dataset(report: Source) -> "xarray.Dataset":
    return report.dataset if isinstance(report, LazinessReport) else report
