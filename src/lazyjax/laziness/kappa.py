r"""The criterion $\kappa$: how strongly the differential of a model bends, against how far its outputs have to go.

Norms in F are in the metric of the square loss (see `lazyjax.loss`), norms of parameters are Euclidean. $\kappa$ itself
does not depend on a factor in F's metric.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, Real

from lazyjax._core.checks import check_alpha, check_outputs, is_concrete
from lazyjax._core.keys import default_key
from lazyjax._core.lanczos import lanczos_slack
from lazyjax._core.trees import safe_ratio, tree_norm
from lazyjax._core.types import Model, Outputs, Params, RealScalar
from lazyjax.flow.field import check_start
from lazyjax.laziness.hessian_norm import SecondDerivative, check_starts
from lazyjax.laziness.kinks import measure_kinks
from lazyjax.laziness.sample_hessians import show_inputs
from lazyjax.laziness.second_derivative import FAILURE, MATVECS, bracket
from lazyjax.laziness.two_layer import find_neurons, neuron_bracket
from lazyjax.losses.losses import SquareLoss, square_loss
from lazyjax.models.tangent import linearize, singular_values

KINKED = 0.05
"""A larger share of the change of Dh without a second derivative is a model with kinks."""


class Kappa(eqx.Module):
    r"""The criterion $\kappa_{\alpha h}(w_0)$ and what it is made of; made by `kappa`. Print it.

    Attributes:
        value: $\kappa$ with the lower norm of $D^2h$: far below 1 suggests lazy training, see `lazy_ratio`.
        lower: With the lower norm of $D^2h$ and the upper one of Dh.
        upper: With the upper norm of $D^2h$.
        residual_norm: $\|\alpha h(w_0) - y^*\|_F$.
        dh_norm: $\|Dh(w_0)\|$, by Lanczos from below.
        dh_norm_upper: The same from above.
        d2h_norm_lower: $\|D^2h(w_0)\|$ from below: the largest value met in a search, attained at a unit vector.
        d2h_norm_upper: From above, certified.
        alignment: $\|Dh(w_0)^*r\|/(\|Dh(w_0)\|\|r\|)$ of the residual r, in [0, 1].
        lazy_ratio: $\kappa/(2 \cdot alignment)$, the ratio of relative changes of Dh and F that a small gradient step
            makes: **this one** has to be far below 1, since $\kappa$ is small also where the residual avoids the
            leading directions of Dh. As `lazyjax.laziness.lazy_ratio`; inf at a stationary point.
        kink_share: Of the change of Dh over random steps of 0.3 |w0| the share that $D^2h$ does not explain.
        finite_curvature: $\|[Dh(w_0 + u) - Dh(w_0)]u\|_F/|u|^2$, the largest over these steps, kinks included.
        failure: Probability, over the random starts, that `upper`, `lower` or one of the upper norms does not hold (all
            hold up to rounding too); 0 where no chance is involved.
        how: What d2h_norm_upper is made of.
        initial: $h(w_0)$.
        target: $y^*$.
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
        """What kind of model it is.

        "smooth"; "affine" (Dh does not change); "kinked" (as ReLU nets: $D^2h$ sees only what lies between kinks, and
        the theory, which asks for a Lipschitz Dh, says nothing); "none almost everywhere" (kinked, and $D^2h$ is zero:
        a value of 0 then means nothing). Values must be known, so not inside a jit.
        """
        bent = float(self.d2h_norm_lower) > 1e3 * jnp.finfo(self.value.dtype).eps * float(self.dh_norm)
        if float(self.kink_share) > KINKED:
            return "kinked" if bent else "none almost everywhere"
        return "smooth" if bent or float(self.finite_curvature) > 0 else "affine"

    def scaled(self, alpha: RealScalar | Real[np.ndarray, "..."]) -> Float[Array, "..."]:
        r"""$\kappa_{\alpha h}(w_0) = \|h(w_0) - y^*/\alpha\|_F\|D^2h\|/\|Dh\|^2$ at other scales, of alpha's shape.

        For an h homogeneous of degree q it is also the $\kappa_h(\lambda w_0)$ of a larger start, with
        $\alpha = \lambda^q$. It falls as 1/alpha only where h(w0) = 0, else to a limit.
        """
        eps = 1 / jnp.asarray(alpha, self.value.dtype)
        root = jnp.asarray(self.weight**0.5, self.value.dtype)
        norms = jax.vmap(lambda e: root * jnp.linalg.norm(self.initial - e * self.target))(eps.ravel())
        return norms.reshape(eps.shape) * self.d2h_norm_lower / self.dh_norm**2

    def __str__(self) -> str:
        """Some lines: the value in its bracket, what it is made of, what it can and cannot say."""
        kind, sure = self.curvature, "" if self.failure == 0 else f", but for a probability of {self.failure:.0e}"
        lines = [
            f"kappa = {self.value:.3g}, certified within [{self.lower:.3g}, {self.upper:.3g}]{sure}",
            f"  ||alpha h(w0) - y*|| = {self.residual_norm:.3g}, ||Dh(w0)|| = {self.dh_norm:.3g}, "
            f"||D2h(w0)|| in [{self.d2h_norm_lower:.3g}, {self.d2h_norm_upper:.3g}] ({self.how})",
            f"  lazy_ratio = {self.lazy_ratio:.3g} (alignment of the residual with Dh: {self.alignment:.3g})",
        ]
        if kind in ("kinked", "none almost everywhere"):
            lines[0] = lines[0].replace("kappa", "OUTSIDE THE THEORY (h has kinks). Between kinks, kappa", 1)
            lines.append(
                f"  D2h explains {100 * max(0.0, 1 - float(self.kink_share)):.0f} % of the change of Dh over steps of "
                f"0.3 |w0|, which is {self.finite_curvature:.3g} |u|^2 along u; nothing here shows that h is lazy. "
                "lazyjax.laziness.step_criterion measures a gradient step, kinks included."
            )
        elif kind == "affine":
            lines.append("  h is its own tangent model, as far as steps of 0.3 |w0| can tell.")
        return "\n".join(lines)


def kappa(
    h: Model,
    w0: Params,
    target: Outputs,
    *,
    alpha: RealScalar = 1.0,
    mean: bool = True,
    starts: int = 10,
    key: PRNGKeyArray | None = None,
) -> Kappa:
    r"""$\kappa_{\alpha h}(w_0) = \frac1\alpha\|\alpha h(w_0) - y^*\|_F\,\|D^2h(w_0)\|/\|Dh(w_0)\|^2$, within a bracket.

    $\kappa \ll 1$ was proposed as the sign of lazy training with the square loss. It is not sufficient: see
    `Kappa.lazy_ratio`, never below $\kappa/2$.

    $\|D^2h\|$ is the norm of a bilinear map, hard to compute, so both bounds are given. All Hessians are formed for
    small models, those of one neuron for a `two_layer` net. Beyond, the bound from above takes unfoldings by Lanczos:
    cheap (a few passes over the batch a product) if h shows its inputs, as `on_data(f, x)` does,
    centered or not, and a closure does not. A closure with many outputs and parameters has a much wider bracket; `Kappa.how` says
    what was done.

    Args:
        h: Model h(w) with outputs (n,) or (n, k).
        w0: Where; any pytree.
        target: $y^*$, of the outputs' shape.
        alpha: Output scale in (0, inf]; inf needs h(w0) = 0.
        mean: Whether F's metric has the factor 1/n (the norms depend on it, kappa does not).
        starts: Random starts of the search from below; one alone often misses the maximum.
        key: For all random starts; None for a fixed one.

    Returns:
        `Kappa`.

    Raises:
        ValueError, TypeError: as `gradient_flow`; `starts` below 1; half precision; Dh(w0) = 0; D^2h(w0) not finite.

    Source:
        Chizat, Oyallon, Bach (2019), equation (1) and section 1.2; supplement A.2 for two-layer nets.

    Example:
        >>> print(f"{kappa(lambda w: w + w**2, jnp.zeros(1), jnp.ones(1)).value:.3f}")
        2.000
    """
    check_alpha(alpha)
    check_starts(starts)
    loss = square_loss(target, mean=mean)
    zero_start = check_start(h, loss, w0, alpha, rtol=1e-6)
    first, second, third = jr.split(default_key(key), 3)
    out = check_outputs(h, w0)
    initial = jnp.zeros(out.shape, out.dtype) if zero_start else h(w0)
    # All else is in the derivatives.
    h = show_inputs(h)
    form = SecondDerivative(h, w0, loss.weight**0.5)
    _check_precision(form.point().dtype, out.dtype)
    kinks = measure_kinks(form, first)
    scale = jnp.asarray(alpha, out.dtype)
    slope = _first_order(h, w0, loss, initial, scale, third)
    _check_derivatives(slope[1], kinks[2])
    neurons = find_neurons(h, w0)
    found = None if neurons is None else neuron_bracket(neurons, loss.weight, second, starts)
    if found is None:
        found = bracket(h, w0, loss.weight, loss.minimizer.size, second, starts)
    failure = found.failure + (FAILURE if loss.minimizer.size > MATVECS else 0.0)
    return _assemble(loss, initial, scale, slope, (found.lower, found.upper), kinks[:2], failure, found.how)


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
def _first_order(
    h: Model, w0: Params, loss: SquareLoss, initial: Outputs, alpha: Float[Array, ""], key: PRNGKeyArray
) -> tuple[Array, Array, Array]:
    r"""$\|\alpha h(w_0) - y^*\|$ over alpha, $\|Dh\|$, and $\|Dh^*r\|$ over the norm of this residual r."""
    tangent = linearize(h, w0)
    dh_norm = singular_values(tangent, loss, num_matvecs=MATVECS, key=key).largest
    eps = 1 / alpha
    residual = initial - eps * loss.minimizer.astype(initial.dtype)
    # At alpha = inf with a zero start the direction is that of the target.
    turned = jnp.where(eps > 0, residual / jnp.where(eps > 0, eps, 1), -loss.minimizer.astype(initial.dtype))
    size = loss.norm(turned)
    pulled = loss.weight * tree_norm(tangent.vjp(turned))
    return loss.norm(residual), dh_norm, safe_ratio(pulled, size)


def _assemble(
    loss: SquareLoss,
    initial: Outputs,
    alpha: Float[Array, ""],
    slope: tuple[Array, Array, Array],
    d2h: tuple[Array, Array],
    kinks: tuple[Array, Array],
    failure: float,
    how: str,
) -> Kappa:
    residual, dh, pulled = slope
    # Where h(w0) is zero it stays so at alpha = inf.
    shifted = jnp.where(initial == 0, 0, alpha * initial) - loss.minimizer.astype(initial.dtype)
    dh_upper = dh * lanczos_slack(initial.size, MATVECS, FAILURE) ** 0.5
    value, alignment = residual * d2h[0] / dh**2, pulled / dh
    return Kappa(
        value=value,
        lower=residual * d2h[0] / dh_upper**2,
        upper=residual * d2h[1] / dh**2,
        residual_norm=loss.norm(shifted),
        dh_norm=dh,
        dh_norm_upper=dh_upper,
        d2h_norm_lower=d2h[0],
        d2h_norm_upper=d2h[1],
        alignment=alignment,
        lazy_ratio=jnp.where(alignment > 0, value / (2 * jnp.where(alignment > 0, alignment, 1)), jnp.inf),
        kink_share=kinks[0],
        finite_curvature=kinks[1],
        failure=failure,
        how=how,
        initial=initial,
        target=loss.minimizer.astype(initial.dtype),
        weight=loss.weight,
    )
