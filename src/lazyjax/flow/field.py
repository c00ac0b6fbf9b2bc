r"""Displacement coordinates $u = \alpha(w - w_0)$, $\varepsilon = 1/\alpha$: what every flow integrates.

    y(u) = alpha h(w0) + [h(w0 + eps u) - h(w0)] / eps        u' = -Dh(w0 + eps u)^T grad R(y)

At eps = 0 this is the tangent model's flow, u is O(1) for every alpha, and no digits are lost.
"""

import warnings
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from lazyjax._core.checks import check_outputs, is_concrete, split_params
from lazyjax._core.trees import move
from lazyjax._core.types import Model, Outputs, Params, RealScalar
from lazyjax.difference.finite_jvp import finite_jvp
from lazyjax.flow.linear_part import LinearizationPoint
from lazyjax.losses.losses import Loss
from lazyjax.models.maps import declares_zero, without_constant
from lazyjax.models.tangent import Tangent

PLAIN_ALPHA = {"float64": 1e3}
"""Up to this alpha (1 in other precisions) the plain difference (h(w) - h(w0)) alpha is used along the flow: its
rounding, alpha eps |h|, is 1e-13 of the outputs at most, or theirs. What is saved always has `finite_jvp`'s digits."""


class ModelField(eqx.Module):
    """The flow of a model in displacement coordinates."""

    h: Model
    coordinates: Params
    rest: Params
    loss: Loss
    eps: Float[Array, ""]
    start: Outputs
    initial: Outputs

    def moved(self, u: Params) -> Params:
        """The coordinates of $w = w_0 + u/alpha$."""
        return move(self.coordinates, self.eps, u)

    def outputs(self, u: Params) -> Outputs:
        """$alpha h(w_0 + u/alpha)$, (n,) or (n, k)."""
        w0 = eqx.combine(self.coordinates, self.rest)
        return self.start + finite_jvp(self.h, w0, u, self.eps)

    def anchored(self, u: Params | None = None) -> LinearizationPoint:
        """The model where u has taken it, to be linearized there; None for the start.

        Not u = 0, which under a vmap over alpha would make an anchor a lane of what all of them share.
        """
        if u is None:
            return LinearizationPoint(self.h, self.rest, self.coordinates, self.loss.root(self.start))
        return LinearizationPoint(self.h, self.rest, self.moved(u), self.loss.root(self.outputs(u)))

    def __call__(self, u: Params) -> Params:
        """$u'$."""
        outputs, vjp = jax.vjp(lambda w: self.h(eqx.combine(w, self.rest)), self.moved(u))
        # Where the plain difference loses no digit that counts, it is there already and halves the price.
        plain = self.eps * PLAIN_ALPHA.get(outputs.dtype.name, 1.0) >= 1
        scaled = jax.lax.cond(plain, lambda: self.start + (outputs - self.initial) / self.eps, lambda: self.outputs(u))
        cotangent = self.loss.cotangent(scaled)
        return jtu.tree_map(jnp.negative, vjp(cotangent)[0])


class TangentField(eqx.Module):
    """The flow of a tangent model: the same at every alpha, but for the start."""

    tangent: Tangent
    coordinates: Params
    rest: Params
    loss: Loss
    eps: Float[Array, ""]
    start: Outputs

    def moved(self, u: Params) -> Params:
        """The coordinates of $w = w_0 + u/alpha$."""
        return move(self.coordinates, self.eps, u)

    def outputs(self, u: Params) -> Outputs:
        r"""$\alpha \bar h(w_0 + u/\alpha) = \alpha h(w_0) + Dh(w_0) u$."""
        return self.start + self.tangent.jvp(u)

    def anchored(self, u: Params | None = None) -> LinearizationPoint:
        """The model where the tangent model touches it, whatever u; the loss where u has taken the outputs."""
        coordinates, rest = eqx.partition(self.tangent.w0, eqx.is_inexact_array)
        outputs = self.start if u is None else self.outputs(u)
        return LinearizationPoint(self.tangent.h, rest, coordinates, self.loss.root(outputs))

    def __call__(self, u: Params) -> Params:
        """$u'$."""
        return jtu.tree_map(jnp.negative, self.tangent.vjp(self.loss.cotangent(self.outputs(u))))


def make_field(
    h: Model, loss: Loss, w0: Params, alpha: RealScalar, *, zero_start: bool, throw: bool = True
) -> ModelField | TangentField:
    """The vector field of the flow of $F_alpha$; call it under jit, with `zero_start` from `check_start`.

    An infinite alpha with a nonzero start raises at run time; with `throw` False the start is infinite instead,
    so that one bad lane of a sweep fails alone.
    """
    coordinates, rest = eqx.partition(w0, eqx.is_inexact_array)
    if isinstance(h, Tangent):
        # Off its own anchor the tangent model does not start at h(w0).
        initial = h(w0)
        start, eps = _scaled_start(initial, alpha, zero_start, throw)
        return TangentField(h, coordinates, rest, loss, eps, start)
    h = without_constant(h) if zero_start else h
    initial = h(w0)
    start, eps = _scaled_start(initial, alpha, zero_start, throw)
    return ModelField(h, coordinates, rest, loss, eps, start, initial)


def _scaled_start(initial: Outputs, alpha: RealScalar, zero_start: bool, throw: bool) -> tuple[Outputs, Array]:
    """Alpha h(w0), exactly zero where that is declared, and eps."""
    alpha = jnp.asarray(alpha, initial.dtype)
    if zero_start:
        return jnp.zeros_like(initial), 1 / alpha
    nonzero = initial != 0
    if throw:
        initial = eqx.error_if(initial, jnp.isinf(alpha) & jnp.any(nonzero), _INFINITE_START)
    # The guard keeps alpha = inf exact (and its derivatives finite) where the output is zero; at a finite alpha the
    # derivative by w0 must pass through an output that is zero.
    finite = jnp.isfinite(alpha)
    to_infinity = jnp.where(nonzero, jnp.inf * jnp.sign(initial), 0)
    return jnp.where(finite, jnp.where(finite, alpha, 0) * initial, to_infinity), 1 / alpha


_INFINITE_START = (
    "alpha=inf needs a model with h(w0) = 0, since alpha h(w0) grows without bound; "
    "use lazyjax.center(h, w0) or lazyjax.symmetrize(f, w0)."
)


def check_start(h: Model, loss: Loss, w0: Params, alpha: RealScalar, rtol: float) -> bool:
    """Refuse what cannot be followed from w0, at the price of one gradient; whether h declares a zero there.

    Raises:
        TypeError, ValueError: parameters or outputs unfit; outputs and targets of different shapes; h(w0) or
            its gradient not finite; alpha infinite with h(w0) not zero.

    Warns:
        UserWarning: h(w0) is all rounding, yet alpha h(w0) is above the tolerance.
    """
    split_params(w0)
    if isinstance(h, Tangent) and jtu.tree_structure(h.w0) != jtu.tree_structure(w0):
        msg = "w0 must have the structure of the parameters that h was linearized at."
        raise ValueError(msg)
    out = check_outputs(h, w0)
    loss.check(out.shape)
    zero = declares_zero(h, w0)
    if is_concrete((eqx.filter(h, eqx.is_array), eqx.filter(loss, eqx.is_array), w0)):
        with jax.ensure_compile_time_eval():  # values, even inside a user's jit
            initial, gradient, rounding, residual = _probe(h, loss, w0, jr.key(0))
        _check_finite_start(initial, gradient)
        if not zero and is_concrete(alpha):
            _check_zero(np.asarray(initial), float(alpha), float(rounding), rtol * float(residual))
    return zero


@eqx.filter_jit
def _probe(h: Model, loss: Loss, w0: Params, key: PRNGKeyArray) -> tuple[Outputs, Params, Array, Array]:
    """h(w0), the gradient there, the rounding error to expect of h(w0), the largest entry of grad R."""
    coordinates, rest = eqx.partition(w0, eqx.is_inexact_array)
    initial, vjp = jax.vjp(lambda w: h(eqx.combine(w, rest)), coordinates)
    (gradient,) = vjp(loss.cotangent(initial))
    # A relative perturbation of every parameter by eps moves h by about eps times this random jvp.
    leaves, tree = jtu.tree_flatten(coordinates)
    ends = np.cumsum([leaf.size for leaf in leaves])
    # One draw for all leaves: compilers take long over the bits of each.
    parts = jnp.split(jr.rademacher(key, (ends[-1],), jnp.int8), ends[:-1])
    signs = [leaf * part.reshape(leaf.shape).astype(leaf.dtype) for leaf, part in zip(leaves, parts, strict=True)]
    sensitivity = jax.jvp(lambda w: h(eqx.combine(w, rest)), (coordinates,), (tree.unflatten(signs),))[1]
    rounding = jnp.finfo(initial.dtype).eps * jnp.max(jnp.abs(sensitivity))
    return initial, gradient, rounding, jnp.max(jnp.abs(loss.gradient(jnp.zeros_like(initial))))


def _check_finite_start(initial: Outputs, gradient: Params) -> None:
    bad = int(np.sum(~np.isfinite(initial)))
    if bad:
        msg = f"h(w0) must be finite, but {bad} of its {initial.size} entries are not; check the model and its data."
        raise ValueError(msg)
    for path, leaf in jtu.tree_leaves_with_path(gradient):
        bad = int(np.sum(~np.isfinite(leaf)))
        if bad:
            msg = (
                f"h must be differentiable at w0, but {bad} of {leaf.size} entries of the gradient in "
                f"w0{jtu.keystr(path)} are NaN or infinite; move w0 off the singular point (sqrt or a norm at 0?)."
            )
            raise ValueError(msg)


def _check_zero(initial: np.ndarray, alpha: float, rounding: float, tolerance: float) -> None:
    largest = float(np.max(np.abs(initial)))
    if np.isinf(alpha) and largest > 0:
        msg = f"{_INFINITE_START} Got max |h(w0)| = {largest:.1e}."
        raise ValueError(msg)
    if 0 < largest <= 100 * rounding and alpha * largest > tolerance:
        warnings.warn(
            f"h(w0) is a rounding residue (max {largest:.1e}), but alpha={alpha:g} makes it {alpha * largest:.1e}; "
            "if it should be zero, use lazyjax.center(h, w0), which starts the flow from exact zeros.",
            stacklevel=4,
        )


class Velocity(eqx.Module):
    """A field as the vector field of a `diffrax.ODETerm`."""

    field: ModelField | TangentField

    def __call__(self, t: Any, u: Params, args: Any) -> Params:
        """$u'$, whatever t and args."""
        del t, args
        return _velocity(self.field, u)


@eqx.filter_jit  # the stages of a step share one trace
def _velocity(field: ModelField | TangentField, u: Params) -> Params:
    return field(u)
