"""Recipes of the paper for training on images: random crops and flips, and its learning rate.

Augmentations are functions of (key, images) that leave the class of an image as it is, for the option `augment` of
`lazyjax.train`. The learning rate is a schedule for any optax optimizer.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, PRNGKeyArray, Shaped

Images = Shaped[Array, "n height width channels"]


def pad_and_crop(key: PRNGKeyArray, x: ArrayLike, *, padding: int = 4) -> Images:
    """Pad every image by zeros on all sides, and cut one of the original size out of it at random.

    It shifts every image by up to `padding` pixels along each axis, uniformly and independently of the others.

    Args:
        key: Random key.
        x: Images (n, height, width, channels).
        padding: Pixels of padding on each side.

    Returns:
        Images of the same shape and dtype.

    Raises:
        ValueError: x is no batch of images, or `padding` no whole number of at least 0.

    Source:
        Chizat, Oyallon, Bach (2019), section 3.2 and supplement C.2 ("standard data augmentation" on CIFAR-10).

    Example:
        >>> x = jnp.ones((2, 8, 8, 3))
        >>> pad_and_crop(jr.key(0), x).shape
        (2, 8, 8, 3)
    """
    x = _images(x)
    if not isinstance(padding, (int, np.integer)) or padding < 0:
        msg = f"padding must be a whole number of pixels, at least 0, got {padding!r}."
        raise ValueError(msg)
    return _pad_and_crop(key, x, int(padding))


@functools.partial(jax.jit, static_argnames="padding")
def _pad_and_crop(key: PRNGKeyArray, x: Images, padding: int) -> Images:
    n, height, width, channels = x.shape
    padded = jnp.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    corners = jr.randint(key, (n, 2), 0, 2 * padding + 1)

    def crop(image: Array, corner: Array) -> Array:
        return jax.lax.dynamic_slice(image, (corner[0], corner[1], 0), (height, width, channels))

    return jax.vmap(crop)(padded, corners)


def random_flip(key: PRNGKeyArray, x: ArrayLike) -> Images:
    """Flip every image left to right with probability 1/2, independently.

    Args:
        key: Random key.
        x: Images (n, height, width, channels).

    Returns:
        Images of the same shape and dtype.

    Raises:
        ValueError: x is no batch of images.

    Source:
        Chizat, Oyallon, Bach (2019), section 3.2 and supplement C.2 ("standard data augmentation" on CIFAR-10).

    Example:
        >>> x = jnp.arange(2.0).reshape(1, 1, 2, 1)
        >>> sorted({float(random_flip(jr.key(seed), x)[0, 0, 0, 0]) for seed in range(8)})
        [0.0, 1.0]
    """
    return _random_flip(key, _images(x))


@jax.jit
def _random_flip(key: PRNGKeyArray, x: Images) -> Images:
    flipped = jr.bernoulli(key, 0.5, (x.shape[0], 1, 1, 1))
    return jnp.where(flipped, x[:, :, ::-1], x)


def _images(x: ArrayLike) -> Array:
    """Check that x is a batch of images, and return it as an array."""
    x = jnp.asarray(x)
    if x.ndim != 4:
        msg = (
            f"x must be images of shape (n, height, width, channels), got shape {x.shape}; reshape them, with an "
            "axis of length 1 for a single channel."
        )
        raise ValueError(msg)
    return x


def inverse_time_decay(init_value: float, beta: float, *, steps_per_epoch: int) -> optax.Schedule:
    r"""Return the learning rate $\eta_0/(1 + \beta t)$ of epoch t = 0, 1, ..., as an optax schedule.

    It is constant within an epoch.

    Args:
        init_value: $\eta_0$.
        beta: Decay per epoch.
        steps_per_epoch: Steps of an epoch; `train` takes n // batch_size.

    Returns:
        A function of the number of steps taken, for example for `optax.sgd`.

    Raises:
        ValueError: beta negative, or steps_per_epoch no whole number of at least 1.

    Source:
        Chizat, Oyallon, Bach (2019), section 3.2; their code has $\beta = 1/3$.

    Example:
        >>> schedule = inverse_time_decay(1.0, 1 / 3, steps_per_epoch=10)
        >>> print(schedule(9), schedule(30))
        1.0 0.5
    """
    if not (np.isfinite(beta) and beta >= 0):
        msg = f"beta must be a decay per epoch of at least 0, got {beta}."
        raise ValueError(msg)
    if not isinstance(steps_per_epoch, (int, np.integer)) or steps_per_epoch < 1:
        msg = f"steps_per_epoch must be a whole number of at least 1, such as n // batch_size, got {steps_per_epoch!r}."
        raise ValueError(msg)

    def schedule(count: Any) -> Any:
        return init_value / (1 + beta * jnp.asarray(count // steps_per_epoch, float))

    return schedule
