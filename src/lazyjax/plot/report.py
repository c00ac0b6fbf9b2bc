"""The figures of a report: one function per figure, each one column (3.5 inches) wide."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lazyjax.kernels.spectrum import normalized_spectrum
from lazyjax.plot.axes import (
    BLACK,
    BLUE,
    GRAY,
    ORANGE,
    AlphaAxis,
    choose_scale,
    draw_legend,
    make_axes,
    mark_failed,
    only_positive,
)
from lazyjax.plot.spectrum import draw_spectra
from lazyjax.report.diagnose import LazinessReport
from lazyjax.report.verdict import Slope, relative_gap

if TYPE_CHECKING:
    import matplotlib.figure
    import xarray

Source = LazinessReport | Any
"""A report, or its dataset."""

PARTS = {"train": (BLUE, "o"), "test": (ORANGE, "s")}


def report_figures(report: LazinessReport) -> "dict[str, matplotlib.figure.Figure]":
    """Draw all figures of a report, by name, in the order to read them in.

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


def plot_scores(report: Source) -> "matplotlib.figure.Figure":
    """Draw accuracy (if there are classes) and loss at the end of training against alpha, next to the tangent model.

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
    """Draw the distance of the model from its tangent model against alpha, in outputs and in parameters.

    Args:
        report: A `LazinessReport`, whose fitted slopes are drawn too, or its dataset.
    """
    data = _dataset(report)
    slopes = report.slopes if isinstance(report, LazinessReport) else {}
    axis = AlphaAxis(data["alpha"])
    norm, unit = _parameter_unit(data)
    alphas = np.asarray(data["alpha"], dtype=np.float64)
    floor = float(relative_gap(data)[-1]) if np.isinf(alphas[-1]) else np.nan
    # The error of the parameters is one of u = alpha (w - w0), so in w it falls with alpha.
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
    """Draw how far parameters, tangent kernel and activations move by the end of training, against alpha.

    Args:
        report: A `LazinessReport` or its dataset.
    """
    data = _dataset(report)
    axis = AlphaAxis(data["alpha"])
    norm, unit = _parameter_unit(data)
    moved = np.asarray(data["displacement_norm"].isel(time=-1), dtype=np.float64) / norm
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
    """Draw training loss and test accuracy (or loss) over time: the model at a few alphas, and its tangent model.

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
    """Draw the spectrum of the tangent kernel at the start as in Figure 7(b), and which modes are learned in time.

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


def _parameter_unit(data: "xarray.Dataset") -> tuple[float, str]:
    """Return the unit for distances of parameters: their norm at the start, unless they start from zero."""
    norm = float(data.attrs["w0_norm"])
    return (norm, r" / $\|w_0\|$") if norm > 0 else (1.0, "")


def _dataset(report: Source) -> "xarray.Dataset":
    return report.dataset if isinstance(report, LazinessReport) else report


def draw_scores(ax: Any, axis: AlphaAxis, data: Any, kind: str) -> None:
    """Draw accuracy or loss at the end of training against alpha, with dashed lines for the tangent model."""
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
    """Draw a gap against alpha, its fitted power law, and the numerical floor shaded."""
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
    """Draw one measure along training: the model at a few alphas, later ones thinner, and its tangent model."""
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
    """Return the three smallest scales, at which the curves differ, and the largest finite one."""
    alphas = np.asarray(data["alpha"], dtype=np.float64)
    usable = [i for i in range(alphas.size) if np.isfinite(alphas[i]) and not bool(data["failed"][i])]
    return usable if len(usable) <= 4 else [*usable[:3], usable[-1]]


def _power(alpha: float) -> str:
    exponent = np.log10(alpha)
    whole = round(exponent)
    return f"10^{{{whole}}}" if abs(exponent - whole) < 1e-6 and abs(whole) > 2 else f"{alpha:g}"
