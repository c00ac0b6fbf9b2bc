"""What the figures of deep networks share: augmentation, and the stability of activations."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

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
    color = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
    assert jax.eval_shape(deep.augment_as("cifar10"), jr.key(1), color) == color


class Dense(eqx.Module):
    """One layer, whose activations `stability` compares."""

    def __call__(self, w, x):
        return x @ w

    def preactivations(self, w, x):
        return [x @ w]


def test_stability_is_that_of_all_images_at_once():
    rng = np.random.default_rng(1)
    w0, x = rng.normal(size=(4, 6)), rng.normal(size=(10, 4))
    lanes = np.stack([w0, w0 + 0.5 * rng.normal(size=(4, 6))])
    found = deep.stability(Dense(), w0, lanes, jnp.asarray(x), batch=3)
    same = [np.mean((x @ w > 0) == (x @ w0 > 0)) for w in lanes]
    assert same[0] == 1 > same[1]
    np.testing.assert_allclose(found, same, rtol=1e-6)


def test_equal_optimizers_are_one():
    """Another object would compile every program of a training anew."""
    settings = Settings()
    assert deep.sgd(settings, 0.1, 4000) is deep.sgd(Settings(seeds=5), 0.1, 4000)
    assert deep.sgd(settings, 0.1, 4000) is not deep.sgd(settings, 0.2, 4000)
