"""The paper's shallow models against plain NumPy: formulas, variances of the starts, what is refused."""

import jax
import jax.flatten_util
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import lazyjax as lj


def normal(seed, *shape, dtype=float):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape).astype(dtype))


def net_start(width):
    return {"a": normal(0, width), "b": normal(1, width, 3)}


# ---- the formulas ----


def test_two_layer_is_its_formula():
    w, x = net_start(4), normal(1, 5, 3)
    a, b = np.asarray(w["a"]), np.asarray(w["b"])
    expected = [sum(a[j] * max(b[j] @ row, 0) for j in range(4)) for row in np.asarray(x)]
    np.testing.assert_allclose(lj.models.two_layer()(w, x), expected, rtol=1e-14, atol=1e-15)
    np.testing.assert_allclose(lj.models.two_layer(jnp.tanh)(w, x), np.tanh(np.asarray(x) @ b.T) @ a, rtol=1e-13)
    np.testing.assert_allclose(lj.models.two_layer().preactivations(w, x)[0], np.asarray(x) @ b.T, rtol=1e-14)


def test_mlp_is_its_formula_with_biases():
    w = lj.models.mlp().init(jr.key(0), [3, 6, 4, 2])
    for i, layer in enumerate(w):  # biases start at zero, where they would not be seen
        layer["bias"] = normal(i, *layer["bias"].shape)
    x = np.asarray(normal(9, 5, 3))
    z1 = x @ np.asarray(w[0]["weight"]).T + np.asarray(w[0]["bias"])
    z2 = np.maximum(z1, 0) @ np.asarray(w[1]["weight"]).T + np.asarray(w[1]["bias"])
    out = np.maximum(z2, 0) @ np.asarray(w[2]["weight"]).T + np.asarray(w[2]["bias"])
    np.testing.assert_allclose(lj.models.mlp()(w, jnp.asarray(x)), out, rtol=1e-13, atol=1e-14)
    hidden = lj.models.mlp().preactivations(w, jnp.asarray(x))
    for got, expected in zip(hidden, [z1, z2], strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-13, atol=1e-14)


def test_diagonal_linear_is_its_formula_and_starts_at_zero():
    w = {"u": normal(0, 3), "v": normal(1, 3)}
    x = normal(2, 4, 3)
    expected = np.asarray(x) @ (np.asarray(w["u"]) ** 2 - np.asarray(w["v"]) ** 2)
    np.testing.assert_allclose(lj.models.diagonal_linear()(w, x), expected, rtol=1e-13, atol=1e-14)
    start = lj.models.diagonal_linear().init(d=3, tau=0.7, dtype=jnp.float32)
    assert [leaf.dtype for leaf in jax.tree.leaves(start)] == [jnp.float32] * 2
    np.testing.assert_array_equal(start["u"], np.full(3, 0.7, np.float32))
    np.testing.assert_array_equal(lj.models.diagonal_linear()(start, x.astype(jnp.float32)), np.zeros(4))


def test_the_relu_two_layer_net_is_2_homogeneous():
    f, w, x = lj.models.two_layer(), net_start(8), normal(1, 5, 3)

    @jax.jit
    def both(w):
        return jax.jvp(lambda v: f(v, x), (w,), (w,))

    h, euler = both(w)
    np.testing.assert_allclose(euler, 2 * h, rtol=1e-13)
    scaled, _ = both(jax.tree.map(lambda leaf: 3.0 * leaf, w))
    np.testing.assert_allclose(scaled, 9 * h, rtol=1e-13)


# ---- the inits ----


def test_two_layer_weights_have_mean_zero_and_standard_deviation_tau():
    tau, m, d = 0.5, 200, 300
    w = lj.models.two_layer().init(jr.key(1), d=d, width=m, tau=tau)
    for leaf in (w["a"], w["b"]):
        z = np.asarray(leaf).ravel() / tau
        # Five standard errors of the mean, of the variance, and of the fourth moment, which is 3 of a Gaussian.
        assert abs(z.mean()) < 5 / np.sqrt(z.size)
        assert abs((z**2).mean() - 1) < 5 * np.sqrt(2 / z.size)
        assert abs((z**4).mean() - 3) < 5 * np.sqrt(96 / z.size)
    # The layers are independent draws.
    assert abs(np.corrcoef(np.asarray(w["a"]), np.asarray(w["b"])[:, 0])[0, 1]) < 5 / np.sqrt(m)


def test_mlp_weights_have_xaviers_variance_times_the_gain_squared():
    w = lj.models.mlp().init(jr.key(1), [300, 200, 50], gain=3.0)
    for layer, (n_in, n_out) in zip(w, [(300, 200), (200, 50)], strict=True):
        z = np.asarray(layer["weight"]).ravel() / (3 * np.sqrt(2 / (n_in + n_out)))
        assert layer["weight"].shape == (n_out, n_in)
        assert abs(z.mean()) < 5 / np.sqrt(z.size)
        assert abs((z**2).mean() - 1) < 5 * np.sqrt(2 / z.size)
        np.testing.assert_array_equal(layer["bias"], np.zeros(n_out))


def test_a_symmetric_init_mirrors_its_second_half():
    w = lj.models.two_layer().init(jr.key(0), d=3, width=8, symmetric=True)
    np.testing.assert_array_equal(w["a"][4:], -w["a"][:4])
    np.testing.assert_array_equal(w["b"][4:], w["b"][:4])
    assert len(np.unique(np.abs(w["a"]))) == 4
    x = normal(1, 5, 3)
    np.testing.assert_allclose(lj.models.two_layer(jnp.tanh)(w, x), 0, atol=1e-14)


def test_inits_have_the_dtype_asked_for_or_jaxs_default():
    key = jr.key(0)
    for dtype, expected in [(jnp.float32, jnp.float32), (None, jnp.float64)]:
        trees = [
            lj.models.two_layer().init(key, d=2, width=4, tau=0.5, symmetric=True, dtype=dtype),
            lj.models.mlp().init(key, [2, 3], gain=2.0, dtype=dtype),
            lj.models.diagonal_linear().init(d=2, tau=0.1, dtype=dtype),
        ]
        assert {leaf.dtype for leaf in jax.tree.leaves(trees)} == {jnp.dtype(expected)}


def test_tau_and_gain_may_be_traced_so_that_a_sweep_compiles_once():
    jax.jit(lambda s: (lj.models.mlp().init(jr.key(0), [2, 3], gain=s), lj.models.diagonal_linear().init(d=2, tau=s)))(
        2.0
    )
    lanes = jax.jit(jax.vmap(lambda tau: lj.models.two_layer().init(jr.key(0), d=2, width=3, tau=tau)["b"]))(
        jnp.array([1.0, 2.0])
    )
    np.testing.assert_array_equal(lanes[1], 2 * lanes[0])
    np.testing.assert_array_equal(lanes[0], lj.models.two_layer().init(jr.key(0), d=2, width=3)["b"])


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (
            lambda: lj.models.two_layer().init(jr.key(0), d=0, width=3),
            "d and width must be at least 1, got d=0, width=3",
        ),
        (lambda: lj.models.two_layer().init(jr.key(0), d=3, width=0), "got d=3, width=0"),
        (
            lambda: lj.models.two_layer().init(jr.key(0), d=3, width=4, tau=0.0),
            "tau must be a positive standard deviation, got 0.0",
        ),
        (lambda: lj.models.two_layer().init(jr.key(0), d=3, width=4, tau=jnp.nan), "tau must be a positive"),
        (
            lambda: lj.models.two_layer().init(jr.key(0), d=3, width=5, symmetric=True),
            "width must be even .* got 5; use 6",
        ),
        (lambda: lj.models.mlp().init(jr.key(0), [3]), r"at least two positive widths .* got \(3,\)"),
        (lambda: lj.models.mlp().init(jr.key(0), [3, 0, 1]), r"got \(3, 0, 1\)"),
        (lambda: lj.models.mlp().init(jr.key(0), [3, 1], gain=0.0), "gain must be a positive factor, got 0.0"),
        (lambda: lj.models.mlp().init(jr.key(0), [3, 1], gain=jnp.nan), "gain must be a positive"),
        (lambda: lj.models.diagonal_linear().init(d=0), "d must be at least 1, got 0"),
        (lambda: lj.models.diagonal_linear().init(d=2, tau=-1.0), "tau must be a positive scale, got -1.0"),
        (lambda: lj.models.diagonal_linear().init(d=2, tau=jnp.nan), "tau must be a positive"),
    ],
)
def test_unfit_arguments_are_refused(call, match):
    with pytest.raises(ValueError, match=match):
        call()
