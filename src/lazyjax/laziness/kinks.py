r"""Whether a model is smooth near w0, seen by numbers: the change of Dh over a step against the integral of $D^2h$.

Along $w_0 + su$ the two agree for a smooth model, $[Dh(w_0 + u) - Dh(w_0)]u = \int_0^1 D^2h(w_0 + su)(u, u)\,ds$. A
kink (of ReLU, say) jumps in Dh and is no part of $D^2h$, which is zero or something smaller between the kinks. Reading
the program instead would also find the maximum in a stable logarithm of sums, which is smooth.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from lazyjax.laziness.hessian_norm import SecondDerivative, bend

STEP = 0.3
"""Length of a step over that of w0: many units cross a kink."""

PANELS = 12
"""Of the integral, each with four nodes: enough for activations that bend over a fiftieth of the step."""

PROBES = 2


@eqx.filter_jit
def measure_kinks(
    form: SecondDerivative, key: PRNGKeyArray
) -> tuple[Float[Array, ""], Float[Array, ""], Bool[Array, ""]]:
    r"""The share of the change of Dh that $D^2h$ does not explain; the change over |u|^2; is $D^2h(w_0)$ finite?

    The largest over random steps. The second is a finite curvature, $\|[Dh(w_0 + u) - Dh(w_0)]u\|_F/|u|^2$, kinks
    included.
    """
    point = form.point()
    nodes, weights = np.polynomial.legendre.leggauss(4)
    # The start first, with no weight: whether D^2h is finite there.
    places = np.append(0, (np.arange(PANELS)[:, None] + 0.5 + 0.5 * nodes).ravel() / PANELS)
    shares = np.append(0, np.tile(0.5 * weights / PANELS, PANELS))
    size = jnp.linalg.norm(point)
    length = STEP * jnp.where(size > 0, size, 1)

    def probe(k: PRNGKeyArray) -> tuple[Array, Array, Array]:
        direction = jr.normal(k, point.shape, point.dtype)
        u = length * direction / jnp.linalg.norm(direction)
        ends = jnp.stack([point, point + u])
        before, after = jax.lax.map(lambda at: jax.jvp(form.model, (at,), (u,))[1], ends)

        def add(total: Array, node: tuple[Array, Array]) -> tuple[Array, Array]:
            bent = bend(form.model, point + node[0] * u, u)
            return total + jnp.where(node[1] > 0, node[1] * bent, 0), jnp.all(jnp.isfinite(bent))

        rule = (jnp.asarray(places, u.dtype), jnp.asarray(shares, u.dtype))
        integral, finite = jax.lax.scan(add, jnp.zeros_like(before), rule)
        change = after - before
        rounding = 1e3 * jnp.finfo(u.dtype).eps * jnp.maximum(jnp.linalg.norm(before), jnp.linalg.norm(after))
        norm, rest = jnp.linalg.norm(change), jnp.linalg.norm(change - integral)
        share = jnp.where(norm > rounding, rest / jnp.where(norm > rounding, norm, 1), 0)
        return share, jnp.where(norm > rounding, norm, 0) / length**2, finite[0]

    share, slope, finite = jax.lax.map(probe, jr.split(key, PROBES))
    return jnp.max(share), jnp.max(slope), jnp.all(finite)
