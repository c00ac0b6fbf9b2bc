r"""How a Gram will be computed: the way of each parameter by its cost, blocks by memory, and what both come to."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lazyjax._core.program import Constant, Line, Program, aval_of, trace
from lazyjax.kernels.entries import find_entries
from lazyjax.kernels.factors import Group, group_entries, is_own_product
from lazyjax.kernels.products import Contraction

MEMORY = 2**29
"""Bytes for the factors of the blocks at work, where the result itself is not larger."""

SPATIAL_PRICE = 3.0
"""Time of an operation of the spatial products over one of the jacobian's single large product."""


@dataclass(frozen=True)
class PlanPart:
    """What is done with some leaves together.

    Attributes:
        leaves: Their names.
        rule: "dense", "convolution", "bias", "look-up", joined by " + "; "jacobian" for a leaf without a rule.
        way: "outer", "spatial" or "jacobian", see `lazyjax.gram`.
        sizes: Positions, groups, inputs, outputs of the factors.
        flops: Of the whole Gram's products, multiplications and additions.
    """

    leaves: tuple[str, ...]
    rule: str
    way: Contraction
    sizes: tuple[int, int, int, int]
    flops: float


@dataclass(frozen=True)
class GramPlan:
    """What `gram` will do; made by `gram_plan`. Printing it gives a table.

    Attributes:
        parts: The leaves, those with shared cotangents together.
        shape: Of the Gram as a matrix.
        blocks: Samples of a block, of x1 and of x2.
        flops: Of all products of the Gram, the backward passes not counted.
        result_bytes: Of the Gram.
        working_bytes: Estimate of what is held beside it.
    """

    parts: tuple[PlanPart, ...]
    shape: tuple[int, int]
    blocks: tuple[int, int]
    flops: float
    result_bytes: int
    working_bytes: int

    def __str__(self) -> str:
        """One line a part, then the totals."""
        rows = [("parameters", "rule", "way", "p x g x d x m", "Gflop")]
        for part in self.parts:
            name = part.leaves[0] + (f" (+{len(part.leaves) - 1})" if len(part.leaves) > 1 else "")
            sizes = " x ".join(str(size) for size in part.sizes)
            rows.append((name, part.rule, part.way, sizes, f"{part.flops / 1e9:.3g}"))
        widths = [max(len(row[i]) for row in rows) for i in range(5)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        total = self.result_bytes + self.working_bytes
        lines.append(
            f"{self.shape[0]} x {self.shape[1]} in blocks of {self.blocks[0]} x {self.blocks[1]} samples, "
            f"{self.flops / 1e9:.3g} Gflop, about {_size(total)} of memory ({_size(self.result_bytes)} the result)"
        )
        return "\n".join(lines)


def _size(count: float | int) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.3g} TiB"


@dataclass(frozen=True)
class Choice:
    """The plan as the computation needs it."""

    program: Program
    groups: list[Group]
    ways: list[Contraction]
    direct: list[int]
    num_outputs: int
    has_axis: bool
    dtype: Any
    sample_bytes: int


def choose(model: Any, leaves: Sequence[Any], row: Any, *, method: str, trace_outputs: bool, count: int) -> Choice:
    """Trace one sample and choose the way of every leaf.

    Args:
        model: (leaves..., row) to one sample's outputs, (k,) or ().
        leaves: The parameters' floating arrays, or their shapes.
        row: One sample, or its shape.
        method: As in `gram`.
        trace_outputs: Whether products are summed over the outputs.
        count: Samples that share one evaluation of the factors.
    """
    # Exact on accelerators too, whose customary precision of products is lower.
    with jax.default_matmul_precision("highest"):
        program = trace(model, *leaves, row)
    out = program.output.value if isinstance(program.output, Constant) else program.avals[program.output]
    k = prod(out.shape)
    entries = {} if method == "jacobian" else find_entries(program, len(leaves))
    groups = group_entries(entries)
    size = out.dtype.itemsize
    chosen: list[Contraction] = [
        _cheapest(group, k, trace_outputs=trace_outputs, count=count, itemsize=size) for group in groups
    ]
    direct = [i for i in range(len(leaves)) if i not in entries]
    if not groups and not direct:
        # No parameter has a part in the outputs: a Jacobian of zeros.
        direct = [0]
    size = _sample_bytes(program, groups, chosen, [leaves[i] for i in direct], k)
    return Choice(program, groups, chosen, direct, k, out.ndim == 1, out.dtype, size)


def _cheapest(group: Group, k: int, *, trace_outputs: bool, count: int, itemsize: int) -> Contraction:
    """The way of least price, of those whose bytes a block has room for; of least bytes, where none has."""
    costs = _costs(group.sizes, k, trace_outputs=trace_outputs, count=count, rows=group.is_rows)
    numbers: dict[Contraction, int] = {way: _numbers(group, way, k) for way in costs}
    ways: list[Contraction] = [*costs]
    fitting: list[Contraction] = [way for way in ways if itemsize * numbers[way] <= MEMORY // 4]

    def rank(way: Contraction) -> float:
        return costs[way][0] if fitting else float(numbers[way])

    return min(fitting or ways, key=rank)


def _numbers(group: Group, way: Contraction, k: int) -> int:
    """How many numbers of a group one sample holds."""
    p, g, d, m = group.sizes
    inputs = p if group.is_rows and way == "spatial" else p * g * d
    # All pairs of positions with another sample, and what is summed over one of them.
    extra = {"outer": 0, "spatial": p * p * g + k * p * g * m, "jacobian": 2 * k * g * d * m}
    return inputs + k * p * g * m + extra[way]


def _costs(
    sizes: tuple[int, int, int, int], k: int, *, trace_outputs: bool, count: int, rows: bool
) -> dict[Contraction, tuple[float, float]]:
    """Price of each way that can be taken, and its multiplications: both a pair of samples."""
    p, g, d, m = (float(size) for size in sizes)
    pairs = k if trace_outputs else k * k
    inner = p * p * g * (1 if rows else d)
    spatial = inner + p * p * g * m * k + p * g * m * pairs
    costs: dict[Contraction, tuple[float, float]] = {"spatial": (SPATIAL_PRICE * spatial, spatial)}
    if p == g == 1 and not rows:
        outer = d + m * pairs
        costs = {"outer": (outer + pairs, outer)}
    jacobian = g * d * m * pairs
    costs["jacobian"] = (jacobian + 2 * p * g * d * m * k / count, jacobian)
    return costs


def _sample_bytes(program: Program, groups: list[Group], ways: list[Contraction], direct: list[Any], k: int) -> int:
    """Memory that one sample's factors take while they are made and held, an estimate from above."""
    moving = {program.arguments[-1]}
    for line in program.lines:
        if not moving.isdisjoint(line.inputs):
            moving.update(line.outputs)
    # What does not depend on the sample is there once, not once a sample.
    used = [program.avals[slot] for slot in moving if slot_is_floating(program.avals[slot])]
    sizes = [prod(aval.shape) for aval in used]
    forward, largest = sum(sizes) + sum(map(_looped, program.lines)), max(sizes, default=1)
    held = sum(2 * k * prod(leaf.shape) for leaf in direct)
    for group, way in zip(groups, ways, strict=True):
        p, g, d, _ = group.sizes
        held += _numbers(group, way, k)
        if is_own_product(group.first[0].line):
            largest = max(largest, p * g * d)
    itemsize = max((np.dtype(aval.dtype).itemsize for aval in used), default=4)
    return itemsize * (forward + held + 2 * k * largest)


def _looped(line: Line) -> int:
    """Numbers that a loop keeps of its passes for the way back."""
    if line.name != "scan":
        return 0
    inner = [aval_of(out) for eqn in line.eqn.params["jaxpr"].jaxpr.eqns for out in eqn.outvars]
    return line.eqn.params["length"] * sum(prod(aval.shape) for aval in inner if slot_is_floating(aval))


def slot_is_floating(aval: Any) -> bool:
    """Whether a slot holds real floating numbers."""
    return hasattr(aval, "dtype") and jnp.issubdtype(aval.dtype, jnp.floating)


def block_sizes(sample_bytes: int, result_bytes: int, n1: int, n2: int | None, devices: int = 1) -> tuple[int, int]:
    """Samples of a block of x1 and of x2 (None: x1 itself); all of them where one block is enough.

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
    """Bytes for the factors: an eighth of an accelerator's memory, on a CPU a fixed amount or the result's own."""
    try:
        stats = jax.local_devices()[0].memory_stats()
    except (AttributeError, NotImplementedError, RuntimeError):
        stats = None
    known = (stats or {}).get("bytes_limit", 0)
    return max(MEMORY, result_bytes, known // 8)


def describe(
    choice: Choice,
    names: list[str],
    leaves: Sequence[Any],
    counts: tuple[int, int | None],
    *,
    trace_outputs: bool,
    devices: int,
) -> GramPlan:
    """The plan to print, of `counts` samples in x1 and x2."""
    n1, n2 = counts
    k = 1 if trace_outputs else choice.num_outputs
    rows, columns = n1 * k, (n1 if n2 is None else n2) * k
    pairs = n1 * (n1 + 1) / 2 if n2 is None else n1 * n2
    parts = []
    for group, way in zip(choice.groups, choice.ways, strict=True):
        costs = _costs(group.sizes, choice.num_outputs, trace_outputs=trace_outputs, count=n1, rows=group.is_rows)
        rule = " + ".join(dict.fromkeys(_RULE_NAMES[entries[0].kind] for entries in group.leaves))
        held = tuple(names[entries[0].leaf] for entries in group.leaves)
        parts.append(PlanPart(held, rule, way, group.sizes, 2 * pairs * costs[way][1]))
    for i in choice.direct:
        size = prod(leaves[i].shape)
        flops = 2.0 * pairs * size * (choice.num_outputs if trace_outputs else choice.num_outputs**2)
        parts.append(PlanPart((names[i],), "jacobian", "jacobian", (1, 1, 1, size), flops))
    result = rows * columns * np.dtype(choice.dtype).itemsize
    blocks = block_sizes(choice.sample_bytes, result, n1, n2, devices)
    held_samples = blocks[0] if (n2 is None and blocks[0] == n1) else sum(blocks)
    # Of a block of the result there are also its mirror image and what it is summed from.
    working = held_samples * choice.sample_bytes + 4 * blocks[0] * blocks[1] * k * k * np.dtype(choice.dtype).itemsize
    return GramPlan(tuple(parts), (rows, columns), blocks, sum(p.flops for p in parts), result, working)


_RULE_NAMES = {"product": "dense", "convolution": "convolution", "addition": "bias", "rows": "look-up"}
