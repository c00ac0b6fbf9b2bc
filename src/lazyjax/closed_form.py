r"""The tangent flow of the square loss in closed form: one eigendecomposition, all times at once."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lazyjax._types import Outputs
from lazyjax.tangent import Tangent


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
    _start: Outputs
    _weight: float = eqx.field(static=True)

    def outputs(self, t: Float[Array, ""]) -> Outputs:
        r"""$\bar y(t)$, t in [0, inf], of the targets' shape."""
        # inf * 0 must be 0: a zero eigenvalue keeps its residual for ever.
        exponent = jnp.where(self.eigenvalues > 0, t * self.eigenvalues, 0)
        change = self._vectors @ (jnp.expm1(-exponent) * self._coefficients)
        return self._start + change.reshape(self._start.shape)

    def loss(self, t: Float[Array, ""]) -> Float[Array, ""]:
        r"""$R(\bar y(t))$."""
        exponent = jnp.where(self.eigenvalues > 0, t * self.eigenvalues, 0)
        return 0.5 * self._weight * jnp.sum((jnp.exp(-exponent) * self._coefficients) ** 2)

    def cotangent(self, t: Float[Array, ""]) -> Outputs:
        r"""The r for which $\bar u(t) = J^T r$, so that $D f(w_0, x)\, J^T r$ are the outputs at other inputs."""
        positive = self.eigenvalues > 0
        safe = jnp.where(positive, self.eigenvalues, 1)
        phi = jnp.where(positive, -jnp.expm1(-t * safe) / safe, 0)
        r = -self._weight * (self._vectors @ (phi * self._coefficients))
        return r.reshape(self._start.shape)


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
    values: Float[Array, " m"], vectors: Float[Array, "m m"], start: Outputs, target: Outputs, weight: float
) -> TangentSolution:
    """As `solve_tangent`, from the eigenvalues (rising) and eigenvectors of K."""
    # What rounding leaves of a zero eigenvalue. The customary factor `size` instead of its root would cut modes
    # that are learnt within any horizon of interest: at 2560 outputs in float32 all below 3e-4 of the largest.
    cut = values.size**0.5 * jnp.finfo(values.dtype).eps * jnp.maximum(values[-1], 0)
    values = jnp.where(values > cut, values, 0)
    condition = values[-1] / jnp.min(jnp.where(values > 0, values, jnp.inf))
    coefficients = vectors.T @ (start - target.astype(start.dtype)).ravel()
    return TangentSolution(values[::-1], condition, vectors[:, ::-1], coefficients[::-1], start, weight)


def tangent_gram(tangent: Tangent, *, block: int = 128) -> Float[Array, "m m"]:
    r"""The plain $JJ^T$ of a tangent model over all its outputs, `block` columns (a jvp and a vjp each) at a time."""
    shape, dtype = tangent.outputs.shape, tangent.outputs.dtype
    size = tangent.outputs.size

    def column(i: Array) -> Array:
        basis = (jnp.arange(size) == i).astype(dtype)
        return tangent.jvp(tangent.vjp(basis.reshape(shape))).ravel()

    columns = jax.lax.map(column, jnp.arange(size), batch_size=min(block, size))
    return 0.5 * (columns + columns.T)
