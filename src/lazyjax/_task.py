"""From the targets that a user has to the loss and the accuracy that a report shows."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from lazyjax._check import check_finite
from lazyjax.loss import Loss, logistic_loss, softmax_cross_entropy, square_loss

Accuracy = Callable[[Array], Array]


def make_task(
    loss: str | Callable[[Array], Loss], y: Any, shape: tuple[int, ...], name: str = "y"
) -> tuple[Loss, Accuracy | None]:
    """The loss on targets `y` for outputs of `shape`, and the share of right answers where `y` are classes.

    Args:
        loss: "square" (classes become one-hot rows), "softmax", "logistic", or a function of the targets.
        y: Classes (n,), signs (n,), or real targets of the outputs' shape.
        shape: Of the outputs.
        name: What to call the targets in an error.

    Raises:
        ValueError: sizes or values do not fit.
        TypeError: `loss` is a loss already, or a function that returns none.
    """
    y = np.asarray(y)
    if y.ndim == 0 or y.size == 0 or y.shape[0] != shape[0]:
        msg = f"{name} must hold one target a sample, got shape {y.shape} for {shape[0]} samples."
        raise ValueError(msg)
    check_finite(jnp.asarray(y), name)
    if callable(loss):
        made = None if isinstance(loss, Loss) else loss(jnp.asarray(y))
        if not isinstance(made, Loss):
            msg = (
                "loss must be a name or a function of the targets that returns a loss, such as "
                f"lambda y: lj.square_loss(y, mean=False), got {type(loss).__name__}."
            )
            raise TypeError(msg)
        return made, None
    if loss not in ("square", "softmax", "logistic"):
        msg = f'loss must be "square", "softmax", "logistic" or a function of the targets, got {loss!r}.'
        raise ValueError(msg)
    classes = np.issubdtype(y.dtype, np.integer) or y.dtype == bool
    if loss == "logistic":
        made = logistic_loss(jnp.asarray(y))
        made.check(shape)
        return made, lambda outputs: jnp.mean((outputs > 0) == (made.signs > 0))
    if loss == "softmax" or (classes and y.ndim == 1 and len(shape) == 2 and shape[1] > 1):
        made = softmax_cross_entropy(_labels(y, name))
        made.check(shape)
        labels = made.labels
        if loss == "square":
            made = square_loss(jnp.eye(shape[1])[labels])
        return made, lambda outputs: jnp.mean(jnp.argmax(outputs, axis=1).astype(labels.dtype) == labels)
    made = square_loss(jnp.asarray(y, jnp.result_type(float)))
    made.check(shape)
    if classes and set(np.unique(y)) == {-1, 1}:
        return made, lambda outputs: jnp.mean((outputs > 0) == (made.minimizer > 0))
    return made, None


def _labels(y: np.ndarray, name: str) -> Array:
    if not np.issubdtype(y.dtype, np.integer):
        msg = f'{name} must be integer classes for loss="softmax", got {y.dtype}; for one-hot rows use argmax(axis=1).'
        raise ValueError(msg)
    return jnp.asarray(y)
