"""Arithmetic on pytrees of parameters: norms, ratios of norms, and the step from w0."""

import functools
from typing import Any

import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Float

from lazyjax._core.types import Params


def move(coordinates: Params, eps: Float[Array, ""], u: Params) -> Params:
    r"""Return $w_0 + \varepsilon u$, each leaf in its own dtype."""
    return jtu.tree_map(lambda w, v: w + eps.astype(w.dtype) * v, coordinates, u)


def tree_norm(tree: Any) -> Float[Array, ""]:
    """Return the Euclidean norm of a tree of arrays, with gradient zero at zero; NaN if an entry is NaN."""
    squares = functools.reduce(jnp.add, [jnp.sum(leaf**2) for leaf in jtu.tree_leaves(tree)])
    return jnp.where(squares == 0, 0, jnp.sqrt(jnp.where(squares == 0, 1, squares)))


def safe_ratio(part: Array, whole: Array) -> Array:
    """Return the ratio of two nonnegative numbers; 0 if the denominator is 0, NaN if either is NaN."""
    return jnp.where(whole == 0, 0, part / jnp.where(whole == 0, 1, whole))
