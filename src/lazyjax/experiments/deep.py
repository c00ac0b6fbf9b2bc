"""What the figures of deep networks share: images, starts, the paper's optimizer and augmentation, stability."""

import functools
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from jaxtyping import Array, Float

from lazyjax._core.types import Model, Params
from lazyjax.data.images import find_source, load_images
from lazyjax.laziness.compare import activation_stability
from lazyjax.models.deep import find_network
from lazyjax.training.recipes import inverse_time_decay, pad_and_crop, random_flip
from lazyjax.training.train import Training

DTYPE = jnp.float32
"""The dtype of everything that is trained: convolutions in float64 are slow, and `finite_jvp` keeps the digits."""


def check_alphas(settings: Any) -> None:
    """Check that the output scales increase and lie in (0, inf]."""
    alphas = settings.alphas
    good = all(isinstance(a, int | float) and not isinstance(a, bool) and a > 0 for a in alphas)
    if not alphas or not good or any(a >= b for a, b in itertools.pairwise(alphas)):
        msg = f"alphas must be increasing numbers in (0, inf], got {alphas!r}."
        raise ValueError(msg)


def check_momentum(settings: Any) -> None:
    """Check that the momentum lies in [0, 1) and that the decay is not negative."""
    if not 0 <= settings.momentum < 1:
        msg = f"momentum must lie in [0, 1), got {settings.momentum!r}."
        raise ValueError(msg)
    if not 0 <= settings.decay < np.inf:
        msg = f"decay must be a finite number >= 0 per epoch, got {settings.decay!r}."
        raise ValueError(msg)


def check_images(settings: Any, *networks: str) -> None:
    """Check that there are such a data set and such networks."""
    find_source(settings.data)
    for network in networks:
        find_network(network)


class Images(NamedTuple):
    """Training and test images with their classes."""

    x: Array
    y: Array
    x_test: Array
    y_test: Array

    @property
    def test(self) -> tuple[Array, Array]:
        """The test set as `train` takes it."""
        return self.x_test, self.y_test


def load(settings: Any, data_dir: Path | None) -> Images:
    """Load the images that the settings ask for: `train` and `test` of them, 0 for all."""
    options = {"num_train": settings.train or None, "num_test": settings.test or None}
    return Images(*load_images(settings.data, data_dir, dtype=DTYPE, **options))  # pyright: ignore[reportArgumentType]


def start(network: str, seed: int, data: Images, *, width: float, gain: float) -> tuple[Model, Params]:
    """Return a network and its random parameters."""
    net = find_network(network)()
    key = jr.fold_in(jr.key(seed), 0)
    return net, net.init(key, width=width, shape=data.x.shape[1:], gain=gain, dtype=DTYPE)


def order_key(seed: int) -> Array:
    """Return the key for the order of the batches and for the augmentation."""
    return jr.fold_in(jr.key(seed), 1)


def sgd(settings: Any, step: float, num_train: int) -> optax.GradientTransformation:
    r"""Return SGD with momentum and the rate $\eta_0/(1 + \beta t)$ in epoch t.

    Equal arguments return the same object: programs are compiled anew for functions of another identity.
    """
    return _sgd(step, settings.decay, settings.momentum, max(1, num_train // settings.batch))


@functools.cache
def _sgd(step: float, decay: float, momentum: float, steps: int) -> optax.GradientTransformation:
    return optax.sgd(inverse_time_decay(step, decay, steps_per_epoch=steps), momentum)


@functools.cache
def augment_as(name: str) -> Callable[[Array, Array], Array]:
    """Return the standard augmentation: a random crop of the image framed by four black pixels, then a random flip."""
    source = find_source(name)
    black = -np.asarray(source.mean, np.float32) / np.asarray(source.std, np.float32)

    def augment(key: Array, x: Array) -> Array:
        crop, flip = jr.split(key)
        dark = jnp.asarray(black, x.dtype)[None, None, None]
        return random_flip(flip, pad_and_crop(crop, x - dark) + dark)

    return augment


def measures(training: Training) -> dict[str, Any]:
    """Return the losses and accuracies of a training by their names in a dataset."""
    return {
        "train_loss": training.loss,
        "test_loss": training.test_loss,
        "train_accuracy": training.accuracy,
        "test_accuracy": training.test_accuracy,
    }


def stability(f: Model, w0: Params, lanes: Params, x: Array, *, batch: int = 100) -> Float[Array, " lanes"]:
    """Return the stability of activations from w0 to each lane's parameters, `batch` images at a time."""

    @jax.jit
    def measure(w0: Params, lanes: Params, x: Array) -> Array:
        def lane(w: Params) -> Array:
            # All images have equally many activations, so that the mean over images is the one over activations.
            return jnp.mean(jax.lax.map(lambda one: activation_stability(f, w0, w, one[None]), x, batch_size=batch))

        return jax.lax.map(lane, lanes)

    return measure(w0, lanes, x)
