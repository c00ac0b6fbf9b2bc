r"""The right-hand side of every flow, in displacement coordinates $u = \alpha(w - w_0)$, $\varepsilon = 1/\alpha$.

    u' = -Dh(w0 + eps u)^T grad R(y)        y(u) = alpha h(w0) + [h(w0 + eps u) - h(w0)] / eps

is $w' = -\nabla F_\alpha(w)$, $F_\alpha(w) = R(\alpha h(w))/\alpha^2$, of Chizat, Oyallon, Bach (2019), equation (2).
At eps = 0 it is the tangent model's flow, u is O(1) for every alpha, and no digits are lost.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Float

from lazyjax._core.trees import move
from lazyjax._core.types import Model, Outputs, Params, RealScalar
from lazyjax.difference.finite_jvp import finite_jvp
from lazyjax.flow.linear_part import LinearizationPoint
from lazyjax.flow.start import as_argument, as_model, as_scalar, scaled_start
from lazyjax.losses.loss import Loss
from lazyjax.models.maps import without_constant
from lazyjax.models.tangent import Tangent


class ModelField(eqx.Module):
    r"""The flow of a model: $u \mapsto -Dh(w_0 + \varepsilon u)^T \nabla R(y(u))$.

    Attributes:
        h: The model.
        coordinates: The floating arrays of w0.
        rest: All other leaves of w0.
        loss: R.
        eps: $1/\alpha$.
        start: $\alpha h(w_0)$.
        initial: $h(w_0)$.
    """

    h: Model
    coordinates: Params
    rest: Params
    loss: Loss
    eps: Float[Array, ""]
    start: Outputs
    initial: Outputs

    def __call__(self, u: Params) -> Params:
        r"""Return $u' = -Dh(w_0 + \varepsilon u)^T \nabla R(y(u))$."""
        outputs, vjp = jax.vjp(lambda w: self.h(eqx.combine(w, self.rest)), self.moved(u))
        (gradient,) = vjp(self.loss.cotangent(self.scaled(outputs, u)))
        return jtu.tree_map(jnp.negative, gradient)

    def moved(self, u: Params) -> Params:
        r"""Return the coordinates of $w = w_0 + \varepsilon u$."""
        return move(self.coordinates, self.eps, u)

    def outputs(self, u: Params) -> Outputs:
        r"""Return $y(u) = \alpha h(w_0 + \varepsilon u)$, (n,) or (n, k), without cancellation."""
        w0 = eqx.combine(self.coordinates, self.rest)
        return self.start + finite_jvp(self.h, w0, u, self.eps)

    def scaled(self, outputs: Outputs, u: Params) -> Outputs:
        """Return y(u) by the plain difference of the outputs at hand where that loses no digit: it halves the price."""
        plain = self.eps * PLAIN_ALPHA.get(outputs.dtype.name, 1.0) >= 1
        return jax.lax.cond(plain, lambda: self.start + (outputs - self.initial) / self.eps, lambda: self.outputs(u))

    def linearization_point(self, u: Params | None = None) -> LinearizationPoint:
        """Return the model where u has taken it, to be linearized there; None for the start.

        Not u = 0, which under a vmap over alpha would make one point per lane of what all of them share.
        """
        if u is None:
            return LinearizationPoint(self.h, self.rest, self.coordinates, self.loss.root(self.start))
        return LinearizationPoint(self.h, self.rest, self.moved(u), self.loss.root(self.outputs(u)))


class TangentField(eqx.Module):
    r"""The flow of a tangent model: $u \mapsto -Dh(w_0)^T \nabla R(\alpha h(w_0) + Dh(w_0) u)$.

    Attributes:
        tangent: The tangent model.
        coordinates: The floating arrays of w0.
        rest: All other leaves of w0.
        loss: R.
        eps: $1/\alpha$.
        start: $\alpha h(w_0)$.
    """

    tangent: Tangent
    coordinates: Params
    rest: Params
    loss: Loss
    eps: Float[Array, ""]
    start: Outputs

    def __call__(self, u: Params) -> Params:
        r"""Return $u' = -Dh(w_0)^T \nabla R(y(u))$."""
        return jtu.tree_map(jnp.negative, self.tangent.vjp(self.loss.cotangent(self.outputs(u))))

    def moved(self, u: Params) -> Params:
        r"""Return the coordinates of $w = w_0 + \varepsilon u$."""
        return move(self.coordinates, self.eps, u)

    def outputs(self, u: Params) -> Outputs:
        r"""Return $y(u) = \alpha \bar h(w_0 + \varepsilon u) = \alpha h(w_0) + Dh(w_0) u$."""
        return self.start + self.tangent.jvp(u)

    def linearization_point(self, u: Params | None = None) -> LinearizationPoint:
        """Return the model where the tangent model touches it, whatever u; the loss where u has taken the outputs."""
        coordinates, rest = eqx.partition(self.tangent.w0, eqx.is_inexact_array)
        outputs = self.start if u is None else self.outputs(u)
        return LinearizationPoint(self.tangent.h, rest, coordinates, self.loss.root(outputs))


PLAIN_ALPHA = {"float64": 1e3}
"""Largest alpha (1 in other precisions) at which the right-hand side takes the plain difference (h(w) - h(w0)) alpha.
Its rounding, alpha eps |h|, is at most 1e-13 of the outputs. What is saved always has `finite_jvp`'s digits."""


def make_field(
    h: Model, loss: Loss, w0: Params, alpha: RealScalar, *, zero_start: bool, throw: bool = True
) -> ModelField | TangentField:
    r"""Return the vector field of the flow of $F_\alpha$; call it under jit, with `zero_start` from `check_start`.

    An infinite alpha with a nonzero start raises at run time; with `throw` False the start is infinite instead,
    so that one bad lane of a sweep fails alone.
    """
    coordinates, rest = eqx.partition(w0, eqx.is_inexact_array)
    if not isinstance(h, Tangent) and zero_start:
        h = without_constant(h)
    initial = h(w0)  # a tangent model off the point where it touches does not start at h(w0)
    start, eps = scaled_start(initial, alpha, zero_start=zero_start, throw=throw)
    if isinstance(h, Tangent):
        return TangentField(h, coordinates, rest, loss, eps, start)
    return ModelField(h, coordinates, rest, loss, eps, start, initial)


class ScaledObjective(eqx.Module):
    r"""The objective $F_\alpha(w) = R(\alpha h(w))/\alpha^2$ with its start, as one argument of compiled programs.

    Attributes:
        model: The model h, as `as_argument` takes it apart.
        loss: R.
        w0: The start.
        alpha: The scale, an array: another one is another argument of the same program.
        zero_start: Whether h(w0) is declared zero; see `check_start`.
    """

    model: tuple[Model, Params | None]
    loss: Loss
    w0: Params
    alpha: Float[Array, ""]
    zero_start: bool = eqx.field(static=True)

    @classmethod
    def of(cls, h: Model, loss: Loss, w0: Params, alpha: RealScalar, zero_start: bool) -> "ScaledObjective":
        """Return the objective of a model, which `check_start` has checked."""
        return cls(as_argument(h), loss, w0, as_scalar(alpha), zero_start)

    def field(self, *, throw: bool = True) -> ModelField | TangentField:
        """Return the vector field of its flow; call it under jit."""
        return make_field(as_model(self.model), self.loss, self.w0, self.alpha, zero_start=self.zero_start, throw=throw)
