r"""Difference rules of maxima, minima, absolute values, rounding and comparisons.

For $m = \max_i a_i$ the rule is exact: $\delta_m = \max_i[\delta_i - (m - a_i)/\epsilon]$. Which
branch wins at the new end is decided by (x - y) + eps (dx - dy), so that it is right even where
x + eps dx would round to x. At eps = 0 only the old winner takes part, ties as `jax.jvp` has them.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core

from lazyjax._core.program import as_function
from lazyjax.difference.linear import multiply_moved
from lazyjax.difference.pair import (
    Moved,
    Rule,
    Step,
    Switched,
    Value,
    bind,
    delta_of,
    delta_or_zeros,
    derivative,
    gap,
    is_floating,
    old_of,
    snapped_gap,
    unit_roundoff,
)


def _max_delta(step: Step, x: Any, y: Any, dx: Any, dy: Any) -> Any:
    """Return the divided difference of max(x, y); a tie at eps = 0 gives the mean, as in `jax.jvp`."""
    lead = gap(x, y)
    first = dx + step.quotient(jnp.where(lead < 0, lead, 0))
    second = dy - step.quotient(jnp.where(lead > 0, lead, 0))
    new_lead = lead + step.scaled(dx - dy)
    delta = jnp.where(new_lead > 0, first, second)
    if step.never_zero:
        return delta
    return jnp.where((lead == 0) & step.is_zero(delta.dtype), (dx + dy) / 2, delta)


def max_moved(step: Step, x: Moved, y: Moved) -> Moved:
    """Return the larger of two moved values."""
    return Moved(jnp.maximum(x.old, y.old), _max_delta(step, x.old, y.old, x.delta, y.delta))


def _min_moved(step: Step, x: Moved, y: Moved) -> Moved:
    negative = max_moved(step, Moved(-x.old, -x.delta), Moved(-y.old, -y.delta))
    return Moved(-negative.old, -negative.delta)


def _as_moved(value: Value) -> Moved:
    return Moved(old_of(value), delta_or_zeros(value))


def _binary(combine: Callable[[Step, Moved, Moved], Moved]) -> Rule:
    """Make the rule of a binary primitive from its action on two moved values."""

    def rule(step: Step, eqn: core.JaxprEqn, outs: list[Any], values: list[Value]) -> list[Any]:
        del eqn, outs
        x, y = (_as_moved(v) for v in values)
        return [combine(step, x, y).delta]

    return rule


def _cumulative(combine: Callable[[Step, Moved, Moved], Moved]) -> Rule:
    """Make the rule of a cumulative primitive from its action on two moved values."""

    def rule(step: Step, eqn: core.JaxprEqn, outs: list[Any], values: list[Value]) -> list[Any]:
        del outs
        scanned = lax.associative_scan(
            lambda x, y: combine(step, x, y),
            values[0],
            axis=eqn.params["axis"],
            reverse=eqn.params["reverse"],
        )
        return [scanned.delta]

    return rule


def _reduce_prod(step: Step, eqn: core.JaxprEqn, outs: list[Any], values: list[Value]) -> list[Any]:
    axes = eqn.params["axes"]

    def flat(z: Any) -> Any:
        front = jnp.moveaxis(z, axes, range(len(axes)))
        return front.reshape(-1, *outs[0].shape)

    pair = Moved(flat(values[0].old), flat(values[0].delta))
    scanned = lax.associative_scan(lambda x, y: multiply_moved(step, x, y), pair)
    return [scanned.delta[-1] if pair.old.shape[0] else jnp.zeros_like(outs[0])]


def _reduce_max_delta(step: Step, z: Any, delta: Any, out: Any, axes: Any) -> Any:
    """Return max_i [delta_i - (m - z_i)/eps], the mean over equal winners; over old winners at eps = 0.

    The winners are a mask, and the value a mean over it, so that gradients with respect to
    delta and z need no derivative of a maximum.
    """
    behind = snapped_gap(z, jnp.expand_dims(out, axes))
    candidates = delta + step.quotient(behind)
    # A negative eps turns the maximum of the differences into a minimum.
    sign = jnp.where(step.scaled(jnp.ones((), z.dtype)) < 0, -1, 1).astype(z.dtype)
    ranked = lax.stop_gradient(sign * candidates)
    best = jnp.max(ranked, axis=axes, keepdims=True)
    winners = ranked >= best - 4 * unit_roundoff(z.dtype) * jnp.abs(best)
    if not step.never_zero:
        winners = jnp.where(step.is_zero(z.dtype), behind == 0, winners)
    count = jnp.sum(winners, axis=axes, dtype=z.dtype)
    # A NaN leaves no winner; h itself is NaN there, and the count must not add 0/0.
    return jnp.sum(jnp.where(winners, candidates, 0), axis=axes) / jnp.maximum(count, 1)


def _reduce_max(step: Step, eqn: core.JaxprEqn, outs: list[Any], values: list[Value]) -> list[Any]:
    z, delta = values[0]
    return [_reduce_max_delta(step, z, delta, outs[0], eqn.params["axes"])]


def _reduce_min(step: Step, eqn: core.JaxprEqn, outs: list[Any], values: list[Value]) -> list[Any]:
    z, delta = values[0]
    return [-_reduce_max_delta(step, -z, -delta, -outs[0], eqn.params["axes"])]


def _abs(step: Step, eqn: core.JaxprEqn, outs: list[Any], values: list[Value]) -> list[Any]:
    z, delta = values[0]
    if jnp.iscomplexobj(z):
        # (|b|^2 - |a|^2) / (|b| + |a|)
        total = jnp.abs(step.new_of(values[0])) + outs[0]
        product = jnp.real(jnp.conj(delta) * (z + step.new_of(values[0])))
        moved = jnp.where(total == 0, jnp.abs(delta), product / jnp.where(total == 0, 1, total))
        return [step.limit_or(lambda: derivative(eqn, values)[0], moved)]
    upward = delta + step.quotient(jnp.where(z < 0, 2 * z, 0))
    downward = -delta - step.quotient(jnp.where(z > 0, 2 * z, 0))
    result = jnp.where(step.new_of(values[0]) >= 0, upward, downward)
    # What a tie at eps = 0 gives has changed between versions of JAX: ask.
    return [step.limit_or(lambda: derivative(eqn, values)[0], result)]


def _clamp(step: Step, eqn: core.JaxprEqn, outs: list[Any], values: list[Value]) -> list[Any]:
    del outs
    low, x, high = (_as_moved(v) for v in values)
    raised = max_moved(step, x, low)
    delta = _min_moved(step, raised, high).delta
    return [step.limit_or(lambda: derivative(eqn, values)[0], delta)]


def _stepwise(step: Step, eqn: core.JaxprEqn, outs: list[Any], values: list[Value]) -> list[Any]:
    """Return the plain difference of a piecewise constant function, which is exact; 0 at eps = 0."""
    (new,) = bind(eqn, [step.new_of(v) for v in values])
    return [step.quotient(gap(new, outs[0]))]


def _rem(step: Step, eqn: core.JaxprEqn, outs: list[Any], values: list[Value]) -> list[Any]:
    """Return the difference of x - q y, with the whole numbers q at both ends."""
    x, y = values
    (new,) = bind(eqn, [step.new_of(v) for v in values])
    before, after = (
        jnp.round((p - r) / q) for p, q, r in ((old_of(x), old_of(y), outs[0]), (step.new_of(x), step.new_of(y), new))
    )
    return [delta_or_zeros(x) - after * delta_or_zeros(y) - step.quotient(after - before) * old_of(y)]


def _scattered_extreme(sign: int) -> Rule:
    """Make the rule of a scatter that keeps the larger (or smaller) one of an entry and of all updates to it."""

    def rule(step: Step, eqn: core.JaxprEqn, outs: list[Any], values: list[Value]) -> list[Any]:
        operand, indices, updates = values
        dimensions, params = eqn.params["dimension_numbers"], eqn.params
        options = {name: params[name] for name in ("indices_are_sorted", "unique_indices", "mode")}

        def added(part: Any) -> Any:
            return lax.scatter_add(jnp.zeros_like(outs[0]), indices, part, dimensions, **options)

        (at_updates,) = jax.linear_transpose(added, old_of(updates))(outs[0])

        def candidates(value: Value, winner: Any) -> Any:
            behind = sign * snapped_gap(old_of(value), winner)
            found = sign * delta_or_zeros(value) + step.quotient(behind)
            return found if step.never_zero else jnp.where(step.is_zero(found.dtype) & (behind < 0), -jnp.inf, found)

        # A negative eps turns the maximum of the differences into a minimum.
        turn = jnp.where(step.scaled(jnp.ones((), outs[0].dtype)) < 0, -1, 1).astype(outs[0].dtype)
        best = lax.scatter_max(
            turn * candidates(operand, outs[0]), indices, turn * candidates(updates, at_updates), dimensions, **options
        )
        return [step.limit_or(lambda: derivative(eqn, values)[0], sign * turn * best)]

    return rule


def _scatter_mul(step: Step, eqn: core.JaxprEqn, outs: list[Any], values: list[Value]) -> list[Any]:
    """Difference a product of entries with updates, one to each entry at most."""
    operand, indices, updates = values
    dimensions = eqn.params["dimension_numbers"]
    if not eqn.params["unique_indices"]:
        msg = (
            "h multiplies entries by a scatter whose indices may repeat, of which JAX has no derivative; give it "
            "unique_indices=True."
        )
        raise ValueError(msg)
    options = {name: eqn.params[name] for name in ("indices_are_sorted", "unique_indices", "mode")}
    delta = jnp.zeros_like(outs[0])
    if isinstance(operand, Moved):
        delta = bind(eqn, [operand.delta, indices, step.new_of(updates)])[0]
    if isinstance(updates, Moved):

        def added(part: Any) -> Any:
            return lax.scatter_add(jnp.zeros_like(outs[0]), indices, part, dimensions, **options)

        (factors,) = jax.linear_transpose(added, updates.old)(old_of(operand))
        delta = delta + added(factors * updates.delta)
    return [delta]


PIECEWISE_RULES: dict[str, Rule] = {
    "max": _binary(max_moved),
    "min": _binary(_min_moved),
    "cummax": _cumulative(max_moved),
    "cummin": _cumulative(_min_moved),
    "cumprod": _cumulative(multiply_moved),
    "reduce_prod": _reduce_prod,
    "reduce_max": _reduce_max,
    "reduce_min": _reduce_min,
    "abs": _abs,
    "clamp": _clamp,
    "rem": _rem,
    "scatter-max": _scattered_extreme(1),
    "scatter-min": _scattered_extreme(-1),
    "scatter-mul": _scatter_mul,
    "scatter_max": _scattered_extreme(1),
    "scatter_min": _scattered_extreme(-1),
    "scatter_mul": _scatter_mul,
    "sign": _stepwise,
    "floor": _stepwise,
    "ceil": _stepwise,
    "round": _stepwise,
}

_ORDERS: dict[str, Callable[[Any], Any]] = {
    "lt": lambda lead: lead < 0,
    "le": lambda lead: lead <= 0,
    "gt": lambda lead: lead > 0,
    "ge": lambda lead: lead >= 0,
}
COMPARISONS = (*_ORDERS, "eq", "ne")


def _shift(step: Step, x: Value, y: Value) -> Any:
    dx, dy = delta_of(x), delta_of(y)
    if dx is None or dy is None:
        return -step.scaled(dy) if dx is None else step.scaled(dx)
    return step.scaled(dx - dy)


def compare(step: Step, eqn: core.JaxprEqn, values: list[Value]) -> list[Value]:
    """Compare floating values at both ends, as decided by their difference.

    Equality is meant for values that are equal by construction, such as a maximum and its
    winner, which derivatives of maxima ask for: where the terms of the new difference cancel
    to rounding, the two are equal.
    """
    x, y = values
    (old,) = bind(eqn, [old_of(v) for v in values])
    lead, shift = gap(old_of(x), old_of(y)), _shift(step, x, y)
    name = eqn.primitive.name
    if name in _ORDERS:
        return [Switched(old, _ORDERS[name](lead + shift))]
    were_equal = old if name == "eq" else ~old
    lead = jnp.where(were_equal, 0, lead)
    scale = jnp.abs(lead)
    for value in values:
        if isinstance(value, Moved):
            scale = scale + jnp.abs(step.scaled(value.delta))
    equal = jnp.abs(lead + shift) <= 8 * unit_roundoff(lead.dtype) * scale
    return [Switched(old, equal if name == "eq" else ~equal)]


def at_both_ends(step: Step, eqn: core.JaxprEqn, values: list[Value]) -> list[Value]:
    """Evaluate twice: for discrete results, and floating results of operands that only switch."""
    function = as_function(eqn)
    olds = function(*[old_of(v) for v in values])
    news = function(*[step.new_of(v) for v in values])
    return [
        Moved(old, step.jump(new, old)) if is_floating(var.aval) else Switched(old, new)
        for var, old, new in zip(eqn.outvars, olds, news, strict=True)
    ]
