r"""Square roots of a loss's Hessian: $\nabla^2 R(y) = S S^T$, so that $J^T \nabla^2 R\, J = (S^T J)^T (S^T J)$."""

import abc

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from lazyjax._core.types import Outputs


class HessianRoot(eqx.Module):
    """The root S of the plain Hessian of R at some outputs, the weight of the metric included."""

    @abc.abstractmethod
    def apply(self, v: Outputs) -> Outputs:
        """Return S v."""

    @abc.abstractmethod
    def transpose(self, v: Outputs) -> Outputs:
        """Return S^T v."""


class DiagonalRoot(HessianRoot):
    """The root of a diagonal Hessian: of a loss that is a sum over the outputs."""

    diagonal: Float[Array, "..."]

    def apply(self, v: Outputs) -> Outputs:
        """Return S v."""
        return self.diagonal * v

    def transpose(self, v: Outputs) -> Outputs:
        """Return S^T v."""
        return self.diagonal * v


class DenseRoot(HessianRoot):
    """The root of the positive part of a dense Hessian."""

    matrix: Float[Array, "m m"]

    @classmethod
    def of(cls, hessian: Float[Array, "m m"]) -> "DenseRoot":
        """Return the root of the nearest positive semi-definite matrix, by an eigendecomposition."""
        values, vectors = jnp.linalg.eigh(0.5 * (hessian + hessian.T))
        return cls(vectors * jnp.sqrt(jnp.maximum(values, 0))[None, :])

    def apply(self, v: Outputs) -> Outputs:
        """Return S v."""
        return (self.matrix @ v.ravel()).reshape(v.shape)

    def transpose(self, v: Outputs) -> Outputs:
        """Return S^T v."""
        return (self.matrix.T @ v.ravel()).reshape(v.shape)
