r"""One step of an optax optimizer in $u = \alpha(w - w_0)$, and which optimizers have a limit at alpha = inf.

The optimizer sees what it would see in w: the parameters w, the true gradient $\nabla F_\alpha(w)$ and the value
$F_\alpha(w)$. Only its updates are added to u, times alpha, where they keep their digits at large alpha. An optimizer
whose updates are proportional to the gradients takes the same steps in u at every alpha, since the gradient has a
factor $1/\alpha$; at alpha = inf those of alpha = 1 stand for them.
"""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import optax
from jaxtyping import Array

from lazyjax._core.checks import is_concrete
from lazyjax._core.trees import move, tree_norm
from lazyjax._core.types import Params

PROBES = 64
"""Updates to wait for one that moves: the rate of a warm-up may begin at zero, gradients may be gathered first."""

REACH = 2.0**40
"""The factor by which the probing gradients are larger and smaller than 1: no clipping and no epsilon lies beyond."""


def displacement_step(
    optimizer: optax.GradientTransformation,
    state: Any,
    u: Params,
    slope: Params,
    *,
    w0: Params,
    alpha: Array,
    value: Array,
    value_of: Callable[[Params], Array],
) -> tuple[Params, Any]:
    r"""Take one step of an optimizer on $F_\alpha(w) = R(\alpha h(w))/\alpha^2$ from $w = w_0 + u/\alpha$.

    Args:
        optimizer: Any optax optimizer; at alpha = inf one that `check_proportional` accepts.
        state: Its state.
        u: The displacement, a tree of coordinates.
        slope: $-u' = Dh(w)^T \nabla R(\alpha h(w))$, alpha times the true gradient $\nabla F_\alpha(w)$.
        w0: The coordinates of the start.
        alpha: Output scale in (0, inf].
        value: $R(\alpha h(w))$ at u.
        value_of: The same as a function of u, for optimizers that search along a line.

    Returns:
        u and the state of the optimizer after the step.
    """
    scale = jnp.where(jnp.isinf(alpha), 1, alpha)
    gradient = jtu.tree_map(lambda g: g / scale.astype(g.dtype), slope)

    def objective(w: Params) -> Array:
        found = value_of(jtu.tree_map(lambda a, b: scale.astype(b.dtype) * (a - b), w, w0))
        return found / scale.astype(found.dtype) ** 2

    updates, state = optax.with_extra_args_support(optimizer).update(
        gradient,
        state,
        move(w0, 1 / alpha, u),
        value=value / scale.astype(value.dtype) ** 2,
        grad=gradient,
        value_fn=objective,
    )
    return jtu.tree_map(lambda v, d: v + scale.astype(v.dtype) * d.astype(v.dtype), u, updates), state


def check_optimizer(optimizer: Any) -> None:
    """Refuse what is no optax optimizer.

    Raises:
        TypeError: something else, such as a learning rate.
    """
    if not isinstance(optimizer, optax.GradientTransformation):
        msg = f"optimizer must be an optax optimizer such as optax.sgd(0.1), got {type(optimizer).__name__}."
        raise TypeError(msg)


def check_proportional(optimizer: optax.GradientTransformation, coordinates: Params) -> None:
    """Refuse an optimizer without a limit at alpha = inf: one whose updates are not proportional to the gradients.

    Looked at from parameters that are all 1, whatever w0: there a weight decay shows itself, though no gradient does.

    Raises:
        ValueError: the updates are not proportional to the gradients.
    """
    # Values, even inside a user's jit: there alone, since operations are then evaluated one by one.
    traced = not is_concrete(jnp.asarray(0))
    with jax.ensure_compile_time_eval() if traced else contextlib.nullcontext():
        proportional = bool(_is_proportional(optimizer, coordinates))
    if not proportional:
        msg = (
            "alpha=inf needs an optimizer whose updates are proportional to the gradients, such as optax.sgd "
            "with or without momentum; adaptive steps, clipping and weight decay have no limit there. "
            "Use a finite alpha."
        )
        raise ValueError(msg)


@eqx.filter_jit  # compiled once per optimizer
def _is_proportional(optimizer: optax.GradientTransformation, coordinates: Params) -> Array:
    """Return whether updates are in proportion to the gradients, up to the first one that moves."""
    # Never in half precision, which the small and large gradients are beyond.
    params = jtu.tree_map(lambda w: jnp.ones(w.shape, max(w.dtype, jnp.dtype(jnp.float32), key=_bits)), coordinates)

    def update(factor: Array, state: Any) -> tuple[Params, Any]:
        gradient = jtu.tree_map(lambda w: jnp.full_like(w, factor.astype(w.dtype)), params)

        def value(w: Params) -> Array:
            return functools.reduce(jnp.add, jtu.tree_leaves(jtu.tree_map(lambda g, v: jnp.sum(g * v), gradient, w)))

        line_search = {"value": value(params), "grad": gradient, "value_fn": value}
        return optax.with_extra_args_support(optimizer).update(gradient, state, params, **line_search)

    def undecided(carry: tuple[Array, Array, Array, Any]) -> Array:
        count, good, moved, _ = carry
        return good & ~moved & (count < PROBES)

    def probe(carry: tuple[Array, Array, Array, Any]) -> tuple[Array, Array, Array, Any]:
        """Return one more update for each of the gradients 0, 1, 1/REACH and REACH."""
        updates, states = jax.vmap(update)(jnp.asarray([0.0, 1.0, 1 / REACH, REACH]), carry[3])
        still, once, small, large = (jtu.tree_map(lambda leaf, i=i: leaf[i], updates) for i in range(4))

        def error(updates: Params, factor: float) -> Array:
            return tree_norm(jtu.tree_map(lambda a, b: factor * a - b, updates, once))

        size = tree_norm(once)
        # Written so that NaN is refused.
        good = (tree_norm(still) == 0) & (error(small, REACH) <= 1e-3 * size) & (error(large, 1 / REACH) <= 1e-3 * size)
        return carry[0] + 1, good, size > 0, states

    states = jtu.tree_map(lambda leaf: jnp.stack([jnp.asarray(leaf)] * 4), optimizer.init(params))
    first = (jnp.zeros((), jnp.int32), jnp.asarray(True), jnp.asarray(False), states)
    return jax.lax.while_loop(undecided, probe, first)[1]


def _bits(dtype: Any) -> int:
    return jnp.finfo(dtype).bits
