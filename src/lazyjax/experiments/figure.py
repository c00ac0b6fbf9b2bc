"""What a figure is, the list of all figures, and what their files share: numbers, checks of settings, records.

A new figure is one file in this folder, which ends with a `Figure` that carries all of it, and one line in `FIGURES`.
"""

import dataclasses
import difflib
import importlib
import itertools
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from lazyjax._core.records import versions

if TYPE_CHECKING:
    import matplotlib.figure
    import xarray

FIGURES: dict[str, str] = {
    "fig1a": "fig1ab_fig6_trajectories.FIGURE_1A",
    "fig1b": "fig1ab_fig6_trajectories.FIGURE_1B",
    "fig1c": "fig1c_student_scale.FIGURE",
    "fig2a": "fig2a_student_width.FIGURE",
    "fig2b": "fig2b_population_descent.FIGURE",
    "fig3a": "fig3a_fig7a_deep_scale.FIGURE_3A",
    "fig3b": "fig3b_deep_wide.FIGURE",
    "fig4": "fig4_limit_kernel.FIGURE",
    "fig6a": "fig1ab_fig6_trajectories.FIGURE_6A",
    "fig6b": "fig1ab_fig6_trajectories.FIGURE_6B",
    "fig6c": "fig1ab_fig6_trajectories.FIGURE_6C",
    "fig7a": "fig3a_fig7a_deep_scale.FIGURE_7A",
    "fig7b": "fig7b_deep_spectrum.FIGURE",
    "precision": "deep_precision.FIGURE",
    "woodworth": "sparse_regression.FIGURE",
    "kappa-width": "kappa_width.FIGURE",
    "rates": "lazy_rates.FIGURE",
}
"""All figures by the name that `lazyjax reproduce` has for them, and where each one is: file and object.

`find` gives the object; a file is imported when its figure is asked for.
"""


class Number(NamedTuple):
    """A number of a figure next to its reference.

    Attributes:
        label: What it is.
        value: What this run found.
        reference: What it is compared with; None if nothing is known.
        note: How good that comparison is, or why there is none.
    """

    label: str
    value: float
    reference: float | None = None
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Figure:
    """A figure of the paper that can be reproduced.

    Attributes:
        title: What it shows, in a line.
        presets: Settings by size: "small", "default", and the paper's own size, called "gpu" if it takes hours on a
            CPU and "paper" otherwise.
        run: `run(settings, seed=, folder=, progress=)` returns a labeled dataset; an interrupted run continues from
            what it kept in `folder`.
        numbers: `numbers(data)` lists the numbers of a dataset next to their references.
        draw: `draw(data)` returns the drawing, one column (3.5 inches) wide; the dataset may have been read back from
            NetCDF.
        images: Whether `run` takes `data_dir`, the folder of a data set, and the settings have `data`, its name.
        same_run_as: The name of another figure that shows the same run, if there is one.
    """

    title: str
    presets: Mapping[str, Any]
    run: "Callable[..., xarray.Dataset]"
    numbers: "Callable[[xarray.Dataset], list[Number]]"
    draw: "Callable[[xarray.Dataset], matplotlib.figure.Figure]"
    images: bool = False
    same_run_as: str | None = None


def find(name: str) -> Figure:
    """Return the figure with this name.

    Args:
        name: One of `FIGURES`.

    Raises:
        ValueError: There is no such figure; the message suggests the nearest name.

    Example:
        >>> print(find("fig2b").title)
        population loss against the scale tau of the start, m = 50 units
    """
    if name not in FIGURES:
        near = difflib.get_close_matches(name.lower().replace("figure", "fig").replace("_", "-"), FIGURES, 1, 0.5)
        hint = f"did you mean {near[0]}?" if near else "choose one of these."
        msg = f"there is no figure {name!r} among {', '.join(FIGURES)}; {hint}"
        raise ValueError(msg)
    file, _, attribute = FIGURES[name].partition(".")
    return getattr(importlib.import_module(f"lazyjax.experiments.{file}"), attribute)


def settings_of(name: str, size: str = "default", changes: Mapping[str, Any] | None = None) -> Any:
    """Return a figure's settings of a size, with some of them changed.

    Args:
        name: One of `FIGURES`.
        size: "small", "default", and "paper" or, for the figures of deep networks, "gpu".
        changes: Setting to value; a single number will do for a setting that is a tuple of numbers.

    Raises:
        ValueError: Unknown figure, size or setting; a value that is out of its range, or not of the setting's type.

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
        chosen[key] = _convert(key, value, getattr(preset, key))
    return dataclasses.replace(preset, **chosen)


def _convert(name: str, value: Any, present: Any) -> Any:
    """Convert a value to the type of the setting's present value."""
    if isinstance(present, tuple):
        value = value if isinstance(value, tuple | list) else (value,)
        return tuple(_convert(name, item, present[0]) for item in value) if present else tuple(value)
    if isinstance(present, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not type(present):
        msg = f"{name} must be of type {type(present).__name__} as {present!r} is, got {value!r}."
        raise ValueError(msg)
    return value


def record(dataset: "xarray.Dataset", settings: Any, seed: int, **more: Any) -> "xarray.Dataset":
    """Return the dataset with every setting, the seed and all versions in its attributes."""
    chosen = {f"setting_{name}": plain(value) for name, value in dataclasses.asdict(settings).items()}
    installed = {f"version_{name}": number for name, number in versions().items()}
    return dataset.assign_attrs({**chosen, "seed": seed, **{k: plain(v) for k, v in more.items()}, **installed})


def plain(value: Any) -> Any:
    """Return a setting as a NetCDF attribute can hold it: a number, a text, or a list that is not empty."""
    if isinstance(value, bool):
        return int(value)
    if value is None or (isinstance(value, tuple) and not value):
        return str(value)
    return list(value) if isinstance(value, tuple) else value


def same_settings(data: "xarray.Dataset", reference: Any, *free: str) -> bool:
    """Return whether a recorded dataset has the settings of a reference, except for those that are free to differ."""
    chosen = {name: plain(value) for name, value in dataclasses.asdict(reference).items() if name not in free}
    return all(np.array_equal(data.attrs[f"setting_{name}"], value) for name, value in chosen.items())


def check_counts(settings: Any, **least: int) -> None:
    """Check that settings are whole numbers of at least so much, or tuples of them."""
    for name, low in least.items():
        value = getattr(settings, name)
        values = value if isinstance(value, tuple) else (value,)
        if any(isinstance(v, bool) or not isinstance(v, int) or v < low for v in values):
            what = "whole numbers" if isinstance(value, tuple) else "a whole number"
            msg = f"{name} must be {what} of at least {low}, got {value!r}."
            raise ValueError(msg)


def check_positive(settings: Any, *names: str) -> None:
    """Check that settings are positive finite numbers, or tuples of different ones that are not empty."""
    for name in names:
        value = getattr(settings, name)
        values = value if isinstance(value, tuple) else (value,)
        good = all(isinstance(v, int | float) and not isinstance(v, bool) and 0 < v < math.inf for v in values)
        if not values or not good or len(set(values)) < len(values):
            what = "different positive finite numbers" if isinstance(value, tuple) else "a positive finite number"
            msg = f"{name} must be {what}, got {value!r}."
            raise ValueError(msg)


def check_increasing(settings: Any, name: str) -> None:
    """Check that the numbers of a tuple increase strictly."""
    values = getattr(settings, name)
    if any(a >= b for a, b in itertools.pairwise(values)):
        msg = f"{name} must increase, got {values}."
        raise ValueError(msg)


def check_dtype(settings: Any) -> None:
    """Check that the dtype is single or double precision."""
    if settings.dtype not in ("float32", "float64"):
        msg = f'dtype must be "float32" or "float64", got {settings.dtype!r}.'
        raise ValueError(msg)


def check_variant(settings: Any) -> None:
    """Check that the variant is that of the paper or that of its code."""
    if settings.variant not in ("paper", "code"):
        msg = f'variant must be "paper" or "code", got {settings.variant!r}.'
        raise ValueError(msg)


def check_even(settings: Any, name: str) -> None:
    """Check that a symmetrized start has an even number of units."""
    value = getattr(settings, name)
    for width in value if isinstance(value, tuple) else (value,):
        if width % 2:
            msg = f"{name} must be even for a symmetrized init, whose second half cancels the first, got {width}; "
            msg += f"use {width + 1}."
            raise ValueError(msg)
