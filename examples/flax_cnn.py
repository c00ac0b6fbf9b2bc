"""A small convolutional network in Flax, for `lazyjax report` (needs `pip install flax`).

On the handwritten digits that come with scikit-learn:

    lazyjax report --model examples/flax_cnn.py:build

On images of your own, 8 x 8 pixels and ten classes (change the two numbers below for others):

    import numpy as np
    np.savez("my.npz", x=images, y=labels, x_test=more_images, y_test=more_labels)  # the test data may be left out

    lazyjax report --model examples/flax_cnn.py:build --data my.npz
"""

import flax.linen as nn
import jax.numpy as jnp

SIDE = 8
CLASSES = 10
CHANNELS = 8


class CNN(nn.Module):
    """A batch of flat images (n, SIDE * SIDE) to one output a class."""

    @nn.compact
    def __call__(self, x):
        dtype = jnp.result_type(float)  # float32, or float64 after --x64
        x = x.reshape(-1, SIDE, SIDE, 1)
        x = nn.relu(nn.Conv(CHANNELS, kernel_size=(3, 3), param_dtype=dtype)(x))
        x = nn.max_pool(x, window_shape=(2, 2), strides=(2, 2))
        return nn.Dense(CLASSES, param_dtype=dtype)(x.reshape(x.shape[0], -1))


def build(key):
    """What `lazyjax report` calls: f(params, x) for a batch x, and the parameters to start from."""
    model = CNN()
    return model.apply, model.init(key, jnp.zeros((1, SIDE**2)))
