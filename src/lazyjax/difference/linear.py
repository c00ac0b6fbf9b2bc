r"""Difference rules of linear, bilinear and algebraic primitives: exact identities, no cases.

Linear L: $[L(z + \epsilon\delta) - L(z)]/\epsilon = L\delta$. Bilinear B, in two products:
$[B(a + \epsilon\delta_a, b + \epsilon\delta_b) - B(a, b)]/\epsilon
= B(\delta_a, b + \epsilon\delta_b) + B(a, \delta_b)$.
Quotients, powers and roots follow from bilinearity: $1/b$ solves $b \cdot b^{-1} = 1$, and so on.
"""

from typing import Any

import jax.numpy as jnp
from jax.extend import core

from lazyjax.difference.pair import (
    Moved,
    Rule,
    Step,
    Value,
    bind,
    delta_of,
    delta_or_zeros,
    old_of,
)

# Linear in all their floating operands jointly, discrete in all others (indices, predicates).
_LINEAR = (
    "all_gather",
    "all_to_all",
    "broadcast_in_dim",
    "complex",
    "concatenate",
    "conj",
    "convert_element_type",
    "copy",
    "cumsum",
    "dynamic_slice",
    "dynamic_update_slice",
    "fft",
    "imag",
    "layout_constraint",
    "mesh_cast",
    "name",
    "neg",
    "pad",
    "pbroadcast",
    "ppermute",
    "psum",
    "psum2",
    "psum_invariant",
    "pvary",
    "real",
    "reduce_precision",
    "reduce_scatter",
    "reduce_sum",
    "reduce_window_sum",
    "reshape",
    "reshard",
    "rev",
    "scatter",
    "scatter-add",
    "scatter-sub",
    "scatter_add",
    "scatter_sub",
    "select_if_vmap",
    "select_n",
    "sharding_constraint",
    "slice",
    "split",
    "squeeze",
    "stack",
    "tile",
    "transpose",
    "unstack",
)


def _is_inexact(value: Value) -> bool:
    return jnp.issubdtype(jnp.result_type(old_of(value)), jnp.inexact)


def _linear(step: Step, eqn: core.JaxprEqn, outs: list[Any], values: list[Value]) -> list[Any]:
    del step, outs
    return bind(eqn, [delta_or_zeros(v) if _is_inexact(v) else v for v in values])


def _gather(step: Step, eqn: core.JaxprEqn, outs: list[Any], values: list[Value]) -> list[Any]:
    # Out of bounds a gather may be told to fill in NaN: a constant, whose difference is zero.
    del step, outs
    operand, indices = values
    return bind(eqn, [operand.delta, indices], fill_value=0)


def _add(step: Step, eqn: core.JaxprEqn, outs: list[Any], values: list[Value]) -> list[Any]:
    del step, eqn, outs
    dx, dy = (delta_of(v) for v in values)
    if dx is None or dy is None:
        return [dy if dx is None else dx]
    return [dx + dy]


def _sub(step: Step, eqn: core.JaxprEqn, outs: list[Any], values: list[Value]) -> list[Any]:
    del step, eqn, outs
    dx, dy = (delta_of(v) for v in values)
    if dy is None:
        return [dx]
    return [-dy if dx is None else dx - dy]


def _bilinear(step: Step, eqn: core.JaxprEqn, outs: list[Any], values: list[Value]) -> list[Any]:
    del outs
    x, y, *rest = values  # group sizes of a ragged product
    terms = []
    if delta_of(x) is not None:
        terms += bind(eqn, [x.delta, step.new_of(y), *rest])
    if delta_of(y) is not None:
        terms += bind(eqn, [old_of(x), y.delta, *rest])
    return [terms[0] if len(terms) == 1 else terms[0] + terms[1]]


def _sqrt(step: Step, eqn: core.JaxprEqn, outs: list[Any], values: list[Value]) -> list[Any]:
    (new,) = bind(eqn, [step.new_of(values[0])])
    return [values[0].delta / (new + outs[0])]


def _rsqrt(step: Step, eqn: core.JaxprEqn, outs: list[Any], values: list[Value]) -> list[Any]:
    (new,) = bind(eqn, [step.new_of(values[0])])
    product = new * outs[0]
    return [-values[0].delta * product * (product / (new + outs[0]))]


def _cbrt(step: Step, eqn: core.JaxprEqn, outs: list[Any], values: list[Value]) -> list[Any]:
    (new,) = bind(eqn, [step.new_of(values[0])])
    return [values[0].delta / (new * new + new * outs[0] + outs[0] * outs[0])]


def _div(step: Step, eqn: core.JaxprEqn, outs: list[Any], values: list[Value]) -> list[Any]:
    del eqn
    x, y = values
    numerator = delta_of(x)
    if isinstance(y, Moved):
        change = outs[0] * y.delta
        numerator = -change if numerator is None else numerator - change
    return [numerator / step.new_of(y)]


def _square(step: Step, eqn: core.JaxprEqn, outs: list[Any], values: list[Value]) -> list[Any]:
    del eqn, outs
    return [values[0].delta * (values[0].old + step.new_of(values[0]))]


def _one_minus_square(step: Step, eqn: core.JaxprEqn, outs: list[Any], values: list[Value]) -> list[Any]:
    return [-delta for delta in _square(step, eqn, outs, values)]


def multiply_moved(step: Step, x: Moved, y: Moved) -> Moved:
    """Return the product of two moved values."""
    return Moved(x.old * y.old, x.delta * step.new_of(y) + x.old * y.delta)


def _integer_pow(step: Step, eqn: core.JaxprEqn, outs: list[Any], values: list[Value]) -> list[Any]:
    """Square pairs repeatedly; a negative power is the reciprocal of the positive one."""
    exponent = eqn.params["y"]
    if exponent == 0:
        return [jnp.zeros_like(outs[0])]
    factor: Moved = values[0]
    result = None
    for bit in reversed(bin(abs(exponent))[2:]):
        if bit == "1":
            result = factor if result is None else multiply_moved(step, result, factor)
        factor = multiply_moved(step, factor, factor)
    assert result is not None  # a nonzero exponent has a bit
    if exponent > 0:
        return [result.delta]
    return [-result.delta * outs[0] / step.new_of(result)]


def _triangular_solve(step: Step, eqn: core.JaxprEqn, outs: list[Any], values: list[Value]) -> list[Any]:
    """Solve A x = b: x moves by A^-1 (db - dA x), A at the end of the step."""
    a, b = values
    params = eqn.params
    right = jnp.zeros_like(outs[0]) if delta_of(b) is None else b.delta
    if isinstance(a, Moved):
        triangle = jnp.tril if params["lower"] else jnp.triu
        strict = (-1 if params["lower"] else 1) if params["unit_diagonal"] else 0
        change = triangle(a.delta, strict)
        change = jnp.conj(change) if params["conjugate_a"] else change
        change = jnp.swapaxes(change, -1, -2) if params["transpose_a"] else change
        factors = (change, outs[0]) if params["left_side"] else (outs[0], change)
        right = right - jnp.matmul(*factors, precision="highest")
    return bind(eqn, [step.new_of(a), right])


def _first(step: Step, eqn: core.JaxprEqn, outs: list[Any], values: list[Value]) -> list[Any]:
    """Return the difference of the first operand, which the primitive changes by a rounding only."""
    del step, eqn
    return [delta_or_zeros(values[0]).astype(outs[0].dtype)]


ALGEBRAIC_RULES: dict[str, Rule] = {
    **dict.fromkeys(_LINEAR, _linear),
    "gather": _gather,
    "add": _add,
    "add_any": _add,
    "sub": _sub,
    "mul": _bilinear,
    "dot_general": _bilinear,
    "conv_general_dilated": _bilinear,
    "ragged_dot_general": _bilinear,
    "sqrt": _sqrt,
    "rsqrt": _rsqrt,
    "cbrt": _cbrt,
    "div": _div,
    "square": _square,
    "one_minus_square": _one_minus_square,
    "integer_pow": _integer_pow,
    "triangular_solve": _triangular_solve,
    "nextafter": _first,
}
