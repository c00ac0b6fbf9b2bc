r"""The factors of one sample's Jacobian at the entries of its parameters: inputs $a_p$ and cotangents $\Delta_{kp}$.

One forward pass gives the inputs, one backward pass an output the cotangents of all entries together; weights are
constants in both, so no weight gradient is formed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from lazyjax._core.program import Line, Program, aval_of, run, value_of
from lazyjax.kernels.layer_rules import ParameterUse, free_axes


@dataclass(frozen=True)
class Group:
    """Leaves with entries at the same places, so that one product of cotangents serves them all.

    Attributes:
        leaves: Their entries, one list a leaf; entry i of each has one target.
    """

    leaves: tuple[tuple[ParameterUse, ...], ...]

    @property
    def first(self) -> tuple[ParameterUse, ...]:
        """The entries of the first leaf, which show the targets."""
        return self.leaves[0]

    @property
    def is_rows(self) -> bool:
        """Whether it is a look-up: a is the number of a row."""
        return self.first[0].kind == "rows"

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """(positions, groups, inputs, outputs) of the joined factors."""
        _, groups, _, outputs = self.first[0].sizes
        inputs = sum(entries[0].sizes[2] for entries in self.leaves)
        return sum(entry.sizes[0] for entry in self.first), groups, inputs, outputs


def group_entries(entries: dict[int, list[ParameterUse]]) -> list[Group]:
    """Leaves by the places of their entries."""
    groups: dict[Any, list[tuple[ParameterUse, ...]]] = {}
    for found in entries.values():
        if found:
            places = tuple((entry.target, entry.roles, entry.sizes[1]) for entry in found)
            # A look-up has a number and no vector for a, so it joins nobody.
            alone = found[0].leaf if found[0].kind == "rows" else None
            groups.setdefault((places, alone), []).append(tuple(found))
    return [Group(tuple(leaves)) for leaves in groups.values()]


class Factors(eqx.Module):
    """Of one sample, or with a leading axis of samples.

    Attributes:
        inputs: For each group a, (p, g, d), or for a look-up the rows' numbers (p,).
        cotangents: For each group Delta, (k, p, g, m).
        rows: For each leaf without entries its Jacobian, (k, size).
    """

    inputs: list[Float[Array, "..."] | Int[Array, "..."]]
    cotangents: list[Float[Array, "..."]]
    rows: list[Float[Array, "..."]]


def sample_factors(
    program: Program, groups: list[Group], direct: list[int], leaves: list[Array], row: Array
) -> Factors:
    """The factors of one sample: `groups` by entries, the leaves numbered `direct` by their own Jacobian."""
    targets = sorted({entry.target for group in groups for entry in group.first})
    shifts = {slot: jnp.zeros(program.avals[slot].shape, program.avals[slot].dtype) for slot in targets}
    moves = {leaf: jnp.zeros_like(leaves[leaf]) for leaf in direct}

    def forward(shifts: dict[int, Array], moves: dict[int, Array]) -> tuple[Array, Any]:
        moved = [leaf + moves[i] if i in moves else leaf for i, leaf in enumerate(leaves)]
        values = run(
            program,
            [*moved, row],
            replace=_own_way,
            after=lambda slot, value: value + shifts[slot] if slot in shifts else value,
        )
        inputs = [_inputs(group, values) for group in groups]
        # The number of a row cannot carry the factors of its entry: its cotangent does.
        scales = [[_scale(entry, values) for entry in group.first] if group.is_rows else None for group in groups]
        return jnp.ravel(value_of(values, program.output)), (inputs, scales)

    out, vjp, (inputs, scales) = jax.vjp(forward, shifts, moves, has_aux=True)
    at_targets, at_leaves = jax.vmap(vjp)(jnp.eye(out.size, dtype=out.dtype))
    return Factors(
        inputs,
        [_cotangents(group, at_targets, scale) for group, scale in zip(groups, scales, strict=True)],
        [at_leaves[leaf].reshape(out.size, -1) for leaf in direct],
    )


def _cotangents(group: Group, at_targets: dict[int, Array], scales: list[Array] | None) -> Array:
    """Delta, (k, p, g, m): the targets' cotangents, their axes sorted by role."""
    parts = []
    for i, entry in enumerate(group.first):
        value = at_targets[entry.target]
        axes = sorted(range(len(entry.roles)), key=lambda i, roles=entry.roles: "pgm".index(roles[i]))
        positions, groups, _, outputs = entry.sizes
        ordered = value.transpose(0, *(1 + i for i in axes))
        part = ordered.reshape(value.shape[0], positions, groups, outputs)
        parts.append(part if scales is None else part * scales[i].astype(part.dtype))
    return jnp.concatenate(parts, axis=1)


def _inputs(group: Group, values: dict[int, Any]) -> Array:
    """a, (p, g, d), of all leaves of a group side by side, all entries one after the other."""
    if group.is_rows:
        return jnp.concatenate([_row_numbers(entry, values) for entry in group.first])
    joined = [jnp.concatenate([_input(entry, values) for entry in entries]) for entries in group.leaves]
    dtype = jnp.result_type(*(part.dtype for part in joined))
    return jnp.concatenate([part.astype(dtype) for part in joined], axis=2)


def _input(entry: ParameterUse, values: dict[int, Any]) -> Array:
    """a, (p, g, d), of one entry with its factors."""
    operand = jnp.asarray(value_of(values, entry.line.inputs[entry.other]))
    positions, groups, inputs, _ = entry.sizes
    if entry.kind == "addition":
        a = jnp.ones((positions, groups, inputs), values[entry.target].dtype)
    elif entry.kind == "convolution":
        seen = patches(operand, entry.line)
        # The positions in the order of the target's axes.
        places = [axis for axis in entry.line.eqn.params["dimension_numbers"].out_spec if axis != _feature(entry.line)]
        lead = sorted(range(len(places)), key=places.__getitem__)
        a = seen.transpose(*lead, *range(len(lead), seen.ndim)).reshape(positions, groups, inputs)
    else:
        contract, batch = entry.line.eqn.params["dimension_numbers"]
        free = free_axes(entry.line, entry.other, operand.shape)
        ordered = operand.transpose(*free, *batch[entry.other], *contract[entry.other])
        a = ordered.reshape(positions, groups, inputs)
    # A product of numbers of two kinds: the cotangent is floating, so a is too.
    a = a if jnp.issubdtype(a.dtype, jnp.floating) else a.astype(values[entry.target].dtype)
    return a * _scale(entry, values).astype(a.dtype)


def _feature(line: Line) -> int:
    return line.eqn.params["dimension_numbers"].out_spec[1]


def _scale(entry: ParameterUse, values: dict[int, Any]) -> Array:
    """The product of an entry's factors."""
    product = jnp.ones((), values[entry.target].dtype)
    for operand, power in entry.scales:
        factor = jnp.asarray(value_of(values, operand)).reshape(-1)[0].astype(product.dtype)
        product = product * factor if power == 1 else product / factor
    return product


def _row_numbers(entry: ParameterUse, values: dict[int, Any]) -> Array:
    """The rows looked up; a number outside the table, which reads nothing, becomes -1."""
    numbers = value_of(values, entry.line.inputs[1])[..., 0].reshape(-1)
    size = entry.sizes[2]
    if entry.line.eqn.params["mode"] == lax.GatherScatterMode.CLIP:
        return jnp.clip(numbers, 0, size - 1)
    return jnp.where((numbers >= 0) & (numbers < size), numbers, -1)


def patches(x: Array, line: Line) -> Array:
    """What each position of a convolution sees: (batch, *positions, groups, channels of a group, *kernel)."""
    p = line.eqn.params
    lhs, kernel_spec, _ = p["dimension_numbers"]
    kernel = [aval_of(line.eqn.invars[1]).shape[i] for i in kernel_spec[2:]]
    # Padding sets zeros between entries where the input is dilated.
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
    """The windows of an array side by side, (*positions, entries of the window); the padding is of the last axes.

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


def is_own_product(line: Line) -> bool:
    """Whether a line is evaluated as one matrix product of patches.

    A float64 convolution on a CPU: XLA's own is up to a hundred times slower there.
    """
    if line.name != "conv_general_dilated" or jax.default_backend() != "cpu":
        return False
    dtypes = {aval_of(atom).dtype for atom in (*line.eqn.invars, *line.eqn.outvars)}
    return dtypes == {jnp.dtype(jnp.float64)} and line.eqn.params["batch_group_count"] == 1


def _own_way(line: Line, operands: list[Any]) -> list[Any] | None:
    """Lines whose derivatives XLA computes or compiles too slowly, otherwise."""
    if is_own_product(line):
        return [_convolve(line, *(jnp.asarray(operand) for operand in operands))]
    floating = line.name == "reduce_window_max" and jnp.issubdtype(aval_of(line.eqn.invars[0]).dtype, jnp.floating)
    if floating and set(line.eqn.params["base_dilation"]) == {1}:
        return [_largest(line, jnp.asarray(operands[0]))]
    return None


def _convolve(line: Line, x: Array, kernel: Array) -> Array:
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


def _largest(line: Line, x: Array) -> Array:
    """Max pooling; as in XLA's own, the first of equal entries takes the derivative."""
    p = line.eqn.params
    padding = [(low, high, 0) for low, high in p["padding"]]
    seen = _windows(x, p["window_dimensions"], p["window_strides"], p["window_dilation"], padding, -np.inf)
    first = jax.nn.one_hot(jnp.argmax(lax.stop_gradient(seen), axis=-1), seen.shape[-1], dtype=bool)
    return jnp.sum(jnp.where(first, seen, 0), axis=-1)
