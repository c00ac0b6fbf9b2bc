r"""Lipschitz constants of two-layer nets with a smooth activation on balls around w0, in closed form, from above."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.scipy.special import erf
from jaxtyping import Array, Float, PRNGKeyArray

from lazyjax._core.lanczos import lanczos_slack
from lazyjax._core.types import Model, Params
from lazyjax.laziness.second_derivative import FAILURE, MATVECS
from lazyjax.laziness.two_layer import Neurons, join_blocks, neurons_of
from lazyjax.losses.losses import square_loss
from lazyjax.models.maps import without_constant
from lazyjax.models.tangent import linearize, singular_values


class ActivationBounds(NamedTuple):
    r"""$\sup|\sigma'|$ and $\sup|\sigma''|$ over all reals."""

    slope: float
    curvature: float


ACTIVATION_BOUNDS: dict[Callable[..., Any], ActivationBounds] = {
    jnp.tanh: ActivationBounds(1.0, 4 / 27**0.5),
    jax.nn.sigmoid: ActivationBounds(0.25, 1 / 108**0.5),
    jax.nn.softplus: ActivationBounds(1.0, 0.25),
    erf: ActivationBounds(2 / math.pi**0.5, (8 / (math.e * math.pi)) ** 0.5),
    jnp.sin: ActivationBounds(1.0, 1.0),
    jnp.cos: ActivationBounds(1.0, 1.0),
}
"""Of the activations that are known."""


class TwoLayerLipschitz(eqx.Module):
    r"""Constants of a two-layer net on balls around w0, from above; made by `two_layer_lipschitz`.

    Attributes:
        dh_norm: $\|Dh(w_0)\|$.
        side: $\sup|\sigma'|\,\|X\|$ in F, the most that the block (a, b) of a neuron's $D^2\phi$ can be.
        inner: $\sup|\sigma''|\,\|(|x_i|x_i)_i\|$ in F, times $|a_j|$ the most that its block (b, b) can be.
        largest: $\max_j|a_j|$ at w0.
    """

    dh_norm: Float[Array, ""]
    side: Float[Array, ""]
    inner: Float[Array, ""]
    largest: Float[Array, ""]

    def lip_dh(self, radius: float | Float[Array, "..."]) -> Float[Array, "..."]:
        r"""$\sup\|D^2h\|$ on the ball: $\frac12(s + \sqrt{s^2 + 4\,side^2})$, $s = (\max_j|a_j| + radius)\,inner$."""
        return join_blocks(self.side, (self.largest + radius) * self.inner)

    def lip_h(self, radius: float | Float[Array, "..."]) -> Float[Array, "..."]:
        r"""At least $\|Dh(w_0)\| + \int_0^{radius} \ell$, $\ell$ the (convex) `lip_dh`, by the trapezoidal rule."""
        return self.dh_norm + radius * 0.5 * (self.lip_dh(0.0) + self.lip_dh(radius))


def two_layer_lipschitz(
    f: Model,
    w0: Params,
    x: Float[Array, "n d"],
    *,
    mean: bool = True,
    bounds: tuple[float, float] | None = None,
    key: PRNGKeyArray | None = None,
) -> TwoLayerLipschitz:
    r"""Lip(h) and Lip(Dh) of a two-layer net on any ball around w0, from above.

    A neuron's $D^2\phi(u, u)_i = 2u_a\sigma'x_i \cdot u_b + a\sigma''(x_i \cdot u_b)^2$ has at most the norm of the
    matrix [[0, side], [side, |a| inner]] of its blocks' norms, and that of the net is the largest over neurons.

    Args:
        f: `two_layer(activation)`, perhaps centered, mirrored or rescaled.
        w0: Its parameters.
        x: Inputs.
        mean: Whether F's metric has the factor 1/n.
        bounds: $(\sup|\sigma'|, \sup|\sigma''|)$; None for tanh, sigmoid, softplus, erf, sin and cos.
        key: For a Lanczos start; None for a fixed one.

    Returns:
        `TwoLayerLipschitz`, with `lip_h(radius)` and `lip_dh(radius)`, up to a probability of 1e-6 for that of
        $\|Dh(w_0)\|$ with more than 60 inputs.

    Raises:
        TypeError: f is not such a net.
        ValueError: an activation whose bounds are not known, or bounds that are not positive and finite (ReLU has no
            bound on its second derivative).

    Source:
        Chizat, Oyallon, Bach (2019), supplement A.2; theorem 2.3 takes constants on a ball.

    Example:
        >>> from lazyjax.models import two_layer
        >>> w = {"a": jnp.ones(1), "b": jnp.zeros((1, 1))}
        >>> constants = two_layer_lipschitz(two_layer(jnp.sin), w, jnp.ones((1, 1)))
        >>> print(f"{constants.lip_dh(0.0):.3f}")
        1.618
    """
    neurons = neurons_of(without_constant(f), w0, x)
    if neurons is None:
        msg = f"f must be a two_layer net, centered, mirrored or rescaled, got {type(f).__name__}."
        raise TypeError(msg)
    slope, curvature = _activation_bounds(neurons, bounds)
    loss = square_loss(jnp.zeros(x.shape[0], x.dtype), mean=mean)
    factor = abs(neurons.factor) * loss.weight**0.5
    found = singular_values(linearize(lambda w: f(w, x), w0), loss, num_matvecs=MATVECS, key=key).largest
    lengths = jnp.linalg.norm(x, axis=1)
    return TwoLayerLipschitz(
        dh_norm=lanczos_slack(x.shape[0], MATVECS, FAILURE) ** 0.5 * found,
        side=slope * factor * jnp.linalg.norm(x, 2),
        inner=curvature * factor * jnp.linalg.norm(lengths[:, None] * x, 2),
        largest=jnp.max(jnp.abs(neurons.a)),
    )


def _activation_bounds(neurons: Neurons, bounds: tuple[float, float] | None) -> tuple[float, float]:
    if bounds is None:
        # By identity: a module of arrays has no hash.
        bounds = next((b for known, b in ACTIVATION_BOUNDS.items() if known is neurons.activation), None)
    if bounds is None:
        name = getattr(neurons.activation, "__name__", str(neurons.activation))
        msg = (
            f"bounds must be given for the activation {name}: (sup |s'|, sup |s''|) over all reals; a kink (ReLU) has "
            "no second one, and is outside of the theorems."
        )
        raise ValueError(msg)
    slope, curvature = bounds
    if not (0 < slope < math.inf and 0 < curvature < math.inf):
        msg = f"bounds must be positive and finite, (sup |s'|, sup |s''|), got {tuple(bounds)}; ReLU has none."
        raise ValueError(msg)
    return slope, curvature
