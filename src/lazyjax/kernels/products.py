r"""Products of the Jacobian factors of two sets of samples, and the Gram from its blocks.

With inputs a (p, g, d) and cotangents Delta (k, p, g, m) of a group of leaves, a pair of samples is contracted in one
of three ways:

- outer (one position): $(a \cdot a')\,(\Delta_k \cdot \Delta'_{k'})$;
- spatial: $\sum_{pq} (a_p \cdot a'_q)\,(\Delta_{kp} \cdot \Delta'_{k'q})$, the positions contracted pair by pair;
- jacobian: the rows $\sum_p a_p \otimes \Delta_{kp}$ themselves and one matrix product.

Sums are accumulated in the dtype of the outputs, at the highest precision of the device. One block row of the Gram is
one unit of work, on one device or shared out over a mesh of them.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from lazyjax.kernels.factors import Factors, Group

Contraction = Literal["outer", "spatial", "jacobian"]

SMALL = 128
"""A diagonal block with fewer rows is not split: the products would get too small to be fast."""

DEPTH = 2
"""How often a diagonal block is split: 5/8 of its products remain, in programs of seven products for each group."""

ALONE = 4096
"""Numbers in a Jacobian row from which a leaf is multiplied by itself."""

_einsum = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)


class Rows(eqx.Module):
    """Block rows of the Gram, ready to be multiplied; a leading axis of samples, k outputs each.

    Attributes:
        outer: (a (n, d), Delta (n, k, m)) for each group.
        spatial: (a (n, p, g, d) or numbers of one-hot inputs (n, p), Delta (n, k, p, g, m)) for each group.
        jacobian: (n, k, size) of all other leaves, the small ones side by side.
    """

    outer: list[tuple[Float[Array, "n _"], Float[Array, "n k _"]]]
    spatial: list[tuple[Float[Array, "n _ _ _"] | Int[Array, "n _"], Float[Array, "n k _ _ _"]]]
    jacobian: list[Float[Array, "n k _"]]

    def part(self, start: int, stop: int) -> "Rows":
        """Return the rows of some of the samples."""
        return jax.tree.map(lambda leaf: leaf[start:stop], self)

    @property
    def shape(self) -> tuple[int, int]:
        """(n, k)."""
        leaf = jax.tree.leaves(self)[-1]
        return leaf.shape[0], leaf.shape[1]


def make_rows(
    factors: Factors, groups: list[Group], contractions: list[Contraction], dtype: Any, *, trace_outputs: bool
) -> Rows:
    """Return the factors of samples (leading axis) in the dtype of the result, each group ready for its contraction.

    `trace_outputs` sums over the outputs.
    """
    outer, spatial, rows = [], [], [part.astype(dtype) for part in factors.rows]
    for a, cotangents, group, contraction in zip(factors.inputs, factors.cotangents, groups, contractions, strict=True):
        delta = cotangents.astype(dtype)
        if group.one_hot and contraction == "spatial":
            spatial.append((a, _summed(delta, trace_outputs)))
            continue
        inputs = jax.nn.one_hot(a, group.sizes.inputs, dtype=dtype)[:, :, None] if group.one_hot else a.astype(dtype)
        if contraction == "jacobian":
            rows.append(_einsum("npgd,nkpgm->nkgdm", inputs, delta).reshape(*delta.shape[:2], -1))
        elif contraction == "outer":
            outer.append((inputs[:, 0, 0], _summed(delta[:, :, 0, 0], trace_outputs)))
        else:
            spatial.append((inputs, _summed(delta, trace_outputs)))
    return Rows(outer, spatial, [_summed(part, trace_outputs) for part in _joined(rows)])


def _joined(rows: list[Array]) -> list[Array]:
    """Join the small ones: each product costs a launch. The large ones by themselves can go once they are used."""
    small = [part for part in rows if part.shape[2] < ALONE]
    large = [part for part in rows if part.shape[2] >= ALONE]
    return large + ([jnp.concatenate(small, axis=2)] if small else [])


def _summed(delta: Array, trace_outputs: bool) -> Array:
    """Move the outputs into the last axis, over which products sum: (n, 1, ..., k * m) from (n, k, ..., m)."""
    if not trace_outputs:
        return delta
    moved = jnp.moveaxis(delta, 1, -2)
    return moved.reshape(*moved.shape[:-2], -1)[:, None]


# ---- one block ----


def product(first: Rows, second: Rows, dtype: Any) -> Float[Array, "m1 m2"]:
    """Return the block of two sets of samples, (n1 * k, n2 * k)."""
    (n1, k1), (n2, k2) = first.shape, second.shape
    block = jnp.zeros((n1, k1, n2 * k2), dtype)
    for (a1, delta1), (a2, delta2) in zip(first.outer, second.outer, strict=True):
        # Spread over the outputs first: along rows that are stored together the product with it is quick.
        inner = lax.optimization_barrier(jnp.repeat(_einsum("nd,md->nm", a1, a2), k2, axis=1))
        block += inner[:, None] * _einsum("nkp,mp->nkm", delta1, delta2.reshape(n2 * k2, -1))
    block = block.reshape(n1 * k1, n2 * k2)
    for part1, part2 in zip(first.jacobian, second.jacobian, strict=True):
        # As matrices: with more axes XLA moves them about on a CPU, a fifth of the time.
        block += _einsum("rs,cs->rc", part1.reshape(n1 * k1, -1), part2.reshape(n2 * k2, -1))
    block = block.reshape(n1, k1, n2, k2)
    for (a1, delta1), (a2, delta2) in zip(first.spatial, second.spatial, strict=True):
        # A sample at a time: all pairs of positions at once would fill the memory.
        block += lax.map(functools.partial(_pair_with_many, a2, delta2), (a1, delta1))
    return block.reshape(n1 * k1, n2 * k2)


def symmetric_product(rows: Rows, dtype: Any) -> Float[Array, "m m"]:
    """Return all products of samples with each other, half of them by symmetry."""
    n, k = rows.shape
    block = jnp.zeros((n * k, n * k), dtype)
    if rows.outer or rows.jacobian:
        block = _triangles(Rows(rows.outer, [], rows.jacobian), dtype)
    for a, delta in rows.spatial:
        block += _half_circle(a, delta).reshape(n * k, n * k)
    return block


def _triangles(rows: Rows, dtype: Any, depth: int = DEPTH) -> Array:
    """Return two triangles and the square between them."""
    n, k = rows.shape
    if n == 1 or n * k < SMALL or depth == 0:
        return product(rows, rows, dtype)
    first, second = rows.part(0, n // 2), rows.part(n // 2, n)
    corner = product(first, second, dtype)
    upper = jnp.concatenate([_triangles(first, dtype, depth - 1), corner], axis=1)
    return jnp.concatenate([upper, jnp.concatenate([corner.T, _triangles(second, dtype, depth - 1)], axis=1)])


def _half_circle(a: Array, delta: Array) -> Array:
    """Return (n, k, n, k): each sample with the half of all that follows it around a circle, then the transpose."""
    n = delta.shape[0]
    width = n // 2 + 1
    around = [jnp.concatenate([leaf, leaf[: width - 1]]) for leaf in (a, delta)]

    def one(i: Array) -> Array:
        window = [lax.dynamic_slice_in_dim(leaf, i, width) for leaf in around]
        return _one_with_many(window[0][0], window[1][0], *window)

    found = lax.map(one, jnp.arange(n))
    offset = (jnp.arange(n)[None] - jnp.arange(n)[:, None]) % n
    # Met twice in the sum with the transpose: each sample itself and, if n is even, its opposite.
    weight = jnp.where(offset < width, jnp.where((offset == 0) | (2 * offset == n), 0.5, 1.0), 0.0).astype(found.dtype)
    placed = jax.vmap(lambda row, at: row[:, at])(found, jnp.minimum(offset, width - 1))
    half = placed * weight[:, None, :, None]
    return half + half.transpose(2, 3, 0, 1)


def _pair_with_many(others: Array, deltas: Array, sample: tuple[Array, Array]) -> Array:
    return _one_with_many(*sample, others, deltas)


def _one_with_many(a: Array, delta: Array, others: Array, deltas: Array) -> Array:
    """Return the products of one sample with many over all pairs of positions, (k, n, k)."""
    if a.ndim == 1:
        # One-hot inputs are equal or orthogonal; -1 is a zero vector.
        inner = ((a[:, None, None] == others[None]) & (a[:, None, None] >= 0)).astype(delta.dtype)[None]
    else:
        inner = _einsum("pgd,jqgd->gpjq", a, others)
    moved = _einsum("gpjq,jlqgm->jlpgm", inner, deltas)
    return _einsum("kpgm,jlpgm->kjl", delta, moved)


# ---- all blocks ----

MakeRows = Callable[[Array], Rows]


def assemble(
    make: MakeRows, x1: Array, x2: Array | None, sizes: tuple[int, int], dtype: Any, mesh: Mesh | None
) -> Float[Array, "m1 m2"]:
    """Return the Gram of x1 with x2 (None: with itself), from block rows of `sizes` samples.

    Args:
        make: Samples to the block rows' factors.
        x1: Samples, first axis.
        x2: Other samples.
        sizes: Samples of a block of each.
        dtype: Dtype of the result.
        mesh: Devices to share the block rows out over, None for one device.
    """
    if mesh is None and sizes[0] == x1.shape[0] and x2 is None:
        return symmetric_product(make(x1), dtype)
    if mesh is None and x2 is not None and sizes == (x1.shape[0], x2.shape[0]):
        return product(make(x1), make(x2), dtype)
    blocks1 = _blocks(x1, sizes[0], 1 if mesh is None else mesh.size)
    blocks2 = None if x2 is None else _blocks(x2, sizes[1], 1)
    arguments = (make, blocks1, blocks2, dtype)
    full = _in_turn(*arguments) if mesh is None else _shared_out(*arguments, mesh)
    k = full.shape[0] // (blocks1.shape[0] * sizes[0])
    return full[: x1.shape[0] * k, : (x1 if x2 is None else x2).shape[0] * k]


def _blocks(x: Array, size: int, multiple: int) -> Array:
    """Return samples in blocks (blocks, size, ...), the last ones filled up with copies of the first sample.

    Their number is a multiple of `multiple`.
    """
    count = multiple * -(-x.shape[0] // (size * multiple))
    fill = jnp.broadcast_to(x[:1], (count * size - x.shape[0], *x.shape[1:]))
    return jnp.concatenate([x, fill]).reshape(count, size, *x.shape[1:])


def _columns(i: Array, count: int, other: int | None) -> Array:
    """Return the columns that block row i computes beyond its diagonal block: all of x2's, or the half of a circle.

    Row i takes columns i + 1, ..., i + count // 2 around the circle, so every row does as much and each pair is met
    once (twice for the opposite one, if count is even).
    """
    return jnp.arange(other) if other is not None else (i + jnp.arange(1, count // 2 + 1)) % count


def _block_shape(make: MakeRows, blocks1: Array, blocks2: Array | None) -> tuple[int, int]:
    shapes = [jax.eval_shape(make, blocks[0]).shape for blocks in (blocks1, blocks1 if blocks2 is None else blocks2)]
    return shapes[0][0] * shapes[0][1], shapes[1][0] * shapes[1][1]


def _in_turn(make: MakeRows, blocks1: Array, blocks2: Array | None, dtype: Any) -> Array:
    """Compute block rows one after the other and write them into one matrix, with their transposes."""
    count, (rows, columns) = blocks1.shape[0], _block_shape(make, blocks1, blocks2)
    others = blocks1 if blocks2 is None else blocks2

    def row(matrix: Array, i: Array) -> tuple[Array, None]:
        first = make(blocks1[i])
        if blocks2 is None:
            matrix = lax.dynamic_update_slice(matrix, symmetric_product(first, dtype), (i * rows, i * rows))

        def entry(matrix: Array, j: Array) -> tuple[Array, None]:
            block = product(first, make(others[j]), dtype)
            matrix = lax.dynamic_update_slice(matrix, block, (i * rows, j * columns))
            if blocks2 is None:
                matrix = lax.dynamic_update_slice(matrix, block.T, (j * rows, i * rows))
            return matrix, None

        return lax.scan(entry, matrix, _columns(i, count, None if blocks2 is None else others.shape[0]))

    empty = jnp.zeros((count * rows, others.shape[0] * columns), dtype)
    return lax.scan(row, empty, jnp.arange(count))[0]


def _shared_out(make: MakeRows, blocks1: Array, blocks2: Array | None, dtype: Any, mesh: Mesh) -> Array:
    """Compute block rows on all devices of a mesh, consecutive ones on each; rows stay where they were made."""
    count, (rows, columns) = blocks1.shape[0], _block_shape(make, blocks1, blocks2)
    others = blocks1 if blocks2 is None else blocks2
    spec = PartitionSpec(mesh.axis_names)

    def strip(i: Array) -> Array:
        """Return block row i, zero in the other half of the circle."""
        first = make(blocks1[i])
        wide = jnp.zeros((rows, others.shape[0] * columns), dtype)
        if blocks2 is None:
            # It meets its own transpose in the sum below, as does the opposite block of an even circle.
            wide = lax.dynamic_update_slice(wide, 0.5 * symmetric_product(first, dtype), (0, i * rows))

        def entry(wide: Array, j: Array) -> tuple[Array, None]:
            block = product(first, make(others[j]), dtype)
            if blocks2 is None:
                block = jnp.where(2 * ((j - i) % count) == count, 0.5, 1.0).astype(dtype) * block
            return lax.dynamic_update_slice(wide, block, (0, j * columns)), None

        return lax.scan(entry, wide, _columns(i, count, None if blocks2 is None else others.shape[0]))[0]

    def local(numbers: Array) -> Array:
        return lax.map(strip, numbers).reshape(-1, others.shape[0] * columns)

    half = jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)(jnp.arange(count))
    return half if blocks2 is not None else half + half.T
