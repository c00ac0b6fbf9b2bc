"""Rates against alpha or the width drawn: theorem 2.2, kappa of wide nets, diagonal linear nets."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from lazyjax.plot.axes import BLACK, BLUE, FONT, ORANGE, draw_legend, note_stopped, only_positive

LABELS = {
    "displacement_norm": r"$\sup_t |w-w_0|$",
    "param_gap": r"$\sup_t |w-\bar w|$",
    "output_gap": r"$\sup_t \|y-\bar y\|$",
}


def draw_rates(axes: Sequence[Any], data: Any) -> None:
    """Theorem 2.2: one panel a gap, both models, the first-order constants as dashed lines."""
    alphas = np.asarray(data["alpha"], np.float64)
    constants = {"param_gap": ("param_constant", 2), "output_gap": ("output_constant", 1)}
    for ax, (gap, label) in zip(axes, LABELS.items(), strict=True):
        for model, color, marker in (("centered", BLUE, "o"), ("symmetrized", ORANGE, "s")):
            one = data.sel(model=model)
            values = only_positive(one[gap])
            ax.plot(alphas, values, color=color, marker=marker, markersize=3.5, linewidth=1.2, label=model)
            name, power = constants.get(gap, ("displacement_bound", 1))
            constant = float(one[name])
            # The limit of a mirrored net's outputs is zero: what is computed for it is rounding.
            if (gap, model) != ("output_gap", "symmetrized"):
                dashes = ":" if name == "displacement_bound" else "--"
                ax.plot(alphas, constant / alphas**power, color=color, linestyle=dashes, linewidth=1, zorder=1)
        kind, what = (":", "bound of theorem 2.2") if gap == "displacement_norm" else ("--", "first-order limit")
        ax.plot([], [], color=BLACK, linestyle=kind, linewidth=1, label=what)
        ax.set_xscale("log")
        ax.set_yscale("log")
        ax.set_ylabel(label, fontsize=FONT + 1)
        draw_legend(ax, columns=3)
    axes[-1].set_xlabel(r"output scale $\alpha$", fontsize=FONT + 1)
    note_stopped(axes[-1], data)


def draw_sparse_regression(axes: Sequence[Any], data: Any, flow: Any, potential: Any) -> None:
    """Diagonal linear nets: excess norms, then the test error, against alpha; dots the flow, lines the potential."""
    upper, lower = axes
    alphas = np.asarray(data["alpha"], np.float64)
    for kind, color, marker, label in (("l1", BLUE, "o", r"$\ell_1$"), ("l2", ORANGE, "s", r"$\ell_2$")):
        upper.plot(alphas, potential[f"excess_{kind}"], color=color, linewidth=1.2, label=rf"least $Q_\alpha$, {label}")
        values = flow[f"excess_{kind}"]
        upper.plot(alphas, values, marker, color=color, markersize=4, label=f"flow, {label}")
    upper.set_ylabel("excess norm over\nthe least possible", fontsize=FONT + 1)
    lower.plot(alphas, potential["test_error"], color=BLACK, linewidth=1.2, label=r"least $Q_\alpha$")
    lower.plot(alphas, flow["test_error"], "o", color=BLACK, markersize=4, label="flow")
    for name, color, dashes in (("l1", BLUE, "--"), ("l2", ORANGE, ":")):
        error = 0.5 * data.attrs["setting_sigma"] ** 2 * float(((data[name] - data["truth"]) ** 2).sum())
        lower.axhline(error, color=color, linestyle=dashes, linewidth=1, label=rf"least $\ell_{name[1]}$", zorder=0)
    lower.set_ylabel("test error", fontsize=FONT + 1)
    lower.set_xlabel(r"scale of the start, $u_0=v_0=\alpha$", fontsize=FONT + 1)
    for ax in axes:
        ax.set_xscale("log")
        ax.set_ylim(bottom=0)
        draw_legend(ax)
    note_stopped(lower, data)


def draw_kappa_width(axes: Sequence[Any], data: Any) -> None:
    """Mean of kappa over random nets against the width, one line a scale, with the fitted powers."""
    (ax,) = axes
    widths = np.asarray(data["width"], np.float64)
    styles = ((1.0, BLUE, "o", "1/m"), (0.5, ORANGE, "s", r"1/\sqrt{m}"), (0.0, BLACK, "^", "1"))
    for power, color, marker, scale in styles:
        mean = np.asarray(data["kappa"].sel(power=power).mean("seed"), np.float64)
        far = widths >= data.attrs["setting_fit_from"]
        slope = np.polyfit(np.log(widths[far]), np.log(mean[far]), 1)[0]
        label = rf"$\alpha={scale}$: $m^{{{slope:.2f}}}$"
        ax.plot(widths, mean, color=color, marker=marker, markersize=3.5, linewidth=1.2, label=label)
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xlabel("width $m$", fontsize=FONT + 1)
    ax.set_ylabel(r"mean of $\kappa$", fontsize=FONT + 1)
    draw_legend(ax)
