"""A Gram from its blocks: one block row is one unit of work, on one device or shared out over a mesh of them."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float

from lazyjax.kernels.products import Rows, product, symmetric_product

MakeRows = Callable[[Array], Rows]


def assemble(
    make: MakeRows, x1: Array, x2: Array | None, sizes: tuple[int, int], dtype: Any, mesh: Mesh | None
) -> Float[Array, "m1 m2"]:
    """The Gram of x1 with x2 (None: with itself), from block rows of `sizes` samples.

    Args:
        make: Samples to the block rows' factors.
        x1: Samples, first axis.
        x2: Other samples.
        sizes: Samples of a block of each.
        dtype: Of the result.
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
    """Samples in blocks (blocks, size, ...), the last ones filled up with copies of the first sample.

    Their number is a multiple of `multiple`.
    """
    count = multiple * -(-x.shape[0] // (size * multiple))
    fill = jnp.broadcast_to(x[:1], (count * size - x.shape[0], *x.shape[1:]))
    return jnp.concatenate([x, fill]).reshape(count, size, *x.shape[1:])


def _columns(i: Array, count: int, other: int | None) -> Array:
    """The columns that block row i computes beyond its diagonal block: all of x2's, or the half of a circle.

    Row i takes columns i + 1, ..., i + count // 2 around the circle, so every row does as much and each pair is met
    once (twice for the opposite one, if count is even).
    """
    return jnp.arange(other) if other is not None else (i + jnp.arange(1, count // 2 + 1)) % count


def _in_turn(make: MakeRows, blocks1: Array, blocks2: Array | None, dtype: Any) -> Array:
    """Block rows one after the other, written into one matrix with their mirror images."""
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


def _block_shape(make: MakeRows, blocks1: Array, blocks2: Array | None) -> tuple[int, int]:
    shapes = [jax.eval_shape(make, blocks[0]).shape for blocks in (blocks1, blocks1 if blocks2 is None else blocks2)]
    return shapes[0][0] * shapes[0][1], shapes[1][0] * shapes[1][1]


def _shared_out(make: MakeRows, blocks1: Array, blocks2: Array | None, dtype: Any, mesh: Mesh) -> Array:
    """Block rows on all devices of a mesh, consecutive ones on each; the result's rows stay where they were made."""
    count, (rows, columns) = blocks1.shape[0], _block_shape(make, blocks1, blocks2)
    others = blocks1 if blocks2 is None else blocks2
    spec = PartitionSpec(mesh.axis_names)

    def strip(i: Array) -> Array:
        """Block row i, zero in the other half of the circle."""
        first = make(blocks1[i])
        wide = jnp.zeros((rows, others.shape[0] * columns), dtype)
        if blocks2 is None:
            # It meets its own mirror image in the sum below, as does the opposite block of an even circle.
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
