"""A small convolutional network in Equinox, for `lazyjax report`.

On the handwritten digits that come with scikit-learn:

    lazyjax report --model examples/equinox_cnn.py:build

On images of your own, 8 x 8 pixels and ten classes (change the two numbers below for others):

    import numpy as np
    np.savez("my.npz", x=images, y=labels, x_test=more_images, y_test=more_labels)  # the test data may be left out

    lazyjax report --model examples/equinox_cnn.py:build --data my.npz
"""

import equinox as eqx
import jax
import jax.random as jr

SIDE = 8
CLASSES = 10
CHANNELS = 8


class CNN(eqx.Module):
    """One image (1, SIDE, SIDE) to one output a class."""

    conv: eqx.nn.Conv2d
    pool: eqx.nn.MaxPool2d
    head: eqx.nn.Linear

    def __init__(self, key):
        key_conv, key_head = jr.split(key)
        self.conv = eqx.nn.Conv2d(1, CHANNELS, kernel_size=3, padding=1, key=key_conv)
        self.pool = eqx.nn.MaxPool2d(kernel_size=2, stride=2)
        self.head = eqx.nn.Linear(CHANNELS * (SIDE // 2) ** 2, CLASSES, key=key_head)

    def __call__(self, image):
        features = self.pool(jax.nn.relu(self.conv(image)))
        return self.head(features.ravel())


def build(key):
    """What `lazyjax report` calls: f(params, x) for a batch x, and the parameters to start from."""
    params, static = eqx.partition(CNN(key), eqx.is_inexact_array)

    def f(params, x):
        model = eqx.combine(params, static)
        return jax.vmap(model)(x.reshape(-1, 1, SIDE, SIDE))

    return f, params
