"""Figure 4 drawn: tangent kernels of random nets beside their limit, and how fast they tend to it."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from lazyjax.experiments.fig4_limit_kernel import LimitKernel
from lazyjax.plot.axes import BLACK, BLUE, FONT, GRAY, ORANGE, draw_legend

STYLES = ((GRAY, ":", 1.0), (BLUE, "--", 0.9), (ORANGE, "-", 0.8))
"""Colour, dashes and thickness of the nets of one width, from narrow to wide; repeated where there are more."""


def draw_limit_kernel(axes: Sequence[Any], result: LimitKernel) -> None:
    r"""Draw Figure 4 on two axes, which share no scale.

    Args:
        axes: The first gets $K_m(\varphi)$ of single nets and the limit, the second their distance against m.
        result: From `lazyjax.experiments.fig4_limit_kernel.run`.
    """
    upper, lower = axes
    _draw_realizations(upper, result)
    _draw_rate(lower, result)


def _draw_realizations(ax: Any, result: LimitKernel) -> None:
    angles = np.asarray(result.angles)
    order = np.argsort(result.settings.shown)
    for place, i in enumerate(order):
        color, dashes, thickness = STYLES[place % len(STYLES)]
        for j, values in enumerate(np.asarray(result.realizations[i])):
            label = f"$m={result.settings.shown[i]}$" if j == 0 else None
            ax.plot(angles, values, color=color, linestyle=dashes, linewidth=thickness, label=label)
    ax.plot(angles, np.asarray(result.limit), color=BLACK, linewidth=1.8, label=r"limit $K$", zorder=3)
    quarters = [0, 0.25, 0.5, 0.75, 1]
    ax.set_xticks([np.pi * q for q in quarters], ["0", r"$\pi/4$", r"$\pi/2$", r"$3\pi/4$", r"$\pi$"])
    ax.set_xlim(0, np.pi)
    ax.set_xlabel(r"angle $\varphi$ of $x$ and $x'$", fontsize=FONT + 1)
    ax.set_ylabel(r"tangent kernel $K_m(x, x')$", fontsize=FONT + 1)
    draw_legend(ax)


def _draw_rate(ax: Any, result: LimitKernel) -> None:
    widths, errors = np.asarray(result.settings.widths, np.float64), np.asarray(result.errors, np.float64)
    slope = float(result.slope)
    level = np.mean(np.log(errors) - slope * np.log(widths))
    ends = np.array([widths.min(), widths.max()])
    ax.set_xscale("log")
    ax.set_yscale("log")
    fit = rf"fit: $m^{{{slope:.3f}}}$"
    ax.plot(ends, np.exp(level) * ends**slope, color=ORANGE, linewidth=4, alpha=0.5, label=fit, zorder=1)
    order = np.argsort(widths)
    theory = np.asarray(result.expected, np.float64)[order]
    ax.plot(widths[order], theory, color=BLACK, linestyle="--", linewidth=1, label=r"theory: $(\bar V/m)^{1/2}$")
    nets = f"{result.settings.num_seeds} nets a width"
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
