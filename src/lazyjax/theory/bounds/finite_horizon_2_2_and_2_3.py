r"""Theorems 2.2 and 2.3: on $[0, T]$ the model's flow stays within O(1/alpha) of its tangent model's."""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from lazyjax.theory.bounds.arguments import Number, as_numbers, checked, grown


class HorizonBounds(eqx.Module):
    r"""The upper bounds for all t in [0, T]; made by `theorem_2_2` and `theorem_2_3`.

    Attributes:
        displacement_norm: Bound of $|w_\alpha(t) - w_0|$.
        output_gap: Bound of $\|y(t) - \bar y(t)\|_F$, $y = \alpha h(w_\alpha)$, $\bar y = \alpha\bar h(\bar w_\alpha)$.
        param_gap: Bound of $|w_\alpha(t) - \bar w_\alpha(t)|$.
        admissible: Whether the path provably stays in the ball where the constants hold. If it does not, what
            rests on them is inf.
    """

    displacement_norm: Float[Array, "..."]
    output_gap: Float[Array, "..."]
    param_gap: Float[Array, "..."]
    admissible: Bool[Array, "..."]


@checked
def theorem_2_2(
    *,
    alpha: Number,
    horizon: Number,
    start_loss: Number,
    lip_h: Number,
    lip_dh: Number,
    dh_norm: Number,
    smoothness: Number = 1.0,
    radius: Number = jnp.inf,
) -> HorizonBounds:
    r"""Bound the flows on a finite horizon, for any smooth loss $R \ge 0$, convex or not.

    With $R_0 = R(\alpha h(w_0))$, $G = \sqrt{2MR_0}$, $L = Lip(h)$, $L_1 = Lip(Dh)$, $C_2 = M\|Dh(w_0)\|^2$ and
    $C_1 = 2LL_1\sqrt{TR_0}\,G$, for all t in [0, T]

    $$|w_\alpha - w_0| \le \frac{\sqrt{TR_0}}{\alpha}, \qquad
      \|y - \bar y\|_F \le \frac{C_1}{\alpha}\,\frac{e^{C_2T} - 1}{C_2}, \qquad
      |w_\alpha - \bar w_\alpha| \le \frac{1}{\alpha^2}\Bigl[L_1\sqrt{TR_0}\,GT
        + \|Dh(w_0)\|M\frac{C_1}{C_2}\Bigl(\frac{e^{C_2T} - 1}{C_2} - T\Bigr)\Bigr].$$

    The growth in T is exponential because nothing makes the tangent flow contract; see `theorem_2_3` and
    `theorem_2_4`. For the paper's rates in alpha, $R_0$ must not grow with it: h(w0) = 0.

    Args:
        alpha: Output scale in (0, inf]; at inf all bounds are 0.
        horizon: T, flow time.
        start_loss: $R_0$; for a loss bounded below by another number than 0, less that number.
        lip_h: L, of h from the Euclidean metric to F's, on the ball of `theorem_2_2_radius`; or, for a bound after
            the fact, the supremum of $\|Dh(w_\alpha(t))\|$ along the flow.
        lip_dh: $L_1$ there; after the fact, the supremum of $\|Dh(w_\alpha(t)) - Dh(w_0)\| / |w_\alpha(t) - w_0|$.
        dh_norm: $\|Dh(w_0)\|$ in F's metric.
        smoothness: M, the Lipschitz constant of R's gradient in F.
        radius: Radius of the ball around w0 on which `lip_h` and `lip_dh` hold.

    Returns:
        `HorizonBounds`, of the arguments' common shape; the displacement's needs no radius.

    Raises:
        ValueError, TypeError: an argument out of its range, outside a trace.

    Source:
        Chizat, Oyallon, Bach (2019), theorem 2.2 and supplement B.1, which give the rates in alpha without constants
        (and, in a slip, the objective at t in place of the one at 0 under the root). The constants are ours: a
        smooth $R \ge 0$ has $\|\nabla R\|^2 \le 2MR$, and R falls along the flow.

    Example:
        >>> bounds = theorem_2_2(alpha=100.0, horizon=1.0, start_loss=0.5, lip_h=1.0, lip_dh=1.0, dh_norm=1.0)
        >>> print(f"{bounds.displacement_norm:.4f} {bounds.output_gap:.4f}")
        0.0071 0.0243
    """
    alpha, horizon, loss, lip_h, lip_dh, dh, smooth, radius = as_numbers(
        alpha=alpha,
        horizon=horizon,
        start_loss=start_loss,
        lip_h=lip_h,
        lip_dh=lip_dh,
        dh_norm=dh_norm,
        smoothness=smoothness,
        radius=radius,
    )
    length = jnp.sqrt(horizon) * jnp.sqrt(loss)
    slope = jnp.sqrt(2 * smooth) * jnp.sqrt(loss)
    z = smooth * dh**2 * horizon
    turn = 2 * lip_h * lip_dh * length * slope * horizon
    output_gap = grown(turn, 1 / alpha, z, 1)
    # (C1/C2) ((e^{C2 T} - 1)/C2 - T) is C1 T^2 phi_2(C2 T).
    param_gap = lip_dh * length * slope * horizon / alpha / alpha
    param_gap += grown(dh * smooth * turn * horizon / alpha, 1 / alpha, z, 2)
    displacement = length / alpha
    return _on_ball(displacement, output_gap, param_gap, _within(displacement, radius))


@checked
def theorem_2_2_radius(*, alpha: Number, horizon: Number, start_loss: Number) -> Float[Array, "..."]:
    r"""Return $\sqrt{TR_0}/\alpha$, the radius around w0 that the flow does not leave, for `theorem_2_2`.

    Args:
        alpha: Output scale in (0, inf].
        horizon: T, flow time.
        start_loss: $R_0 = R(\alpha h(w_0))$.

    Raises:
        ValueError, TypeError: an argument out of its range, outside a trace.

    Source:
        Chizat, Oyallon, Bach (2019), supplement B.1: $\int_0^T |w_\alpha'|^2 = F_\alpha(w_0) - F_\alpha(w_\alpha(T))$.

    Example:
        >>> print(theorem_2_2_radius(alpha=10.0, horizon=4.0, start_loss=0.25))
        0.1
    """
    alpha, horizon, loss = as_numbers(alpha=alpha, horizon=horizon, start_loss=start_loss)
    return jnp.sqrt(horizon) * jnp.sqrt(loss) / alpha


@checked
def theorem_2_3(
    *,
    alpha: Number,
    horizon: Number,
    residual_norm: Number,
    lip_h: Number,
    lip_dh: Number,
    radius: Number = jnp.inf,
    printed: bool = False,
) -> HorizonBounds:
    r"""Bound the flows on a finite horizon, square loss: by powers of T, not exponentially.

    With the iteration number $K = TL^2$, $L = Lip(h)$, $L_1 = Lip(Dh)$ on the closed ball of the radius r, and
    $D = \|\alpha h(w_0) - y^*\|_F$, for all t in [0, T]

    $$|w_\alpha - w_0| \le \frac{KD}{\alpha L}, \qquad
      \|y - \bar y\|_F \le \frac{K^2}{\alpha}\frac{L_1}{L^2}D^2, \qquad
      |w_\alpha - \bar w_\alpha| \le \frac{K^2}{\alpha^2}\frac{L_1}{L^3}D^2\Bigl(\frac12 + \frac K3\Bigr)$$

    as long as $\alpha \ge KD/(rL)$. It does not need h(w0) = 0.

    Args:
        alpha: Output scale in (0, inf]; at inf all bounds are 0.
        horizon: T, flow time.
        residual_norm: D.
        lip_h: L, of h from the Euclidean metric to F's; after the fact, the supremum of $\|Dh(w_\alpha(t))\|$.
        lip_dh: $L_1$; after the fact, the supremum of $\|Dh(w_\alpha(t)) - Dh(w_0)\| / |w_\alpha(t) - w_0|$.
        radius: r, of the ball on which they hold; `theorem_2_3_radius` gives the smallest that will do.
        printed: With $2 + 4K/3$ in place of $\frac12 + \frac K3$, as in the supplement: true too, 4 times larger.

    Returns:
        `HorizonBounds`, of the arguments' common shape.

    Raises:
        ValueError, TypeError: an argument out of its range, outside a trace.

    Source:
        Chizat, Oyallon, Bach (2019), theorem 2.3 and supplement B.2. The last step there integrates t and $t^2$ with
        constants four times too large.

    Example:
        >>> bounds = theorem_2_3(alpha=100.0, horizon=1.0, residual_norm=1.0, lip_h=1.0, lip_dh=1.0)
        >>> print(f"{bounds.output_gap:.4f} {1e4 * bounds.param_gap:.4f}")
        0.0100 0.8333
    """
    alpha, horizon, residual, lip_h, lip_dh, radius = as_numbers(
        alpha=alpha, horizon=horizon, residual_norm=residual_norm, lip_h=lip_h, lip_dh=lip_dh, radius=radius
    )
    iterations = horizon * lip_h**2
    displacement = horizon * lip_h * residual / alpha
    turn = horizon * lip_dh * residual
    factor = 2 + 4 * iterations / 3 if printed else 0.5 + iterations / 3
    admissible = _within(displacement, radius)
    moved = jnp.where(admissible, displacement, jnp.inf)
    return _on_ball(moved, displacement * lip_h * turn, displacement * (turn / alpha) * factor, admissible)


@checked
def theorem_2_3_radius(
    *, alpha: Number, horizon: Number, residual_norm: Number, dh_norm: Number, lip_dh: Number
) -> Float[Array, "..."]:
    r"""Return the smallest r that `theorem_2_3` admits with $Lip(h) = \|Dh(w_0)\| + rL_1$ on the ball of radius r.

    The condition $r \ge T\,Lip(h)\,D/\alpha$ is $r \ge a(\|Dh(w_0)\| + rL_1)$ with $a = TD/\alpha$. Its smallest
    solution is $r = a\|Dh(w_0)\|/(1 - aL_1)$ if $aL_1 < 1$; otherwise there is none.

    Args:
        alpha: Output scale in (0, inf].
        horizon: T, flow time.
        residual_norm: $D = \|\alpha h(w_0) - y^*\|_F$.
        dh_norm: $\|Dh(w_0)\|$ in F's metric.
        lip_dh: $L_1 = Lip(Dh)$, on a ball at least as large as the result.

    Returns:
        r; inf if no radius will do: the horizon is too long for alpha, and then `theorem_2_3` says nothing.

    Raises:
        ValueError, TypeError: an argument out of its range, outside a trace.

    Source:
        Chizat, Oyallon, Bach (2019), theorem 2.3, whose condition on alpha is this one on r.

    Example:
        >>> print(theorem_2_3_radius(alpha=10.0, horizon=5.0, residual_norm=1.0, dh_norm=1.0, lip_dh=1.0))
        1.0
        >>> print(theorem_2_3_radius(alpha=10.0, horizon=10.0, residual_norm=1.0, dh_norm=1.0, lip_dh=1.0))
        inf
    """
    alpha, horizon, residual, dh, lip_dh = as_numbers(
        alpha=alpha, horizon=horizon, residual_norm=residual_norm, dh_norm=dh_norm, lip_dh=lip_dh
    )
    reach = horizon * residual / alpha
    left = 1 - reach * lip_dh
    radius = jnp.where(left > 0, reach * dh / jnp.where(left > 0, left, 1), jnp.inf)
    return jnp.where(reach * dh == 0, 0, radius)


@checked
def lip_sigma(*, lip_h: Number, lip_dh: Number) -> Float[Array, "..."]:
    r"""Bound $Lip(\Sigma) \le 2\,Lip(h)\,Lip(Dh)$ for the tangent kernel $\Sigma(w) = Dh(w)Dh(w)^*$, in operator norm.

    Args:
        lip_h: Lipschitz constant of h, on a set.
        lip_dh: Lipschitz constant of Dh, on the same set.

    Raises:
        ValueError, TypeError: an argument out of its range, outside a trace.

    Source:
        Chizat, Oyallon, Bach (2019), supplement B.2, step 2.

    Example:
        >>> print(lip_sigma(lip_h=3.0, lip_dh=0.5))
        3.0
    """
    lip_h, lip_dh = as_numbers(lip_h=lip_h, lip_dh=lip_dh)
    return 2 * lip_h * lip_dh


def _within(displacement: Array, radius: Array) -> Array:
    """Return whether a displacement is at most the radius, up to rounding: the smallest radius is equal to it."""
    return displacement <= radius * (1 + 8 * jnp.finfo(radius.dtype).eps)


def _on_ball(displacement: Array, output_gap: Array, param_gap: Array, admissible: Array) -> HorizonBounds:
    return HorizonBounds(
        displacement_norm=displacement,
        output_gap=jnp.where(admissible, output_gap, jnp.inf),
        param_gap=jnp.where(admissible, param_gap, jnp.inf),
        admissible=admissible,
    )
