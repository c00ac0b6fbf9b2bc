"""A small training on classes that tests share, and with it the programs that JAX compiles for it.

Scales, keys, starts, data and targets are arguments of these programs; another model, loss, optimizer, augmentation,
batch size or number of lanes side by side is a program of its own.
"""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import optax

import lazyjax as lj
from problems import normal

N, BATCH, EPOCHS = 23, 5, 3  # 3 samples fill no batch
STEPS = N // BATCH
ALPHAS = np.array([1.0, 10.0, np.inf])
SIZES = (3, 6, 4)
MLP = lj.models.mlp(jnp.tanh)
RATE = lj.training.inverse_time_decay(0.3, 1 / 3, steps_per_epoch=STEPS)
SGD = optax.sgd(RATE, momentum=0.9)
X = normal(1, N, 3)
LABELS = jnp.asarray(np.random.default_rng(2).integers(0, 4, N))
TEST = (normal(3, 7, 3), jnp.asarray(np.random.default_rng(4).integers(0, 4, 7)))


def start(seed: int) -> list[dict[str, jax.Array]]:
    """Parameters of the network."""
    rng = np.random.default_rng(seed)
    return [
        {"weight": normal(rng, b, a, scale=a**-0.5), "bias": normal(rng, b, scale=0.1)}
        for a, b in itertools.pairwise(SIZES)
    ]


W0 = start(0)


def key(seed: int = 7) -> jax.Array:
    return jr.key(seed)


def train(f=MLP, w0=None, x=X, y=LABELS, optimizer=SGD, options: dict[str, Any] | None = None, **given):
    """`lj.train` with defaults, the fields of its options in a dict."""
    given = {"alpha": ALPHAS, "epochs": EPOCHS, "batch_size": BATCH, "key": key(), **given}
    w0 = W0 if w0 is None else w0
    return lj.train(f, w0, x, y, optimizer, options=lj.training.TrainingOptions(**(options or {})), **given)


@functools.cache
def trained() -> lj.Training:
    """The training at three scales, with test data."""
    return train(test=TEST)


def forward(w: Any, x: Any) -> np.ndarray:
    """The network by NumPy."""
    first, second = w
    hidden = np.tanh(np.asarray(x) @ np.asarray(first["weight"]).T + np.asarray(first["bias"]))
    return hidden @ np.asarray(second["weight"]).T + np.asarray(second["bias"])


def lane_of(tree: Any, lane: int) -> Any:
    """One lane of a result, as NumPy has it."""
    return jtu.tree_map(lambda leaf: np.asarray(leaf)[lane], tree)
