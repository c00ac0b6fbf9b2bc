r"""The tangent flow of the square loss in closed form: one eigendecomposition, all times at once.

Everything is a filter of the modes of $K = c JJ^T$. On a mode of eigenvalue $\lambda$ the flow takes away the share
$1 - e^{-t\lambda}$ of the coefficient of $\bar y(0) - y^*$, ridge regression the share $\lambda/(\lambda + \mu)$; with
$\mu = 1/t$ the former is the larger, by 30% at most, and they agree to first order at both ends.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Real

from lazyjax._core.checks import check_precision, is_concrete
from lazyjax._core.types import Outputs
from lazyjax.kernels.spectrum import condition_of, without_rounding
from lazyjax.models.tangent import Tangent

Numbers = float | int | Real[Array, ""] | Real[Array, " time"] | Real[np.ndarray, ""] | Real[np.ndarray, " time"]
"""One time (or penalty), or a vector of them; results get its axis in front."""


class TangentSolution(eqx.Module):
    r"""The closed form of the tangent flow of the square loss; made by `solve_tangent`.

    $\bar y(t) = y^* + e^{-tK}(\bar y(0) - y^*)$ and $\bar u(t) = -J^T c\, t\varphi_1(-tK)(\bar y(0) - y^*)$ with
    $K = c JJ^T$, c the weight of the loss. Eigenvalues below rounding are an exact zero, where the residual stays.

    Attributes:
        eigenvalues: The eigenvalues of K in F's metric, (m,), falling, the zeros at the end.
        condition: Largest over smallest nonzero eigenvalue.
        whole_condition: Largest over smallest of all eigenvalues before any was taken for zero, in absolute value; in
            so far as rounding lets it be known.
        vectors: The eigenvectors, as columns.
        coefficients: $\bar y(0) - y^*$ on the eigenvectors, (m,).
        start: $\bar y(0)$.
        weight: c.
    """

    eigenvalues: Float[Array, " m"]
    condition: Float[Array, ""]
    whole_condition: Float[Array, ""]
    vectors: Float[Array, "m m"]
    coefficients: Float[Array, " m"]
    start: Outputs
    weight: float = eqx.field(static=True)

    def outputs(self, t: Numbers) -> Float[Array, "..."]:
        r"""Return $\bar y(t)$, t in [0, inf], of the targets' shape."""
        return self._each(t, "t", _outputs)

    def loss(self, t: Numbers) -> Float[Array, "..."]:
        r"""Return $R(\bar y(t))$."""
        return self._each(t, "t", _loss)

    def cotangent(self, t: Numbers) -> Float[Array, "..."]:
        r"""Return the r for which $\bar u(t) = J^T r$, so that $D f(w_0, x)\, J^T r$ are outputs at other inputs."""
        return self._each(t, "t", _cotangent)

    def ridge(self, penalty: Numbers) -> Float[Array, "..."]:
        r"""Return the outputs at the minimizer u of $R(\bar y(0) + Ju) + \frac{\mu}{2}|u|^2$, mu in [0, inf]."""
        return self._each(penalty, "penalty", _ridge)

    def ridge_cotangent(self, penalty: Numbers) -> Float[Array, "..."]:
        r"""Return the r for which that u is $J^T r$."""
        return self._each(penalty, "penalty", _ridge_cotangent)

    def modes(self, t: Numbers) -> Float[Array, "..."]:
        r"""Return $\bar u(t)$ in an orthonormal basis of the range of $J^T$, (m,); so its norm is $|\bar u(t)|$."""
        return self._each(t, "t", _modes)

    def from_modes(self, modes: Float[Array, " m"]) -> Outputs:
        r"""Return the r for which $J^T r$ has these coordinates in the basis of `modes`."""
        return (self.vectors @ (self._scale() * modes)).reshape(self.start.shape)

    def _each(
        self, values: Numbers, name: str, function: Callable[["TangentSolution", Array], Array]
    ) -> Float[Array, "..."]:
        """Return the function of a number, or of each one of a vector, by one program."""
        _check_numbers(values, name)
        numbers = np.asarray(values, self.start.dtype) if is_concrete(values) else values
        return _map(self, jnp.asarray(numbers, self.start.dtype), function)

    def _positive(self, values: Array) -> Array:
        """Return values per mode, with zero for those of eigenvalue zero."""
        return jnp.where(self.eigenvalues > 0, values, 0)

    def _safe(self) -> Array:
        """Return the eigenvalues, with 1 for a zero: no derivative of an unused branch is a NaN."""
        return jnp.where(self.eigenvalues > 0, self.eigenvalues, 1)

    def _scale(self) -> Array:
        """Return 1 over the singular values of J: from coordinates of a displacement to those of its cotangent."""
        return self._positive(jnp.sqrt(self.weight / self._safe()))

    def _exponent(self, t: Array) -> Array:
        """Return t times the eigenvalues; inf * 0 must be 0: a zero eigenvalue keeps its residual at every time."""
        # The derivative by an eigenvalue at t = inf must be 0, not inf * 0.
        finite = jnp.isfinite(t)
        return self._positive(jnp.where(finite, jnp.where(finite, t, 0) * self._safe(), jnp.inf))

    def _without(self, share: Array) -> Outputs:
        """Return the start less these shares of the coefficients."""
        return self.start - (self.vectors @ (share * self.coefficients)).reshape(self.start.shape)

    def _cotangent(self, factor: Array) -> Outputs:
        """Return the cotangent with this factor on each coefficient; on a zero eigenvalue J^T r is zero whatever r."""
        r = -self.weight * (self.vectors @ self._positive(factor * self.coefficients))
        return r.reshape(self.start.shape)


@eqx.filter_jit
def _map(solution: TangentSolution, numbers: Array, function: Callable[[TangentSolution, Array], Array]) -> Array:
    if numbers.ndim == 0:
        return function(solution, numbers)
    return jax.vmap(lambda number: function(solution, number))(numbers)


def _outputs(solution: TangentSolution, t: Array) -> Array:
    return solution._without(-jnp.expm1(-solution._exponent(t)))


def _loss(solution: TangentSolution, t: Array) -> Array:
    return 0.5 * solution.weight * jnp.sum((jnp.exp(-solution._exponent(t)) * solution.coefficients) ** 2)


def _cotangent(solution: TangentSolution, t: Array) -> Array:
    return solution._cotangent(-jnp.expm1(-solution._exponent(t)) / solution._safe())


def _ridge(solution: TangentSolution, penalty: Array) -> Array:
    return solution._without(solution.eigenvalues / (solution._safe() + penalty))


def _ridge_cotangent(solution: TangentSolution, penalty: Array) -> Array:
    return solution._cotangent(1 / (solution._safe() + penalty))


def _modes(solution: TangentSolution, t: Array) -> Array:
    return jnp.expm1(-solution._exponent(t)) * (solution._scale() * solution.coefficients)


def _check_numbers(values: Any, name: str) -> None:
    """Check for a number in [0, inf], or a vector of them."""
    if np.ndim(values) > 1:
        msg = f"{name} must be a number or a vector of them, got shape {np.shape(values)}."
        raise ValueError(msg)
    if is_concrete(values) and not np.all(np.asarray(values) >= 0):
        what = "a flow time" if name == "t" else "a penalty"
        msg = f"{name} must be {what} in [0, inf], got {np.min(np.asarray(values))}."
        raise ValueError(msg)


def solve_tangent(
    matrix: Float[Array, "m m"], start: Outputs, target: Outputs, weight: float, *, rtol: float | None = None
) -> TangentSolution:
    r"""Diagonalize $K = c JJ^T$ once, for the tangent flow of $\frac c2 |y - y^*|^2$ at any time; call it under jit.

    Args:
        matrix: The plain Gram $JJ^T$ over all n*k outputs.
        start: $\bar y(0)$, (n,) or (n, k).
        target: $y^*$, of the same shape.
        weight: c, the loss's weight.
        rtol: Eigenvalues not above this share of the largest are taken for zero; None for their rounding.

    Source:
        $\bar y' = c JJ^T (y^* - \bar y) = -K(\bar y - y^*)$, so $\bar y(t) - y^* = e^{-tK}(\bar y(0) - y^*)$; the flow
        of Chizat, Oyallon, Bach (2019), section 2.3.
    """
    values, vectors = jnp.linalg.eigh(jnp.asarray(weight, matrix.dtype) * matrix)
    return tangent_solution(values, vectors, start, target, weight, rtol=rtol)


def tangent_solution(
    values: Float[Array, " m"],
    vectors: Float[Array, "m m"],
    start: Outputs,
    target: Outputs,
    weight: float,
    *,
    rtol: float | None = None,
) -> TangentSolution:
    """Return the solution for the eigenvalues (rising) and eigenvectors of K; rtol as for `condition_number`."""
    smallest = jnp.min(jnp.abs(values))
    whole = jnp.where(smallest > 0, values[-1] / jnp.where(smallest > 0, smallest, 1), jnp.inf)
    values = without_rounding(values, rtol)
    coefficients = vectors.T @ (start - target.astype(start.dtype)).ravel()
    kept = condition_of(values)
    return TangentSolution(values[::-1], kept, whole, vectors[:, ::-1], coefficients[::-1], start, weight)


def tangent_gram(tangent: Tangent, *, block: int = 128) -> Float[Array, "m m"]:
    r"""Return the plain $JJ^T$ of a tangent model over all its outputs, `block` columns (jvp and vjp) at a time."""
    shape, dtype = tangent.outputs.shape, tangent.outputs.dtype
    check_precision(dtype)
    size = tangent.outputs.size

    def column(i: Array) -> Array:
        basis = (jnp.arange(size) == i).astype(dtype)
        return tangent.jvp(tangent.vjp(basis.reshape(shape))).ravel()

    columns = jax.lax.map(column, jnp.arange(size), batch_size=min(block, size))
    return 0.5 * (columns + columns.T)
