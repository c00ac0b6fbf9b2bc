r"""What one gradient step already tells: how much faster the objective changes than the differential.

Norms in F are in the metric of the loss (see `lazyjax.losses`), norms of parameters are Euclidean.
"""

import math
from collections.abc import Callable

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Float, PRNGKeyArray

from lazyjax._core.checks import check_alpha, is_concrete
from lazyjax._core.keys import default_key
from lazyjax._core.show import show
from lazyjax._core.trees import tree_norm
from lazyjax._core.types import Model, Outputs, Params, RealScalar
from lazyjax.flow.field import make_field
from lazyjax.flow.start import check_start
from lazyjax.laziness.hessian_norm import SecondDerivative, check_starts, norm_lower
from lazyjax.laziness.jacobian_change import relative_change
from lazyjax.laziness.sample_hessians import inputs_as_arguments
from lazyjax.losses.loss import Loss, as_loss
from lazyjax.models.maps import without_constant
from lazyjax.models.tangent import linearize, singular_values


class StepCriterion(eqx.Module):
    r"""The effect of one gradient step; made by `step_criterion`.

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

    def __str__(self) -> str:
        """Show the ratio and the two changes."""
        return show(
            self,
            self.ratio,
            0,
            lambda: (
                f"one gradient step of size {self.step_size:.3g}: jacobian_change / objective_change = "
                f"{self.ratio:.3g}\n"
                f"  F changes by {self.objective_change:.3g} of itself, Dh by {self.jacobian_change:.3g}"
            ),
        )

    __repr__ = __str__


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
        step_size: $\eta$; None: $1/(M \|Dh(w_0)\|^2)$ with the loss's smoothness M (1 if it declares none).
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
    if step_size is not None and is_concrete(step_size) and not step_size > 0:
        msg = f"step_size must be positive, got {step_size}."
        raise ValueError(msg)
    h, loss, scale, zero_start = _check_problem(h, loss, w0, alpha)
    eta = None if step_size is None else jnp.asarray(step_size, float)
    found, value, gradient_norm = _step(h, loss, w0, scale, eta, key, zero_start)
    _check_moving(value, gradient_norm)
    return found


@eqx.filter_jit
def _step(
    h: Model, loss: Loss, w0: Params, alpha: Array, eta: Array | None, key: PRNGKeyArray | None, zero_start: bool
) -> tuple[StepCriterion, Array, Array]:
    """Return the criterion, and the loss and the norm of the gradient at the start."""
    field = make_field(h, loss, w0, alpha, zero_start=zero_start)
    dh_norm = singular_values(linearize(h, w0), loss, key=key).largest
    if eta is None:
        eta = 1 / (_smoothness(loss) * dh_norm**2)
    eta = eta.astype(dh_norm.dtype)
    u0 = jtu.tree_map(jnp.zeros_like, field.coordinates)
    velocity = field(u0)
    u1 = jtu.tree_map(lambda g: eta.astype(g.dtype) * g, velocity)
    before, after = loss(field.outputs(u0)), loss(field.outputs(u1))
    objective_change = jnp.abs(after - before) / before
    change = relative_change(h, loss, w0, u1, field.eps, num_matvecs=50, key=key)
    jacobian_change = change * field.eps * tree_norm(u1) / dh_norm
    found = StepCriterion(eta, objective_change, jacobian_change, jacobian_change / objective_change)
    return found, before, tree_norm(velocity)


def _smoothness(loss: Loss) -> float:
    """Return the smoothness M that a loss declares, 1 if it declares none."""
    declared = loss.smoothness
    return declared if declared is not None and math.isfinite(declared) else 1.0


def _check_moving(value: Array, gradient_norm: Array) -> None:
    """Refuse a start at which nothing is left to train: the ratios would be 0/0."""
    if is_concrete((value, gradient_norm)) and not (float(value) > 0 and float(gradient_norm) > 0):
        msg = (
            f"w0 must not be a stationary point, but R = {float(value):.3g} there and the gradient's norm is "
            f"{float(gradient_norm):.3g}; start from another w0."
        )
        raise ValueError(msg)


def _check_problem(
    h: Model, loss: Loss | Callable[[Outputs], RealScalar], w0: Params, alpha: RealScalar
) -> tuple[Model, Loss, Array, bool]:
    """Check the arguments; return model, loss and scale for the compiled programs, and whether the start is zero."""
    h, loss = inputs_as_arguments(h), as_loss(loss)
    check_alpha(alpha)
    zero_start = check_start(h, loss, w0, alpha, rtol=1e-6)
    return h, loss, jnp.asarray(alpha, float), zero_start


def lazy_ratio(
    h: Model,
    loss: Loss | Callable[[Outputs], RealScalar],
    w0: Params,
    *,
    alpha: RealScalar = 1.0,
    starts: int = 10,
    key: PRNGKeyArray | None = None,
) -> Float[Array, ""]:
    r"""Return $F_\alpha \|D^2(\alpha h)\| / (\|\nabla F_\alpha\| \|D(\alpha h)\|)$ at w0: far below 1 is lazy.

    Unlike $\kappa$, it sees whether the residual is aligned with Dh: always lazy_ratio >= kappa/2 for the square
    loss. $\|D^2h\|$ is the largest found in a search, so the value is a lower estimate; `kappa` gives an upper one.

    Args:
        h: Model h(w), smooth (a ReLU's kinks have no second derivative and are not seen).
        loss: R on outputs.
        w0: Start.
        alpha: Output scale in (0, inf].
        starts: Random starts of the search; one alone often misses the maximum.
        key: For the random starts; None for a fixed one.

    Returns:
        The ratio, a number.

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
    h, loss, scale, zero_start = _check_problem(h, loss, w0, alpha)
    ratio, value, gradient_norm = _ratio(h, loss, w0, scale, starts, key, zero_start)
    _check_moving(value, gradient_norm)
    return ratio


@eqx.filter_jit
def _ratio(
    h: Model, loss: Loss, w0: Params, alpha: Array, starts: int, key: PRNGKeyArray | None, zero_start: bool
) -> tuple[Array, Array, Array]:
    """Return the lazy ratio, and the loss and the norm of the gradient at the start."""
    field, tangent = make_field(h, loss, w0, alpha, zero_start=zero_start), linearize(h, w0)
    form = SecondDerivative(without_constant(h), w0, loss.weight**0.5)
    d2h_norm = norm_lower(form, tangent.outputs.size, default_key(key), starts)
    dh_norm = singular_values(tangent, loss, key=key).largest
    gradient_norm = tree_norm(field(jtu.tree_map(jnp.zeros_like, field.coordinates)))
    value = loss(field.start)
    return field.eps * value * d2h_norm / (gradient_norm * dh_norm), value, gradient_norm
