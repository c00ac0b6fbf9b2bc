"""Checks of a model on samples: one row of outputs each, independent of all others."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array

from lazyjax._check import check_finite, check_outputs, is_concrete
from lazyjax._types import Model, Params


def check_samples(f: Model, w: Params, x1: Array, x2: Array | None) -> None:
    """Refuse inputs that hold no samples or differ in shape, and a model that does not treat samples one by one.

    What can be seen while tracing is left to `check_rows`, so that a call whose program is compiled traces nothing.
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
    if x1.shape[0] > 1 and is_concrete((w, x1)):
        _check_independent(f, w, x1[:2])


def check_rows(f: Model, w: Params, x: Array) -> jax.ShapeDtypeStruct:
    """Refuse a model whose outputs are not one row (or number) a sample; for use while tracing."""
    out = check_outputs(f, w, x, name="f")
    if out.shape[0] != x.shape[0]:
        msg = f"f must return one row of outputs a sample, got {out.shape[0]} rows for {x.shape[0]} samples."
        raise ValueError(msg)
    return out


def _check_independent(f: Model, w: Params, pair: Array) -> None:
    """Refuse a model whose output for the first of two samples changes when the other does."""
    first, alone, terms = _first_row(f, *eqx.partition(w, eqx.is_inexact_array), pair)
    if not is_concrete((first, alone, terms)):
        return
    check_finite(alone, "f(w, x1[:1])")
    first, alone = np.asarray(first), np.asarray(alone)
    if not np.allclose(first, alone, rtol=0, atol=1e3 * float(np.finfo(first.dtype).eps) * float(terms)):
        msg = (
            "f must treat every sample by itself, but its output for x1[0] changes with the other samples "
            f"(by {float(np.max(np.abs(first - alone))):.1e}), as with batch normalisation in training mode; "
            "use the layer's inference mode."
        )
        raise ValueError(msg)


@eqx.filter_jit
def _first_row(f: Model, coordinates: Params, rest: Params, pair: Array) -> tuple[Array, Array, Array]:
    """The first sample's outputs beside the second one, alone, and the size of the terms they are summed from.

    Those terms, and not the outputs, set the rounding: a mirrored or centred model's outputs cancel.
    """
    check_rows(f, eqx.combine(coordinates, rest), pair)
    alone, vjp = jax.vjp(lambda c: f(eqx.combine(c, rest), pair[:1]), coordinates)
    (slopes,) = vjp(jnp.ones_like(alone))
    products = jtu.tree_leaves(
        jtu.tree_map(lambda a, b: jnp.sum((a * b).astype(alone.dtype) ** 2), coordinates, slopes)
    )
    terms = jnp.maximum(jnp.sqrt(sum(products)), jnp.max(jnp.abs(alone)))
    return f(eqx.combine(coordinates, rest), pair)[0], alone[0], terms
