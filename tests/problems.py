"""Six small problems that tests share, and with them the programs that JAX compiles for them.

Data and parameters are made by NumPy, which compiles nothing, and are arguments of the compiled programs: another
seed of the same problem costs no new compilation. The models are those of `lazyjax.models` or functions of this
module, never a new lambda or `functools.partial`, which would be compiled again.

    linear       h(w) = X w from w = 0: its own tangent model, every flow has a closed form
    centered     a centered two-layer tanh net: the gap of the two flows falls like 1/alpha
    symmetrized  a symmetrized two-layer tanh net: the gap falls like 1/alpha^2
    rows         a centered tanh MLP with three outputs per sample
    classes      the same MLP with the softmax cross-entropy on three classes
    images       a convolutional ReLU net with max and average pooling, centered
"""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import lazyjax as lj

Array = jax.Array


class Problem(NamedTuple):
    """A model h(w), its start w0, a loss and its target; f(w, x) and x, of which h is `lj.on_data(f, x)`."""

    h: Callable[[Any], Array]
    w0: Any
    loss: Any
    target: Array
    f: Callable[[Any, Array], Array]
    x: Array


def normal(seed: int | np.random.Generator, *shape: int, scale: float = 1.0, dtype: Any = None) -> Array:
    """Normal numbers of mean zero, the same in every run."""
    values = scale * np.random.default_rng(seed).standard_normal(shape)
    return jnp.asarray(values, np.float64 if dtype is None else dtype)


def normal_like(seed: int, tree: Any) -> Any:
    """A tree of standard normal numbers with the shapes and dtypes of another one."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: normal(rng, *leaf.shape, dtype=leaf.dtype), tree)


def linear(seed: int = 0, *, n: int = 5, d: int = 8, dtype: Any = None) -> Problem:
    rng = np.random.default_rng(seed)
    x, target = normal(rng, n, d, dtype=dtype), normal(rng, n, dtype=dtype)
    return _problem(_linear, {"slope": jnp.asarray(np.zeros(d), x.dtype)}, x, target)


def centered(seed: int = 0, *, n: int = 5, d: int = 3, width: int = 12, dtype: Any = None) -> Problem:
    w0, x, target = _two_layer(seed, n, d, width, dtype)
    return _problem(lj.center(lj.models.two_layer(jnp.tanh), w0), w0, x, target)


def symmetrized(seed: int = 0, *, n: int = 5, d: int = 3, width: int = 12, dtype: Any = None) -> Problem:
    w0, x, target = _two_layer(seed, n, d, width, dtype)
    f, w0 = lj.symmetrize(lj.models.two_layer(jnp.tanh), w0)
    return _problem(f, w0, x, target)


def rows(seed: int = 0, *, n: int = 5, sizes: tuple[int, ...] = (4, 6, 3), dtype: Any = None) -> Problem:
    rng = np.random.default_rng(seed)
    w0, x = _layers(rng, sizes, dtype), normal(rng, n, sizes[0], dtype=dtype)
    return _problem(lj.center(lj.models.mlp(jnp.tanh), w0), w0, x, normal(rng, n, sizes[-1], dtype=dtype))


def classes(seed: int = 0, *, n: int = 5, sizes: tuple[int, ...] = (4, 6, 3), dtype: Any = None) -> Problem:
    problem = rows(seed, n=n, sizes=sizes, dtype=dtype)
    labels = jnp.asarray(np.arange(n) % sizes[-1])
    return problem._replace(target=labels, loss=lj.softmax_cross_entropy(labels))


def images(seed: int = 0, *, n: int = 4, dtype: Any = None) -> Problem:
    rng = np.random.default_rng(seed)
    shapes = {"first": (3, 3, 1, 3), "second": (3, 3, 3, 2), "head": (8, 2)}
    w0 = {name: normal(rng, *s, scale=np.prod(s[:-1]) ** -0.5, dtype=dtype) for name, s in shapes.items()}
    return _problem(lj.center(conv_net, w0), w0, normal(rng, n, 8, 8, 1, dtype=dtype), normal(rng, n, 2, dtype=dtype))


PROBLEMS = {f.__name__: f for f in (linear, centered, symmetrized, rows, classes, images)}


def conv_net(w: dict[str, Array], x: Array) -> Array:
    """Outputs (n, k) of images (n, 8, 8, c): convolution, max pooling, convolution, average pooling, dense."""
    dimensions = ("NHWC", "HWIO", "NHWC")
    z = jax.lax.conv_general_dilated(x, w["first"], (1, 1), "SAME", dimension_numbers=dimensions)
    z = jax.lax.reduce_window(jax.nn.relu(z), -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    z = jax.lax.conv_general_dilated(z, w["second"], (1, 1), "SAME", dimension_numbers=dimensions)
    z = jax.lax.reduce_window(jnp.where(z > 0, z, 0.1 * z), 0.0, jax.lax.add, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    return z.reshape(x.shape[0], -1) @ w["head"]


def _linear(w: dict[str, Array], x: Array) -> Array:
    return x @ w["slope"]


def _two_layer(seed: int, n: int, d: int, width: int, dtype: Any) -> tuple[dict[str, Array], Array, Array]:
    rng = np.random.default_rng(seed)
    w0 = {"a": normal(rng, width, dtype=dtype), "b": normal(rng, width, d, dtype=dtype)}
    return w0, normal(rng, n, d, dtype=dtype), normal(rng, n, dtype=dtype)


def _layers(rng: np.random.Generator, sizes: tuple[int, ...], dtype: Any) -> list[dict[str, Array]]:
    return [
        {"weight": normal(rng, b, a, scale=a**-0.5, dtype=dtype), "bias": normal(rng, b, scale=0.1, dtype=dtype)}
        for a, b in itertools.pairwise(sizes)
    ]


def _problem(f: Any, w0: Any, x: Array, target: Array) -> Problem:
    return Problem(lj.on_data(f, x), w0, lj.square_loss(target), target, f, x)
