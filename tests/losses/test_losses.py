"""Losses against JAX's derivatives in the metric of F, and their constants against Rayleigh quotients."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import lazyjax as lj
from helpers import relative_error
from lazyjax.losses.loss import as_loss

N, K = 6, 3


def make(name, mean, dtype=jnp.float64):
    if name == "square":
        return lj.square_loss(jr.normal(jr.key(1), (N, K), dtype), mean=mean), (N, K)
    if name == "square vector":
        return lj.square_loss(jr.normal(jr.key(1), (N,), dtype), mean=mean), (N,)
    if name == "logistic":
        return lj.logistic_loss(jnp.array([0, 1, 1, 0, 1, 0]), mean=mean), (N,)
    return lj.softmax_cross_entropy(jnp.array([0, 1, 2, 2, 1, 0]), mean=mean), (N, K)


def by_hand(name, loss, y):
    """The sum over samples in plain NumPy."""
    if name.startswith("square"):
        return 0.5 * np.sum((y - np.asarray(loss.minimizer)) ** 2)
    if name == "logistic":
        return np.sum(np.log1p(np.exp(-np.array([-1, 1, 1, -1, 1, -1]) * y)))
    p = np.exp(y) / np.exp(y).sum(1, keepdims=True)
    return -np.sum(np.log(p[np.arange(N), [0, 1, 2, 2, 1, 0]]))


NAMES = ["square", "square vector", "logistic", "softmax"]


@pytest.mark.parametrize("mean", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_value_gradient_and_hessian_are_those_of_the_formula_in_the_metric_of_f(name, mean):
    loss, shape = make(name, mean)
    y, v = jr.normal(jr.key(2), shape), jr.normal(jr.key(3), shape)
    assert loss.weight == (1 / N if mean else 1.0)
    np.testing.assert_allclose(loss(y), loss.weight * by_hand(name, loss, np.asarray(y)), rtol=1e-14)
    # Riesz: the plain derivative is the weight times the gradient of F; so for the Hessian.
    gradient, hvp = jax.jvp(jax.grad(loss), (y,), (v,))
    np.testing.assert_allclose(loss.weight * loss.gradient(y), gradient, rtol=1e-13, atol=1e-15)
    np.testing.assert_allclose(loss.cotangent(y), gradient, rtol=1e-13, atol=1e-15)
    np.testing.assert_allclose(loss.weight * loss.hvp(y, v), hvp, rtol=1e-13, atol=1e-15)
    np.testing.assert_allclose(loss.norm(v) ** 2, loss.weight * jnp.sum(v**2), rtol=1e-14)


@pytest.mark.parametrize("mean", [True, False])
def test_the_norm_has_a_zero_gradient_at_zero_and_its_own_elsewhere(mean):
    loss, shape = make("square", mean)
    zero, y = jnp.zeros(shape), jr.normal(jr.key(2), shape)
    np.testing.assert_array_equal(jax.grad(loss.norm)(zero), zero)
    np.testing.assert_array_equal(jax.jacfwd(loss.norm)(zero), zero)
    assert loss.norm(zero) == 0
    assert jnp.isnan(loss.norm(y.at[0].set(jnp.nan)))
    np.testing.assert_allclose(loss.norm(y), np.sqrt(loss.weight) * np.linalg.norm(y), rtol=1e-15)
    np.testing.assert_allclose(jax.grad(loss.norm)(y), np.sqrt(loss.weight) * y / np.linalg.norm(y), rtol=1e-14)


@pytest.mark.parametrize("mean", [True, False])
def test_the_square_loss_is_half_the_squared_distance_to_its_minimizer(mean):
    loss, shape = make("square", mean)
    y = jr.normal(jr.key(4), shape)
    np.testing.assert_allclose(loss(y), 0.5 * loss.norm(y - loss.minimizer) ** 2, rtol=1e-14)
    assert loss(loss.minimizer) == 0
    assert loss.strong_convexity() == loss.strong_convexity(3.0) == loss.smoothness == 1
    # One step of size 1/M of gradient descent on outputs reaches the minimum.
    np.testing.assert_allclose(y - loss.gradient(y), loss.minimizer, atol=1e-15)


def quotients(loss, y, v):
    """Rayleigh quotients of the F-Hessian; the metric's weight cancels."""
    return jax.vmap(lambda y, v: jnp.sum(v * loss.hvp(y, v)) / jnp.sum(v**2))(y, v)


def test_smoothness_of_the_logistic_loss_is_its_largest_curvature_and_m_its_smallest_on_a_ball():
    loss, shape = make("logistic", True)
    radius = 2.0
    y = jr.uniform(jr.key(5), (300, *shape), minval=-radius, maxval=radius)
    values = quotients(loss, y, jr.normal(jr.key(6), y.shape))
    m = loss.strong_convexity(radius)
    assert m <= values.min() < values.max() <= loss.smoothness == 0.25
    # Neither constant can be improved: both are attained, M at 0 and m at the edge of the ball.
    edges = quotients(loss, jnp.array([[0.0] * N, [radius] * N]), jnp.ones((2, N)))
    np.testing.assert_allclose(edges, [loss.smoothness, m], rtol=1e-14)
    assert loss.strong_convexity() == 0
    assert 0 <= loss.strong_convexity(1e4) < 1e-300


@pytest.mark.parametrize("k", [2, 3, 10])
def test_constants_of_the_softmax_loss_bound_its_curvature_on_zero_sum_outputs(k):
    loss = lj.softmax_cross_entropy(jnp.arange(k))
    radius = 1.0
    # Zero-sum outputs in the ball, its corners included; zero-sum directions.
    y = jr.uniform(jr.key(7), (200, k, k), minval=-1, maxval=1)
    y = y - y.mean(-1, keepdims=True)
    y = radius * y / jnp.abs(y).max(-1, keepdims=True)
    v = jr.normal(jr.key(8), y.shape)
    v = v - v.mean(-1, keepdims=True)
    values = quotients(loss, y, v)
    m = loss.zero_sum_convexity(radius, classes=k)
    assert m <= values.min() < values.max() <= loss.smoothness == 0.5
    # M is attained by two equally likely classes of which the others are far.
    far = jnp.where(jnp.arange(k) < 2, 0.0, -800.0)[None].repeat(k, 0)
    steep = jnp.where(jnp.arange(k) < 2, jnp.array([1.0, -1.0] + [0.0] * (k - 2)), 0.0)[None].repeat(k, 0)
    np.testing.assert_allclose(quotients(loss, far[None], steep[None]), [0.5], rtol=1e-14)
    # The least probability is at least m, so no direction has less; at least 1/2k e^(-2r) of it is there to have.
    assert m >= np.exp(-2 * radius) / k
    assert loss.zero_sum_convexity(classes=k) == loss.zero_sum_convexity(1e4, classes=k) == loss.strong_convexity() == 0
    # A shift of all outputs of a sample costs nothing, so zero-sum directions are needed.
    np.testing.assert_allclose(loss.hvp(y[0], jnp.ones((k, k))), 0, atol=1e-15)
    np.testing.assert_allclose(jnp.sum(loss.gradient(y[0]), axis=1), 0, atol=1e-15)


@pytest.mark.parametrize("name", NAMES)
def test_float32_outputs_give_float32_everything(name):
    loss, shape = make(name, True)
    y = jr.normal(jr.key(2), shape, jnp.float32)
    results = [loss(y), loss.gradient(y), loss.cotangent(y), loss.hvp(y, y), loss.norm(y)]
    assert [r.dtype for r in results] == [jnp.float32] * 5
    exact = loss.gradient(y.astype(jnp.float64))
    assert relative_error(loss.gradient(y), exact) < 1e-6


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("name", NAMES)
def test_outputs_of_a_thousand_give_numbers(name, dtype):
    loss, shape = make(name, False)
    y = jnp.asarray(1e3 * np.where(np.arange(np.prod(shape)) % 3 == 0, 1, -1).reshape(shape), dtype)
    value, gradient = jax.value_and_grad(loss)(y)
    hvp = jax.jvp(jax.grad(loss), (y,), (jnp.ones_like(y),))[1]
    assert all(bool(jnp.isfinite(a).all()) for a in (value, gradient, hvp, loss.gradient(y), loss.hvp(y, y)))
    if name == "logistic":
        # Linear far out: log(1 + e^1000) = 1000 for each of the wrong signs.
        wrong = np.sum(np.sign(np.asarray(y)) != np.array([-1, 1, 1, -1, 1, -1]))
        np.testing.assert_allclose(value, 1e3 * wrong, rtol=1e-6)


def test_labels_0_and_1_mean_the_same_as_minus_1_and_1_in_every_dtype():
    y = jr.normal(jr.key(0), (4,))
    expected = lj.logistic_loss(jnp.array([-1, 1, 1, -1]))(y)
    for labels in (jnp.array([0, 1, 1, 0]), jnp.array([0.0, 1.0, 1.0, 0.0], jnp.float32), jnp.array([-1.0, 1, 1, -1])):
        assert lj.logistic_loss(labels)(y) == expected
    # One class alone is no error; 0 is the negative one.
    assert lj.logistic_loss(jnp.zeros(4))(-1e3 * jnp.ones(4)) == 0


def test_a_loss_can_be_made_inside_a_jit_from_labels_that_are_constants_there():
    labels, target = jnp.array([0, 1, 1]), jnp.ones(3)

    def values(y):
        rows = jnp.stack([y, -y], axis=1)
        return lj.softmax_cross_entropy(labels)(rows), lj.logistic_loss(labels)(y), lj.square_loss(target)(y)

    y = jnp.array([0.5, -1.0, 2.0])
    np.testing.assert_allclose(jax.jit(values)(y), values(y), rtol=1e-14)


def test_any_callable_becomes_a_loss_in_the_euclidean_metric():
    loss = as_loss(lambda y: jnp.sum(jnp.cosh(y)))
    y, v = jr.normal(jr.key(0), (5,)), jr.normal(jr.key(1), (5,))
    assert loss.weight == 1
    np.testing.assert_allclose(loss(y), np.sum(np.cosh(y)), rtol=1e-14)
    np.testing.assert_allclose(loss.gradient(y), np.sinh(y), rtol=1e-14)
    np.testing.assert_allclose(loss.cotangent(y), np.sinh(y), rtol=1e-14)
    np.testing.assert_allclose(loss.hvp(y, v), np.cosh(y) * v, rtol=1e-14)
    np.testing.assert_allclose(loss.norm(v), np.linalg.norm(v), rtol=1e-14)
    loss.check((5,))
    square = lj.square_loss(y)
    assert as_loss(square) is square


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: lj.square_loss(jnp.zeros(0)), ValueError, r"target must be a non-empty array .* got shape \(0,\)"),
        (lambda: lj.square_loss(jnp.array([1.0, jnp.nan])), ValueError, r"target must be finite, but 1 of its 2"),
        (lambda: lj.logistic_loss(jnp.array([0, 1, 2])), ValueError, "labels must be -1 and 1, or 0 and 1"),
        (lambda: lj.logistic_loss(jnp.array([-1, 0, 1])), ValueError, "labels must be -1 and 1, or 0 and 1"),
        (lambda: lj.logistic_loss(jnp.array([1.0, jnp.inf])), ValueError, "labels must be finite"),
        (lambda: lj.logistic_loss(jnp.zeros(0)), ValueError, "labels must be a non-empty array"),
        (lambda: lj.softmax_cross_entropy(jnp.array([0, -2])), ValueError, "labels must be classes 0, 1, ..., got -2"),
        (lambda: lj.softmax_cross_entropy(jnp.zeros(0, int)), ValueError, "labels must be a non-empty array"),
        (lambda: lj.square_loss(jnp.zeros(3))(jnp.zeros((3, 1))), ValueError, r"outputs \(3, 1\) and target \(3,\)"),
        (lambda: lj.square_loss(jnp.zeros(3)).gradient(jnp.zeros(2)), ValueError, "must have the same shape"),
        (lambda: lj.logistic_loss(jnp.array([0, 1]))(jnp.zeros(3)), ValueError, "outputs and labels must have the"),
        (lambda: lj.softmax_cross_entropy(jnp.array([0, 2]))(jnp.zeros((2, 2))), ValueError, r"0..1 for 2 .* got 0..2"),
        (lambda: lj.softmax_cross_entropy(jnp.array([0, 1]))(jnp.zeros((3, 2))), ValueError, r"\(2, k\) for 2 labels"),
        (lambda: lj.softmax_cross_entropy(jnp.array([0, 1])).check((2,)), ValueError, r"\(2, k\) for 2 labels"),
        (lambda: as_loss(lambda y: y).check((2,)), ValueError, r"loss must map outputs of shape \(2,\) to one real number"),
    ],
)
def test_unfit_targets_labels_and_outputs_are_refused(call, error, match):
    with pytest.raises(error, match=match):
        call()


def test_targets_of_the_wrong_kind_are_refused():
    # The shape annotations that tests check would speak first; users do not have them.
    square, softmax, convert = (
        getattr(f, "__wrapped__", f) for f in (lj.square_loss, lj.softmax_cross_entropy, as_loss)
    )
    with pytest.raises(TypeError, match="target must be real, got complex128"):
        square(jnp.ones(2, complex))
    with pytest.raises(ValueError, match=r"\(n,\) or \(n, k\), got shape \(\)"):
        square(jnp.array(1.0))
    with pytest.raises(TypeError, match=r"integer classes, got float64; for one-hot rows use labels.argmax"):
        softmax(jnp.ones(2))
    with pytest.raises(TypeError, match=r"function of the outputs, got ArrayImpl; use lazyjax.square_loss"):
        convert(jnp.ones(2))


def test_integer_targets_become_floating():
    square = getattr(lj.square_loss, "__wrapped__", lj.square_loss)
    assert square(jnp.arange(3)).minimizer.dtype == jnp.float64
