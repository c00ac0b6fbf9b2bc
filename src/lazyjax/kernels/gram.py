r"""The tangent kernel $K(x, x') = D_w f(w, x)\, D_w f(w, x')^T$ on data: the Gram, its diagonal, its plan.

`gram` is the plain $JJ^T$; the kernel operator in the paper's metric is `gram / n` (see `lazyjax.losses`).
"""

from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jax.sharding import Mesh
from jaxtyping import Array, Float, Shaped

from lazyjax._core.checks import split_params
from lazyjax._core.types import Model, Outputs, Params
from lazyjax.kernels.plan import GramPlan, block_sizes, describe, sample_jacobian
from lazyjax.kernels.products import assemble, product
from lazyjax.kernels.sample_checks import check_rows, check_samples, check_slopes

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
    r"""Return the Gram matrix of the tangent kernel, $K_{ij} = D_w f(w, x_{1,i})\, D_w f(w, x_{2,j})^T$.

    It is exact at finite width. The Jacobian of a layer is a product of its inputs and its cotangents, and so is
    the layer's part of the Gram: for a dense layer $z = xW$ it is $(x \cdot x')(\Delta_k \cdot \Delta'_{k'})$, so
    no Jacobian is formed. The program of f is read for such places: dense and batched products, convolutions,
    biases, look-ups of rows, also if one parameter is used several times. Each parameter is contracted in the
    cheapest of the ways open to it (`gram_plan` prints them); a parameter with any other use is taken by its
    Jacobian rows. Only one triangle is computed if x2 is None, and memory is bounded by the result and blocks of a
    size chosen to fit.

    Sums are accumulated in the dtype of the outputs (on accelerators too: no tensor-float), so float32 entries are
    right to about 1e-6 of the largest.

    Args:
        f: Model f(w, x) with outputs (n,) or (n, k). Row i of its outputs must depend on row i of x only; this is
            checked on the first two samples, except inside a jit.
        w: Parameters, any pytree; the floating arrays are the coordinates.
        x1: Inputs, samples along the first axis.
        x2: Other inputs; None for x1.
        method: "auto": each parameter by its cheapest contraction. "jacobian": the rows of all of them, blockwise.
        trace: Sum over the outputs, $\sum_k K_{ik,jk}$: an (n1, n2) Gram for any k, at a fraction of the cost.
        mesh: Devices to share the block rows out over; the result is sharded by its rows. None: one device.

    Returns:
        (n1, n2) for outputs (n,) or with `trace`; (n1, k, n2, k) for outputs (n, k). The plain $JJ^T$, without 1/n.

    Raises:
        ValueError: empty or non-finite inputs, x1 and x2 of different sample shapes, outputs of another shape,
            a model that mixes samples (as batch normalization does) or has no derivative at one, or an unknown method.

    Source:
        Chizat, Oyallon, Bach (2019), equation (7).

    Example:
        >>> x = jnp.array([[1.0, 0.0], [1.0, 1.0]])
        >>> print(gram(lambda w, x: x @ w, jnp.zeros(2), x))
        [[1. 1.]
         [1. 2.]]
    """
    _check_method(method)
    split_params(w, "w")
    check_samples(f, w, x1, x2)
    return check_slopes(_gram(f, w, x1, x2, method, trace, mesh), "x1" if x2 is None else "x1 or x2")


@eqx.filter_jit
def _gram(f: Model, w: Params, x1: Array, x2: Array | None, method: Method, trace: bool, mesh: Mesh | None) -> Array:
    if x2 is not None:
        dtype = jnp.promote_types(x1.dtype, x2.dtype)
        x1, x2 = x1.astype(dtype), x2.astype(dtype)
    check_rows(f, w, x1)
    jacobian = sample_jacobian(f, w, x1, method=method, trace_outputs=trace)
    n1, n2, k = x1.shape[0], (x1 if x2 is None else x2).shape[0], 1 if trace else jacobian.num_outputs
    sizes = block_sizes(
        jacobian.sample_bytes,
        n1 * n2 * k * k * jnp.dtype(jacobian.dtype).itemsize,
        n1,
        None if x2 is None else n2,
        1 if mesh is None else mesh.size,
    )
    # As in `sample_jacobian`: rules of derivatives are traced here.
    with jax.default_matmul_precision("highest"):
        full = assemble(jacobian.rows, x1, x2, sizes, jacobian.dtype, mesh)
    return full if trace or not jacobian.has_axis else full.reshape(n1, k, n2, k)


def gram_diagonal(f: Model, w: Params, x: Shaped[Array, "n ..."], *, method: Method = "auto") -> Outputs:
    r"""Return the diagonal of `gram`, $\|D_w f_k(w, x_i)\|^2$, without the rest of it.

    Args:
        f: Model f(w, x) with outputs (n,) or (n, k), row i a function of row i of x only.
        w: Parameters, any pytree.
        x: Inputs, samples along the first axis.
        method: As in `gram`.

    Returns:
        (n,) or (n, k), like the outputs.

    Raises:
        ValueError: as `gram`.

    Example:
        >>> x = jnp.array([[1.0, 0.0], [1.0, 1.0]])
        >>> print(gram_diagonal(lambda w, x: x @ w, jnp.zeros(2), x))
        [1. 2.]
    """
    _check_method(method)
    split_params(w, "w")
    check_samples(f, w, x, None)
    return check_slopes(_diagonal(f, w, x, method), "x")


@eqx.filter_jit
def _diagonal(f: Model, w: Params, x: Array, method: Method) -> Array:
    check_rows(f, w, x)
    jacobian = sample_jacobian(f, w, x, method=method, count=1)

    def one(sample: Array) -> Array:
        rows = jacobian.rows(sample[None])
        return jnp.diagonal(product(rows, rows, jacobian.dtype))

    k, itemsize = jacobian.num_outputs, jnp.dtype(jacobian.dtype).itemsize
    size, _ = block_sizes(jacobian.sample_bytes + 4 * k * k * itemsize, 0, x.shape[0], None)
    with jax.default_matmul_precision("highest"):
        values = jax.lax.map(one, x, batch_size=size)
    return values if jacobian.has_axis else values[:, 0]


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
    r"""Plan what `gram` would do with the same arguments, and the memory it would take, without doing it.

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
        `GramPlan`: the contraction of each parameter, operations, block sizes, bytes. Print it.

    Raises:
        ValueError: the shapes do not fit, or an unknown method.

    Example:
        >>> from lazyjax.models import mlp
        >>> import jax.random as jr
        >>> print(gram_plan(mlp(), mlp().init(jr.key(0), [3, 8, 2]), jnp.ones((5, 3))))
        parameters              rule          contraction...
    """
    _check_method(method)
    plans = []

    def plan(w: Params, x1: Array, x2: Array | None) -> Array:
        coordinates, _ = split_params(w, "w")
        check_samples(f, w, x1, x2)
        check_rows(f, w, x1)
        jacobian = sample_jacobian(f, w, x1, method=method, trace_outputs=trace)
        names = [jtu.keystr(path) or "w" for path, _ in jtu.tree_leaves_with_path(coordinates)]
        counts = (x1.shape[0], None if x2 is None else x2.shape[0])
        plans.append(describe(jacobian, names, counts, devices=1 if mesh is None else mesh.size))
        return jnp.zeros(())

    eqx.filter_eval_shape(plan, w, x1, x2)
    return plans[0]


def _check_method(method: str) -> None:
    if method not in ("auto", "jacobian"):
        msg = f'method must be "auto" or "jacobian", got {method!r}.'
        raise ValueError(msg)
