"""How a result prints: a few lines for the values of one run, shapes alone for lanes and traced values."""

from collections.abc import Callable
from typing import Any

import equinox as eqx

from lazyjax._core.checks import is_concrete


def show(result: eqx.Module, axes: Any, ndim: int, text: Callable[[], str]) -> str:
    """Return the text of a result if it holds the known values of one run, else its fields with their shapes.

    Args:
        result: A result.
        axes: One of its arrays, which has more than `ndim` axes if the result holds several lanes.
        ndim: Axes of that array for a single run.
        text: Makes the lines; called only if all values are known.
    """
    if axes.ndim != ndim or not is_concrete(eqx.filter(result, eqx.is_array)):
        return eqx.tree_pformat(result)
    return text()
