"""All figures by the name that the command line has for them."""

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

from lazyjax.experiments import (
    deep_precision,
    kappa_width,
    lazy_rates,
    sparse_regression,
)
from lazyjax.experiments import (
    fig1ab_fig6_trajectories as trajectories,
)
from lazyjax.experiments import (
    fig1c_student_scale as student_scale,
)
from lazyjax.experiments import (
    fig2a_student_width as student_width,
)
from lazyjax.experiments import (
    fig2b_population_descent as population_descent,
)
from lazyjax.experiments import (
    fig3a_fig7a_deep_scale as deep_scale,
)
from lazyjax.experiments import (
    fig3b_deep_wide as deep_wide,
)
from lazyjax.experiments import (
    fig4_limit_kernel as limit_kernel,
)
from lazyjax.experiments import (
    fig7b_deep_spectrum as deep_spectrum,
)
from lazyjax.experiments.figure import Figure

FIGURES: dict[str, Figure] = {
    "fig1a": trajectories.FIGURE_1A,
    "fig1b": trajectories.FIGURE_1B,
    "fig1c": student_scale.FIGURE,
    "fig2a": student_width.FIGURE,
    "fig2b": population_descent.FIGURE,
    "fig3a": deep_scale.FIGURE_3A,
    "fig3b": deep_wide.FIGURE,
    "fig4": limit_kernel.FIGURE,
    "fig6a": trajectories.FIGURE_6A,
    "fig6b": trajectories.FIGURE_6B,
    "fig6c": trajectories.FIGURE_6C,
    "fig7a": deep_scale.FIGURE_7A,
    "fig7b": deep_spectrum.FIGURE,
    "precision": deep_precision.FIGURE,
    "woodworth": sparse_regression.FIGURE,
    "kappa-width": kappa_width.FIGURE,
    "rates": lazy_rates.FIGURE,
}


def find(name: str) -> Figure:
    """The figure of a name.

    Raises:
        ValueError: no such figure; the message has the nearest name.
    """
    if name not in FIGURES:
        near = difflib.get_close_matches(name.lower().replace("figure", "fig").replace("_", "-"), FIGURES, 1, 0.5)
        hint = f"did you mean {near[0]}?" if near else "choose one of these."
        msg = f"there is no figure {name!r} among {', '.join(FIGURES)}; {hint}"
        raise ValueError(msg)
    return FIGURES[name]


def settings_of(name: str, size: str = "default", changes: Mapping[str, Any] | None = None) -> Any:
    """A figure's settings of a size, some of them changed.

    Args:
        name: Of the figure.
        size: "small", "default", and "paper" or, for the figures of deep networks, "gpu".
        changes: Setting to value; where the setting is several numbers, one will do.

    Raises:
        ValueError: an unknown figure, size or setting; a value out of its range, or not of the setting's type.

    Example:
        >>> settings_of("fig1c", "paper", {"seeds": 2, "taus": 0.1}).taus
        (0.1,)
    """
    figure = find(name)
    if size not in figure.presets:
        msg = f"size must be one of {', '.join(figure.presets)} for {name}, got {size!r}."
        raise ValueError(msg)
    preset = figure.presets[size]
    chosen, names = {}, [field.name for field in dataclasses.fields(preset)]
    for key, value in (changes or {}).items():
        if key not in names:
            msg = f"{name} has no setting {key!r}; it has {', '.join(names)}."
            raise ValueError(msg)
        chosen[key] = _as_like(key, value, getattr(preset, key))
    return dataclasses.replace(preset, **chosen)


def _as_like(name: str, value: Any, present: Any) -> Any:
    """A value as the setting holds it."""
    if isinstance(present, tuple):
        value = value if isinstance(value, tuple | list) else (value,)
        return tuple(_as_like(name, item, present[0]) for item in value) if present else tuple(value)
    if isinstance(present, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not type(present):
        msg = f"{name} must be of type {type(present).__name__} as {present!r} is, got {value!r}."
        raise ValueError(msg)
    return value
