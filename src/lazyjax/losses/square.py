"""The square loss."""

import math

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from lazyjax._core.checks import check_fits
from lazyjax._core.types import Outputs
from lazyjax.losses.hessian_root import DiagonalRoot, HessianRoot
from lazyjax.losses.loss import Loss, check_data, check_shape


class SquareLoss(Loss):
    r"""The square loss $\frac12\|y - y^*\|_F^2$: M = m = 1, its target is its minimizer; made by `square_loss`."""

    minimizer: Outputs
    weight: float = eqx.field(static=True)
    smoothness: float | None = eqx.field(static=True, default=1.0)
    hessian_fades: bool = eqx.field(static=True, default=False)

    def __call__(self, y: Outputs) -> Float[Array, ""]:
        r"""Return $\frac12\|y - y^*\|_F^2$."""
        return 0.5 * jnp.asarray(self.weight, y.dtype) * jnp.sum(self.gradient(y) ** 2)

    def gradient(self, y: Outputs) -> Outputs:
        """Return $y - y^*$."""
        self.check(y.shape)
        return y - self.minimizer.astype(y.dtype)

    def hvp(self, y: Outputs, v: Outputs) -> Outputs:
        """Return v itself: the Hessian is the identity of F."""
        del y
        return v

    def root(self, y: Outputs) -> HessianRoot:
        r"""Return $\sqrt{c}\, I$, c the weight."""
        return DiagonalRoot(jnp.asarray(self.weight**0.5, y.dtype))

    def strong_convexity(self, radius: float = math.inf) -> float:
        """Return m = 1, whatever the radius."""
        del radius
        return 1.0

    def check(self, shape: tuple[int, ...]) -> None:
        """Check that outputs have the target's shape."""
        check_shape(shape, self.minimizer.shape, "target")


def square_loss(target: Outputs, *, mean: bool = True) -> SquareLoss:
    r"""Return the loss $R(y) = \frac{1}{2n} \sum_i |y_i - y^*_i|^2 = \frac12\|y - y^*\|_F^2$.

    Args:
        target: $y^*$, (n,) or (n, k), of the outputs' shape.
        mean: With the factor 1/n (the paper); False: without (the lecture notes).

    Returns:
        A loss with M = m = 1; the target is its `minimizer`.

    Raises:
        ValueError: empty or non-finite targets, or not of shape (n,) or (n, k).
        TypeError: complex targets.

    Example:
        >>> print(square_loss(jnp.zeros(2))(jnp.array([1.0, 1.0])))
        0.5
    """
    check_fits(target, "target")
    target = jnp.asarray(target)
    if jnp.iscomplexobj(target):
        msg = f"target must be real, got {target.dtype}; give real and imaginary parts as two columns."
        raise TypeError(msg)
    if not jnp.issubdtype(target.dtype, jnp.floating):
        target = target.astype(jnp.result_type(float))
    check_data(target, "target")
    return SquareLoss(minimizer=target, weight=1 / target.shape[0] if mean else 1.0)
