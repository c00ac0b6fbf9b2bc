r"""What the eigenvalues of a kernel say, numbers in and numbers out: condition, effective rank, Figure 7(b).

**Zero must be zero.** In place of an eigenvalue 0 (duplicated inputs, fewer parameters than outputs) rounding leaves
some number of either sign, about eps times the largest one. So what lies below a cut is taken for an exact zero, and
the cut is one for all who ask: $\sqrt m\,\epsilon\,\lambda_1$ for m eigenvalues.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num

from lazyjax._core.checks import check_finite

Eigenvalues = Num[Array, " m"] | Num[np.ndarray, " m"]
"""In any order; of the plain Gram or in F's metric, for nothing here depends on their scale."""


def without_rounding(eigenvalues: Float[Array, " m"], rtol: float | None = None) -> Float[Array, " m"]:
    r"""The eigenvalues with an exact 0 for those not above rtol times the largest; None for $\sqrt m\,\epsilon$."""
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
    r"""$\lambda_1 / \lambda_r$, the largest eigenvalue over the smallest that is not zero.

    Time to train a tangent model to the end, over the time in which its first mode is learned; and the loss of digits
    of what is predicted from the kernel at t = inf.

    Args:
        eigenvalues: Of a positive semi-definite matrix, (m,), in any order.
        rtol: Those not above this share of the largest count as zero; None for $\sqrt m\,\epsilon$ of their dtype.
            So the condition number is at most 1/rtol.

    Returns:
        A number at least 1; 0 if all eigenvalues are zero.

    Raises:
        ValueError, TypeError: eigenvalues empty, not finite, not a real vector; rtol outside [0, 1).

    Source:
        Chizat, Oyallon, Bach (2019), supplement C.3.

    Example:
        >>> print(condition_number(jnp.array([4.0, 1.0, 0.0])))
        4.0
    """
    check_rtol(rtol)
    return condition_of(without_rounding(_check_eigenvalues(eigenvalues), rtol))


def condition_of(values: Float[Array, " m"]) -> Float[Array, ""]:
    """As `condition_number`, of eigenvalues whose zeros are exact."""
    return jnp.max(values) / jnp.min(jnp.where(values > 0, values, jnp.inf))


def effective_rank(eigenvalues: Eigenvalues) -> Float[Array, ""]:
    r"""$\exp H(p)$ with $H(p) = -\sum_i p_i \log p_i$, $p_i = \lambda_i / \sum_j \lambda_j$: how many modes there are.

    Two other numbers go by the name and lie below this one (they are exponentials of higher Rényi entropies):
    $\mathrm{tr}(K)^2/\mathrm{tr}(K^2)$, the participation ratio, and $\mathrm{tr}(K)/\lambda_1$.

    Args:
        eigenvalues: Of a positive semi-definite matrix, (m,), in any order; negative ones, which rounding made, count
            as zero.

    Returns:
        A number from 1 (one mode) to m (all equal); 0 if all eigenvalues are zero.

    Raises:
        ValueError, TypeError: eigenvalues empty, not finite, not a real vector.

    Source:
        Roy, Vetterli, The effective rank: a measure of effective dimensionality, EUSIPCO (2007), definition 1.

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
    r"""The curve of Figure 7(b): $\lambda_i/\lambda_1$ over $i/(nk)$, falling; to be drawn log-log.

    On these axes the spectra of data sets and models of any size and scale can be compared.

    Args:
        eigenvalues: (m,), in any order: all nk of them, or the m largest.
        size: nk, the number of all eigenvalues, where only the largest are given; None for m.

    Returns:
        (fraction, value), each (m,): $i/(nk)$ for i = 1..m, and $\lambda_i/\lambda_1$, with an exact 0 for what is only
        rounding (not above $\sqrt m\,\epsilon$).

    Raises:
        ValueError, TypeError: eigenvalues empty, not finite, not a real vector; size below m.

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
