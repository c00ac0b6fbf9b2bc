r"""The tangent kernel $K(x, x') = D_w f(w, x)\, D_w f(w, x')^T$ on data: Gram, products, spectrum.

`gram` is the plain $JJ^T$; the kernel operator in the paper's metric is `gram / n` (see `lazyjax.loss`).
"""

import functools
from collections.abc import Callable
from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from lazyjax._check import check_finite, check_outputs, is_concrete, split_params
from lazyjax._krylov import top_eigenvalues
from lazyjax._types import Model, Outputs, Params
from lazyjax.tangent import match_outputs

BLOCK_BYTES = 2**28
"""Memory for the Jacobian rows of one block: two of them are held at a time."""

DENSE_SIZE = 4096
"""Outputs up to which `spectrum` takes its leading eigenvalues from the dense Gram."""


def gram(
    f: Model,
    w: Params,
    x1: Float[Array, "n1 ..."],
    x2: Float[Array, "n2 ..."] | None = None,
    *,
    method: Literal["auto", "jacobian"] = "auto",
) -> Float[Array, "..."]:
    r"""Gram matrix of the tangent kernel, $K_{ij} = D_w f(w, x_{1,i})\, D_w f(w, x_{2,j})^T$.

    Jacobian rows are made and contracted a block at a time, so memory is bounded by the result and a fixed
    block size; for x2 None only one triangle of blocks is computed.

    Args:
        f: Model f(w, x) with outputs (n,) or (n, k). Row i of its outputs must depend on row i of x only.
        w: Parameters; the floating arrays are the coordinates.
        x1: Inputs, samples along the first axis.
        x2: Other inputs; None for x1.
        method: How; "auto" and "jacobian" both contract Jacobians.

    Returns:
        (n1, n2) for outputs (n,); (n1, k, n2, k) for outputs (n, k). The plain $JJ^T$, without 1/n.

    Raises:
        ValueError: empty or non-finite inputs, x1 and x2 of different sample shapes, outputs of another shape,
            a model that mixes samples (as batch normalisation does), or an unknown method.

    Source:
        Chizat, Oyallon, Bach (2019), equation (7).

    Example:
        >>> x = jnp.array([[1.0, 0.0], [1.0, 1.0]])
        >>> print(gram(lambda w, x: x @ w, jnp.zeros(2), x))
        [[1. 1.]
         [1. 2.]]
    """
    if method not in ("auto", "jacobian"):
        msg = f'method must be "auto" or "jacobian", got {method!r}.'
        raise ValueError(msg)
    coordinates, rest = split_params(w, "w")
    _check_inputs(f, w, x1, x2)
    return _gram(f, coordinates, rest, x1, x2)


@eqx.filter_jit
def _gram(f: Model, coordinates: Params, rest: Params, x1: Array, x2: Array | None) -> Array:
    out = check_outputs(f, eqx.combine(coordinates, rest), x1, name="f")
    k = out.shape[1] if len(out.shape) == 2 else 1
    p = sum(leaf.size for leaf in jtu.tree_leaves(coordinates))
    n1, n2 = x1.shape[0], (x1 if x2 is None else x2).shape[0]
    limit = max(1, BLOCK_BYTES // (k * p * out.dtype.itemsize))
    size1, size2 = min(limit, n1), min(limit, n2)

    def rows(x: Array) -> list[Array]:
        """Jacobian of a block of samples, one (samples * k, p_leaf) matrix a parameter leaf."""

        def one(row: Array) -> Params:
            return jax.jacrev(lambda c: f(eqx.combine(c, rest), row[None])[0])(coordinates)

        return [leaf.reshape(x.shape[0] * k, -1) for leaf in jtu.tree_leaves(jax.vmap(one)(x))]

    blocks1, blocks2 = _blocks(x1, size1), None if x2 is None else _blocks(x2, size2)

    def entry(pair: Array) -> Array:
        first = rows(blocks1[pair[0]])
        second = rows((blocks1 if blocks2 is None else blocks2)[pair[1]])
        products = [a.astype(out.dtype) @ b.T.astype(out.dtype) for a, b in zip(first, second, strict=True)]
        return functools.reduce(jnp.add, products)

    counts = len(blocks1), None if blocks2 is None else len(blocks2)
    full = _assemble(entry, *counts, (size1 * k, size2 * k), out.dtype)
    full = full[: n1 * k, : n2 * k]
    return full if len(out.shape) == 1 else full.reshape(n1, k, n2, k)


def _blocks(x: Array, size: int) -> Array:
    """Samples in blocks (blocks, size, ...), the last one filled up with copies of the first sample."""
    count = -(-x.shape[0] // size)
    fill = jnp.broadcast_to(x[:1], (count * size - x.shape[0], *x.shape[1:]))
    return jnp.concatenate([x, fill]).reshape(count, size, *x.shape[1:])


def _assemble(
    entry: Callable[[Array], Array], count1: int, count2: int | None, sizes: tuple[int, int], dtype: np.dtype
) -> Array:
    """Matrix of blocks `entry((i, j))`; with `count2` None it is symmetric and only j >= i is computed."""
    symmetric = count2 is None
    columns = count1 if symmetric else count2
    rows, cols = sizes
    pairs = [(i, j) for i in range(count1) for j in range(i if symmetric else 0, columns)]

    def write(matrix: Array, pair: Array) -> tuple[Array, None]:
        block = entry(pair)
        matrix = jax.lax.dynamic_update_slice(matrix, block, (pair[0] * rows, pair[1] * cols))
        if symmetric:
            matrix = jax.lax.dynamic_update_slice(matrix, block.T, (pair[1] * rows, pair[0] * cols))
        return matrix, None

    empty = jnp.zeros((count1 * rows, columns * cols), dtype)
    return jax.lax.scan(write, empty, jnp.asarray(pairs))[0]


def _check_inputs(f: Model, w: Params, x1: Array, x2: Array | None) -> None:
    for name, x in (("x1", x1), ("x2", x2)):
        if x is None:
            continue
        if x.ndim == 0 or x.size == 0:
            msg = f"{name} must hold at least one sample along its first axis, got shape {x.shape}."
            raise ValueError(msg)
        check_finite(x, name)
    if x2 is not None and x2.shape[1:] != x1.shape[1:]:
        msg = f"x1 and x2 must hold samples of one shape, got {x1.shape[1:]} and {x2.shape[1:]}."
        raise ValueError(msg)
    out = check_outputs(f, w, x1, name="f")
    if out.shape[0] != x1.shape[0]:
        msg = f"f must return one row of outputs a sample, got {out.shape[0]} rows for {x1.shape[0]} samples."
        raise ValueError(msg)
    if x1.shape[0] > 1 and is_concrete((w, x1)):
        _check_independent(f, w, x1)


def _check_independent(f: Model, w: Params, x: Array) -> None:
    """Refuse a model whose output for the first sample changes when the other samples do."""
    first, alone, terms = _first_row(f, *eqx.partition(w, eqx.is_inexact_array), x)
    if not is_concrete((first, alone, terms)):
        return
    check_finite(alone, "f(w, x1[:1])")
    first, alone = np.asarray(first), np.asarray(alone)
    if not np.allclose(first, alone, rtol=0, atol=1e3 * float(np.finfo(first.dtype).eps) * float(terms)):
        msg = (
            "f must treat every sample by itself, but its output for x1[0] changes with the other samples "
            f"(by {float(np.max(np.abs(first - alone))):.1e}), as with batch normalisation in training mode; "
            "use the layer's inference mode."
        )
        raise ValueError(msg)


@eqx.filter_jit
def _first_row(f: Model, coordinates: Params, rest: Params, x: Array) -> tuple[Array, Array, Array]:
    """The first sample's outputs beside the second one, alone, and the size of the terms they are summed from.

    Those terms, and not the outputs, set the rounding: a mirrored or centred model's outputs cancel.
    """
    alone, vjp = jax.vjp(lambda c: f(eqx.combine(c, rest), x[:1]), coordinates)
    (slopes,) = vjp(jnp.ones_like(alone))
    products = jtu.tree_leaves(
        jtu.tree_map(lambda a, b: jnp.sum((a * b).astype(alone.dtype) ** 2), coordinates, slopes)
    )
    terms = jnp.maximum(jnp.sqrt(sum(products)), jnp.max(jnp.abs(alone)))
    return f(eqx.combine(coordinates, rest), x[:2])[0], alone[0], terms


def kernel_matvec(f: Model, w: Params, x: Float[Array, "n ..."]) -> Callable[[Outputs], Outputs]:
    r"""The product $r \mapsto Dh\, Dh^T r$ with the plain Gram of `x`, matrix-free.

    Args:
        f: Model f(w, x) with outputs (n,) or (n, k); it may mix samples.
        w: Parameters.
        x: Inputs.

    Returns:
        A function of r (n,) or (n, k), of the outputs' shape: one jvp and one vjp a call, h evaluated once here.

    Raises:
        ValueError: inputs empty or not finite, outputs of another shape.

    Example:
        >>> x = jnp.array([[1.0, 0.0], [1.0, 1.0]])
        >>> print(kernel_matvec(lambda w, x: x @ w, jnp.zeros(2), x)(jnp.array([1.0, 1.0])))
        [2. 3.]
    """
    coordinates, rest = split_params(w, "w")
    check_finite(x, "x")
    out = check_outputs(f, w, x, name="f")
    _, jvp = jax.linearize(lambda c: f(eqx.combine(c, rest), x), coordinates)
    vjp = jax.linear_transpose(jvp, coordinates)
    return lambda r: jvp(*vjp(match_outputs(r, out)))


def spectrum(
    f: Model, w: Params, x: Float[Array, "n ..."], *, k: int | None = None, key: PRNGKeyArray | None = None
) -> Float[Array, " m"]:
    r"""Eigenvalues of the plain Gram $JJ^T$ of `x`, falling.

    Args:
        f: Model f(w, x).
        w: Parameters.
        x: Inputs (n, ...).
        k: None: all n*k_out of them, from the dense Gram. A number: the k largest, from the dense Gram up to 4096
            outputs, above by matrix-free Lanczos until converged, repeated eigenvalues as often as they are; inside
            jit one run of 2k + 20 products there: Ritz values from below, repeated ones missing.
        key: For Lanczos' start vector; None for a fixed one.

    Returns:
        The eigenvalues; rounding may leave values of either sign near zero.

    Raises:
        ValueError: k not in 1..n*k_out; inputs as for `gram`.

    Source:
        Chizat, Oyallon, Bach (2019), supplementary Figure 7(b).

    Example:
        >>> x = jnp.array([[1.0, 0.0], [0.0, 2.0]])
        >>> print(spectrum(lambda w, x: x @ w, jnp.zeros(2), x))
        [4. 1.]
    """
    check_finite(x, "x")
    out = check_outputs(f, w, x, name="f")
    if k is not None and not 1 <= k <= out.size:
        msg = f"k must be between 1 and the number of outputs {out.size}, got {k}."
        raise ValueError(msg)
    if k is None or out.size <= DENSE_SIZE:
        return jnp.linalg.eigvalsh(gram(f, w, x).reshape(out.size, out.size))[::-1][:k]
    matvec = kernel_matvec(f, w, x)
    return top_eigenvalues(lambda r: matvec(r.reshape(out.shape)).ravel(), out.size, k, dtype=out.dtype, key=key)
