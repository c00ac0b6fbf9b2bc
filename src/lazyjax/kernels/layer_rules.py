r"""The rules of layers: where one sample's program uses a parameter, and what its Jacobian factors into there.

Where the program is linear in a parameter, z = A * theta + (something else), the Jacobian of output k is
$\sum_p a_p \otimes \Delta_{kp}$ over positions p: the input a at the position (known from the forward pass) and the
cotangent $\Delta$ of z (from a backward pass). Dense layers, convolutions, biases and look-ups are such uses.

One rule is one object, a `LayerRule`: it recognizes the use in an equation and gives the inputs a. All else (which
contraction is cheapest, what memory it takes, the products themselves) follows from the sizes it declares. To add a
rule, write a subclass and put its object into `RULES`.

`find_uses` walks a program. A parameter with a use that no rule recognizes, or with uses in different orders of its
numbers, has none, and is differentiated itself.
"""

import abc
from collections.abc import Hashable
from dataclasses import dataclass, replace
from math import prod
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from lazyjax._core.program import Constant, Line, Operand, Program, aval_of, value_of
from lazyjax.kernels.windows import patches

Scale = tuple[Operand, int]
"""A factor and its power, 1 or -1."""

MINUS = Constant(np.asarray(-1.0))


class Sizes(NamedTuple):
    """The sizes of the factors: a is (positions, groups, inputs), the cotangent (positions, groups, outputs)."""

    positions: int
    groups: int
    inputs: int
    outputs: int


@dataclass(frozen=True)
class Weight:
    """The content of a slot: a parameter leaf, its numbers scaled, reordered, and repeated along axes.

    Attributes:
        leaf: Which leaf.
        path: The reorderings, in turn: equal paths mean an equal order.
        scales: Factors.
        roles: One letter for each axis: m, an axis of the leaf; p, one along which it is repeated.
    """

    leaf: int
    path: tuple[Hashable, ...]
    scales: tuple[Scale, ...]
    roles: str


@dataclass(frozen=True)
class ParameterUse:
    """One use of one leaf.

    Attributes:
        leaf: Which leaf.
        rule: The rule that recognized the use.
        order: Equal for uses with the same order of the leaf's numbers in `a` and the cotangent.
        line: The equation.
        position: Which operand of the equation holds the leaf.
        scales: Factors of `a`.
        target: The slot whose cotangent is taken: the result, moved on past equations that keep its cotangent.
        roles: The axes of the target: p, positions; g, groups (axes that `a` and the leaf share); m, the leaf's own.
        sizes: Sizes of `a` and the cotangent; the leaf has groups * inputs * outputs numbers.
    """

    leaf: int
    rule: "LayerRule"
    order: Hashable
    line: Line
    position: int
    scales: tuple[Scale, ...]
    target: int
    roles: str
    sizes: Sizes


class LayerRule(abc.ABC):
    """A rule for how the Jacobian of a parameter factors if one kind of equation uses it.

    Attributes:
        name: In the table of `gram_plan`.
        primitives: Names of the equations that the rule reads.
        one_hot: Whether the inputs are one-hot vectors, given by the numbers (p,) of their ones; -1 for a zero vector.
    """

    name: str
    primitives: tuple[str, ...]
    one_hot: bool = False

    @abc.abstractmethod
    def recognize(self, line: Line, position: int, weight: Weight) -> ParameterUse | None:
        """Return the use that a line makes of the weight, its operand number `position`; None if it does not fit."""

    @abc.abstractmethod
    def inputs(self, use: ParameterUse, values: dict[int, Any]) -> Array:
        """Return a, (p, g, d), without the scales of the use, from the values of the program's slots."""

    def _use(
        self, line: Line, position: int, weight: Weight, *, roles: str, sizes: Sizes, order: tuple[Hashable, ...]
    ) -> ParameterUse:
        """Return the use of a weight at the first result of a line."""
        order = (weight.path, self.name, *order)
        return ParameterUse(weight.leaf, self, order, line, position, weight.scales, line.outputs[0], roles, sizes)


class Dense(LayerRule):
    """A product of a parameter with something else, also one for each of several groups."""

    name = "dense"
    primitives = ("dot_general",)

    def recognize(self, line: Line, position: int, weight: Weight) -> ParameterUse | None:
        """Return the use by a product: contracted axes are inputs, shared ones groups, the rest is free."""
        shape, other = _shape(line, position), _shape(line, 1 - position)
        if "p" in _long_roles(weight.roles, shape):
            return None
        contract, batch = line.eqn.params["dimension_numbers"]
        ours, theirs = _free_axes(line, position), _free_axes(line, 1 - position)
        sides = ["p" * len(theirs), "m" * len(ours)]
        return self._use(
            line,
            position,
            weight,
            roles="g" * len(batch[0]) + "".join(sides if position == 1 else sides[::-1]),
            sizes=Sizes(
                positions=prod(other[i] for i in theirs),
                groups=prod(other[i] for i in batch[1 - position]),
                inputs=prod(other[i] for i in contract[1 - position]),
                outputs=prod(shape[i] for i in ours),
            ),
            order=(tuple(batch[position]), tuple(contract[position]), shape),
        )

    def inputs(self, use: ParameterUse, values: dict[int, Any]) -> Array:
        """Return the other operand, its free axes as positions."""
        other = 1 - use.position
        contract, batch = use.line.eqn.params["dimension_numbers"]
        axes = (*_free_axes(use.line, other), *batch[other], *contract[other])
        return _operand(use, values, other).transpose(axes).reshape(use.sizes[:3])


class Convolution(LayerRule):
    """A convolution with a kernel; strides, dilations, padding and groups as they are."""

    name = "convolution"
    primitives = ("conv_general_dilated",)

    def recognize(self, line: Line, position: int, weight: Weight) -> ParameterUse | None:
        """Return the use by a convolution: positions of the window, a patch of the image at each as input."""
        params, kernel, out = line.eqn.params, _shape(line, position), _out_shape(line)
        if position != 1 or "p" in _long_roles(weight.roles, kernel) or params["batch_group_count"] != 1:
            return None
        feature, spec = params["dimension_numbers"].out_spec[1], params["dimension_numbers"].rhs_spec
        groups = params["feature_group_count"]
        return self._use(
            line,
            position,
            weight,
            roles="".join("m" if axis == feature else "p" for axis in range(len(out))),
            sizes=Sizes(
                positions=prod(size for axis, size in enumerate(out) if axis != feature),
                groups=groups,
                inputs=prod(kernel[axis] for axis in spec[1:]),
                outputs=out[feature] // groups,
            ),
            order=(tuple(spec), groups, kernel),
        )

    def inputs(self, use: ParameterUse, values: dict[int, Any]) -> Array:
        """Return the patches of the image, positions in the order of the target's axes."""
        seen = patches(_operand(use, values, 0), use.line)
        spec = use.line.eqn.params["dimension_numbers"].out_spec
        places = [axis for axis in spec if axis != spec[1]]
        lead = sorted(range(len(places)), key=places.__getitem__)
        return seen.transpose(*lead, *range(len(lead), seen.ndim)).reshape(use.sizes[:3])


class Bias(LayerRule):
    """An addition of a parameter, repeated along some axes."""

    name = "bias"
    primitives = ("add", "add_any", "sub")

    def recognize(self, line: Line, position: int, weight: Weight) -> ParameterUse | None:
        """Return the use by an addition: one input, the number 1, at every repetition."""
        before, out = _shape(line, position), _out_shape(line)
        if len(before) != len(out) or 0 in out:
            return None
        # An axis of length one is repeated.
        roles = "".join(role if size == to else "p" for role, size, to in zip(weight.roles, before, out, strict=True))
        if line.name == "sub" and position == 1:
            weight = replace(weight, scales=(*weight.scales, (MINUS, 1)))
        own = tuple(size for size, role in zip(out, roles, strict=True) if role == "m")
        sizes = Sizes(positions=prod(out) // prod(own), groups=1, inputs=1, outputs=prod(own))
        return self._use(line, position, weight, roles=roles, sizes=sizes, order=(own,))

    def inputs(self, use: ParameterUse, values: dict[int, Any]) -> Array:
        """Return ones."""
        return jnp.ones(use.sizes[:3], values[use.target].dtype)


class LookUp(LayerRule):
    """A look-up of rows of a table, theta[i]."""

    name = "look-up"
    primitives = ("gather",)
    one_hot = True

    # It is known for these what becomes of numbers outside the table.
    modes = (
        lax.GatherScatterMode.CLIP,
        lax.GatherScatterMode.FILL_OR_DROP,
        lax.GatherScatterMode.PROMISE_IN_BOUNDS,
    )

    def recognize(self, line: Line, position: int, weight: Weight) -> ParameterUse | None:
        """Return the use by a gather of whole rows."""
        dims: Any = line.eqn.params["dimension_numbers"]
        table = _shape(line, position)
        plain = dims.collapsed_slice_dims == dims.start_index_map == (0,) and not dims.operand_batching_dims
        whole = tuple(line.eqn.params["slice_sizes"]) == (1, *table[1:])
        known = line.eqn.params["mode"] in self.modes
        if position != 0 or not (plain and whole and known) or "p" in _long_roles(weight.roles, table):
            return None
        return self._use(
            line,
            position,
            weight,
            roles="".join("m" if axis in dims.offset_dims else "p" for axis in range(len(_out_shape(line)))),
            sizes=Sizes(positions=prod(_shape(line, 1)[:-1]), groups=1, inputs=table[0], outputs=prod(table[1:])),
            order=(table,),
        )

    def inputs(self, use: ParameterUse, values: dict[int, Any]) -> Array:
        """Return the numbers of the rows; one outside the table, which reads nothing, becomes -1."""
        numbers = value_of(values, use.line.inputs[1])[..., 0].reshape(-1)
        size = use.sizes.inputs
        if use.line.eqn.params["mode"] == lax.GatherScatterMode.CLIP:
            return jnp.clip(numbers, 0, size - 1)
        return jnp.where((numbers >= 0) & (numbers < size), numbers, -1)


RULES: tuple[LayerRule, ...] = (
    Dense(),
    Convolution(),
    Bias(),
    LookUp(),
)
"""All rules; each primitive belongs to one of them."""

_RULE_OF = {primitive: rule for rule in RULES for primitive in rule.primitives}


def _shape(line: Line, position: int) -> tuple[int, ...]:
    return aval_of(line.eqn.invars[position]).shape


def _out_shape(line: Line) -> tuple[int, ...]:
    return aval_of(line.eqn.outvars[0]).shape


def _operand(use: ParameterUse, values: dict[int, Any], position: int) -> Array:
    return jnp.asarray(value_of(values, use.line.inputs[position]))


def _free_axes(line: Line, position: int) -> list[int]:
    """Return the axes of an operand of a product that are neither contracted nor shared."""
    contract, batch = line.eqn.params["dimension_numbers"]
    return [i for i in range(len(_shape(line, position))) if i not in (*contract[position], *batch[position])]


def _long_roles(roles: str, shape: tuple[int, ...]) -> str:
    """Return the roles of the axes longer than one."""
    return "".join(role for role, size in zip(roles, shape, strict=True) if size != 1)


def _fitted(roles: str, before: tuple[int, ...], after: tuple[int, ...]) -> str | None:
    """Return the roles of a shape that has gained or lost axes of length one only; None for any other change."""
    if [size for size in before if size != 1] != [size for size in after if size != 1]:
        return None
    rest = iter(_long_roles(roles, before))
    return "".join("p" if size == 1 else next(rest) for size in after)


def find_uses(program: Program, num_leaves: int) -> dict[int, list[ParameterUse]]:
    """Find all uses of each leaf (the first arguments); leaves whose Jacobian does not factor are missing."""
    search = _Search(program)
    for leaf, slot in enumerate(program.arguments[:num_leaves]):
        search.weights[slot] = Weight(leaf, (), (), "m" * len(program.avals[slot].shape))
    search.constants.update(program.constants)
    uses: dict[int, list[ParameterUse]] = {leaf: [] for leaf in range(num_leaves)}
    opaque = set()
    for line in program.lines:
        for found in search.visit(line):
            if isinstance(found, ParameterUse):
                uses[found.leaf].append(found)
            else:
                opaque.add(found)
    if program.output in search.weights:
        opaque.add(search.weights[program.output].leaf)
    for leaf, found in uses.items():
        if len({use.order for use in found}) > 1:
            opaque.add(leaf)
    return {leaf: found for leaf, found in uses.items() if leaf not in opaque}


class _Search:
    """The state of a walk through the lines: what is known of each slot."""

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
        """Return the uses that a line makes of leaves, or the leaves that it uses without a rule."""
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
            rule = _RULE_OF.get(line.name)
            use = None if rule is None else rule.recognize(line, position, weight)
            if use is not None:
                return [self._move_on(use)]
        return [self.weights[line.inputs[i]].leaf for i in held]

    def _weight(self, operand: Operand) -> Weight | None:
        return None if isinstance(operand, Constant) else self.weights.get(operand)

    def _note_constants(self, line: Line) -> None:
        if not all(isinstance(operand, Constant) or operand in self.constants for operand in line.inputs):
            return
        self.constants.update(line.outputs)
        same = line.name in ("broadcast_in_dim", "convert_element_type", "reshape")
        if same and self._is_uniform(line, 0):
            self.uniform.update(line.outputs)

    def _is_uniform(self, line: Line, position: int) -> bool:
        """Return whether an operand is one number (repeated) that depends on neither parameters nor data."""
        operand = line.inputs[position]
        if isinstance(operand, Constant):
            return operand.value.size == 1
        return operand in self.uniform or (operand in self.constants and prod(_shape(line, position)) == 1)

    def _scale(self, line: Line, position: int) -> tuple[Scale, ...] | None:
        """Return the factor by which a line multiplies its operand, None if it does something else."""
        if line.name == "neg":
            return ((MINUS, 1),)
        if line.name in ("copy", "copy_p"):
            return ()
        if line.name == "mul" and self._is_uniform(line, 1 - position):
            return ((line.inputs[1 - position], 1),)
        if line.name == "div" and position == 0 and self._is_uniform(line, 1):
            return ((line.inputs[1], -1),)
        return None

    def _carry(self, line: Line, position: int, weight: Weight) -> Weight | None:
        """Return what the result of a line holds, if it is still the leaf."""
        scale = self._scale(line, position)
        aval, before = aval_of(line.eqn.outvars[0]), _shape(line, position)
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
        roles = _fitted(weight.roles, before, aval.shape) if reshaped else None
        if roles is None and _is_row_major(line) and "p" not in _long_roles(weight.roles, before):
            roles = "m" * len(aval.shape)
        return None if roles is None else replace(weight, path=(*weight.path, aval.shape), roles=roles)

    def _move_on(self, use: ParameterUse) -> ParameterUse:
        """Return the use with its target moved on, as long as all that follows is scaled by one number and added to."""
        while True:
            readers = self.readers.get(use.target, [])
            if len(readers) != 1 or use.target == self.program.output:
                return use
            moved = self._step(use, *readers[0])
            if moved is None:
                return use
            use = moved

    def _step(self, use: ParameterUse, line: Line, position: int) -> ParameterUse | None:
        scale = self._scale(line, position)
        if line.name in ("add", "add_any") or (line.name == "sub" and position == 0):
            scale = ()
        elif line.name == "sub":
            scale = ((MINUS, 1),)
        before, after = _shape(line, position), _out_shape(line)
        roles = use.roles
        if scale is None and (line.name in ("squeeze", "broadcast_in_dim") or _is_row_major(line)):
            scale, roles = (), _fitted(use.roles, before, after)
        # An operand of another shape would be repeated: other positions.
        if scale is None or roles is None or (roles == use.roles and before != after):
            return None
        return replace(use, target=line.outputs[0], scales=use.scales + scale, roles=roles)


def _is_row_major(line: Line) -> bool:
    """Return whether a line is a reshape that keeps the order of the numbers; with `dimensions` it transposes first."""
    return line.name == "reshape" and line.eqn.params["dimensions"] is None
