"""Convolution, pooling and random layers of networks on images (n, height, width, channels).

Maxima are taken by `lax.reduce_window`, whose derivatives XLA compiles rightly; those of `jnp.max` over a reshaped axis
it does not always on CPUs.
"""

from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
from jax import lax
from jax.nn.initializers import variance_scaling
from jaxtyping import Array, Float, PRNGKeyArray

from lazyjax._core.types import RealScalar

Layer = dict[str, Array]
Images = Float[Array, "n _ _ _"]


def convolve(layer: Layer, x: Images, *, stride: int = 1, patches: bool | None = None) -> Images:
    r"""Convolution with bias, zeros around the image so that stride 1 keeps its size.

    Args:
        layer: {"weight": (size, size, in, out), "bias": (out,)}, size odd.
        x: Images.
        stride: Of the window.
        patches: Take it as a product of shifted copies of x with the weights, the same up to rounding. XLA compiles
            the derivatives of a convolution on a CPU to fast programs only outside of loops: in the `lax.scan` of a
            training they take 10 to 100 times as long, products do not. None: on a CPU.

    Example:
        >>> layer = {"weight": jnp.ones((3, 3, 1, 1)), "bias": jnp.zeros(1)}
        >>> print(convolve(layer, jnp.ones((1, 3, 3, 1)))[0, :, :, 0])
        [[4. 6. 4.]
         [6. 9. 6.]
         [4. 6. 4.]]
    """
    weight, bias = layer["weight"], layer["bias"][None, None, None, :]
    size = weight.shape[0]
    edge = (size // 2, size // 2)
    if not (jax.default_backend() == "cpu" if patches is None else patches):
        order = ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(x, weight, (stride, stride), (edge, edge), dimension_numbers=order) + bias
    padded = jnp.pad(x, ((0, 0), edge, edge, (0, 0)))
    height, width = (side - size + 1 for side in padded.shape[1:3])
    moved = [padded[:, i : i + height : stride, j : j + width : stride] for i in range(size) for j in range(size)]
    return jnp.concatenate(moved, axis=-1) @ weight.reshape(-1, weight.shape[-1]) + bias


def pool(x: Images) -> Images:
    """The largest of every 2 x 2 pixels.

    Example:
        >>> print(pool(jnp.arange(4.0).reshape(1, 2, 2, 1)).ravel())
        [3.]
    """
    return lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")


class Maker:
    """Makes layers of Xavier normal weights and zero biases, each from a key of its own."""

    def __init__(self, key: PRNGKeyArray, gain: RealScalar, dtype: Any):
        self._key, self._gain, self._count = key, gain, 0
        self._dtype = jnp.result_type(float) if dtype is None else dtype

    def convolution(self, size: int, channels: int, outputs: int) -> Layer:
        """A convolution of size x size windows."""
        return self._layer((size, size, channels, outputs), inputs=-2, outputs=-1)

    def last(self, inputs: int, outputs: int) -> Layer:
        """An affine layer."""
        return self._layer((outputs, inputs), inputs=-1, outputs=-2)

    def _layer(self, shape: tuple[int, ...], *, inputs: int, outputs: int) -> Layer:
        key = jr.fold_in(self._key, self._count)
        self._count += 1
        xavier = variance_scaling(self._gain**2, "fan_avg", "normal", inputs, outputs, dtype=self._dtype)
        return {"weight": xavier(key, shape), "bias": jnp.zeros(shape[outputs], self._dtype)}
