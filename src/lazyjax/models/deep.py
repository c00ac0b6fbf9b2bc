r"""The paper's deep networks as plain functions of (parameters, images): VGG-11, and ResNet-18 without BatchNorm.

Images are (n, height, width, channels). The parts (convolution, pooling, Xavier weights) come first, then the two
networks; both are easy to copy from here.
"""

import difflib
import functools
import itertools
from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray

from lazyjax._core.checks import is_concrete
from lazyjax._core.types import RealScalar
from lazyjax.models.shallow import draw_normal

Layer = dict[str, Array]
Images = Float[Array, "n _ _ _"]


def convolve(layer: Layer, x: Images, *, stride: int = 1, patches: bool | None = None) -> Images:
    r"""Return a convolution with bias, zeros around the image so that stride 1 keeps its size.

    Args:
        layer: {"weight": (size, size, in, out), "bias": (out,)}, size odd.
        x: Images.
        stride: Steps of the window, in pixels.
        patches: Whether to take it as a product of shifted copies of x with the weights, the same up to rounding. XLA
            compiles the derivatives of a convolution on a CPU to fast programs only outside of loops: in the
            `lax.scan` of a training they take 10 to 100 times as long, products do not. None: on a CPU.

    Returns:
        (n, height, width, out), each side divided by the stride and rounded up.

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
    """Return the largest of every 2 x 2 pixels.

    It is taken by `lax.reduce_window`, whose derivatives XLA compiles rightly; those of `jnp.max` over a reshaped axis
    it does not always on CPUs.

    Example:
        >>> print(pool(jnp.arange(4.0).reshape(1, 2, 2, 1)).ravel())
        [3.]
    """
    return lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")


def xavier_layers(
    key: PRNGKeyArray, shapes: Sequence[tuple[int, ...]], *, gain: RealScalar = 1.0, dtype: Any = None
) -> list[Layer]:
    r"""Draw layers of Xavier normal weights and zero biases, each from a key of its own.

    Args:
        key: Random key.
        shapes: Shapes of the weights: (size, size, in, out) of a convolution, (out, in) of an affine layer.
        gain: g in $W \sim N(0, g^2 \cdot 2/(n_{in} + n_{out}))$, each n times the pixels of a window.
        dtype: Floating dtype; None for JAX's default.

    Returns:
        [{"weight": shape, "bias": (out,)}, ...].

    Example:
        >>> [layer["bias"].shape for layer in xavier_layers(jr.key(0), [(3, 3, 1, 4), (2, 16)])]
        [(4,), (2,)]
    """
    dtype = jnp.dtype(jnp.result_type(float) if dtype is None else dtype)
    fans = [prod(shape[:-2]) * (shape[-2] + shape[-1]) / 2 for shape in shapes]
    variances = [jnp.asarray(gain**2 / fan, dtype) for fan in fans]
    return _draw_layers(key, variances, shapes=tuple(shapes))


@functools.partial(jax.jit, static_argnames="shapes")
def _draw_layers(
    key: PRNGKeyArray, variances: list[Float[Array, ""]], *, shapes: tuple[tuple[int, ...], ...]
) -> list[Layer]:
    layers = []
    for i, (shape, variance) in enumerate(zip(shapes, variances, strict=True)):
        outputs = shape[-1] if len(shape) == 4 else shape[0]
        weight = draw_normal(jr.fold_in(key, i), shape, variance.dtype) * jnp.sqrt(variance)
        layers.append({"weight": weight, "bias": jnp.zeros(outputs, variance.dtype)})
    return layers


VGG11 = (64, "pool", 128, "pool", 256, 256, "pool", 512, 512, "pool", 512, 512, "pool")
"""Channels of the eight convolutions, and where the five poolings are (the paper's code has a sixth, of 1 x 1)."""
RESNET18 = ((64, 1), (64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), (512, 1))
"""Channels and stride of the eight blocks of two convolutions each; before them is one of 64 channels."""
HALVINGS = 32
"""The factor by which five poolings shrink the sides of an image."""


def _head(layer: Layer, x: Array) -> Float[Array, "n k"]:
    return x.reshape(x.shape[0], -1) @ layer["weight"].T + layer["bias"][None, :]


class VGG(eqx.Module):
    """VGG-11; made by `vgg11`."""

    patches: bool | None = None

    def __call__(self, w: list[Layer], x: Images) -> Float[Array, "n k"]:
        """Return the outputs (n, k)."""
        return self._run(w, x)[0]

    def preactivations(self, w: list[Layer], x: Images) -> list[Images]:
        """Return the eight convolutions before their ReLU."""
        return self._run(w, x)[1]

    def _run(self, w: list[Layer], x: Images) -> tuple[Array, list[Array]]:
        layers, hidden = iter(w), []
        for step in VGG11:
            if step == "pool":
                x = pool(x)
            else:
                hidden.append(convolve(next(layers), x, patches=self.patches))
                x = jax.nn.relu(hidden[-1])
        return _head(next(layers), x), hidden

    def init(
        self,
        key: PRNGKeyArray,
        *,
        width: float | int = 1.0,
        shape: Sequence[int] = (32, 32, 3),
        outputs: int = 10,
        gain: RealScalar = 1.0,
        dtype: Any = None,
    ) -> list[Layer]:
        r"""Draw Xavier normal weights; biases are zero.

        Args:
            key: Random key.
            width: Factor of the channels of every convolution (64 to 512), rounded. At width 1, with three input
                channels of 32 x 32 and ten outputs: 9,220,480 parameters of convolutions and 5,130 of the last layer.
            shape: (height, width, channels) of an image, at least 32 x 32; pad smaller ones.
            outputs: Number k of outputs.
            gain: g in $W \sim N(0, g^2 \cdot 2/(s^2 (c_{in} + c_{out})))$ for an s x s convolution; s = 1 for the last
                layer.
            dtype: Floating dtype; None for JAX's default. Convolutions in float64 are slow.

        Returns:
            A list of eight layers {"weight": (3, 3, in, out), "bias": (out,)} and a last one
            {"weight": (k, in), "bias": (k,)}.

        Raises:
            ValueError: images that are too small, or a size, the width or the gain is not positive.

        Source:
            Chizat, Oyallon, Bach (2019), section 3.2; their code has gain 1 for Figure 3(a), the paper 1.3 for 3(b).

        Example:
            >>> sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(vgg11().init, jax.random.key(0))))
            9225610
        """
        _check_init(width, shape, outputs, gain)
        if min(shape[:2]) < HALVINGS:
            msg = f"shape must be at least 32 x 32, which five poolings halve, got {tuple(shape)}; pad the images."
            raise ValueError(msg)
        channels = [shape[2], *(_widen(step, width) for step in VGG11 if isinstance(step, int))]
        shapes = [(3, 3, *pair) for pair in itertools.pairwise(channels)]
        last = (outputs, channels[-1] * (shape[0] // HALVINGS) * (shape[1] // HALVINGS))
        return xavier_layers(key, [*shapes, last], gain=gain, dtype=dtype)


class ResNet(eqx.Module):
    """ResNet-18 without BatchNorm; made by `resnet18`."""

    patches: bool | None = None

    def __call__(self, w: dict[str, Any], x: Images) -> Float[Array, "n k"]:
        """Return the outputs (n, k)."""
        return self._run(w, x)[0]

    def preactivations(self, w: dict[str, Any], x: Images) -> list[Images]:
        """Return what goes into the 17 ReLUs: one of the first convolution, two of each block."""
        return self._run(w, x)[1]

    def _run(self, w: dict[str, Any], x: Images) -> tuple[Array, list[Array]]:
        hidden = [convolve(w["first"], x, patches=self.patches)]
        x = jax.nn.relu(hidden[0])
        for block, (_, stride) in zip(w["blocks"], RESNET18, strict=True):
            hidden.append(convolve(block["first"], x, stride=stride, patches=self.patches))
            z = convolve(block["second"], jax.nn.relu(hidden[-1]), patches=self.patches)
            if "shortcut" in block:
                x = convolve(block["shortcut"], x, stride=stride, patches=self.patches)
            hidden.append(z + x)
            x = jax.nn.relu(hidden[-1])
        return _head(w["last"], jnp.mean(x, axis=(1, 2))), hidden

    def init(
        self,
        key: PRNGKeyArray,
        *,
        width: float | int = 1.0,
        shape: Sequence[int] = (32, 32, 3),
        outputs: int = 10,
        gain: RealScalar = 1.0,
        dtype: Any = None,
    ) -> dict[str, Any]:
        r"""Draw Xavier normal weights; biases are zero.

        Args:
            key: Random key.
            width: Factor of the channels of every convolution (64 to 512), rounded. At width 1, with three input
                channels and ten outputs: 11,169,162 parameters.
            shape: (height, width, channels) of an image.
            outputs: Number k of outputs.
            gain: As in `VGG.init`.
            dtype: Floating dtype; None for JAX's default. Convolutions in float64 are slow.

        Returns:
            {"first": layer, "blocks": [{"first", "second"[, "shortcut"]} x 8], "last": layer}, layers as in `VGG.init`.

        Raises:
            ValueError: a size, the width or the gain is not positive.

        Source:
            Chizat, Oyallon, Bach (2019), section 3.2; the paper has gain 1.2 for Figure 3(b).

        Example:
            >>> w = jax.eval_shape(resnet18().init, jax.random.key(0))
            >>> ["shortcut" in block for block in w["blocks"]]
            [False, False, True, False, True, False, True, False]
        """
        _check_init(width, shape, outputs, gain)
        channels = _widen(64, width)
        first, blocks = (3, 3, shape[2], channels), []
        for target, stride in RESNET18:
            wide = _widen(target, width)
            block = {"first": (3, 3, channels, wide), "second": (3, 3, wide, wide)}
            if stride > 1 or wide != channels:
                block["shortcut"] = (1, 1, channels, wide)
            blocks.append(block)
            channels = wide
        shapes = [first, *(weight for block in blocks for weight in block.values()), (outputs, channels)]
        layers = iter(xavier_layers(key, shapes, gain=gain, dtype=dtype))
        return {
            "first": next(layers),
            "blocks": [{name: next(layers) for name in block} for block in blocks],
            "last": next(layers),
        }


def vgg11(*, patches: bool | None = None) -> VGG:
    r"""Make VGG-11 without BatchNorm: eight 3 x 3 convolutions with ReLU, five 2 x 2 max poolings, an affine layer.

    Args:
        patches: How convolutions are computed, see `convolve`; None chooses by the platform.

    Returns:
        `net` with `net(w, x)` for w from `net.init`, x (n, height, width, channels), outputs (n, k); `net.init`;
        and `net.preactivations`.

    Source:
        Simonyan, Zisserman (2015); Chizat, Oyallon, Bach (2019), section 3.2.

    Example:
        >>> net = vgg11()
        >>> x, w = jnp.ones((2, 32, 32, 3)), jax.eval_shape(net.init, jax.random.key(0))
        >>> jax.eval_shape(net, w, x).shape  # of the outputs net(w, x), without computing them
        (2, 10)
    """
    return VGG(patches)


def resnet18(*, patches: bool | None = None) -> ResNet:
    r"""Make ResNet-18 for small images, without BatchNorm: $x \mapsto \mathrm{relu}(C_2\,\mathrm{relu}(C_1 x) + S x)$.

    A first 3 x 3 convolution, eight such blocks, the mean over pixels, one affine layer. S is the identity, or a 1 x 1
    convolution with bias if channels or size change.

    Args:
        patches: How convolutions are computed, see `convolve`; None chooses by the platform.

    Returns:
        `net` with `net(w, x)` for w from `net.init`, x (n, height, width, channels), outputs (n, k); `net.init`;
        and `net.preactivations`.

    Source:
        He et al. (2016); Chizat, Oyallon, Bach (2019), section 3.2 and their code.

    Example:
        >>> net = resnet18()
        >>> x, w = jnp.ones((2, 32, 32, 3)), jax.eval_shape(net.init, jax.random.key(0))
        >>> jax.eval_shape(net, w, x).shape  # of the outputs net(w, x), without computing them
        (2, 10)
    """
    return ResNet(patches)


NETWORKS: dict[str, Callable[..., Any]] = {"vgg11": vgg11, "resnet18": resnet18}


def find_network(name: str) -> Callable[..., Any]:
    """Find the maker of a network by its name.

    Raises:
        ValueError: no such network; the message has the nearest name.

    Example:
        >>> find_network("vgg11") is vgg11
        True
    """
    if name not in NETWORKS:
        near = difflib.get_close_matches(name.lower().replace("-", ""), NETWORKS, 1, 0.4)
        hint = f"did you mean {near[0]}?" if near else "choose one of these."
        msg = f"there is no network {name!r} among {', '.join(NETWORKS)}; {hint}"
        raise ValueError(msg)
    return NETWORKS[name]


def _widen(channels: int, width: float | int) -> int:
    return max(1, round(channels * width))


def _check_init(width: float | int, shape: Sequence[int], outputs: int, gain: RealScalar) -> None:
    if len(shape) != 3 or min(shape) < 1:
        msg = f"shape must be (height, width, channels) of an image, all positive, got {tuple(shape)}."
        raise ValueError(msg)
    if outputs < 1:
        msg = f"outputs must be at least 1, got {outputs}."
        raise ValueError(msg)
    if not 0 < width < np.inf:
        msg = f"width must be a positive factor of the channels, got {width}."
        raise ValueError(msg)
    if is_concrete(gain) and not float(gain) > 0:
        msg = f"gain must be a positive factor, got {gain}."
        raise ValueError(msg)
