r"""What one equation does with a parameter: the rules by which its Jacobian factors there."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from jax import lax

from lazyjax._core.program import Constant, Line, Operand

ShapeOf = Callable[[Operand], tuple[int, ...]]

Scale = tuple[Operand, int]
"""A factor and its power, 1 or -1."""

MINUS = Constant(np.asarray(-1.0))


@dataclass(frozen=True)
class Weight:
    """What a slot holds: a parameter leaf, its numbers scaled, reordered, and repeated along axes.

    Attributes:
        leaf: Which leaf.
        path: The reorderings, in turn: equal paths mean an equal order.
        scales: Factors.
        roles: One letter an axis: m, an axis of the leaf; p, one along which it is repeated.
    """

    leaf: int
    path: tuple[Hashable, ...]
    scales: tuple[Scale, ...]
    roles: str


@dataclass(frozen=True)
class ParameterUse:
    """One entry of one leaf.

    Attributes:
        leaf: Which leaf.
        kind: "product", "convolution", "addition" or "rows" (a look-up).
        order: Equal for entries with the same order of the leaf's numbers in `a` and the cotangent.
        line: The equation; its operand number `other` holds what `a` is made of.
        scales: Factors of `a`.
        target: The slot whose cotangent is taken, on from the equation as far as it stays the same.
        roles: The axes of the target: p, positions; g, groups (axes that `a` and the leaf share); m, the leaf's own.
        sizes: (positions, groups, inputs, outputs): a is (p, g, d), the cotangent (p, g, m), the leaf g*d*m numbers.
    """

    leaf: int
    kind: str
    order: Hashable
    line: Line
    other: int
    scales: tuple[Scale, ...]
    target: int
    roles: str
    sizes: tuple[int, int, int, int]


def long_roles(roles: str, shape: tuple[int, ...]) -> str:
    """The roles of the axes longer than one."""
    return "".join(role for role, size in zip(roles, shape, strict=True) if size != 1)


def fitted(roles: str, before: tuple[int, ...], after: tuple[int, ...]) -> str | None:
    """The roles of a shape that has gained or lost axes of length one only; None for any other change."""
    if [size for size in before if size != 1] != [size for size in after if size != 1]:
        return None
    rest = iter(long_roles(roles, before))
    return "".join("p" if size == 1 else next(rest) for size in after)


def _product(shape_of: ShapeOf, line: Line, position: int, weight: Weight) -> ParameterUse | None:
    shapes = [shape_of(operand) for operand in line.inputs]
    if "p" in long_roles(weight.roles, shapes[position]):
        return None
    contract, batch = line.eqn.params["dimension_numbers"]
    other = 1 - position
    ours, theirs = free_axes(line, position, shapes[position]), free_axes(line, other, shapes[other])
    sides = ["p" * len(theirs), "m" * len(ours)]
    roles = "g" * len(batch[0]) + "".join(sides if position == 1 else sides[::-1])
    sizes = (
        prod(shapes[other][i] for i in theirs),
        prod(shapes[other][i] for i in batch[other]),
        prod(shapes[other][i] for i in contract[other]),
        prod(shapes[position][i] for i in ours),
    )
    order = (weight.path, "product", tuple(batch[position]), tuple(contract[position]), shapes[position])
    return ParameterUse(weight.leaf, "product", order, line, other, weight.scales, line.outputs[0], roles, sizes)


def free_axes(line: Line, position: int, shape: tuple[int, ...]) -> list[int]:
    """The axes of an operand of a product that are neither contracted nor shared."""
    contract, batch = line.eqn.params["dimension_numbers"]
    return [i for i in range(len(shape)) if i not in (*contract[position], *batch[position])]


def _convolution(shape_of: ShapeOf, line: Line, position: int, weight: Weight) -> ParameterUse | None:
    params = line.eqn.params
    kernel = shape_of(line.inputs[position])
    if position != 1 or "p" in long_roles(weight.roles, kernel) or params["batch_group_count"] != 1:
        return None
    out = params["dimension_numbers"].out_spec
    roles = ["p"] * len(out)
    roles[out[1]] = "m"
    shape = shape_of(line.outputs[0])
    groups = params["feature_group_count"]
    spec = params["dimension_numbers"].rhs_spec
    sizes = (
        prod(size for axis, size in enumerate(shape) if axis != out[1]),
        groups,
        prod(kernel[axis] for axis in spec[1:]),
        shape[out[1]] // groups,
    )
    order = (weight.path, "convolution", tuple(spec), groups, kernel)
    return ParameterUse(
        weight.leaf, "convolution", order, line, 0, weight.scales, line.outputs[0], "".join(roles), sizes
    )


def _addition(shape_of: ShapeOf, line: Line, position: int, weight: Weight) -> ParameterUse | None:
    before, shape = shape_of(line.inputs[position]), shape_of(line.outputs[0])
    if len(before) != len(shape) or 0 in shape:
        return None
    # An axis of length one is repeated.
    axes = list(zip(weight.roles, before, shape, strict=True))
    roles = "".join(role if size == to else "p" for role, size, to in axes)
    scales = weight.scales
    if line.name == "sub" and position == 1:
        scales = (*scales, (MINUS, 1))
    inner = [size for size, role in zip(shape, roles, strict=True) if role == "m"]
    sizes = (prod(shape) // prod(inner), 1, 1, prod(inner))
    order = (weight.path, "addition", tuple(inner))
    return ParameterUse(weight.leaf, "addition", order, line, 1 - position, scales, line.outputs[0], roles, sizes)


def _rows(shape_of: ShapeOf, line: Line, position: int, weight: Weight) -> ParameterUse | None:
    """A look-up of rows, theta[i]."""
    dims: Any = line.eqn.params["dimension_numbers"]
    table = shape_of(line.inputs[position])
    indices = shape_of(line.inputs[1]) if position == 0 else ()
    plain = dims.collapsed_slice_dims == dims.start_index_map == (0,) and not dims.operand_batching_dims
    whole = tuple(line.eqn.params["slice_sizes"]) == (1, *table[1:])
    known = line.eqn.params["mode"] in _MODES
    if position != 0 or not (plain and whole and known) or "p" in long_roles(weight.roles, table):
        return None
    out = len(shape_of(line.outputs[0]))
    roles = "".join("m" if axis in dims.offset_dims else "p" for axis in range(out))
    sizes = (prod(indices[:-1]), 1, table[0], prod(table[1:]))
    order = (weight.path, "rows", table)
    return ParameterUse(weight.leaf, "rows", order, line, 1, weight.scales, line.outputs[0], roles, sizes)


# What becomes of indices outside the table is known for these.
_MODES = (
    lax.GatherScatterMode.CLIP,
    lax.GatherScatterMode.FILL_OR_DROP,
    lax.GatherScatterMode.PROMISE_IN_BOUNDS,
)

Rule = Callable[[ShapeOf, Line, int, Weight], ParameterUse | None]

RULES: dict[str, Rule] = {
    "dot_general": _product,
    "conv_general_dilated": _convolution,
    "add": _addition,
    "add_any": _addition,
    "sub": _addition,
    "gather": _rows,
}
"""By primitive: (shapes, line, position of the parameter, what it holds) to its entry, None where there is none."""
