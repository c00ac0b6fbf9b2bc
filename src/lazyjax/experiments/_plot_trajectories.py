"""Figures 1(a), 1(b) and 6 drawn: units of a student moving in the plane."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from lazyjax.plot.axes import BLACK, BLUE, FONT, ORANGE, add_note


def draw_trajectories(axes: Sequence[Any], data: Any) -> None:
    """One panel: lines for $|a_j(t)| b_j(t)$, dots at the end, color by the sign of $a_j$, circle, teacher arrows."""
    (ax,) = axes
    units, signs = np.asarray(data["unit"]), np.asarray(data["sign"])
    for sign, color, label in ((1, BLUE, "$a_j>0$"), (-1, ORANGE, "$a_j<0$")):
        chosen = signs[-1] == sign
        ax.plot(units[:, chosen, 0], units[:, chosen, 1], color=color, linewidth=0.8, alpha=0.7)
        style = {"color": color, "markersize": 3.5, "linestyle": "none", "marker": "o" if sign > 0 else "s"}
        ax.plot(units[-1, chosen, 0], units[-1, chosen, 1], label=f"student, {label}", **style)
    turn = np.linspace(0, 2 * np.pi, 200)
    ax.plot(np.cos(turn), np.sin(turn), color=BLACK, linewidth=0.8, linestyle=":", label="unit circle")
    _draw_teacher(ax, np.asarray(data["teacher"]))
    reach = 1.1 * max(1.0, float(np.abs(units).max()))
    ax.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal")
    ax.set_xlabel("first coordinate", fontsize=FONT + 1)
    ax.set_ylabel("second coordinate", fontsize=FONT + 1)
    ax.legend(
        loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, fontsize=FONT, frameon=False, handlelength=1.5,
        columnspacing=1.2, borderaxespad=0.2,
    )  # fmt: skip
    message = data.attrs["flow_message"]
    if message:
        why = "slides along kinks and stops" if "collapsed" in message else "stopped early"
        add_note(ax, f"gradient descent; the exact flow {why}")


def _draw_teacher(ax: Any, teacher: np.ndarray) -> None:
    """Arrows from the origin to $|a^*_j| b^*_j$, dashed where $a^*_j < 0$; rows hold both coordinates and $a^*_j$."""
    for x, y, sign in teacher:
        style = {"arrowstyle": "-|>", "color": BLACK, "linewidth": 1.4, "linestyle": "-" if sign > 0 else "--"}
        ax.annotate("", (x, y), (0, 0), arrowprops=style, zorder=4)
    for sign, dashes in ((1, "-"), (-1, "--")):
        if (teacher[:, 2] == sign).any():
            name = "$a^*_j>0$" if sign > 0 else "$a^*_j<0$"
            ax.plot([], [], color=BLACK, linewidth=1.4, linestyle=dashes, label=f"teacher, {name}")
