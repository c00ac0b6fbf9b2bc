r"""The tangent kernel $K(x, x') = D_w f(w, x)\, D_w f(w, x')^T$ on data: Gram, products, spectrum.

`gram` is the plain $JJ^T$; the kernel operator in the paper's metric is `gram / n` (see `lazyjax.loss`).
"""

from collections.abc import Callable
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jax.sharding import Mesh
from jaxtyping import Array, Float, PRNGKeyArray, Shaped

from lazyjax._core.checks import check_finite, check_outputs, split_params
from lazyjax._core.lanczos import top_eigenvalues
from lazyjax._core.types import Model, Outputs, Params
from lazyjax.kernels.blocks import assemble
from lazyjax.kernels.factors import sample_factors
from lazyjax.kernels.plan import Choice, GramPlan, block_sizes, choose, describe
from lazyjax.kernels.products import Rows, make_rows, product
from lazyjax.kernels.sample_checks import check_rows, check_samples
from lazyjax.models.tangent import match_outputs

DENSE_SIZE = 4096
"""Outputs up to which `spectrum` takes its leading eigenvalues from the dense Gram."""

Method = Literal["auto", "jacobian"]


def gram(
    f: Model,
    w: Params,
    x1: Shaped[Array, "n1 ..."],
    x2: Shaped[Array, "n2 ..."] | None = None,
    *,
    method: Method = "auto",
    trace: bool = False,
    mesh: Mesh | None = None,
) -> Float[Array, "..."]:
    r"""Gram matrix of the tangent kernel, $K_{ij} = D_w f(w, x_{1,i})\, D_w f(w, x_{2,j})^T$, exact at finite width.

    The Jacobian of a layer is a product of its inputs and its cotangents, and so is the layer's part of the Gram:
    for a dense layer $z = xW$ it is $(x \cdot x')(\Delta_k \cdot \Delta'_{k'})$, so no Jacobian is formed. The program
    of f is read for such places: dense and batched products, convolutions, biases, look-ups of rows, also where one
    parameter is used several times. Each parameter is treated in the cheapest of the ways open to it (`gram_plan`
    prints them); a parameter with any other use by its Jacobian rows. Only one triangle is computed for x2 None,
    and memory is bounded by the result and blocks of a size chosen to fit.

    Sums are accumulated in the dtype of the outputs (on accelerators too: no tensor-float), so float32 entries are
    right to about 1e-6 of the largest.

    Args:
        f: Model f(w, x) with outputs (n,) or (n, k). Row i of its outputs must depend on row i of x only; this is
            checked on the first two samples, except inside a jit.
        w: Parameters, any pytree; the floating arrays are the coordinates.
        x1: Inputs, samples along the first axis.
        x2: Other inputs; None for x1.
        method: "auto": each parameter in its cheapest way. "jacobian": the rows of all of them, blockwise.
        trace: Sum over the outputs, $\sum_k K_{ik,jk}$: an (n1, n2) Gram for any k, at a fraction of the cost.
        mesh: Devices to share the block rows out over; the result is sharded by its rows. None: one device.

    Returns:
        (n1, n2) for outputs (n,) or with `trace`; (n1, k, n2, k) for outputs (n, k). The plain $JJ^T$, without 1/n.

    Raises:
        ValueError: empty or non-finite inputs, x1 and x2 of different sample shapes, outputs of another shape,
            a model that mixes samples (as batch normalization does), or an unknown method.

    Source:
        Chizat, Oyallon, Bach (2019), equation (7).

    Example:
        >>> x = jnp.array([[1.0, 0.0], [1.0, 1.0]])
        >>> print(gram(lambda w, x: x @ w, jnp.zeros(2), x))
        [[1. 1.]
         [1. 2.]]
    """
    _check_method(method)
    coordinates, rest = split_params(w, "w")
    check_samples(f, w, x1, x2)
    return _gram(f, coordinates, rest, x1, x2, method, trace, mesh)


@eqx.filter_jit
def _gram(
    f: Model,
    coordinates: Params,
    rest: Params,
    x1: Array,
    x2: Array | None,
    method: Method,
    trace: bool,
    mesh: Mesh | None,
) -> Array:
    if x2 is not None:
        dtype = jnp.promote_types(x1.dtype, x2.dtype)
        x1, x2 = x1.astype(dtype), x2.astype(dtype)
    choice, leaves = _choose(f, coordinates, rest, x1, method, trace)
    n1, n2, k = x1.shape[0], (x1 if x2 is None else x2).shape[0], 1 if trace else choice.num_outputs
    sizes = block_sizes(
        choice.sample_bytes,
        n1 * n2 * k * k * jnp.dtype(choice.dtype).itemsize,
        n1,
        None if x2 is None else n2,
        1 if mesh is None else mesh.size,
    )
    # As the plan: rules of derivatives are traced here.
    with jax.default_matmul_precision("highest"):
        full = assemble(lambda x: _make_rows(choice, leaves, x, trace), x1, x2, sizes, choice.dtype, mesh)
    return full if trace or not choice.has_axis else full.reshape(n1, k, n2, k)


def _choose(
    f: Model, coordinates: Params, rest: Params, x: Any, method: Method, trace: bool, count: int | None = None
) -> tuple[Choice, list[Array]]:
    """The plan for samples like those of x, and the leaves that it numbers."""
    check_rows(f, eqx.combine(coordinates, rest), x)
    leaves, structure = jtu.tree_flatten(coordinates)

    def model(*args: Array) -> Array:
        return f(eqx.combine(jtu.tree_unflatten(structure, args[:-1]), rest), args[-1][None])[0]

    row = jax.ShapeDtypeStruct(x.shape[1:], x.dtype)
    return choose(model, leaves, row, method=method, trace_outputs=trace, count=count or x.shape[0]), leaves


def _make_rows(choice: Choice, leaves: list[Array], x: Array, trace: bool) -> Rows:
    """Factors of a block of samples."""
    factors = jax.vmap(lambda row: sample_factors(choice.program, choice.groups, choice.direct, leaves, row))(x)
    return make_rows(factors, choice.groups, choice.ways, choice.dtype, trace=trace)


def gram_diagonal(f: Model, w: Params, x: Shaped[Array, "n ..."], *, method: Method = "auto") -> Outputs:
    r"""The diagonal of `gram`, $\|D_w f_k(w, x_i)\|^2$, without the rest of it.

    Args:
        f: Model f(w, x) with outputs (n,) or (n, k), each sample by itself.
        w: Parameters.
        x: Inputs, samples along the first axis.
        method: As in `gram`.

    Returns:
        (n,) or (n, k), as the outputs.

    Raises:
        ValueError: as `gram`.

    Example:
        >>> x = jnp.array([[1.0, 0.0], [1.0, 1.0]])
        >>> print(gram_diagonal(lambda w, x: x @ w, jnp.zeros(2), x))
        [1. 2.]
    """
    _check_method(method)
    coordinates, rest = split_params(w, "w")
    check_samples(f, w, x, None)
    return _diagonal(f, coordinates, rest, x, method)


@eqx.filter_jit
def _diagonal(f: Model, coordinates: Params, rest: Params, x: Array, method: Method) -> Array:
    choice, leaves = _choose(f, coordinates, rest, x, method, False, 1)

    def one(sample: Array) -> Array:
        rows = _make_rows(choice, leaves, sample[None], False)
        return jnp.diagonal(product(rows, rows, choice.dtype))

    k = choice.num_outputs
    size, _ = block_sizes(choice.sample_bytes + 4 * k * k * jnp.dtype(choice.dtype).itemsize, 0, x.shape[0], None)
    with jax.default_matmul_precision("highest"):
        values = jax.lax.map(one, x, batch_size=size)
    return values if choice.has_axis else values[:, 0]


def gram_plan(
    f: Model,
    w: Params,
    x1: Shaped[Array, "n1 ..."] | jax.ShapeDtypeStruct,
    x2: Shaped[Array, "n2 ..."] | jax.ShapeDtypeStruct | None = None,
    *,
    method: Method = "auto",
    trace: bool = False,
    mesh: Mesh | None = None,
) -> GramPlan:
    r"""What `gram` would do with the same arguments, and the memory it would take, without doing it.

    Nothing is computed: w and the inputs may be shapes (`jax.eval_shape`, `jax.ShapeDtypeStruct`).

    Args:
        f: Model f(w, x).
        w: Parameters, or their shapes.
        x1: Inputs, or their shape.
        x2: Other inputs; None for x1.
        method: As in `gram`.
        trace: As in `gram`.
        mesh: As in `gram`; the memory is that of each device.

    Returns:
        `GramPlan`: the way of each parameter, operations, block sizes, bytes. Print it.

    Raises:
        ValueError: shapes unfit, or an unknown method.

    Example:
        >>> from lazyjax.models import mlp
        >>> import jax.random as jr
        >>> print(gram_plan(mlp(), mlp().init(jr.key(0), [3, 8, 2]), jnp.ones((5, 3))))
        parameters              rule          way...
    """
    _check_method(method)
    plans = []

    def plan(w: Params, x1: Array, x2: Array | None) -> Array:
        coordinates, rest = split_params(w, "w")
        check_samples(f, w, x1, x2)
        choice, leaves = _choose(f, coordinates, rest, x1, method, trace)
        names = [jtu.keystr(path) or "w" for path, _ in jtu.tree_leaves_with_path(coordinates)]
        n2 = None if x2 is None else x2.shape[0]
        devices = 1 if mesh is None else mesh.size
        plans.append(describe(choice, names, leaves, (x1.shape[0], n2), trace_outputs=trace, devices=devices))
        return jnp.zeros(())

    eqx.filter_eval_shape(plan, w, x1, x2)
    return plans[0]


def _check_method(method: str) -> None:
    if method not in ("auto", "jacobian"):
        msg = f'method must be "auto" or "jacobian", got {method!r}.'
        raise ValueError(msg)


def kernel_matvec(f: Model, w: Params, x: Shaped[Array, "n ..."]) -> Callable[[Outputs], Outputs]:
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
    f: Model, w: Params, x: Shaped[Array, "n ..."], *, k: int | None = None, key: PRNGKeyArray | None = None
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
