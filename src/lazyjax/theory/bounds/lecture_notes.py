r"""The lecture notes' theorem 2 and lemmas 4 to 6: $L(z) = \frac12|z - y|^2$, plain Euclidean norms, faster time.

Two conventions differ from the paper's. F is R^n with the Euclidean metric (`square_loss(y, mean=False)`), so singular
values are those of the plain Jacobian J. And the objective $L(\alpha f(w))$ has no $1/\alpha^2$, so the same path runs
faster: the notes' flow at time t is `gradient_flow`'s at time $\alpha^2t$.
"""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from lazyjax.theory.bounds.arguments import Number, as_numbers, checked, exponent


class LectureBounds(eqx.Module):
    r"""The upper bounds at the notes' time t; made by `lecture_theorem_2`. Below the threshold the first two are inf.

    Attributes:
        loss: Bound of $L(\alpha f(w(t)))$ and of the tangent's, $L(\alpha f_0(u(t)))$.
        displacement_norm: Bound of $|w(t) - w(0)|$ and of $|u(t) - u(0)|$.
        tangent_loss: Bound of $L(\alpha f_0(u(t)))$, at any alpha.
        tangent_displacement_norm: Bound of $|u(t) - u(0)|$, at any alpha.
        alpha_threshold: What alpha must be at least.
        admissible: Whether it is.
    """

    loss: Float[Array, "..."]
    displacement_norm: Float[Array, "..."]
    tangent_loss: Float[Array, "..."]
    tangent_displacement_norm: Float[Array, "..."]
    alpha_threshold: Float[Array, "..."]
    admissible: Bool[Array, "..."]


class JacobianBounds(eqx.Module):
    r"""The bounds of the Jacobian near w(0); made by `lecture_lemma_6`.

    Attributes:
        radius: B, how far w may be from w(0).
        sigma_min: A lower bound of the smallest singular value of $J_w$.
        sigma_max: An upper bound of the largest.
    """

    radius: Float[Array, "..."]
    sigma_min: Float[Array, "..."]
    sigma_max: Float[Array, "..."]


@checked
def lecture_theorem_2(
    *,
    t: Number,
    alpha: Number,
    start_loss: Number,
    sigma_min: Number,
    sigma_max: Number,
    lip_dh: Number,
    printed: bool = False,
) -> LectureBounds:
    r"""Bound the flows at all times, square loss, Jacobian of full row rank: an exponential rate.

    With $L_0 = L(\alpha f(w(0)))$ and $\beta = Lip(J)$: if
    $\alpha \ge 6\beta\sqrt{8\sigma_{max}^2L_0}/\sigma_{min}^3$, then for all $t \ge 0$

    $$\max\{L(\alpha f(w)), L(\alpha f_0(u))\} \le L_0e^{-t\alpha^2\sigma_{min}^2/2}, \qquad
      \max\{|w - w(0)|, |u - u(0)|\} \le \frac{3\sqrt{8\sigma_{max}^2L_0}}{\alpha\sigma_{min}^2},$$

    and for the tangent flow alone, at any alpha,

    $$L(\alpha f_0(u)) \le L_0e^{-2t\alpha^2\sigma_{min}^2}, \qquad
      |u - u(0)| \le \frac{\sqrt{2\sigma_{max}^2L_0}}{\alpha\sigma_{min}^2}.$$

    It is `theorem_2_4` for the square loss, with $\|J_w\| \le \frac32\sigma_{max}$: the same threshold
    and the same displacement.

    Args:
        t: The notes' time, in [0, inf]: `gradient_flow`'s over $\alpha^2$.
        alpha: Output scale in (0, inf].
        start_loss: $L_0$, without 1/n.
        sigma_min: The smallest of the n singular values of $J_0$.
        sigma_max: The largest.
        lip_dh: $\beta$, from the Euclidean to the operator norm.
        printed: With $\sigma_{min}$ in place of its square in the displacement of the tangent flow, as the notes have
            it in between. **False**: f(u) = 0.1 u, y = 1, alpha = 1 moves by 10, the printed bound is 1.

    Returns:
        `LectureBounds`, of the arguments' common shape.

    Raises:
        ValueError, TypeError: an argument out of its range, outside a trace.

    Source:
        Lecture notes on lazy training, theorem 2, which is right as stated; its last display has $2\sqrt8$ and
        $\sigma_{min}^2$ under the root, where the proof gives the $3\sqrt8$ and $\sigma_{max}^2$ of the statement.

    Example:
        >>> bounds = lecture_theorem_2(t=0.0, alpha=100.0, start_loss=0.5, sigma_min=1.0, sigma_max=1.0, lip_dh=1.0)
        >>> print(f"{bounds.loss} {bounds.displacement_norm:.3f} {bounds.alpha_threshold:.3f}")
        0.5 0.060 12.000
    """
    t, alpha, loss, lowest, largest, beta = as_numbers(
        t=t, alpha=alpha, start_loss=start_loss, sigma_min=sigma_min, sigma_max=sigma_max, lip_dh=lip_dh
    )
    ratio, root = largest / lowest, jnp.sqrt(2 * loss)
    threshold = 12 * beta * ratio * (root / lowest) / lowest
    admissible = alpha >= threshold
    decay = exponent((alpha * lowest) ** 2, t)
    moved = ratio * root / alpha
    return LectureBounds(
        loss=jnp.where(admissible, loss * jnp.exp(-0.5 * decay), jnp.inf),
        displacement_norm=jnp.where(admissible, 6 * moved / lowest, jnp.inf),
        tangent_loss=loss * jnp.exp(-2 * decay),
        tangent_displacement_norm=moved if printed else moved / lowest,
        alpha_threshold=threshold,
        admissible=admissible,
    )


@checked
def lecture_lemma_4(*, t: Number, start_loss: Number, lambda_min: Number) -> Float[Array, "..."]:
    r"""Bound a loss: if $z' = -Q(s)\nabla L(z)$, $Q \ge \lambda > 0$ on [0, t], $L(z(t)) \le L(z(0))e^{-2\lambda t}$.

    Args:
        t: Time in [0, inf].
        start_loss: $L(z(0))$.
        lambda_min: $\lambda$.

    Raises:
        ValueError, TypeError: an argument out of its range, outside a trace.

    Source:
        Lecture notes on lazy training, lemma 4; its proof ends in $+2\lambda L$ for the derivative, which is
        $-2\lambda L$.

    Example:
        >>> print(f"{lecture_lemma_4(t=1.0, start_loss=1.0, lambda_min=0.5):.4f}")
        0.3679
    """
    t, loss, lowest = as_numbers(t=t, start_loss=start_loss, lambda_min=lambda_min)
    return loss * jnp.exp(-exponent(2 * lowest, t))


@checked
def lecture_lemma_5(
    *, start_loss: Number, lambda_min: Number, lambda_max: Number, printed: bool = False
) -> Float[Array, "..."]:
    r"""Bound how far a flow goes whose kernel stays well conditioned.

    If $v' = -S^T\nabla L(g(v))$, S the Jacobian of g, and the eigenvalues of $SS^T$ stay in $[\lambda, \lambda_1]$,

    $$|v(t) - v(0)| \le \frac{\sqrt{2\lambda_1L(g(v(0)))}}{\lambda}.$$

    Args:
        start_loss: $L(g(v(0)))$.
        lambda_min: $\lambda$.
        lambda_max: $\lambda_1$.
        printed: $\sqrt{2\lambda_1L/\lambda}$, the root of what the notes print for the square of the left-hand side.
            **False** for $\lambda < 1$: g(v) = 0.1 v, y = 1 from 0 has the square 100, and the printed bound is 1.

    Returns:
        The bound of $|v(t) - v(0)|$, for all t.

    Raises:
        ValueError, TypeError: an argument out of its range, outside a trace.

    Source:
        Lecture notes on lazy training, lemma 5, with the $\lambda$ of $\int e^{-\lambda s}ds$ outside the root.

    Example:
        >>> print(f"{lecture_lemma_5(start_loss=0.5, lambda_min=0.01, lambda_max=0.01):.3f}")
        10.000
    """
    loss, lowest, largest = as_numbers(start_loss=start_loss, lambda_min=lambda_min, lambda_max=lambda_max)
    squared = 2 * (largest / lowest) * loss
    return jnp.sqrt(squared) if printed else jnp.sqrt(squared) / jnp.sqrt(lowest)


@checked
def lecture_lemma_6(*, sigma_min: Number, sigma_max: Number, lip_dh: Number) -> JacobianBounds:
    r"""Bound the singular values of the Jacobian near w(0), where it stays well conditioned.

    If $|w - w(0)| \le B = \sigma_{min}/(2\beta)$, the singular values of $J_w$ are in
    $[\frac12\sigma_{min}, \frac32\sigma_{max}]$. Both ends are sharp: $f = \sigma w \mp \frac\beta2w^2$ at w = B.

    Args:
        sigma_min: The smallest of the n singular values of $J_0$.
        sigma_max: The largest.
        lip_dh: $\beta$, the Lipschitz constant of the Jacobian.

    Returns:
        `JacobianBounds`.

    Raises:
        ValueError, TypeError: an argument out of its range, outside a trace.

    Source:
        Lecture notes on lazy training, lemma 6 (where $\|J_w - J_0\| + \|J_0\|$ is at most, not equal to,
        $\beta B + \sigma_{max}$). It is the right form of what Smith's report needs for its theorem 2.4.

    Example:
        >>> bounds = lecture_lemma_6(sigma_min=1.0, sigma_max=2.0, lip_dh=0.5)
        >>> print(bounds.radius, bounds.sigma_min, bounds.sigma_max)
        1.0 0.5 3.0
    """
    lowest, largest, beta = as_numbers(sigma_min=sigma_min, sigma_max=sigma_max, lip_dh=lip_dh)
    return JacobianBounds(radius=lowest / (2 * beta), sigma_min=lowest / 2, sigma_max=1.5 * largest)
