"""Regression with the tangent kernel: against flows that are integrated, least squares, and normal equations."""

from functools import partial

import diffrax
import jax
import jax.flatten_util as jfu
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import lazyjax as lj
from helpers import relative_error, tolerance
from lazyjax.flow.closed_form import tangent_solution
from lazyjax.flow.kernel_regression import KernelRegression, _distance_on_test, _time_grid, kernel_regression


def f1(w, x):
    """A two-layer net, outputs (n,), not zero at its start."""
    return lj.models.two_layer(jnp.tanh)(w, x)


F3 = lj.models.mlp(jnp.tanh)
X, X_TEST = jr.normal(jr.key(1), (7, 4)), jr.normal(jr.key(2), (5, 4))
CASES = {
    "one output": (
        f1,
        lj.models.two_layer().init(jr.key(3), d=4, width=9),
        jr.normal(jr.key(4), (7,)),
        jr.normal(jr.key(5), (5,)),
    ),
    "three outputs": (
        F3,
        lj.models.mlp().init(jr.key(6), [4, 8, 3]),
        jr.normal(jr.key(7), (7, 3)),
        jr.normal(jr.key(8), (5, 3)),
    ),
}
cases = pytest.mark.parametrize("case", CASES)
TIMES = jnp.array([0.0, 0.3, 2.0, 20.0])


def linear(w, x):
    """Its own tangent model; as many parameters as columns of x."""
    return x @ w


def jacobian(f, w, x):
    """The plain Jacobian as a matrix (outputs, parameters)."""
    vector, unravel = jfu.ravel_pytree(w)
    matrix = jax.jacrev(lambda v: f(unravel(v), x))(vector)
    return np.asarray(matrix).reshape(-1, vector.size)


def in_modes(singular, *, n, key):
    """Rows of inputs whose singular values are these, for `linear`."""
    left, _ = jnp.linalg.qr(jr.normal(key, (n, n)))
    right, _ = jnp.linalg.qr(jr.normal(jr.fold_in(key, 1), (singular.size, singular.size)))
    return left[:, : singular.size] * singular[None] @ right.T


@cases
@pytest.mark.parametrize(("alpha", "mean"), [(0.5, True), (3.0, False)])
def test_it_is_the_flow_of_the_tangent_model_on_training_and_test_points(case, alpha, mean):
    f, w0, target, _ = CASES[case]
    loss = lj.square_loss(target, mean=mean)
    found = kernel_regression(f, w0, X, loss, x_test=X_TEST, alpha=alpha)
    tangent = lj.linearize(partial(f, x=X), w0)
    options = {"solver": diffrax.Tsit5(), "rtol": 1e-9, "atol": 1e-11, "save": ("outputs", "displacement")}
    flow = lj.gradient_flow(tangent, loss, w0, TIMES, alpha=alpha, **options)
    assert relative_error(found.outputs(TIMES), flow.outputs) < 1e-7
    assert relative_error(found.loss(TIMES), flow.loss) < 1e-6
    on_test = lambda u: alpha * f(w0, X_TEST) + jax.jvp(lambda w: f(w, X_TEST), (w0,), (u,))[1]
    assert relative_error(found.test_outputs(TIMES), jax.vmap(on_test)(flow.displacement)) < 1e-7


@cases
def test_the_flow_in_closed_form_is_the_same_to_rounding(case):
    f, w0, target, _ = CASES[case]
    loss, ts = lj.square_loss(target), jnp.array([0.0, 1.0, 1e3, jnp.inf])
    flow = lj.gradient_flow(lj.linearize(partial(f, x=X), w0), loss, w0, ts)
    assert relative_error(kernel_regression(f, w0, X, loss).outputs(ts), flow.outputs) < 1e-9


@cases
def test_a_centered_model_starts_from_zero_at_every_scale_up_to_inf(case):
    f, w0, target, _ = CASES[case]
    plain = kernel_regression(f, w0, X, lj.square_loss(target), x_test=X_TEST)
    for alpha in (1.0, 1e7, jnp.inf):
        found = kernel_regression(lj.center(f, w0), w0, X, lj.square_loss(target), x_test=X_TEST, alpha=alpha)
        assert not np.any(found.outputs(0.0))
        assert not np.any(found.test_outputs(0.0))
        np.testing.assert_allclose(found.eigenvalues, plain.eigenvalues, rtol=1e-10)
        # The same change as of a target that is that far from the start.
        moved = kernel_regression(f, w0, X, lj.square_loss(target + f(w0, X)), x_test=X_TEST)
        np.testing.assert_allclose(found.test_outputs(2.0), moved.test_outputs(2.0) - f(w0, X_TEST), atol=1e-10)


@pytest.mark.parametrize("kind", ["full rank", "fewer parameters than outputs", "duplicated inputs", "one sample"])
def test_the_end_of_time_is_the_least_squares_solution_of_least_norm(kind):
    f, w0, target, _ = CASES["three outputs"]
    x, y, rank = X, target, 21
    if kind == "fewer parameters than outputs":
        f, w0, y, rank = linear, jr.normal(jr.key(9), (4,)), target[:, 0], 4
    if kind == "duplicated inputs":
        x, y, rank = jnp.concatenate([X[:4], X[:3]]), target, 12
    if kind == "one sample":
        x, y, rank = X[:1], target[:1], 3
    found = kernel_regression(f, w0, x, lj.square_loss(y), x_test=X_TEST)
    assert int(found.rank) == rank
    j, j_test = jacobian(f, w0, x), jacobian(f, w0, X_TEST)
    gap = np.ravel(y - f(w0, x))
    u = np.linalg.lstsq(j, gap, rcond=1e-6)[0]
    error = 100 * float(found.condition) * np.finfo(float).eps
    assert error < 1e-5
    np.testing.assert_allclose(np.ravel(found.outputs(jnp.inf) - f(w0, x)), j @ u, atol=error)
    np.testing.assert_allclose(np.ravel(found.test_outputs(jnp.inf) - f(w0, X_TEST)), j_test @ u, atol=error)
    np.testing.assert_allclose(
        found.loss(jnp.inf),
        0.5 * np.mean(np.sum((j @ u - gap).reshape(y.shape).reshape(len(x), -1) ** 2, 1)),
        atol=error,
    )


def test_copies_of_an_input_end_at_the_mean_of_their_targets():
    f, w0, _, _ = CASES["one output"]
    x, w32 = jnp.concatenate([X, X]), jax.tree.map(lambda a: a.astype(jnp.float32), w0)
    y = jr.normal(jr.key(10), (14,))
    for dtype, w in ((jnp.float64, w0), (jnp.float32, w32)):
        found = kernel_regression(f, w, x.astype(dtype), lj.square_loss(y.astype(dtype)), x_test=X_TEST.astype(dtype))
        assert int(found.rank) == 7
        np.testing.assert_array_equal(found.eigenvalues[7:], 0)
        expected = np.tile(np.asarray(y).reshape(2, 7).mean(0), 2)
        np.testing.assert_allclose(found.outputs(jnp.inf), expected, atol=tolerance(dtype))
        stays = 0.5 * np.mean((expected - np.asarray(y)) ** 2)
        np.testing.assert_allclose(found.loss(jnp.inf), stays, rtol=tolerance(dtype))
        times = jnp.array([0.0, 1e-30, 1e30, jnp.inf], dtype)
        assert np.all(np.isfinite(found.test_outputs(times)))
        # 7 distinct inputs with those means: the copies change nothing else.
        single = kernel_regression(f, w0, X, lj.square_loss(jnp.asarray(expected[:7])), x_test=X_TEST)
        np.testing.assert_allclose(
            found.test_outputs(jnp.inf), single.test_outputs(jnp.inf), atol=30 * tolerance(dtype)
        )


def test_one_mode_is_one_exponential():
    x, x_test = jnp.array([[3.0]]), jnp.array([[1.5]])
    found = kernel_regression(linear, jnp.array([2.0]), x, lj.square_loss(jnp.array([1.0])), x_test=x_test)
    t = jnp.array([0.0, 0.1, 1.0, jnp.inf])
    decay = 5 * np.exp(-9 * np.asarray(t))
    np.testing.assert_allclose(found.outputs(t)[:, 0], 1 + decay, rtol=1e-12)
    np.testing.assert_allclose(found.test_outputs(t)[:, 0], 0.5 + decay / 2, rtol=1e-12)
    np.testing.assert_allclose(found.loss(t), decay**2 / 2, rtol=1e-12)
    np.testing.assert_allclose([found.condition, found.effective_rank, found.rank, found.eigenvalues[0]], [1, 1, 1, 9])


def test_a_zero_kernel_learns_nothing_and_gives_numbers():
    flat = lambda w, x: (x @ w) ** 2
    found = kernel_regression(flat, jnp.zeros(4), X, lj.square_loss(jnp.ones(7)), x_test=X_TEST)
    np.testing.assert_array_equal(found.outputs(TIMES), np.zeros((4, 7)))
    np.testing.assert_array_equal(found.test_outputs(jnp.inf), np.zeros(5))
    np.testing.assert_array_equal([found.rank, found.effective_rank, found.condition], [0, 0, 0])
    np.testing.assert_array_equal(found.test_ridge(0.0), np.zeros(5))
    time, value = found.best_time(lj.square_loss(jnp.ones(5)))
    assert float(time) == np.inf
    np.testing.assert_allclose(value, 0.5, rtol=1e-12)


def test_the_spectrum_is_that_of_the_gram_in_the_metric_of_the_loss():
    f, w0, target, _ = CASES["three outputs"]
    values = lj.spectrum(f, w0, X)
    for mean, weight in ((True, 1 / 7), (False, 1.0)):
        found = kernel_regression(f, w0, X, lj.square_loss(target, mean=mean))
        np.testing.assert_allclose(found.eigenvalues, weight * values, rtol=1e-9)
        np.testing.assert_allclose(found.condition, values[0] / values[-1], rtol=1e-8)
        np.testing.assert_allclose(found.effective_rank, lj.kernels.effective_rank(values), rtol=1e-10)


def test_what_is_not_above_rtol_is_never_learned():
    x = in_modes(jnp.array([1.0, 0.3, 0.1, 0.01]), n=6, key=jr.key(11))
    y = jr.normal(jr.key(12), (6,))
    for rtol, rank in ((None, 4), (1e-3, 3), (0.05, 2)):
        found = kernel_regression(linear, jnp.zeros(4), x, lj.square_loss(y), rtol=rtol)
        expected = x @ np.linalg.pinv(x, rcond=0.005 if rtol is None else rtol**0.5) @ y
        np.testing.assert_allclose(found.outputs(jnp.inf), expected, atol=1e-10)
        assert int(found.rank) == rank


# ---- ridge regression ----


@cases
@pytest.mark.parametrize("mean", [True, False])
def test_ridge_solves_the_normal_equations_of_the_parameters(case, mean):
    f, w0, target, _ = CASES[case]
    alpha, penalties = 2.0, jnp.array([1e-3, 0.1, 10.0])
    found = kernel_regression(f, w0, X, lj.square_loss(target, mean=mean), x_test=X_TEST, alpha=alpha)
    c = 1 / 7 if mean else 1.0
    j, j_test = jacobian(f, w0, X), jacobian(f, w0, X_TEST)
    start, on_test = (alpha * np.asarray(f(w0, x)) for x in (X, X_TEST))
    for i, penalty in enumerate(penalties):
        matrix = c * j.T @ j + float(penalty) * np.eye(j.shape[1])
        u = np.linalg.solve(matrix, c * j.T @ np.ravel(target - start))
        np.testing.assert_allclose(found.ridge(penalties)[i], start + (j @ u).reshape(start.shape), atol=1e-9)
        np.testing.assert_allclose(
            found.test_ridge(penalties)[i], on_test + (j_test @ u).reshape(on_test.shape), atol=1e-9
        )


@cases
def test_ridge_without_penalty_is_the_end_and_with_an_infinite_one_the_start(case):
    f, w0, target, _ = CASES[case]
    found = kernel_regression(f, w0, X, lj.square_loss(target), x_test=X_TEST)
    np.testing.assert_allclose(found.ridge(0.0), found.outputs(jnp.inf), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(found.test_ridge(0.0), found.test_outputs(jnp.inf), rtol=1e-9, atol=1e-9)
    np.testing.assert_array_equal(found.test_ridge(jnp.inf), found.test_outputs(0.0))


def test_a_flow_to_t_fits_every_mode_as_ridge_of_penalty_one_over_t_and_up_to_thirty_percent_more():
    found = kernel_regression(linear, jnp.zeros(1), jnp.ones((1, 1)), lj.square_loss(jnp.ones(1)))
    t = jnp.geomspace(1e-6, 1e6, 2000)
    ratio = np.asarray(found.outputs(t) / found.ridge(1 / t))[:, 0]
    assert np.all(ratio >= 1 - 1e-12)
    assert 1.29 < np.max(ratio) < 1.30
    np.testing.assert_allclose(ratio[[0, -1]], 1, atol=1e-5)


# ---- the best time to stop ----


def noisy(key, *, n, d, decay, noise, dtype=jnp.float64):
    """Regression on noisy targets with a kernel whose eigenvalues fall as a power: an optimum at a finite time."""
    keys = jr.split(key, 4)
    singular = jnp.arange(1.0, d + 1) ** -decay
    data = in_modes(singular, n=2 * n, key=keys[0]) * jnp.sqrt(n)
    truth = jr.normal(keys[1], (d,))
    targets = data @ truth + noise * jr.normal(keys[2], (2 * n,))
    x, x_test, y, y_test = (a.astype(dtype) for a in (data[:n], data[n:], targets[:n], targets[n:]))
    found = kernel_regression(linear, jnp.zeros(d, dtype), x, lj.square_loss(y), x_test=x_test)
    return found, lj.square_loss(y_test)


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("noise", [0.03, 0.3, 3.0])
@pytest.mark.parametrize("decay", [0.5, 4.0])
def test_the_best_time_is_that_of_a_dense_grid_and_better(seed, noise, decay):
    found, loss = noisy(jr.key(seed), n=40, d=30, decay=decay, noise=noise)
    time, value = found.best_time(loss)
    grid = jnp.concatenate([jnp.zeros(1), jnp.geomspace(1e-4, 1e15, 20_000), jnp.full(1, jnp.inf)])
    brute = np.asarray(jax.vmap(loss)(found.test_outputs(grid)))
    i = int(np.argmin(brute))
    assert float(value) <= brute[i] * (1 + 1e-12)
    np.testing.assert_allclose(value, loss(found.test_outputs(time)), rtol=1e-9)
    np.testing.assert_allclose(value, brute[i], rtol=1e-4)
    if np.isfinite(time) and np.sum(brute < brute[i] * (1 + 1e-9)) < 50:
        np.testing.assert_allclose(time, grid[i], rtol=0.01)
        # At an inner optimum the loss is stationary, to the rounding of the two terms that cancel.
        slope = jax.grad(lambda s: loss(found.test_outputs(time * jnp.exp(s))))(0.0)
        assert abs(slope) < 1e-9 * loss(found.test_outputs(0.0))


def test_some_of_these_optima_are_inside():
    times = [
        float(found.best_time(loss)[0])
        for found, loss in (noisy(jr.key(s), n=40, d=30, decay=4.0, noise=0.3) for s in range(6))
    ]
    assert sum(0 < t < np.inf for t in times) >= 4


def test_the_best_time_in_float32_and_with_several_outputs():
    for seed in (1, 2, 3):
        single, loss = noisy(jr.key(seed), n=40, d=30, decay=1.0, noise=1.0, dtype=jnp.float32)
        double, exact = noisy(jr.key(seed), n=40, d=30, decay=1.0, noise=1.0)
        (t32, l32), (t64, l64) = single.best_time(loss), double.best_time(exact)
        assert t32.dtype == l32.dtype == jnp.float32
        np.testing.assert_allclose(l32, l64, rtol=1e-4)
        np.testing.assert_allclose(t32, t64, rtol=0.02)
    f, w0, target, y_test = CASES["three outputs"]
    found, loss = kernel_regression(f, w0, X, lj.square_loss(target), x_test=X_TEST), lj.square_loss(y_test)
    grid = jnp.geomspace(1e-4, 1e8, 20_000)
    assert float(found.best_time(loss)[1]) <= float(jnp.min(jax.vmap(loss)(found.test_outputs(grid)))) * (1 + 1e-12)


@cases
def test_on_the_training_data_no_stop_is_better_than_the_end(case):
    f, w0, target, _ = CASES[case]
    found = kernel_regression(f, w0, X, lj.square_loss(target), x_test=X)
    time, value = found.best_time(lj.square_loss(target))
    assert float(time) == np.inf
    assert float(value) < 1e-15


def test_a_test_target_at_the_start_is_best_left_alone():
    f, w0, target, _ = CASES["one output"]
    found = kernel_regression(f, w0, X, lj.square_loss(target), x_test=X_TEST)
    assert [float(a) for a in found.best_time(lj.square_loss(found.test_outputs(0.0)))] == [0.0, 0.0]


def test_a_target_passed_long_before_anything_is_learned_is_found():
    """An optimum far below the first time of the grid: on one mode, the target a 1e-9th of the way."""
    x = jnp.ones((1, 1))
    found = kernel_regression(linear, jnp.zeros(1), x, lj.square_loss(jnp.ones(1)), x_test=x)
    time, value = found.best_time(lj.square_loss(jnp.full(1, 1e-9)))
    np.testing.assert_allclose(time, 1e-9, rtol=1e-5)
    assert float(value) < 1e-30


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_the_few_products_of_the_search_give_the_test_outputs_of_all_times_to_rounding(dtype):
    """Eigenvalues all the way down to rounding, the same coefficient of u on every mode: the hardest case."""
    m, eps = 400, float(jnp.finfo(dtype).eps)
    values = jnp.geomspace(2 * m**0.5 * eps, 1.0, m).astype(dtype)
    singular = jnp.sqrt(values)
    solution = tangent_solution(values, jnp.eye(m, dtype=dtype), singular, jnp.zeros(m, dtype), 1.0)
    # J = diag(singular), and the outputs on test points are u itself.
    found = KernelRegression(solution, lambda r: singular[None] * r, jnp.zeros(m, dtype))
    grid = _time_grid(solution.eigenvalues)
    np.testing.assert_allclose(jnp.linalg.norm(found.test_outputs(jnp.inf)), m**0.5, rtol=100 * eps)
    for i in (3, grid.size // 2, grid.size - 5):
        time = jnp.sqrt(grid[i] * grid[i + 1])  # between two of those that the basis is made from
        distance = _distance_on_test(found, lj.square_loss(found.test_outputs(time)))
        assert float(jnp.linalg.norm(distance(time))) < 100 * eps * m**0.5


# ---- derivatives, compilation, maps, precision ----


@cases
def test_derivatives_in_targets_scale_and_time_are_those_of_finite_differences(case):
    f, w0, target, _ = CASES[case]
    probe = jr.normal(jr.key(13), f(w0, X_TEST).shape)

    def value(y, alpha, t):
        found = kernel_regression(f, w0, X, lj.square_loss(y), x_test=X_TEST, alpha=alpha)
        return jnp.vdot(probe, found.test_outputs(t)) + jnp.sum(found.test_ridge(1 / t) ** 2) + found.loss(t)

    point = (target, jnp.asarray(1.5), jnp.asarray(0.8))
    got = jax.grad(value, argnums=(0, 1, 2))(*point)
    direction = (jr.normal(jr.key(14), target.shape), jnp.asarray(0.7), jnp.asarray(-0.4))
    # The error of a central difference is of the order of its step squared, 1e-10.
    ahead, behind = (value(*(a + s * d for a, d in zip(point, direction, strict=True))) for s in (1e-5, -1e-5))
    along = sum(jnp.vdot(g, d) for g, d in zip(got, direction, strict=True))
    np.testing.assert_allclose(along, (ahead - behind) / 2e-5, rtol=1e-7)


def test_derivatives_at_the_end_and_on_zero_eigenvalues_are_numbers():
    y = jr.normal(jr.key(15), (14,))

    def value(y, t, weight):
        x = weight * jnp.concatenate([X, X])
        found = kernel_regression(f1, CASES["one output"][1], x, lj.square_loss(y), x_test=X_TEST)
        return jnp.sum(found.test_outputs(t)) + jnp.sum(found.outputs(t))

    by_target, by_time = jax.grad(value, argnums=(0, 1))(y, jnp.inf, 1.0)
    assert float(by_time) == 0
    # Linear in the targets, and the same for the copies.
    np.testing.assert_allclose(value(y, jnp.inf, 1.0) - value(0 * y, jnp.inf, 1.0), by_target @ y, rtol=1e-8)
    np.testing.assert_allclose(by_target[:7], by_target[7:], rtol=1e-6, atol=1e-8)


def test_by_the_inputs_and_parameters_where_eigenvalues_are_distinct():
    f, w0, target, _ = CASES["one output"]

    def value(s, t):
        w = jax.tree.map(lambda a: a * (1 + s), w0)
        found = kernel_regression(f, w, (1 - s) * X, lj.square_loss(target), x_test=X_TEST)
        return jnp.sum(jnp.sin(found.test_outputs(t)))

    for t in (1.0, jnp.inf):
        slope = jax.grad(value)(0.0, t)
        np.testing.assert_allclose(slope, (value(1e-5, t) - value(-1e-5, t)) / 2e-5, rtol=1e-4)


@cases
def test_compiled_and_mapped_it_is_the_same(case):
    f, w0, target, y_test = CASES[case]
    found = kernel_regression(f, w0, X, lj.square_loss(target), x_test=X_TEST)
    for method in (found.outputs, found.test_outputs, found.loss, found.ridge, found.test_ridge):
        together = method(TIMES)
        np.testing.assert_allclose(together, jnp.stack([method(t) for t in TIMES]), rtol=1e-12, atol=1e-13)
        np.testing.assert_allclose(together, jax.jit(lambda t, method=method: method(t))(TIMES), rtol=1e-12, atol=1e-13)
        np.testing.assert_allclose(together, jax.vmap(method)(TIMES), rtol=1e-12, atol=1e-13)
        np.testing.assert_allclose(together, method(np.asarray(TIMES)), rtol=1e-12, atol=1e-13)
        np.testing.assert_allclose(together[0], method(0), rtol=1e-12, atol=1e-13)
    best = lambda y: found.best_time(lj.square_loss(y))
    for a, b in zip(best(y_test), jax.jit(best)(y_test), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-7)
    whole = lambda y: kernel_regression(f, w0, X, lj.square_loss(y), x_test=X_TEST).test_outputs(TIMES)
    many = jnp.stack([target, 2 * target])
    each = jnp.stack([whole(y) for y in many])
    np.testing.assert_allclose(jax.vmap(whole)(many), each, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(jax.jit(whole)(target), each[0], rtol=1e-9, atol=1e-9)


@cases
def test_float32_is_float64_to_its_digits(case):
    f, w0, target, _ = CASES[case]
    double = kernel_regression(f, w0, X, lj.square_loss(target), x_test=X_TEST, alpha=2.0)
    w, y, x, x_test = jax.tree.map(lambda a: a.astype(jnp.float32), (w0, target, X, X_TEST))
    single = kernel_regression(f, w, x, lj.square_loss(y), x_test=x_test, alpha=2.0)
    eps = float(jnp.finfo(jnp.float32).eps)
    for t, digits in ((0.5, 30), (100.0, 30 * 100), (jnp.inf, 3 * float(double.condition))):
        for method in ("outputs", "test_outputs"):
            got = getattr(single, method)(t)
            assert got.dtype == jnp.float32
            assert relative_error(got, getattr(double, method)(t)) < digits * eps


# ---- errors ----


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"loss": lj.logistic_loss(jnp.ones(7))}, TypeError, r"loss must be a square loss, .* got LogisticLoss"),
        ({"loss": lj.square_loss(jnp.ones(6))}, ValueError, "outputs and target must have the same shape"),
        ({"alpha": 0.0}, ValueError, r"alpha must be a scale in \(0, inf\], got 0"),
        ({"alpha": jnp.inf}, ValueError, r"alpha=inf needs a model with h\(w0\) = 0.*center"),
        ({"rtol": 1.0}, ValueError, r"rtol must be a share of the largest eigenvalue in \[0, 1\), .* got 1"),
        ({"rtol": -0.1}, ValueError, "rtol must be a share"),
        ({"x": X[:0]}, ValueError, "x must hold at least one sample"),
        ({"x_test": X_TEST[:0]}, ValueError, r"x_test must hold at least one sample .* got shape \(0, 4\)"),
        ({"x_test": X_TEST[:, :3]}, ValueError, r"x_test must .* those of x, \(4,\), got \(3,\)"),
        ({"x_test": X_TEST.at[1, 2].set(jnp.nan)}, ValueError, r"x_test must be finite, .* index \(1, 2\)"),
        ({"f": lambda w, x: jnp.sqrt(x[:, 0] + f1(w, x) ** 2)}, ValueError, r"h\(w0\) must be finite"),
        ({"f": lambda w, x: f1(w, x) - jnp.mean(f1(w, x))}, ValueError, "f must treat every sample by itself"),
        ({"w0": {}}, TypeError, "w0 must hold at least one real floating array"),
    ],
)  # fmt: skip
def test_bad_arguments_are_refused(change, error, match):
    arguments = {"f": f1, "w0": CASES["one output"][1], "x": X, "loss": lj.square_loss(jnp.ones(7)), **change}
    with pytest.raises(error, match=match):
        kernel_regression(**arguments)


def test_a_model_that_is_not_finite_on_the_test_points_only_is_refused():
    f = lambda w, x: jnp.sqrt(x[:, 0]) * f1(w, x)
    with pytest.raises(ValueError, match=r"alpha f\(w0, x_test\) must be finite"):
        kernel_regression(f, CASES["one output"][1], jnp.abs(X), lj.square_loss(jnp.ones(7)), x_test=-jnp.abs(X))


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda r: r.outputs(-1.0), ValueError, r"t must be a flow time in \[0, inf\], got -1"),
        (lambda r: r.outputs(jnp.nan), ValueError, "t must be a flow time"),
        (lambda r: r.test_ridge(jnp.array([1.0, -2.0])), ValueError, r"penalty must be .* in \[0, inf\], got -2"),
        (lambda r: r.best_time(lj.square_loss(jnp.ones(4))), ValueError, "outputs and target must have the same shape"),
        (lambda r: r.best_time(lj.logistic_loss(jnp.ones(5))), TypeError, "loss must be a square loss"),
    ],
)  # fmt: skip
def test_bad_times_penalties_and_losses_are_refused(call, error, match):
    found = kernel_regression(f1, CASES["one output"][1], X, lj.square_loss(jnp.ones(7)), x_test=X_TEST)
    with pytest.raises(error, match=match):
        call(found)


@pytest.mark.parametrize("call", ["test_outputs", "test_ridge", "best_time"])
def test_predictions_need_test_points(call):
    found = kernel_regression(f1, CASES["one output"][1], X, lj.square_loss(jnp.ones(7)))
    with pytest.raises(ValueError, match="x_test must be given to predict on test points"):
        getattr(found, call)(lj.square_loss(jnp.ones(5)) if call == "best_time" else 1.0)


def test_what_the_shape_annotations_would_refuse_first_has_messages_too():
    regression = getattr(kernel_regression, "__wrapped__", kernel_regression)
    with pytest.raises(TypeError, match=r"loss must be a square loss, .* got ArrayImpl"):
        regression(f1, CASES["one output"][1], X, jnp.ones(7))
    found = regression(f1, CASES["one output"][1], X, lj.square_loss(jnp.ones(7)))
    outputs = getattr(type(found.solution)._each, "__wrapped__", type(found.solution)._each)
    with pytest.raises(ValueError, match=r"t must be a number or a vector of them, got shape \(2, 2\)"):
        outputs(found.solution, jnp.ones((2, 2)), "t", lambda s: s)
