"""From a user's targets to a loss and an accuracy, on all samples or on a batch of them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from lazyjax._core.checks import check_finite, check_fits
from lazyjax.losses.cross_entropy import softmax_cross_entropy
from lazyjax.losses.logistic import logistic_loss
from lazyjax.losses.loss import Loss
from lazyjax.losses.square import square_loss

Accuracy = Callable[[Array], Array]


class Task(NamedTuple):
    """A learning task: targets, the loss on them, and which outputs are right.

    Attributes:
        build: Makes the loss from the targets of some of the samples.
        targets: The targets of all samples, sample first.
        right: Tells which outputs are right, from outputs and targets; None if the targets are no classes.
    """

    build: Callable[[Array], Loss]
    targets: Array
    right: Callable[[Array, Array], Bool[Array, " n"]] | None

    def share(self, outputs: Array, targets: Array) -> Array:
        """Return the share of right answers."""
        assert self.right is not None
        # Counted in whole numbers: jax 0.10.1 on a CPU loses terms of a mean of comparisons under jit and vmap.
        return jnp.sum(self.right(outputs, targets), dtype=jnp.int32) / outputs.shape[0]


def make_task(
    loss: str | Callable[[Array], Loss], y: Any, shape: tuple[int, ...], name: str = "y", *, like: Any = None
) -> tuple[Loss, Accuracy | None]:
    """Return the loss on targets `y` for outputs of `shape`, and the accuracy if `y` are classes.

    Args:
        loss: "square" (classes become one-hot rows), "softmax", "logistic", or a function of the targets.
        y: Classes (n,), signs (n,), or real targets of the outputs' shape.
        shape: Shape of the outputs.
        name: What to call the targets in an error.
        like: The training targets, which say whether test targets are signs: one class may be missing in a test.

    Raises:
        ValueError: sizes or values do not fit.
        TypeError: `loss` is a loss already, or a function that returns none.
    """
    task = split_task(loss, y, shape, name, like=like)
    accuracy = None if task.right is None else lambda outputs: task.share(outputs, task.targets)
    return task.build(task.targets), accuracy


def split_task(
    loss: str | Callable[[Array], Loss], y: Any, shape: tuple[int, ...], name: str = "y", *, like: Any = None
) -> Task:
    """Return the task of `make_task`, which makes the loss of any batch of the targets."""
    y = np.asarray(y)
    if y.ndim == 0 or y.size == 0 or y.shape[0] != shape[0]:
        msg = f"{name} must hold one target per sample, got shape {y.shape} for {shape[0]} samples."
        raise ValueError(msg)
    check_fits(y, name)
    check_finite(jnp.asarray(y), name)
    task = _given(loss, jnp.asarray(y)) if callable(loss) else _named(loss, y, shape, name, like)
    task.build(task.targets).check(shape)
    return task


def _given(loss: Callable[[Array], Loss], y: Array) -> Task:
    made = None if isinstance(loss, Loss) else loss(y)
    if not isinstance(made, Loss):
        msg = (
            "loss must be a name or a function of the targets that returns a loss, such as "
            f"lambda y: lj.square_loss(y, mean=False), got {type(loss).__name__}."
        )
        raise TypeError(msg)
    return Task(loss, y, None)


def _named(loss: Any, y: np.ndarray, shape: tuple[int, ...], name: str, like: Any) -> Task:
    if loss not in ("square", "softmax", "logistic"):
        msg = f'loss must be "square", "softmax", "logistic" or a function of the targets, got {loss!r}.'
        raise ValueError(msg)
    if loss == "logistic":
        return Task(logistic_loss, jnp.asarray(y), _same_sign)
    if loss == "softmax" or (_are_classes(y) and y.ndim == 1 and len(shape) == 2 and shape[1] > 1):
        labels = _labels(y, name)
        softmax_cross_entropy(labels).check(shape)
        if loss == "softmax":
            return Task(softmax_cross_entropy, labels, _right_class)
        return Task(square_loss, jnp.asarray(np.eye(shape[1])[np.asarray(labels)], jnp.result_type(float)), _right_row)
    signs = _are_signs(y if like is None else np.asarray(like))
    if signs and not set(np.unique(y)) <= {-1, 1}:
        msg = f"{name} must hold the signs -1 and 1 as y does, got values {np.unique(y)[:8].tolist()}."
        raise ValueError(msg)
    return Task(square_loss, jnp.asarray(y, jnp.result_type(float)), _same_sign if signs else None)


def _are_classes(y: np.ndarray) -> bool:
    return np.issubdtype(y.dtype, np.integer) or y.dtype == bool


def _are_signs(y: np.ndarray) -> bool:
    return _are_classes(y) and set(np.unique(y)) == {-1, 1}


def _same_sign(outputs: Array, targets: Array) -> Array:
    return (outputs > 0) == (targets > 0)


def _right_class(outputs: Array, labels: Array) -> Array:
    return jnp.argmax(outputs, axis=1).astype(labels.dtype) == labels


def _right_row(outputs: Array, rows: Array) -> Array:
    return jnp.argmax(outputs, axis=1) == jnp.argmax(rows, axis=1)


def _labels(y: np.ndarray, name: str) -> Array:
    if not np.issubdtype(y.dtype, np.integer):
        msg = f'{name} must be integer classes for loss="softmax", got {y.dtype}; for one-hot rows use argmax(axis=1).'
        raise ValueError(msg)
    return jnp.asarray(y)
