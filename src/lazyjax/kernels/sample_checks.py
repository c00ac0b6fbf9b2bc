"""Checks of a model on samples: one row of outputs for each, independent of all others."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array

from lazyjax._core.checks import check_finite, check_outputs, is_concrete
from lazyjax._core.forward import jvp
from lazyjax._core.program import aval_of
from lazyjax._core.types import Model, Params

FEW = 16
"""Samples that are looked through for two that differ."""

MIXED = 0.01
"""Relative change of slopes above which a model mixes samples."""


def check_samples(f: Model, w: Params, x1: Array, x2: Array | None) -> None:
    """Refuse inputs that hold no samples or differ in shape, and a model that does not treat samples one by one.

    Outputs of two samples together are compared with those of each alone, and so are their slopes, because outputs may
    all be zero (a centered model, a last layer that starts from zero). What can be seen while tracing is left to
    `check_rows`, so that a call whose program is compiled traces nothing.
    """
    for name, x in (("x1", x1), ("x2", x2)):
        if x is None:
            continue
        if x.ndim == 0 or x.size == 0:
            msg = f"{name} must hold at least one sample along its first axis, got shape {x.shape}."
            raise ValueError(msg)
        check_finite(x, name)
    if x2 is not None and x2.shape[1:] != x1.shape[1:]:
        msg = f"x1 and x2 must hold samples of one shape, got {x1.shape[1:]} and {x2.shape[1:]}."
        raise ValueError(msg)
    pair = _two_samples(x1, x2) if is_concrete((w, x1, x2)) else None
    if pair is None:
        return
    found = _compare(f, w, pair)
    if not is_concrete(found):
        return
    together, alone, terms, turned, rounding = (np.asarray(value, np.float64) for value in found)
    check_finite(found[1], "f(w, x1[:2])")
    gap = np.max(np.abs(together - alone))
    # In half precision the digits are too few for more than a tenth.
    allowed = min(0.1, 1e3 * float(rounding))
    # A unit at its kink may turn by rounding; mixing changes slopes altogether.
    if gap > allowed * terms or turned > max(MIXED, allowed):
        msg = (
            "f must treat every sample by itself, but its outputs for one change with the other samples "
            f"(by {gap:.1e}, their slopes by {100 * turned:.2g}%), as with batch normalization in training "
            "mode; use the layer's inference mode."
        )
        raise ValueError(msg)


def check_slopes(values: Array, name: str) -> Array:
    """Return what was computed sample by sample, after a check that it is finite for all of them, if it can be read.

    Raises:
        ValueError: f has no derivative at a sample.
    """
    if is_concrete(values) and is_concrete(finite := _all_finite(values)) and not finite:
        rows = np.isfinite(np.asarray(values)).reshape(values.shape[0], -1)
        # A sample without a derivative takes a whole row with it, and an entry of every other one.
        bad = np.nonzero(~rows.any(axis=1) if not rows.any(axis=1).all() else ~rows.all(axis=1))[0]
        msg = (
            f"f must be differentiable at every sample, but what it gives for {bad.size} of {rows.shape[0]} samples of "
            f"{name} is NaN or infinite, the first at index {bad[0]}; remove them, or make f finite there (a root or a "
            "logarithm at 0 or below?)."
        )
        raise ValueError(msg)
    return values


@jax.jit
def _all_finite(values: Array) -> Array:
    return jnp.all(jnp.isfinite(values))


def check_rows(f: Model, w: Params, x: Array) -> jax.ShapeDtypeStruct:
    """Refuse a model whose outputs are not one row (or number) per sample; for use while tracing."""
    out = check_outputs(f, w, x, name="f")
    if out.shape[0] != x.shape[0]:
        msg = f"f must return one row of outputs per sample, got {out.shape[0]} rows for {x.shape[0]} samples."
        raise ValueError(msg)
    one = check_outputs(f, w, x[:1], name="f")
    if one.shape != (1, *out.shape[1:]):
        msg = (
            f"f must keep the axis of samples for a single one, but returns shape {one.shape} for one sample and "
            f"{out.shape} for {x.shape[0]}; leave that axis out of `squeeze`."
        )
        raise ValueError(msg)
    return out


def _two_samples(x1: Array, x2: Array | None) -> Array | None:
    """Return the first sample and another one that differs from it, if there is one among the first few."""
    few = [np.asarray(x[:FEW]) for x in (x1, x2) if x is not None]
    rows = np.concatenate(few)
    other = np.nonzero((rows != rows[:1]).reshape(rows.shape[0], -1).any(axis=1))[0]
    return jnp.asarray(rows[[0, other[0]]]) if other.size else None


@eqx.filter_jit
def _compare(f: Model, w: Params, pair: Array) -> tuple[Array, Array, Array, Array, Array]:
    """Return outputs of two samples together and each alone, the size of their terms, change of slopes, rounding.

    The terms, and not the outputs, set the rounding: the outputs of a symmetrized or centered model cancel. Slopes
    along a direction without symmetry, of the size of the parameters, show both.
    """
    check_rows(f, w, pair)
    coordinates, rest = eqx.partition(w, eqx.is_inexact_array)
    direction = jtu.tree_map(_direction, coordinates)

    def both(c: Params) -> tuple[Array, Array]:
        together = f(eqx.combine(c, rest), pair)
        return together, jax.vmap(lambda row: f(eqx.combine(c, rest), row[None])[0])(pair)

    (together, alone), slopes = jvp(both, (coordinates,), (direction,))
    joint, single = (slope.astype(jnp.result_type(float)) for slope in slopes)
    largest = jnp.maximum(jnp.max(jnp.abs(joint)), jnp.max(jnp.abs(single)))
    turned = jnp.where(largest > 0, jnp.max(jnp.abs(joint - single)) / jnp.where(largest > 0, largest, 1), 0)
    size = jnp.maximum(largest, jnp.max(jnp.abs(alone)).astype(largest.dtype))
    return together, alone, size, turned, jnp.asarray(_coarsest(both, coordinates))


def _coarsest(function: Callable[..., Any], *args: Any) -> float:
    """Return the largest rounding unit of all floating numbers of a program: outputs may be cast up in the end."""
    program = jax.make_jaxpr(function)(*args).jaxpr
    dtypes = {aval_of(out).dtype for eqn in program.eqns for out in eqn.outvars if hasattr(aval_of(out), "dtype")}
    floating = [dtype for dtype in dtypes if jnp.issubdtype(dtype, jnp.floating)]
    return max((float(jnp.finfo(dtype).eps) for dtype in floating), default=0.0)


def _direction(leaf: Array) -> Array:
    """Return numbers of mixed signs, of the size of the leaf's own, or of 1 for zeros."""
    size = jnp.sqrt(jnp.mean(jnp.square(leaf))) if leaf.size else jnp.zeros((), leaf.dtype)
    mixed = jnp.cos(1 + jnp.arange(leaf.size)).astype(leaf.dtype).reshape(leaf.shape)
    return mixed * (jnp.abs(leaf) + jnp.where(size > 0, size, 1).astype(leaf.dtype))
