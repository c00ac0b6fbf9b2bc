r"""Difference rules of maxima over sliding windows (pooling) and of their derivatives.

A window is a set of offsets, and the operand at one offset, for all windows at once, is a strided
slice. Walking the offsets keeps the running winner of every window at both ends of the step,
the new one decided by differences as in `piecewise`. Of equal candidates the first
offset wins, which is XLA's convention for these primitives.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core

from lazyjax.difference.pair import Moved, Rule, Step, Value, delta_of, old_of, snapped_gap


@dataclass(frozen=True)
class Windows:
    """The geometry of a windowed primitive: where each offset of each window lies."""

    dimensions: tuple[int, ...]
    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    base_dilation: tuple[int, ...]
    window_dilation: tuple[int, ...]

    @classmethod
    def of(cls, eqn: core.JaxprEqn) -> "Windows":
        """Return the windows of an equation."""
        ones = (1,) * len(eqn.params["window_dimensions"])

        def ints(name: str) -> tuple[int, ...]:
            # Some libraries hand in NumPy integers.
            return tuple(int(n) for n in eqn.params.get(name, ones))

        return cls(
            ints("window_dimensions"),
            ints("window_strides"),
            tuple((int(low), int(high)) for low, high in eqn.params["padding"]),
            ints("base_dilation"),
            ints("window_dilation"),
        )

    def _padded(self, z: Any, fill: float) -> Any:
        """Return the operand, dilated and padded: negative padding crops."""
        config = [
            (low, high, dilation - 1) for (low, high), dilation in zip(self.padding, self.base_dilation, strict=True)
        ]
        return lax.pad(z, np.asarray(fill, z.dtype), config)

    def _bounds(self, shape: tuple[int, ...]) -> Iterator[tuple[list[int], list[int]]]:
        """Yield the first and last index of every offset's strided slice of the padded operand."""
        spans = [
            (size - 1) * dilation + 1 for size, dilation in zip(self.dimensions, self.window_dilation, strict=True)
        ]
        counts = [(size - span) // stride + 1 for size, span, stride in zip(shape, spans, self.strides, strict=True)]
        for offset in itertools.product(*map(range, self.dimensions)):
            start = [o * d for o, d in zip(offset, self.window_dilation, strict=True)]
            last = [s + (n - 1) * stride for s, n, stride in zip(start, counts, self.strides, strict=True)]
            yield start, last

    def slices(self, z: Any, fill: float) -> Iterator[Any]:
        """Yield the operand at each offset, one entry per window."""
        padded = self._padded(z, fill)
        for start, last in self._bounds(padded.shape):
            yield lax.slice(padded, start, [i + 1 for i in last], self.strides)

    def scatter(self, parts: list[Any], like: Any) -> Any:
        """Return the transpose of `slices` (fill 0), summed over the offsets."""
        zero = np.zeros((), like.dtype)
        shape = self._padded(jnp.zeros_like(like), 0.0).shape
        total = jnp.zeros(shape, like.dtype)
        for part, (start, last) in zip(parts, self._bounds(shape), strict=True):
            config = [
                (s, size - 1 - i, stride - 1)
                for s, i, size, stride in zip(start, last, shape, self.strides, strict=True)
            ]
            total = total + lax.pad(part, zero, config)
        crop = [(-low, -high, 0) for low, high in self.padding]
        return lax.pad(total, zero, crop)


@dataclass(frozen=True)
class _Winners:
    """The winners of all windows: values and offset numbers, at both ends of the step."""

    old: Any
    new: Moved
    old_index: Any
    new_index: Any


def _winners(step: Step, windows: Windows, operand: Value, sign: int) -> _Winners:
    """Find the winners of windows that keep the largest entry (sign 1) or the smallest (-1)."""
    z, delta = old_of(operand), delta_of(operand)
    olds = list(windows.slices(sign * z, -np.inf))
    deltas = [jnp.zeros_like(olds[0])] * len(olds) if delta is None else list(windows.slices(sign * delta, 0.0))
    best, new = olds[0], Moved(olds[0], deltas[0])
    old_index = new_index = jnp.zeros(best.shape, jnp.int32)
    for k, (value, slope) in enumerate(zip(olds[1:], deltas[1:], strict=True), start=1):
        old_index = jnp.where(value > best, k, old_index)
        best = jnp.maximum(best, value)
        takes = (value - new.old) + step.scaled(slope - new.delta) > 0
        new_index = jnp.where(takes, k, new_index)
        new = Moved(jnp.where(takes, value, new.old), jnp.where(takes, slope, new.delta))
    return _Winners(best, new, old_index, new_index)


def _reduce_window(sign: int) -> Rule:
    def rule(step: Step, eqn: core.JaxprEqn, outs: list[Any], values: list[Value]) -> list[Any]:
        del outs
        won = _winners(step, Windows.of(eqn), values[0], sign)
        return [sign * (won.new.delta + step.quotient(snapped_gap(won.new.old, won.old)))]

    return rule


def _selected(step: Step, eqn: core.JaxprEqn, operand: Value) -> tuple[Windows, list[Any]]:
    """Return for each offset whether it wins at the old and at the new end, as a pair of masks."""
    sign = {"ge": 1, "le": -1}[eqn.params["select_prim"].name]
    windows = Windows.of(eqn)
    won = _winners(step, windows, operand, sign)
    count = int(np.prod(windows.dimensions))
    return windows, [(won.old_index == k, won.new_index == k) for k in range(count)]


def _contribution(step: Step, masks: tuple[Any, Any], z: Any, delta: Any | None) -> Any:
    """Return the difference of mask * z: what the new mask lets through, and what the masks exchange."""
    was, becomes = masks
    exchanged = jnp.where(becomes, z, 0) - jnp.where(was, z, 0)
    change = step.quotient(jnp.where(was == becomes, 0, exchanged))
    return change if delta is None else change + jnp.where(becomes, delta, 0)


def _select_and_scatter_add(step: Step, eqn: core.JaxprEqn, outs: list[Any], values: list[Value]) -> list[Any]:
    del outs
    source, operand = values
    windows, masks = _selected(step, eqn, operand)
    parts = [_contribution(step, m, old_of(source), delta_of(source)) for m in masks]
    return [windows.scatter(parts, old_of(operand))]


def _select_and_gather_add(step: Step, eqn: core.JaxprEqn, outs: list[Any], values: list[Value]) -> list[Any]:
    tangents, operand = values
    windows, masks = _selected(step, eqn, operand)
    olds = list(windows.slices(old_of(tangents), 0.0))
    delta = delta_of(tangents)
    deltas = [None] * len(olds) if delta is None else list(windows.slices(delta, 0.0))
    total = jnp.zeros_like(outs[0])
    for mask, z, d in zip(masks, olds, deltas, strict=True):
        total = total + _contribution(step, mask, z, d)
    return [total]


WINDOW_RULES: dict[str, Rule] = {
    "reduce_window_max": _reduce_window(1),
    "reduce_window_min": _reduce_window(-1),
    "select_and_scatter_add": _select_and_scatter_add,
    "select_and_gather_add": _select_and_gather_add,
}
