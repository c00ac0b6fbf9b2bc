r"""The tangent flow of the square loss in closed form: one eigendecomposition, all times at once.

Everything is a filter of the modes of $K = c JJ^T$. Of the coefficient of $\bar y(0) - y^*$ on a mode of eigenvalue
$\lambda$ the flow takes away the share $1 - e^{-t\lambda}$, ridge regression $\lambda/(\lambda + \mu)$; with
$\mu = 1/t$ the former is the larger, by 30 % at most, and they agree to first order at both ends.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Real

from lazyjax._core.checks import is_concrete
from lazyjax._core.types import Outputs
from lazyjax.kernels.spectrum import condition_of, without_rounding
from lazyjax.models.tangent import Tangent

Numbers = float | int | Real[Array, ""] | Real[Array, " time"] | Real[np.ndarray, ""] | Real[np.ndarray, " time"]
"""One time (or penalty), or a vector of them; results get its axis in front."""


class TangentSolution(eqx.Module):
    r"""Closed form of the tangent flow of the square loss; made by `solve_tangent`.

    $\bar y(t) = y^* + e^{-tK}(\bar y(0) - y^*)$ and $\bar u(t) = -J^T c\, t\varphi_1(-tK)(\bar y(0) - y^*)$ with
    $K = c JJ^T$, c the weight of the loss. Eigenvalues below rounding are an exact zero, where the residual stays.

    Attributes:
        eigenvalues: Of K in F's metric, falling, the zeros at the end.
        condition: Largest over smallest nonzero eigenvalue.
    """

    eigenvalues: Float[Array, " m"]
    condition: Float[Array, ""]
    _vectors: Float[Array, "m m"]
    _coefficients: Float[Array, " m"]
    start: Outputs
    _weight: float = eqx.field(static=True)

    def outputs(self, t: Numbers) -> Float[Array, "..."]:
        r"""$\bar y(t)$, t in [0, inf], of the targets' shape."""
        return self._each(t, "t", lambda s: self._without(-jnp.expm1(-self._exponent(s))))

    def loss(self, t: Numbers) -> Float[Array, "..."]:
        r"""$R(\bar y(t))$."""
        c = self._weight
        return self._each(t, "t", lambda s: 0.5 * c * jnp.sum((jnp.exp(-self._exponent(s)) * self._coefficients) ** 2))

    def cotangent(self, t: Numbers) -> Float[Array, "..."]:
        r"""The r for which $\bar u(t) = J^T r$, so that $D f(w_0, x)\, J^T r$ are the outputs at other inputs."""
        return self._each(t, "t", lambda s: self._cotangent(-jnp.expm1(-self._exponent(s)) / self._safe()))

    def ridge(self, penalty: Numbers) -> Float[Array, "..."]:
        r"""The outputs at the u that minimizes $R(\bar y(0) + Ju) + \frac{\mu}{2}|u|^2$, the penalty mu in [0, inf]."""
        return self._each(penalty, "penalty", lambda mu: self._without(self.eigenvalues / (self._safe() + mu)))

    def ridge_cotangent(self, penalty: Numbers) -> Float[Array, "..."]:
        r"""The r for which that u is $J^T r$."""
        return self._each(penalty, "penalty", lambda mu: self._cotangent(1 / (self._safe() + mu)))

    def modes(self, t: Numbers) -> Float[Array, "..."]:
        r"""$\bar u(t)$ in an orthonormal basis of the range of $J^T$, (m,); so its norm is $|\bar u(t)|$."""
        scaled = self._scale() * self._coefficients
        return self._each(t, "t", lambda s: jnp.expm1(-self._exponent(s)) * scaled)

    def from_modes(self, modes: Float[Array, " m"]) -> Outputs:
        r"""The r for which $J^T r$ is the vector that `modes` writes so."""
        return (self._vectors @ (self._scale() * modes)).reshape(self.start.shape)

    def _each(self, values: Numbers, name: str, function: Callable[[Array], Array]) -> Array:
        """The function of a number, or of each one of a vector."""
        _check_numbers(values, name)
        numbers = jnp.asarray(values, self.start.dtype)
        return function(numbers) if numbers.ndim == 0 else jax.vmap(function)(numbers)

    def _positive(self, values: Array) -> Array:
        """Without the modes of eigenvalue zero."""
        return jnp.where(self.eigenvalues > 0, values, 0)

    def _safe(self) -> Array:
        """The eigenvalues, with 1 for a zero: no derivative of an unused branch is a NaN."""
        return jnp.where(self.eigenvalues > 0, self.eigenvalues, 1)

    def _scale(self) -> Array:
        """From coordinates of a displacement to those of its cotangent: 1 over the singular values of J."""
        return self._positive(jnp.sqrt(self._weight / self._safe()))

    def _exponent(self, t: Array) -> Array:
        """T times the eigenvalues; inf * 0 must be 0: a zero eigenvalue keeps its residual for ever."""
        # The derivative by an eigenvalue at t = inf must be 0, not inf * 0.
        finite = jnp.isfinite(t)
        return self._positive(jnp.where(finite, jnp.where(finite, t, 0) * self._safe(), jnp.inf))

    def _without(self, share: Array) -> Outputs:
        """The start less these shares of the coefficients."""
        return self.start - (self._vectors @ (share * self._coefficients)).reshape(self.start.shape)

    def _cotangent(self, factor: Array) -> Outputs:
        # On a zero eigenvalue J^T r is zero whatever r.
        r = -self._weight * (self._vectors @ self._positive(factor * self._coefficients))
        return r.reshape(self.start.shape)


def _check_numbers(values: Any, name: str) -> None:
    """Refuse what is no number in [0, inf] or vector of them."""
    if np.ndim(values) > 1:
        msg = f"{name} must be a number or a vector of them, got shape {np.shape(values)}."
        raise ValueError(msg)
    if is_concrete(values) and not np.all(np.asarray(values) >= 0):
        what = "a flow time" if name == "t" else "a penalty"
        msg = f"{name} must be {what} in [0, inf], got {np.min(np.asarray(values))}."
        raise ValueError(msg)


def solve_tangent(matrix: Float[Array, "m m"], start: Outputs, target: Outputs, weight: float) -> TangentSolution:
    r"""Diagonalize $K = c JJ^T$ once, for the tangent flow of $\frac c2 |y - y^*|^2$ at any time.

    Args:
        matrix: The plain Gram $JJ^T$ over all n*k outputs.
        start: $\bar y(0)$, (n,) or (n, k).
        target: $y^*$, of the same shape.
        weight: c, the loss's weight.

    Source:
        $\bar y' = c JJ^T (y^* - \bar y) = -K(\bar y - y^*)$, so $\bar y(t) - y^* = e^{-tK}(\bar y(0) - y^*)$; the flow
        of Chizat, Oyallon, Bach (2019), section 2.3.
    """
    values, vectors = jnp.linalg.eigh(jnp.asarray(weight, matrix.dtype) * matrix)
    return tangent_solution(values, vectors, start, target, weight)


def tangent_solution(
    values: Float[Array, " m"],
    vectors: Float[Array, "m m"],
    start: Outputs,
    target: Outputs,
    weight: float,
    *,
    rtol: float | None = None,
) -> TangentSolution:
    """As `solve_tangent`, from the eigenvalues (rising) and eigenvectors of K; rtol as for `condition_number`."""
    values = without_rounding(values, rtol)
    coefficients = vectors.T @ (start - target.astype(start.dtype)).ravel()
    return TangentSolution(values[::-1], condition_of(values), vectors[:, ::-1], coefficients[::-1], start, weight)


def tangent_gram(tangent: Tangent, *, block: int = 128) -> Float[Array, "m m"]:
    r"""The plain $JJ^T$ of a tangent model over all its outputs, `block` columns (a jvp and a vjp each) at a time."""
    shape, dtype = tangent.outputs.shape, tangent.outputs.dtype
    size = tangent.outputs.size

    def column(i: Array) -> Array:
        basis = (jnp.arange(size) == i).astype(dtype)
        return tangent.jvp(tangent.vjp(basis.reshape(shape))).ravel()

    columns = jax.lax.map(column, jnp.arange(size), batch_size=min(block, size))
    return 0.5 * (columns + columns.T)
