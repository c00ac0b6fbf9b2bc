r"""What the finite-difference transform carries: values at two ends of one step.

A program h is followed from $w_0$ to $w_0 + \epsilon u$ at once. A floating value that depends on
the parameters is a `Moved` pair (old, delta), meaning $\text{new} = \text{old} + \epsilon\,\delta$;
a boolean, integer or key that depends on them is a `Switched` pair (old, new); everything else is
a bare array. The rules of this transform never form new - old by subtraction where the two are
close, which is why no digits are lost however small $\epsilon$ is.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core

from lazyjax._core.program import as_function


class Moved(NamedTuple):
    """A floating value and its divided difference: new = old + eps * delta."""

    old: Any
    delta: Any


class Switched(NamedTuple):
    """A discrete value at both ends of the step."""

    old: Any
    new: Any


Value = Any
"""A bare array, a `Moved` or a `Switched`."""

Rule = Callable[["Step", core.JaxprEqn, list[Any], list[Value]], list[Any]]
"""(step, equation, its outputs at the old values, its operands) -> the divided differences of the outputs."""


def is_pair(value: Value) -> bool:
    """Return whether the value depends on the parameters."""
    return isinstance(value, Moved | Switched)


def old_of(value: Value) -> Any:
    """Return the value at the start of the step."""
    return value.old if is_pair(value) else value


def delta_of(value: Value) -> Any | None:
    """Return the divided difference, or None for a value that does not move."""
    return value.delta if isinstance(value, Moved) else None


def delta_or_zeros(value: Value) -> Any:
    """Return the divided difference as an array: zeros for a value that does not move."""
    return value.delta if isinstance(value, Moved) else jnp.zeros_like(value)


def is_floating(aval: Any) -> bool:
    """Return whether an array type is real or complex floating, hence carried as a `Moved` pair."""
    return hasattr(aval, "dtype") and jnp.issubdtype(aval.dtype, jnp.inexact)


def unit_roundoff(dtype: Any) -> float:
    """Return the spacing of the floating numbers just above one."""
    return float(jnp.finfo(dtype).eps)


def gap(x: Any, y: Any) -> Any:
    """Return x - y, zero also for equal infinities and always finite.

    Finite, because the value is multiplied by 1/eps in branches that are not taken, and
    a zero cotangent times an infinity would turn a gradient into NaN.
    """
    if jnp.iscomplexobj(x):
        return lax.complex(gap(jnp.real(x), jnp.real(y)), gap(jnp.imag(x), jnp.imag(y)))
    largest = float(jnp.finfo(jnp.result_type(x)).max)
    return jnp.clip(jnp.where(x == y, 0, x - y), -largest, largest)


def snapped_gap(x: Any, y: Any) -> Any:
    """Return `gap`, with differences of a few units in the last place taken as zero.

    For operands that are *structurally* equal (a maximum and its winner). A compiler may evaluate
    such an operand twice, contracting multiplications and additions differently, and that last
    bit must not be divided by eps.
    """
    difference = gap(x, y)
    resolution = 4 * unit_roundoff(difference.dtype)
    # An infinite operand must not make the threshold infinite, else every gap would vanish.
    threshold = resolution * jnp.minimum(jnp.abs(x), jnp.abs(y))
    return jnp.where(jnp.abs(difference) <= threshold, 0, difference)


def _times(real: Any, z: Any) -> Any:
    """Return a real number times a real or complex array: part by part, so that an infinite part stays alone."""
    return lax.complex(real * jnp.real(z), real * jnp.imag(z)) if jnp.iscomplexobj(z) else real * z


def _parts(eps: Any, dtype: Any) -> tuple[Any, Any, Any]:
    """Return eps, 1/eps (zero at eps = 0) and whether eps counts as zero, in one dtype.

    Below the smallest normal number eps is zero: 1/eps would overflow and processors flush
    such numbers to zero anyway.
    """
    cast = lax.convert_element_type(eps, dtype)
    is_zero = jnp.abs(cast) < float(jnp.finfo(dtype).tiny)
    inverse = jnp.where(is_zero, 0, 1 / jnp.where(is_zero, 1, cast))
    return cast, inverse, is_zero


@dataclass(frozen=True)
class Step:
    """The size of the step, with what every rule needs of it.

    Attributes:
        eps: Step size, a scalar of the parameters' (widest) dtype.
        parts: eps, its guarded inverse and `eps == 0`, in that dtype.
        never_zero: eps is known while tracing and is not zero, so no limit need be computed.
    """

    eps: Any
    parts: tuple[Any, Any, Any]
    never_zero: bool

    @classmethod
    def of_size(cls, eps: Any, *, never_zero: bool) -> "Step":
        """Make a step of size eps, a floating scalar."""
        return cls(eps, _parts(eps, eps.dtype), never_zero)

    def _parts_in(self, dtype: Any) -> tuple[Any, Any, Any]:
        dtype = jnp.finfo(dtype).dtype  # the real one of a complex dtype
        return self.parts if dtype == self.eps.dtype else _parts(self.eps, dtype)

    def scaled(self, delta: Any) -> Any:
        """Return eps * delta: how far the value moves."""
        return _times(self._parts_in(delta.dtype)[0], delta)

    def quotient(self, difference: Any) -> Any:
        """Return difference / eps, and 0 at eps = 0."""
        return _times(self._parts_in(difference.dtype)[1], difference)

    def is_zero(self, dtype: Any) -> Any:
        """Return whether eps is zero, a boolean scalar."""
        return self._parts_in(dtype)[2]

    def new_of(self, value: Value) -> Any:
        """Return the value at the end of the step, rounded to its dtype."""
        if isinstance(value, Switched):
            return value.new
        return value.old + self.scaled(value.delta) if isinstance(value, Moved) else value

    def jump(self, new: Any, old: Any) -> Any:
        """Return (new - old)/eps of values that differ because something discrete switched."""
        return self.quotient(snapped_gap(new, old))

    def limit_or(self, limit: Callable[[], Any], delta: Any) -> Any:
        """Return delta for eps != 0, limit() at eps = 0; the limit is not computed if it is not needed."""
        if self.never_zero:
            return delta
        return jnp.where(self.is_zero(delta.dtype), limit(), delta)


def bind(eqn: core.JaxprEqn, args: Sequence[Any], **overrides: Any) -> list[Any]:
    """Apply the primitive of an equation to other operands and return a list of outputs."""
    out = eqn.primitive.bind(*args, **{**eqn.params, **overrides})
    return list(out) if eqn.primitive.multiple_results else [out]


def derivative(eqn: core.JaxprEqn, values: Sequence[Value]) -> list[Any]:
    """Return `jax.jvp` of one equation along the deltas, at the old values: the limit eps = 0."""
    function = as_function(eqn)
    moving = [i for i, v in enumerate(values) if isinstance(v, Moved)]
    olds = [old_of(v) for v in values]

    def of_moving(*args: Any) -> list[Any]:
        full = list(olds)
        for i, arg in zip(moving, args, strict=True):
            full[i] = arg
        return function(*full)

    primals = [jnp.asarray(olds[i]) for i in moving]
    _, tangents = jax.jvp(of_moving, primals, [values[i].delta for i in moving])
    return tangents
