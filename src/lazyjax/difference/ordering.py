r"""Difference rules of sorting: entries are taken by their places at both ends of the step.

If p and q are the orders at the start and at the end, the sorted values $z_p$ move to $z_q + \epsilon\delta_q$, so
their difference is $\delta_q + (z_q - z_p)/\epsilon$. The order at the end is decided by the exact sum of z and
$\epsilon\delta$, of which the rounded sum and its rounding error are two keys.
"""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.extend import core

from lazyjax.difference.pair import Moved, Step, Switched, Value, bind, delta_of, gap, old_of


def _keys(step: Step, value: Value) -> list[Any]:
    """Return keys by which the values at the end of the step sort exactly: the rounded sum, and its rounding error."""
    if not isinstance(value, Moved):
        return [step.new_of(value)]
    z, e = value.old, step.scaled(value.delta)
    total = z + e
    if jnp.iscomplexobj(z):
        return [total]
    part = total - z
    error = (z - (total - part)) + (e - part)
    return [total, jnp.where(jnp.isfinite(total), error, 0)]


def _taken(step: Step, value: Value, old: Any, start: Any, end: Any, axis: int) -> Value:
    """Return a value taken by the places at both ends; `old` is what the start has."""

    def at(z: Any, places: Any) -> Any:
        return jnp.take_along_axis(z, places, axis=axis)

    if isinstance(value, Switched):
        return Switched(old, at(value.new, end))
    z, delta = old_of(value), delta_of(value)
    if not jnp.issubdtype(jnp.result_type(z), jnp.inexact):
        return Switched(old, at(z, end))
    jump = step.quotient(jnp.where(start == end, 0, gap(at(z, end), old)))
    return Moved(old, jump if delta is None else at(delta, end) + jump)


def sort(step: Step, eqn: core.JaxprEqn, values: list[Value]) -> list[Value]:
    """Sort several arrays together by the first `num_keys` of them."""
    axis, count = eqn.params["dimension"], eqn.params["num_keys"]
    olds = [jnp.asarray(old_of(v)) for v in values]
    places = lax.broadcasted_iota(jnp.int32, olds[0].shape, axis)
    *sorted_olds, start = bind(eqn, [*olds, places])
    keys = [key for value in values[:count] for key in _keys(step, value)]
    end = bind(eqn, [*map(jnp.asarray, keys), places], num_keys=len(keys))[-1]
    return [_taken(step, v, o, start, end, axis) for v, o in zip(values, sorted_olds, strict=True)]


def top_k(step: Step, eqn: core.JaxprEqn, values: list[Value]) -> list[Value]:
    """Return the largest entries along an axis, and their places, at both ends."""
    axis = eqn.params.get("axis", -1) % jnp.ndim(old_of(values[0]))
    old, start = bind(eqn, [old_of(values[0])])
    places = lax.broadcasted_iota(start.dtype, jnp.shape(old_of(values[0])), axis)
    keys = [-key for key in _keys(step, values[0])]
    end = lax.sort([*keys, places], dimension=axis, num_keys=len(keys), is_stable=True)[-1]
    end = lax.slice_in_dim(end, 0, old.shape[axis], axis=axis)
    return [_taken(step, values[0], old, start, end, axis), Switched(start, end)]
