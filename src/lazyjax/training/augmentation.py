"""Random changes of images that leave their class as it is, for `lazyjax.train`: a function of (key, images)."""

from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, PRNGKeyArray, Shaped

Images = Shaped[Array, "n height width channels"]


def pad_and_crop(key: PRNGKeyArray, x: Any, *, padding: Any = 4) -> Images:
    """Pad every image by zeros on all sides, and cut one of the original size out of it at random.

    The same as a shift by up to `padding` pixels along each axis, uniform over all of them and independent for
    every image.

    Args:
        key: Random key.
        x: Images (n, height, width, channels).
        padding: Pixels of padding on each side.

    Returns:
        Images of the same shape and dtype.

    Raises:
        ValueError: x is no batch of images, `padding` is no whole number of at least 0.

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
    n, height, width, channels = x.shape
    padding = int(padding)
    padded = jnp.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    corners = jr.randint(key, (n, 2), 0, 2 * padding + 1)

    def crop(image: Array, corner: Array) -> Array:
        return jax.lax.dynamic_slice(image, (corner[0], corner[1], 0), (height, width, channels))

    return jax.vmap(crop)(padded, corners)


def random_flip(key: PRNGKeyArray, x: Any) -> Images:
    """Mirror every image left to right with probability 1/2, independently.

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
    x = _images(x)
    mirrored = jr.bernoulli(key, 0.5, (x.shape[0], 1, 1, 1))
    return jnp.where(mirrored, x[:, :, ::-1], x)


def _images(x: Any) -> Array:
    x = jnp.asarray(x)
    if x.ndim != 4:
        msg = (
            f"x must be images of shape (n, height, width, channels), got shape {x.shape}; reshape them, with an "
            "axis of length 1 for a single channel."
        )
        raise ValueError(msg)
    return x
