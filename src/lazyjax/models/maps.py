r"""Maps from model to model: `center`, `symmetrize`, `rescale`, `on_data`, each for h(w) or f(w, x).

**Zero must be zero.** The lazy limit needs $h(w_0) = 0$, and at $\alpha = 10^7$ a rounding residue of
$10^{-8}$ in $h(w_0)$ becomes 0.1 in $\alpha h(w_0)$. So a centered or symmetrized model *declares* that it
vanishes at $w_0$ (`declares_zero`), and the flows start from exact zeros. To keep the declaration when the
inputs are fixed, use `on_data(f, x)` instead of a lambda.
"""

import functools
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array

from lazyjax._core.checks import is_concrete, split_params
from lazyjax._core.types import Model, Params, RealScalar


class IdentityHashed(eqx.Module):
    """A model that holds arrays, hashed and compared by identity, as functions are.

    The hash of a module's arrays would fail, and with it `jax.jit(h)`, `jax.checkpoint(h)` and `jax.lax.cond(..., h)`.
    """

    def __hash__(self) -> int:
        """Return a hash of the object, not of its arrays."""
        return id(self)

    def __eq__(self, other: object) -> bool:
        """Return whether the other one is the very same object; `equinox.tree_equal` compares what they hold."""
        return self is other


class Centered(IdentityHashed):
    """The model $w, x... -> f(w, x...) - f(w_0, x...)$; made by `center`."""

    f: Model
    w0: Params

    def __call__(self, w: Params, *args: Any, **kwargs: Any) -> Array:
        """Return the outputs of f less those at w0."""
        return _gap(self.f, w, self.w0, *args, **kwargs)

    def declares_zero(self, w: Params) -> bool:
        """Return whether w is the w0 that the model was centered at."""
        return same_params(w, self.w0)

    @property
    def preactivations(self) -> Callable[..., list[Array]]:
        """The preactivations of f as a function of (w, x); AttributeError if f has none."""
        return self.f.preactivations  # pyright: ignore[reportFunctionMemberAccess]


def center(h: Model, w0: Params) -> Centered:
    r"""Return the centered model $w \mapsto h(w) - h(w_0)$: zero at w0, the same Dh.

    Args:
        h: Model h(w), or f(w, x).
        w0: Parameters at which the outputs vanish; start the flow from this very object.

    Returns:
        A model of the same arguments, which declares that it is exactly zero at w0.

    Source:
        Chizat, Oyallon, Bach (2019), section 3.2.

    Example:
        >>> h = center(lambda w: jnp.exp(w), jnp.ones(2))
        >>> print(h(jnp.ones(2)))
        [0. 0.]
    """
    split_params(w0)
    return Centered(h, w0)


class Symmetrized(eqx.Module):
    """The model $((w_a, w_b), x...) -> f(w_a, x...) - f(w_b, x...)$; made by `symmetrize`."""

    f: Model

    def __call__(self, w: tuple[Params, Params], *args: Any, **kwargs: Any) -> Array:
        """Return the outputs of f at the first half of the parameters less those at the second."""
        first, second = w
        return _gap(self.f, first, second, *args, **kwargs)

    def declares_zero(self, w: tuple[Params, Params]) -> bool:
        """Return whether the two halves of w are equal."""
        return same_params(*w)

    @property
    def preactivations(self) -> Callable[..., list[Array]]:
        """The preactivations of f at both halves as a function of (w, x); AttributeError if f has none."""
        inner = self.f.preactivations  # pyright: ignore[reportFunctionMemberAccess]
        return lambda w, *args: [z for half in w for z in inner(half, *args)]


def symmetrize(f: Model, w0: Params) -> tuple[Symmetrized, tuple[Params, Params]]:
    r"""Return the doubled model $f_2(w_a, w_b) = f(w_a) - f(w_b)$ and its start $(w_0, w_0)$.

    The output at the start is exactly zero, the tangent kernel twice that of f. The two halves change by the same
    second-order term, which cancels in their difference; the first-order correction stays in the kernel of Dh.
    So $\sup\|y - \bar y\| = O(1/\alpha^2)$ instead of $O(1/\alpha)$.

    Args:
        f: Model f(w, x) or h(w).
        w0: Its parameters.

    Returns:
        (f2, w2): f2(w2, x...) of the doubled parameters w2 = (w0, w0).

    Source:
        Chizat, Oyallon, Bach (2019), section 3.1; the 1/alpha^2 is ours.

    Example:
        >>> f2, w2 = symmetrize(lambda w: jnp.exp(w), jnp.ones(2))
        >>> print(f2(w2))
        [0. 0.]
    """
    split_params(w0)
    return Symmetrized(f), (w0, w0)


class Rescaled(IdentityHashed):
    """The model $w, x... -> c f(w, x...)$; made by `rescale`."""

    f: Model
    factor: Array

    def __call__(self, w: Params, *args: Any, **kwargs: Any) -> Array:
        """Return the outputs of f times the factor."""
        out = self.f(w, *args, **kwargs)
        return self.factor.astype(out.dtype) * out

    def declares_zero(self, w: Params) -> bool:
        """Return whether f declares that its outputs at w are zero."""
        return declares_zero(self.f, w)

    @property
    def preactivations(self) -> Callable[..., list[Array]]:
        """The preactivations of f as a function of (w, x); AttributeError if f has none."""
        return self.f.preactivations  # pyright: ignore[reportFunctionMemberAccess]


def rescale(h: Model, factor: RealScalar) -> Rescaled:
    r"""Return the model $w \mapsto c\,h(w)$, declared zero wherever h is.

    To follow the flow at output scale alpha, prefer `gradient_flow(h, ..., alpha=alpha)`, which keeps every
    digit at any alpha; `rescale` is the plain product.

    Args:
        h: Model h(w), or f(w, x).
        factor: The number c; it may be traced.

    Returns:
        A model of the same arguments.

    Raises:
        ValueError: the factor is not a finite number.

    Example:
        >>> print(rescale(lambda w: w, 3.0)(jnp.ones(2)))
        [3. 3.]
    """
    value = jnp.asarray(factor, jnp.result_type(float))
    if value.shape != () or (is_concrete(value) and not np.isfinite(value)):
        msg = f"factor must be a finite number, got {factor}."
        raise ValueError(msg)
    return Rescaled(h, value)


class OnData(IdentityHashed):
    """The model $w -> f(w, x)$, which holds its inputs; made by `on_data`."""

    f: Model
    x: Any

    def __call__(self, w: Params) -> Array:
        """Return the outputs of f at the inputs."""
        return self.f(w, self.x)

    def declares_zero(self, w: Params) -> bool:
        """Return whether f declares that its outputs at w are zero."""
        return declares_zero(self.f, w)


def on_data(f: Model, x: Any) -> OnData:
    r"""Return the model $h(w) = f(w, x)$ of fixed inputs x.

    Use it instead of `lambda w: f(w, x)`: the inputs are arguments of the compiled programs, so that new data of the
    same shape compile nothing new, and `gram`, `kappa` and others see that each sample has an output of its own. What
    f declares (a zero output after `center` or `symmetrize`) stays declared.

    Args:
        f: Model f(w, x) with outputs (n,) or (n, k).
        x: Inputs, samples first.

    Returns:
        A model h(w).

    Raises:
        TypeError: f is not callable.

    Example:
        >>> h = on_data(lambda w, x: x @ w, jnp.eye(2))
        >>> print(h(jnp.ones(2)))
        [1. 1.]
    """
    if not callable(f):
        msg = f"f must be a model f(w, x), got {type(f).__name__}; the order is on_data(f, x)."
        raise TypeError(msg)
    return OnData(f, x)


def without_constant(h: Model) -> Model:
    """Return a centered model's own f, which changes as the model does and costs half; any other model as it is."""
    if isinstance(h, Centered):
        return h.f
    if isinstance(h, OnData) and isinstance(h.f, Centered):
        return OnData(h.f.f, h.x)
    return h


def declares_zero(h: Model, w: Params) -> bool:
    """Return whether h declares that its outputs at w are exactly zero (looking through `functools.partial`)."""
    # A positional argument would take the place of the parameters: what is then left to give is something else.
    while isinstance(h, functools.partial) and not h.args:
        h = h.func
    check = getattr(h, "declares_zero", None)
    return check is not None and check(w)


def same_params(first: Params, second: Params) -> bool:
    """Return whether two trees hold the same: the very same leaves, or equal ones whose values are known."""
    if jtu.tree_structure(first) != jtu.tree_structure(second):
        return False
    return all(_same_leaf(x, y) for x, y in zip(jtu.tree_leaves(first), jtu.tree_leaves(second), strict=True))


def _same_leaf(x: Any, y: Any) -> bool:
    if x is y:
        return True
    if not (eqx.is_array(x) and eqx.is_array(y)):
        return not eqx.is_array(x) and not eqx.is_array(y) and type(x) is type(y) and bool(x == y)
    if x.shape != y.shape or x.dtype != y.dtype or not is_concrete((x, y)):
        return False
    # Random keys compare too, but are no NumPy arrays.
    return bool(np.all(np.asarray(x == y))) if jnp.issubdtype(x.dtype, jax.dtypes.extended) else np.array_equal(x, y)


def _gap(f: Model, first: Params, second: Params, *args: Any, **kwargs: Any) -> Array:
    """Return f(first, ...) - f(second, ...), exactly zero if the two are equal, compiled or not.

    Left alone, a compiler breaks that in two ways. It evaluates the half whose parameters are constants
    beforehand, by other code: the barriers prevent that (except for an elementwise start of f, which it folds after it
    has dropped them). And it contracts a product that ends f with the subtraction, so that one half is rounded and
    the other is not: a selection cannot be contracted.
    """

    def half(w: Params) -> Array:
        coordinates, rest = eqx.partition(w, eqx.is_inexact_array)
        out = f(eqx.combine(jax.lax.optimization_barrier(coordinates), rest), *args, **kwargs)
        return jnp.where(jnp.isfinite(out), out, jnp.nan)

    return half(first) - half(second)
