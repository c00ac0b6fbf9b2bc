"""The random net for which the tests of the theory state how sharp each bound is."""

import jax.numpy as jnp
import numpy as np

import lazyjax as lj
from problems import Problem

# Drawn once by `two_layer().init` and from a normal law.
A = np.array([-0.7943, 0.9334, 0.6718, -2.2738, 0.9910, -1.0382, 0.8955, -0.3693, -1.5081, -0.3581, -1.2459, 0.8735])
B = np.array(
    [
        [0.7645, 0.3433, -0.2843],
        [0.5492, -0.5317, 1.4500],
        [0.3743, -0.5868, 0.8035],
        [-0.6199, -0.8695, 0.4926],
        [0.0156, -0.3136, 0.1957],
        [-0.3605, 0.5660, -1.6516],
        [0.0355, 0.9564, 0.2014],
        [-1.6028, -2.0608, 0.4519],
        [-0.2807, -1.4919, 0.7139],
        [-0.8592, 0.7860, -0.1834],
        [0.8972, 0.7483, -0.3742],
        [-0.5842, 0.3913, 1.1007],
    ]
)
X = np.array(
    [
        [2.3129, 0.2577, 0.7296],
        [1.8939, 1.8672, 0.8955],
        [-0.4588, 0.2426, -0.6782],
        [1.9848, -0.1412, 1.1668],
        [0.8825, -0.8068, -2.0998],
    ]
)
TARGET = np.array([0.3519, 0.6222, 0.2321, 0.0024, -0.8859])


def measured_net() -> Problem:
    """A centered two-layer tanh net of 12 neurons on 5 samples in R^3."""
    w0, x, target = {"a": jnp.asarray(A), "b": jnp.asarray(B)}, jnp.asarray(X), jnp.asarray(TARGET)
    f = lj.center(lj.models.two_layer(jnp.tanh), w0)
    return Problem(lj.on_data(f, x), w0, lj.square_loss(target), target, f, x)
