"""Any function of the outputs as a loss."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lazyjax._core.types import Outputs
from lazyjax.losses.hessian_root import DenseRoot, HessianRoot
from lazyjax.losses.losses import Loss


class UserLoss(Loss):
    """Any function of the outputs, with derivatives by JAX; F is Euclidean (weight 1)."""

    function: Callable[[Outputs], Any]
    weight: float = eqx.field(static=True, default=1.0)

    def __call__(self, y: Outputs) -> Float[Array, ""]:
        """R(y)."""
        return self.function(y)

    def gradient(self, y: Outputs) -> Outputs:
        """By `jax.grad`."""
        return jax.grad(self.function)(y)

    def hvp(self, y: Outputs, v: Outputs) -> Outputs:
        """By forward over reverse."""
        return jax.jvp(jax.grad(self.function), (y,), (v,))[1]

    def root(self, y: Outputs) -> HessianRoot:
        """Of the positive part of the dense Hessian."""
        return DenseRoot.of(jax.hessian(lambda v: self.function(v.reshape(y.shape)))(y.ravel()))

    def check(self, shape: tuple[int, ...]) -> None:
        """R must return one real number."""
        out = eqx.filter_eval_shape(self.function, jax.ShapeDtypeStruct(shape, jnp.result_type(float)))
        if getattr(out, "shape", None) != ():
            msg = f"loss must map outputs of shape {shape} to one number, got {out}."
            raise ValueError(msg)


def as_loss(loss: Any) -> Loss:
    """The loss itself, or any callable on outputs as a `Loss` in the Euclidean metric.

    Raises:
        TypeError: not callable (most often a bare target array).
    """
    if isinstance(loss, Loss):
        return loss
    if not callable(loss):
        msg = f"loss must be a function of the outputs, got {type(loss).__name__}; use lazyjax.square_loss(target)."
        raise TypeError(msg)
    return UserLoss(function=loss)
