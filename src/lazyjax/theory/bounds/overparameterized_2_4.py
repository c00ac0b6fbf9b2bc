r"""Theorem 2.4 and the two lemmas under it: if Dh(w0) is onto, the flows stay close for all times."""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from lazyjax.theory.bounds.arguments import Number, as_numbers, checked, exponent


class OverparameterizedBounds(eqx.Module):
    r"""The upper bounds at the time t; made by `theorem_2_4`. If it does not apply, those of the flows are inf.

    Attributes:
        residual_norm: Bound of $\|y(t) - y^*\|_F$, $y = \alpha h(w_\alpha)$; it falls with t.
        displacement_norm: Bound of $|w_\alpha(t) - w_0|$; it grows with t, so that t = inf gives the supremum.
        output_gap: Bound of $\|y(t) - \bar y(t)\|_F$; it grows from 0, and falls to 0 again.
        output_gap_sup: Bound of the supremum of the output gap over all times.
        param_gap: Bound of $|w_\alpha(t) - \bar w_\alpha(t)|$; it grows with t.
        rate: $m\sigma_{min}^2/4$, the rate of the exponential.
        c0: $C_0$, a norm in F.
        alpha_threshold: What alpha must exceed: $D/(2C_0)$ (`printed`: $D/C_0$). If h(w0) = 0, so that D does not
            depend on alpha, it is a number of the problem.
        radius: $r_0 = \sigma_{min}/(2 Lip(Dh))$, of the ball on which `lip_dh` must hold.
        admissible: Whether $D < 2\alpha C_0$.
    """

    residual_norm: Float[Array, "..."]
    displacement_norm: Float[Array, "..."]
    output_gap: Float[Array, "..."]
    output_gap_sup: Float[Array, "..."]
    param_gap: Float[Array, "..."]
    rate: Float[Array, "..."]
    c0: Float[Array, "..."]
    alpha_threshold: Float[Array, "..."]
    radius: Float[Array, "..."]
    admissible: Bool[Array, "..."]


@checked
def theorem_2_4(
    *,
    t: Number,
    alpha: Number,
    residual_norm: Number,
    sigma_min: Number,
    dh_norm: Number,
    lip_dh: Number,
    smoothness: Number = 1.0,
    strong_convexity: Number = 1.0,
    printed: bool = False,
) -> OverparameterizedBounds:
    r"""Bound the flows at all times, Dh(w0) onto, R M-smooth and m-strongly convex with minimizer $y^*$.

    With $D = \|\alpha h(w_0) - y^*\|_F$, $\sigma = \sigma_{min}$, $\kappa = M/m$, $\chi = \|Dh(w_0)\|/\sigma$,
    $L_1 = Lip(Dh)$ and $C_0 = \sigma^3/(24\kappa^{3/2}\|Dh(w_0)\|L_1)$: if $D < 2\alpha C_0$, then for all $t \ge 0$,
    with $x = e^{-m\sigma^2 t/4}$,

    $$\|y - y^*\|_F \le \sqrt\kappa\,D\,x, \qquad
      |w_\alpha - w_0| \le d\,(1 - x), \quad d = \frac{6\kappa^{3/2}\|Dh(w_0)\|D}{\alpha\sigma^2},$$
    $$\|y - \bar y\|_F \le \tfrac53\kappa^{3/2}\chi^2qD\;x(1-x)^2(2+x) \le 0.581\,\kappa^{3/2}\chi^2qD, \quad
      q = \frac{L_1d}{\sigma} < \frac12,$$
    $$|w_\alpha - \bar w_\alpha| \le \frac{\kappa^{3/2}qD}{\alpha\sigma}
      \Bigl[2(1-x)^2 + \tfrac53\kappa\chi^3(1-x)^3(3+x)\Bigr].$$

    So the gaps are O(1/alpha) and O(1/alpha^2), uniformly in time.

    *Proof of the last two.* $\|Dh(w)\| \le \frac32\|Dh(w_0)\|$ in the ball, so by the first line
    $\|(\Sigma(w_\alpha) - \Sigma(w_0))\nabla R(y)\| \le k(1-x)x$ with $k = \frac52\|Dh(w_0)\|L_1dM\sqrt\kappa D$. As
    for `lemma_b_2`, $e = \|\Sigma(w_0)^{-1/2}(y - \bar y)\|$ obeys $e' \le -m\sigma^2e + k(1-x)x/\sigma$, which
    integrates to the third bound. Then integrate
    $\alpha|w_\alpha - \bar w_\alpha|' \le L_1|w_\alpha - w_0|\,M\|y - y^*\| + \|Dh(w_0)\|M\|y - \bar y\|$.

    Args:
        t: Flow time in [0, inf].
        alpha: Output scale in (0, inf]; at inf the bounds of displacement and gaps are 0.
        residual_norm: D, at this alpha.
        sigma_min: The smallest singular value of Dh(w0) over all output directions, in F's metric.
        dh_norm: $\|Dh(w_0)\|$, the largest.
        lip_dh: $L_1$, on the ball of radius $\sigma_{min}/(2L_1)$; or, after the fact, the supremum of
            $\|Dh(w_\alpha(t)) - Dh(w_0)\| / |w_\alpha(t) - w_0|$ along the flow.
        smoothness: M, in F.
        strong_convexity: m, in F.
        printed: With $\|Dh(w)\| \le 2\|Dh(w_0)\|$ as in the paper: $C_0$ has 32, d has 8, and alpha must exceed
            $\|y^*\|/C_0$. True too, weaker.

    Returns:
        `OverparameterizedBounds`, of the arguments' common shape.

    Raises:
        ValueError, TypeError: an argument out of its range, outside a trace.

    Source:
        Chizat, Oyallon, Bach (2019), theorem 2.4 and supplement B.3, which has O(log alpha/alpha^2) for the
        parameters: the logarithm is an artifact of splitting the integral. The constants of the gaps are ours.
        Smith's report claims three times the rate, by an inequality that is false (see `smith_inequality`).

    Example:
        >>> bounds = theorem_2_4(t=4.0, alpha=100.0, residual_norm=1.0, sigma_min=1.0, dh_norm=1.0, lip_dh=1.0)
        >>> print(f"{bounds.residual_norm:.4f} {bounds.output_gap_sup:.4f} {bounds.alpha_threshold:.4f}")
        0.3679 0.0348 12.0000
    """
    numbers = as_numbers(
        t=t,
        alpha=alpha,
        residual_norm=residual_norm,
        sigma_min=sigma_min,
        dh_norm=dh_norm,
        lip_dh=lip_dh,
        smoothness=smoothness,
        strong_convexity=strong_convexity,
    )
    return _bounds_onto(numbers, printed=printed)


def _bounds_onto(numbers: tuple[Array, ...], *, printed: bool) -> OverparameterizedBounds:
    t, alpha, residual, sigma, dh, lip_dh, smooth, convex = numbers
    widest = 2.0 if printed else 1.5  # of ||Dh(w)|| in the ball, over ||Dh(w0)||
    kappa, chi = smooth / convex, dh / sigma
    rate = convex * sigma**2 / 4
    decay = exponent(rate, t)
    x, gone = jnp.exp(-decay), -jnp.expm1(-decay)
    reach = 4 * widest * kappa**1.5 * chi * residual / (alpha * sigma)
    q = lip_dh * reach / sigma
    c0 = sigma / (16 * widest * kappa**1.5 * chi * lip_dh) * sigma
    output_gap = (1 + widest) * 2 / 3 * kappa**1.5 * chi**2 * q * residual
    spread = 2 * gone**2 + (1 + widest) * 2 / 3 * kappa * chi**3 * gone**3 * (3 + x)
    admissible = 2 * q < 1  # D < 2 alpha C_0

    def proven(bound: Array) -> Array:
        return jnp.where(admissible, bound, jnp.inf)

    return OverparameterizedBounds(
        residual_norm=proven(jnp.sqrt(kappa) * residual * x),
        displacement_norm=proven(reach * gone),
        output_gap=proven(output_gap * x * gone**2 * (2 + x)),
        output_gap_sup=proven(output_gap * (1.5 * 3**0.5 - 2.25)),  # where 2x = sqrt(3) - 1
        param_gap=proven(kappa**1.5 * q * (residual / sigma) / alpha * spread),
        rate=rate,
        c0=c0,
        alpha_threshold=residual / c0 if printed else residual / (2 * c0),
        radius=sigma / (2 * lip_dh),
        admissible=admissible,
    )


@checked
def lemma_b_1(
    *,
    t: Number,
    residual_norm: Number,
    lambda_min: Number,
    smoothness: Number = 1.0,
    strong_convexity: Number = 1.0,
) -> Float[Array, "..."]:
    r"""Bound the residual of a flow in a moving metric: it falls at the rate of the smallest eigenvalue.

    If $y' = -\Sigma(s)\nabla R(y)$ and $\Sigma \ge \lambda > 0$ on [0, t], R M-smooth and m-strongly convex, then

    $$\|y(t) - y^*\| \le \sqrt{M/m}\;\|y(0) - y^*\|\,e^{-m\lambda t}.$$

    Args:
        t: Time in [0, inf].
        residual_norm: $\|y(0) - y^*\|$.
        lambda_min: $\lambda$, below every eigenvalue of $\Sigma$.
        smoothness: M of R.
        strong_convexity: m of R.

    Raises:
        ValueError, TypeError: an argument out of its range, outside a trace.

    Source:
        Chizat, Oyallon, Bach (2019), lemma B.1; its proof loses the t in the exponent on the way.

    Example:
        >>> print(f"{lemma_b_1(t=2.0, residual_norm=1.0, lambda_min=0.5):.4f}")
        0.3679
    """
    t, residual, lowest, smooth, convex = as_numbers(
        t=t,
        residual_norm=residual_norm,
        lambda_min=lambda_min,
        smoothness=smoothness,
        strong_convexity=strong_convexity,
    )
    return jnp.sqrt(smooth / convex) * residual * jnp.exp(-exponent(convex * lowest, t))


@checked
def lemma_b_2(
    *, perturbation: Number, sigma_norm: Number, lambda_min: Number, strong_convexity: Number = 1.0
) -> Float[Array, "..."]:
    r"""Bound the distance of two flows whose metrics stay close.

    If $y' = -\Sigma(t)\nabla R(y)$, $\bar y' = -\Sigma(0)\nabla R(\bar y)$ and $y(0) = \bar y(0)$, then

    $$\|y(t) - \bar y(t)\| \le \frac{K\|\Sigma(0)\|^{1/2}}{\lambda^{3/2}m}, \qquad
      K = \sup_t \|(\Sigma(t) - \Sigma(0))\nabla R(y(t))\|.$$

    Args:
        perturbation: K.
        sigma_norm: $\|\Sigma(0)\|$, its largest eigenvalue.
        lambda_min: $\lambda$, the smallest eigenvalue of $\Sigma(0)$ alone.
        strong_convexity: m of R.

    Raises:
        ValueError, TypeError: an argument out of its range, outside a trace.

    Source:
        Chizat, Oyallon, Bach (2019), lemma B.2, which asks for $\Sigma(t) \ge \lambda$ at all times; its proof needs
        that at t = 0 only, where $\lambda = \sigma_{min}(Dh(w_0))^2$ (a quarter of it makes the bound 8 times larger).

    Example:
        >>> print(lemma_b_2(perturbation=0.1, sigma_norm=4.0, lambda_min=1.0))
        0.2
    """
    perturbation, largest, lowest, convex = as_numbers(
        perturbation=perturbation, sigma_norm=sigma_norm, lambda_min=lambda_min, strong_convexity=strong_convexity
    )
    return perturbation / (lowest * convex) * jnp.sqrt(largest / lowest)
