r"""Gradient descent on $F_\alpha$ by any optax optimizer, in the displacement coordinates of the flows."""

import functools
from collections.abc import Callable
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import optax
from diffrax import RESULTS
from jaxtyping import Array, Float

from lazyjax._core.checks import check_alpha, is_concrete
from lazyjax._core.trees import tree_norm
from lazyjax._core.types import Model, Outputs, Params, RealScalar
from lazyjax.flow.field import check_start, make_field
from lazyjax.losses.losses import Loss
from lazyjax.losses.user_loss import as_loss
from lazyjax.models.tangent import Tangent, linearize


class Descent(eqx.Module):
    r"""The end of a gradient descent; made by `gradient_descent`.

    Attributes:
        params: The final w, of w0's structure.
        displacement: The final $u = \alpha(w - w_0)$, a tree of w0's coordinates: exact where w - w0 rounds.
        outputs: The final $\alpha h(w)$, (n,) or (n, k).
        losses: $R(\alpha h(w))$ before each step, (steps,).
        alpha: The scale.
        result: `diffrax.RESULTS.successful`, or `nonfinite`.
    """

    params: Params
    displacement: Params
    outputs: Outputs
    losses: Float[Array, " steps"]
    alpha: Float[Array, ""]
    result: RESULTS


def gradient_descent(
    h: Model,
    loss: Loss | Callable[[Outputs], RealScalar],
    w0: Params,
    optimizer: Any,
    steps: Any,
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
            at parameters w, and w - w0 rounds: use it where alpha times rounding is small.
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
    if not isinstance(optimizer, optax.GradientTransformation):
        msg = f"optimizer must be an optax optimizer such as optax.sgd(0.1), got {type(optimizer).__name__}."
        raise TypeError(msg)
    zero_start = check_start(h, loss, w0, alpha, rtol=1e-6)
    if is_concrete((alpha, w0)) and bool(np.isinf(alpha)):
        check_proportional(optimizer, eqx.filter(w0, eqx.is_inexact_array))
    model = (h.h, h.w0) if isinstance(h, Tangent) else (h, None)
    scale = jnp.asarray(alpha, float)
    descent = _gradient_descent(
        model, loss, w0, optimizer, int(steps), scale, zero_start=zero_start, progress=progress, throw=throw
    )
    return descent.result.error_if(descent, descent.result != RESULTS.successful) if throw else descent


PROBES = 64
"""Updates to wait for one that moves: the rate of a warm-up may begin at zero, gradients may be gathered first."""

REACH = 2.0**40
"""By how much the probing gradients are larger and smaller than 1: no clipping and no epsilon lies beyond."""


def check_proportional(optimizer: optax.GradientTransformation, coordinates: Params) -> None:
    """Refuse, at alpha = inf, an optimizer whose updates are not those for other gradients times their ratio.

    Seen from parameters 1, whatever w0: there a weight decay shows itself, though no gradient does.
    """
    with jax.ensure_compile_time_eval():  # values, even inside a user's jit
        # Never in half precision, which the small and large gradients are beyond.
        params = jtu.tree_map(lambda w: jnp.ones(w.shape, max(w.dtype, jnp.float32, key=_bits)), coordinates)
        states = [optimizer.init(params)] * 4
        for _ in range(PROBES):
            sizes, states = _probe(optimizer, states, params)
            still, once, small, large = map(float, sizes)
            # Written so that NaN is refused.
            if not (still == 0 and small <= 1e-3 * once and large <= 1e-3 * once):
                msg = (
                    "alpha=inf needs an optimizer whose updates are proportional to the gradients, such as optax.sgd "
                    "with or without momentum; adaptive steps, clipping and weight decay have no limit there. "
                    "Use a finite alpha."
                )
                raise ValueError(msg)
            if once > 0:
                return


def _bits(dtype: Any) -> int:
    return jnp.finfo(dtype).bits


@eqx.filter_jit  # compiled once an optimizer
def _probe(optimizer: optax.GradientTransformation, states: list[Any], params: Params) -> tuple[Any, list[Any]]:
    """Sizes of the updates for gradients 0 and 1, errors of those for 1/REACH and REACH, and all states after them."""

    def update(factor: float, state: Any) -> tuple[Params, Any]:
        gradient = jtu.tree_map(lambda w: jnp.full_like(w, factor), params)

        def value(w: Params) -> Array:
            return functools.reduce(jnp.add, jtu.tree_leaves(jtu.tree_map(lambda g, v: jnp.sum(g * v), gradient, w)))

        line_search = {"value": value(params), "grad": gradient, "value_fn": value}
        return optax.with_extra_args_support(optimizer).update(gradient, state, params, **line_search)

    def error(updates: Params, factor: float) -> Array:
        return tree_norm(jtu.tree_map(lambda a, b: factor * a - b, updates, once))

    factors = (0.0, 1.0, 1 / REACH, REACH)
    (still, once, small, large), later = zip(*map(update, factors, states), strict=True)
    return (tree_norm(still), tree_norm(once), error(small, REACH), error(large, 1 / REACH)), list(later)


@eqx.filter_jit
def _gradient_descent(
    model: tuple[Model, Params | None],
    loss: Loss,
    w0: Params,
    optimizer: optax.GradientTransformation,
    steps: int,
    alpha: RealScalar,
    *,
    zero_start: bool,
    progress: bool,
    throw: bool,
) -> Descent:
    h, anchor = model
    h = h if anchor is None else linearize(h, anchor)
    field = make_field(h, loss, w0, alpha, zero_start=zero_start, throw=throw)
    alpha = jnp.asarray(alpha, field.start.dtype)
    # At alpha = inf a proportional optimizer has the same steps in u as at alpha = 1.
    scale = jnp.where(jnp.isinf(alpha), 1, alpha)
    extended = optax.with_extra_args_support(optimizer)
    meter: Any = diffrax.TqdmProgressMeter() if progress else diffrax.NoProgressMeter()

    def objective(w: Params) -> Array:
        u = jtu.tree_map(lambda a, b: scale.astype(b.dtype) * (a - b), w, field.coordinates)
        return loss(field.outputs(u)) / scale**2

    def step(carry: tuple[Params, Any, Any], i: Array) -> tuple[tuple[Params, Any, Any], Array]:
        u, state, meter_state = carry
        w = field.moved(u)
        value = loss(field.outputs(u))
        gradient = jtu.tree_map(lambda g: -g / scale.astype(g.dtype), field(u))
        updates, state = extended.update(gradient, state, w, value=value / scale**2, grad=gradient, value_fn=objective)
        u = jtu.tree_map(lambda v, d: v + scale.astype(v.dtype) * d.astype(v.dtype), u, updates)
        return (u, state, meter.step(meter_state, i / steps)), value

    u0 = jtu.tree_map(jnp.zeros_like, field.coordinates)
    carry = (u0, optimizer.init(field.coordinates), meter.init())
    (u, _, meter_state), losses = jax.lax.scan(step, carry, jnp.arange(steps))
    meter.close(meter_state)
    outputs = field.outputs(u)
    finite = jnp.all(jnp.isfinite(losses)) & jnp.all(jnp.isfinite(outputs))
    result = RESULTS.where(finite, RESULTS.successful, RESULTS.nonfinite)  # pyright: ignore[reportArgumentType]
    return Descent(eqx.combine(field.moved(u), field.rest), u, outputs, losses, alpha, result)
