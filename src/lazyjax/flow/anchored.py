r"""A model at an anchor, and the products with $B = S^T J$ there."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.tree_util as jtu
from jaxtyping import Array

from lazyjax._core.cost import count_flops
from lazyjax._core.types import Model, Outputs, Params
from lazyjax.losses.hessian_root import HessianRoot


class Products(eqx.Module):
    """B and its transpose at the anchor."""

    jvp: Callable[[Params], Outputs]
    root: HessianRoot
    shape: tuple[int, ...] = eqx.field(static=True)
    dtype: Any = eqx.field(static=True)

    def matvec(self, v: Params) -> Array:
        """B v, flat."""
        return self.root.transpose(self.jvp(v)).ravel()

    def rmatvec(self, r: Array, like: Params) -> Params:
        """B^T r."""
        (out,) = jax.linear_transpose(self.jvp, like)(self.root.apply(r.reshape(self.shape)))
        return out


class LinearizationPoint(eqx.Module):
    """A model at an anchor, every array a leaf and the rest static, so that it can travel through a solver."""

    coordinates: Params
    root: HessianRoot
    _arrays: list[Array]
    _static: Any = eqx.field(static=True)

    def __init__(self, h: Model, rest: Params, coordinates: Params, root: HessianRoot) -> None:
        arrays, static = eqx.partition((h, rest), eqx.is_array)
        self._arrays, structure = jtu.tree_flatten(arrays)
        leaves, tree = jtu.tree_flatten(static)
        self._static = (structure, tuple(leaves), tree)
        self.coordinates, self.root = coordinates, root

    def _model(self) -> Callable[[Params], Outputs]:
        structure, leaves, tree = self._static
        h, rest = eqx.combine(structure.unflatten(jax.lax.stop_gradient(self._arrays)), tree.unflatten(leaves))
        return lambda w: h(eqx.combine(w, rest))

    def flops(self) -> float:
        """Multiply-adds of one evaluation of the model."""
        return count_flops(self._model(), self.coordinates)

    def products(self) -> Products:
        """Linearize here. No derivative is taken through it: a method's linear part is its choice, not its result."""
        coordinates, root = jax.lax.stop_gradient((self.coordinates, self.root))
        outputs, jvp = jax.linearize(self._model(), coordinates)
        return Products(jvp, root, outputs.shape, outputs.dtype)
