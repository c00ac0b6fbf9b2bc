"""How a Gram will be computed: each parameter's contraction by its cost, the blocks by memory, and the totals."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array

from lazyjax._core.program import Constant, Line, Program, aval_of, trace
from lazyjax._core.tables import format_table
from lazyjax._core.types import Model, Params
from lazyjax.kernels.factors import Factors, Group, group_uses, sample_factors
from lazyjax.kernels.layer_rules import Sizes, find_uses
from lazyjax.kernels.products import Contraction, Rows, make_rows
from lazyjax.kernels.windows import is_product_of_patches

MEMORY = 2**29
"""Bytes for the factors of the blocks at work, if the result itself is not larger."""

SPATIAL_PRICE = 3.0
"""Time of an operation of the spatial products over one of the jacobian's single large product."""


@dataclass(frozen=True)
class PlanPart:
    """The part of a plan that treats some leaves together.

    Attributes:
        leaves: Their names.
        rule: "dense", "convolution", "bias", "look-up", joined by " + "; "jacobian" for a leaf without a rule.
        contraction: "outer", "spatial" or "jacobian": how the factors of two samples are multiplied.
        sizes: Positions p, groups g, inputs d and outputs m of the factors.
        flops: Multiplications and additions of the whole Gram's products.
    """

    leaves: tuple[str, ...]
    rule: str
    contraction: Contraction
    sizes: Sizes
    flops: float


@dataclass(frozen=True, repr=False)
class GramPlan:
    """The plan of what `gram` will do; made by `gram_plan`. Printing it gives a table.

    Attributes:
        parts: The leaves, those with shared cotangents together.
        shape: Shape of the Gram as a matrix.
        blocks: Samples of a block, of x1 and of x2.
        flops: Operations of all products of the Gram, the backward passes not counted.
        result_bytes: Memory of the Gram.
        working_bytes: Memory held next to it, an estimate.
    """

    parts: tuple[PlanPart, ...]
    shape: tuple[int, int]
    blocks: tuple[int, int]
    flops: float
    result_bytes: int
    working_bytes: int

    def __str__(self) -> str:
        """Return a line for each part, then the totals."""
        rows = [("parameters", "rule", "contraction", "p x g x d x m", "Gflop")]
        for part in self.parts:
            name = part.leaves[0] + (f" (+{len(part.leaves) - 1})" if len(part.leaves) > 1 else "")
            sizes = " x ".join(str(size) for size in part.sizes)
            rows.append((name, part.rule, part.contraction, sizes, f"{part.flops / 1e9:.3g}"))
        total, result = _in_bytes(self.result_bytes + self.working_bytes), _in_bytes(self.result_bytes)
        return (
            f"{format_table(rows)}\n"
            f"{self.shape[0]} x {self.shape[1]} in blocks of {self.blocks[0]} x {self.blocks[1]} samples, "
            f"{self.flops / 1e9:.3g} Gflop, about {total} of memory ({result} the result)"
        )

    __repr__ = __str__


def _in_bytes(count: float | int) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.3g} TiB"


@dataclass(frozen=True)
class SampleJacobian:
    """The Jacobian of one sample's outputs as a program that gives its factors; made by `sample_jacobian`.

    Attributes:
        program: The program of one sample: (leaves..., sample) to its outputs.
        leaves: The parameters' floating arrays, or their shapes.
        groups: The leaves whose Jacobian factors.
        contractions: How the factors of two samples are multiplied, for each group.
        direct: Numbers of the other leaves, whose Jacobian rows are taken.
        num_outputs: k.
        has_axis: Whether a sample's outputs have an axis of their own, (k,) instead of ().
        dtype: Dtype of the outputs.
        sample_bytes: Memory that the factors of one sample take, an estimate from above.
        trace_outputs: Whether products are summed over the outputs.
    """

    program: Program
    leaves: list[Any]
    groups: list[Group]
    contractions: list[Contraction]
    direct: list[int]
    num_outputs: int
    has_axis: bool
    dtype: Any
    sample_bytes: int
    trace_outputs: bool

    def factors(self, sample: Array) -> Factors:
        """Return the factors of one sample's Jacobian."""
        return sample_factors(self.program, self.groups, self.direct, self.leaves, sample)

    def rows(self, x: Array) -> Rows:
        """Return the factors of a block of samples, ready to be multiplied."""
        factors = jax.vmap(self.factors)(x)
        return make_rows(factors, self.groups, self.contractions, self.dtype, trace_outputs=self.trace_outputs)


def sample_jacobian(
    f: Model, w: Params, x: Any, *, method: str = "auto", trace_outputs: bool = False, count: int | None = None
) -> SampleJacobian:
    """Trace f on one sample, find its parameters' uses and choose the contraction of each.

    Args:
        f: Model f(w, x) whose row i of outputs depends on row i of x only.
        w: Parameters.
        x: Samples, or their shape.
        method: As in `gram`.
        trace_outputs: Whether products are summed over the outputs.
        count: Samples that share one evaluation of the factors; None for all of x.
    """
    coordinates, rest = eqx.partition(w, eqx.is_inexact_array)
    leaves, structure = jtu.tree_flatten(coordinates)

    def one(*args: Array) -> Array:
        return f(eqx.combine(jtu.tree_unflatten(structure, args[:-1]), rest), args[-1][None])[0]

    # Exact on accelerators too, whose customary precision of products is lower.
    with jax.default_matmul_precision("highest"):
        program = trace(one, *leaves, jax.ShapeDtypeStruct(x.shape[1:], x.dtype))
    out = program.output.value if isinstance(program.output, Constant) else program.avals[program.output]
    k = prod(out.shape)
    uses = {} if method == "jacobian" else find_uses(program, len(leaves))
    groups = group_uses(uses)
    sharing = x.shape[0] if count is None else count
    contractions: list[Contraction] = [
        _cheapest(group, k, trace_outputs=trace_outputs, count=sharing, itemsize=out.dtype.itemsize) for group in groups
    ]
    direct = [i for i in range(len(leaves)) if i not in uses]
    if not groups and not direct:
        # No parameter has a part in the outputs: a Jacobian of zeros.
        direct = [0]
    size = _sample_bytes(program, groups, contractions, [leaves[i] for i in direct], k)
    return SampleJacobian(
        program, leaves, groups, contractions, direct, k, out.ndim == 1, out.dtype, size, trace_outputs
    )


def _cheapest(group: Group, k: int, *, trace_outputs: bool, count: int, itemsize: int) -> Contraction:
    """Return the contraction of least price among those that a block has room for; of least bytes if none has."""
    costs = _costs(group, k, trace_outputs=trace_outputs, count=count)
    numbers: dict[Contraction, int] = {contraction: _numbers(group, contraction, k) for contraction in costs}
    room = MEMORY // (4 * itemsize)
    fitting: list[Contraction] = [contraction for contraction in costs if numbers[contraction] <= room]
    if fitting:
        return min(fitting, key=lambda contraction: costs[contraction][0])
    return min(numbers, key=numbers.__getitem__)


def _numbers(group: Group, contraction: Contraction, k: int) -> int:
    """Return how many numbers of a group one sample holds."""
    p, g, d, m = group.sizes
    inputs = p if group.one_hot and contraction == "spatial" else p * g * d
    # All pairs of positions with another sample, and what is summed over one of them.
    extra = {"outer": 0, "spatial": p * p * g + k * p * g * m, "jacobian": 2 * k * g * d * m}
    return inputs + k * p * g * m + extra[contraction]


def _costs(group: Group, k: int, *, trace_outputs: bool, count: int) -> dict[Contraction, tuple[float, float]]:
    """Return the price of each contraction that can be taken, and its multiplications, both for a pair of samples."""
    p, g, d, m = (float(size) for size in group.sizes)
    pairs = k if trace_outputs else k * k
    inner = p * p * g * (1 if group.one_hot else d)
    spatial = inner + p * p * g * m * k + p * g * m * pairs
    costs: dict[Contraction, tuple[float, float]] = {"spatial": (SPATIAL_PRICE * spatial, spatial)}
    if p == g == 1 and not group.one_hot:
        outer = d + m * pairs
        costs = {"outer": (outer + pairs, outer)}
    jacobian = g * d * m * pairs
    costs["jacobian"] = (jacobian + 2 * p * g * d * m * k / count, jacobian)
    return costs


def _sample_bytes(
    program: Program, groups: list[Group], contractions: list[Contraction], direct: list[Any], k: int
) -> int:
    """Return the memory that one sample's factors take while they are made and held, an estimate from above."""
    moving = {program.arguments[-1]}
    for line in program.lines:
        if not moving.isdisjoint(line.inputs):
            moving.update(line.outputs)
    # What does not depend on the sample is held once, not once per sample.
    used = [program.avals[slot] for slot in moving if _is_floating(program.avals[slot])]
    sizes = [prod(aval.shape) for aval in used]
    forward, largest = sum(sizes) + sum(map(_looped, program.lines)), max(sizes, default=1)
    held = sum(2 * k * prod(leaf.shape) for leaf in direct)
    for group, contraction in zip(groups, contractions, strict=True):
        held += _numbers(group, contraction, k)
        if is_product_of_patches(group.first[0].line):
            largest = max(largest, prod(group.sizes[:3]))
    itemsize = max((np.dtype(aval.dtype).itemsize for aval in used), default=4)
    return itemsize * (forward + held + 2 * k * largest)


def _looped(line: Line) -> int:
    """Return how many numbers a loop keeps of its passes for the way back."""
    if line.name != "scan":
        return 0
    inner = [aval_of(out) for eqn in line.eqn.params["jaxpr"].jaxpr.eqns for out in eqn.outvars]
    return line.eqn.params["length"] * sum(prod(aval.shape) for aval in inner if _is_floating(aval))


def _is_floating(aval: Any) -> bool:
    """Return whether a slot holds real floating numbers."""
    return hasattr(aval, "dtype") and jnp.issubdtype(aval.dtype, jnp.floating)


def block_sizes(sample_bytes: int, result_bytes: int, n1: int, n2: int | None, devices: int = 1) -> tuple[int, int]:
    """Return the samples of a block of x1 and of x2 (None: x1 itself); all of them if one block is enough.

    Two blocks are held at a time, or one if it holds all there is. An odd number of blocks of x1 with itself gives
    each block row equally many of one triangle, and none twice.
    """
    limit = max(1, _budget(result_bytes) // sample_bytes)
    half = max(1, limit // 2)
    if n2 is None:
        if n1 <= limit and devices == 1:
            return n1, n1
        count = -(-n1 // half)
        count = count + 1 - count % 2 if devices == 1 else max(count, devices)
        return -(-n1 // count), -(-n1 // count)
    if n1 + n2 <= limit and devices == 1:
        return n1, n2
    return min(half, -(-n1 // devices)), min(half, n2)


def _budget(result_bytes: int) -> int:
    """Return the bytes for factors: an eighth of an accelerator's memory, on a CPU a fixed amount or the result's."""
    try:
        stats = jax.local_devices()[0].memory_stats()
    except (AttributeError, NotImplementedError, RuntimeError):
        stats = None
    known = (stats or {}).get("bytes_limit", 0)
    return max(MEMORY, result_bytes, known // 8)


def describe(
    jacobian: SampleJacobian, names: Sequence[str], counts: tuple[int, int | None], *, devices: int
) -> GramPlan:
    """Return the plan to print, for leaves of these names and `counts` samples in x1 and x2."""
    n1, n2 = counts
    k, itemsize = jacobian.num_outputs, np.dtype(jacobian.dtype).itemsize
    kept = 1 if jacobian.trace_outputs else k
    rows, columns = n1 * kept, (n1 if n2 is None else n2) * kept
    pairs = n1 * (n1 + 1) / 2 if n2 is None else n1 * n2
    parts = []
    for group, contraction in zip(jacobian.groups, jacobian.contractions, strict=True):
        costs = _costs(group, k, trace_outputs=jacobian.trace_outputs, count=n1)
        rule = " + ".join(dict.fromkeys(uses[0].rule.name for uses in group.leaves))
        leaves = tuple(names[uses[0].leaf] for uses in group.leaves)
        parts.append(PlanPart(leaves, rule, contraction, group.sizes, 2 * pairs * costs[contraction][1]))
    for i in jacobian.direct:
        size = prod(jacobian.leaves[i].shape)
        flops = 2.0 * pairs * size * (k if jacobian.trace_outputs else k**2)
        parts.append(PlanPart((names[i],), "jacobian", "jacobian", Sizes(1, 1, 1, size), flops))
    result = rows * columns * itemsize
    blocks = block_sizes(jacobian.sample_bytes, result, n1, n2, devices)
    held_samples = blocks[0] if (n2 is None and blocks[0] == n1) else sum(blocks)
    # Of a block of the result there are also its transpose and what it is summed from.
    working = held_samples * jacobian.sample_bytes + 4 * blocks[0] * blocks[1] * kept**2 * itemsize
    return GramPlan(tuple(parts), (rows, columns), blocks, sum(p.flops for p in parts), result, working)
