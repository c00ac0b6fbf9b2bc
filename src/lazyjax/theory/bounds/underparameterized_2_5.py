r"""Theorem 2.5 with constants: if the rank of Dh is locally constant, with fewer parameters than outputs too."""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from lazyjax.theory.bounds.arguments import Number, as_numbers, checked, exponent

_ROUNDS = 8
"""Times that the distance traveled sharpens the rate; each is a valid bound, and they settle after a few."""


class UnderparameterizedBounds(eqx.Module):
    r"""The upper bounds at the time t; made by `theorem_2_5`. If it does not apply, those of the flows are inf.

    Attributes:
        displacement_norm: Bound of $|w_\alpha(t) - w_0|$; it grows with t, so that t = inf gives the supremum.
        output_gap: Bound of $\|y(t) - \bar y(t)\|_F$; it grows with t.
        param_gap: Bound of $|w_\alpha(t) - \bar w_\alpha(t)|$; it grows with t.
        limit_distance: Bound of $|w_\alpha(t) - w_\alpha(\infty)|$; it falls with t.
        excess_loss: Bound of $R(y(t)) - R(y(\infty))$; it falls with t.
        limit_loss_gap: Bound of $|R(y(\infty)) - R(\bar y(\infty))|$.
        rate: $\mu$, the rate of the exponential; nothing follows if it is not positive.
        alpha_threshold: $\alpha_0$, what alpha must exceed. If h(w0) = 0, it is a number of the problem.
        radius: $r_0 = \sigma/(2 Lip(Dh))$, of the ball on which `lip_dh` must hold and the rank be constant.
        admissible: Whether $\alpha > \alpha_0$.
    """

    displacement_norm: Float[Array, "..."]
    output_gap: Float[Array, "..."]
    param_gap: Float[Array, "..."]
    limit_distance: Float[Array, "..."]
    excess_loss: Float[Array, "..."]
    limit_loss_gap: Float[Array, "..."]
    rate: Float[Array, "..."]
    alpha_threshold: Float[Array, "..."]
    radius: Float[Array, "..."]
    admissible: Bool[Array, "..."]


@checked
def theorem_2_5(
    *,
    t: Number,
    alpha: Number,
    start_loss: Number,
    start_gradient: Number,
    sigma_min: Number,
    dh_norm: Number,
    lip_dh: Number,
    smoothness: Number = 1.0,
    strong_convexity: Number = 1.0,
) -> UnderparameterizedBounds:
    r"""Bound the flows at all times, rank of Dh constant near w0, R M-smooth and m-strongly convex.

    **No number shows that the rank is constant**; it is for the caller to know. It holds if Dh(w0) is onto, or
    one to one; without it the conclusions are false (h = (w1, w1 w2) at 0, y* = (1, 1): the gap tends to 1).

    With $\sigma$ the smallest nonzero singular value of Dh(w0), $L_1 = Lip(Dh)$, $G = \sqrt{2MR(\alpha h(w_0))}$ and
    $g = |Dh(w_0)^*\nabla R(\alpha h(w_0))|$: if $\alpha > \alpha_0 = 4L_1(G + 2g/\sigma)/(m\sigma^2)$, then
    $w_\alpha$ converges, and with $x = e^{-\mu t}$ for all $t \ge 0$

    $$|w_\alpha - w_0| \le d = \frac{g(1-x)}{\alpha\mu}, \quad
      |w_\alpha - w_\alpha(\infty)| \le \frac{gx}{\alpha\mu}, \quad
      R(y) - R(y(\infty)) \le \frac{g^2x^2}{2\mu},$$
    $$\|y - \bar y\|_F \le \alpha\bigl(\|Dh(w_0)\|v + \tfrac12L_1d^2\bigr), \quad
      |w_\alpha - \bar w_\alpha| \le \bigl(v^2 + (L_1d^2/\sigma)^2\bigr)^{1/2}, \quad
      v = \frac{1 - e^{-m\sigma^2t}}{m\sigma^2}\Bigl(\frac{L_1dG}{\alpha} + \tfrac12M\|Dh(w_0)\|L_1d^2\Bigr).$$

    The rate is $\mu = m(\sigma - L_1d(\infty))^2 - L_1G/\alpha$, at least $m\sigma^2/4 - L_1G/\alpha$ and $m\sigma^2$,
    that of the tangent flow, as alpha grows. The limit is a local minimum, strict modulo the fibres of h.

    *Proof.* While $|w - w_0| \le \rho \le \sigma/(2L_1)$ the nonzero singular values of Dh(w) are as many as at w0, so
    all at least $\sigma - L_1\rho$ (Weyl). $\nabla F_\alpha$ lies in the range of $Dh^*$, and
    $\nabla^2F_\alpha = Dh^*\nabla^2R\,Dh + \alpha^{-1}\langle\nabla R, D^2h\rangle$, so
    $|w'|' \le -\mu|w'|$ with $\|\nabla R\| \le G$; hence the first line, and that w stays in the ball. The bound d
    is a new $\rho$, and so on. For the gaps let $e = w_\alpha - \bar w_\alpha$ and V the range of $Dh(w_0)^*$.
    On V, $y = \alpha\bar h(w_\alpha) + O(\alpha L_1d^2/2)$ and strong convexity give
    $|e_V|' \le -m\sigma^2|e_V| + L_1dG/\alpha + M\|Dh(w_0)\|L_1d^2/2$. Off V only $w_\alpha$ moves, along the range of
    $Dh(w_\alpha)^*$ which is turned from V by at most $2L_1|w_\alpha - w_0|/\sigma$.

    Args:
        t: Flow time in [0, inf].
        alpha: Output scale in (0, inf]; at inf the bounds of displacements and gaps are 0.
        start_loss: $R(\alpha h(w_0))$, or less the infimum of R.
        start_gradient: g, the plain Euclidean norm $\alpha|\nabla F_\alpha(w_0)|$, at most $\|Dh(w_0)\|G$.
        sigma_min: $\sigma$, in F's metric.
        dh_norm: $\|Dh(w_0)\|$, the largest singular value.
        lip_dh: $L_1$, on the ball of radius $\sigma/(2L_1)$; or, after the fact, the supremum of
            $\|D^2h(w_\alpha(t))\|$ and of $\|Dh(w_\alpha(t)) - Dh(w_0)\| / |w_\alpha(t) - w_0|$ along the flow.
        smoothness: M, in F.
        strong_convexity: m, in F.

    Returns:
        `UnderparameterizedBounds`, of the arguments' common shape.

    Raises:
        ValueError, TypeError: an argument out of its range, outside a trace.

    Source:
        Chizat, Oyallon, Bach (2019), theorem 2.5 and supplement B.5, qualitative and by the rank theorem (where the
        second term of the Hessian does not vanish as alpha grows, as said, but is small near the start). This proof
        and its constants are ours; so is the comparison with the tangent flow, which the paper leaves open here and
        the poster claims without the assumption on the rank.

    Example:
        >>> bounds = theorem_2_5(
        ...     t=jnp.inf, alpha=100.0, start_loss=1.0, start_gradient=1.0, sigma_min=1.0, dh_norm=1.0, lip_dh=1.0
        ... )
        >>> print(f"{bounds.rate:.3f} {bounds.output_gap:.4f} {bounds.alpha_threshold:.2f}")
        0.965 0.0254 13.66
    """
    numbers = as_numbers(
        t=t,
        alpha=alpha,
        start_loss=start_loss,
        start_gradient=start_gradient,
        sigma_min=sigma_min,
        dh_norm=dh_norm,
        lip_dh=lip_dh,
        smoothness=smoothness,
        strong_convexity=strong_convexity,
    )
    return _bounds_of_constant_rank(numbers)


def _bounds_of_constant_rank(numbers: tuple[Array, ...]) -> UnderparameterizedBounds:
    t, alpha, loss, gradient, sigma, dh, lip_dh, smooth, convex = numbers
    slope = jnp.sqrt(2 * smooth) * jnp.sqrt(loss)
    lowest = convex * sigma**2
    threshold = 4 * lip_dh * (slope + 2 * gradient / sigma) / lowest
    admissible = alpha > threshold
    rate = _rate(alpha, slope, gradient, sigma, lip_dh, convex)
    decay = exponent(jnp.where(admissible, rate, 1), t)
    x, gone = jnp.exp(-decay), -jnp.expm1(-decay)
    # Displacements in units of 1/alpha, gaps of 1/alpha^2: nothing underflows at a large alpha.
    end = gradient / jnp.where(admissible, rate, 1)

    def gaps(u: Array, share: Array) -> tuple[Array, Array]:
        """Return the gap on the range of Dh(w0)^*, and the second order."""
        return share / lowest * lip_dh * u * (slope + smooth * dh * u / 2), lip_dh * u**2

    inside, bent = gaps(end * gone, -jnp.expm1(-exponent(lowest, t)))
    inside_end, bent_end = gaps(end, jnp.ones_like(end))
    end_gap = (dh * inside_end + bent_end / 2) / alpha

    def proven(bound: Array) -> Array:
        return jnp.where(admissible, bound, jnp.inf)

    return UnderparameterizedBounds(
        displacement_norm=proven(end * gone / alpha),
        output_gap=proven((dh * inside + bent / 2) / alpha),
        param_gap=proven(jnp.hypot(inside, bent / sigma) / alpha / alpha),
        limit_distance=proven(end * x / alpha),
        excess_loss=proven(gradient * end * x**2 / 2),
        limit_loss_gap=proven(slope * bent_end / 2 / alpha + smooth * end_gap**2 / 2),
        rate=rate,
        alpha_threshold=threshold,
        radius=sigma / (2 * lip_dh),
        admissible=admissible,
    )


def _rate(alpha: Array, slope: Array, gradient: Array, sigma: Array, lip_dh: Array, convex: Array) -> Array:
    r"""Return $\mu$ on the ball that the flow provably stays in, from $r_0$ down; on $r_0$ itself if there is none."""
    turned = 0.5 * sigma
    rate = convex * (sigma - turned) ** 2 - lip_dh * slope / alpha
    for _ in range(_ROUNDS):
        better = lip_dh * gradient / (alpha * jnp.where(rate > 0, rate, 1))
        turned = jnp.where((rate > 0) & (better < turned), better, turned)
        rate = convex * (sigma - turned) ** 2 - lip_dh * slope / alpha
    return rate
