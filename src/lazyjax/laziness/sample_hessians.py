r"""Sums of squared rows of the second derivative, $\sum_i |S^{1/2} H_i u|^2$, without forming the rows.

$H_i u$ is the gradient of $w \mapsto Dh_i(w)u$, one row of that function's Jacobian. So if every sample has its own
outputs, the factors of a layer's Jacobian (`lazyjax.kernels`) give the squares of all rows in a few passes over the
batch, and half their derivative by u is the product with $M = \sum_i H_i S H_i$, which is all that Lanczos needs. If
the model does not show its samples, M takes two Hessian-vector products per output.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.flatten_util as jfu
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Float

from lazyjax._core.checks import is_concrete
from lazyjax._core.forward import jvp
from lazyjax._core.types import Model, Params
from lazyjax.kernels.factors import Factors
from lazyjax.kernels.plan import SampleJacobian, block_sizes, sample_jacobian
from lazyjax.kernels.sample_checks import check_rows, check_samples
from lazyjax.laziness.hessian_norm import SecondDerivative
from lazyjax.models.maps import Centered, OnData, Rescaled, Symmetrized, declares_zero, without_constant

BYTES = 2**27
"""Bytes of the parameter vectors held at a time if outputs are taken one by one."""


def as_samples(h: Model) -> tuple[Model, Array] | None:
    """Return f and x with h(w) = f(w, x) up to a constant, if h shows its inputs: `OnData`, or a partial f(., x=x)."""
    if isinstance(h, Centered):
        return as_samples(h.f)
    if isinstance(h, Rescaled | Symmetrized):
        inner = as_samples(h.f)
        return None if inner is None else (dataclasses.replace(h, f=inner[0]), inner[1])
    if isinstance(h, OnData):
        return _without_start(h.f), h.x
    found = _named_inputs(h)
    return None if found is None else (_without_start(found[0]), found[1])


def inputs_as_arguments(h: Model) -> Model:
    """Return the same model with its inputs as an argument of its programs, if it shows them.

    Two partials of one f then share their compiled programs.
    """
    found = _named_inputs(h)
    return h if found is None else OnData(*found)


def _named_inputs(h: Model) -> tuple[Model, Array] | None:
    if isinstance(h, functools.partial) and not h.args and len(h.keywords) == 1:
        ((name, x),) = h.keywords.items()
        if eqx.is_array(x) and x.ndim > 0:
            return _Named(h.func, name), x
    return None


def show_inputs(h: Model) -> Model:
    """Return the same model up to a constant, as `OnData` if it shows its inputs."""
    found = as_samples(h)
    return without_constant(h) if found is None else OnData(*found)


def _without_start(f: Model) -> Model:
    """Return a centered model's own f, which changes as it does."""
    if isinstance(f, Centered):
        return _without_start(f.f)
    return dataclasses.replace(f, f=_without_start(f.f)) if isinstance(f, Rescaled | Symmetrized | _Named) else f


class _Named(eqx.Module):
    """A model f(w, name=x) as one that takes its inputs by position."""

    f: Model
    name: str = eqx.field(static=True)

    def __call__(self, w: Params, x: Array) -> Array:
        return self.f(w, **{self.name: x})

    def declares_zero(self, w: Params) -> bool:
        """Return whether f declares that its outputs at w are zero."""
        return declares_zero(self.f, w)


def independent_samples(h: Model, w0: Params) -> tuple[Model, Array] | None:
    """Return what `as_samples` does, if each sample has its own row of outputs and that can be seen."""
    found = as_samples(h)
    if found is None or not is_concrete((eqx.filter(found, eqx.is_array), w0)):
        return None
    f, x = found
    try:
        check_samples(f, w0, x, None)
        check_rows(f, w0, x)
    except Exception:
        # It mixes samples, has another axis for them, or needs all of them: then it may raise anything.
        return None
    return found


def unwrapped(f: Model) -> Model:
    """Return the model that a `_Named` one wraps."""
    return f.f if isinstance(f, _Named) else f


def halves(f: Model, w: Params) -> tuple[Model, list[Params]]:
    """Return the model whose difference a symmetrized one takes, and the parameters of each half."""
    return (f.f, list(w)) if isinstance(f, Symmetrized) else (f, [w])


class SampleRows(eqx.Module):
    """The matrix M, by the factors of the samples' rows."""

    f: Model
    w0: Params
    x: Array
    root: float = eqx.field(static=True)

    def product(self, u: Float[Array, " p"], scales: Float[Array, " leaves"]) -> Float[Array, " p"]:
        """Return M u, S the scale of each leaf of the parameters."""
        jacobian = self._jacobian(self._tree(u))
        # The factors are kept for the backward pass, about as often as derivatives are nested.
        size, _ = block_sizes(4 * jacobian.sample_bytes, 0, self.x.shape[0], None)
        count = -(-self.x.shape[0] // size)
        filled = jnp.concatenate([self.x, jnp.repeat(self.x[:1], count * size - self.x.shape[0], axis=0)])
        there = (jnp.arange(count * size) < self.x.shape[0]).astype(u.dtype)
        blocks = (filled.reshape(count, size, *self.x.shape[1:]), there.reshape(count, size))
        roots = jnp.sqrt(scales)

        def add(total: Array, block: tuple[Array, Array]) -> tuple[Array, None]:
            return total + jax.grad(lambda v: 0.5 * self._squares(v, roots, *block))(u), None

        return jax.lax.scan(add, jnp.zeros_like(u), blocks)[0]

    def cost(self, count: Callable[..., float]) -> float:
        """Return the cost of a product."""
        coordinates = eqx.filter(self.w0, eqx.is_inexact_array)
        scales = jnp.ones(len(jtu.tree_leaves(coordinates)))
        return count(self.product, jfu.ravel_pytree(coordinates)[0], scales)

    def _tree(self, u: Array) -> Params:
        return jfu.ravel_pytree(eqx.filter(self.w0, eqx.is_inexact_array))[1](u)

    def _jacobian(self, direction: Params) -> SampleJacobian:
        """Return the Jacobian of one sample's slopes along a direction."""

        def slope(w: Params, x: Array) -> Array:
            coordinates, rest = eqx.partition(w, eqx.is_inexact_array)
            return jvp(lambda c: self.f(eqx.combine(c, rest), x), (coordinates,), (direction,))[1]

        return sample_jacobian(slope, self.w0, self.x, count=1)

    def _squares(self, u: Array, roots: Array, x: Array, there: Array) -> Array:
        r"""Return $c \sum_i |S^{1/2} H_i u|^2$ over some samples."""
        jacobian = self._jacobian(self._tree(u))

        def one(row: Array) -> Array:
            return _sum_of_squares(jacobian, jacobian.factors(row), roots)

        return jnp.asarray(self.root**2, u.dtype) * jnp.sum(there * jax.vmap(one)(x).astype(u.dtype))


def _sum_of_squares(jacobian: SampleJacobian, factors: Factors, roots: Array) -> Array:
    r"""$\sum_k |S^{1/2} J_k|^2$ of one sample's Jacobian by its factors."""
    total = jnp.zeros((), jacobian.dtype)
    parts = zip(jacobian.groups, jacobian.contractions, factors.inputs, factors.cotangents, strict=True)
    for group, contraction, inputs, cotangents in parts:
        delta = cotangents.astype(jacobian.dtype)
        if group.one_hot:
            delta = delta * roots[group.first[0].leaf].astype(jacobian.dtype)
            inner = ((inputs[:, None] == inputs[None]) & (inputs[:, None] >= 0)).astype(jacobian.dtype)[None]
        else:
            scale = [jnp.full(uses[0].sizes.inputs, roots[uses[0].leaf], jacobian.dtype) for uses in group.leaves]
            a = inputs.astype(jacobian.dtype) * jnp.concatenate(scale)[None, None]
            if contraction == "jacobian":
                total += jnp.sum(jnp.einsum("pgd,kpgm->kgdm", a, delta) ** 2)
                continue
            inner = jnp.einsum("pgd,qgd->gpq", a, a)
        total += jnp.sum(delta * jnp.einsum("gpq,kqgm->kpgm", inner, delta))
    for leaf, rows in zip(jacobian.direct, factors.rows, strict=True):
        total += roots[leaf].astype(jacobian.dtype) ** 2 * jnp.sum(rows.astype(jacobian.dtype) ** 2)
    return total


class OutputRows(eqx.Module):
    """The matrix M, by two Hessian-vector products per output, for any model."""

    form: SecondDerivative
    outputs: int = eqx.field(static=True)

    def product(self, u: Float[Array, " p"], scales: Float[Array, " leaves"]) -> Float[Array, " p"]:
        """Return M u, S the scale of each leaf of the parameters."""
        leaves = jtu.tree_leaves(eqx.filter(self.form.w0, eqx.is_inexact_array))
        scale = jnp.concatenate([jnp.full(leaf.size, s, u.dtype) for leaf, s in zip(leaves, scales, strict=True)])

        def one(i: Array) -> Array:
            hessian = self.form.hessian((jnp.arange(self.outputs) == i).astype(u.dtype))
            return hessian(scale * hessian(u))

        size = max(1, min(self.outputs, BYTES // (4 * u.size * u.dtype.itemsize)))
        count = -(-self.outputs // size)
        # Numbers beyond the last output select none and add zero.
        blocks = jnp.arange(count * size).reshape(count, size)

        def add(total: Array, block: Array) -> tuple[Array, None]:
            return total + jnp.sum(jax.vmap(one)(block), axis=0), None

        return jax.lax.scan(add, jnp.zeros_like(u), blocks)[0]

    def cost(self, count: Callable[..., float]) -> float:
        """Return the cost of a product."""
        point = self.form.point()
        return 2 * self.outputs * count(_hvp, self.form, jnp.ones(self.outputs, point.dtype), point)


def _hvp(form: SecondDerivative, z: Array, u: Array) -> Any:
    return form.hessian(z)(u)
