"""Windows of an array side by side, and the two operations that are evaluated by them.

XLA computes or compiles the derivatives of some windowed operations slowly: a float64 convolution on a CPU takes up to
a hundred times as long as the product of patches and weights, and the transpose of a maximum over windows is a scatter.
Slices of the array, one for each place in the window, have neither trouble.
"""

from collections.abc import Sequence
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from lazyjax._core.program import Line, aval_of


def evaluate_by_windows(line: Line, operands: list[Any]) -> list[Any] | None:
    """Return the results of a line that is better evaluated by windows, None for any other line."""
    if is_product_of_patches(line):
        return [_convolve(line, *(jnp.asarray(operand) for operand in operands))]
    floating = line.name == "reduce_window_max" and jnp.issubdtype(aval_of(line.eqn.invars[0]).dtype, jnp.floating)
    if floating and set(line.eqn.params["base_dilation"]) == {1}:
        return [_max_pool(line, jnp.asarray(operands[0]))]
    return None


def is_product_of_patches(line: Line) -> bool:
    """Return whether a line is a convolution to be taken as one product: a float64 one on a CPU."""
    if line.name != "conv_general_dilated" or jax.default_backend() != "cpu":
        return False
    dtypes = {aval_of(atom).dtype for atom in (*line.eqn.invars, *line.eqn.outvars)}
    return dtypes == {jnp.dtype(jnp.float64)} and line.eqn.params["batch_group_count"] == 1


def patches(x: Array, line: Line) -> Array:
    """Return what each position of a convolution sees: (batch, *positions, groups, channels of a group, *kernel)."""
    p = line.eqn.params
    lhs, kernel_spec, _ = p["dimension_numbers"]
    kernel = [aval_of(line.eqn.invars[1]).shape[i] for i in kernel_spec[2:]]
    # Padding puts zeros between the numbers of a dilated input.
    inner = [(low, high, gap - 1) for (low, high), gap in zip(p["padding"], p["lhs_dilation"], strict=True)]
    seen = _windows(
        x.transpose(lhs), (1, 1, *kernel), (1, 1, *p["window_strides"]), (1, 1, *p["rhs_dilation"]), inner, 0.0
    )
    groups = p["feature_group_count"]
    # (batch, channels, *positions, kernel) -> (batch, *positions, groups, channels / groups, kernel)
    moved = jnp.moveaxis(seen, 1, -2)
    return moved.reshape(*moved.shape[:-2], groups, seen.shape[1] // groups, seen.shape[-1])


def _windows(
    x: Array,
    sizes: Sequence[int],
    steps: Sequence[int],
    gaps: Sequence[int],
    padding: Sequence[tuple[int, int, int]],
    fill: float,
) -> Array:
    """Return the windows of an array, (*positions, numbers of a window); the padding belongs to the last axes.

    Slices and not a gather, whose transpose would be a scatter; one axis after the other, since that takes fewer.
    """
    padding = [(0, 0, 0)] * (x.ndim - len(padding)) + list(padding)
    x = lax.pad(x, jnp.asarray(fill, x.dtype), padding)
    for axis, (size, step, gap) in enumerate(zip(sizes, steps, gaps, strict=True)):
        count = (x.shape[axis] - (size - 1) * gap - 1) // step + 1
        if size == step == 1:
            continue
        seen = [lax.slice_in_dim(x, o, o + (count - 1) * step + 1, step, axis) for o in range(0, size * gap, gap)]
        x = jnp.stack(seen, axis=-1)
    lead = len(sizes)
    return x.reshape(*x.shape[:lead], prod(sizes))


def _convolve(line: Line, x: Array, kernel: Array) -> Array:
    """Return a convolution as the product of its patches and its weights."""
    params = line.eqn.params
    spec, out_spec = params["dimension_numbers"].rhs_spec, params["dimension_numbers"].out_spec
    groups = params["feature_group_count"]
    seen = patches(x, line)
    weights = kernel.transpose(spec)
    weights = weights.reshape(groups, weights.shape[0] // groups, -1)
    lead = seen.shape[:-3]
    out = jnp.einsum("pgd,gmd->pgm", seen.reshape(prod(lead), groups, -1), weights).reshape(*lead, -1)
    # (batch, *positions, features) -> (batch, features, *positions) -> the order asked for
    out = jnp.moveaxis(out, -1, 1)
    return out.transpose(*(out_spec.index(i) for i in range(out.ndim)))


def _max_pool(line: Line, x: Array) -> Array:
    """Return the maxima over windows; as in XLA's own, the first of equal entries takes the derivative."""
    p = line.eqn.params
    padding = [(low, high, 0) for low, high in p["padding"]]
    seen = _windows(x, p["window_dimensions"], p["window_strides"], p["window_dilation"], padding, -np.inf)
    first = jax.nn.one_hot(jnp.argmax(lax.stop_gradient(seen), axis=-1), seen.shape[-1], dtype=bool)
    return jnp.sum(jnp.where(first, seen, 0), axis=-1)
