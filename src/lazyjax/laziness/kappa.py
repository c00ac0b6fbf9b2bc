r"""The criterion $\kappa$: how fast the differential of a model changes, relative to how far its outputs have to go.

Norms in F are in the metric of the square loss (see `lazyjax.losses`), norms of parameters are Euclidean. $\kappa$
itself does not depend on a factor in F's metric.

**Kinks.** $\kappa$ sees $D^2h(w_0)$, which says nothing about a model with kinks (ReLU). Whether a model has some near
w0 is measured: along $w_0 + su$ a smooth model has $[Dh(w_0 + u) - Dh(w_0)]u = \int_0^1 D^2h(w_0 + su)(u, u)\,ds$. A
kink is a jump of Dh and no part of $D^2h$, which is zero or something smaller between the kinks. (Reading the program
instead would also find the maximum in a stable logarithm of sums, which is smooth.)
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Bool, Float, PRNGKeyArray, Real

from lazyjax._core.checks import check_alpha, check_outputs, is_concrete
from lazyjax._core.forward import jvp
from lazyjax._core.keys import default_key
from lazyjax._core.lanczos import lanczos_slack
from lazyjax._core.trees import safe_ratio, tree_norm
from lazyjax._core.types import Model, Outputs, Params, RealScalar
from lazyjax.flow.start import check_start
from lazyjax.laziness.hessian_norm import SecondDerivative, check_starts, second_directional_derivative
from lazyjax.laziness.sample_hessians import inputs_as_arguments, show_inputs
from lazyjax.laziness.second_derivative import FAILURE, MATVECS, bracket
from lazyjax.laziness.two_layer import find_neurons, neuron_bracket
from lazyjax.losses.loss import Loss, as_loss
from lazyjax.losses.square import SquareLoss
from lazyjax.models.tangent import linearize, singular_values

KINKED = 0.05
"""A model has kinks if $D^2h$ fails to explain a larger share of the change of Dh."""

KINK_STEP = 0.3
"""Length of a step that looks for kinks, relative to that of w0: many units cross a kink."""

KINK_PANELS = 12
"""Panels of the integral over a step, each with four nodes: enough for kinks rounded over a fiftieth of it."""

KINK_PROBES = 2
"""Random steps that look for kinks."""


class Kappa(eqx.Module):
    r"""The criterion $\kappa_{\alpha h}(w_0)$ and what it is made of; made by `kappa`. Print it.

    Attributes:
        value: $\kappa$ with the lower norm of $D^2h$: far below 1 suggests lazy training, see `lazy_ratio`.
        lower: $\kappa$ with the lower norm of $D^2h$ and the upper one of Dh.
        upper: $\kappa$ with the upper norm of $D^2h$.
        residual_norm: $\|\alpha h(w_0) - y^*\|_F$.
        dh_norm: $\|Dh(w_0)\|$, by Lanczos from below.
        dh_norm_upper: $\|Dh(w_0)\|$ from above.
        d2h_norm_lower: $\|D^2h(w_0)\|$ from below: the largest value met in a search, attained at a unit vector.
        d2h_norm_upper: $\|D^2h(w_0)\|$ from above, certified.
        alignment: $\|Dh(w_0)^*r\|/(\|Dh(w_0)\|\|r\|)$ of the residual r, in [0, 1].
        lazy_ratio: $\kappa/(2 \cdot alignment)$, the ratio of relative changes of Dh and F that a small gradient step
            makes: **this one** has to be far below 1, since $\kappa$ is also small if the residual avoids the
            leading directions of Dh. It agrees with `lazyjax.laziness.lazy_ratio`; inf at a stationary point.
        kink_share: Share of the change of Dh over random steps of 0.3 |w0| that $D^2h$ does not explain.
        finite_curvature: $\|[Dh(w_0 + u) - Dh(w_0)]u\|_F/|u|^2$, the largest over these steps, kinks included.
        failure: Probability, over the random starts, that `upper`, `lower` or one of the upper norms does not hold (all
            hold up to rounding only); 0 if no chance is involved.
        how: How d2h_norm_upper was found, in words.
        initial: $h(w_0)$.
        target: $y^*$.
        weight: Weight of F's metric.
    """

    value: Float[Array, ""]
    lower: Float[Array, ""]
    upper: Float[Array, ""]
    residual_norm: Float[Array, ""]
    dh_norm: Float[Array, ""]
    dh_norm_upper: Float[Array, ""]
    d2h_norm_lower: Float[Array, ""]
    d2h_norm_upper: Float[Array, ""]
    alignment: Float[Array, ""]
    lazy_ratio: Float[Array, ""]
    kink_share: Float[Array, ""]
    finite_curvature: Float[Array, ""]
    failure: float = eqx.field(static=True)
    how: str = eqx.field(static=True)
    initial: Outputs
    target: Outputs
    weight: float = eqx.field(static=True)

    @property
    def curvature(self) -> str:
        """The kind of model, in words.

        "smooth"; "affine" (Dh does not change); "kinked" (as ReLU nets: $D^2h$ sees only what lies between kinks, and
        the theory, which asks for a Lipschitz Dh, says nothing); "none almost everywhere" (kinked, and $D^2h$ is zero:
        a value of 0 then means nothing). Values must be known, so not inside a jit.
        """
        bent = float(self.d2h_norm_lower) > 1e3 * jnp.finfo(self.value.dtype).eps * float(self.dh_norm)
        if float(self.kink_share) > KINKED:
            return "kinked" if bent else "none almost everywhere"
        return "smooth" if bent or float(self.finite_curvature) > 0 else "affine"

    def scaled(self, alpha: RealScalar | Real[np.ndarray, "..."]) -> Float[Array, "..."]:
        r"""Return $\kappa_{\alpha h}(w_0) = \|h(w_0) - y^*/\alpha\|_F\|D^2h\|/\|Dh\|^2$ at other scales.

        Its shape is that of alpha. For an h homogeneous of degree q it is also the
        $\kappa_h(\lambda w_0)$ of a larger start, with $\alpha = \lambda^q$. It falls as 1/alpha only if h(w0) = 0,
        else to a limit.
        """
        return _kappa_at(jnp.asarray(alpha, self.value.dtype), self)

    def __str__(self) -> str:
        """Show the value in its bracket, what it is made of, and what it can and cannot say."""
        if not is_concrete(eqx.filter(self, eqx.is_array)):
            return f"kappa of {self.initial.shape} outputs, traced: no values yet ({self.how})"
        kind, sure = self.curvature, "" if self.failure == 0 else f", except with probability {self.failure:.0e}"
        lines = [
            f"kappa = {self.value:.3g}, certified within [{self.lower:.3g}, {self.upper:.3g}]{sure}",
            f"  ||alpha h(w0) - y*|| = {self.residual_norm:.3g}, ||Dh(w0)|| = {self.dh_norm:.3g}, "
            f"||D2h(w0)|| in [{self.d2h_norm_lower:.3g}, {self.d2h_norm_upper:.3g}] ({self.how})",
            f"  lazy_ratio = {self.lazy_ratio:.3g} (alignment of the residual with Dh: {self.alignment:.3g})",
        ]
        if kind in ("kinked", "none almost everywhere"):
            lines[0] = lines[0].replace("kappa", "OUTSIDE THE THEORY (h has kinks). Between kinks, kappa", 1)
            lines.append(
                f"  D2h explains {100 * max(0.0, 1 - float(self.kink_share)):.0f}% of the change of Dh over steps of "
                f"0.3 |w0|, which is {self.finite_curvature:.3g} |u|^2 along u; nothing here shows that h is lazy. "
                "lazyjax.laziness.step_criterion measures a gradient step, kinks included."
            )
        elif kind == "affine":
            lines.append("  h is its own tangent model, as far as steps of 0.3 |w0| can tell.")
        return "\n".join(lines)

    __repr__ = __str__


@eqx.filter_jit
def _kappa_at(alpha: Array, found: Kappa) -> Array:
    eps, root = 1 / alpha, jnp.asarray(found.weight**0.5, alpha.dtype)
    norms = jax.vmap(lambda e: root * jnp.linalg.norm(found.initial - e * found.target))(eps.ravel())
    return norms.reshape(eps.shape) * found.d2h_norm_lower / found.dh_norm**2


def kappa(
    h: Model,
    loss: Loss | Callable[[Outputs], RealScalar],
    w0: Params,
    *,
    alpha: RealScalar = 1.0,
    starts: int = 10,
    key: PRNGKeyArray | None = None,
) -> Kappa:
    r"""Bracket $\kappa_{\alpha h}(w_0) = \frac1\alpha\|\alpha h(w_0) - y^*\|_F\,\|D^2h(w_0)\|/\|Dh(w_0)\|^2$.

    $\kappa \ll 1$ was proposed as the sign of lazy training with the square loss. It is not sufficient: see
    `Kappa.lazy_ratio`, never below $\kappa/2$.

    $\|D^2h\|$ is the norm of a bilinear map, hard to compute, so both bounds are given. All Hessians are formed for
    small models, those of one neuron for a `two_layer` net. For larger models the bound from above takes unfoldings by
    Lanczos: cheap (each product takes a few passes over the batch) if h shows its inputs, as `on_data(f, x)` does,
    centered or not, and a closure does not. A closure with many outputs and parameters has a much wider bracket;
    `Kappa.how` says what was done.

    Args:
        h: Model h(w) with outputs (n,) or (n, k).
        loss: `square_loss(target)`, which gives the target $y^*$ and F's metric (the norms depend on the metric, kappa
            does not).
        w0: Start; any pytree.
        alpha: Output scale in (0, inf]; inf needs h(w0) = 0.
        starts: Random starts of the search from below; one alone often misses the maximum.
        key: For all random starts; None for a fixed one.

    Returns:
        `Kappa`.

    Raises:
        TypeError: a loss other than the square loss; arguments unfit as for `gradient_flow`.
        ValueError: as `gradient_flow`; `starts` below 1; half precision; Dh(w0) = 0; D^2h(w0) not finite.

    Source:
        Chizat, Oyallon, Bach (2019), equation (1) and section 1.2; supplement A.2 for two-layer nets.

    Example:
        >>> from lazyjax import square_loss
        >>> print(f"{kappa(lambda w: w + w**2, square_loss(jnp.ones(1)), jnp.zeros(1)).value:.3f}")
        2.000
    """
    check_alpha(alpha)
    check_starts(starts)
    loss = _as_square_loss(loss)
    # Inputs become arguments of the compiled programs.
    h = inputs_as_arguments(h)
    zero_start = check_start(h, loss, w0, alpha, rtol=1e-6)
    out = check_outputs(h, w0)
    scale = jnp.asarray(alpha, out.dtype)
    _check_precision(SecondDerivative(h, w0, 1.0).dtype, out.dtype)
    start = _measure_start(h, loss, w0, scale, default_key(key), zero_start)
    _check_derivatives(start["dh_norm"], start["finite"])
    # All else is in the derivatives, which a constant does not change.
    h, size = show_inputs(h), loss.minimizer.size
    neurons = find_neurons(h, w0)
    found = None if neurons is None else neuron_bracket(neurons, loss.weight, start["key"], starts)
    if found is None:
        found = bracket(h, w0, loss.weight, size, start["key"], starts)
    return Kappa(
        **_assemble(loss, scale, start, found.lower, found.upper),
        failure=found.failure + (FAILURE if size > MATVECS else 0.0),
        how=found.how,
        weight=loss.weight,
    )


def _as_square_loss(loss: Any) -> SquareLoss:
    loss = as_loss(loss)
    if not isinstance(loss, SquareLoss):
        msg = (
            f"loss must be a square loss, got {type(loss).__name__}: kappa compares outputs with a target; use "
            "square_loss(target), or lazyjax.laziness.lazy_ratio, which takes any loss."
        )
        raise TypeError(msg)
    return loss


def _check_precision(*dtypes: jnp.dtype) -> None:
    for dtype in dtypes:
        if jnp.finfo(dtype).bits < 32:
            msg = (
                f"w0 and h(w0) must be float32 or float64, got {dtype}, which has too few digits for eigenvalues; cast "
                "the parameters and inputs with `.astype(jnp.float32)`."
            )
            raise ValueError(msg)


def _check_derivatives(dh_norm: Array, finite: Array) -> None:
    if is_concrete(finite) and not bool(finite):
        msg = "h must be twice differentiable at w0, but D^2h(w0) has entries that are NaN or infinite; move w0."
        raise ValueError(msg)
    if is_concrete(dh_norm) and not float(dh_norm) > 0:
        msg = (
            f"h must depend on w0 to first order, but the square of |Dh(w0)| is 0 in {dh_norm.dtype}, and kappa "
            "divides by it; start from another w0, or rescale h and the target if they are tiny."
        )
        raise ValueError(msg)


@eqx.filter_jit
def _measure_start(
    h: Model, loss: SquareLoss, w0: Params, alpha: Float[Array, ""], key: PRNGKeyArray, zero_start: bool
) -> dict[str, Array]:
    r"""Return all that is known before $\|D^2h\|$, and the key for the search of that."""
    first, second, third = jr.split(key, 3)
    out = check_outputs(h, w0)
    initial = jnp.zeros(out.shape, out.dtype) if zero_start else h(w0)
    h = show_inputs(h)
    kink_share, finite_curvature, finite = measure_kinks(SecondDerivative(h, w0, loss.weight**0.5), first)
    tangent = linearize(h, w0)
    dh_norm = singular_values(tangent, loss, num_matvecs=MATVECS, key=third).largest
    target, eps = loss.minimizer.astype(initial.dtype), 1 / alpha
    residual = initial - eps * target
    # At alpha = inf with a zero start the direction of the residual is that of the target.
    direction = jnp.where(eps > 0, residual / jnp.where(eps > 0, eps, 1), -target)
    pulled = loss.weight * tree_norm(tangent.vjp(direction))
    return {
        "initial": initial,
        "target": target,
        "dh_norm": dh_norm,
        "scaled_residual": loss.norm(residual),
        "alignment": safe_ratio(pulled, loss.norm(direction)) / dh_norm,
        "kink_share": kink_share,
        "finite_curvature": finite_curvature,
        "finite": finite,
        "key": second,
    }


@eqx.filter_jit
def _assemble(
    loss: SquareLoss, alpha: Float[Array, ""], start: dict[str, Array], d2h_lower: Array, d2h_upper: Array
) -> dict[str, Array]:
    """Return the arrays of `Kappa` by name."""
    initial, target, dh_norm, residual = (start[k] for k in ("initial", "target", "dh_norm", "scaled_residual"))
    dh_upper = dh_norm * lanczos_slack(initial.size, MATVECS, FAILURE) ** 0.5
    value, alignment = residual * d2h_lower / dh_norm**2, start["alignment"]
    # If h(w0) is zero it stays so at alpha = inf.
    shifted = jnp.where(initial == 0, 0, alpha * initial) - target
    return {
        "value": value,
        "lower": residual * d2h_lower / dh_upper**2,
        "upper": residual * d2h_upper / dh_norm**2,
        "residual_norm": loss.norm(shifted),
        "dh_norm": dh_norm,
        "dh_norm_upper": dh_upper,
        "d2h_norm_lower": d2h_lower,
        "d2h_norm_upper": d2h_upper,
        "alignment": alignment,
        "lazy_ratio": jnp.where(alignment > 0, value / (2 * jnp.where(alignment > 0, alignment, 1)), jnp.inf),
        "kink_share": start["kink_share"],
        "finite_curvature": start["finite_curvature"],
        "initial": initial,
        "target": target,
    }


@eqx.filter_jit
def measure_kinks(
    form: SecondDerivative, key: PRNGKeyArray
) -> tuple[Float[Array, ""], Float[Array, ""], Bool[Array, ""]]:
    r"""Measure how much of the change of Dh over random steps $D^2h$ does not explain.

    Returns:
        The largest share, over random steps u, that is unexplained; the largest finite curvature
        $\|[Dh(w_0 + u) - Dh(w_0)]u\|_F/|u|^2$, kinks included; whether $D^2h(w_0)$ is finite.
    """
    point = form.point()
    nodes, weights = np.polynomial.legendre.leggauss(4)
    # The start first, with no weight: whether D^2h is finite there.
    places = np.append(0, (np.arange(KINK_PANELS)[:, None] + 0.5 + 0.5 * nodes).ravel() / KINK_PANELS)
    shares = np.append(0, np.tile(0.5 * weights / KINK_PANELS, KINK_PANELS))
    size = jnp.linalg.norm(point)
    length = KINK_STEP * jnp.where(size > 0, size, 1)

    def probe(k: PRNGKeyArray) -> tuple[Array, Array, Array]:
        direction = jr.normal(k, point.shape, point.dtype)
        u = length * direction / jnp.linalg.norm(direction)
        ends = jnp.stack([point, point + u])
        before, after = jax.lax.map(lambda at: jvp(form.model, (at,), (u,))[1], ends)

        def add(total: Array, node: tuple[Array, Array]) -> tuple[Array, Array]:
            bent = second_directional_derivative(form.model, point + node[0] * u, u)
            return total + jnp.where(node[1] > 0, node[1] * bent, 0), jnp.all(jnp.isfinite(bent))

        rule = (jnp.asarray(places, u.dtype), jnp.asarray(shares, u.dtype))
        integral, finite = jax.lax.scan(add, jnp.zeros_like(before), rule)
        change = after - before
        rounding = 1e3 * jnp.finfo(u.dtype).eps * jnp.maximum(jnp.linalg.norm(before), jnp.linalg.norm(after))
        norm, rest = jnp.linalg.norm(change), jnp.linalg.norm(change - integral)
        share = jnp.where(norm > rounding, rest / jnp.where(norm > rounding, norm, 1), 0)
        return share, jnp.where(norm > rounding, norm, 0) / length**2, finite[0]

    share, slope, finite = jax.lax.map(probe, jr.split(key, KINK_PROBES))
    return jnp.max(share), jnp.max(slope), jnp.all(finite)
