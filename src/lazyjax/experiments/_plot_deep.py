"""Figures 3 and 7 drawn, and the precision of large scales: deep networks on images."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lazyjax.plot.axes import BLACK, BLUE, FONT, GRAY, ORANGE, AlphaAxis, choose_scale, draw_legend, mark_failed
from lazyjax.plot.panels import draw_spectra

PARTS = (("train", "training", BLUE, "o"), ("test", "test", ORANGE, "s"))


def draw_accuracies(axes: Sequence[Any], data: Any) -> None:
    """Figure 3(a) on two axes: accuracies, and stability of activations, mean and standard deviation over seeds."""
    top, bottom = axes
    axis = AlphaAxis(data["alpha"])
    last = data.isel(epoch=-1)
    for part, label, color, marker in PARTS:
        _draw_seeds(top, axis, 100 * last[f"{part}_accuracy"], color=color, marker=marker, label=label)
    _draw_seeds(bottom, axis, 100 * data["stability"], color=BLACK, marker="^", label="activations that stay")
    top.set_ylabel("accuracy (%)", fontsize=FONT + 1)
    bottom.set_ylabel("stability (%)", fontsize=FONT + 1)
    bottom.set_ylim(top=101)
    _finish(axes, axis, data)


def draw_losses(axes: Sequence[Any], data: Any) -> None:
    """Figure 7(a) on one axis: training and test loss at the end."""
    (ax,) = axes
    axis = AlphaAxis(data["alpha"])
    last = data.isel(epoch=-1)
    for part, label, color, marker in PARTS:
        _draw_seeds(ax, axis, last[f"{part}_loss"], color=color, marker=marker, label=label)
    choose_scale(ax, [float(v) for name in ("train_loss", "test_loss") for v in last[name].values.ravel()])
    ax.set_ylabel("loss R at the end", fontsize=FONT + 1)
    _finish(axes, axis, data)


def _draw_seeds(ax: Any, axis: AlphaAxis, values: Any, *, color: str, marker: str, label: str) -> None:
    """Mean over the seeds that did not diverge, and a bar of one standard deviation."""
    mean = np.asarray(values.mean("seed", skipna=True), np.float64)
    axis.plot(ax, mean, color=color, marker=marker, label=label)
    if values.sizes["seed"] > 1:
        spread = np.asarray(values.std("seed", skipna=True), np.float64)
        ax.errorbar(axis.positions, mean, spread, linestyle="none", ecolor=color, elinewidth=1, capsize=2)


def _finish(axes: Sequence[Any], axis: AlphaAxis, data: Any) -> None:
    for ax in axes:
        mark_failed(ax, axis, data["failed"].all("seed"))
        draw_legend(ax)
        axis.finish(ax)
        ax.xaxis.label.set_fontsize(FONT + 1)
    for ax in axes[:-1]:
        ax.set_xlabel("")


def draw_two_spectra(axes: Sequence[Any], data: Any) -> None:
    """Figure 7(b) on one axis: normalized eigenvalues on images and on noise, and where the first k end."""
    (ax,) = axes
    names = {"images": str(data.attrs["setting_data"]), "noise": "uniform noise"}
    draw_spectra(ax, {names[str(i)]: (data["fraction"], data["value"].sel(inputs=i)) for i in data["inputs"].values})
    k, size = int(data.attrs["outputs"]), data.sizes["index"]
    ax.axvline(k / size, color=GRAY, linestyle=":", linewidth=1, label=f"the first k = {k}")
    fraction = np.asarray(data["fraction"], np.float64)[2 * k :]
    if fraction.size:
        level = float(data["value"].isel(inputs=0, index=2 * k))
        ax.plot(fraction, level * fraction[0] / fraction, color=GRAY, linewidth=1, label="$1/i$")
    ax.xaxis.label.set_fontsize(FONT + 1)
    ax.yaxis.label.set_fontsize(FONT + 1)
    draw_legend(ax)


def draw_wide(axes: Sequence[Any], data: Any, reference: Mapping[tuple[str, str], tuple[float, float]]) -> None:
    """Figure 3(b) on one axis: a pair of bars a network and regime; the poster's numbers as crosses."""
    (ax,) = axes
    pairs = [(str(n), str(r)) for r in data["regime"].values for n in data["network"].values]
    places = np.arange(len(pairs))
    for shift, (part, label, color, _) in zip((-0.19, 0.19), PARTS, strict=True):
        values = [
            100 * float(data[f"{part}_accuracy"].isel(epoch=-1).sel(network=n, regime=r).mean("seed", skipna=True))
            for n, r in pairs
        ]
        ax.bar(places + shift, values, 0.36, color=color, label=label)
        known = [
            (p, reference[pair][["train", "test"].index(part)]) for p, pair in enumerate(pairs) if pair in reference
        ]
        if known:
            name = "the poster" if part == "train" else None
            ax.plot([p + shift for p, _ in known], [v for _, v in known], "x", color=BLACK, markersize=5, label=name)
    ax.set_xticks(places, [f"{n}\n{r}" for n, r in pairs])
    ax.set_ylabel("accuracy (%)", fontsize=FONT + 1)
    ax.set_ylim(0, 100)
    draw_legend(ax, columns=3)


def draw_precision(axes: Sequence[Any], data: Any) -> None:
    """Errors of the outputs along training at the largest alpha, and test accuracies at the end by alpha."""
    top, bottom = axes
    alphas = np.asarray(data["alpha"], np.float64)
    styles = (("finite", "finite_jvp", BLUE, "o"), ("plain", "plain difference", ORANGE, "s"))
    axis = AlphaAxis(alphas)
    for way, label, color, marker in styles:
        errors = data["output_error"].sel(way=way).isel(alpha=-1)
        top.plot(data["epoch"], errors, color=color, marker=marker, markersize=3.5, linewidth=1.2, label=label)
        last = 100 * np.asarray(data["test_accuracy"].sel(way=way).isel(epoch=-1), np.float64)
        axis.plot(bottom, last, color=color, marker=marker, label=label)
    top.set_yscale("log")
    top.set_xlabel("epoch", fontsize=FONT + 1)
    top.set_ylabel(rf"relative error of $y$," "\n" rf"$\alpha=10^{{{np.log10(alphas[-1]):g}}}$", fontsize=FONT + 1)
    bottom.set_ylabel("test accuracy (%)", fontsize=FONT + 1)
    axis.finish(bottom)
    bottom.xaxis.label.set_fontsize(FONT + 1)
    draw_legend(top)
