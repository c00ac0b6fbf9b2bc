"""What all figures have in common: what a figure is, a number beside its reference, checks of settings, records."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    import xarray

PACKAGES = ("lazyjax", "jax", "jaxlib", "diffrax", "equinox", "optax", "numpy", "scipy")

SIZES = ("small", "default", "paper", "gpu")
"""A figure has the first two and one of the others: what takes hours on a CPU has "gpu" for the paper's own size."""


class Number(NamedTuple):
    """A number of a figure.

    Attributes:
        label: What it is.
        value: What this run found.
        reference: What it is compared with; None where nothing is known.
        note: How good that comparison is, or why there is none.
    """

    label: str
    value: float
    reference: float | None = None
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Figure:
    """A figure that can be made anew.

    Attributes:
        title: What it shows, in a line.
        presets: Settings by size, three of `SIZES`.
        run: `run(settings, seed=, folder=, progress=)` to a labeled dataset; an interrupted run goes on from what it
            kept in `folder`.
        numbers: The dataset's numbers beside their references.
        images: Whether `run` takes `data_dir`, the folder of a data set, and its settings have `data`, its name.
        twin: A figure that shows the same run, if there is one.
    """

    title: str
    presets: Mapping[str, Any]
    run: "Callable[..., xarray.Dataset]"
    numbers: "Callable[[xarray.Dataset], list[Number]]"
    images: bool = False
    twin: str | None = None


def record(dataset: "xarray.Dataset", settings: Any, seed: int, **more: Any) -> "xarray.Dataset":
    """The dataset with every setting, the seed and all versions in its attributes."""
    chosen = {f"setting_{name}": plain(value) for name, value in dataclasses.asdict(settings).items()}
    versions = {f"version_{name}": version(name) for name in PACKAGES}
    return dataset.assign_attrs({**chosen, "seed": seed, **{k: plain(v) for k, v in more.items()}, **versions})


def plain(value: Any) -> Any:
    """A setting as a NetCDF attribute holds it: numbers, texts, and lists of numbers that are not empty."""
    if isinstance(value, bool):
        return int(value)
    if value is None or (isinstance(value, tuple) and not value):
        return str(value)
    return list(value) if isinstance(value, tuple) else value


def same_settings(data: "xarray.Dataset", reference: Any, *free: str) -> bool:
    """Whether a recorded dataset has the settings of a reference, but for those that are free to differ."""
    chosen = {name: plain(value) for name, value in dataclasses.asdict(reference).items() if name not in free}
    return all(np.array_equal(data.attrs[f"setting_{name}"], value) for name, value in chosen.items())


def check_counts(settings: Any, **least: int) -> None:
    """Refuse settings that are not whole numbers of at least so much, or tuples of them."""
    for name, low in least.items():
        value = getattr(settings, name)
        values = value if isinstance(value, tuple) else (value,)
        if any(isinstance(v, bool) or not isinstance(v, int) or v < low for v in values):
            what = "whole numbers" if isinstance(value, tuple) else "a whole number"
            msg = f"{name} must be {what} of at least {low}, got {value!r}."
            raise ValueError(msg)


def check_positive(settings: Any, *names: str) -> None:
    """Refuse settings that are not positive finite numbers, or non-empty tuples of them, each only once."""
    for name in names:
        value = getattr(settings, name)
        values = value if isinstance(value, tuple) else (value,)
        good = all(isinstance(v, int | float) and not isinstance(v, bool) and 0 < v < math.inf for v in values)
        if not values or not good or len(set(values)) < len(values):
            what = "different positive finite numbers" if isinstance(value, tuple) else "a positive finite number"
            msg = f"{name} must be {what}, got {value!r}."
            raise ValueError(msg)


def check_rising(settings: Any, name: str) -> None:
    """Refuse a tuple of numbers that do not rise."""
    values = getattr(settings, name)
    if any(a >= b for a, b in itertools.pairwise(values)):
        msg = f"{name} must rise, got {values}."
        raise ValueError(msg)


def check_dtype(settings: Any) -> None:
    """Refuse a dtype that is neither single nor double precision."""
    if settings.dtype not in ("float32", "float64"):
        msg = f'dtype must be "float32" or "float64", got {settings.dtype!r}.'
        raise ValueError(msg)


def check_variant(settings: Any) -> None:
    """Refuse a variant that is neither the paper's nor its code's."""
    if settings.variant not in ("paper", "code"):
        msg = f'variant must be "paper" or "code", got {settings.variant!r}.'
        raise ValueError(msg)


def check_even(settings: Any, name: str) -> None:
    """Refuse an odd number of units for a mirrored start."""
    value = getattr(settings, name)
    for width in value if isinstance(value, tuple) else (value,):
        if width % 2:
            msg = f"{name} must be even for a symmetrized init, whose second half mirrors the first, got {width}; "
            msg += f"use {width + 1}."
            raise ValueError(msg)
