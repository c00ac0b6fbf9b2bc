r"""Square roots of a loss's Hessian: $\nabla^2 R(y) = S S^T$, so that $J^T \nabla^2 R\, J = (S^T J)^T (S^T J)$."""

import abc

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from lazyjax._core.types import Outputs


class HessianRoot(eqx.Module):
    """S of the plain Hessian of R at some outputs, the weight of the metric included."""

    @abc.abstractmethod
    def apply(self, v: Outputs) -> Outputs:
        """S v."""

    @abc.abstractmethod
    def transpose(self, v: Outputs) -> Outputs:
        """S^T v."""


class DiagonalRoot(HessianRoot):
    """Of a loss that treats every output by itself."""

    diagonal: Float[Array, "..."]

    def apply(self, v: Outputs) -> Outputs:
        """S v."""
        return self.diagonal * v

    def transpose(self, v: Outputs) -> Outputs:
        """S^T v."""
        return self.diagonal * v


class SoftmaxRoot(HessianRoot):
    r"""$\mathrm{diag}(p) - pp^T = SS^T$ with $S = \mathrm{diag}(\sqrt p)(I - \sqrt p \sqrt p^T)$, a sample a row."""

    root: Float[Array, "n k"]
    scale: Float[Array, ""]

    def _project(self, v: Outputs) -> Outputs:
        return v - self.root * jnp.sum(self.root * v, axis=1, keepdims=True)

    def apply(self, v: Outputs) -> Outputs:
        """S v."""
        return self.scale * self.root * self._project(v)

    def transpose(self, v: Outputs) -> Outputs:
        """S^T v."""
        return self.scale * self._project(self.root * v)


class DenseRoot(HessianRoot):
    """Of any loss: the positive part of its dense Hessian, by an eigendecomposition."""

    matrix: Float[Array, "m m"]

    @classmethod
    def of(cls, hessian: Float[Array, "m m"]) -> "DenseRoot":
        """The root of the nearest positive semi-definite matrix."""
        values, vectors = jnp.linalg.eigh(0.5 * (hessian + hessian.T))
        return cls(vectors * jnp.sqrt(jnp.maximum(values, 0))[None, :])

    def apply(self, v: Outputs) -> Outputs:
        """S v."""
        return (self.matrix @ v.ravel()).reshape(v.shape)

    def transpose(self, v: Outputs) -> Outputs:
        """S^T v."""
        return (self.matrix.T @ v.ravel()).reshape(v.shape)
