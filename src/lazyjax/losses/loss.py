r"""Losses R on the outputs: what a loss computes, and what it says of itself.

**The metric of F.** With `mean=True` (the paper's) $\langle f, g\rangle_F = \frac1n \sum_i f_i \cdot g_i$, with
`mean=False` it is Euclidean (the lecture notes'). In both, the square loss is exactly
$\frac12\|y - y^*\|_F^2$. `weight` is the factor in front of the sum, 1/n or 1. Gradients and Hessians here are
those of F (Riesz), so they do not carry the weight: `jax.grad(loss)(y) == loss.weight * loss.gradient(y)`.

**A new loss** is one subclass of `Loss` in one file, with its factory next to it (`square.py` is the shortest), or
`function_loss` of a function, without a class.

Source: Chizat, Oyallon, Bach (2019), section 2.1 and theorem 2.3, section 3.2 (cross-entropy in Figure 3b).
"""

import abc
import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lazyjax._core.checks import check_finite, check_fits
from lazyjax._core.forward import hessian, jvp
from lazyjax._core.types import Outputs
from lazyjax.losses.hessian_root import DenseRoot, HessianRoot


class Loss(eqx.Module):
    r"""A function R of the outputs, (n,) or (n, k) to a number, that knows its derivatives and its constants.

    A subclass gives `__call__` and the attributes below, as fields or as properties. What it does not override
    is derived from `__call__` by JAX: `gradient`, `hvp`, and `root` by a dense eigendecomposition of the Hessian
    (fit for up to a few thousand outputs).

    Attributes:
        weight: The factor c of the metric $\langle f, g\rangle_F = c \sum_i f_i \cdot g_i$: 1/n or 1.
        smoothness: M, a Lipschitz constant of the gradient in F; None if there is none, or it is not known.
        minimizer: Where R is least, of the outputs' shape; None if it is not known or lies at infinity.
        hessian_fades: Whether the Hessian tends to zero as the outputs fit better, as that of cross-entropies does.
            A flow of such a loss becomes less stiff on its way, which the choice of a solver counts on.

    Example:
        >>> class Quartic(Loss):
        ...     minimizer: Array
        ...     weight: float = 1.0
        ...     smoothness: float | None = None
        ...     hessian_fades: bool = True
        ...
        ...     def __call__(self, y):
        ...         return jnp.sum((y - self.minimizer) ** 4)
        >>> loss = Quartic(jnp.zeros(2))
        >>> print(loss.gradient(jnp.array([1.0, 2.0])))
        [ 4. 32.]
    """

    weight: eqx.AbstractVar[float]
    smoothness: eqx.AbstractVar[float | None]
    minimizer: eqx.AbstractVar[Any]
    hessian_fades: eqx.AbstractVar[bool]

    @abc.abstractmethod
    def __call__(self, y: Outputs) -> Float[Array, ""]:
        """Return R(y)."""

    def gradient(self, y: Outputs) -> Outputs:
        """Return the F-gradient of R at y, of y's shape."""
        return jax.grad(self.__call__)(y) / jnp.asarray(self.weight, y.dtype)

    def hvp(self, y: Outputs, v: Outputs) -> Outputs:
        """Return the F-Hessian of R at y times v."""
        return jvp(self.gradient, (y,), (v,))[1]

    def root(self, y: Outputs) -> HessianRoot:
        r"""Return S with $\nabla^2 R(y) = SS^T$, the plain Hessian: `weight` times that of F.

        The default is the root of the positive part of the dense Hessian.
        """
        return DenseRoot.of(hessian(lambda v: self(v.reshape(y.shape)), y.ravel()))

    def strong_convexity(self, radius: float = math.inf) -> float | None:
        r"""Return m with $\nabla^2 R \ge m$ in F on all outputs $|y| \le r$ entry by entry; None if it is not known.

        The bound 0 says that R is convex, but not strongly.
        """
        del radius
        return None

    def cotangent(self, y: Outputs) -> Outputs:
        """Return the plain derivative of R at y, `weight * gradient(y)`: what a vjp of the model takes."""
        return jnp.asarray(self.weight, y.dtype) * self.gradient(y)

    def norm(self, y: Outputs) -> Float[Array, ""]:
        """Return the norm of F, NaN if an output is; its derivative at zero is taken to be zero."""
        s = jnp.sum(y**2)
        return jnp.sqrt(jnp.asarray(self.weight, y.dtype)) * jnp.where(s == 0, 0, jnp.sqrt(jnp.where(s == 0, 1, s)))

    def check(self, shape: tuple[int, ...]) -> None:
        """Check that outputs of this shape fit: by default, that R is one real number, and the minimizer of this shape.

        Raises:
            ValueError: they do not fit.
        """
        if self.minimizer is not None:
            check_shape(shape, self.minimizer.shape, "minimizer")
        out = eqx.filter_eval_shape(self.__call__, jax.ShapeDtypeStruct(shape, jnp.result_type(float)))
        if getattr(out, "shape", None) != () or not jnp.issubdtype(out.dtype, jnp.floating):
            msg = f"loss must map outputs of shape {shape} to one real number, got {out}."
            raise ValueError(msg)


class FunctionLoss(Loss):
    """A function of the outputs as a loss, with derivatives by JAX; made by `function_loss`."""

    function: Callable[[Outputs], Any]
    minimizer: Outputs | None
    weight: float = eqx.field(static=True)
    smoothness: float | None = eqx.field(static=True)
    convexity: float | None = eqx.field(static=True)
    hessian_fades: bool = eqx.field(static=True)

    def __call__(self, y: Outputs) -> Any:  # `check` says what it must be
        """Return R(y)."""
        return self.function(y)

    def strong_convexity(self, radius: float = math.inf) -> float | None:
        """Return the m that was declared."""
        del radius
        return self.convexity


def function_loss(
    function: Callable[[Outputs], Any],
    *,
    weight: float = 1.0,
    smoothness: float | None = None,
    strong_convexity: float | None = None,
    minimizer: Outputs | None = None,
    hessian_fades: bool = False,
) -> FunctionLoss:
    r"""Return any function R of the outputs as a loss, with what is known of it.

    Wherever a loss is asked for, the bare function does too: it becomes this loss with nothing declared. The more is
    declared, the more theorems `certify` can apply, and the better a solver is chosen.

    Args:
        function: R, a differentiable function of the outputs (n,) or (n, k) to a number; its data inside.
        weight: The factor c of the metric $\langle f, g\rangle_F = c \sum_i f_i \cdot g_i$ in which M and m are
            declared: 1/n for a mean over n samples. R itself is not multiplied by it.
        smoothness: M, a Lipschitz constant of the gradient in F; None if it is not known.
        strong_convexity: m, at most M: the Hessian is at least m in F everywhere; 0 if R is convex, but not strongly,
            None if it is not known.
        minimizer: Where R is least, of the outputs' shape; None if it is not known or lies at infinity.
        hessian_fades: Whether the Hessian tends to zero as the outputs fit better, as that of cross-entropies does.

    Raises:
        ValueError: a constant out of its range, m above M, or a minimizer that is not finite.

    Example:
        >>> target = jnp.array([1.0, 2.0])
        >>> loss = function_loss(lambda y: jnp.sum(jnp.cosh(y - target) - 1), strong_convexity=1.0, minimizer=target)
        >>> loss.strong_convexity(), loss.smoothness
        (1.0, None)
        >>> print(loss.gradient(target))
        [0. 0.]
    """
    for name, value in (("weight", weight), ("smoothness", smoothness)):
        if value is not None and not 0 < value < math.inf:
            msg = f"{name} must be a positive finite number, got {value}."
            raise ValueError(msg)
    if strong_convexity is not None and not 0 <= strong_convexity <= (smoothness or math.inf):
        most = "" if smoothness is None else f", and at most smoothness = {smoothness}"
        msg = f"strong_convexity must be at least 0{most}, got {strong_convexity}; use None if it is not known."
        raise ValueError(msg)
    if minimizer is not None:
        check_fits(minimizer, "minimizer")
        minimizer = jnp.asarray(minimizer)
        check_data(minimizer, "minimizer")
    return FunctionLoss(
        function=function,
        minimizer=minimizer,
        weight=weight,
        smoothness=smoothness,
        convexity=strong_convexity,
        hessian_fades=hessian_fades,
    )


def as_loss(loss: Any) -> Loss:
    """Return a loss as it is, and any other callable on outputs as the `function_loss` of it.

    Raises:
        TypeError: not callable (most often a bare target array).
    """
    if isinstance(loss, Loss):
        return loss
    if not callable(loss):
        msg = f"loss must be a function of the outputs, got {type(loss).__name__}; use lazyjax.square_loss(target)."
        raise TypeError(msg)
    return function_loss(loss)


def check_shape(shape: tuple[int, ...], expected: tuple[int, ...], what: str) -> None:
    """Check that outputs have the shape of what they are compared with."""
    if shape != expected:
        msg = (
            f"outputs and {what} must have the same shape, got outputs {shape} and {what} {expected}; "
            "reshape one of them (one-hot vectors for classes, no trailing axis of length 1 for scalars)."
        )
        raise ValueError(msg)


def check_data(data: Array, name: str, ndims: tuple[int, ...] = (1, 2)) -> None:
    """Check that targets or labels are finite, not empty, and have one of the numbers of axes."""
    if data.ndim not in ndims or data.size == 0:
        shapes = " or ".join({1: "(n,)", 2: "(n, k)"}[ndim] for ndim in ndims)
        msg = f"{name} must be a non-empty array of shape {shapes}, got shape {data.shape}."
        raise ValueError(msg)
    check_finite(data, name)
