"""The networks whose Gram matrices `gram.py` times: plain JAX functions f(w, x), NumPy arrays of one seed.

Both sides of the race import this file, each with its own jax, and so it imports neither library. Weights are
standard normal and every layer divides by the root of its fan-in. Pooling is by `reduce_window`, ReLU by `where`: the
derivative of a `max` over a reshaped axis can be wrong under jit on a CPU.
"""

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

VGG = (8, "M", 16, "M", 32, 32, "M", 64, 64, "M", 64, 64, "M")
"""VGG-11 with an eighth of its channels; M halves the image."""
WIDE_VGG = tuple(item if item == "M" else 8 * item for item in VGG)

SIZES: dict[str, dict[str, tuple[Any, ...]]] = {
    "full": {
        "a": (500, (100, 1000, 1)),
        "b": (128, (784, 512, 512, 512, 10)),
        "c": (64, 32, VGG, 10),
        "d": (32, 32, (8, 16, 32, 64), (2, 2, 3, 3), 10),
        "e": (32, 256, 32, 64, 4, 10),
    },
    "smoke": {
        "a": (8, (3, 4, 1)),
        "b": (8, (5, 6, 6, 3)),
        "c": (8, 4, (2, "M", 3), 2),
        "d": (8, 4, (2, 3), (1, 1), 2),
        "e": (8, 7, 4, 8, 2, 2),
    },
}
"""Samples first, then what `WORKS` says."""


class Work(NamedTuple):
    """A network f(w, x) -> (n, k), its parameters and inputs."""

    f: Callable[[Any, Any], jax.Array]
    w: Any
    x: Any
    k: int

    @property
    def num_params(self) -> int:
        """Number of coordinates that the Gram contracts."""
        return sum(leaf.size for leaf in jax.tree_util.tree_leaves(self.w))


class Random(NamedTuple):
    """Arrays of one dtype from one stream."""

    generator: np.random.Generator
    dtype: str

    def normal(self, *shape: int) -> np.ndarray:
        """Return standard normal numbers; rounded from the same ones in every dtype."""
        return self.generator.standard_normal(shape).astype(self.dtype)

    def layer(self, *shape: int, bias: bool = True) -> dict[str, np.ndarray]:
        """Return weights of a dense layer or a convolution, inputs and outputs last."""
        kernel = {"kernel": self.normal(*shape)}
        return kernel | {"bias": self.normal(shape[-1])} if bias else kernel


def relu(h: jax.Array) -> jax.Array:
    return jnp.where(h > 0, h, 0.0)


def biased(layer: dict[str, Any], h: jax.Array) -> jax.Array:
    if "bias" not in layer:
        return h
    return h + 0.1 * layer["bias"].reshape((1,) * (h.ndim - 1) + (-1,))


def dense(layer: dict[str, Any], h: jax.Array, gain: float = 1.0) -> jax.Array:
    kernel = layer["kernel"]
    return biased(layer, h @ kernel * (gain / kernel.shape[0]) ** 0.5)


def convolve(layer: dict[str, Any], h: jax.Array, gain: float = 2.0, stride: int = 1) -> jax.Array:
    kernel = layer["kernel"] * (gain / np.prod(layer["kernel"].shape[:-1]).item()) ** 0.5
    axes = ("NHWC", "HWIO", "NHWC")
    return biased(layer, lax.conv_general_dilated(h, kernel, (stride, stride), "SAME", dimension_numbers=axes))


def mlp(w: list[Any], x: jax.Array) -> jax.Array:
    """Make dense layers with ReLU between them."""
    h = dense(w[0], x)
    for layer in w[1:]:
        h = dense(layer, relu(h), 2.0)
    return h


def vgg(w: list[Any], x: jax.Array, *, plan: tuple[Any, ...]) -> jax.Array:
    """Make convolutions of 3 x 3 with ReLU, maxima over 2 x 2 squares, a dense layer."""
    layers = iter(w)
    for item in plan:
        if item == "M":
            x = lax.reduce_window(x, -np.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
        else:
            x = relu(convolve(next(layers), x))
    return dense(next(layers), x.reshape(x.shape[0], -1))


def resnet(w: dict[str, Any], x: jax.Array) -> jax.Array:
    """Make residual blocks without normalization; a block with a shortcut of 1 x 1 halves the image."""
    h = convolve(w["stem"], x, 1.0)
    for block in w["blocks"]:
        stride = 2 if "shortcut" in block else 1
        branch = convolve(block["first"], relu(h), stride=stride)
        branch = convolve(block["second"], relu(branch))
        trunk = convolve(block["shortcut"], h, 1.0, 2) if "shortcut" in block else h
        h = (trunk + branch) * 0.5**0.5
    return dense(w["head"], jnp.mean(relu(h), axis=(1, 2)))


def transformer(w: dict[str, Any], x: jax.Array, *, heads: int) -> jax.Array:
    """Make a block of attention and MLP over embedded tokens, each behind a normalization; the mean over tokens."""
    h = w["tokens"][x] + w["positions"][None]
    h = h + attention(w, normalized(w["norms"][0], h), heads)
    h = h + dense(w["down"], jax.nn.gelu(dense(w["up"], normalized(w["norms"][1], h))))
    return dense(w["head"], jnp.mean(normalized(w["norms"][2], h), axis=1))


def attention(w: dict[str, Any], h: jax.Array, heads: int) -> jax.Array:
    n, length, width = h.shape
    queries, keys, values = (dense(w[name], h).reshape(n, length, heads, -1) for name in ("q", "k", "v"))
    scores = jnp.einsum("nihc,njhc->nhij", queries, keys) * (heads / width) ** 0.5
    mixed = jnp.einsum("nhij,njhc->nihc", jax.nn.softmax(scores), values)
    return dense(w["o"], mixed.reshape(n, length, width))


def normalized(norm: dict[str, Any], h: jax.Array) -> jax.Array:
    h = h - jnp.mean(h, axis=-1, keepdims=True)
    h = h * lax.rsqrt(jnp.mean(h * h, axis=-1, keepdims=True) + 1e-5)
    return h * (1.0 + 0.1 * norm["scale"][None, None]) + 0.1 * norm["shift"][None, None]


def make_mlp(random: Random, n: int, sizes: tuple[int, ...]) -> Work:
    # The two-layer net has no biases.
    x, bias = random.normal(n, sizes[0]), len(sizes) > 3
    return Work(mlp, [random.layer(*pair, bias=bias) for pair in itertools.pairwise(sizes)], x, sizes[-1])


def make_vgg(random: Random, n: int, image: int, plan: tuple[Any, ...], k: int) -> Work:
    x, w, channels = random.normal(n, image, image, 3), [], 3
    for item in plan:
        if item != "M":
            w.append(random.layer(3, 3, channels, item))
            channels = item
    side = image >> plan.count("M")
    return Work(partial(vgg, plan=plan), [*w, random.layer(side * side * channels, k)], x, k)


def make_resnet(random: Random, n: int, image: int, widths: tuple[int, ...], depths: tuple[int, ...], k: int) -> Work:
    x, channels = random.normal(n, image, image, 3), widths[0]
    w: dict[str, Any] = {"stem": random.layer(3, 3, 3, channels), "blocks": []}
    for width, depth in zip(widths, depths, strict=True):
        for _ in range(depth):
            block = {"first": random.layer(3, 3, channels, width), "second": random.layer(3, 3, width, width)}
            if width != channels:
                block["shortcut"] = random.layer(1, 1, channels, width)
            w["blocks"].append(block)
            channels = width
    return Work(resnet, w | {"head": random.layer(channels, k)}, x, k)


def make_transformer(random: Random, n: int, tokens: int, length: int, width: int, heads: int, k: int) -> Work:
    x = random.generator.integers(tokens, size=(n, length), dtype=np.int32)
    w: dict[str, Any] = {name: random.layer(width, width) for name in ("q", "k", "v", "o")}
    w |= {"up": random.layer(width, 4 * width), "down": random.layer(4 * width, width), "head": random.layer(width, k)}
    w |= {"tokens": random.normal(tokens, width), "positions": random.normal(length, width)}
    w["norms"] = [{"scale": random.normal(width), "shift": random.normal(width)} for _ in range(3)]
    return Work(partial(transformer, heads=heads), w, x, k)


WORKS: dict[str, Callable[..., Work]] = {
    "a": make_mlp,
    "b": make_mlp,
    "c": make_vgg,
    "d": make_resnet,
    "e": make_transformer,
}


def make(name: str, dtype: str, size: str = "full", n: int | None = None) -> Work:
    """Return a work, or its first n samples; the parameters are the same for every n."""
    work = WORKS[name](Random(np.random.default_rng(0), dtype), *SIZES[size][name])
    return work._replace(x=work.x[:n])
