r"""The start of a flow: its outputs $\alpha h(w_0)$, and what is checked there before any step is taken."""

import contextlib
import warnings
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Float

from lazyjax._core.checks import check_alpha, check_fits, check_outputs, is_concrete, split_params
from lazyjax._core.forward import gap_of_products, jvp, warn_if_apart
from lazyjax._core.types import Model, Outputs, Params, RealScalar
from lazyjax.difference.finite_jvp import check_difference
from lazyjax.losses.loss import Loss
from lazyjax.models.maps import declares_zero
from lazyjax.models.tangent import Tangent, linearize

INFINITE_START = (
    "alpha=inf needs a model with h(w0) = 0, since alpha h(w0) grows without bound; "
    "use lazyjax.center(h, w0) or lazyjax.symmetrize(f, w0)."
)


def scaled_start(
    initial: Outputs, alpha: RealScalar, *, zero_start: bool, throw: bool
) -> tuple[Outputs, Float[Array, ""]]:
    r"""Return $\alpha h(w_0)$, exactly zero if that is declared, and $\varepsilon = 1/\alpha$.

    At an infinite alpha a nonzero output raises at run time; with `throw` False its entry is infinite instead.
    """
    alpha = jnp.asarray(alpha, initial.dtype)
    if zero_start:
        return jnp.zeros_like(initial), 1 / alpha
    nonzero = initial != 0
    if throw:
        initial = eqx.error_if(initial, jnp.isinf(alpha) & jnp.any(nonzero), INFINITE_START)
    # The guard keeps alpha = inf exact (and its derivatives finite) where the output is zero; at a finite alpha the
    # derivative by w0 must pass through an output that is zero.
    finite = jnp.isfinite(alpha)
    to_infinity = jnp.where(nonzero, jnp.inf * jnp.sign(initial), 0)
    return jnp.where(finite, jnp.where(finite, alpha, 0) * initial, to_infinity), 1 / alpha


def as_argument(h: Model) -> tuple[Model, Params | None]:
    """Return a model as an argument of a compiled program: a `Tangent` as its h and w0, to be linearized inside.

    The residuals of a linearization made outside belong to one program only.
    """
    return (h.h, h.w0) if isinstance(h, Tangent) else (h, None)


def as_model(argument: tuple[Model, Params | None]) -> Model:
    """Return the model that `as_argument` took apart."""
    h, anchor = argument
    return h if anchor is None else linearize(h, anchor)


def as_scalar(value: RealScalar) -> Float[Array, ""]:
    """Return a number as an array, so that another one is another argument of the same compiled program."""
    # By NumPy, so that not even the conversion is a program.
    return jnp.asarray(np.asarray(value, jnp.result_type(float)) if is_concrete(value) else value, float)


def check_start(h: Model, loss: Loss, w0: Params, alpha: RealScalar, rtol: float) -> bool:
    """Check that a flow can start at w0, at the price of one gradient; return whether h declares a zero there.

    Raises:
        TypeError, ValueError: alpha not a scale in (0, inf]; parameters or outputs unfit; outputs and targets of
            different shapes; h(w0) or its gradient not finite; alpha infinite with h(w0) not zero.

    Warns:
        UserWarning: h(w0) is a rounding residue, yet alpha h(w0) is above the tolerance; or h has a `jax.custom_vjp`
            rule that is not the derivative of its program.
    """
    check_alpha(alpha)
    split_params(w0)
    if isinstance(h, Tangent) and jtu.tree_structure(h.w0) != jtu.tree_structure(w0):
        msg = "w0 must have the structure of the parameters that h was linearized at."
        raise ValueError(msg)
    out = check_outputs(h, w0)
    if is_concrete(alpha):  # else 1e39 would be the tangent model's inf in single precision
        check_fits(np.asarray(alpha), "alpha", out.dtype, tiny=False)
    loss.check(out.shape)
    zero = declares_zero(h, w0)
    if is_concrete((eqx.filter(h, eqx.is_array), eqx.filter(loss, eqx.is_array), w0)):
        initial, cotangent, gradient, rounding, residual, gap = values_of(_measure_start, as_argument(h), loss, w0)
        _check_finite(initial, cotangent, gradient)
        warn_if_apart(gap, stacklevel=4)
        if not zero and is_concrete(alpha):
            _check_zero(initial, float(alpha), float(rounding), rtol * float(residual))
    else:
        _check_difference(h, w0)
    return zero


def values_of(function: Callable[..., Any], *args: Any) -> Any:
    """Return the values of a compiled function of known arguments as NumPy arrays, even inside a user's jit."""
    traced = not is_concrete(jnp.asarray(np.zeros((), np.float32)))
    with jax.ensure_compile_time_eval() if traced else contextlib.nullcontext():
        return jtu.tree_map(np.asarray, function(*args))


@eqx.filter_jit
def _measure_start(
    argument: tuple[Model, Params | None], loss: Loss, w0: Params
) -> tuple[Outputs, Outputs, Params, Array, Array, Array]:
    """Return h(w0), the gradients there by outputs and by parameters, and three numbers.

    They are the rounding error to expect of h(w0), the largest entry of grad R at zero, and by how much the forward and
    the backward product with Dh(w0) differ.
    """
    h = as_model(argument)
    _check_difference(h, w0)  # here it is traced once, and not at every call
    coordinates, rest = eqx.partition(w0, eqx.is_inexact_array)
    if isinstance(h, Tangent):
        initial = h(w0)
        cotangent = loss.cotangent(initial)
        gradient = h.vjp(cotangent)
    else:
        initial, vjp = jax.vjp(lambda w: h(eqx.combine(w, rest)), coordinates)
        cotangent = loss.cotangent(initial)
        (gradient,) = vjp(cotangent)
    # A relative perturbation of every parameter by eps moves h by about eps times this random jvp.
    leaves, tree = jtu.tree_flatten(coordinates)
    ends = np.cumsum([leaf.size for leaf in leaves])
    # One draw for all leaves: compilers take long over the bits of each.
    parts = jnp.split(jr.rademacher(jr.key(0), (ends[-1],), jnp.int8), ends[:-1])
    signs = [leaf * part.reshape(leaf.shape).astype(leaf.dtype) for leaf, part in zip(leaves, parts, strict=True)]
    direction = tree.unflatten(signs)
    sensitivity = jvp(lambda w: h(eqx.combine(w, rest)), (coordinates,), (direction,))[1]
    rounding = jnp.finfo(initial.dtype).eps * jnp.max(jnp.abs(sensitivity))
    gap = gap_of_products(cotangent, sensitivity, gradient, direction)
    return initial, cotangent, gradient, rounding, jnp.max(jnp.abs(loss.gradient(jnp.zeros_like(initial)))), gap


def _check_difference(h: Model, w0: Params) -> None:
    if not isinstance(h, Tangent):
        check_difference(h, w0)


def _check_finite(initial: np.ndarray, cotangent: np.ndarray, gradient: Any) -> None:
    bad = int(np.sum(~np.isfinite(initial)))
    if bad:
        msg = f"h(w0) must be finite, but {bad} of its {initial.size} entries are not; check the model and its data."
        raise ValueError(msg)
    bad = int(np.sum(~np.isfinite(cotangent)))
    if bad:
        msg = (
            f"loss must be differentiable at the outputs h(w0), but {bad} of the {cotangent.size} entries of its "
            "gradient are NaN or infinite; make it finite there (a logarithm or a root at 0?), or start elsewhere."
        )
        raise ValueError(msg)
    for path, leaf in jtu.tree_leaves_with_path(gradient):
        bad = int(np.sum(~np.isfinite(leaf)))
        if bad:
            msg = (
                f"h must be differentiable at w0, but {bad} of {leaf.size} entries of the gradient in "
                f"w0{jtu.keystr(path)} are NaN or infinite; move w0 off the singular point (sqrt or a norm at 0?)."
            )
            raise ValueError(msg)


def _check_zero(initial: np.ndarray, alpha: float, rounding: float, tolerance: float) -> None:
    """Refuse a nonzero start at alpha = inf; warn of a rounding residue that alpha makes larger than the tolerance."""
    largest = float(np.max(np.abs(initial)))
    if np.isinf(alpha) and largest > 0:
        msg = f"{INFINITE_START} Got max |h(w0)| = {largest:.1e}."
        raise ValueError(msg)
    if 0 < largest <= 100 * rounding and alpha * largest > tolerance:
        warnings.warn(
            f"h(w0) is a rounding residue (max {largest:.1e}), but alpha={alpha:g} makes it {alpha * largest:.1e}; "
            "if it should be zero, use lazyjax.center(h, w0), which starts the flow from exact zeros.",
            stacklevel=4,
        )
