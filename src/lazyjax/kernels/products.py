r"""Products of the Jacobian factors of two sets of samples: their block of the Gram, in one of three ways.

With inputs a (p, g, d) and cotangents Delta (k, p, g, m) of a group of leaves, for each pair of samples:

- outer (one position): $(a \cdot a')\,(\Delta_k \cdot \Delta'_{k'})$;
- spatial: $\sum_{pq} (a_p \cdot a'_q)\,(\Delta_{kp} \cdot \Delta'_{k'q})$, the positions contracted pair by pair;
- jacobian: the rows $\sum_p a_p \otimes \Delta_{kp}$ themselves and one matrix product.

Sums are accumulated in the dtype of the outputs, at the highest precision of the device.
"""

import functools
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from lazyjax.kernels.factors import Factors, Group

Contraction = Literal["outer", "spatial", "jacobian"]

SMALL = 128
"""A diagonal block with fewer rows is not split: the products would get too small to be fast."""

DEPTH = 2
"""How often a diagonal block is split: 5/8 of its products remain, in programs of seven products a group."""

ALONE = 4096
"""Numbers in a Jacobian row from which a leaf is multiplied by itself."""

_einsum = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)


class Rows(eqx.Module):
    """Block rows of the Gram, ready to be multiplied; a leading axis of samples, k outputs each.

    Attributes:
        outer: (a (n, d), Delta (n, k, m)) a group.
        spatial: (a (n, p, g, d) or row numbers (n, p), Delta (n, k, p, g, m)) a group.
        jacobian: (n, k, size) of all other leaves, the small ones side by side.
    """

    outer: list[tuple[Float[Array, "n _"], Float[Array, "n k _"]]]
    spatial: list[tuple[Float[Array, "n _ _ _"] | Int[Array, "n _"], Float[Array, "n k _ _ _"]]]
    jacobian: list[Float[Array, "n k _"]]

    def part(self, start: int, stop: int) -> "Rows":
        """Some of the samples."""
        return jax.tree.map(lambda leaf: leaf[start:stop], self)

    @property
    def shape(self) -> tuple[int, int]:
        """(n, k)."""
        leaf = jax.tree.leaves(self)[-1]
        return leaf.shape[0], leaf.shape[1]


def make_rows(factors: Factors, groups: list[Group], ways: list[Contraction], dtype: Any, *, trace: bool) -> Rows:
    """Factors of samples (leading axis) in the dtype of the result, each group in its way.

    `trace` sums over the outputs.
    """
    outer, spatial, rows = [], [], [part.astype(dtype) for part in factors.rows]
    for a, cotangents, group, way in zip(factors.inputs, factors.cotangents, groups, ways, strict=True):
        delta = cotangents.astype(dtype)
        if group.is_rows and way == "spatial":
            spatial.append((a, _summed(delta, trace)))
            continue
        seen = jax.nn.one_hot(a, group.sizes[2], dtype=dtype)[:, :, None] if group.is_rows else a.astype(dtype)
        if way == "jacobian":
            rows.append(_einsum("npgd,nkpgm->nkgdm", seen, delta).reshape(*delta.shape[:2], -1))
        elif way == "outer":
            outer.append((seen[:, 0, 0], _summed(delta[:, :, 0, 0], trace)))
        else:
            spatial.append((seen, _summed(delta, trace)))
    return Rows(outer, spatial, [_summed(part, trace) for part in _joined(rows)])


def _joined(rows: list[Array]) -> list[Array]:
    """The small ones as one: each product costs a launch. The large ones by themselves can go once they are used."""
    small = [part for part in rows if part.shape[2] < ALONE]
    large = [part for part in rows if part.shape[2] >= ALONE]
    return large + ([jnp.concatenate(small, axis=2)] if small else [])


def _summed(delta: Array, trace: bool) -> Array:
    """With the outputs moved into the last axis, over which products sum: (n, 1, ..., k * m) from (n, k, ..., m)."""
    if not trace:
        return delta
    moved = jnp.moveaxis(delta, 1, -2)
    return moved.reshape(*moved.shape[:-2], -1)[:, None]


def symmetric_product(rows: Rows, dtype: Any) -> Float[Array, "m m"]:
    """All products of samples with each other, half of them by symmetry."""
    n, k = rows.shape
    block = jnp.zeros((n * k, n * k), dtype)
    if rows.outer or rows.jacobian:
        block = _triangles(Rows(rows.outer, [], rows.jacobian), dtype)
    for a, delta in rows.spatial:
        block += _half_circle(a, delta).reshape(n * k, n * k)
    return block


def _triangles(rows: Rows, dtype: Any, depth: int = DEPTH) -> Array:
    """Two triangles and the square between them."""
    n, k = rows.shape
    if n == 1 or n * k < SMALL or depth == 0:
        return product(rows, rows, dtype)
    first, second = rows.part(0, n // 2), rows.part(n // 2, n)
    corner = product(first, second, dtype)
    upper = jnp.concatenate([_triangles(first, dtype, depth - 1), corner], axis=1)
    return jnp.concatenate([upper, jnp.concatenate([corner.T, _triangles(second, dtype, depth - 1)], axis=1)])


def product(first: Rows, second: Rows, dtype: Any) -> Float[Array, "m1 m2"]:
    """The block of two sets of samples, (n1 * k, n2 * k)."""
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
        block += lax.map(functools.partial(_pair_against, a2, delta2), (a1, delta1))
    return block.reshape(n1 * k1, n2 * k2)


def _half_circle(a: Array, delta: Array) -> Array:
    """(n, k, n, k): each sample against the half of all that follows it around a circle, then the mirror image."""
    n = delta.shape[0]
    width = n // 2 + 1
    around = [jnp.concatenate([leaf, leaf[: width - 1]]) for leaf in (a, delta)]

    def one(i: Array) -> Array:
        window = [lax.dynamic_slice_in_dim(leaf, i, width) for leaf in around]
        return _against(window[0][0], window[1][0], *window)

    found = lax.map(one, jnp.arange(n))
    offset = (jnp.arange(n)[None] - jnp.arange(n)[:, None]) % n
    # Met twice in the sum with the mirror image: each sample itself and, if n is even, its opposite.
    weight = jnp.where(offset < width, jnp.where((offset == 0) | (2 * offset == n), 0.5, 1.0), 0.0).astype(found.dtype)
    placed = jax.vmap(lambda row, at: row[:, at])(found, jnp.minimum(offset, width - 1))
    half = placed * weight[:, None, :, None]
    return half + half.transpose(2, 3, 0, 1)


def _pair_against(others: Array, deltas: Array, sample: tuple[Array, Array]) -> Array:
    return _against(*sample, others, deltas)


def _against(a: Array, delta: Array, others: Array, deltas: Array) -> Array:
    """One sample against many over all pairs of positions, (k, n, k)."""
    if a.ndim == 1:
        # Rows of a table are the same or orthogonal; -1 is none.
        inner = ((a[:, None, None] == others[None]) & (a[:, None, None] >= 0)).astype(delta.dtype)[None]
    else:
        inner = _einsum("pgd,jqgd->gpjq", a, others)
    moved = _einsum("gpjq,jlqgm->jlpgm", inner, deltas)
    return _einsum("kpgm,jlpgm->kjl", delta, moved)
