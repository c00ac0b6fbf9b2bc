r"""Where parameters enter one sample's program, and what their Jacobian factors into there.

At an entry the program is linear in a parameter: z = A * theta + (something else), and the Jacobian of output k is
$\sum_p a_p \otimes \Delta_{kp}$ over positions p: the input a at the position (known from the forward pass) and the
cotangent $\Delta$ of z (from a backward pass). Dense layers, convolutions, biases and look-ups are such entries; a
parameter with any other use, or with uses in different orders of its numbers, has none and is differentiated itself.
"""

from dataclasses import replace
from math import prod

import jax.numpy as jnp

from lazyjax._core.program import Constant, Line, Operand, Program
from lazyjax.kernels.layer_rules import MINUS, RULES, ParameterUse, Scale, Weight, fitted, long_roles


def find_entries(program: Program, num_leaves: int) -> dict[int, list[ParameterUse]]:
    """All entries of each leaf (the first arguments); leaves whose Jacobian does not factor are missing."""
    search = _Search(program)
    for leaf, slot in enumerate(program.arguments[:num_leaves]):
        search.weights[slot] = Weight(leaf, (), (), "m" * len(program.avals[slot].shape))
    search.constants.update(program.constants)
    entries: dict[int, list[ParameterUse]] = {leaf: [] for leaf in range(num_leaves)}
    opaque = set()
    for line in program.lines:
        for entry in search.visit(line):
            if isinstance(entry, ParameterUse):
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

    def visit(self, line: Line) -> list[ParameterUse | int]:
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
            entry = RULES[line.name](self.shape, line, position, weight) if line.name in RULES else None
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
            # Axes of length one may have come and gone, so that the shape belongs to the order.
            path = (*weight.path, ("transpose", before, tuple(order)))
            return replace(weight, path=path, roles="".join(weight.roles[i] for i in order))
        if line.name == "broadcast_in_dim":
            roles = ["p"] * len(aval.shape)
            for axis, to in enumerate(line.eqn.params["broadcast_dimensions"]):
                if before[axis] == aval.shape[to]:
                    roles[to] = weight.roles[axis]
            return replace(weight, roles="".join(roles))
        reshaped = line.name == "squeeze" or _is_row_major(line)
        roles = fitted(weight.roles, before, aval.shape) if reshaped else None
        if roles is None and _is_row_major(line) and "p" not in long_roles(weight.roles, before):
            roles = "m" * len(aval.shape)
        return None if roles is None else replace(weight, path=(*weight.path, aval.shape), roles=roles)

    def _forward(self, entry: ParameterUse) -> ParameterUse:
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

    def _step(self, entry: ParameterUse, line: Line, position: int) -> ParameterUse | None:
        target = line.outputs[0]
        scale = self._scale(line, position)
        if line.name in ("add", "add_any") or (line.name == "sub" and position == 0):
            scale = ()
        elif line.name == "sub":
            scale = ((MINUS, 1),)
        before, after = self.shape(entry.target), self.shape(target)
        roles = entry.roles
        if scale is None and (line.name in ("squeeze", "broadcast_in_dim") or _is_row_major(line)):
            scale, roles = (), fitted(entry.roles, before, after)
        # An operand of another shape would be repeated: other positions.
        if scale is None or roles is None or (roles == entry.roles and before != after):
            return None
        return replace(entry, target=target, scales=entry.scales + scale, roles=roles)


def _is_row_major(line: Line) -> bool:
    """Whether a line is a reshape that keeps the order of the numbers; with `dimensions` it transposes first."""
    return line.name == "reshape" and line.eqn.params["dimensions"] is None
