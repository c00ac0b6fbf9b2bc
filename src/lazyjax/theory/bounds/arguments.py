"""The arguments of a bound: numbers, checked by their names and brought to one dtype and shape; safe exponentials.

Every bound is a public function of numbers under `checked`: checked outside a trace, and one compiled program.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple, ParamSpec, TypeVar

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Real

from lazyjax._core.checks import is_concrete
from lazyjax._core.phi import phi

Number = float | int | Real[Array, "..."] | Real[np.ndarray, "..."]
"""A number or an array of them, perhaps traced; the arguments of a bound broadcast against each other."""

_Arguments = ParamSpec("_Arguments")
_Bound = TypeVar("_Bound")


class _Rule(NamedTuple):
    """A rule that a named argument must obey, in words, and a remedy."""

    holds: Callable[[np.ndarray], np.ndarray]
    what: str
    remedy: str


def _positive(v: np.ndarray) -> np.ndarray:
    return (v > 0) & (v < np.inf)


_SIZE = _Rule(lambda v: (v >= 0) & (v < np.inf), "a norm or a loss in [0, inf)", "check how it was computed")
_CONSTANT = _Rule(_positive, "positive and finite", "check how it was computed")
_SIGMA = _Rule(_positive, "positive and finite", "if Dh(w0) is not onto, theorem_2_5 takes the smallest nonzero one")
_RULES = {
    "alpha": _Rule(lambda v: v > 0, "a scale in (0, inf]", "use alpha=1 for the unscaled model"),
    "t": _Rule(lambda v: v >= 0, "a flow time in [0, inf]", "the flow starts at 0"),
    "horizon": _Rule(_SIZE.holds, "a flow time in [0, inf)", "theorem_2_4 and theorem_2_5 hold for all times"),
    "radius": _Rule(lambda v: v >= 0, "a radius in [0, inf]", "use inf for constants taken along the flow itself"),
    "lip_dh": _Rule(_SIZE.holds, "a Lipschitz constant in [0, inf)", "models with kinks (ReLU) have none: no theorem"),
    "sigma_min": _SIGMA,
    "lambda_min": _SIGMA,
    **dict.fromkeys(
        ("smoothness", "strong_convexity", "sigma_max", "lambda_max", "width", "scale", "dphi_sq", "q", "lam"),
        _CONSTANT,
    ),
}
_ORDERED = (("strong_convexity", "smoothness"), ("sigma_min", "sigma_max"), ("lambda_min", "lambda_max"))


def as_numbers(**values: Any) -> tuple[Array, ...]:
    """Return the arguments of a bound as arrays of one shape and of the widest floating dtype among them."""
    return tuple(jnp.asarray(value) for value in _checked_numbers(values))


def _checked_numbers(values: dict[str, Any]) -> list[Any]:
    """Return numbers of one shape and dtype, as NumPy arrays if they are known: no operation of JAX is compiled.

    Raises:
        ValueError: a concrete value breaks the rule of its name, a lower constant exceeds its upper one, or the
            shapes do not broadcast.
        TypeError: a value is not real.
    """
    for name, value in values.items():
        _check(name, value)
    for low, high in _ORDERED:
        if low in values and high in values:
            _check_order(low, values[low], high, values[high])
    shapes = [np.shape(value) for value in values.values()]
    try:
        shape = np.broadcast_shapes(*shapes)
    except ValueError:
        listed = ", ".join(f"{name} {s}" for name, s in zip(values, shapes, strict=True) if s)
        msg = f"the arguments must broadcast against each other, got shapes {listed}; give them axes of length 1."
        raise ValueError(msg) from None
    dtypes = [jax.dtypes.canonicalize_dtype(v.dtype) for v in values.values() if hasattr(v, "dtype")]
    floating = [d for d in dtypes if jnp.issubdtype(d, jnp.floating)]
    dtype = max(floating, key=lambda d: jnp.finfo(d).bits, default=jnp.result_type(float))
    return [
        np.broadcast_to(np.asarray(value, dtype), shape)
        if is_concrete(value)
        else jnp.broadcast_to(jnp.asarray(value, dtype), shape)
        for value in values.values()
    ]


def checked(bound: Callable[_Arguments, _Bound]) -> Callable[_Arguments, _Bound]:
    """Return a bound that checks its arguments outside a trace, and is one compiled program per shape and dtype.

    Options other than numbers are keyword-only and called `printed`.
    """
    signature = inspect.signature(bound)
    options = [name for name in signature.parameters if name == "printed"]
    compiled = jax.jit(bound, static_argnames=options)

    @functools.wraps(bound)
    def call(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Bound:
        given = signature.bind(*args, **kwargs)
        given.apply_defaults()
        static = {name: given.arguments.pop(name) for name in options}
        numbers = dict(zip(given.arguments, _checked_numbers(given.arguments), strict=True))
        return compiled(**numbers, **static)  # pyright: ignore[reportCallIssue]

    return call


def _check(name: str, value: Any) -> None:
    dtype = value.dtype if isinstance(value, jax.core.Tracer) else np.asarray(value).dtype
    if not (jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)):
        msg = f"{name} must be a real number or an array of them, got {dtype}."
        raise TypeError(msg)
    if not is_concrete(value):
        return
    rule = _RULES.get(name, _SIZE)
    numbers = np.atleast_1d(np.asarray(value, np.float64))
    good = rule.holds(numbers)
    if not np.all(good):
        msg = f"{name} must be {rule.what}, got {numbers[~good][0]:g}; {rule.remedy}."
        raise ValueError(msg)


def _check_order(low: str, lower: Any, high: str, upper: Any) -> None:
    if is_concrete((lower, upper)) and np.any(np.asarray(lower) > np.asarray(upper)):
        msg = f"{low} must be at most {high}, got {low} {lower} and {high} {upper}; were they swapped?"
        raise ValueError(msg)


def exponent(rate: Float[Array, "..."], t: Float[Array, "..."]) -> Float[Array, "..."]:
    """Return rate times t; 0 at t = 0 and inf at t = inf, whatever the rate."""
    finite = jnp.where(jnp.isinf(t), 0, t)
    return jnp.where(t == 0, 0, jnp.where(jnp.isinf(t), jnp.inf, rate * finite))


def grown(
    first: Float[Array, "..."], second: Float[Array, "..."], z: Float[Array, "..."], k: int
) -> Float[Array, "..."]:
    r"""Return first times second times $\varphi_k(z)$, k = 1 or 2, z >= 0; 0 if one of the two is 0.

    Each takes half of $e^z$, which may overflow alone although the product does not.
    """
    z = jnp.minimum(z, 1e4)  # far beyond, where any dtype has overflowed, inf * 0 would be a NaN
    half = jnp.exp(0.5 * z)
    zero = (first == 0) | (second == 0)
    return jnp.where(zero, 0, (first * _damped_phi(z, k) * half) * (second * half))


def _damped_phi(z: Array, k: int) -> Array:
    r"""Return $e^{-z}\varphi_k(z)$, which is $\varphi_1(-z)$ for k = 1."""
    if k == 1:
        return phi(-z, 1)
    small = jnp.minimum(z, 2)
    large = jnp.maximum(z, 2)
    return jnp.where(z < 2, jnp.exp(-small) * phi(small, 2), (1 - (1 + large) * jnp.exp(-large)) / large**2)
