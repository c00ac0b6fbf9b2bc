r"""Lipschitz constants of h and Dh: what the theorems of `lazyjax.bounds` ask for.

- Along a computed flow (`lipschitz_along`): the proofs use no more.
- On a ball, for two-layer nets with a smooth activation, in closed form (`two_layer_lipschitz`): upper bounds.
- On a ball, sampled, for any model (`sampled_lipschitz_lower`): lower estimates, which prove nothing.
- The local constant of theorem 2.4 from constants on balls (`local_lipschitz`).

Norms in F are in the metric of the loss, norms of parameters are Euclidean.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.flatten_util as jfu
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
from jax.scipy.special import erf
from jaxtyping import Array, Float, Key, PRNGKeyArray

from lazyjax._core.checks import check_outputs, split_params
from lazyjax._core.keys import default_key
from lazyjax._core.lanczos import lanczos_slack
from lazyjax._core.show import show
from lazyjax._core.trees import move
from lazyjax._core.types import Model, Params
from lazyjax.flow.gradient_flow import Flow
from lazyjax.laziness.hessian_norm import SecondDerivative, norm_lower
from lazyjax.laziness.jacobian_change import relative_change
from lazyjax.laziness.sample_hessians import inputs_as_arguments
from lazyjax.laziness.second_derivative import FAILURE, MATVECS
from lazyjax.laziness.two_layer import Neurons, join_blocks, neurons_of
from lazyjax.losses.loss import Loss, as_loss
from lazyjax.losses.square import square_loss
from lazyjax.models.maps import without_constant
from lazyjax.models.tangent import linearize, singular_values

__all__ = [
    "PathLipschitz",
    "SampledLipschitz",
    "TwoLayerLipschitz",
    "lipschitz_along",
    "local_lipschitz",
    "sampled_lipschitz_lower",
    "two_layer_lipschitz",
]


class PathLipschitz(eqx.Module):
    r"""The Lipschitz constants along a flow; made by `lipschitz_along`.

    Attributes:
        lip_h: $\max_t\|Dh(w(t))\|$.
        lip_dh: $\max_t\|Dh(w(t)) - Dh(w_0)\|/|w(t) - w_0|$.
        dh_norm: $\|Dh(w(t))\|$, (time,).
        dh_change_ratio: $\|Dh(w(t)) - Dh(w_0)\|/|w(t) - w_0|$, (time,); 0 where w has not moved.
        failure: Probability, over the random starts, that one of these numbers is too small.
    """

    lip_h: Float[Array, ""]
    lip_dh: Float[Array, ""]
    dh_norm: Float[Array, " time"]
    dh_change_ratio: Float[Array, " time"]
    failure: float = eqx.field(static=True)

    def __str__(self) -> str:
        """Show both constants, and where on the path they are attained."""
        return show(self, self.lip_h, 0, self._lines)

    __repr__ = __str__

    def _lines(self) -> str:
        sure = "" if self.failure == 0 else f", except with probability {self.failure:.0e}"
        first, second = int(np.argmax(self.dh_norm)), int(np.argmax(self.dh_change_ratio))
        return (
            f"Lipschitz constants at {self.dh_norm.size} times of a flow, from above{sure}\n"
            f"  Lip(h) = {self.lip_h:.4g}, met at time number {first}\n"
            f"  Lip(Dh) = {self.lip_dh:.4g}, met at time number {second}"
        )


def lipschitz_along(
    h: Model, loss: Loss | Callable[..., Any], w0: Params, flow: Flow, *, key: PRNGKeyArray | None = None
) -> PathLipschitz:
    r"""Bound $\sup_t\|Dh(w(t))\|$ and $\sup_t\|Dh(w(t)) - Dh(w_0)\|/|w(t) - w_0|$ over the times of a computed flow.

    The proofs of theorems 2.2 to 2.4 use Lip(h) and Lip(Dh) nowhere else, so with these constants a flow certifies its
    own bounds, at any alpha, in float32 too. Each norm is a Ritz value times the factor that it may fall short by,
    hence a bound from above. What lies between the times is not seen: save enough of them.

    Args:
        h: Model h(w).
        loss: Gives the metric of F.
        w0: Start of the flow.
        flow: From `gradient_flow` with `save=("displacement", ...)`; at alpha = inf the ratio is its limit,
            $\|D^2h(u, \cdot)\|/|u|$.
        key: For the Lanczos starts; None for a fixed one.

    Returns:
        `PathLipschitz`.

    Raises:
        ValueError: the flow has no displacement; h has a primitive that `finite_jvp` has no rule for.

    Source:
        Chizat, Oyallon, Bach (2019), supplement B.1 to B.3: Dh(w) and Dh(w) - Dh(w0) enter along the flow only.

    Example:
        >>> from lazyjax import gradient_flow, square_loss
        >>> h, loss, ts = lambda w: w + w**2 / 2, square_loss(jnp.ones(1)), jnp.array([0.0, 1.0])
        >>> flow = gradient_flow(h, loss, jnp.zeros(1), ts, save=("displacement",))
        >>> print(f"{lipschitz_along(h, loss, jnp.zeros(1), flow).lip_dh:.3f}")
        1.000
    """
    if flow.displacement is None:
        msg = 'flow must hold displacements, but they were not saved; give gradient_flow save=("displacement",).'
        raise ValueError(msg)
    h, loss = inputs_as_arguments(h), as_loss(loss)
    slack, failure = path_slack(check_outputs(h, w0).size, flow.ts.shape[0])
    found = _path(h, loss, w0, flow.displacement, flow.alpha, default_key(key), slack)
    return PathLipschitz(**found, failure=failure)


@eqx.filter_jit
def _path(
    h: Model, loss: Loss, w0: Params, displacements: Params, alpha: Array, key: PRNGKeyArray, slack: float
) -> dict[str, Array]:
    """Return the arrays of `PathLipschitz` by name."""
    keys = jr.split(key, jtu.tree_leaves(displacements)[0].shape[0])
    dh_norm, ratio = (slack * norms for norms in path_constants(h, loss, w0, displacements, 1 / alpha, keys))
    return {"lip_h": jnp.max(dh_norm), "lip_dh": jnp.max(ratio), "dh_norm": dh_norm, "dh_change_ratio": ratio}


@eqx.filter_jit
def path_constants(
    h: Model,
    loss: Loss,
    w0: Params,
    displacements: Params,
    eps: Float[Array, ""],
    keys: Key[Array, " time"],
) -> tuple[Float[Array, " time"], Float[Array, " time"]]:
    r"""Return $\|Dh(w_0 + \varepsilon u)\|$ and $\|Dh(w_0 + \varepsilon u) - Dh(w_0)\|/|\varepsilon u|$.

    One of each per displacement, with a random key of its own. These are Ritz values, from below; times `path_slack`
    they are from above.
    """
    h = without_constant(h)
    coordinates, rest = eqx.partition(w0, eqx.is_inexact_array)

    def at(item: tuple[Params, PRNGKeyArray]) -> tuple[Array, Array]:
        u, key = item
        tangent = linearize(h, eqx.combine(move(coordinates, eps, u), rest))
        largest = singular_values(tangent, loss, num_matvecs=MATVECS, key=key).largest
        return largest, relative_change(h, loss, w0, u, eps, num_matvecs=MATVECS, key=key)

    return jax.lax.map(at, (displacements, keys))


def path_slack(outputs: int, count: int) -> tuple[float, float]:
    """Return the factor by which the norms of `path_constants` may fall short, and the probability that it is more."""
    failure = 0.0 if outputs <= MATVECS else FAILURE
    return lanczos_slack(outputs, MATVECS, FAILURE / (2 * count)) ** 0.5, failure


class _ActivationBounds(NamedTuple):
    r"""The bounds $\sup|\sigma'|$ and $\sup|\sigma''|$ of an activation over all reals."""

    slope: float
    curvature: float


_ACTIVATION_BOUNDS: dict[Callable[..., Any], _ActivationBounds] = {
    jnp.tanh: _ActivationBounds(1.0, 4 / 27**0.5),
    jax.nn.sigmoid: _ActivationBounds(0.25, 1 / 108**0.5),
    jax.nn.softplus: _ActivationBounds(1.0, 0.25),
    erf: _ActivationBounds(2 / math.pi**0.5, (8 / (math.e * math.pi)) ** 0.5),
    jnp.sin: _ActivationBounds(1.0, 1.0),
    jnp.cos: _ActivationBounds(1.0, 1.0),
}
"""Bounds of the activations that are known."""


class TwoLayerLipschitz(eqx.Module):
    r"""The constants of a two-layer net on balls around w0, from above; made by `two_layer_lipschitz`.

    Attributes:
        dh_norm: $\|Dh(w_0)\|$.
        side: $\sup|\sigma'|\,\|X\|$ in F, which bounds the block (a, b) of a neuron's $D^2\phi$.
        inner: $\sup|\sigma''|\,\|(|x_i|x_i)_i\|$ in F, which times $|a_j|$ bounds its block (b, b).
        largest: $\max_j|a_j|$ at w0.
    """

    dh_norm: Float[Array, ""]
    side: Float[Array, ""]
    inner: Float[Array, ""]
    largest: Float[Array, ""]

    def __str__(self) -> str:
        """Show the constants at w0 and on balls of two radii."""
        return show(self, self.largest, 0, self._lines)

    __repr__ = __str__

    def _lines(self) -> str:
        shown = [
            f"  radius {radius:g}: Lip(h) <= {self.lip_h(radius):.4g}, Lip(Dh) <= {self.lip_dh(radius):.4g}"
            for radius in (0.0, 0.1, 1.0)
        ]
        return "\n".join(["Lipschitz constants of a two-layer net on balls around w0, from above", *shown])

    def lip_dh(self, radius: float | Float[Array, "..."]) -> Float[Array, "..."]:
        r"""Bound $\sup\|D^2h\|$ on the ball: $\frac12(s + \sqrt{s^2 + 4 side^2})$, $s = (\max|a_j| + radius) inner$."""
        return join_blocks(self.side, (self.largest + radius) * self.inner)

    def lip_h(self, radius: float | Float[Array, "..."]) -> Float[Array, "..."]:
        r"""Bound $\|Dh(w_0)\| + \int_0^{radius} \ell$ by the trapezoidal rule, $\ell$ the convex function `lip_dh`."""
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
    r"""Bound Lip(h) and Lip(Dh) of a two-layer net on any ball around w0 from above.

    A neuron's $D^2\phi(u, u)_i = 2u_a\sigma'x_i \cdot u_b + a\sigma''(x_i \cdot u_b)^2$ has at most the norm of the
    matrix [[0, side], [side, |a| inner]] of its blocks' norms; the norm of the net's is the largest over its neurons.

    Args:
        f: `two_layer(activation)`, perhaps centered, symmetrized or rescaled.
        w0: Its parameters.
        x: Inputs.
        mean: Whether F's metric has the factor 1/n.
        bounds: $(\sup|\sigma'|, \sup|\sigma''|)$; None for tanh, sigmoid, softplus, erf, sin and cos.
        key: For a Lanczos start; None for a fixed one.

    Returns:
        `TwoLayerLipschitz`, with `lip_h(radius)` and `lip_dh(radius)`. With more than 60 inputs the bound of
        $\|Dh(w_0)\|$ fails with probability 1e-6.

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
        msg = f"f must be a two_layer net, perhaps centered, symmetrized or rescaled, got {type(f).__name__}."
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
        # Compared by identity, since a module of arrays has no hash.
        bounds = next((b for known, b in _ACTIVATION_BOUNDS.items() if known is neurons.activation), None)
    if bounds is None:
        name = getattr(neurons.activation, "__name__", str(neurons.activation))
        msg = (
            f"bounds must be given for the activation {name}: (sup |s'|, sup |s''|) over all reals; a kink (ReLU) has "
            "no second one and is outside the theorems."
        )
        raise ValueError(msg)
    slope, curvature = bounds
    if not (0 < slope < math.inf and 0 < curvature < math.inf):
        msg = f"bounds must be positive and finite, (sup |s'|, sup |s''|), got {tuple(bounds)}; ReLU has none."
        raise ValueError(msg)
    return slope, curvature


class SampledLipschitz(eqx.Module):
    r"""A pair of lower estimates of Lipschitz constants on a ball; made by `sampled_lipschitz_lower`.

    Attributes:
        lip_h_lower: The largest $\|Dh(w)\|$ met.
        lip_dh_lower: The largest $\|D^2h(w)(u, u)\|$ met, u a unit vector.
    """

    lip_h_lower: Float[Array, ""]
    lip_dh_lower: Float[Array, ""]

    def __str__(self) -> str:
        """Show both estimates."""
        return show(
            self,
            self.lip_h_lower,
            0,
            lambda: (
                f"sampled on a ball, lower estimates only: Lip(h) >= {self.lip_h_lower:.4g}, "
                f"Lip(Dh) >= {self.lip_dh_lower:.4g}"
            ),
        )

    __repr__ = __str__


def sampled_lipschitz_lower(
    h: Model,
    loss: Loss | Callable[..., Any],
    w0: Params,
    radius: float,
    *,
    samples: int = 32,
    key: PRNGKeyArray | None = None,
) -> SampledLipschitz:
    r"""Estimate Lip(h) and Lip(Dh) on the ball $|w - w_0| \le radius$ from below: **this proves nothing**.

    The estimates are the largest $\|Dh(w)\|$ and the largest $\|D^2h(w)\|$ found by a search, over w0 and random w
    uniform on the sphere or in the ball. Put into a bound they may make it too small.

    Args:
        h: Model h(w).
        loss: Gives the metric of F.
        w0: Center of the ball.
        radius: Radius of the ball, positive.
        samples: Points next to the center, half of them on the sphere.
        key: For the points and the searches; None for a fixed one.

    Returns:
        `SampledLipschitz`.

    Raises:
        ValueError: radius not positive and finite, `samples` below 1, parameters unfit.

    Source:
        Chizat, Oyallon, Bach (2019), theorems 2.2 and 2.3, whose constants are suprema over a ball.

    Example:
        >>> from lazyjax import square_loss
        >>> found = sampled_lipschitz_lower(lambda w: w**2, square_loss(jnp.zeros(1)), jnp.ones(1), 0.5)
        >>> print(f"{found.lip_h_lower:.3f} {found.lip_dh_lower:.3f}")
        3.000 2.000
    """
    split_params(w0)
    if not (math.isfinite(radius) and radius > 0):
        msg = f"radius must be positive and finite, got {radius}."
        raise ValueError(msg)
    if samples < 1:
        msg = f"samples must be at least 1, got {samples}."
        raise ValueError(msg)
    loss = as_loss(loss)
    key = default_key(key)
    h = without_constant(inputs_as_arguments(h))
    return SampledLipschitz(*_sampled(h, loss, w0, jnp.asarray(radius, float), samples, key))


@eqx.filter_jit
def _sampled(h: Model, loss: Loss, w0: Params, radius: Array, samples: int, key: PRNGKeyArray) -> tuple[Array, Array]:
    coordinates, rest = eqx.partition(w0, eqx.is_inexact_array)
    flat, unravel = jfu.ravel_pytree(coordinates)
    outputs = check_outputs(h, w0).size
    places, lengths, searches = jr.split(key, 3)
    directions = jr.normal(places, (samples, flat.size), flat.dtype)
    uniform = jr.uniform(lengths, (samples,), flat.dtype) ** (1 / flat.size)
    size = (
        radius.astype(flat.dtype)
        * jnp.where(jnp.arange(samples) % 2 == 0, 1, uniform)
        / jnp.linalg.norm(directions, axis=1)
    )
    points = jnp.concatenate([flat[None], flat[None] + size[:, None] * directions])

    def at(item: tuple[Array, PRNGKeyArray]) -> tuple[Array, Array]:
        w, k = eqx.combine(unravel(item[0]), rest), item[1]
        form = SecondDerivative(h, w, loss.weight**0.5)
        largest = singular_values(linearize(h, w), loss, num_matvecs=MATVECS, key=k).largest
        return largest, norm_lower(form, outputs, k, 3, calls=samples + 1)

    first, second = jax.lax.map(at, (points, jr.split(searches, samples + 1)))
    return jnp.max(first), jnp.max(second)


def local_lipschitz(lip_dh: Callable[[float], Any], sigma_min: float) -> float:
    r"""Return the local constant of theorem 2.4: the least L with Dh L-Lipschitz on $B(w_0, \sigma_{min}/(2L))$.

    The ball shrinks as L grows, so L solves $L = \ell(\sigma_{min}/(2L))$, $\ell$ the constant on balls; it is found
    by bisection. With it the theorem needs no constant on all of R^p.

    Args:
        lip_dh: $\ell$, a nondecreasing function of the radius, such as `two_layer_lipschitz(...).lip_dh`. If it is an
            upper bound, so is the result.
        sigma_min: The smallest singular value of Dh(w0), in F's metric.

    Returns:
        L, rounded up: Dh is L-Lipschitz on its ball.

    Raises:
        ValueError: sigma_min not positive and finite; a constant that is negative, NaN or infinite.

    Source:
        Chizat, Oyallon, Bach (2019), supplement, end of B.3.

    Example:
        >>> print(f"{local_lipschitz(lambda radius: 1.0 + radius, 4.0):.6f}")
        2.000000
    """
    if not 0 < sigma_min < math.inf:
        msg = f"sigma_min must be positive and finite, got {sigma_min}; theorem 2.4 needs Dh(w0) to be onto."
        raise ValueError(msg)

    def constant(radius: float) -> float:
        value = float(lip_dh(radius))
        if not 0 <= value < math.inf:
            msg = f"lip_dh must give numbers in [0, inf), got {value} at radius {radius:g}; kinks have no constant."
            raise ValueError(msg)
        return value

    # `high` is a constant on its ball, whose radius is at most 1.
    low, high = constant(0.0), max(constant(1.0), sigma_min / 2)
    for _ in range(80):
        middle = 0.5 * (low + high)
        if not low < middle < high:
            break
        low, high = (low, middle) if constant(sigma_min / (2 * middle)) <= middle else (middle, high)
    return high
