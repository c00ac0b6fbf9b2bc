r"""Difference rules of smooth elementwise primitives.

For $g(z + \epsilon\delta) - g(z)$, e = eps * delta, each rule gives the *mean slope*
$q = [g(z + e) - g(z)]/e$ by an identity or a series that never subtracts close numbers, valid for
|e| below a limit; beyond it the plain difference has lost at most a bit or two. Then
$\delta_{out} = \delta\,q$ where |e| is small and $[g(z + e) - g(z)]/\epsilon$ elsewhere. The mean
slope at e = 0 is g'(z), and its own derivatives exist there, so gradients pass through.
"""

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from lazyjax.difference.pair import (
    Moved,
    Rule,
    Step,
    Value,
    bind,
    derivative,
    old_of,
    unit_roundoff,
)

MeanSlope = Callable[[core.JaxprEqn, Any, Any, Any], Any]
"""(equation, z, g(z), e) -> the mean slope of g between z and z + e."""

Limit = Callable[[Any], Any]
"""z -> the largest |e| for which a mean slope is right to rounding."""


def _is_single(dtype: Any) -> bool:
    """Return whether series may be cut at single precision (also for half precision)."""
    return unit_roundoff(dtype) > 1e-10


def _terms(dtype: Any, single: int, double: int) -> int:
    return single if _is_single(dtype) else double


def _polynomial(x: Any, coefficients: list[float]) -> Any:
    """Evaluate a polynomial by Horner's rule, its coefficients from the constant term up."""
    total = jnp.full_like(x, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        total = total * x + coefficient
    return total


@cache
def _tanh_convergent(order: int) -> tuple[list[float], list[float]]:
    """Return numerator and denominator in y = x^2 of a convergent of tanh(x)/x = 1/(1 + y/(3 + ...))."""
    numerators = [np.array([0.0]), np.array([1.0])]
    denominators = [np.array([1.0]), np.array([1.0])]
    multiply, shift = np.multiply, np.polynomial.polynomial.polymulx
    for k in range(2, order + 1):
        for history in (numerators, denominators):
            history.append(np.polynomial.polynomial.polyadd(multiply(2 * k - 1, history[-1]), shift(history[-2])))
    scale = denominators[-1][0]
    return (numerators[-1] / scale).tolist(), (denominators[-1] / scale).tolist()


def _tanh_ratio(x: Any) -> tuple[Any, Any]:
    """Return P, Q with tanh(x) = x P/Q to rounding for |x| <= 1."""
    numerator, denominator = _tanh_convergent(_terms(x.dtype, 6, 9))
    return _polynomial(x * x, numerator), _polynomial(x * x, denominator)


def _sinc(square: Any) -> Any:
    """Return sin(x)/x as a function of x^2 for |x| <= 1; of -x^2 it is sinh(x)/x."""
    count = _terms(square.dtype, 6, 10)
    return _polynomial(square, [(-1) ** k / math.factorial(2 * k + 1) for k in range(count)])


def _atanhc(square: Any) -> Any:
    """Return atanh(s)/s as a function of s^2 <= 1/16; of -s^2 it is atan(s)/s."""
    return _polynomial(square, [1 / (2 * k + 1) for k in range(_terms(square.dtype, 6, 13))])


def _smooth(slope: MeanSlope, limit: float | Limit) -> Rule:
    """Make the rule of a unary primitive whose mean slope is known for |e| < limit(z)."""

    def rule(step: Step, eqn: core.JaxprEqn, outs: list[Any], values: list[Value]) -> list[Any]:
        (value,), (out,) = values, outs
        e = step.scaled(value.delta)
        small = jnp.abs(e) < (limit(value.old) if callable(limit) else limit)
        # Series and their polynomials overflow in half precision.
        work = out.dtype if jnp.finfo(out.dtype).bits >= 32 else jnp.float32
        mean = slope(eqn, *(t.astype(work) for t in (value.old, out, jnp.where(small, e, 0))))
        (new,) = bind(eqn, [value.old + e])
        near = value.delta * mean.astype(out.dtype)
        return [jnp.where(small, near, step.quotient(new - out))]

    return rule


def _exp_slope(eqn: core.JaxprEqn, z: Any, out: Any, e: Any) -> Any:
    # expm1(e)/e = P/(Q - hP) with tanh(h) = hP/Q, h = e/2
    del eqn, z
    p, q = _tanh_ratio(e / 2)
    return out * (p / (q - e / 2 * p))


def _exp2_slope(eqn: core.JaxprEqn, z: Any, out: Any, e: Any) -> Any:
    return math.log(2) * _exp_slope(eqn, z, out, math.log(2) * e)


def _expm1_slope(eqn: core.JaxprEqn, z: Any, out: Any, e: Any) -> Any:
    return _exp_slope(eqn, z, out + 1, e)


def _tanh_slope(eqn: core.JaxprEqn, z: Any, out: Any, e: Any) -> Any:
    # tanh(x) - tanh(y) = tanh(x - y) (1 - tanh(x) tanh(y)), solved for tanh(x)
    del eqn, z
    p, q = _tanh_ratio(e)
    return (1 - out) * (1 + out) * (p / (q + out * e * p))


def _logistic_slope(eqn: core.JaxprEqn, z: Any, out: Any, e: Any) -> Any:
    # The tanh rule at half the argument.
    del eqn, z
    p, q = _tanh_ratio(e / 2)
    return out * (1 - out) * (p / (q + (2 * out - 1) * (e / 2) * p))


def _sin_slope(eqn: core.JaxprEqn, z: Any, out: Any, e: Any) -> Any:
    del eqn, out
    return jnp.cos(z + e / 2) * _sinc((e / 2) ** 2)


def _cos_slope(eqn: core.JaxprEqn, z: Any, out: Any, e: Any) -> Any:
    del eqn, out
    return -jnp.sin(z + e / 2) * _sinc((e / 2) ** 2)


def _tan_slope(eqn: core.JaxprEqn, z: Any, out: Any, e: Any) -> Any:
    del eqn, out
    return _sinc(e**2) / (jnp.cos(z) * jnp.cos(z + e))


def _sinh_slope(eqn: core.JaxprEqn, z: Any, out: Any, e: Any) -> Any:
    del eqn, out
    return jnp.cosh(z + e / 2) * _sinc(-((e / 2) ** 2))


def _cosh_slope(eqn: core.JaxprEqn, z: Any, out: Any, e: Any) -> Any:
    del eqn, out
    return jnp.sinh(z + e / 2) * _sinc(-((e / 2) ** 2))


def _atan_slope(eqn: core.JaxprEqn, z: Any, out: Any, e: Any) -> Any:
    del eqn, out
    cosine = 1 + z * (z + e)
    return _atanhc(-((e / cosine) ** 2)) / cosine


def _erf_slope(eqn: core.JaxprEqn, z: Any, out: Any, e: Any) -> Any:
    """Sum the Taylor series about the midpoint m: odd derivatives cancel, Hermite polynomials remain.

    (2/sqrt(pi)) exp(-m^2) sum_j H_2j(m) (e/2)^2j / (2j + 1)!. Beyond |m| = 28 the Gaussian
    is zero in any precision, while the polynomials would overflow.
    """
    del eqn, out
    m = jnp.clip(z + e / 2, -28, 28)
    square = (e / 2) ** 2
    previous, current = jnp.ones_like(m), 2 * m
    total, power = jnp.ones_like(m), jnp.ones_like(m)
    for j in range(1, _terms(m.dtype, 6, 10)):
        for k in (2 * j - 1, 2 * j):
            previous, current = current, 2 * m * current - 2 * k * previous
        power = power * square
        total = total + power * previous * (1 / math.factorial(2 * j + 1))
    return 2 / math.sqrt(math.pi) * jnp.exp(-m * m) * total


def _erfc_slope(eqn: core.JaxprEqn, z: Any, out: Any, e: Any) -> Any:
    return -_erf_slope(eqn, z, out, e)


def _quadrature_slope(eqn: core.JaxprEqn, z: Any, out: Any, e: Any) -> Any:
    """Return the four-node Gauss-Legendre mean of g' over [z, z + e], g' by `jax.jvp` of the primitive."""
    del out
    nodes, weights = np.polynomial.legendre.leggauss(4)
    one = jnp.ones_like(z)

    def slope(node: float) -> Any:
        return jax.jvp(lambda t: bind(eqn, [t])[0], (z + (node + 1) / 2 * e,), (one,))[1]

    return sum(
        (w / 2 * slope(node) for node, w in zip(nodes.tolist(), weights.tolist(), strict=True)),
        start=jnp.zeros_like(z),
    )


def _fraction_of(distance: Limit) -> Limit:
    """Make the limit of the quadrature: a fraction of the distance to a singularity."""

    def limit(z: Any) -> Any:
        return (0.25 if _is_single(z.dtype) else 0.05) * distance(z)

    return limit


def _log_delta(step: Step, y: Any, delta: Any) -> Any:
    """Return [log(y + eps delta) - log(y)]/eps, through log = 2 atanh where the step is small."""
    e = step.scaled(delta)
    small = jnp.abs(e) < 0.25 * jnp.abs(y)
    safe = jnp.where(small, e, 0)
    middle = jnp.where(small, 2 * y + safe, 1)
    near = 2 * delta / middle * _atanhc((safe / middle) ** 2)
    far = jnp.log1p(jnp.where(small, 0, e) / jnp.where(small, 1, y))
    return jnp.where(small, near, step.quotient(far))


def _log(shift: float, factor: float) -> Rule:
    """Make the rule of factor * log(shift + z)."""

    def rule(step: Step, eqn: core.JaxprEqn, outs: list[Any], values: list[Value]) -> list[Any]:
        del eqn, outs
        return [factor * _log_delta(step, shift + values[0].old, values[0].delta)]

    return rule


def _pow(step: Step, eqn: core.JaxprEqn, outs: list[Any], values: list[Value]) -> list[Any]:
    """Difference x^y through the logarithm of the ratio of the two ends, where x stays away from zero."""
    x, y = values
    x0, x1, y0 = old_of(x), step.new_of(x), old_of(y)
    near_zero = jnp.abs(x1 - x0) >= 0.25 * jnp.abs(x0)
    if isinstance(y, Moved):
        near_zero = near_zero | (x0 <= 0) | (x1 <= 0)
    base0, base1 = jnp.where(near_zero, 1, x0), jnp.where(near_zero, 1, x1)
    growth = jnp.zeros_like(outs[0])
    if isinstance(x, Moved):
        growth = jnp.asarray(y0).astype(growth.dtype) * _log_delta(step, base0, jnp.where(near_zero, 0, x.delta))
    if isinstance(y, Moved):
        growth = growth + y.delta * jnp.log(base1)
    e = step.scaled(growth)
    small = (jnp.abs(e) < 1) & ~near_zero
    near = growth * _exp_slope(eqn, None, outs[0], jnp.where(small, e, 0))
    (new,) = bind(eqn, [x1, step.new_of(y)])
    delta = jnp.where(small, near, step.quotient(new - outs[0]))
    return [step.limit_or(lambda: derivative(eqn, values)[0], delta)]


def _atan2(step: Step, eqn: core.JaxprEqn, outs: list[Any], values: list[Value]) -> list[Any]:
    """Return the angle between the two ends, from their cross and dot products, and full turns."""
    y, x = values
    y0, x0, y1, x1 = old_of(y), old_of(x), step.new_of(y), step.new_of(x)
    cross = jnp.zeros_like(outs[0])
    if isinstance(y, Moved):
        cross = cross + y.delta * x0
    if isinstance(x, Moved):
        cross = cross - y0 * x.delta
    dot = x0 * x1 + y0 * y1
    e = step.scaled(cross)
    small = jnp.abs(e) < 0.25 * dot
    tangent = jnp.where(small, e, 0) / jnp.where(small, dot, 1)
    near = cross / jnp.where(small, dot, 1) * _atanhc(-(tangent**2))
    far = jnp.arctan2(jnp.where(small, 0, e), jnp.where(small, 1, dot))
    (new,) = bind(eqn, [y1, x1])
    angle = jnp.where(small, jnp.arctan(tangent), far)
    turns = 2 * math.pi * jnp.round((new - outs[0] - angle) / (2 * math.pi))
    return [jnp.where(small, near, step.quotient(far)) + step.quotient(turns)]


def _distance_to_one(z: Any) -> Any:
    return 1 - jnp.abs(z)


def _distance_to_pole(z: Any) -> Any:
    """Return how far the next pole of the logarithm of the gamma function is."""
    return jnp.where(z > 0, z, jnp.abs(z - jnp.round(z)))


def _bessel_i0e(step: Step, eqn: core.JaxprEqn, outs: list[Any], values: list[Value]) -> list[Any]:
    """Difference a function of |z| that is smooth for |z| >= 0."""
    z = values[0].old
    upward = values[0].delta + step.quotient(jnp.where(z < 0, 2 * z, 0))
    downward = -values[0].delta - step.quotient(jnp.where(z > 0, 2 * z, 0))
    size = Moved(jnp.abs(z), jnp.where(step.new_of(values[0]) >= 0, upward, downward))
    (delta,) = _smooth(_quadrature_slope, 0.25)(step, eqn, outs, [size])
    return [step.limit_or(lambda: derivative(eqn, values)[0], delta)]


SMOOTH_RULES: dict[str, Rule] = {
    "exp": _smooth(_exp_slope, 1.0),
    "exp2": _smooth(_exp2_slope, 1.0),
    "expm1": _smooth(_expm1_slope, 1.0),
    "tanh": _smooth(_tanh_slope, 1.0),
    "logistic": _smooth(_logistic_slope, 2.0),
    "sin": _smooth(_sin_slope, 2.0),
    "cos": _smooth(_cos_slope, 2.0),
    "tan": _smooth(_tan_slope, 1.0),
    "sinh": _smooth(_sinh_slope, 2.0),
    "cosh": _smooth(_cosh_slope, 2.0),
    "atan": _smooth(_atan_slope, 0.2),
    "erf": _smooth(_erf_slope, 0.5),
    "erfc": _smooth(_erfc_slope, 0.5),
    "asin": _smooth(_quadrature_slope, _fraction_of(_distance_to_one)),
    "acos": _smooth(_quadrature_slope, _fraction_of(_distance_to_one)),
    "atanh": _smooth(_quadrature_slope, _fraction_of(_distance_to_one)),
    "erf_inv": _smooth(_quadrature_slope, _fraction_of(_distance_to_one)),
    "asinh": _smooth(_quadrature_slope, _fraction_of(jnp.ones_like)),
    "acosh": _smooth(_quadrature_slope, _fraction_of(lambda z: z - 1)),
    "lgamma": _smooth(_quadrature_slope, _fraction_of(_distance_to_pole)),
    "digamma": _smooth(_quadrature_slope, _fraction_of(_distance_to_pole)),
    "bessel_i0e": _bessel_i0e,
    "bessel_i1e": _smooth(_quadrature_slope, lambda z: jnp.minimum(jnp.abs(z), 0.25)),
    "log": _log(0.0, 1.0),
    "log1p": _log(1.0, 1.0),
    "log2": _log(0.0, 1 / math.log(2)),
    "pow": _pow,
    "atan2": _atan2,
}
