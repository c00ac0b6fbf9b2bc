"""Quadrature for the limit kernels: `python tests/kernels/make_limit_kernels.py` writes limit_kernels.json next to it.

Two layers: the expectations of supplement A.2 as integrals over the weights of one unit. Deep nets: the recursion of
`deep_kernel`'s docstring, every expectation by quadrature. NumPy and SciPy only; a minute.
"""

import itertools
import json
from pathlib import Path

import numpy as np
import scipy.integrate
import scipy.special

FILE = Path(__file__).with_name("limit_kernels.json")

ANGLES = [0.0, 1e-6, 0.1, np.pi / 4, 1.5, 2.0, 3.0, np.pi - 1e-6]
LENGTHS = [(1.0, 1.0), (0.3, 2.5)]
SPHERE_ANGLES = [0.0, 0.7, 2.2]
RADIUS, MEAN_SQ_OUTPUT = 1.7, 0.6
DEEP_ANGLES = [0.0, 0.3, 1.2, 2.8, np.pi]
DEEP_LENGTHS, DIMENSION, WEIGHT_VARIANCE = (1.5, 2.5), 5, 1.3


def relu(z):
    return np.maximum(z, 0)


def gaussian_weights(angle, lengths):
    """(input layer's part, output layer's part) for N(0, 1) weights."""
    # In the plane of x and x': a = r (cos t, sin t), both products positive for t in (angle - pi/2, pi/2).
    r1, r2 = lengths

    def integral(value):
        def density(r, t):
            z1, z2 = r * r1 * np.cos(t), r * r2 * np.cos(t - angle)
            return value(z1, z2) * r * np.exp(-(r**2) / 2) / (2 * np.pi)

        # Beyond r = 10 there is exp(-50).
        return scipy.integrate.dblquad(density, angle - np.pi / 2, np.pi / 2, 0, 10, epsabs=1e-13, epsrel=1e-13)[0]

    slopes = r1 * r2 * np.cos(angle) * integral(lambda z1, z2: 1.0)
    return slopes, integral(lambda z1, z2: relu(z1) * relu(z2))


def weights_on_a_sphere(angle):
    """(input layer's part, output layer's part) for a uniform on the sphere of radius R in R^3, so E|a|^2 = R^2."""

    def integral(value):
        def density(polar, t):
            in_plane = RADIUS * np.sin(polar)
            z1, z2 = in_plane * np.cos(t), in_plane * np.cos(t - angle)
            return value(z1, z2) * np.sin(polar) / (4 * np.pi)

        return scipy.integrate.dblquad(density, angle - np.pi / 2, np.pi / 2, 0, np.pi, epsabs=1e-13, epsrel=1e-13)[0]

    slopes = integral(lambda z1, z2: MEAN_SQ_OUTPUT * np.cos(angle))
    return slopes, integral(lambda z1, z2: relu(z1) * relu(z2))


def relu_means(q1, q2, c):
    """E relu relu and E relu' relu' of a Gaussian pair: the angular integral, the radial one is E r^2 = 2."""
    angle = np.arctan2(np.sqrt(max(q1 * q2 - c**2, 0)), c)
    product = lambda t: relu(np.cos(t)) * relu(np.cos(t - angle)) / np.pi
    value, _ = scipy.integrate.quad(product, angle - np.pi / 2, np.pi / 2, epsabs=1e-14)
    return np.sqrt(q1 * q2) * value, (np.pi - angle) / (2 * np.pi)


NODES, WEIGHTS = np.polynomial.hermite_e.hermegauss(120)


def erf_means(q1, q2, c):
    """E erf erf and E erf' erf' of a Gaussian pair by Gauss-Hermite in two dimensions."""
    erf, slope = scipy.special.erf, lambda z: 2 / np.sqrt(np.pi) * np.exp(-(z**2))
    z1 = np.sqrt(q1) * NODES[:, None]
    z2 = (c * NODES[:, None] + np.sqrt(max(q1 * q2 - c**2, 0)) * NODES[None, :]) / np.sqrt(q1)
    mass = np.outer(WEIGHTS, WEIGHTS) / (2 * np.pi)
    return np.sum(mass * erf(z1) * erf(z2)), np.sum(mass * slope(z1) * slope(z2))


def recursion(angle, depth, activation, bias):
    """Tangent kernel and covariance of two vectors at an angle."""
    means = {"relu": relu_means, "erf": erf_means}[activation]
    r1, r2 = DEEP_LENGTHS
    products = (r1**2, r2**2, r1 * r2 * np.cos(angle))
    q1, q2, c = (WEIGHT_VARIANCE * product / DIMENSION + bias for product in products)
    tangent = c
    for _ in range(depth):
        value, slope = means(q1, q2, c)
        q1, q2 = (WEIGHT_VARIANCE * means(q, q, q)[0] + bias for q in (q1, q2))
        c = WEIGHT_VARIANCE * value + bias
        tangent = c + WEIGHT_VARIANCE * slope * tangent
    return tangent, c


def main():
    nets = itertools.product(("relu", "erf"), (0.0, 0.4), (1, 2, 4))
    values = {
        "gaussian": [[*gaussian_weights(angle, pair), angle, *pair] for angle in ANGLES for pair in LENGTHS],
        "sphere": [[*weights_on_a_sphere(angle), angle] for angle in SPHERE_ANGLES],
        "deep": [
            {
                "activation": activation,
                "bias": bias,
                "depth": depth,
                "values": [[*recursion(angle, depth, activation, bias), angle] for angle in DEEP_ANGLES],
            }
            for activation, bias, depth in nets
        ],
    }
    FILE.write_text(json.dumps(values, indent=1) + "\n")


if __name__ == "__main__":
    main()
