r"""What one gradient step already tells: how much faster the objective changes than the differential.

Norms in F are in the metric of the loss (see `lazyjax.loss`), norms of parameters are Euclidean.
"""

from collections.abc import Callable

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Float, PRNGKeyArray

from lazyjax._core.checks import check_alpha, is_concrete
from lazyjax._core.keys import default_key
from lazyjax._core.trees import tree_norm
from lazyjax._core.types import Model, Outputs, Params, RealScalar
from lazyjax.flow.field import ModelField, TangentField, check_start, make_field
from lazyjax.laziness.hessian_norm import SecondDerivative, check_starts, norm_lower
from lazyjax.laziness.jacobian_change import change_quotient
from lazyjax.losses.losses import Loss
from lazyjax.losses.user_loss import as_loss
from lazyjax.models.maps import without_constant
from lazyjax.models.tangent import Tangent, linearize, singular_values


class StepCriterion(eqx.Module):
    r"""What one gradient step does; made by `step_criterion`.

    Attributes:
        step_size: $\eta$, flow time.
        objective_change: $\Delta F = |F_\alpha(w_1) - F_\alpha(w_0)| / F_\alpha(w_0)$.
        jacobian_change: $\Delta Dh = \|Dh(w_1) - Dh(w_0)\| / \|Dh(w_0)\|$.
        ratio: $\Delta Dh / \Delta F$; far below 1 is lazy.
    """

    step_size: Float[Array, ""]
    objective_change: Float[Array, ""]
    jacobian_change: Float[Array, ""]
    ratio: Float[Array, ""]


def step_criterion(
    h: Model,
    loss: Loss | Callable[[Outputs], RealScalar],
    w0: Params,
    *,
    alpha: RealScalar = 1.0,
    step_size: RealScalar | None = None,
    key: PRNGKeyArray | None = None,
) -> StepCriterion:
    r"""Compare the relative changes of the objective and of the differential in one gradient step.

    Args:
        h: Model h(w).
        loss: R on outputs.
        w0: Start.
        alpha: Output scale in (0, inf].
        step_size: $\eta$; None: $1/(M \|Dh(w_0)\|^2)$ with the loss's smoothness M (1 for a loss of your own).
        key: For the Lanczos start; None for a fixed one.

    Returns:
        `StepCriterion`, operator norms by Lanczos, the change of Dh without cancellation.

    Raises:
        ValueError, TypeError: as `gradient_flow`; a step size that is not positive.

    Source:
        Chizat, Oyallon, Bach (2019), section 1.2.

    Example:
        >>> from lazyjax import square_loss
        >>> step = step_criterion(lambda w: jnp.sin(w), square_loss(jnp.ones(2)), jnp.zeros(2), alpha=1e6)
        >>> bool(step.ratio < 1e-6)
        True
    """
    loss, field, tangent = _at_start(h, loss, w0, alpha)
    dh_norm = singular_values(tangent, loss, key=key).largest
    if step_size is None:
        step_size = 1 / (getattr(loss, "smoothness", 1.0) * dh_norm**2)
    eta = jnp.asarray(step_size, dh_norm.dtype)
    if is_concrete(eta) and not eta > 0:
        msg = f"step_size must be positive, got {step_size}."
        raise ValueError(msg)
    u0 = jtu.tree_map(jnp.zeros_like, field.coordinates)
    u1 = jtu.tree_map(lambda g: eta.astype(g.dtype) * g, field(u0))
    before, after = loss(field.outputs(u0)), loss(field.outputs(u1))
    _check_moving(before, field(u0))
    objective_change = jnp.abs(after - before) / before
    quotient = change_quotient(h, loss, w0, u1, field.eps, num_matvecs=50, key=key)
    jacobian_change = quotient * field.eps * tree_norm(u1) / dh_norm
    return StepCriterion(eta, objective_change, jacobian_change, jacobian_change / objective_change)


def _check_moving(value: Array, gradient: Params) -> None:
    """Refuse a start where nothing is left to train: the ratios would be 0/0."""
    if is_concrete((value, gradient)) and not (value > 0 and tree_norm(gradient) > 0):
        msg = (
            f"w0 must not be a stationary point, but R = {float(value):.3g} there and the gradient's norm is "
            f"{float(tree_norm(gradient)):.3g}; start from another w0."
        )
        raise ValueError(msg)


def _at_start(
    h: Model, loss: Loss | Callable[[Outputs], RealScalar], w0: Params, alpha: RealScalar
) -> tuple[Loss, ModelField | TangentField, Tangent]:
    loss = as_loss(loss)
    check_alpha(alpha)
    zero_start = check_start(h, loss, w0, alpha, rtol=1e-6)
    field = make_field(h, loss, w0, alpha, zero_start=zero_start)
    return loss, field, linearize(h, w0)


def lazy_ratio(
    h: Model,
    loss: Loss | Callable[[Outputs], RealScalar],
    w0: Params,
    *,
    alpha: RealScalar = 1.0,
    starts: int = 10,
    key: PRNGKeyArray | None = None,
) -> Float[Array, ""]:
    r"""$F_\alpha \|D^2(\alpha h)\| / (\|\nabla F_\alpha\| \|D(\alpha h)\|)$ at w0: far below 1 is lazy.

    Unlike $\kappa$, it sees whether the residual is aligned with Dh: always lazy_ratio >= kappa/2 for the square
    loss. $\|D^2h\|$ is the largest found in a search, so the value is a lower estimate; `kappa` gives an upper one.

    Args:
        h: Model h(w), smooth (a ReLU's kinks have no second derivative and are not seen).
        loss: R on outputs.
        w0: Start.
        alpha: Output scale in (0, inf].
        starts: Random starts of the search; one alone often misses the maximum.
        key: For the random starts; None for a fixed one.

    Raises:
        ValueError, TypeError: as `gradient_flow`; `starts` below 1.

    Source:
        Chizat, Oyallon, Bach (2019), section 1.2.

    Example:
        >>> from lazyjax import square_loss
        >>> print(f"{lazy_ratio(lambda w: w + w**2, square_loss(jnp.ones(1)), jnp.zeros(1)):.3f}")
        1.000
    """
    check_starts(starts)
    loss, field, tangent = _at_start(h, loss, w0, alpha)
    form = SecondDerivative(without_constant(h), w0, loss.weight**0.5)
    d2h_norm = norm_lower(form, tangent.outputs.size, default_key(key), starts)
    dh_norm = singular_values(tangent, loss, key=key).largest
    gradient = field(jtu.tree_map(jnp.zeros_like, field.coordinates))
    _check_moving(loss(field.start), gradient)
    gradient_norm = tree_norm(gradient)
    return field.eps * loss(field.start) * d2h_norm / (gradient_norm * dh_norm)
