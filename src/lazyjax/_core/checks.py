"""Checks of what a user passes: one clear error, before any long computation.

A check reads values only outside a trace; it always reads shapes, dtypes and structure.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.core
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np

from lazyjax._core.types import Params


def is_concrete(tree: Any) -> bool:
    """Return whether no leaf is traced, so that values can be read."""
    return not any(isinstance(leaf, jax.core.Tracer) for leaf in jtu.tree_leaves(tree))


def split_params(w0: Params, name: str = "w0") -> tuple[Params, Params]:
    """Split parameters into their coordinates (real floating arrays) and all the rest.

    Raises:
        TypeError: there is no coordinate, or a leaf is complex.
        ValueError: a coordinate is not finite, or every one is empty.
    """
    coordinates, rest = eqx.partition(w0, eqx.is_inexact_array)
    leaves = jtu.tree_leaves(coordinates)
    if any(jnp.iscomplexobj(leaf) for leaf in leaves):
        msg = (
            f"{name} must have real floating leaves, but holds complex ones; "
            "give their real and imaginary parts as two leaves."
        )
        raise TypeError(msg)
    if not leaves:
        kinds = sorted({str(getattr(leaf, "dtype", type(leaf).__name__)) for leaf in jtu.tree_leaves(w0)})
        msg = (
            f"{name} must hold at least one real floating array to train, got leaves of kind "
            f"{kinds or 'none (an empty tree)'}; convert the parameters with `.astype(jnp.float32)`."
        )
        raise TypeError(msg)
    if sum(leaf.size for leaf in leaves) == 0:
        msg = f"{name} must hold at least one number, but all its floating arrays are empty."
        raise ValueError(msg)
    check_finite(coordinates, name)
    return coordinates, rest


def check_finite(tree: Any, name: str) -> None:
    """Check that all floating entries are finite; the error says how many are not, and where the first one is."""
    for path, leaf in jtu.tree_leaves_with_path(tree):
        if not eqx.is_array(leaf) or not is_concrete(leaf) or not jnp.issubdtype(leaf.dtype, jnp.inexact):
            continue
        bad = ~np.isfinite(np.asarray(leaf))
        if bad.any():
            where = tuple(int(i) for i in np.argwhere(bad)[0])
            msg = (
                f"{name}{jtu.keystr(path)} must be finite, but {int(bad.sum())} of its {bad.size} "
                f"entries are NaN or infinite, the first at index {where}; remove or impute them."
            )
            raise ValueError(msg)


def check_fits(values: Any, name: str, dtype: Any = None, *, tiny: bool = True) -> None:
    """Check that numbers outside JAX keep their values in one of its dtypes, up to the rounding of floats.

    Without x64 JAX has 32 bits for each: it would wrap larger integers around, and make larger floats infinite.

    Args:
        values: What NumPy takes for an array; JAX's own arrays and what is no array of numbers pass.
        name: What to call them.
        dtype: The dtype that they are to have; None for the one that JAX gives them.
        tiny: Whether numbers may become 0.

    Raises:
        ValueError: one does not keep its value; the message has its place.
    """
    if isinstance(values, jax.Array):
        return
    array = np.asarray(values)
    if array.dtype == object:  # integers beyond 64 bits, or no numbers
        dtype = np.dtype("int64")
        bad = np.vectorize(lambda v: isinstance(v, int) and not -(2**63) <= v < 2**63, otypes=[bool])(array)
    elif array.dtype.kind in "iufc":
        dtype = jax.dtypes.canonicalize_dtype(array.dtype) if dtype is None else np.dtype(dtype)
        bad = _changed(array, dtype, tiny=tiny)
    else:
        return
    if bad.any():
        where = tuple(int(i) for i in np.argwhere(bad)[0])
        place = f"{name}[{', '.join(map(str, where))}]" if where else name
        msg = (
            f"{place} must be a number that {dtype} holds, got {array[where]}; rescale it, or compute in 64 bits "
            "(jax_enable_x64; --x64 on the command line)."
        )
        raise ValueError(msg)


def _changed(array: np.ndarray, dtype: Any, *, tiny: bool) -> np.ndarray:
    """Return which numbers do not survive in a dtype."""
    if jnp.issubdtype(dtype, jnp.integer):
        limits = jnp.iinfo(dtype)
        return np.asarray((array < limits.min) | (array > limits.max))
    with np.errstate(over="ignore", under="ignore"):
        there = array.astype(dtype)
    return np.asarray((np.isfinite(array) & ~np.isfinite(there)) | ((array != 0) & (there == 0) & (not tiny)))


def check_alpha(alpha: Any) -> None:
    """Check that alpha is a real number (else TypeError) in (0, inf] (else ValueError)."""
    if not is_concrete(alpha):
        return
    value = np.asarray(alpha)
    if value.shape != ():
        msg = f"alpha must be a scalar, got shape {value.shape}; use jax.vmap or lazyjax.sweep over alpha."
        raise ValueError(msg)
    if value.dtype.kind not in "iuf":
        msg = f"alpha must be a real number in (0, inf], got {alpha!r}."
        raise TypeError(msg)
    if value.dtype.kind == "f":
        check_fits(value, "alpha", jnp.result_type(float), tiny=False)
    if not value > 0:
        msg = f"alpha must be a scale in (0, inf], got {value}; use alpha=1 for the unscaled model."
        raise ValueError(msg)


def check_times(ts: Any) -> None:
    """Check that times are an increasing vector of at least two, of which only the last may be infinite."""
    if np.ndim(ts) != 1 or np.shape(ts)[0] < 2:
        msg = (
            f"ts must be a vector of at least two times (start, ..., end), got shape {np.shape(ts)}; "
            "for example ts=jnp.linspace(0., 10., 11)."
        )
        raise ValueError(msg)
    if not is_concrete(ts):
        return
    check_fits(ts, "ts")
    values = np.asarray(ts, dtype=np.float64)
    if np.isnan(values).any() or not np.isfinite(values[:-1]).all():
        msg = f"ts must be finite, except that the last may be inf, got {values}."
        raise ValueError(msg)
    steps = values[1:] - values[:-1]
    if not (steps > 0).all():
        i = int(np.argmin(steps > 0))
        msg = (
            f"ts must be strictly increasing, got ts[{i}] = {values[i]} and ts[{i + 1}] = {values[i + 1]}; "
            "sort them and drop repeats."
        )
        raise ValueError(msg)


def check_outputs(h: Callable[..., Any], *args: Any, name: str = "h") -> jax.ShapeDtypeStruct:
    """Return shape and dtype of a model's outputs; check that they are (n,) or (n, k), floating and not empty."""
    out = eqx.filter_eval_shape(h, *args)
    if not isinstance(out, jax.ShapeDtypeStruct) or len(out.shape) not in (1, 2):
        got = f"shape {out.shape}" if isinstance(out, jax.ShapeDtypeStruct) else jtu.tree_structure(out)
        msg = f"{name} must return one array of shape (n,) or (n, k), got {got}; reshape or select its outputs."
        raise ValueError(msg)
    if not jnp.issubdtype(out.dtype, jnp.floating):
        msg = f"{name} must return real floating outputs, got {out.dtype}."
        raise TypeError(msg)
    if 0 in out.shape:
        msg = f"{name} must return at least one output, got shape {out.shape}: is the data empty?"
        raise ValueError(msg)
    return out


def check_precision(dtype: Any) -> None:
    """Refuse outputs in half precision where linear algebra is needed, which has no program for them.

    Raises:
        TypeError: the dtype has fewer than 32 bits.
    """
    if jnp.finfo(dtype).bits < 32:
        msg = (
            f"h must return float32 or float64 outputs for the linear algebra of its tangent model, got {dtype}; cast "
            "them up, h(w).astype(jnp.float32), and hold the parameters in float32, or give a solver without it."
        )
        raise TypeError(msg)


def check_inputs(f: Callable[..., Any], w0: Params, x: Any, name: str) -> tuple[jax.Array, tuple[int, ...]]:
    """Return inputs as an array and the shape of f's outputs; check that they are finite, one row per sample."""
    check_fits(x, name)
    x = jnp.asarray(x)
    if x.ndim == 0 or x.size == 0:
        msg = f"{name} must hold at least one sample, got shape {x.shape}."
        raise ValueError(msg)
    check_finite(x, name)
    shape = check_outputs(f, w0, x, name="f").shape
    if shape[0] != x.shape[0]:
        msg = f"f must return one row of outputs per sample, got {shape[0]} rows for {x.shape[0]} samples of {name}."
        raise ValueError(msg)
    return x, shape
