"""Limit kernels against quadrature, wide nets, finite differences and themselves at other precisions.

The values of the quadrature are in limit_kernels.json, made by make_limit_kernels.py next to this file.
"""

import itertools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import lazyjax as lj
from lazyjax.kernels.infinite_width import arccos_kernel, deep_kernel

LAYERS = ["input", "output", "both"]
PARTS = ["input", "both"]
"""The output layer's part is the difference of the two."""
NETS = [("relu", 0.0), ("relu", 0.4), ("erf", 0.0), ("erf", 0.4)]

# What a user calls: under the tests' hook the annotations would speak before the checks.
users_arccos = getattr(arccos_kernel, "__wrapped__", arccos_kernel)
users_deep = getattr(deep_kernel, "__wrapped__", deep_kernel)


QUADRATURE = json.loads(Path(__file__).with_name("limit_kernels.json").read_text())


def pair_at(angle, *, d=5, lengths=(1.0, 1.0), seed=0):
    """Two vectors of R^d of these lengths at this angle, in a random plane."""
    frame, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(d, 2)))
    x1, x2 = (r * (frame @ [np.cos(t), np.sin(t)]) for r, t in zip(lengths, (0.0, angle), strict=True))
    return jnp.asarray(x1), jnp.asarray(x2)


def pairs_at(angles, *, lengths=(1.0, 1.0), dtype=float, **options):
    """(n, d) and (n, d): as `pair_at` for each angle, with one pair of lengths or one for each angle."""
    lengths = np.broadcast_to(lengths, (len(angles), 2))
    pairs = [pair_at(angle, lengths=pair, **options) for angle, pair in zip(angles, lengths, strict=True)]
    return tuple(jnp.asarray(np.asarray(side, dtype)) for side in zip(*pairs, strict=True))


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


# ---- equation (8) ----


class TestAgainstQuadrature:
    """The expectations of supplement A.2 as integrals over the weights of one unit."""

    def test_gaussian_weights(self):
        slopes, values, angles, *lengths = np.transpose(QUADRATURE["gaussian"])
        x1, x2 = pairs_at(angles, lengths=np.transpose(lengths))
        for layer, expected in zip(LAYERS, (slopes, values, slopes + values), strict=True):
            np.testing.assert_allclose(np.diag(arccos_kernel(x1, x2, layer=layer)), expected, rtol=0, atol=1e-11)

    def test_weights_on_a_sphere_and_other_second_moments(self):
        # Rotation invariant and far from Gaussian: a uniform on the sphere of radius 1.7 in R^3, so E|a|^2 = 1.7^2.
        slopes, values, angles = np.transpose(QUADRATURE["sphere"])
        x1, x2 = pairs_at(angles, d=3)
        moments = {"mean_sq_output": 0.6, "mean_sq_input": 1.7**2}
        for layer, expected in zip(LAYERS, (slopes, values, slopes + values), strict=True):
            k = arccos_kernel(x1, x2, layer=layer, **moments)
            np.testing.assert_allclose(np.diag(k), expected, rtol=0, atol=1e-11)


def test_special_values():
    x1, x2 = pairs_at(np.pi * np.array([0, 1 / 4, 1 / 2, 3 / 4, 1]))
    expected = [1.0, 0.6428696254, 0.1591549431, -0.0642371558, 0.0]
    np.testing.assert_allclose(np.diag(arccos_kernel(x1, x2, layer="both")), expected, rtol=0, atol=1e-10)


def test_a_matrix_holds_all_pairs_and_vectors_give_numbers():
    x1, x2 = normal(0, 4, 3), normal(1, 2, 5, 3)
    k = arccos_kernel(x1, x2, layer="both", mean_sq_output=2.0, mean_sq_input=4.0)
    assert k.shape == (4, 2, 5)
    parts = 2 * arccos_kernel(x1, x2, layer="input") + 4 / 3 * arccos_kernel(x1, x2, layer="output")
    np.testing.assert_allclose(k, parts, rtol=1e-14)
    one = jax.jit(lambda a, b: arccos_kernel(a, b, layer="both", mean_sq_output=2.0, mean_sq_input=4.0))
    np.testing.assert_allclose(k[1, 1, 2], one(x1[1], x2[1, 2]), rtol=1e-14)
    mapped = jax.vmap(lambda a: jax.vmap(lambda b: one(a, b))(x2[0]))(x1)
    np.testing.assert_allclose(k[:, 0], mapped, rtol=1e-13, atol=1e-15)


def test_homogeneous_of_degree_one_at_any_size():
    x = jnp.asarray(pair_at(0.3))
    k = arccos_kernel(x, x, layer="both")
    for size in (1e-120, 1e120):
        np.testing.assert_allclose(arccos_kernel(size * x, x, layer="both") / size, k, rtol=1e-14)


@pytest.mark.parametrize("layer", LAYERS)
def test_a_gram_is_symmetric_without_negative_eigenvalues(layer):
    x = normal(0, 40, 3)
    x = jnp.asarray(np.concatenate([x, 2 * x[:3], -x[:3], np.zeros((1, 3))]))
    k = np.asarray(arccos_kernel(x, x, layer=layer))
    np.testing.assert_array_equal(k, k.T)
    values = np.linalg.eigvalsh(k)
    assert values[0] > -50 * np.finfo(float).eps * values[-1]


def test_the_memory_of_a_large_matrix_is_that_of_the_matrix():
    # 400 x 400 x 1000 differences would be 1.3 GB, and as much again for the gradient.
    x = jnp.ones((400, 1000))
    kernel = lambda x: arccos_kernel(x, x, layer="both")
    for f in (kernel, jax.grad(lambda x: kernel(x).sum())):
        memory = jax.jit(f).lower(x).compile().memory_analysis()
        assert memory.temp_size_in_bytes < 50 * 2**20


# ---- gradients ----


def derivatives(f):
    """Both gradients of f(x1, x2), and central differences: their error is step^2, at a kink of order step."""
    many, gradients = jax.jit(jax.vmap(f)), jax.jit(jax.grad(f, (0, 1)))

    def differences(x1, x2, step):
        moves = step * jnp.concatenate([jnp.eye(x1.size), -jnp.eye(x1.size)])
        first, second = x1[None] + moves, x2[None] + moves
        values = many(
            jnp.concatenate([first, jnp.broadcast_to(x1, first.shape)]),
            jnp.concatenate([jnp.broadcast_to(x2, first.shape), second]),
        )
        up1, down1, up2, down2 = np.asarray(values).reshape(4, -1)
        return (up1 - down1) / (2 * step), (up2 - down2) / (2 * step)

    return gradients, differences


@pytest.mark.parametrize("layer", PARTS)
class TestGradient:
    def test_smooth_points(self, layer):
        f = lambda a, b: arccos_kernel(a, b, layer=layer, mean_sq_output=0.7)
        gradients, differences = derivatives(f)
        for angle in (0.02, 0.8, np.pi / 2, 2.5, 3.1):
            x = pair_at(angle, lengths=(0.8, 1.9))
            # Third derivatives are of order 1/angle^2: the error is (1e-5/0.02)^2, rounding 1e-16/1e-5.
            np.testing.assert_allclose(gradients(*x), differences(*x, 1e-5), atol=1e-6)
            np.testing.assert_allclose(jax.jacfwd(f)(*x), gradients(*x)[0], rtol=1e-12, atol=1e-14)

    def test_parallel_and_opposite_vectors(self, layer):
        gradients, differences = derivatives(lambda a, b: arccos_kernel(a, b, layer=layer))
        x1, _ = pair_at(0.0)
        # 3 x is parallel to x only up to rounding, -x exactly.
        for factor in (1.0, 3.0, 0.7, -1.0, -3.0):
            x2 = factor * x1
            first, second = gradients(x1, x2)
            np.testing.assert_allclose((first, second), differences(x1, x2, 1e-6), atol=1e-5)
            # By the formula (pi - angle) x2 / (2 pi), and for the output layer's part the same.
            expected = (2 if layer == "both" else 1) * (x2 / 2 if factor > 0 else 0 * x2)
            np.testing.assert_allclose(first, expected, atol=1e-12)

    def test_zero(self, layer):
        gradients, differences = derivatives(lambda a, b: arccos_kernel(a, b, layer=layer))
        x, zero = pair_at(0.0)[0], jnp.zeros(5)
        at_zero, at_other = gradients(zero, x)
        np.testing.assert_allclose(at_zero, differences(zero, x, 1e-6)[0], atol=1e-9)
        np.testing.assert_allclose(at_zero, x / 4 * (2 if layer == "both" else 1), rtol=1e-14)
        np.testing.assert_array_equal(at_other, 0)
        np.testing.assert_array_equal(gradients(zero, zero), 0)

    def test_second_derivatives(self, layer):
        f = lambda a, b: arccos_kernel(a, b, layer=layer)
        slope, curvature = jax.jit(jax.grad(f)), jax.jit(jax.hessian(f))
        x1, x2 = pair_at(0.8)
        step = 1e-5
        expected = [(slope(x1 + step * e, x2) - slope(x1 - step * e, x2)) / (2 * step) for e in jnp.eye(5)]
        np.testing.assert_allclose(curvature(x1, x2), np.stack(expected), atol=1e-8)
        for a, b in itertools.product([x1, -x1, jnp.zeros(5)], repeat=2):
            assert jnp.isfinite(curvature(a, b)).all()

    def test_a_matrix_with_all_kinds_of_pairs_in_float32(self, layer):
        x1, x2 = (x.astype(jnp.float32) for x in pair_at(0.8))
        x = jnp.stack([x1, x2, -x1, 4 * x2, x1 + 1e-7 * x2, jnp.zeros(5, jnp.float32)])
        k, pullback = jax.vjp(jax.jit(lambda a: arccos_kernel(a, x, layer=layer)), x)
        (gradient,) = pullback(jnp.ones_like(k))
        assert gradient.dtype == k.dtype == jnp.float32
        wide = x.astype(float)
        exact = jax.vjp(lambda a: arccos_kernel(a, wide, layer=layer), wide)[1](jnp.ones((6, 6)))[0]
        # Rounding decides the direction of the input layer's slope, of size |x'|/2 at most, for x1 and x1 + 1e-7 x2.
        near = np.array([0, 2, 4])
        np.testing.assert_allclose(gradient[near], exact[near], atol=1e-5 if layer == "output" else 1.5)
        np.testing.assert_allclose(np.delete(gradient, near, 0), np.delete(exact, near, 0), atol=1e-5)


# ---- digits ----

SMALL_ANGLES = [0.0, 1e-7, 1e-6, 1e-5, 1e-4, 3e-4, 1e-3, 1e-2, 0.1, 0.5]


@pytest.mark.parametrize("layer", LAYERS)
def test_float32_keeps_its_digits_near_angle_zero(layer):
    for d in (3, 50):
        single = pairs_at(SMALL_ANGLES, d=d, lengths=(0.7, 1.8), dtype=np.float32)
        exact = arccos_kernel(*(jnp.asarray(np.asarray(x, float)) for x in single), layer=layer)
        np.testing.assert_allclose(np.diag(arccos_kernel(*single, layer=layer)), np.diag(exact), rtol=1e-6)


def test_float32_by_arccos_of_the_cosine_would_not():
    x1, x2 = (x.astype(jnp.float32) for x in pair_at(3e-4))
    cosine = jnp.clip(x1 @ x2 / (jnp.linalg.norm(x1) * jnp.linalg.norm(x2)), -1, 1)
    naive = cosine * (jnp.pi - jnp.arccos(cosine)) / (2 * jnp.pi)
    exact = float(arccos_kernel(x1.astype(float), x2.astype(float), layer="input"))
    assert abs(float(naive) / exact - 1) > 1e-5


def test_float32_near_the_opposite_direction():
    gaps = np.array([1e-6, 1e-4, 1e-2])
    single = pairs_at(np.pi - gaps, dtype=np.float32)
    exact = np.diag(arccos_kernel(*(jnp.asarray(np.asarray(x, float)) for x in single), layer="input"))
    # Relative to a value of -gap / (2 pi): rounding in the unit vectors is 1e-7 next to the gap.
    errors = np.abs(np.diag(arccos_kernel(*single, layer="input")) / exact - 1)
    assert (errors <= 1e-6 + 2e-7 / gaps).all()


@pytest.mark.parametrize(("activation", "bias"), NETS)
@pytest.mark.parametrize(("depth", "d"), [(1, 3), (5, 50)])
def test_deep_kernels_in_float32_keep_their_digits(activation, bias, depth, d):
    f = lambda a, b: deep_kernel(a, b, depth=depth, activation=activation, weight_variance=1.8, bias_variance=bias)
    single = pairs_at([*SMALL_ANGLES, 1.5, 3.0, np.pi], d=d, lengths=(2.0, 1.8), dtype=np.float32)
    wide = tuple(jnp.asarray(np.asarray(x, float)) for x in single)
    got, exact, scale = f(*single), f(*wide), f(wide[0], wide[0])
    # At obtuse angles without biases a kernel is a small difference: measured against the one at angle zero.
    for name in ("tangent", "covariance"):
        assert getattr(got, name).dtype == jnp.float32
        error = np.abs(np.diag(getattr(got, name)) - np.diag(getattr(exact, name)))
        assert (error <= 2e-6 * np.diag(getattr(scale, name))).all()


def test_erf_of_large_preactivations_in_float32():
    x1, x2 = (x.astype(jnp.float32) for x in pair_at(1e-3, lengths=(300.0, 300.0)))
    f = lambda a, b: deep_kernel(a, b, depth=2, activation="erf").tangent
    assert float(f(x1, x2)) == pytest.approx(float(f(x1.astype(float), x2.astype(float))), rel=2e-6)
    assert float(f(x1, x1)) == pytest.approx(float(f(x1.astype(float), x1.astype(float))), rel=2e-6)


# ---- deep nets ----


@pytest.mark.parametrize("activation", ["relu", "erf"])
def test_deep_kernels_are_the_recursion_by_quadrature(activation):
    for case in QUADRATURE["deep"]:
        if case["activation"] != activation:
            continue
        tangent, covariance, angles = np.transpose(case["values"])
        x1, x2 = pairs_at(angles, lengths=(1.5, 2.5))
        options = {"depth": case["depth"], "activation": activation}
        k = deep_kernel(x1, x2, **options, weight_variance=1.3, bias_variance=case["bias"])
        # At angle 0 the quadrature's own angle is sqrt(eps) off; a slope's error is that over 2 pi.
        loose = (activation == "relu") & ((angles == 0) | (angles == np.pi))
        tolerance = np.where(loose, 1e-7, 1e-10)
        for got, expected in ((k.tangent, tangent), (k.covariance, covariance)):
            assert (np.abs(np.diag(got) - expected) <= tolerance * (1 + np.abs(expected))).all(), case


def test_one_hidden_relu_layer_is_equation_8():
    x1, x2 = normal(0, 6, 4), normal(1, 5, 4)
    x2 = x2.at[0].set(2 * x1[0]).at[1].set(-x1[1]).at[2].set(0)
    for variance in (1.0, 1.7):
        k = deep_kernel(x1, x2, depth=1, weight_variance=variance)
        factor = variance**2 / 4
        np.testing.assert_allclose(k.tangent, factor * arccos_kernel(x1, x2, layer="both"), rtol=1e-12, atol=1e-15)
        np.testing.assert_allclose(k.covariance, factor * arccos_kernel(x1, x2, layer="output"), rtol=1e-12, atol=1e-15)


def test_variance_two_keeps_the_variance_of_relu_nets_at_any_depth():
    # On the diagonal q = 2|x|^2/d at every layer, and the tangent kernel has one such term a layer.
    x = normal(0, 3, 4)
    for depth in (1, 10, 200):
        k = deep_kernel(x, x, depth=depth, weight_variance=2.0)
        expected = 2 * np.sum(np.asarray(x) ** 2, 1) / 4
        np.testing.assert_allclose(np.diag(k.covariance), expected, rtol=1e-13)
        np.testing.assert_allclose(np.diag(k.tangent), (depth + 1) * expected, rtol=1e-12)


@pytest.mark.parametrize(("activation", "bias"), NETS)
def test_deep_grams_are_symmetric_without_negative_eigenvalues(activation, bias):
    x = normal(0, 30, 3)
    x = jnp.asarray(np.concatenate([x, 2 * x[:3], -x[:3], np.zeros((1, 3))]))
    k = deep_kernel(x, x, depth=3, activation=activation, bias_variance=bias)
    for matrix in (np.asarray(k.tangent), np.asarray(k.covariance)):
        np.testing.assert_allclose(matrix, matrix.T, rtol=1e-14, atol=1e-16)
        values = np.linalg.eigvalsh(matrix)
        assert values[0] > -100 * np.finfo(float).eps * values[-1]


def ntk_net(activation, weight, bias):
    """`lj.models.mlp` in the NTK parametrization, as the docstring says to make it."""
    f = lj.models.mlp({"relu": jax.nn.relu, "erf": jax.scipy.special.erf}[activation])

    def net(w, x):
        scaled = [
            {
                "weight": (weight / layer["weight"].shape[1]) ** 0.5 * layer["weight"],
                "bias": bias**0.5 * layer["bias"],
            }
            for layer in w
        ]
        return f(scaled, x)[:, 0]

    return net


@pytest.mark.parametrize(("activation", "bias"), [("relu", 0.4), ("erf", 0.0)])
def test_wide_nets_tend_to_the_deep_kernels(activation, bias, getkey):
    x = normal(0, 4, 3)
    net = ntk_net(activation, 1.4, bias)
    sizes = [3, 300, 300, 1]

    @jax.jit
    def sample(key):
        keys = iter(jr.split(key, 6))
        w = [
            {"weight": jr.normal(next(keys), (n_out, n_in)), "bias": jr.normal(next(keys), (n_out,))}
            for n_in, n_out in itertools.pairwise(sizes)
        ]
        # The last layer's own part of the tangent kernel is the mean over units that the covariance is the limit of.
        last = lj.gram(lambda layer, x: net([*w[:-1], layer], x), w[-1], x)
        return lj.gram(net, w, x), last

    tangent, covariance = (np.asarray(k) for k in jax.lax.map(sample, jr.split(getkey(), 100)))
    limit = deep_kernel(x, x, depth=2, activation=activation, weight_variance=1.4, bias_variance=bias)
    for samples, k in ((tangent, np.asarray(limit.tangent)), (covariance, np.asarray(limit.covariance))):
        scale = np.sqrt(np.outer(np.diag(k), np.diag(k)))
        deviation = samples.std(0, ddof=1) / np.sqrt(len(samples)) / scale
        # Within the sampling error of the mean and a bias of order 1/width.
        assert (np.abs(samples.mean(0) - k) / scale < 4 * deviation + 4 / 300).all()
        # Which is tight: the two kernels differ by more than half of the larger one.
        assert deviation.max() < 0.03
    assert (limit.tangent > 2 * limit.covariance).any()


def test_init_mlp_has_the_covariance_that_the_docstring_says(getkey):
    d, m, k, gain = 3, 60, 5, 1.3
    x = normal(0, 3, d)
    outputs = jax.jit(jax.vmap(lambda key: lj.models.mlp()(lj.models.mlp().init(key, [d, m, m, k], gain=gain), x)))(
        jr.split(getkey(), 1500)
    )
    samples = np.moveaxis(np.asarray(outputs), 2, 1).reshape(-1, 3)
    limit = np.asarray(deep_kernel(x, x, depth=2, weight_variance=gain**2).covariance)
    expected = 4 * d * m / ((d + m) * (m + k)) * limit
    scale = np.sqrt(np.outer(np.diag(expected), np.diag(expected)))
    # 7,500 outputs, the five of a net uncorrelated but not independent: two per cent at one standard deviation.
    assert (np.abs(samples.T @ samples / len(samples) - expected) / scale).max() < 0.06


@pytest.mark.parametrize(("activation", "bias", "depth"), [("relu", 0.0, 1), ("relu", 0.4, 3), ("erf", 0.0, 3)])
def test_gradients_of_deep_kernels(activation, bias, depth):
    f = lambda a, b: deep_kernel(a, b, depth=depth, activation=activation, bias_variance=bias).tangent
    gradients, differences = derivatives(f)
    x1, x2 = pair_at(0.8, lengths=(1.2, 1.9))
    for a, b in [(x1, x2), (x1, -x2), (x1, x1), (x1, 3 * x1), (x1, -x1)]:
        np.testing.assert_allclose(gradients(a, b), differences(a, b, 1e-6), atol=1e-5)
    zero = jnp.zeros(5)
    if bias > 0 or activation == "erf" or depth == 1:
        np.testing.assert_allclose(gradients(zero, x1)[0], differences(zero, x1, 1e-6)[0], atol=1e-5)
    for a, b in itertools.product([zero, x1, 1e-30 * x1], repeat=2):
        assert np.isfinite(gradients(a, b)).all()


def test_deep_kernels_under_vmap_and_of_traced_variances(getkey):
    x = normal(0, 4, 3)
    whole = deep_kernel(x, x, depth=2, weight_variance=1.5, bias_variance=0.1)
    mapped = jax.vmap(
        lambda a: jax.vmap(lambda b: deep_kernel(a, b, depth=2, weight_variance=1.5, bias_variance=0.1))(x)
    )
    np.testing.assert_allclose(jax.jit(mapped)(x).tangent, whole.tangent, rtol=1e-12)
    assert str(whole).startswith("tangent kernel (4, 4), from ")
    assert "covariance (4, 4)" in repr(whole)
    f = lambda weight, bias: deep_kernel(x[0], x[1], depth=2, weight_variance=weight, bias_variance=bias).tangent
    slopes = jax.jit(jax.grad(f, (0, 1)))(1.5, 0.1)
    for i, step in enumerate(((1e-6, 0.0), (0.0, 1e-6))):
        up, down = (f(1.5 + s * step[0], 0.1 + s * step[1]) for s in (1, -1))
        assert float(slopes[i]) == pytest.approx(float(up - down) / 2e-6, rel=1e-7)


# ---- what is refused ----

X = jnp.asarray(np.ones((2, 3)))
NAN = np.ones((2, 3))
NAN[1, 0] = np.nan


@pytest.mark.parametrize("f", [lambda *x: users_arccos(*x, layer="both"), lambda *x: users_deep(*x, depth=1)])
class TestInputsAreRefused:
    def test_of_two_dimensions(self, f):
        with pytest.raises(
            ValueError, match=r"x1 and x2 must hold vectors of one dimension d.* got \(2, 3\) and \(2, 4\)"
        ):
            f(X, jnp.ones((2, 4)))

    def test_not_finite(self, f):
        with pytest.raises(ValueError, match=r"x2 must be finite, but 1 of its 6 entries .* index \(1, 0\)"):
            f(X, jnp.asarray(NAN))

    @pytest.mark.parametrize("shape", [(0, 3), (2, 0), ()])
    def test_empty(self, f, shape):
        with pytest.raises(ValueError, match=r"x1 must hold at least one vector along its last axis, .* got shape"):
            f(jnp.ones(shape), X)

    def test_not_floating(self, f):
        with pytest.raises(TypeError, match=r"x1 must be real floating, got int64; convert it with `.astype"):
            f(jnp.ones((2, 3), int), X)


@pytest.mark.parametrize("f", [lambda *x: users_arccos(*x, layer="both"), lambda *x: users_deep(*x, depth=1)])
def test_nan_in_traced_inputs_stays_nan(f):
    kernel = jnp.stack(jax.tree.leaves(jax.jit(f)(X, jnp.asarray(NAN))))
    assert np.isnan(kernel[..., 1]).all()
    assert np.isfinite(kernel[..., 0]).all()


def test_an_unknown_layer_is_refused():
    with pytest.raises(ValueError, match=r'layer must be "input", "output" or "both", got \'hidden\''):
        users_arccos(X, X, layer="hidden")


@pytest.mark.parametrize("value", [-1.0, np.nan, np.inf, jnp.ones(2)])
@pytest.mark.parametrize("name", ["mean_sq_output", "mean_sq_input", "weight_variance", "bias_variance"])
def test_moments_are_finite_numbers_and_not_negative(name, value):
    f, options = (users_arccos, {"layer": "both"}) if name.startswith("mean") else (users_deep, {"depth": 1})
    with pytest.raises(ValueError, match=rf"{name} must be a finite number >= 0 .*, got"):
        f(X, X, **options, **{name: value})


@pytest.mark.parametrize("depth", [0, -1, 1.5, True])
def test_depth_is_at_least_one_layer(depth):
    with pytest.raises(ValueError, match=rf"depth must be a number of hidden layers, at least 1, got {depth}"):
        users_deep(X, X, depth=depth)


def test_an_unknown_activation_is_refused():
    with pytest.raises(ValueError, match=r'activation must be "relu" or "erf", got \'tanh\'; for others'):
        users_deep(X, X, depth=1, activation="tanh")
