"""The tangent kernel against J J^T by jacrev, and the closed form against matrix functions of SciPy."""

import importlib
from functools import partial

import equinox as eqx
import jax
import jax.flatten_util
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
import scipy.linalg

import lazyjax as lj
from lazyjax._core.lanczos import top_eigenvalues
from lazyjax.flow.closed_form import solve_tangent, tangent_gram

# The package's attribute of that name is the function.
kernel = importlib.import_module("lazyjax.kernels.spectrum")

F, F3 = lj.models.two_layer(jnp.tanh), lj.models.mlp(jnp.tanh)


def normal(seed, *shape, dtype=float):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape).astype(dtype))


W = {"a": normal(0, 5), "b": normal(3, 5, 4)}
W3 = [
    {"weight": normal(4, 5, 4) / 2, "bias": jnp.asarray(np.zeros(5))},
    {"weight": normal(5, 3, 5) / 2, "bias": jnp.asarray(np.zeros(3))},
]
X, X2 = normal(1, 7, 4), normal(2, 3, 4)


def jacobian_of(f, w, x):
    coordinates, rest = eqx.partition(w, eqx.is_inexact_array)
    vector, unravel = jax.flatten_util.ravel_pytree(coordinates)
    return np.asarray(jax.jit(jax.jacrev(lambda v: f(eqx.combine(unravel(v), rest), x).ravel()))(vector))


def two_layer_jacobian(x):
    """By hand: the rows of tanh(x b^T) a."""
    a, b, x = (np.asarray(leaf) for leaf in (W["a"], W["b"], x))
    hidden = np.tanh(x @ b.T)
    slopes = (1 - hidden**2) * a
    return np.concatenate([hidden, (slopes[:, :, None] * x[:, None]).reshape(len(x), -1)], axis=1)


def mlp_jacobian(x):
    """By hand: the rows of W2 tanh(W1 x), biases zero, three for each sample."""
    first, second, x = (np.asarray(leaf) for leaf in (W3[0]["weight"], W3[1]["weight"], x))
    hidden = np.tanh(x @ first.T)
    at_bias = second[None] * (1 - hidden**2)[:, None]
    at_weight = at_bias[..., None] * x[:, None, None]
    last_bias = np.broadcast_to(np.eye(3), (len(x), 3, 3))
    last_weight = last_bias[..., None] * hidden[:, None, None]
    parts = (at_bias, at_weight, last_bias, last_weight)
    return np.concatenate([part.reshape(3 * len(x), -1) for part in parts], axis=1)


J, J_OTHER = two_layer_jacobian(X), two_layer_jacobian(X2)
J3, J3_OTHER = mlp_jacobian(X), mlp_jacobian(X2)


# ---- the Gram ----


def test_the_gram_is_the_jacobian_times_its_transpose():
    np.testing.assert_allclose(lj.gram(F, W, X), J @ J.T, rtol=1e-13, atol=1e-13)
    np.testing.assert_allclose(lj.gram(F, W, X, X2), J @ J_OTHER.T, rtol=1e-13, atol=1e-13)


def test_the_gram_of_several_outputs_has_samples_and_outputs_on_axes_of_their_own():
    k = lj.gram(F3, W3, X, X2)
    assert k.shape == (7, 3, 3, 3)
    expected = np.einsum("iap,jbp->iajb", J3.reshape(7, 3, -1), J3_OTHER.reshape(3, 3, -1))
    np.testing.assert_allclose(k, expected, rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(lj.gram(F3, W3, X), (J3 @ J3.T).reshape(7, 3, 7, 3), rtol=1e-12, atol=1e-13)


def test_a_float32_gram_is_float32_and_right_to_rounding():
    w, x = jax.tree.map(lambda a: a.astype(jnp.float32), (W3, X))
    k = lj.gram(F3, w, x)
    assert k.dtype == jnp.float32
    exact = (J3 @ J3.T).reshape(7, 3, 7, 3)
    np.testing.assert_allclose(k, exact, atol=1e-5 * np.abs(exact).max())


def test_one_sample_and_one_parameter_have_a_gram():
    assert float(lj.gram(lambda w, x: x @ w, jnp.ones(1), jnp.full((1, 1), 3.0))[0, 0]) == 9


def test_the_gram_looks_only_at_floating_leaves_and_takes_equinox_modules():
    net = eqx.nn.MLP(4, 3, 5, 1, activation=jnp.tanh, key=jr.key(0), dtype=jnp.float64)
    f = lambda w, x: jax.vmap(w["net"])(x) * w["scale"]
    w = {"net": net, "scale": 2.0, "step": jnp.array(3)}
    jacobian = jacobian_of(f, w, X2)
    assert jacobian.shape == (9, 5 * 5 + 6 * 3)
    np.testing.assert_allclose(np.reshape(lj.gram(f, w, X2), (9, 9)), jacobian @ jacobian.T, rtol=1e-12, atol=1e-13)


def test_inputs_need_not_be_vectors_nor_floating():
    tokens = jnp.array([0, 2, 2])
    embed = lambda w, x: jnp.tanh(w[x]) @ jnp.ones(2)
    w = normal(0, 3, 2)
    slope = 1 - np.tanh(np.asarray(w)) ** 2
    expected = np.array([[i == j for j in (0, 2, 2)] for i in (0, 2, 2)]) * np.sum(slope[[0, 2, 2]] ** 2, 1)
    np.testing.assert_allclose(lj.gram(embed, w, tokens), expected, rtol=1e-14)
    images = normal(1, 4, 2, 2)
    np.testing.assert_allclose(
        lj.gram(lambda w, x: x.reshape(-1, 4) @ w, jnp.ones(4), images),
        np.asarray(images).reshape(4, 4) @ np.asarray(images).reshape(4, 4).T,
        rtol=1e-13,
        atol=1e-15,
    )


def test_a_gram_can_be_taken_inside_a_jit_of_traced_and_of_constant_parameters():
    expected = J @ J.T
    np.testing.assert_allclose(jax.jit(lambda w, x: lj.gram(F, w, x))(W, X), expected, rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(jax.jit(lambda c: c * lj.gram(F, W, X))(2.0), 2 * expected, rtol=1e-12, atol=1e-13)


def batch_normalized(w, x):
    z = jnp.tanh(x @ w["b"].T)
    z = (z - z.mean(0, keepdims=True)) / jnp.sqrt(z.var(0, keepdims=True) + 1e-5)
    return z @ w["a"]


def test_a_model_that_mixes_samples_is_refused():
    with pytest.raises(ValueError, match=r"by itself, but its outputs .*batch normalization"):
        lj.gram(batch_normalized, W, X)
    w, x = jax.tree.map(lambda a: a.astype(jnp.float32), (W, X))
    with pytest.raises(ValueError, match="batch normalization in training mode; use the layer's inference mode"):
        lj.spectrum(batch_normalized, w, x)


def test_a_model_whose_outputs_cancel_is_not_taken_for_one_that_mixes_samples():
    # The outputs are rounding residues, which depend on the number of samples; only the terms set their scale.
    for seed in range(2):
        w = lj.models.two_layer().init(jr.key(seed), d=50, width=400, symmetric=True, dtype=jnp.float32)
        x = normal(seed, 3, 50, dtype=np.float32)
        assert 0 < float(jnp.max(jnp.abs(F(w, x)))) < 1e-4
        assert bool(jnp.all(jnp.isfinite(lj.gram(F, w, x))))
    offset = F(w, x[:1]) + jnp.float32(1e-6)
    assert bool(jnp.all(jnp.isfinite(lj.gram(lambda w, x: F(w, x) - offset, w, x))))


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: lj.gram(F, W, jnp.zeros((0, 4))), r"x1 must hold at least one sample .* got shape \(0, 4\)"),
        (lambda: lj.gram(F, W, X, jnp.zeros((0, 4))), "x2 must hold at least one sample"),
        (lambda: lj.gram(F, W, X.at[2, 1].set(jnp.nan)), r"x1 must be finite, but 1 of its 28 .* index \(2, 1\)"),
        (lambda: lj.gram(F, W, X, X2 * jnp.inf), "x2 must be finite, but 12 of its 12"),
        (lambda: lj.gram(F, W, X, X2[:, :3]), r"samples of one shape, got \(4,\) and \(3,\)"),
        (lambda: lj.gram(lambda w, x: F(w, x)[:2], W, X), "one row of outputs per sample, got 2 rows for 7 samples"),
        (lambda: lj.gram(lambda w, x: jnp.sum(F(w, x)), W, X), r"f must return one array of shape \(n,\) or \(n, k\)"),
        (lambda: lj.gram(lambda w, x: F(w, x) / 0.0, W, X), "must be finite"),
        (lambda: lj.gram(F, {"a": W["a"] * jnp.nan, "b": W["b"]}, X), r"w\['a'\] must be finite, but 5 of its 5"),
        (lambda: lj.spectrum(F, W, X, k=0), "k must be between 1 and the number of outputs 7, got 0"),
        (lambda: lj.spectrum(F, W, X, k=8), "k must be between 1 and the number of outputs 7, got 8"),
        (lambda: lj.spectrum(F, W, X * jnp.nan, k=1), "x must be finite"),
        (lambda: lj.kernel_matvec(F, W, X)(jnp.ones(6)), r"r must have the shape of the outputs, \(7,\), got \(6,\)"),
        (lambda: lj.kernel_matvec(F, W, jnp.zeros((0, 4))), "at least one output.*is the data empty"),
    ],
)
def test_unfit_arguments_are_refused(call, match):
    with pytest.raises(ValueError, match=match):
        call()


def test_an_unknown_method_is_refused():
    users = getattr(lj.gram, "__wrapped__", lj.gram)  # the annotation would speak first
    with pytest.raises(ValueError, match=r"method must be \"auto\" or \"jacobian\", got 'fast'"):
        users(F, W, X, method="fast")
    np.testing.assert_allclose(lj.gram(F, W, X, method="jacobian"), lj.gram(F, W, X), rtol=1e-12, atol=1e-13)


# ---- products and eigenvalues ----


def test_the_matrix_free_product_is_that_of_the_gram():
    r, r3 = normal(3, 7), normal(4, 7, 3)
    np.testing.assert_allclose(lj.kernel_matvec(F, W, X)(r), J @ J.T @ r, rtol=1e-12)
    np.testing.assert_allclose(lj.kernel_matvec(F3, W3, X)(r3).ravel(), J3 @ J3.T @ r3.ravel(), rtol=1e-12)
    assert lj.kernel_matvec(F, W, X)(r.astype(jnp.float32)).dtype == jnp.float64


def test_the_product_takes_models_that_mix_samples():
    jacobian, r = jacobian_of(batch_normalized, W, X), normal(3, 7)
    expected = jacobian @ jacobian.T @ r
    np.testing.assert_allclose(lj.kernel_matvec(batch_normalized, W, X)(r), expected, rtol=1e-9)


def test_the_spectrum_is_that_of_the_gram_falling():
    expected = np.linalg.svd(J3, compute_uv=False) ** 2
    values = lj.spectrum(F3, W3, X)
    assert values.shape == (21,)
    np.testing.assert_allclose(values[: len(expected)], expected, atol=1e-12 * expected[0])
    np.testing.assert_allclose(values[len(expected) :], 0, atol=1e-12 * expected[0])
    np.testing.assert_allclose(lj.spectrum(F3, W3, X, k=4), expected[:4], rtol=1e-12)
    np.testing.assert_allclose(jax.jit(lambda w: lj.spectrum(F3, w, X, k=4))(W3), expected[:4], rtol=1e-12)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_the_leading_eigenvalues_are_converged_where_they_lie_close(monkeypatch, dtype):
    monkeypatch.setattr(kernel, "DENSE_SIZE", 0)
    # A Wishart spectrum has no gaps: 2k + 20 = 30 products leave the fifth 3 % too small.
    x = normal(5, 300, 310, dtype=dtype)
    linear = lambda w, x: x @ w
    exact = np.linalg.svd(np.asarray(x, np.float64), compute_uv=False)[:5] ** 2
    values = lj.spectrum(linear, jnp.zeros(310, dtype), x, k=5)
    assert values.dtype == dtype
    # Converged to residual sqrt(eps): then the error is its square over the gap, and rounding.
    np.testing.assert_allclose(values, exact, rtol=300 * float(jnp.finfo(dtype).eps))


def repeated(samples, inputs, outputs):
    """x @ W has the Gram K ⊗ I: every eigenvalue of x x^T, `outputs` times."""
    x = normal(6, samples, inputs)
    exact = np.repeat(np.linalg.svd(np.asarray(x), compute_uv=False) ** 2, outputs)
    return jnp.zeros((inputs, outputs)), x, exact


def linear(w, x):
    return x @ w


# Either fewer distinct eigenvalues than products (21, 44), or more (60, 34), where one start sees each only once.
@pytest.mark.parametrize(("samples", "inputs", "outputs", "k"), [(60, 20, 10, 12), (60, 60, 4, 7)])
def test_repeated_eigenvalues_are_counted_as_often_as_they_are(monkeypatch, samples, inputs, outputs, k):
    w, x, exact = repeated(samples, inputs, outputs)
    np.testing.assert_allclose(lj.spectrum(linear, w, x, k=k), exact[:k], rtol=1e-12)
    with monkeypatch.context() as patch:
        patch.setattr(kernel, "DENSE_SIZE", 0)
        found = lj.spectrum(linear, w, x, k=k)
        once = jax.jit(lambda w: lj.spectrum(linear, w, x, k=k))(w)
    np.testing.assert_allclose(found, exact[:k], rtol=1e-12)
    # One run alone, as under a trace, is not enough: the test would see it.
    assert once[1] < exact[1] * (1 + 1e-9)
    assert once[-1] < 0.99 * exact[k - 1]


def test_the_leading_eigenvalues_of_any_operator():
    top = partial(top_eigenvalues, dtype=jnp.float64)
    np.testing.assert_allclose(top(lambda r: 2 * r, 9, 9), np.full(9, 2.0), rtol=1e-14)
    np.testing.assert_array_equal(top(lambda r: 0 * r, 50, 3), np.zeros(3))
    # Rank 2, the first value twice; the rest of what was asked for is zero.
    np.testing.assert_allclose(top(lambda r: jnp.where(jnp.arange(50) < 2, 3 * r, 0), 50, 4), [3, 3, 0, 0], atol=1e-13)
    values = jnp.asarray(np.repeat([5.0, 4.999, 1.0, 0.5], [7, 3, 40, 350]))
    np.testing.assert_allclose(top(lambda r: values * r, 400, 11, key=jr.key(1)), values[:11], rtol=1e-12)
    assert bool(jnp.isnan(top(lambda r: jnp.nan * r, 9, 2)).all())


def test_the_dense_gram_of_a_tangent_model_is_that_of_the_model():
    tangent = lj.linearize(partial(F3, x=X), W3)
    for block in (1, 4, 128):
        np.testing.assert_allclose(tangent_gram(tangent, block=block), J3 @ J3.T, rtol=1e-12, atol=1e-12)
    mixing = lj.linearize(lambda w: batch_normalized(w, X), W)
    jacobian = jacobian_of(batch_normalized, W, X)
    np.testing.assert_allclose(tangent_gram(mixing), jacobian @ jacobian.T, rtol=1e-9, atol=1e-12)


# ---- the closed form of the tangent flow ----


def closed_form_case(duplicated, dtype=np.float64):
    """(J, start, target, weight); duplicated inputs with other targets make an exact eigenvalue 0."""
    jacobian = J.copy()
    if duplicated:
        jacobian[1] = jacobian[0]
        jacobian[4] = jacobian[3]
    rng = np.random.default_rng(0)
    start, target = rng.standard_normal((2, 7))
    return *(np.asarray(a, dtype) for a in (jacobian, start, target)), 1 / 7


def solve(jacobian, start, target, weight):
    matrix = jnp.asarray(jacobian) @ jnp.asarray(jacobian).T
    return solve_tangent(matrix, jnp.asarray(start), jnp.asarray(target), weight)


@pytest.mark.parametrize("duplicated", [False, True])
def test_the_closed_form_is_the_matrix_exponential_and_its_integral(duplicated):
    jacobian, start, target, weight = closed_form_case(duplicated)
    k = weight * jacobian @ jacobian.T
    solution = solve(jacobian, start, target, weight)
    for t in (0.0, 0.1, 3.0, 100.0):
        time = jnp.asarray(t)
        outputs = target + scipy.linalg.expm(-t * k) @ (start - target)
        np.testing.assert_allclose(solution.outputs(time), outputs, atol=1e-12)
        np.testing.assert_allclose(solution.loss(time), 0.5 * weight * np.sum((outputs - target) ** 2), atol=1e-13)
        # The integral of e^{-sK} up to t is the corner of the exponential of [[-tK, t], [0, 0]].
        block = np.block([[-t * k, t * np.eye(7)], [np.zeros((7, 14))]])
        integral = scipy.linalg.expm(block)[:7, 7:]
        u = -weight * jacobian.T @ integral @ (start - target)
        np.testing.assert_allclose(jacobian.T @ solution.cotangent(time), u, atol=1e-11)
        np.testing.assert_allclose(start + jacobian @ u, outputs, atol=1e-11)


@pytest.mark.parametrize("duplicated", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_end_of_time_is_the_pseudo_inverse(duplicated, dtype):
    jacobian, start, target, weight = closed_form_case(duplicated, dtype)
    solution = solve(jacobian, start, target, weight)
    exact = jacobian.astype(np.float64)
    rank = 5 if duplicated else 7
    singular = np.linalg.svd(exact, compute_uv=False)
    assert int(np.sum(np.asarray(solution.eigenvalues) > 0)) == rank
    np.testing.assert_array_equal(solution.eigenvalues[rank:], 0)
    condition = (singular[0] / singular[rank - 1]) ** 2
    # Forming J J^T squares the condition number: so many digits of the solution are gone.
    eps = float(np.finfo(dtype).eps)
    lost = 100 * condition * eps
    assert lost < 0.05
    np.testing.assert_allclose(solution.condition, condition, rtol=lost)
    np.testing.assert_allclose(solution.eigenvalues[:rank], weight * singular[:rank] ** 2, rtol=lost)
    u = np.linalg.pinv(exact, rcond=1e-5) @ (target - start)
    end = jnp.asarray(np.inf, dtype)
    got = exact.T @ np.asarray(solution.cotangent(end))
    np.testing.assert_allclose(got, u, atol=lost * np.linalg.norm(u))
    outputs = solution.outputs(end)
    assert outputs.dtype == dtype
    np.testing.assert_allclose(outputs, start + exact @ u, atol=lost * np.linalg.norm(u) * singular[0])
    # What stays is half the squared difference of duplicated targets; nothing without duplicates.
    stays = 0.5 * weight * sum((d @ (start - target)) ** 2 / 2 for d in np.eye(7)[[0, 3]] - np.eye(7)[[1, 4]])
    np.testing.assert_allclose(solution.loss(end), stays if duplicated else 0, atol=50 * eps)


@pytest.mark.parametrize("t", [0.0, 1e-30, 1e30, np.inf])
def test_duplicated_inputs_give_numbers_in_float32_at_any_time(t):
    w, x = jax.tree.map(lambda a: a.astype(jnp.float32), (W, X))
    x = jnp.concatenate([x, x, x])
    start, target = jnp.zeros(21, jnp.float32), normal(3, 21, dtype=np.float32)
    solution = solve_tangent(lj.gram(F, w, x), start, target, 1 / 21)
    assert int(np.sum(np.asarray(solution.eigenvalues) > 0)) <= 7
    time = jnp.float32(t)
    for value in (solution.outputs(time), solution.loss(time), solution.cotangent(time), solution.condition):
        assert bool(jnp.all(jnp.isfinite(value)))
    # The three copies of an input have one output, and at the end that is the mean of their targets.
    outputs = np.asarray(solution.outputs(time)).reshape(3, 7)
    expected = np.asarray(target).reshape(3, 7).mean(0) if t > 1 else np.zeros(7)
    np.testing.assert_allclose(outputs, np.stack([expected] * 3), atol=2e-4)


def test_a_zero_kernel_stays_where_it_is():
    start, target = jnp.array([1.0, -2.0]), jnp.zeros(2)
    solution = solve_tangent(jnp.zeros((2, 2)), start, target, 0.5)
    for t in (0.0, 1.0, np.inf):
        np.testing.assert_array_equal(solution.outputs(jnp.asarray(t)), start)
        np.testing.assert_array_equal(solution.cotangent(jnp.asarray(t)), np.zeros(2))
        np.testing.assert_allclose(solution.loss(jnp.asarray(t)), 0.25 * 5, rtol=1e-15)


def test_the_closed_form_of_several_outputs_keeps_their_shape_and_maps_over_times():
    start, target = normal(0, 7, 3), normal(1, 7, 3)
    solution = solve_tangent(jnp.asarray(J3 @ J3.T), start, target, 1 / 7)
    times = jnp.array([0.0, 0.5, jnp.inf])
    outputs = jax.vmap(solution.outputs)(times)
    assert outputs.shape == jax.vmap(solution.cotangent)(times).shape == (3, 7, 3)
    np.testing.assert_allclose(outputs[0], start, atol=1e-13)
    expected = np.asarray(target).ravel() + scipy.linalg.expm(-0.5 / 7 * J3 @ J3.T) @ np.ravel(start - target)
    np.testing.assert_allclose(outputs[1].ravel(), expected, atol=1e-12)
    # 21 outputs of 43 parameters: a full rank would reach the target.
    losses = jax.vmap(solution.loss)(times)
    assert losses[0] > losses[1] > losses[2] >= 0


def test_the_closed_form_differentiates_in_time_as_its_equation_says():
    jacobian, start, target, weight = closed_form_case(duplicated=True)
    solution = solve(jacobian, start, target, weight)
    slope = jax.jacfwd(solution.outputs)(jnp.asarray(0.3))
    residual = np.asarray(solution.outputs(jnp.asarray(0.3))) - target
    np.testing.assert_allclose(slope, -weight * jacobian @ jacobian.T @ residual, atol=1e-12)
    # dR/dt = -|Dh* grad R|^2, the energy identity in F's metric.
    decay = jax.grad(solution.loss)(jnp.asarray(0.3))
    np.testing.assert_allclose(decay, -np.sum((weight * jacobian.T @ residual) ** 2), rtol=1e-10)
