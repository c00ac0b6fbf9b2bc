r"""The change of the differential along a flow, $E = [Dh(w_0 + \varepsilon u) - Dh(w_0)]/\varepsilon$.

Without cancellation: in displacement coordinates E is O(1) at every alpha, and $D^2h(w_0)(u, \cdot)$ at
$\varepsilon = 0$.
"""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Float, PRNGKeyArray

from lazyjax._core.checks import check_outputs
from lazyjax._core.forward import jvp
from lazyjax._core.lanczos import lanczos
from lazyjax._core.trees import tree_norm
from lazyjax._core.types import Model, Outputs, Params
from lazyjax.difference.finite_jvp import finite_jvp
from lazyjax.losses.loss import Loss


def differential_change(
    h: Model, w0: Params, u: Params, eps: Float[Array, ""]
) -> tuple[Callable[[Params], Outputs], Callable[[Outputs], Params]]:
    """Return the products v -> E v and r -> E^T r (plain transpose) with the change of Dh to w0 + eps u, over eps."""
    coordinates, rest = eqx.partition(w0, eqx.is_inexact_array)

    def difference(v: Params) -> Outputs:
        def product(c: Params) -> Outputs:
            return jvp(lambda w: h(eqx.combine(w, rest)), (c,), (v,))[1]

        return finite_jvp(product, coordinates, u, eps)

    _, transpose = jax.vjp(difference, jtu.tree_map(jnp.zeros_like, coordinates))
    return difference, lambda r: transpose(r)[0]


def relative_change(
    h: Model,
    loss: Loss,
    w0: Params,
    u: Params,
    eps: Float[Array, ""],
    *,
    num_matvecs: int,
    key: PRNGKeyArray | None,
) -> Float[Array, ""]:
    r"""Return $\|Dh(w_0 + \varepsilon u) - Dh(w_0)\|/|\varepsilon u|$ in F's metric, by Lanczos from below.

    It is 0 for u = 0. At eps = 0 it is the limit, $\|D^2h(w_0)(u, \cdot)\|/|u|$.
    """
    out = check_outputs(h, w0)
    length = tree_norm(u)
    # At unit length no square of E underflows.
    unit = jtu.tree_map(lambda leaf: leaf / jnp.where(length == 0, 1, length).astype(leaf.dtype), u)
    difference, transpose = differential_change(h, w0, unit, eps * length.astype(eps.dtype))
    weight = jnp.asarray(loss.weight, out.dtype)
    theta, _, _ = lanczos(
        lambda r: weight * difference(transpose(r.reshape(out.shape))).ravel(),
        out.size,
        num_matvecs,
        dtype=out.dtype,
        key=key,
    )
    return jnp.where(length == 0, 0, jnp.sqrt(jnp.maximum(theta[-1], 0)))
