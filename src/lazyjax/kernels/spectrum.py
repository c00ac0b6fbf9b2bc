r"""Eigenvalues of the tangent kernel, and what they say: condition, effective rank, Figure 7(b).

**Zero must be zero.** In place of an eigenvalue 0 (duplicated inputs, fewer parameters than outputs) rounding leaves
some number of either sign, about eps times the largest one. So what lies below a cut is taken for an exact zero, and
the cut is the same everywhere: $\sqrt m\,\epsilon\,\lambda_1$ for m eigenvalues.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num, PRNGKeyArray, Shaped

from lazyjax._core.checks import check_finite, check_outputs, split_params
from lazyjax._core.forward import products
from lazyjax._core.lanczos import top_eigenvalues
from lazyjax._core.types import Model, Outputs, Params
from lazyjax.kernels.gram import gram
from lazyjax.models.tangent import match_outputs

DENSE_SIZE = 4096
"""Outputs up to which `spectrum` takes its leading eigenvalues from the dense Gram."""

Eigenvalues = Num[Array, " m"] | Num[np.ndarray, " m"]
"""Eigenvalues in any order, of the plain Gram or in F's metric: nothing here depends on their scale."""


def kernel_matvec(f: Model, w: Params, x: Shaped[Array, "n ..."]) -> Callable[[Outputs], Outputs]:
    r"""Return the product $r \mapsto Dh\, Dh^T r$ with the plain Gram of `x`, matrix-free.

    Args:
        f: Model f(w, x) with outputs (n,) or (n, k); it may mix samples.
        w: Parameters.
        x: Inputs.

    Returns:
        A function of r (n,) or (n, k), of the outputs' shape: one jvp and one vjp per call; f is evaluated once, here.

    Raises:
        ValueError: empty or non-finite inputs, or outputs of another shape.

    Example:
        >>> x = jnp.array([[1.0, 0.0], [1.0, 1.0]])
        >>> print(kernel_matvec(lambda w, x: x @ w, jnp.zeros(2), x)(jnp.array([1.0, 1.0])))
        [2. 3.]
    """
    coordinates, rest = split_params(w, "w")
    check_finite(x, "x")
    out = check_outputs(f, w, x, name="f")
    _, derivative = products(lambda c: f(eqx.combine(c, rest), x), coordinates)
    return lambda r: derivative.push(derivative.transpose(match_outputs(r, out), coordinates))


def spectrum(
    f: Model, w: Params, x: Shaped[Array, "n ..."], *, k: int | None = None, key: PRNGKeyArray | None = None
) -> Float[Array, " m"]:
    r"""Return the eigenvalues of the plain Gram $JJ^T$ of `x`, largest first.

    Args:
        f: Model f(w, x).
        w: Parameters.
        x: Inputs (n, ...).
        k: None: all n*k_out of them, from the dense Gram. A number: the k largest, from the dense Gram up to 4096
            outputs, above that by matrix-free Lanczos until converged, repeated eigenvalues as often as they occur.
            Inside jit Lanczos is one run of 2k + 20 products: Ritz values from below, repeated ones missing.
        key: Random key of Lanczos' start vector; None for a fixed one.

    Returns:
        The eigenvalues (m,); rounding may leave values of either sign near zero.

    Raises:
        ValueError: k is not in 1..n*k_out; inputs as for `gram`.

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


def without_rounding(eigenvalues: Float[Array, " m"], rtol: float | None = None) -> Float[Array, " m"]:
    r"""Return the eigenvalues, those not above rtol (None: $\sqrt m\,\epsilon$) times the largest as exact zeros."""
    # The customary factor m instead of its root would cut modes that are learned within any horizon of interest: at
    # 2560 outputs in float32 all below 3e-4 of the largest.
    if rtol is None:
        rtol = eigenvalues.size**0.5 * float(jnp.finfo(eigenvalues.dtype).eps)
    cut = jnp.asarray(rtol, eigenvalues.dtype) * jnp.maximum(jnp.max(eigenvalues), 0)
    return jnp.where(eigenvalues > cut, eigenvalues, 0)


def check_rtol(rtol: float | None) -> None:
    """Refuse a relative cut outside [0, 1)."""
    if rtol is not None and not 0 <= rtol < 1:
        msg = (
            "rtol must be a share of the largest eigenvalue in [0, 1), below which one counts as zero, or None for "
            f"sqrt(m) times the rounding unit, got {rtol}."
        )
        raise ValueError(msg)


def condition_number(eigenvalues: Eigenvalues, *, rtol: float | None = None) -> Float[Array, ""]:
    r"""Return $\lambda_1 / \lambda_r$, the largest eigenvalue over the smallest that is not zero.

    It is the time to train a tangent model to the end over the time in which its first mode is learned, and the factor
    by which relative errors grow in what is predicted from the kernel at t = inf.

    Args:
        eigenvalues: Eigenvalues of a positive semi-definite matrix, (m,), in any order.
        rtol: Those not above this share of the largest count as zero; None for $\sqrt m\,\epsilon$ of their dtype.
            So the condition number is at most 1/rtol.

    Returns:
        A number at least 1; 0 if all eigenvalues are zero.

    Raises:
        ValueError, TypeError: eigenvalues that are not a real, finite vector with a number in it; rtol outside [0, 1).

    Source:
        Chizat, Oyallon, Bach (2019), supplement C.3.

    Example:
        >>> print(condition_number(jnp.array([4.0, 1.0, 0.0])))
        4.0
    """
    check_rtol(rtol)
    return condition_of(without_rounding(_check_eigenvalues(eigenvalues), rtol))


def condition_of(values: Float[Array, " m"]) -> Float[Array, ""]:
    """Return the condition number of eigenvalues whose zeros are exact."""
    return jnp.max(values) / jnp.min(jnp.where(values > 0, values, jnp.inf))


def effective_rank(eigenvalues: Eigenvalues) -> Float[Array, ""]:
    r"""Return the effective number of modes, $\exp H(p)$.

    $H(p) = -\sum_i p_i \log p_i$ is the entropy of $p_i = \lambda_i / \sum_j \lambda_j$. Two other numbers go by this
    name and lie below it (they are exponentials of higher Rényi entropies):
    $\mathrm{tr}(K)^2/\mathrm{tr}(K^2)$, the participation ratio, and $\mathrm{tr}(K)/\lambda_1$.

    Args:
        eigenvalues: Eigenvalues of a positive semi-definite matrix, (m,), in any order; negative ones, which rounding
            made, count as zero.

    Returns:
        A number from 1 (one mode) to m (all equal); 0 if all eigenvalues are zero.

    Raises:
        ValueError, TypeError: eigenvalues that are not a real, finite vector with a number in it.

    Source:
        Roy, Vetterli (2007), The effective rank: a measure of effective dimensionality, EUSIPCO, definition 1.

    Example:
        >>> print(f"{effective_rank(jnp.array([1.0, 1.0, 0.0])):.2f} {effective_rank(jnp.array([4.0, 1.0])):.2f}")
        2.00 1.65
    """
    values = jnp.maximum(_check_eigenvalues(eigenvalues), 0)
    total = jnp.sum(values)
    share = values / jnp.where(total == 0, 1, total)
    # Not `jax.scipy.special.entr`, whose slope at zero is infinite.
    entropy = -jnp.sum(share * jnp.log(jnp.where(share == 0, 1, share)))
    return jnp.where(total == 0, 0, jnp.exp(entropy))


def normalized_spectrum(
    eigenvalues: Eigenvalues, *, size: int | None = None
) -> tuple[Float[Array, " m"], Float[Array, " m"]]:
    r"""Return the curve of Figure 7(b): $\lambda_i/\lambda_1$ over $i/(nk)$, largest first; to be drawn log-log.

    On these axes the spectra of data sets and models of any size and scale can be compared.

    Args:
        eigenvalues: (m,), in any order: all nk of them, or the m largest.
        size: nk, the number of all eigenvalues, if only the largest are given; None for m.

    Returns:
        (fraction, value), each (m,): $i/(nk)$ for i = 1..m, and $\lambda_i/\lambda_1$, with an exact 0 for what is only
        rounding (not above $\sqrt m\,\epsilon$).

    Raises:
        ValueError, TypeError: eigenvalues that are not a real, finite vector with a number in it; size below m.

    Source:
        Chizat, Oyallon, Bach (2019), supplement C.3, Figure 7(b).

    Example:
        >>> fraction, value = normalized_spectrum(jnp.array([1.0, 4.0]))
        >>> print(fraction, value)
        [0.5 1. ] [1.   0.25]
    """
    values = _check_eigenvalues(eigenvalues)
    size = values.size if size is None else size
    if size < values.size:
        msg = f"size must be the number of all eigenvalues, at least the {values.size} that are given, got {size}."
        raise ValueError(msg)
    values = jnp.sort(without_rounding(values))[::-1]
    largest = jnp.where(values[0] > 0, values[0], 1)
    return jnp.arange(1, values.size + 1).astype(values.dtype) / size, values / largest


def _check_eigenvalues(eigenvalues: Any) -> Float[Array, " m"]:
    if jnp.iscomplexobj(eigenvalues):
        msg = (
            f"eigenvalues must be real, got {jnp.asarray(eigenvalues).dtype}; those of a symmetric matrix are: use "
            "jnp.linalg.eigvalsh or lazyjax.spectrum."
        )
        raise TypeError(msg)
    values = jnp.asarray(eigenvalues)
    if values.ndim != 1 or values.size == 0:
        msg = f"eigenvalues must be a vector of at least one number, got shape {values.shape}."
        raise ValueError(msg)
    check_finite(values, "eigenvalues")
    return values if jnp.issubdtype(values.dtype, jnp.floating) else values.astype(jnp.result_type(float))
