r"""The $\varphi$ functions of exponential integrators.

$\varphi_0(z) = e^z$ and $\varphi_k(z) = \int_0^1 e^{(1-s)z} s^{k-1}/(k-1)!\, ds$.

Source: Hochbruck, Ostermann, Exponential integrators, Acta Numerica 19 (2010), equation (2.10).
"""

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def phi(z: Float[Array, "..."], k: int) -> Float[Array, "..."]:
    r"""Return $\varphi_k(z)$, entry by entry, to rounding in value and derivative for any real z from $-\infty$ up.

    Args:
        z: Real numbers of any shape.
        k: Index, at least 0.

    Returns:
        An array of z's shape; $\varphi_k(0) = 1/k!$, $\varphi_k(-\infty) = 0$.

    Raises:
        ValueError: k negative.

    Source:
        $\varphi_{k+1}(z) = (\varphi_k(z) - 1/k!)/z$ for large |z|, $\varphi_k(z) = \sum_j z^j/(j+k)!$ for small.

    Example:
        >>> import numpy as np
        >>> print(np.asarray(phi(jnp.array([0.0, -1.0]), 1)).round(4))
        [1.     0.6321]
    """
    if k < 0:
        msg = f"k must be at least 0, got {k}."
        raise ValueError(msg)
    return _phi(jnp.asarray(z, jnp.result_type(z, float)), k)


@functools.partial(jax.jit, static_argnames="k")  # a step calls dozens of them, and traces them once
def _phi(z: Array, k: int) -> Array:
    if k == 0:
        return jnp.exp(z)
    # Below k the recursion cancels, above it the series: at k neither loses a digit, even in the second derivative.
    small = jnp.abs(z) <= k
    # Each branch gets only arguments it is meant for: a NaN of the other one would spoil the derivative.
    return jnp.where(small, _series(jnp.where(small, z, 0), k), _recursion(jnp.where(small, -k, z), k))


def _series(z: Array, k: int) -> Array:
    eps, terms = float(jnp.finfo(z.dtype).eps), 1
    while k**terms * math.factorial(k) > 1e-3 * eps * math.factorial(terms + k):
        terms += 1
    value = jnp.full_like(z, 1 / math.factorial(terms + k))
    for j in reversed(range(terms)):
        value = value * z + 1 / math.factorial(j + k)
    return value


def _recursion(z: Array, k: int) -> Array:
    value = (jnp.exp(z) - 1) / z  # expm1 has its own derivative from its value, inexact at -1
    for j in range(1, k):
        value = (value - 1 / math.factorial(j)) / z
    return value
