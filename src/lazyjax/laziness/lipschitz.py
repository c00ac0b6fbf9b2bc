r"""Lipschitz constants of h and Dh: what the theorems of `lazyjax.bounds` take.

- Along a computed flow (`lipschitz_along`): the proofs use no more.
- On a ball, for two-layer nets with a smooth activation, in closed form (`two_layer_lipschitz`): upper bounds.
- On a ball, sampled, for any model (`sampled_lipschitz_lower`): lower estimates, which prove nothing.
- The local constant of theorem 2.4 from constants on balls (`local_lipschitz`).

Norms in F are in the metric of the loss, norms of parameters are Euclidean.
"""

import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.flatten_util as jfu
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Key, PRNGKeyArray

from lazyjax._core.checks import check_outputs, split_params
from lazyjax._core.keys import default_key
from lazyjax._core.lanczos import lanczos_slack
from lazyjax._core.trees import move
from lazyjax._core.types import Model, Params
from lazyjax.flow.gradient_flow import Flow
from lazyjax.laziness.hessian_norm import SecondDerivative, norm_lower
from lazyjax.laziness.jacobian_change import change_quotient
from lazyjax.laziness.second_derivative import FAILURE, MATVECS
from lazyjax.losses.losses import Loss
from lazyjax.losses.user_loss import as_loss
from lazyjax.models.maps import without_constant
from lazyjax.models.tangent import linearize, singular_values


class PathLipschitz(eqx.Module):
    r"""Lipschitz constants along a flow; made by `lipschitz_along`.

    Attributes:
        lip_h: $\max_t\|Dh(w(t))\|$.
        lip_dh: $\max_t\|Dh(w(t)) - Dh(w_0)\|/|w(t) - w_0|$.
        dh_norm: $\|Dh(w(t))\|$, (time,).
        quotient: $\|Dh(w(t)) - Dh(w_0)\|/|w(t) - w_0|$, (time,); 0 where w has not moved.
        failure: Probability, over the random starts, that one of them is too small.
    """

    lip_h: Float[Array, ""]
    lip_dh: Float[Array, ""]
    dh_norm: Float[Array, " time"]
    quotient: Float[Array, " time"]
    failure: float = eqx.field(static=True)


def lipschitz_along(
    h: Model, loss: Loss | Callable[..., Any], w0: Params, flow: Flow, *, key: PRNGKeyArray | None = None
) -> PathLipschitz:
    r"""$\sup_t\|Dh(w(t))\|$ and $\sup_t\|Dh(w(t)) - Dh(w_0)\|/|w(t) - w_0|$ over the times of a computed flow.

    The proofs of theorems 2.2 to 2.4 use Lip(h) and Lip(Dh) nowhere else, so that with these a flow certifies its own
    bounds, at any alpha, in float32. Each norm is a Ritz value times what it may lack, hence from above. What lies
    between the times is not seen: save enough of them.

    Args:
        h: Model h(w).
        loss: Gives the metric of F.
        w0: Start of the flow.
        flow: From `gradient_flow` with `save=("displacement", ...)`; at alpha = inf the quotient is its limit,
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
    loss = as_loss(loss)
    count = flow.ts.shape[0]
    slack, failure = path_slack(check_outputs(h, w0).size, count)
    keys = jr.split(default_key(key), count)
    found = path_constants(h, loss, w0, flow.displacement, 1 / flow.alpha, keys)
    dh_norm, quotient = (slack * norms for norms in found)
    return PathLipschitz(jnp.max(dh_norm), jnp.max(quotient), dh_norm, quotient, failure)


@eqx.filter_jit
def path_constants(
    h: Model,
    loss: Loss,
    w0: Params,
    displacements: Params,
    eps: Float[Array, ""],
    keys: Key[Array, " time"],
) -> tuple[Float[Array, " time"], Float[Array, " time"]]:
    r"""$\|Dh(w_0 + \varepsilon u)\|$ and $\|Dh(w_0 + \varepsilon u) - Dh(w_0)\|/|\varepsilon u|$ for each displacement.

    Ritz values, from below: times `path_slack` they are from above. One key a displacement. Under jit and vmap too.
    """
    h = without_constant(h)
    coordinates, rest = eqx.partition(w0, eqx.is_inexact_array)

    def at(item: tuple[Params, PRNGKeyArray]) -> tuple[Array, Array]:
        u, key = item
        tangent = linearize(h, eqx.combine(move(coordinates, eps, u), rest))
        largest = singular_values(tangent, loss, num_matvecs=MATVECS, key=key).largest
        return largest, change_quotient(h, loss, w0, u, eps, num_matvecs=MATVECS, key=key)

    return jax.lax.map(at, (displacements, keys))


def path_slack(outputs: int, count: int) -> tuple[float, float]:
    """What the norms of `path_constants` at so many times may lack, as a factor, and the probability that they do."""
    failure = 0.0 if outputs <= MATVECS else FAILURE
    return lanczos_slack(outputs, MATVECS, FAILURE / (2 * count)) ** 0.5, failure


class SampledLipschitz(eqx.Module):
    r"""Lower estimates of Lipschitz constants on a ball; made by `sampled_lipschitz_lower`.

    Attributes:
        lip_h_lower: The largest $\|Dh(w)\|$ met.
        lip_dh_lower: The largest $\|D^2h(w)(u, u)\|$ met, u a unit vector.
    """

    lip_h_lower: Float[Array, ""]
    lip_dh_lower: Float[Array, ""]


def sampled_lipschitz_lower(
    h: Model,
    loss: Loss | Callable[..., Any],
    w0: Params,
    radius: float,
    *,
    samples: int = 32,
    key: PRNGKeyArray | None = None,
) -> SampledLipschitz:
    r"""Lower estimates of Lip(h) and Lip(Dh) on the ball $|w - w_0| \le radius$: **they prove nothing**.

    The largest of $\|Dh(w)\|$ and of the search for $\|D^2h(w)\|$, over w0 and random w uniform on the sphere or in
    the ball. Put into a bound they may make it too small.

    Args:
        h: Model h(w).
        loss: Gives the metric of F.
        w0: Centre.
        radius: Of the ball, positive.
        samples: Points beside the center, half of them on the sphere.
        key: For the points; None for a fixed one.

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
    return SampledLipschitz(*_sampled(without_constant(h), loss, w0, radius, samples, key))


@eqx.filter_jit
def _sampled(h: Model, loss: Loss, w0: Params, radius: float, samples: int, key: PRNGKeyArray) -> tuple[Array, Array]:
    coordinates, rest = eqx.partition(w0, eqx.is_inexact_array)
    flat, unravel = jfu.ravel_pytree(coordinates)
    outputs = check_outputs(h, w0).size
    places, lengths, searches = jr.split(key, 3)
    directions = jr.normal(places, (samples, flat.size), flat.dtype)
    uniform = jr.uniform(lengths, (samples,), flat.dtype) ** (1 / flat.size)
    size = radius * jnp.where(jnp.arange(samples) % 2 == 0, 1, uniform) / jnp.linalg.norm(directions, axis=1)
    points = jnp.concatenate([flat[None], flat[None] + size[:, None] * directions])

    def at(item: tuple[Array, PRNGKeyArray]) -> tuple[Array, Array]:
        w, k = eqx.combine(unravel(item[0]), rest), item[1]
        form = SecondDerivative(h, w, loss.weight**0.5)
        largest = singular_values(linearize(h, w), loss, num_matvecs=MATVECS, key=k).largest
        return largest, norm_lower(form, outputs, k, 3, calls=samples + 1)

    first, second = jax.lax.map(at, (points, jr.split(searches, samples + 1)))
    return jnp.max(first), jnp.max(second)


def local_lipschitz(lip_dh: Callable[[float], Any], sigma_min: float) -> float:
    r"""The local constant of theorem 2.4, $\inf\{L > 0: Dh \text{ is L-Lipschitz on } B(w_0, \sigma_{min}/(2L))\}$.

    The ball shrinks as L grows, so it is where $L = \ell(\sigma_{min}/(2L))$, $\ell$ the constant on balls: found by
    bisection. With it the theorem needs no constant on all of R^p.

    Args:
        lip_dh: $\ell$: radius to the constant on that ball, not falling; `two_layer_lipschitz(...).lip_dh`, say. With
            one that is an upper bound the result is, too.
        sigma_min: Smallest singular value of Dh(w0), in F's metric.

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

    # On the ball of radius at most 1 that belongs to it, `high` is enough.
    low, high = constant(0.0), max(constant(1.0), sigma_min / 2)
    for _ in range(80):
        middle = 0.5 * (low + high)
        if not low < middle < high:
            break
        low, high = (low, middle) if constant(sigma_min / (2 * middle)) <= middle else (middle, high)
    return high
