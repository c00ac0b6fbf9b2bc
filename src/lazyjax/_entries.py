r"""Where parameters enter one sample's program, and what their Jacobian factors into there.

At an entry the program is linear in a parameter: z = A * theta + (something else), and the Jacobian of output k is
$\sum_p a_p \otimes \Delta_{kp}$ over positions p: the input a at the position (known from the forward pass) and the
cotangent $\Delta$ of z (from a backward pass). Dense layers, convolutions, biases and look-ups are such entries; a
parameter with any other use, or with uses in different orders of its numbers, has none and is differentiated itself.
"""

from collections.abc import Hashable
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from lazyjax._program import Constant, Line, Operand, Program

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
class Entry:
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


def find_entries(program: Program, num_leaves: int) -> dict[int, list[Entry]]:
    """All entries of each leaf (the first arguments); leaves whose Jacobian does not factor are missing."""
    search = _Search(program)
    for leaf, slot in enumerate(program.arguments[:num_leaves]):
        search.weights[slot] = Weight(leaf, (), (), "m" * len(program.avals[slot].shape))
    search.constants.update(program.constants)
    entries: dict[int, list[Entry]] = {leaf: [] for leaf in range(num_leaves)}
    opaque = set()
    for line in program.lines:
        for entry in search.visit(line):
            if isinstance(entry, Entry):
                entries[entry.leaf].append(entry)
            else:
                opaque.add(entry)
    if program.output in search.weights:
        opaque.add(search.weights[program.output].leaf)
    for leaf, found in entries.items():
        if len({entry.order for entry in found}) > 1:
            opaque.add(leaf)
    return {leaf: found for leaf, found in entries.items() if leaf not in opaque}


class _Search:
    """What is known of each slot while going through the lines."""

    def __init__(self, program: Program):
        self.program = program
        self.weights: dict[Operand, Weight] = {}
        self.constants: set[Operand] = set()
        self.uniform: set[Operand] = set()
        self.readers: dict[Operand, list[tuple[Line, int]]] = {}
        for line in program.lines:
            for position, operand in enumerate(line.inputs):
                if not isinstance(operand, Constant):
                    self.readers.setdefault(operand, []).append((line, position))

    def visit(self, line: Line) -> list[Entry | int]:
        """The entries of a line, or the leaves that it treats in a way without a rule."""
        held = [i for i, operand in enumerate(line.inputs) if self._weight(operand) is not None]
        if not held:
            self._note_constants(line)
            return []
        if len(held) == 1:
            position = held[0]
            weight = self.weights[line.inputs[position]]
            carried = self._carry(line, position, weight)
            if carried is not None:
                self.weights[line.outputs[0]] = carried
                return []
            entry = _RULES[line.name](self, line, position, weight) if line.name in _RULES else None
            if entry is not None:
                return [self._forward(entry)]
        return [self.weights[line.inputs[i]].leaf for i in held]

    def _weight(self, operand: Operand) -> Weight | None:
        return None if isinstance(operand, Constant) else self.weights.get(operand)

    def shape(self, operand: Operand) -> tuple[int, ...]:
        """The shape of an operand."""
        return operand.value.shape if isinstance(operand, Constant) else self.program.avals[operand].shape

    def _note_constants(self, line: Line) -> None:
        if not all(isinstance(operand, Constant) or operand in self.constants for operand in line.inputs):
            return
        self.constants.update(line.outputs)
        same = line.name in ("broadcast_in_dim", "convert_element_type", "reshape")
        if same and self.is_uniform(line.inputs[0]):
            self.uniform.update(line.outputs)

    def is_uniform(self, operand: Operand) -> bool:
        """Whether an operand is one number (repeated) that depends on neither parameters nor data."""
        if isinstance(operand, Constant):
            return operand.value.size == 1
        return operand in self.uniform or (operand in self.constants and prod(self.shape(operand)) == 1)

    def _scale(self, line: Line, position: int) -> tuple[Scale, ...] | None:
        """The factor by which a line multiplies its operand, None if it does something else."""
        if line.name == "neg":
            return ((MINUS, 1),)
        if line.name in ("copy", "copy_p"):
            return ()
        if line.name == "mul" and self.is_uniform(line.inputs[1 - position]):
            return ((line.inputs[1 - position], 1),)
        if line.name == "div" and position == 0 and self.is_uniform(line.inputs[1]):
            return ((line.inputs[1], -1),)
        return None

    def _carry(self, line: Line, position: int, weight: Weight) -> Weight | None:
        """What the result of a line is, if it is the leaf still."""
        scale = self._scale(line, position)
        aval, before = self.program.avals[line.outputs[0]], self.shape(line.inputs[position])
        if scale is not None and aval.shape == before:
            return replace(weight, scales=weight.scales + scale)
        if line.name == "convert_element_type" and jnp.issubdtype(aval.dtype, jnp.floating):
            return weight
        if line.name == "transpose":
            order = line.eqn.params["permutation"]
            path = (*weight.path, ("transpose", tuple(order)))
            return replace(weight, path=path, roles="".join(weight.roles[i] for i in order))
        if line.name == "broadcast_in_dim":
            roles = ["p"] * len(aval.shape)
            for axis, to in enumerate(line.eqn.params["broadcast_dimensions"]):
                if before[axis] == aval.shape[to]:
                    roles[to] = weight.roles[axis]
            return replace(weight, roles="".join(roles))
        roles = _fitted(weight.roles, before, aval.shape) if line.name in ("reshape", "squeeze") else None
        if roles is None and line.name == "reshape" and "p" not in _long(weight.roles, before):
            roles = "m" * len(aval.shape)
        return None if roles is None else replace(weight, path=(*weight.path, aval.shape), roles=roles)

    def _forward(self, entry: Entry) -> Entry:
        """The entry with its target moved on, as long as all that follows is scaled by one number and added to."""
        while True:
            readers = self.readers.get(entry.target, [])
            if len(readers) != 1 or entry.target == self.program.output:
                return entry
            line, position = readers[0]
            moved = self._step(entry, line, position)
            if moved is None:
                return entry
            entry = moved

    def _step(self, entry: Entry, line: Line, position: int) -> Entry | None:
        target = line.outputs[0]
        scale = self._scale(line, position)
        if line.name in ("add", "add_any") or (line.name == "sub" and position == 0):
            scale = ()
        elif line.name == "sub":
            scale = ((MINUS, 1),)
        before, after = self.shape(entry.target), self.shape(target)
        roles = entry.roles
        if scale is None and line.name in ("reshape", "squeeze", "broadcast_in_dim"):
            scale, roles = (), _fitted(entry.roles, before, after)
        # An operand of another shape would be repeated: other positions.
        if scale is None or roles is None or (roles == entry.roles and before != after):
            return None
        return replace(entry, target=target, scales=entry.scales + scale, roles=roles)


def _long(roles: str, shape: tuple[int, ...]) -> str:
    """The roles of the axes longer than one."""
    return "".join(role for role, size in zip(roles, shape, strict=True) if size != 1)


def _fitted(roles: str, before: tuple[int, ...], after: tuple[int, ...]) -> str | None:
    """The roles of a shape that has gained or lost axes of length one only; None for any other change."""
    if [size for size in before if size != 1] != [size for size in after if size != 1]:
        return None
    rest = iter(_long(roles, before))
    return "".join("p" if size == 1 else next(rest) for size in after)


def _product(search: _Search, line: Line, position: int, weight: Weight) -> Entry | None:
    shapes = [search.shape(operand) for operand in line.inputs]
    if "p" in _long(weight.roles, shapes[position]):
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
    return Entry(weight.leaf, "product", order, line, other, weight.scales, line.outputs[0], roles, sizes)


def free_axes(line: Line, position: int, shape: tuple[int, ...]) -> list[int]:
    """The axes of an operand of a product that are neither contracted nor shared."""
    contract, batch = line.eqn.params["dimension_numbers"]
    return [i for i in range(len(shape)) if i not in (*contract[position], *batch[position])]


def _convolution(search: _Search, line: Line, position: int, weight: Weight) -> Entry | None:
    params = line.eqn.params
    kernel = search.shape(line.inputs[position])
    if position != 1 or "p" in _long(weight.roles, kernel) or params["batch_group_count"] != 1:
        return None
    out = params["dimension_numbers"].out_spec
    roles = ["p"] * len(out)
    roles[out[1]] = "m"
    shape = search.shape(line.outputs[0])
    groups = params["feature_group_count"]
    spec = params["dimension_numbers"].rhs_spec
    sizes = (
        prod(size for axis, size in enumerate(shape) if axis != out[1]),
        groups,
        prod(kernel[axis] for axis in spec[1:]),
        shape[out[1]] // groups,
    )
    order = (weight.path, "convolution", tuple(spec), groups)
    return Entry(weight.leaf, "convolution", order, line, 0, weight.scales, line.outputs[0], "".join(roles), sizes)


def _addition(search: _Search, line: Line, position: int, weight: Weight) -> Entry | None:
    before, shape = search.shape(line.inputs[position]), search.shape(line.outputs[0])
    if len(before) != len(shape):
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
    return Entry(weight.leaf, "addition", order, line, 1 - position, scales, line.outputs[0], roles, sizes)


def _rows(search: _Search, line: Line, position: int, weight: Weight) -> Entry | None:
    """A look-up of rows, theta[i]."""
    dims: Any = line.eqn.params["dimension_numbers"]
    table = search.shape(line.inputs[position])
    indices = search.shape(line.inputs[1]) if position == 0 else ()
    plain = dims.collapsed_slice_dims == dims.start_index_map == (0,) and not dims.operand_batching_dims
    whole = tuple(line.eqn.params["slice_sizes"]) == (1, *table[1:])
    known = line.eqn.params["mode"] in _MODES
    if position != 0 or not (plain and whole and known) or "p" in _long(weight.roles, table):
        return None
    out = len(search.shape(line.outputs[0]))
    roles = "".join("m" if axis in dims.offset_dims else "p" for axis in range(out))
    sizes = (prod(indices[:-1]), 1, table[0], prod(table[1:]))
    order = (weight.path, "rows")
    return Entry(weight.leaf, "rows", order, line, 1, weight.scales, line.outputs[0], roles, sizes)


_MODES = (
    lax.GatherScatterMode.CLIP,
    lax.GatherScatterMode.FILL_OR_DROP,
    lax.GatherScatterMode.PROMISE_IN_BOUNDS,
)

_RULES = {
    "dot_general": _product,
    "conv_general_dilated": _convolution,
    "add": _addition,
    "add_any": _addition,
    "sub": _addition,
    "gather": _rows,
}
