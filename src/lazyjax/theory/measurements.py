r"""What the theorems take and what they bound, measured along one computed flow and its tangent's.

Their proofs use Lip(h) and Lip(Dh) along the flow only, as $\|Dh(w(t))\|$ and $\|Dh(w(t)) - Dh(w_0)\|/|w(t) - w_0|$, so
that a flow certifies its own bounds. Everything is traced; `jax.vmap` over starts, data and alphas goes through.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Float, Int

from lazyjax._core.lanczos import lanczos, lanczos_slack
from lazyjax._core.trees import move, safe_ratio, tree_norm
from lazyjax._core.types import Model, Outputs, Params
from lazyjax.difference.finite_jvp import finite_jvp
from lazyjax.flow.gradient_flow import Flow
from lazyjax.laziness.hessian_norm import second_directional_derivative
from lazyjax.laziness.jacobian_change import differential_change
from lazyjax.losses.loss import Loss
from lazyjax.models.maps import without_constant
from lazyjax.models.tangent import linearize

DENSE_OUTPUTS = 256
"""Outputs up to which all singular values are computed; beyond, only the largest, by Lanczos."""

MATVECS = 40
"""Lanczos steps for a largest singular value; with 1e4 outputs it is then at most 3 % above the Ritz value."""

FAILURE = 1e-6
"""Probability that one of the norms by Lanczos is too small, over the random starts and up to 500 times."""

SEGMENT = 9
"""Points of the segment from w0 to w(t) at which the second derivative is measured, for proposition A.1."""


class Measurements(eqx.Module):
    r"""The numbers at the start, and along the flow with the time axis last; made by `measure`.

    Norms in F are in the loss's metric. NaN stands for what is not known: $\sigma_{min}$ beyond `DENSE_OUTPUTS`
    outputs (with fewer parameters than outputs it is 0), residuals of a loss without a minimizer.

    Attributes:
        time: Flow time since the start.
        alpha: Output scale, finite.
        start_loss: $R(y(0))$.
        start_residual: $D = \|y(0) - y^*\|$.
        start_gradient: $g = \alpha|\nabla F_\alpha(w_0)|$.
        dh_norm, sigma_min: Largest and smallest singular value of Dh(w0), over all outputs.
        sigma_rank, rank: The smallest nonzero singular value of Dh(w0), and how many there are.
        kink_share: Share of the change of Dh over random steps that $D^2h$ does not explain, as in `Kappa`.
        path_dh_norm, path_sigma_min, path_rank: Largest and smallest singular value and rank of Dh(w(t)).
        dh_change_ratio: $\|Dh(w(t)) - Dh(w_0)\|/|w(t) - w_0|$.
        curvature: $\|D^2h(w(t))(v, v)\|$, v the unit vector along w'(t).
        perturbation: $\|(\Sigma(w(t)) - \Sigma(w_0))\nabla R(y(t))\|$.
        gradient: $\|\nabla R(y(t))\|$.
        displacement_norm, output_gap, param_gap: As in `Comparison`.
        residual_norm: $\|y(t) - y^*\|$.
        loss, tangent_loss: $R(y(t))$, $R(\bar y(t))$.
        tangent_displacement_norm: $|\bar w(t) - w_0|$.
        resolution: The error to expect of u and $\bar u$ in norm.
        num_params, num_outputs: p and nk.
        test_gap: The largest $|\alpha f(w, x) - \alpha\bar f(\bar w, x)|$ over other inputs, Euclidean; like all that
            begins with `test_` None if there are no other inputs.
        test_linearization: The largest $|\alpha f(w, x) - \alpha\bar f(w, x)|$ over other inputs, both at w.
        test_dh_norm: The largest $\|D_wf(w_0, x)\|$ over other inputs.
        test_curvature: The largest $\|D_w^2f(w_0 + s(w - w_0), x)(v, v)\|$ over other inputs and s in [0, 1], v along
            w - w0.
    """

    time: Float[Array, " time"]
    alpha: Float[Array, ""]
    start_loss: Float[Array, ""]
    start_residual: Float[Array, ""]
    start_gradient: Float[Array, ""]
    dh_norm: Float[Array, ""]
    sigma_min: Float[Array, ""]
    sigma_rank: Float[Array, ""]
    rank: Int[Array, ""]
    kink_share: Float[Array, ""]
    path_dh_norm: Float[Array, " time"]
    path_sigma_min: Float[Array, " time"]
    path_rank: Int[Array, " time"]
    dh_change_ratio: Float[Array, " time"]
    curvature: Float[Array, " time"]
    perturbation: Float[Array, " time"]
    gradient: Float[Array, " time"]
    displacement_norm: Float[Array, " time"]
    output_gap: Float[Array, " time"]
    param_gap: Float[Array, " time"]
    residual_norm: Float[Array, " time"]
    loss: Float[Array, " time"]
    tangent_loss: Float[Array, " time"]
    tangent_displacement_norm: Float[Array, " time"]
    resolution: Float[Array, ""]
    num_params: int = eqx.field(static=True)
    num_outputs: int = eqx.field(static=True)
    test_gap: Float[Array, " time"] | None = None
    test_linearization: Float[Array, " time"] | None = None
    test_dh_norm: Float[Array, ""] | None = None
    test_curvature: Float[Array, " time"] | None = None

    @property
    def lip_h(self) -> Float[Array, " time"]:
        r"""The largest $\|Dh(w)\|$ met up to each time."""
        return jax.lax.cummax(self.path_dh_norm, axis=0)

    @property
    def lip_dh(self) -> Float[Array, " time"]:
        r"""The largest $\|Dh(w) - Dh(w_0)\|/|w - w_0|$ met up to each time."""
        return jax.lax.cummax(self.dh_change_ratio, axis=0)


def measure(
    h: Model,
    loss: Loss,
    w0: Params,
    flows: tuple[Flow, Flow],
    test_model: Model | None = None,
    *,
    tolerance: tuple[float, float],
    kink_share: Float[Array, ""],
) -> Measurements:
    """Measure everything that the theorems need.

    Args:
        h: Model h(w).
        loss: R on outputs.
        w0: Start of both flows.
        flows: The flow of the model and that of its tangent model, with outputs and displacements, at a finite alpha.
        test_model: The model on other inputs.
        tolerance: (rtol, atol) of the flows.
        kink_share: From `measure_kinks`; 0 for a model that is known to be smooth.
    """
    flow, tangent_flow = flows
    h, eps = without_constant(h), 1 / flow.alpha
    u, outputs, tangent_outputs = flow.displacement, flow.outputs, tangent_flow.outputs
    start = outputs[0]
    minimizer = jnp.full_like(start, jnp.nan) if loss.minimizer is None else loss.minimizer.astype(start.dtype)
    at_start = _singular_values(h, loss, w0)
    norm, residual = jax.vmap(loss.norm), jax.vmap(lambda y: loss.norm(y - minimizer))
    pulled = linearize(h, w0).vjp(loss.cotangent(start))
    path = jax.lax.map(lambda item: _at(h, loss, w0, item, eps), (u, outputs))
    gap = jtu.tree_map(jnp.subtract, u, tangent_flow.displacement)
    size = jax.vmap(tree_norm)(u)
    return Measurements(
        time=flow.ts - flow.ts[0],
        alpha=flow.alpha,
        start_loss=flow.loss[0],
        start_residual=loss.norm(start - minimizer),
        start_gradient=tree_norm(pulled),
        kink_share=kink_share,
        **at_start,
        **path,
        gradient=norm(jax.vmap(loss.gradient)(outputs)),
        displacement_norm=eps * size,
        output_gap=norm(outputs - tangent_outputs),
        param_gap=eps * jax.vmap(tree_norm)(gap),
        residual_norm=residual(outputs),
        loss=flow.loss,
        tangent_loss=tangent_flow.loss,
        tangent_displacement_norm=eps * jax.vmap(tree_norm)(tangent_flow.displacement),
        resolution=10 * (max(tolerance[0], 32 * float(jnp.finfo(start.dtype).eps)) * jnp.max(size) + tolerance[1]),
        num_params=sum(leaf.size for leaf in jtu.tree_leaves(eqx.filter(w0, eqx.is_inexact_array))),
        num_outputs=start.size,
        **({} if test_model is None else _on_test(without_constant(test_model), w0, u, tangent_flow.displacement, eps)),
    )


def _on_test(f: Model, w0: Params, u: Params, tangent_u: Params, eps: Array) -> dict[str, Array]:
    """Return what proposition A.1 takes and bounds, the largest over the samples, each in its Euclidean norm."""
    coordinates, rest = eqx.partition(w0, eqx.is_inexact_array)
    tangent = linearize(f, w0)
    samples = tangent.outputs.shape[0]

    def model(c: Params) -> Outputs:
        return f(eqx.combine(c, rest))

    def largest(y: Outputs) -> Array:
        return jnp.max(jnp.linalg.norm(y.reshape(samples, -1), axis=1))

    def at(item: tuple[Params, Params]) -> tuple[Array, Array, Array]:
        moved, other = item
        size = tree_norm(moved)
        unit = jtu.tree_map(lambda leaf: leaf / jnp.where(size > 0, size, 1).astype(leaf.dtype), moved)
        shares = jnp.linspace(0, 1, SEGMENT, dtype=size.dtype)
        seconds = jax.lax.map(
            lambda s: largest(second_directional_derivative(model, move(coordinates, s * eps, moved), unit)), shares
        )
        change = finite_jvp(model, coordinates, moved, eps)
        return largest(change - tangent.jvp(other)), largest(change - tangent.jvp(moved)), jnp.max(seconds)

    gap, linearization, curvature = jax.lax.map(at, (u, tangent_u))
    rows = jax.jacrev(model)(coordinates)
    leaves = zip(jtu.tree_leaves(rows), jtu.tree_leaves(coordinates), strict=True)
    flat = jnp.concatenate([leaf.reshape(samples, -1, w.size) for leaf, w in leaves], axis=2)
    dh_norm = jnp.max(jnp.linalg.eigvalsh(jnp.einsum("nkp,nlp->nkl", flat, flat))[:, -1])
    return {
        "test_gap": gap,
        "test_linearization": linearization,
        "test_dh_norm": jnp.sqrt(jnp.maximum(dh_norm, 0)),
        "test_curvature": curvature,
    }


def _at(h: Model, loss: Loss, w0: Params, state: tuple[Params, Outputs], eps: Array) -> dict[str, Array]:
    """Return what is measured at one time, from the displacement and the outputs there."""
    u, y = state
    coordinates, rest = eqx.partition(w0, eqx.is_inexact_array)
    moved = move(coordinates, eps, u)
    here = _singular_values(h, loss, eqx.combine(moved, rest))
    tangent, now = linearize(h, w0), linearize(h, eqx.combine(moved, rest))
    change, transpose = differential_change(h, w0, u, eps)
    weight, size = jnp.asarray(loss.weight, y.dtype), tree_norm(u)
    largest = _largest(lambda r: weight * change(transpose(r.reshape(y.shape))).ravel(), y.size, y.dtype)
    # Sigma(w) - Sigma(w0) = eps (E J_w^T + J_0 E^T), of the size of eps and without cancellation.
    r = loss.cotangent(y)
    turned = change(now.vjp(r)) + tangent.jvp(transpose(r))
    velocity = now.vjp(r)
    speed = tree_norm(velocity)
    unit = jtu.tree_map(lambda leaf: leaf / jnp.where(speed > 0, speed, 1).astype(leaf.dtype), velocity)
    second = second_directional_derivative(lambda c: h(eqx.combine(c, rest)), moved, unit)
    return {
        "path_dh_norm": here["dh_norm"],
        "path_sigma_min": here["sigma_min"],
        "path_rank": here["rank"],
        "dh_change_ratio": safe_ratio(largest, size),
        "curvature": loss.norm(second),
        "perturbation": eps * loss.norm(turned),
    }


def _singular_values(h: Model, loss: Loss, w: Params) -> dict[str, Array]:
    """Return the extreme singular values of Dh(w) in F's metric, and its rank."""
    tangent = linearize(h, w)
    out = tangent.outputs
    weight = jnp.asarray(loss.weight, out.dtype)

    def product(r: Array) -> Array:
        return weight * tangent.jvp(tangent.vjp(r.reshape(out.shape))).ravel()

    num_params = sum(leaf.size for leaf in jtu.tree_leaves(eqx.filter(w, eqx.is_inexact_array)))
    unknown = jnp.full((), jnp.nan, out.dtype)
    if out.size > DENSE_OUTPUTS:
        smallest = jnp.zeros_like(unknown) if num_params < out.size else unknown
        largest = _largest(product, out.size, out.dtype)
        return {"dh_norm": largest, "sigma_min": smallest, "sigma_rank": unknown, "rank": jnp.asarray(-1)}
    values = jnp.linalg.eigvalsh(_matrix(product, out.size, out.dtype))
    rounding = 10 * out.size * jnp.finfo(out.dtype).eps * values[-1]
    nonzero = values > rounding
    return {
        "dh_norm": jnp.sqrt(jnp.maximum(values[-1], 0)),
        "sigma_min": jnp.where(nonzero[0], jnp.sqrt(jnp.maximum(values[0] - rounding, 0)), 0),
        "sigma_rank": jnp.sqrt(jnp.maximum(jnp.min(jnp.where(nonzero, values, jnp.inf)) - rounding, 0)),
        "rank": jnp.sum(nonzero),
    }


def _largest(product: Any, size: int, dtype: Any) -> Array:
    """Return the root of the largest eigenvalue, from above."""
    if size <= DENSE_OUTPUTS:
        return jnp.sqrt(jnp.maximum(jnp.linalg.eigvalsh(_matrix(product, size, dtype))[-1], 0))
    theta = lanczos(product, size, MATVECS, dtype=dtype)[0][-1]
    return jnp.sqrt(lanczos_slack(size, MATVECS, FAILURE / 1000) * jnp.maximum(theta, 0))


def _matrix(product: Any, size: int, dtype: Any) -> Array:
    columns = jax.lax.map(product, jnp.eye(size, dtype=dtype), batch_size=min(size, 32))
    return 0.5 * (columns + columns.T)
