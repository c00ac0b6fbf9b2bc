"""Spectra of tangent kernels on common axes, as in Figure 7(b)."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from lazyjax.plot.axes import BLACK, BLUE, GRAY, ORANGE, draw_legend, make_axes, only_positive

if TYPE_CHECKING:
    import matplotlib.figure

STYLES = ((BLUE, "-", "o"), (ORANGE, "--", "s"), (BLACK, ":", "^"), (GRAY, "-.", "v"))
"""Color, dashes and marker of the spectra of one figure, repeated if there are more."""

FEW = 30
"""Each eigenvalue gets a marker if there are at most this many."""


def plot_spectrum(spectra: Mapping[str, tuple[Any, Any]]) -> "matplotlib.figure.Figure":
    r"""Draw spectra of tangent kernels in one figure, as in Figure 7(b): $\lambda_i/\lambda_1$ over $i/(nk)$, log-log.

    Args:
        spectra: Label to (fraction, value), each (m,), from `lazyjax.kernels.normalized_spectrum`.

    Raises:
        ValueError: no spectrum.

    Source:
        Chizat, Oyallon, Bach (2019), supplement C.3, Figure 7(b).

    Example:
        >>> from lazyjax.kernels import normalized_spectrum
        >>> figure = plot_spectrum({"two modes": normalized_spectrum(np.array([4.0, 1.0]))})
        >>> print(figure.axes[0].get_xscale())
        log
    """
    if not spectra:
        msg = "spectra must map at least one label to lazyjax.kernels.normalized_spectrum(eigenvalues), got none."
        raise ValueError(msg)
    figure, (ax,) = make_axes(1)
    draw_spectra(ax, spectra)
    draw_legend(ax, columns=1 if max(map(len, spectra)) > 20 else 2)
    return figure


def draw_spectra(ax: Any, spectra: Mapping[str, tuple[Any, Any]]) -> None:
    """Draw normalized eigenvalues against the fraction of their index on axes, log-log; zeros are left out."""
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
