"""What several tests need: comparisons with a tolerance from the dtype, and three of the shared problems by key."""

from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np

import problems
from problems import Problem


def tolerance(dtype: Any) -> float:
    """Half the digits of a floating dtype and one more: 10 sqrt(eps); exact for all others."""
    return 10 * float(jnp.finfo(dtype).eps) ** 0.5 if jnp.issubdtype(dtype, jnp.inexact) else 0.0


def tree_allclose(x: Any, y: Any, *, rtol: float | None = None, atol: float | None = None) -> bool:
    """Whether two pytrees agree in structure, shapes, dtypes, and values up to rtol and atol.

    Both tolerances come from the dtype of each leaf unless they are given.
    """
    if jtu.tree_structure(x) != jtu.tree_structure(y):
        return False
    return all(_leaf_allclose(a, b, rtol, atol) for a, b in zip(jtu.tree_leaves(x), jtu.tree_leaves(y), strict=True))


def _leaf_allclose(a: Any, b: Any, rtol: float | None, atol: float | None) -> bool:
    if not (hasattr(a, "dtype") and hasattr(b, "dtype")):
        # Python numbers and static leaves; an array never equals one of them, its dtype is part of it.
        return type(a) is type(b) and a == b
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    default = tolerance(a.dtype)
    return bool(
        np.allclose(
            np.asarray(a),
            np.asarray(b),
            rtol=default if rtol is None else rtol,
            atol=default if atol is None else atol,
        )
    )


def relative_error(x: Any, y: Any) -> float:
    """||x - y|| / ||y|| over all leaves of two pytrees, in float64; y is the truth, and not zero."""
    a, b = (np.concatenate([np.ravel(np.asarray(leaf, np.float64)) for leaf in jtu.tree_leaves(t)]) for t in (x, y))
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def seed_of(key: Any) -> int:
    """The seed of `jr.key(seed)`, or some number of another key."""
    return int(np.asarray(jr.key_data(key))[-1])


def linear_problem(key: Any, *, n: int = 5, d: int = 8, dtype: Any = None) -> Problem:
    """h(w) = X w, started at 0: it is its own tangent model, and every flow has a closed form."""
    return problems.linear(seed_of(key), n=n, d=d, dtype=dtype)


def centered_problem(key: Any, *, n: int = 5, d: int = 3, width: int = 12, dtype: Any = None) -> Problem:
    """A centered two-layer tanh net: the gap of the two flows falls like 1/alpha."""
    return problems.centered(seed_of(key), n=n, d=d, width=width, dtype=dtype)


def symmetrized_problem(key: Any, *, n: int = 5, d: int = 3, width: int = 12, dtype: Any = None) -> Problem:
    """A symmetrized two-layer tanh net: the second order cancels, the gap falls like 1/alpha^2."""
    return problems.symmetrized(seed_of(key), n=n, d=d, width=width, dtype=dtype)


def _from_outside(function, x):
    return jax.pure_callback(function, jax.ShapeDtypeStruct(x.shape, x.dtype), x, vmap_method="expand_dims")


@jax.custom_vjp
def sine_with_outside_slope(x):
    """Return sin x, of which only the gradient is computed outside of JAX, and cannot be differenced."""
    return jnp.sin(x)


sine_with_outside_slope.defvjp(lambda x: (jnp.sin(x), x), lambda x, c: (_from_outside(np.cos, x) * c,))
