r"""The factors of one sample's Jacobian where its parameters are used: inputs $a_p$ and cotangents $\Delta_{kp}$.

One forward pass gives the inputs, one backward pass for each output the cotangents of all uses together; weights are
constants in both, so no weight gradient is formed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lazyjax._core.program import Program, run, value_of
from lazyjax.kernels.layer_rules import ParameterUse, Sizes
from lazyjax.kernels.windows import evaluate_by_windows


@dataclass(frozen=True)
class Group:
    """Leaves that are used at the same places, so that one product of cotangents serves them all.

    Attributes:
        leaves: Their uses, one tuple for each leaf; use i of each has the same target.
    """

    leaves: tuple[tuple[ParameterUse, ...], ...]

    @property
    def first(self) -> tuple[ParameterUse, ...]:
        """The uses of the first leaf, which show the targets."""
        return self.leaves[0]

    @property
    def one_hot(self) -> bool:
        """Whether the inputs are one-hot vectors, held as numbers (a look-up)."""
        return self.first[0].rule.one_hot

    @property
    def sizes(self) -> Sizes:
        """The sizes of the joined factors."""
        return self.first[0].sizes._replace(
            positions=sum(use.sizes.positions for use in self.first),
            inputs=sum(uses[0].sizes.inputs for uses in self.leaves),
        )


def group_uses(uses: dict[int, list[ParameterUse]]) -> list[Group]:
    """Group leaves by the places of their uses."""
    groups: dict[Any, list[tuple[ParameterUse, ...]]] = {}
    for found in uses.values():
        if found:
            places = tuple((use.target, use.roles, use.sizes.groups) for use in found)
            # One-hot inputs are numbers and no vectors, so they cannot be joined.
            alone = found[0].leaf if found[0].rule.one_hot else None
            groups.setdefault((places, alone), []).append(tuple(found))
    return [Group(tuple(leaves)) for leaves in groups.values()]


class Factors(eqx.Module):
    """The factors of one sample's Jacobian, or of several samples' with a leading axis.

    Attributes:
        inputs: For each group a, (p, g, d), or the numbers (p,) of one-hot inputs.
        cotangents: For each group Delta, (k, p, g, m).
        rows: For each leaf without uses its Jacobian, (k, size).
    """

    inputs: list[Float[Array, "..."] | Int[Array, "..."]]
    cotangents: list[Float[Array, "..."]]
    rows: list[Float[Array, "..."]]


def sample_factors(
    program: Program, groups: Sequence[Group], direct: Sequence[int], leaves: Sequence[Array], row: Array
) -> Factors:
    """Return the factors of one sample: `groups` by their uses, the leaves numbered `direct` by their own Jacobian."""
    targets = sorted({use.target for group in groups for use in group.first})
    shifts = {slot: jnp.zeros(program.avals[slot].shape, program.avals[slot].dtype) for slot in targets}
    moves = {leaf: jnp.zeros_like(leaves[leaf]) for leaf in direct}

    def forward(shifts: dict[int, Array], moves: dict[int, Array]) -> tuple[Array, Any]:
        moved = [leaf + moves[i] if i in moves else leaf for i, leaf in enumerate(leaves)]
        values = run(
            program,
            [*moved, row],
            replace=evaluate_by_windows,
            after=lambda slot, value: value + shifts[slot] if slot in shifts else value,
        )
        inputs = [_joined_inputs(group, values) for group in groups]
        # The number of a one-hot input cannot carry the scales of its use: its cotangent does.
        scales = [[_scale(use, values) for use in group.first] if group.one_hot else None for group in groups]
        return jnp.ravel(value_of(values, program.output)), (inputs, scales)

    out, vjp, (inputs, scales) = jax.vjp(forward, shifts, moves, has_aux=True)
    at_targets, at_leaves = jax.vmap(vjp)(jnp.eye(out.size, dtype=out.dtype))
    return Factors(
        inputs,
        [_cotangents(group, at_targets, scale) for group, scale in zip(groups, scales, strict=True)],
        [at_leaves[leaf].reshape(out.size, -1) for leaf in direct],
    )


def _cotangents(group: Group, at_targets: dict[int, Array], scales: list[Array] | None) -> Array:
    """Return Delta, (k, p, g, m): the targets' cotangents, their axes sorted by role."""
    parts = []
    for i, use in enumerate(group.first):
        value = at_targets[use.target]
        axes = sorted(range(len(use.roles)), key=lambda i, roles=use.roles: "pgm".index(roles[i]))
        ordered = value.transpose(0, *(1 + i for i in axes))
        part = ordered.reshape(value.shape[0], use.sizes.positions, use.sizes.groups, use.sizes.outputs)
        parts.append(part if scales is None else part * scales[i].astype(part.dtype))
    return jnp.concatenate(parts, axis=1)


def _joined_inputs(group: Group, values: dict[int, Any]) -> Array:
    """Return a, (p, g, d), of all leaves of a group side by side, all uses one after the other."""
    if group.one_hot:
        return jnp.concatenate([use.rule.inputs(use, values) for use in group.first])
    joined = [jnp.concatenate([_scaled_inputs(use, values) for use in uses]) for uses in group.leaves]
    dtype = jnp.result_type(*(part.dtype for part in joined))
    return jnp.concatenate([part.astype(dtype) for part in joined], axis=2)


def _scaled_inputs(use: ParameterUse, values: dict[int, Any]) -> Array:
    a = use.rule.inputs(use, values)
    # In a product of floating and other numbers the cotangent is floating, so a is too.
    a = a if jnp.issubdtype(a.dtype, jnp.floating) else a.astype(values[use.target].dtype)
    return a * _scale(use, values).astype(a.dtype)


def _scale(use: ParameterUse, values: dict[int, Any]) -> Array:
    """Return the product of a use's scales."""
    product = jnp.ones((), values[use.target].dtype)
    for operand, power in use.scales:
        factor = jnp.asarray(value_of(values, operand)).reshape(-1)[0].astype(product.dtype)
        product = product * factor if power == 1 else product / factor
    return product
