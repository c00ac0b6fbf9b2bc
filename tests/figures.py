"""What the tests of the figures share: gradient descent by hand in NumPy, and a deep network that compiles quickly."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from lazyjax.experiments.student import sample_problem
from lazyjax.models.deep import convolve, pool, xavier_layers


def sample(seed, *sizes, **options):
    """The problem of a seed, by one compiled program for each size, not one for each of its operations."""
    return _sample(jnp.asarray(seed), *sizes, **options)


_sample = eqx.filter_jit(sample_problem)


def numpy_descent(w, x, y, steps, rate_a, rate_b=None, alpha=1.0):
    """Gradient descent of a two-layer ReLU net by hand, in float64."""
    a, b = np.array(w["a"], np.float64), np.array(w["b"], np.float64)
    x, y = np.asarray(x), np.asarray(y)
    rate_b = rate_a if rate_b is None else rate_b
    for _ in range(steps):
        z = x @ b.T
        hidden = np.maximum(z, 0)
        r = (alpha * hidden @ a - y) / (len(y) * alpha)
        a, b = a - rate_a * hidden.T @ r, b - rate_b * ((r[:, None] * (z > 0)) * a).T @ x
    return {"a": a, "b": b}


def scaled(w, factor):
    """A start of another standard deviation, by NumPy."""
    return {name: factor * np.asarray(leaf) for name, leaf in w.items()}


def moved(w, w0):
    """The displacement w - w0 by NumPy."""
    return {name: w[name] - np.asarray(w0[name]) for name in w}


def texts(ax):
    """All notes on matplotlib axes."""
    return [text.get_text() for text in ax.texts]


def lines(ax):
    """The lines of matplotlib axes that have a label."""
    return {line.get_label(): line for line in ax.get_lines() if not line.get_label().startswith("_")}


class Tiny(eqx.Module):
    """Two convolutions of images 32 x 32, and a last layer: VGG-11 would cost nothing but its compilation."""

    def init(self, key, *, width, shape, gain, dtype):
        wide = round(64 * width)
        shapes = [(3, 3, shape[2], wide), (3, 3, wide, wide), (10, 4 * wide)]
        return dict(zip(("first", "second", "last"), xavier_layers(key, shapes, gain=gain, dtype=dtype), strict=True))

    def __call__(self, w, x):
        return self.run(w, x)[0]

    def preactivations(self, w, x):
        return self.run(w, x)[1]

    def run(self, w, x):
        hidden = [convolve(w["first"], x, stride=4)]
        hidden.append(convolve(w["second"], pool(jax.nn.relu(hidden[0])), stride=2))
        z = jax.nn.relu(hidden[1]).reshape(x.shape[0], -1)
        return z @ w["last"]["weight"].T + w["last"]["bias"][None, :], hidden


TINY = {"data": "digits", "width": 1 / 8, "train": 96, "test": 40, "batch": 16}
"""Settings of the figures of deep networks with which a run takes seconds."""
