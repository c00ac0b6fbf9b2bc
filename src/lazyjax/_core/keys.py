"""Random keys: the fixed one that stands in for none, and how to recognize one."""

from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import PRNGKeyArray


def default_key(key: PRNGKeyArray | None) -> PRNGKeyArray:
    """Return the key, or a fixed one if there is none: what starts from it is then the same in every run."""
    return jr.key(0) if key is None else key


def is_key(leaf: Any) -> bool:
    """Check whether a leaf is an array of random keys as `jax.random.key` makes them."""
    return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
