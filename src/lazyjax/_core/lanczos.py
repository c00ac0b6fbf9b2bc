"""Lanczos with full re-orthogonalization: Krylov spaces, Ritz pairs, leading eigenvalues of symmetric operators."""

import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, PRNGKeyArray

from lazyjax._core.checks import is_concrete
from lazyjax._core.keys import default_key


class KrylovSpace(eqx.Module):
    """An orthonormal basis of a Krylov space, the operator projected on it, and the next vector; made by `krylov`.

    Attributes:
        basis: Rows (m, size).
        projected: Tridiagonal (m, m).
        norm: Norm of the start vector, which is `norm` times the first row of the basis.
        next: The (m+1)-st vector.
        coupling: Coupling of the last two vectors; 0 if the space is invariant.
    """

    basis: Float[Array, "m size"]
    projected: Float[Array, "m m"]
    norm: Float[Array, ""]
    next: Float[Array, " size"]
    coupling: Float[Array, ""]


def krylov(
    matvec: Callable[[Array], Array], start: Float[Array, " size"], num_matvecs: int, key: PRNGKeyArray | None = None
) -> KrylovSpace:
    """Build a Krylov space of a symmetric operator by Lanczos with full re-orthogonalization.

    When the Krylov space is exhausted, matfree 0.6 continues from a normalized rounding error, and returns values
    that are no eigenvalues (for the identity: -0.07 and 2.07). Here the recurrence restarts from a fresh direction, so
    that repeated eigenvalues and low rank are right.
    """
    size, dtype = start.size, start.dtype
    m = min(num_matvecs, size)
    eps = jnp.finfo(dtype).eps
    fresh_starts = jr.normal(default_key(key), (m, size), dtype)

    def orthogonalized(v: Array, basis: Array) -> Array:
        for _ in range(2):  # twice is enough (Kahan, Parlett)
            v = v - basis.T @ (basis @ v)
        return v

    def step(i: Any, carry: tuple[Array, ...]) -> tuple[Array, ...]:
        basis, diagonal, off, q, scale = carry
        basis = basis.at[i].set(q)
        image = matvec(q)
        v = orthogonalized(image, basis)
        scale = jnp.maximum(scale, jnp.linalg.norm(image))
        beta = jnp.linalg.norm(v)
        exhausted = beta <= 10 * size**0.5 * eps * scale
        fresh = orthogonalized(fresh_starts[i], basis)
        length = jnp.linalg.norm(fresh)
        # If the space is invariant and whole, nothing is left.
        fresh = fresh / jnp.where(length > 0, length, 1)
        q = jnp.where(exhausted, fresh, v / jnp.where(exhausted, 1, beta))
        return basis, diagonal.at[i].set(basis[i] @ image), off.at[i].set(jnp.where(exhausted, 0, beta)), q, scale

    norm = jnp.linalg.norm(start)
    # A zero start has no direction: any will do, since its coordinates are zero.
    other = fresh_starts[0] / jnp.linalg.norm(fresh_starts[0])
    first = jnp.where(norm > 0, start / jnp.where(norm > 0, norm, 1), other)
    zeros = jnp.zeros(m, dtype)
    carry = (jnp.zeros((m, size), dtype), zeros, zeros, first, jnp.zeros((), dtype))
    basis, diagonal, off, q, _ = jax.lax.fori_loop(0, m, step, carry)
    projected = jnp.diag(diagonal) + jnp.diag(off[:-1], 1) + jnp.diag(off[:-1], -1)
    return KrylovSpace(basis, projected, norm, q, jnp.where(m == size, 0, off[-1]))


def lanczos(
    matvec: Callable[[Array], Array],
    size: int,
    num_matvecs: int,
    *,
    dtype: Any,
    key: PRNGKeyArray | None = None,
) -> tuple[Float[Array, " m"], Float[Array, " m"], Float[Array, "m size"]]:
    """Return Ritz values (increasing), their residual norms, and Ritz vectors (as rows) of a symmetric operator."""
    if num_matvecs < 1:
        msg = f"num_matvecs must be at least 1, got {num_matvecs}."
        raise ValueError(msg)
    key = default_key(key)
    start = jr.normal(key, (min(num_matvecs, size), size), dtype)[-1]
    space = krylov(matvec, start, num_matvecs, key)
    theta, vectors = jnp.linalg.eigh(space.projected)
    return theta, space.coupling * jnp.abs(vectors[-1]), vectors.T @ space.basis


def lanczos_slack(size: int, steps: int, failure: float) -> float:
    r"""Return C with $\lambda_{max} \le C\theta$ for the largest Ritz value of a positive semi-definite operator.

    It fails with at most the given probability over random starts: $\lambda_{max} \le \theta/(1-\epsilon)$ but for
    $1.648\sqrt{size}\,e^{-\sqrt\epsilon(2\,steps-1)}$ (Kuczynski and Wozniakowski 1992, theorem 4.2). It is infinite
    if there are too few steps to tell.
    """
    if steps >= size:
        return 1.0
    root = math.log(1.648 * size**0.5 / failure) / (2 * steps - 1)
    return math.inf if root >= 1 else 1 / (1 - root**2)


def top_eigenvalues(
    matvec: Callable[[Array], Array], size: int, k: int, *, dtype: Any, key: PRNGKeyArray | None = None
) -> Float[Array, " k"]:
    """Return the k largest eigenvalues, decreasing, of a positive semi-definite operator, with multiplicity.

    One start vector finds every repeated eigenvalue once. So Lanczos runs again, from another start, orthogonally to
    the k leading Ritz vectors known, until it finds nothing above the k-th value; each run doubles its products,
    2k + 20 at first, until its residuals are below sqrt(eps) of the values (the error is their square over the
    gap). Under a trace, where values cannot be read, it is one run of 2k + 20 products: Ritz values from
    below, with repeated ones missing.
    """
    product = eqx.filter_closure_convert(matvec, jax.ShapeDtypeStruct((size,), dtype))
    eps = float(jnp.finfo(dtype).eps)
    stream = default_key(key)
    steps = 2 * k + 20
    values, vectors = jnp.full(k, -jnp.inf, dtype), jnp.zeros((k, size), dtype)
    while True:
        # Another start each time: the projection of the old one on a repeated eigenspace is already known.
        stream, start = jr.split(stream)
        theta, residuals, ritz = _deflated(product, vectors, steps, start)
        if not is_concrete(theta) or not bool(jnp.isfinite(theta[0])):
            return theta
        rounding = 10 * size**0.5 * eps * jnp.maximum(theta[0], values[0])
        new = theta > values[-1] + rounding
        # The largest one must be right even if it only shows that there is nothing new.
        right = (residuals <= eps**0.5 * theta + rounding) | ~new.at[0].set(True)
        if steps < size and not bool(jnp.all(right)):
            steps *= 2
        elif not bool(jnp.any(new)):
            return values
        else:
            values = jnp.concatenate([values, jnp.where(new, theta, -jnp.inf)])
            leading = jnp.argsort(-values)[:k]
            values, vectors = values[leading], jnp.concatenate([vectors, ritz])[leading]


@eqx.filter_jit
def _deflated(
    product: Callable[[Array], Array], known: Array, steps: int, key: PRNGKeyArray
) -> tuple[Array, Array, Array]:
    """Return as many leading Ritz values as there are `known` rows, decreasing, of the operator orthogonal to them."""
    k, size = known.shape

    def project(v: Array) -> Array:
        return v - known.T @ (known @ v)

    found = lanczos(lambda v: project(product(project(v))), size, steps, dtype=known.dtype, key=key)
    theta, residuals, vectors = (leaf[::-1][:k] for leaf in found)
    return theta, residuals, vectors
