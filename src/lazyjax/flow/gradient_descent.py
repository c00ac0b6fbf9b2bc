r"""Gradient descent on $F_\alpha$ by any optax optimizer, in the displacement coordinates of the flows."""

from collections.abc import Callable
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import optax
from jaxtyping import Array, Float

from lazyjax._core.checks import check_alpha, is_concrete
from lazyjax._core.types import Model, Outputs, Params, RealScalar
from lazyjax.flow.displacement_step import check_optimizer, check_proportional, displacement_step
from lazyjax.flow.field import ScaledObjective
from lazyjax.flow.result import RESULTS, Result, as_result, check_successful
from lazyjax.flow.start import check_start
from lazyjax.losses.loss import Loss, as_loss


class Descent(eqx.Module):
    r"""The end of a gradient descent; made by `gradient_descent`.

    Attributes:
        params: The final w, of w0's structure.
        displacement: The final $u = \alpha(w - w_0)$, a tree of w0's coordinates: exact where w - w0 rounds.
        outputs: The final $\alpha h(w)$, (n,) or (n, k).
        loss: $R(\alpha h(w))$ before each step, (steps,).
        alpha: The scale.
        result: `RESULTS.successful`, or `RESULTS.nonfinite` if the loss or the outputs became NaN or infinite.
    """

    params: Params
    displacement: Params
    outputs: Outputs
    loss: Float[Array, " steps"]
    alpha: Float[Array, ""]
    result: Result

    def __str__(self) -> str:
        """Return the loss at the first and the last step, in a line per lane if there are lanes."""
        if not is_concrete(self):
            return eqx.tree_pformat(self)
        alphas, results = np.ravel(self.alpha), np.ravel(jtu.tree_leaves(self.result)[0])
        losses = np.reshape(self.loss, (alphas.size, -1))
        (fine,) = jtu.tree_leaves(RESULTS.successful)
        lines = [
            f"  alpha = {alpha:<8.4g} loss {one[0]:.4g} at the first step, {one[-1]:.4g} at the last"
            + ("" if result == fine else " (became NaN or infinite)")
            for alpha, one, result in zip(alphas, losses, results, strict=True)
        ]
        return "\n".join([f"Descent of {losses.shape[1]} steps", *lines])

    __repr__ = __str__


def gradient_descent(
    h: Model,
    loss: Loss | Callable[[Outputs], RealScalar],
    w0: Params,
    optimizer: optax.GradientTransformation,
    steps: int,
    *,
    alpha: RealScalar = 1.0,
    progress: bool = False,
    throw: bool = True,
) -> Descent:
    r"""Minimize $F_\alpha(w) = R(\alpha h(w))/\alpha^2$ by an optax optimizer from w0, all steps in one scan.

    The optimizer sees the true gradient $\nabla F_\alpha(w)$ and the parameters w; its updates are added to
    $u = \alpha(w - w_0)$, where they keep their digits at large alpha. A step of `optax.sgd(eta)` advances the
    flow time by eta.

    Args:
        h: Model h(w) with outputs (n,) or (n, k), the data inside; or a `Tangent`.
        loss: R on outputs.
        w0: Start; any pytree, its floating arrays are the coordinates.
        optimizer: Any optax optimizer. Those that divide by the gradient's size (Adam) do not become lazy:
            their steps in w do not shrink with alpha. A line search (as in `optax.lbfgs`) asks for the objective
            at parameters w, and w - w0 rounds: use it only if alpha times rounding is small.
        steps: Number of steps.
        alpha: Output scale in (0, inf]; inf needs h(w0) = 0 and an optimizer whose updates are proportional to
            the gradients (SGD with or without momentum), which has a limit.
        progress: Show a progress bar.
        throw: Raise if the loss became NaN or infinite.

    Returns:
        `Descent`.

    Raises:
        ValueError, TypeError: bad arguments, seen before any step is taken.
        equinox.EquinoxRuntimeError: `throw` and the loss became NaN or infinite.

    Source:
        Chizat, Oyallon, Bach (2019), section 3 (experiments by gradient descent); Smith's report, section 2.

    Example:
        >>> from lazyjax import square_loss
        >>> descent = gradient_descent(lambda w: w, square_loss(jnp.zeros(1)), jnp.ones(1), optax.sgd(0.5), 2)
        >>> print(descent.params)
        [0.25]
    """
    loss = as_loss(loss)
    check_alpha(alpha)
    if not isinstance(steps, (int, np.integer)) or steps < 1:
        msg = f"steps must be a whole number of at least 1, got {steps!r}."
        raise ValueError(msg)
    check_optimizer(optimizer)
    zero_start = check_start(h, loss, w0, alpha, rtol=1e-6)
    if is_concrete((alpha, w0)) and bool(np.isinf(alpha)):
        check_proportional(optimizer, eqx.filter(w0, eqx.is_inexact_array))
    objective = ScaledObjective.of(h, loss, w0, alpha, zero_start)
    descent = _gradient_descent(objective, optimizer, int(steps), progress=progress, throw=throw)
    return check_successful(descent.result, descent) if throw else descent


@eqx.filter_jit
def _gradient_descent(
    objective: ScaledObjective, optimizer: optax.GradientTransformation, steps: int, *, progress: bool, throw: bool
) -> Descent:
    field = objective.field(throw=throw)
    alpha = objective.alpha.astype(field.start.dtype)
    meter: Any = diffrax.TqdmProgressMeter() if progress else diffrax.NoProgressMeter()

    def value_of(u: Params) -> Array:
        return field.loss(field.outputs(u))

    def step(carry: tuple[Params, Any, Any], i: Array) -> tuple[tuple[Params, Any, Any], Array]:
        u, state, meter_state = carry
        value = value_of(u)
        slope = jtu.tree_map(jnp.negative, field(u))
        u, state = displacement_step(
            optimizer, state, u, slope, w0=field.coordinates, alpha=alpha, value=value, value_of=value_of
        )
        return (u, state, meter.step(meter_state, i / steps)), value

    u0 = jtu.tree_map(jnp.zeros_like, field.coordinates)
    carry = (u0, optimizer.init(field.coordinates), meter.init())
    (u, _, meter_state), values = jax.lax.scan(step, carry, jnp.arange(steps))
    meter.close(meter_state)
    outputs = field.outputs(u)
    finite = jnp.all(jnp.isfinite(values)) & jnp.all(jnp.isfinite(outputs))
    where = RESULTS.where(finite, RESULTS.successful, RESULTS.nonfinite)  # pyright: ignore[reportArgumentType]
    result = as_result(where)
    return Descent(eqx.combine(field.moved(u), field.rest), u, outputs, values, alpha, result)
