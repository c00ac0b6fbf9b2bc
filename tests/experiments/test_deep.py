"""What the figures of deep networks share: augmentation, and the stability of activations."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

import lazyjax as lj
from figures import TINY
from lazyjax.data.images import load_images
from lazyjax.experiments import deep
from lazyjax.experiments.fig3a_fig7a_deep_scale import Settings


def test_black_is_what_crops_bring_in():
    """With the paper's augmentation a pixel is one of the image's own, or black."""
    data = load_images("digits", num_train=8, dtype=jnp.float32)
    x = jax.jit(deep.augment_as("digits"))(jr.key(0), data.x)
    assert x.shape == data.x.shape
    black = -0.3053 / 0.3760
    for old, new in zip(np.asarray(data.x), np.asarray(x), strict=True):
        levels = np.unique(np.concatenate([old.ravel(), [black]]))
        assert np.abs(new.ravel()[:, None] - levels[None]).min(axis=1).max() < 1e-5
    assert not np.allclose(x, data.x)
    color = jax.jit(deep.augment_as("cifar10"))(jr.key(1), np.zeros((2, 32, 32, 3), np.float32))
    np.testing.assert_allclose(color[0, 16, 16], 0, atol=1e-6)


def test_stability_is_that_of_all_images_at_once(tiny):
    settings = Settings(**TINY, network=tiny)
    data = deep.load(settings, None)
    f, w0 = deep.start(tiny, 3, data, width=settings.width, gain=1.0)
    rng = np.random.default_rng(1)
    w = jax.tree.map(lambda leaf: np.asarray(leaf) + 0.1 * rng.normal(size=leaf.shape).astype(np.float32), w0)
    lanes = jax.tree.map(lambda a, b: np.stack([a, b]), w0, w)
    found = deep.stability(f, w0, lanes, data.x_test, batch=7)
    assert float(found[0]) == 1
    np.testing.assert_allclose(found[1], lj.laziness.activation_stability(f, w0, w, data.x_test), rtol=1e-6)


def test_equal_optimizers_are_one():
    """Another object would compile every program of a training anew."""
    settings = Settings()
    assert deep.sgd(settings, 0.1, 4000) is deep.sgd(Settings(seeds=5), 0.1, 4000)
    assert deep.sgd(settings, 0.1, 4000) is not deep.sgd(settings, 0.2, 4000)
