r"""Next to the theorems: test outputs, wide nets, homogeneous models, and an inequality that is false."""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from lazyjax.theory.bounds.arguments import Number, as_numbers, checked


class HomogeneousFlow(eqx.Module):
    r"""The factors that turn a flow from a larger start into one at a larger scale; made by `homogeneous_flow`.

    Attributes:
        alpha: $\lambda^q$, the equivalent output scale.
        param_factor: $1/\lambda$, from the parameters of the flow from $\lambda w_0$ to $w_\alpha$.
        time_factor: $\lambda^{2-2q}$, from the time of $w_\alpha$ to that of the flow of R(h).
        scaled_time_factor: $\lambda^2$, to that of the flow of $R(h)/\alpha^2$.
    """

    alpha: Float[Array, "..."]
    param_factor: Float[Array, "..."]
    time_factor: Float[Array, "..."]
    scaled_time_factor: Float[Array, "..."]


@checked
def proposition_a_1(
    *,
    alpha: Number,
    displacement_norm: Number,
    param_gap: Number,
    dh_norm: Number,
    lip_dh: Number,
    printed: bool = False,
) -> Float[Array, "..."]:
    r"""Bound the distance to the tangent model on inputs beyond the training set.

    At every input x of a set X,

    $$|\alpha f(w_\alpha, x) - \alpha\bar f(\bar w_\alpha, x)| \le
      \alpha M_1|w_\alpha - \bar w_\alpha| + \frac\alpha2M_2|w_\alpha - w_0|^2.$$

    With $|w_\alpha - \bar w_\alpha| \le C\log\alpha/\alpha^2$ and $|w_\alpha - w_0| \le C'\log\alpha/\alpha$,
    as in the paper, it is $\frac{\log\alpha}\alpha(CM_1 + \frac12C'^2M_2\log\alpha)$;
    with those of `theorem_2_4`, O(1/alpha).

    Args:
        alpha: Output scale in (0, inf]; at inf give gap and displacement 0, and the bound is 0.
        displacement_norm: $|w_\alpha - w_0|$, measured or bounded.
        param_gap: $|w_\alpha - \bar w_\alpha|$, measured or bounded.
        dh_norm: $M_1 = \sup_X\|D_wf(w_0, x)\|$, one input at a time, the Euclidean norm in R^k.
        lip_dh: $M_2 = \sup_XLip(w \mapsto D_wf(w, x))$.
        printed: With the square of the gap in place of that of the displacement, as in the supplement's proof.
            **False** wherever h curves: the gap falls faster than the displacement.

    Returns:
        The bound, in the outputs' Euclidean norm in R^k.

    Raises:
        ValueError, TypeError: an argument out of its range, outside a trace.

    Source:
        Chizat, Oyallon, Bach (2019), supplement, proposition A.1, whose statement lacks the assumption on
        $|w_\alpha - w_0|$ and whose proof puts $|w_\alpha - \bar w_\alpha|$ in its place.

    Example:
        >>> print(f"{proposition_a_1(alpha=10.0, displacement_norm=0.1, param_gap=0.01, dh_norm=1.0, lip_dh=2.0):.3f}")
        0.200
    """
    alpha, moved, gap, dh, lip_dh = as_numbers(
        alpha=alpha, displacement_norm=displacement_norm, param_gap=param_gap, dh_norm=dh_norm, lip_dh=lip_dh
    )
    second = gap if printed else moved
    return _times(alpha, dh * gap) + 0.5 * _times(alpha, second) * lip_dh * second


def _times(alpha: Array, size: Array) -> Array:
    """Return the product of alpha and a size, 0 if the size is 0: at alpha = inf too."""
    return jnp.where(size == 0, 0, alpha * size)


@checked
def kappa_two_layer(
    *, width: Number, alpha: Number, target_norm: Number, phi_sq: Number, dphi_sq: Number, lip_dphi: Number
) -> Float[Array, "..."]:
    r"""Bound the criterion $\kappa$ of a wide two-layer net $h = \alpha(m)\sum_{i \le m}\phi(\theta_i)$.

    For independent $\theta_i$ with $E\phi = 0$ and $D\phi \ne 0$,

    $$\frac{E\|h(w_0) - y^*\|\,\sup\|D^2h(w_0)\|}{E\|Dh(w_0)\|^2} \le \frac{Lip(D\phi)}{\|E[D\phi D\phi^*]\|}
      \Bigl(\sqrt{E\|\phi\|^2}\;m^{-1/2} + \frac{\|y^*\|}{m\,\alpha(m)}\Bigr).$$

    So a net is lazy as long as $m\,\alpha(m) \to \infty$: with $m^{-1/2}$, but not with the mean field's $1/m$.

    It bounds **a ratio of expectations**, at every width, and not the expectation of $\kappa$: that would need
    $\|Dh(w_0)\|$ not to be small too often. For wide nets, where it concentrates, the two agree.

    Args:
        width: m.
        alpha: $\alpha(m)$, the scale of the sum over neurons.
        target_norm: $\|y^*\|_F$.
        phi_sq: $E\|\phi(\theta)\|_F^2$, of one neuron.
        dphi_sq: $\|E[D\phi(\theta)D\phi(\theta)^*]\|$, the largest eigenvalue of one neuron's mean tangent kernel in F.
        lip_dphi: $Lip(D\phi)$, at least $\|D^2\phi\|$ over the law of $\theta$.

    Returns:
        The right-hand side.

    Raises:
        ValueError, TypeError: an argument out of its range, outside a trace.

    Source:
        Chizat, Oyallon, Bach (2019), section 1.2 and supplement A.2: $E\|h\|^2 = m\alpha^2E\|\phi\|^2$,
        $E\|Dh\|^2 \ge m\alpha^2\|E[D\phi D\phi^*]\|$ (there in the limit; it holds at every m because the norm is
        convex) and $\|D^2h\| = \alpha\max_i\|D^2\phi(\theta_i)\|$ (there without the norm in F).

    Example:
        >>> kappa = kappa_two_layer(width=100, alpha=0.1, target_norm=1.0, phi_sq=1.0, dphi_sq=1.0, lip_dphi=1.0)
        >>> print(f"{kappa:.3f}")
        0.200
    """
    width, alpha, target, phi_sq, dphi_sq, lip_dphi = as_numbers(
        width=width, alpha=alpha, target_norm=target_norm, phi_sq=phi_sq, dphi_sq=dphi_sq, lip_dphi=lip_dphi
    )
    return lip_dphi / dphi_sq * (jnp.sqrt(phi_sq / width) + target / (width * alpha))


@checked
def homogeneous_flow(q: Number, lam: Number) -> HomogeneousFlow:
    r"""Return the scale, and the factors of parameters and time, that a larger start is equivalent to.

    For $h(\lambda w) = \lambda^qh(w)$ and $\alpha = \lambda^q$,

    $$w_\alpha(t) = \tfrac1\lambda v(\lambda^{2-2q}t) = \tfrac1\lambda\tilde v(\lambda^2t),$$

    v the gradient flow of R(h), $\tilde v$ that of $R(h)/\alpha^2$, both from $\lambda w_0$. So
    `gradient_flow(h, loss, w0, ts, alpha=e.alpha).params` is `e.param_factor` times `.params` of
    `gradient_flow(h, loss, lam * w0, e.time_factor * ts)`.

    Args:
        q: Degree of homogeneity; a net of q layers without biases has it with ReLU or the identity.
        lam: $\lambda$, the factor of the start.

    Returns:
        `HomogeneousFlow`: the scale and the factors of parameters and time.

    Raises:
        ValueError, TypeError: an argument not positive, outside a trace.

    Source:
        Chizat, Oyallon, Bach (2019), section 1.2 (in its footnote 4, and in Smith's report section 2, without
        the factor of time, which is needed).

    Example:
        >>> e = homogeneous_flow(2, 10.0)
        >>> print(f"{e.alpha:.0f} {e.param_factor:.1f} {e.time_factor:.2f} {e.scaled_time_factor:.0f}")
        100 0.1 0.01 100
    """
    q, lam = as_numbers(q=q, lam=lam)
    return HomogeneousFlow(lam**q, 1 / lam, lam ** (2 - 2 * q), lam**2)


@checked
def smith_inequality(first: Number, second: Number, *, printed: bool = False) -> Float[Array, "..."]:
    r"""Return a lower bound of $|(A - B)^Tf|^2$ from the two norms: $(|A^Tf| - |B^Tf|)^2$.

    With A = Dh(w0) and B = Dh(w) it gives $\Sigma(w) \ge \sigma_{min}^2/4$ where $Lip(Dh)|w - w_0| \le \sigma_{min}/2$:
    $|Dh(w)^*f| \ge (\sigma_{min} - \sigma_{min}/2)|f|$. That is sharp: $h = \sigma w - \frac{L_1}2w^2$.

    Args:
        first: $|A^Tf|$.
        second: $|B^Tf|$.
        printed: $\bigl||A^Tf|^2 - |B^Tf|^2\bigr|$. **False**: A = 1/2, B = 1, f = 1 has 1/4 on the left and 3/4 on
            the right. With it $\Sigma(w) \ge \frac34\sigma_{min}^2$ would follow, and a rate $3m\sigma_{min}^2/4$.

    Raises:
        ValueError, TypeError: an argument negative, outside a trace.

    Source:
        Smith's report, proof of theorem 2.4, where the inequality has the squares inside.

    Example:
        >>> print(smith_inequality(0.5, 1.0), smith_inequality(0.5, 1.0, printed=True))
        0.25 0.75
    """
    first, second = as_numbers(first=first, second=second)
    gap = jnp.abs(first - second)
    return gap * (first + second) if printed else gap**2
