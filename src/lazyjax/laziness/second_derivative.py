r"""A certified bracket on $\|D^2h(w_0)\|$, the norm of a bilinear map B: R^p x R^p -> F, which is hard to compute.

The lower bound is found by search (`hessian_norm.py`). Upper bounds are norms of unfoldings, which are eigenvalue
problems, with $H_i$ the Hessians of the outputs in an orthonormal basis of F:

- parameters against the rest, $\|B\|^2 \le \lambda_{max}(\sum_i H_i^2)$;
- outputs against the rest, $\|B\|^2 \le \lambda_{max}(\langle H_i, H_j\rangle)$. Better, with that matrix's eigenvalues
  $\lambda_k$ and the Hessians $V_k$ of its eigenvectors, orthonormal in the Frobenius product:
  $\|B(u, u)\|^2 = \sum_k \lambda_k s_k$ where $s_k = (u^TV_ku)^2 \le \|V_k\|^2$ and $\sum_k s_k \le |uu^T|^2 = 1$,
  so it is at most the sum with the largest $\lambda_k$ filled first;
- block by block of the parameters: with $N_{ab}$ at least the norm of the block $B_{ab}$ (by its unfoldings),
  $\|B(u, u)\| \le \sum_{ab} N_{ab}|u_a||u_b| \le \lambda_{max}(N)$. A layer's outputs are often linear in it: then
  an unfolding that sums over one layer in full is tight, where the one that sums over the other is not.

**What is certain.** For small models the eigenvalues are computed in full. Beyond, Lanczos gives
$\theta \le \lambda_{max}$ from a random start, with $\lambda_{max} \le \theta/(1-\epsilon)$ but for a probability of
$1.648\sqrt p\,e^{-\sqrt\epsilon(2k-1)}$ after k products (Kuczynski and Wozniakowski 1992, theorem 4.2). If even the
products cost too much, $\|H_z\| \ge \|B\||g|$ for a Gaussian z in F, with g a standard normal number (that of z
along the outputs' direction at the maximum): so $\|B\|^2 \le \sum_s\|H_{z_s}\|^2/q$, q a small quantile of
$\chi^2$. All failures together have the probability `FAILURE`, over the random starts and not over models.
"""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from lazyjax._core.cost import count_flops
from lazyjax._core.lanczos import lanczos, lanczos_slack
from lazyjax._core.types import Model, Params
from lazyjax.laziness.hessian_norm import SecondDerivative, dense_norm_lower, norm_lower
from lazyjax.laziness.sample_hessians import OutputRows, SampleRows, independent_samples

FAILURE = 1e-6
"""Probability that an upper bound by random starts fails."""

DENSE = 4_000_000
"""Numbers of B up to which it is formed, with at most DENSE_PARAMS parameters."""

DENSE_PARAMS = 128

STEPS = 20
"""Products of a Lanczos run for an unfolding: the norm is at most 25 % above the Ritz value for 1e6 parameters."""

PROBE_STEPS = 32
"""Products of a Lanczos run for the Hessian of a random output, whose eigenvalues have two signs."""

BUDGET = 1.05e12
"""Multiply-adds for a bound from above by unfoldings: 40 s on two cores, few of whose products use both."""

PROBE_BUDGET = 3.5e11
"""Multiply-adds for a bound by random outputs, whose products take three times as long for their operations."""

MAX_GROUPS = 4
"""Blocks of parameters at most; each pair of blocks has an unfolding of its own."""

MATVECS = 40
"""Lanczos steps for a norm of Dh; its upper bound is 3 % above the Ritz value for 1000 outputs."""

OPERATORS = 32
"""Leading V_k whose norms are computed."""


class Bracket(eqx.Module):
    """The bounds of a norm; made by `bracket`.

    Attributes:
        lower: Attained at a unit vector.
        upper: Holds except with probability `failure`.
        failure: 0 if nothing is random.
        how: How the upper bound was found, in words.
    """

    lower: Float[Array, ""]
    upper: Float[Array, ""]
    failure: float = eqx.field(static=True)
    how: str = eqx.field(static=True)


def bracket(h: Model, w0: Params, weight: float, outputs: int, key: PRNGKeyArray, starts: int) -> Bracket:
    """Return the bracket for any model, by what its size allows; `weight` is that of F's metric."""
    form = SecondDerivative(h, w0, weight**0.5)
    coordinates = eqx.filter(w0, eqx.is_inexact_array)
    size = sum(leaf.size for leaf in jtu.tree_leaves(coordinates))
    groups = leaf_groups(coordinates)
    if size <= DENSE_PARAMS and outputs * size**2 <= DENSE:
        lower, upper = _dense(form, groups, key, starts)
        return Bracket(lower, jnp.maximum(lower, upper), 0.0, "all Hessians formed")
    found = independent_samples(h, w0)
    rows = OutputRows(form, outputs) if found is None else SampleRows(found[0], w0, found[1], weight**0.5)
    runs, steps = _plan_runs(rows.cost(count_flops), max(groups) + 1, size)
    if not runs and isinstance(rows, SampleRows):
        runs = [(-1, -1)]
    low_key, high_key = jr.split(key)
    lower = norm_lower(form, outputs, low_key, starts)
    if not runs:
        steps = min(size, PROBE_STEPS)
        probes = _probes(form, outputs, steps)
        upper = _gaussian(form, outputs, high_key, probes, steps)
        return Bracket(lower, jnp.maximum(lower, upper), FAILURE, f"Hessians of {probes} random outputs")
    upper = _unfolded(rows, form.point(), groups, runs, steps, high_key)
    exact = steps >= size
    how = f"{len(runs)} unfolding{'s' if len(runs) > 1 else ''} by Lanczos"
    return Bracket(lower, jnp.maximum(lower, upper), 0.0 if exact else FAILURE, how)


def leaf_groups(coordinates: Params) -> list[int]:
    """Return the number of each leaf's block: a leaf, or if they are many a parent (a layer), or one for all."""
    paths = [path for path, _ in jtu.tree_leaves_with_path(coordinates)]
    for depth in (0, 1):
        names = [jtu.keystr(path[: len(path) - depth]) for path in paths]
        distinct = list(dict.fromkeys(names))
        if len(distinct) <= MAX_GROUPS:
            return [distinct.index(name) for name in names]
    return [0] * len(paths)


def _plan_runs(cost: float, num_groups: int, size: int) -> tuple[list[tuple[int, int]], int]:
    """Return which unfoldings (block summed over, block of u; -1 for all) fit the budget, and the steps of each."""
    steps = min(size, STEPS)
    single = cost * steps
    pairs = [(a, b) for a in range(num_groups) for b in range(num_groups)] if num_groups > 1 else []
    if single * (len(pairs) + 1) <= BUDGET:
        return [(-1, -1), *pairs], steps
    return ([(-1, -1)] if single <= BUDGET else []), steps


@eqx.filter_jit
def _unfolded(
    rows: SampleRows | OutputRows,
    point: Array,
    groups: list[int],
    runs: list[tuple[int, int]],
    steps: int,
    key: PRNGKeyArray,
) -> Array:
    """Return the lesser of the whole unfolding's norm and that of the matrix of the blocks' norms."""
    sizes = [leaf.size for leaf in jtu.tree_leaves(eqx.filter(_params(rows), eqx.is_inexact_array))]
    members = jnp.asarray(np.repeat(groups, sizes))
    slack = lanczos_slack(point.size, steps, FAILURE / len(runs))

    def norm(run: tuple[Array, Array, PRNGKeyArray]) -> Array:
        summed, seen, k = run
        scales = _mask(jnp.asarray(groups), summed, point.dtype)
        mask = _mask(members, seen, point.dtype)
        theta = lanczos(lambda u: mask * rows.product(mask * u, scales), point.size, steps, dtype=point.dtype, key=k)[0]
        return jnp.sqrt(slack * jnp.maximum(theta[-1], 0))

    numbers = jnp.asarray(runs)
    norms = jax.lax.map(norm, (numbers[:, 0], numbers[:, 1], jr.split(key, len(runs))))
    if len(runs) == 1:
        return norms[0]
    count = max(groups) + 1
    blocks = norms[1:].reshape(count, count)
    return jnp.minimum(norms[0], jnp.linalg.eigvalsh(jnp.minimum(blocks, blocks.T))[-1])


def _params(rows: SampleRows | OutputRows) -> Params:
    return rows.w0 if isinstance(rows, SampleRows) else rows.form.w0


def _mask(members: Int[Array, "..."], group: Int[Array, ""], dtype: jnp.dtype) -> Array:
    return ((members == group) | (group < 0)).astype(dtype)


def _probes(form: SecondDerivative, outputs: int, steps: int) -> int:
    """Return how many random outputs to take: from 6 (their quantile is 1/300 of the mean) to 60 (1/3)."""
    return int(np.clip(PROBE_BUDGET / (form.cost(outputs) * steps), 6, 60))


@eqx.filter_jit
def _gaussian(form: SecondDerivative, outputs: int, key: PRNGKeyArray, probes: int, steps: int) -> Array:
    from scipy.special import gammaincinv

    point = form.point()

    def square(k: PRNGKeyArray) -> Array:
        first, second = jr.split(k)
        z = jr.normal(first, (outputs,), point.dtype)
        theta = lanczos(form.hessian(z), point.size, steps, dtype=point.dtype, key=second)[0]
        return jnp.max(theta**2)

    # The Krylov space of H holds that of H^2 of half the dimension, and its image under H.
    slack = 1.0 if steps >= point.size else lanczos_slack(point.size, steps // 2, FAILURE / 2 / probes)
    quantile = 2 * float(gammaincinv(probes / 2, FAILURE / 2))
    return jnp.sqrt(slack / quantile * jnp.sum(jax.lax.map(square, jr.split(key, probes))))


@eqx.filter_jit
def _dense(form: SecondDerivative, groups: list[int], key: PRNGKeyArray, starts: int) -> tuple[Array, Array]:
    sizes = [leaf.size for leaf in jtu.tree_leaves(eqx.filter(form.w0, eqx.is_inexact_array))]
    members = tuple(group for group, size in zip(groups, sizes, strict=True) for _ in range(size))
    tensor = form.dense()
    lower = dense_norm_lower(
        lambda z: jnp.tensordot(z, tensor, 1),
        lambda u: jnp.einsum("qab,a,b->q", tensor, u, u),
        (tensor.shape[0], tensor.dtype),
        key,
        starts,
    )
    return lower, dense_upper(tensor, members)


def dense_upper(tensor: Float[Array, "q p p"], members: tuple[int, ...]) -> Float[Array, ""]:
    """Bound the norm of B from all its numbers; `members` is the block of each parameter."""
    count = max(members) + 1
    pairs = [(-1, -1)] + ([(a, b) for a in range(count) for b in range(a + 1)] if count > 1 else [])
    groups = jnp.asarray(members)

    def norm(pair: tuple[Array, Array]) -> Array:
        rows, columns = (_mask(groups, group, tensor.dtype) for group in pair)
        return _unfolding_bound(jnp.outer(rows, columns)[None] * tensor)

    numbers = np.asarray(pairs)
    norms = jax.lax.map(norm, (jnp.asarray(numbers[:, 0]), jnp.asarray(numbers[:, 1])))
    if count == 1:
        return norms[0]
    rows, columns = numbers[1:].T
    blocks = jnp.zeros((count, count), tensor.dtype).at[rows, columns].set(norms[1:]).at[columns, rows].set(norms[1:])
    return jnp.minimum(norms[0], jnp.linalg.eigvalsh(blocks)[-1])


def largest_eigenvalue(matrix: Float[Array, "p p"]) -> Float[Array, ""]:
    """Return the largest eigenvalue of a positive semi-definite matrix."""
    return jnp.maximum(jnp.linalg.eigvalsh(matrix)[-1], 0)


def _unfolding_bound(tensor: Array) -> Array:
    """Return the least norm of the three unfoldings, that of outputs filled."""
    sides = [largest_eigenvalue(jnp.einsum(pair, tensor, tensor)) for pair in ("iab,iac->bc", "iab,icb->ac")]
    of_outputs = filled(jnp.einsum("iab,jab->ij", tensor, tensor), lambda z: jnp.tensordot(z, tensor, 1))
    return jnp.sqrt(jnp.minimum(jnp.minimum(*sides), of_outputs))


def filled(products: Float[Array, "q q"], hessian: Callable[[Array], Array]) -> Float[Array, ""]:
    """Bound |B|^2 by the inner products of the H_i, their leading eigenvalues filled up to the norms of the V_k.

    `hessian(z)` is H_z, or its block.
    """
    values, vectors = jnp.linalg.eigh(products)
    values, vectors = jnp.maximum(values[::-1], 0), vectors[:, ::-1]
    count = min(OPERATORS, values.size)
    hessians = jax.vmap(hessian)(vectors[:, :count].T)
    squares = jnp.linalg.eigvalsh(jnp.einsum("kab,kcb->kac", hessians, hessians))[:, -1]
    leading = values[:count]
    # Nothing is known of a Hessian that is all rounding, nor needed.
    known = leading > 1e3 * jnp.finfo(values.dtype).eps * values[0]
    shares = jnp.where(known, squares / jnp.where(known, leading, 1), 1)
    shares = jnp.concatenate([jnp.clip(shares, 0, 1), jnp.ones(values.size - count, values.dtype)])
    before = jnp.cumsum(shares) - shares
    return jnp.sum(values * jnp.clip(1 - before, 0, shares))
