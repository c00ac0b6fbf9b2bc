r"""The linear part $L = -B^T B$ of a gradient flow about a point, and functions of it on vectors.

With J the Jacobian at the point and $\nabla^2 R = SS^T$ there, $B = S^T J$: the Gauss-Newton part. For any D,

    phi_k(hL) D = D/k! - h B^T phi_{k+1}(-h BB^T) B D,

so only functions of the small matrix $BB^T$ are needed and never a division by its eigenvalues: one jvp and one
vjp per vector, nothing of size p^2 or p n. They come from its eigendecomposition (`SpectralPart`) or from Lanczos
with the vector at hand (`KrylovPart`).

Source: design of exponential integrators as in Hochbruck, Ostermann (2010), Exponential integrators, Acta Numerica 19.
"""

import abc
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Float

from lazyjax._core import forward
from lazyjax._core.checks import check_precision
from lazyjax._core.cost import POWERS, count_flops
from lazyjax._core.lanczos import krylov, lanczos
from lazyjax._core.phi import phi
from lazyjax._core.types import Model, Outputs, Params
from lazyjax.losses.hessian_root import HessianRoot

GRAM_BLOCK = 128
"""Columns of the Gram (a jvp and a vjp each) that are made at the same time."""


class Products(eqx.Module):
    """The products with B and its transpose at a linearization point."""

    derivative: forward.Products
    root: HessianRoot
    shape: tuple[int, ...] = eqx.field(static=True)
    dtype: Any = eqx.field(static=True)

    def matvec(self, v: Params) -> Array:
        """Return B v, flat."""
        return self.root.transpose(self.derivative.push(v)).ravel()

    def rmatvec(self, r: Array, like: Params) -> Params:
        """Return B^T r."""
        return self.derivative.transpose(self.root.apply(r.reshape(self.shape)), like)


class LinearizationPoint(eqx.Module):
    """A model at a point, every array a leaf and the rest static, so that it can travel through a solver."""

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
        """Return the multiply-adds of one evaluation of the model."""
        return count_flops(self._model(), self.coordinates)

    def products(self) -> Products:
        """Linearize here. No derivative is taken through it: a method's linear part is its choice, not its result."""
        coordinates, root = jax.lax.stop_gradient((self.coordinates, self.root))
        outputs, derivative = forward.products(self._model(), coordinates)
        check_precision(outputs.dtype)
        return Products(derivative, root, outputs.shape, outputs.dtype)


class Expansion(eqx.Module):
    """A vector D = d + B^T s, and B D in coordinates in which BB^T is diagonal.

    With Lanczos every vector has its own coordinates: `basis` takes them to the outputs, and `residual` is the vector
    that comes next, with `residual_row` the couplings to it.
    """

    direct: Params
    lifted: Array
    coordinates: Array
    values: Array
    basis: Array | None = None
    residual: Array | None = None
    residual_row: Array | None = None

    def in_outputs(self, z: Array) -> Array:
        """Return outputs from their coordinates on the Krylov basis."""
        assert self.basis is not None
        return self.basis @ z

    def beyond(self, z: Array) -> Array:
        """Return the part of BB^T times these coordinates that lies outside of the Krylov space."""
        assert self.residual_row is not None
        assert self.residual is not None
        return (self.residual_row @ z) * self.residual


Piece = tuple[Expansion, Any, Mapping[int, Any]]
"""(D, c, {k: b}): the vector sum_k b h phi_k(c h L) D."""


class LinearPart(eqx.Module):
    """The linear part L at a point; subclasses say how to take functions of it."""

    point: eqx.AbstractVar[LinearizationPoint]
    top: eqx.AbstractVar[Array]

    @abc.abstractmethod
    def expand(self, b: Products, direct: Params, lifted: Array) -> Expansion:
        """Return D = d + B^T s in coordinates; s in those of `combine`."""

    @abc.abstractmethod
    def origin(self) -> Array:
        """Return s = 0."""

    @abc.abstractmethod
    def subtract(self, b: Products, e: Expansion, others: Sequence[Expansion], lifted: Array) -> Expansion:
        """Return the expansion of D_e less the others, plus B^T of `lifted`."""

    def truncated(self, b: Products, h: Array, pieces: Sequence[Piece], error: Params) -> Params:
        """Return the error estimate of the scheme plus that of the functions themselves; exact ones add nothing."""
        del b, h, pieces
        return error

    @abc.abstractmethod
    def combine(self, b: Products, h: Array, pieces: Sequence[Piece]) -> tuple[Params, Array]:
        """Return the sum delta of the pieces, and B delta (in the form that `expand` takes for s)."""


def _sum(arrays: Sequence[Array]) -> Array:
    return functools.reduce(jnp.add, arrays)


def _factor(h: Array, weights: Mapping[int, Any]) -> Array:
    """Return the factor of D itself in the sum of h b phi_k(c h L) D."""
    return h * _sum([jnp.asarray(b, h.dtype) / math.factorial(k) for k, b in weights.items()])


def _inside(values: Array, h: Array, c: Any, weights: Mapping[int, Any], shift: int) -> Array:
    """Return the sum of b phi_{k+shift}(-c h values)."""
    return _sum([jnp.asarray(b, h.dtype) * phi(-c * h * values, k + shift) for k, b in weights.items()])


def _direct(h: Array, pieces: Sequence[Piece]) -> Params:
    factors = [_factor(h, weights) for _, _, weights in pieces]
    trees = [e.direct for e, _, _ in pieces]
    return jtu.tree_map(lambda *d: _sum([f.astype(x.dtype) * x for f, x in zip(factors, d, strict=True)]), *trees)


class SpectralPart(LinearPart):
    """The linear part by the eigendecomposition of BB^T, or its leading part.

    It is shared by all lanes of a vmap that share the linearization point.
    """

    point: LinearizationPoint
    top: Float[Array, ""]
    values: Float[Array, " r"]
    vectors: Float[Array, "m r"]

    def leading(self, horizon: float, *, block: int = 64) -> "SpectralPart":
        """Return only what is stiff over this time: modes with h lambda below 0.1 need no exponential.

        Their number is rounded up to whole blocks, so that slightly different data are no new program.
        """
        kept = int(np.sum(np.asarray(self.values) * horizon > 0.1))
        kept = min(self.values.size, max(block, -(-kept // block) * block))
        return SpectralPart(self.point, self.top, self.values[-kept:], self.vectors[:, -kept:])

    def origin(self) -> Array:
        """Return s = 0."""
        return jnp.zeros_like(self.values)

    def expand(self, b: Products, direct: Params, lifted: Array) -> Expansion:
        """Return the coordinates of B D on the eigenvectors; s is held in them too, so that BB^T s needs no product."""
        values, vectors = jax.lax.stop_gradient((self.values, self.vectors))
        return Expansion(direct, lifted, b.matvec(direct) @ vectors + values * lifted, values)

    def subtract(self, b: Products, e: Expansion, others: Sequence[Expansion], lifted: Array) -> Expansion:
        """Subtract in coordinates, without a product."""
        del b
        parts = [(x.direct, x.lifted, x.coordinates) for x in (e, *others)]
        direct, s, z = jtu.tree_map(lambda x, *rest: x - _sum(rest), *parts)
        return Expansion(direct, s + lifted, z + e.values * lifted, e.values)

    def combine(self, b: Products, h: Array, pieces: Sequence[Piece]) -> tuple[Params, Array]:
        """Return the sum of the pieces: one product with the eigenvectors and one vjp for all of them."""
        vectors = jax.lax.stop_gradient(self.vectors)
        direct = _direct(h, pieces)
        z = _sum(
            [
                _factor(h, weights) * e.lifted - c * h * h * _inside(e.values, h, c, weights, 1) * e.coordinates
                for e, c, weights in pieces
            ]
        )
        image = _sum([h * _inside(e.values, h, c, weights, 0) * e.coordinates for e, c, weights in pieces])
        return jtu.tree_map(jnp.add, direct, b.rmatvec(vectors @ z, direct)), image


@jax.custom_jvp
def _constant(start: Array) -> Array:
    """Return the vector, not to be differentiated: the derivative of a Krylov space has a pole where the space ends."""
    return start


@_constant.defjvp
def _(primals: Any, tangents: Any) -> Any:
    del primals, tangents
    msg = (
        'TangentExponential with method="lanczos" has no derivatives; use TangentExponential(method="dense"), or an '
        "explicit solver such as diffrax.Tsit5()."
    )
    raise NotImplementedError(msg)


class KrylovPart(LinearPart):
    """The linear part by Lanczos in the outputs' space, started from each vector: no Gram is formed."""

    point: LinearizationPoint
    top: Float[Array, ""]
    num_lanczos: int = eqx.field(static=True)
    size: int = eqx.field(static=True)
    dtype: Any = eqx.field(static=True)

    def origin(self) -> Array:
        """Return s = 0."""
        return jnp.zeros(self.size, self.dtype)

    def expand(self, b: Products, direct: Params, lifted: Array) -> Expansion:
        """Return the coordinates of B D on the Ritz vectors of its Krylov space; s is held in the outputs' space."""
        start = _constant(b.matvec(jtu.tree_map(jnp.add, direct, b.rmatvec(lifted, direct))))
        space = krylov(lambda r: b.matvec(b.rmatvec(r, direct)), start, self.num_lanczos)
        values, ritz = jnp.linalg.eigh(space.projected)
        coordinates = space.norm * ritz[0]
        return Expansion(
            direct, lifted, coordinates, values, space.basis.T @ ritz, space.next, space.coupling * ritz[-1]
        )

    def subtract(self, b: Products, e: Expansion, others: Sequence[Expansion], lifted: Array) -> Expansion:
        """Subtract, and expand the difference in a Krylov space of its own."""
        parts = [(x.direct, x.lifted) for x in (e, *others)]
        direct, s = jtu.tree_map(lambda x, *rest: x - _sum(rest), *parts)
        return self.expand(b, direct, s + lifted)

    def combine(self, b: Products, h: Array, pieces: Sequence[Piece]) -> tuple[Params, Array]:
        """Return the sum of the pieces, with one vjp for all of them."""
        direct = _direct(h, pieces)
        z = _sum(
            [
                _factor(h, weights) * e.lifted
                - e.in_outputs(c * h * h * _inside(e.values, h, c, weights, 1) * e.coordinates)
                for e, c, weights in pieces
            ]
        )
        image = _sum(
            [e.in_outputs(h * _inside(e.values, h, c, weights, 0) * e.coordinates) for e, c, weights in pieces]
        )
        return jtu.tree_map(jnp.add, direct, b.rmatvec(z, direct)), image

    def truncated(self, b: Products, h: Array, pieces: Sequence[Piece], error: Params) -> Params:
        r"""Add what the Krylov spaces are too small for: the next vector, times its first coefficient.

        phi_k(-hA) v and its projection differ by about $h \beta [\varphi_{k+1}(-hT)]_{m1} |v| q_{m+1}$ (Saad 1992).
        """
        z = _sum(
            [c * c * h**3 * e.beyond(_inside(e.values, h, c, weights, 2) * e.coordinates) for e, c, weights in pieces]
        )
        return jtu.tree_map(jnp.add, error, b.rmatvec(z, error))


def spectral_part(point: LinearizationPoint) -> SpectralPart:
    """Return the linear part at a point, with BB^T diagonalized."""
    point = jax.lax.stop_gradient(point)
    size = math.prod(point.products().shape)
    gram = _times(point, size, lambda i: jnp.arange(size) == i)
    # The lower triangle is enough, and no copy is made to symmetrize it.
    values, vectors = jnp.linalg.eigh(gram, symmetrize_input=False)
    values = jnp.maximum(values, 0)  # rounding may leave negative ones, which would grow
    return SpectralPart(point, values[-1], values, vectors)


def ritz_part(point: LinearizationPoint, rank: int, guess: Array | None = None) -> SpectralPart:
    r"""Return the leading part of BB^T without its Gram: Ritz values and vectors, by subspace iteration.

    L = -B^T V V^T B for any orthonormal V: functions of it are exact on Ritz pairs that are far from being
    eigenpairs, and what they miss is left to N. So a few products do, and one if there is a guess.
    """
    point = jax.lax.stop_gradient(point)
    b = point.products()
    size = math.prod(b.shape)
    columns = jr.normal(jr.key(0), (rank, size), b.dtype) if guess is None else jax.lax.stop_gradient(guess).T
    for _ in range(POWERS if guess is None else 1):
        columns = jnp.linalg.qr(_times(point, rank, lambda i, rows=columns: rows[i]).T)[0].T
    projected = _times(point, rank, lambda i: columns[i]) @ columns.T
    values, mixing = jnp.linalg.eigh(projected)
    values = jnp.maximum(values, 0)
    return SpectralPart(point, values[-1], values, columns.T @ mixing)


def _times(point: LinearizationPoint, count: int, row: Callable[[Array], Array]) -> Array:
    """Return BB^T on vectors, as rows, some of them at the same time."""
    b, like = point.products(), point.coordinates

    def product(i: Array) -> Array:
        return b.matvec(b.rmatvec(row(i).astype(b.dtype), like))

    return jax.lax.map(product, jnp.arange(count), batch_size=min(GRAM_BLOCK, count))


def krylov_part(point: LinearizationPoint, num_lanczos: int) -> KrylovPart:
    """Return the linear part by Lanczos: its set-up is the largest eigenvalue, from 20 products."""
    point = jax.lax.stop_gradient(point)
    b, like = point.products(), point.coordinates
    size = math.prod(b.shape)
    values, _, _ = lanczos(lambda r: b.matvec(b.rmatvec(r, like)), size, 20, dtype=b.dtype)
    return KrylovPart(point, values[-1], num_lanczos, size, b.dtype)
