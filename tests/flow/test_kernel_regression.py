"""Regression with the tangent kernel: against flows that are integrated, least squares, and normal equations."""

import functools

import diffrax
import equinox as eqx
import jax
import jax.flatten_util as jfu
import jax.numpy as jnp
import numpy as np
import pytest

import lazyjax as lj
import problems
from helpers import relative_error, tolerance
from lazyjax.flow.closed_form import tangent_solution
from lazyjax.flow.kernel_regression import (
    GramTransfer,
    KernelRegression,
    _distance_on_test,
    _time_grid,
    kernel_regression,
)
from problems import normal


def f1(w, x):
    """A two-layer net, outputs (n,), not zero at its start."""
    return lj.models.two_layer(jnp.tanh)(w, x)


F3 = lj.models.mlp(jnp.tanh)
X, X_TEST = normal(1, 7, 4), normal(2, 5, 4)
CASES = {
    "one output": (f1, problems.centered(3, d=4, width=9).w0, normal(4, 7), normal(5, 5)),
    "three outputs": (F3, problems.rows(6, sizes=(4, 8, 3)).w0, normal(7, 7, 3), normal(8, 5, 3)),
}
cases = pytest.mark.parametrize("case", CASES)
TIMES = np.array([0.0, 0.3, 2.0, 20.0])


def ones(n):
    return jnp.asarray(np.ones(n))


def linear(w, x):
    """Its own tangent model; as many parameters as columns of x."""
    return x @ w


@functools.cache
def regression(case, alpha=1.0, mean=True, *, center=False):
    """The model trained on the data of a case, shared by the tests."""
    f, w0, target, _ = CASES[case]
    loss = lj.square_loss(target, mean=mean)
    return kernel_regression(lj.center(f, w0) if center else f, w0, X, loss, x_test=X_TEST, alpha=alpha)


@functools.cache
def outputs_at_start(case, *, test=False):
    f, w0, _, _ = CASES[case]
    return np.asarray(jax.jit(f)(w0, X_TEST if test else X))


def jacobian(f, w, x):
    """The plain Jacobian as a matrix (outputs, parameters)."""
    vector, unravel = jfu.ravel_pytree(w)
    matrix = jax.jit(jax.jacrev(lambda v: f(unravel(v), x)))(vector)
    return np.asarray(matrix).reshape(-1, vector.size)


def in_modes(singular, *, n, seed):
    """Rows of inputs whose singular values are these, for `linear`."""
    rng = np.random.default_rng(seed)
    left, right = (np.linalg.qr(rng.standard_normal((m, m)))[0] for m in (n, singular.size))
    return left[:, : singular.size] * singular @ right.T


@cases
@pytest.mark.parametrize(("alpha", "mean"), [(0.5, True), (3.0, False)])
def test_it_is_the_flow_of_the_tangent_model_on_training_and_test_points(case, alpha, mean):
    f, w0, target, _ = CASES[case]
    loss, found = lj.square_loss(target, mean=mean), regression(case, alpha, mean)
    tangent = lj.linearize(lj.on_data(f, X), w0)
    options = {"solver": diffrax.Tsit5(), "rtol": 1e-9, "atol": 1e-11, "save": ("outputs", "displacement")}
    flow = lj.gradient_flow(tangent, loss, w0, jnp.asarray(TIMES), alpha=alpha, **options)
    assert relative_error(found.outputs(TIMES), flow.outputs) < 1e-7
    assert relative_error(found.loss(TIMES), flow.loss) < 1e-6
    changes = jax.jit(jax.vmap(lambda u: jax.jvp(lambda w: f(w, X_TEST), (w0,), (u,))[1]))(flow.displacement)
    on_test = alpha * outputs_at_start(case, test=True) + np.asarray(changes)
    assert relative_error(found.test_outputs(TIMES), on_test) < 1e-7


@cases
def test_the_flow_in_closed_form_is_the_same_to_rounding(case):
    f, w0, target, _ = CASES[case]
    ts = np.array([0.0, 1.0, 1e3, np.inf])
    flow = lj.gradient_flow(lj.linearize(lj.on_data(f, X), w0), lj.square_loss(target), w0, jnp.asarray(ts))
    assert relative_error(regression(case).outputs(ts), flow.outputs) < 1e-9


@cases
def test_a_centered_model_starts_from_zero_at_every_scale_up_to_inf(case):
    f, w0, target, _ = CASES[case]
    plain = regression(case)
    # The same change as of a target that is that far from the start.
    from_start = lj.square_loss(jnp.asarray(np.asarray(target) + outputs_at_start(case)))
    moved = np.asarray(kernel_regression(f, w0, X, from_start, x_test=X_TEST).test_outputs(2.0))
    for alpha in (1.0, 1e7, np.inf):
        found = regression(case, alpha, center=True)
        assert not np.any(found.outputs(0.0))
        assert not np.any(found.test_outputs(0.0))
        np.testing.assert_allclose(found.eigenvalues, plain.eigenvalues, rtol=1e-10)
        np.testing.assert_allclose(found.test_outputs(2.0), moved - outputs_at_start(case, test=True), atol=1e-10)


@pytest.mark.parametrize("kind", ["full rank", "fewer parameters than outputs", "duplicated inputs", "one sample"])
def test_the_end_of_time_is_the_least_squares_solution_of_least_norm(kind):
    f, w0, target, _ = CASES["three outputs"]
    x, y, rank = X, target, 21
    if kind == "fewer parameters than outputs":
        f, w0, y, rank = linear, normal(9, 4), target[:, 0], 4
    if kind == "duplicated inputs":
        x, y, rank = jnp.asarray(np.concatenate([X[:4], X[:3]])), target, 12
    if kind == "one sample":
        x, y, rank = X[:1], target[:1], 3
    found = kernel_regression(f, w0, x, lj.square_loss(y), x_test=X_TEST)
    assert int(found.rank) == rank
    j, j_test = jacobian(f, w0, x), jacobian(f, w0, X_TEST)
    start, on_test = (np.asarray(jax.jit(f)(w0, inputs)) for inputs in (x, X_TEST))
    gap = np.ravel(np.asarray(y) - start)
    u = np.linalg.lstsq(j, gap, rcond=1e-6)[0]
    error = 100 * float(found.condition) * np.finfo(float).eps
    assert error < 1e-5
    np.testing.assert_allclose(np.ravel(np.asarray(found.outputs(np.inf)) - start), j @ u, atol=error)
    np.testing.assert_allclose(np.ravel(np.asarray(found.test_outputs(np.inf)) - on_test), j_test @ u, atol=error)
    np.testing.assert_allclose(
        found.loss(jnp.inf),
        0.5 * np.mean(np.sum((j @ u - gap).reshape(y.shape).reshape(len(x), -1) ** 2, 1)),
        atol=error,
    )


def test_copies_of_an_input_end_at_the_mean_of_their_targets():
    f, w0, _, _ = CASES["one output"]
    x, y = np.concatenate([X, X]), np.asarray(normal(10, 14))
    for dtype in (jnp.float64, jnp.float32):
        w, inputs, target, on_test = jax.tree.map(lambda a, dtype=dtype: jnp.asarray(a, dtype), (w0, x, y, X_TEST))
        found = kernel_regression(f, w, inputs, lj.square_loss(target), x_test=on_test)
        assert int(found.rank) == 7
        np.testing.assert_array_equal(found.eigenvalues[7:], 0)
        expected = np.tile(y.reshape(2, 7).mean(0), 2)
        np.testing.assert_allclose(found.outputs(jnp.inf), expected, atol=tolerance(dtype))
        stays = 0.5 * np.mean((expected - y) ** 2)
        np.testing.assert_allclose(found.loss(jnp.inf), stays, rtol=tolerance(dtype))
        times = np.array([0.0, 1e-30, 1e30, np.inf])
        assert np.all(np.isfinite(found.test_outputs(times)))
        # 7 distinct inputs with those means: the copies change nothing else.
        single = kernel_regression(f, w0, X, lj.square_loss(jnp.asarray(expected[:7])), x_test=X_TEST)
        np.testing.assert_allclose(
            found.test_outputs(jnp.inf), single.test_outputs(jnp.inf), atol=30 * tolerance(dtype)
        )


def test_one_mode_is_one_exponential():
    w0, x, target, x_test = (jnp.asarray(np.array(a)) for a in ([2.0], [[3.0]], [1.0], [[1.5]]))
    found = kernel_regression(linear, w0, x, lj.square_loss(target), x_test=x_test)
    t = np.array([0.0, 0.1, 1.0, np.inf])
    decay = 5 * np.exp(-9 * t)
    np.testing.assert_allclose(np.asarray(found.outputs(t))[:, 0], 1 + decay, rtol=1e-12)
    np.testing.assert_allclose(np.asarray(found.test_outputs(t))[:, 0], 0.5 + decay / 2, rtol=1e-12)
    np.testing.assert_allclose(found.loss(t), decay**2 / 2, rtol=1e-12)
    np.testing.assert_allclose([found.condition, found.effective_rank, found.rank, found.eigenvalues[0]], [1, 1, 1, 9])


def test_a_zero_kernel_learns_nothing_and_gives_numbers():
    flat = lambda w, x: (x @ w) ** 2
    found = kernel_regression(flat, jnp.asarray(np.zeros(4)), X, lj.square_loss(jnp.asarray(np.ones(7))), x_test=X_TEST)
    assert str(found).splitlines()[1].split() == ["rank", "0", "of", "7"]
    np.testing.assert_array_equal(found.outputs(TIMES), np.zeros((4, 7)))
    np.testing.assert_array_equal(found.test_outputs(jnp.inf), np.zeros(5))
    np.testing.assert_array_equal([found.rank, found.effective_rank, found.condition], [0, 0, 0])
    np.testing.assert_array_equal(found.test_ridge(0.0), np.zeros(5))
    time, value = found.best_time(lj.square_loss(jnp.asarray(np.ones(5))))
    assert float(time) == np.inf
    np.testing.assert_allclose(value, 0.5, rtol=1e-12)


def test_the_spectrum_is_that_of_the_gram_in_the_metric_of_the_loss():
    f, w0, _, _ = CASES["three outputs"]
    values = np.asarray(lj.spectrum(f, w0, X))
    for alpha, mean, weight in ((0.5, True, 1 / 7), (3.0, False, 1.0)):
        found = regression("three outputs", alpha, mean)
        np.testing.assert_allclose(found.eigenvalues, weight * values, rtol=1e-9)
        np.testing.assert_allclose(found.condition, values[0] / values[-1], rtol=1e-8)
        np.testing.assert_allclose(found.effective_rank, lj.kernels.effective_rank(jnp.asarray(values)), rtol=1e-10)


def test_dropped_modes_are_counted_and_the_condition_with_them_is_told():
    """Three samples in two dimensions: the zero of the third mode is rounding, and makes another condition."""
    x = np.array([[1.0, 0.0], [1.0, 1e-7], [0.0, 1e-3]])
    arguments = (linear, jnp.zeros(2), jnp.asarray(x), lj.square_loss(jnp.ones(3)))
    found = kernel_regression(*arguments)
    assert [int(found.rank), int(found.dropped)] == [2, 1]
    np.testing.assert_allclose(found.condition, 2e6, rtol=1e-5)
    assert float(found.whole_condition) > 1e15
    assert "1 below rounding, condition with them" in str(found)
    kept = kernel_regression(linear, jnp.zeros(2), jnp.asarray(x[:1]), lj.square_loss(jnp.ones(1)))
    assert (float(kept.condition), float(kept.whole_condition), int(kept.dropped)) == (1.0, 1.0, 0)


def test_what_is_not_above_rtol_is_never_learned():
    x, y = in_modes(np.array([1.0, 0.3, 0.1, 0.01]), n=6, seed=11), np.asarray(normal(12, 6))
    w0, loss = jnp.asarray(np.zeros(4)), lj.square_loss(jnp.asarray(y))
    for rtol, rank in ((None, 4), (1e-3, 3), (0.05, 2)):
        found = kernel_regression(linear, w0, jnp.asarray(x), loss, rtol=rtol)
        expected = x @ np.linalg.pinv(x, rcond=0.005 if rtol is None else rtol**0.5) @ y
        np.testing.assert_allclose(found.outputs(jnp.inf), expected, atol=1e-10)
        assert int(found.rank) == rank


# ---- ridge regression ----


@cases
@pytest.mark.parametrize("mean", [True, False])
def test_ridge_solves_the_normal_equations_of_the_parameters(case, mean):
    f, w0, target, _ = CASES[case]
    alpha, penalties = (0.5 if mean else 3.0), np.array([1e-3, 0.1, 10.0, 50.0])
    found = regression(case, alpha, mean)
    ridge, test_ridge = np.asarray(found.ridge(penalties)), np.asarray(found.test_ridge(penalties))
    c = 1 / 7 if mean else 1.0
    j, j_test = jacobian(f, w0, X), jacobian(f, w0, X_TEST)
    start, on_test = (alpha * outputs_at_start(case, test=test) for test in (False, True))
    for i, penalty in enumerate(penalties):
        matrix = c * j.T @ j + float(penalty) * np.eye(j.shape[1])
        u = np.linalg.solve(matrix, c * j.T @ np.ravel(np.asarray(target) - start))
        np.testing.assert_allclose(ridge[i], start + (j @ u).reshape(start.shape), atol=1e-9)
        np.testing.assert_allclose(test_ridge[i], on_test + (j_test @ u).reshape(on_test.shape), atol=1e-9)


@cases
def test_ridge_without_penalty_is_the_end_and_with_an_infinite_one_the_start(case):
    found = regression(case)
    np.testing.assert_allclose(found.ridge(0.0), found.outputs(np.inf), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(found.test_ridge(0.0), found.test_outputs(jnp.inf), rtol=1e-9, atol=1e-9)
    np.testing.assert_array_equal(found.test_ridge(jnp.inf), found.test_outputs(0.0))


def test_a_flow_to_t_fits_every_mode_as_ridge_of_penalty_one_over_t_and_up_to_thirty_percent_more():
    zero, one = jnp.asarray(np.zeros(1)), jnp.asarray(np.ones(1))
    found = kernel_regression(linear, zero, one[:, None], lj.square_loss(one))
    t = np.geomspace(1e-6, 1e6, 2000)
    ratio = (np.asarray(found.outputs(t)) / np.asarray(found.ridge(1 / t)))[:, 0]
    assert np.all(ratio >= 1 - 1e-12)
    assert 1.29 < np.max(ratio) < 1.30
    np.testing.assert_allclose(ratio[[0, -1]], 1, atol=1e-5)


# ---- the best time to stop ----


def noisy(seed, *, n=40, d=30, decay, noise, dtype=np.float64):
    """Regression on noisy targets with a kernel whose eigenvalues fall as a power: an optimum at a finite time."""
    rng = np.random.default_rng(seed)
    data = in_modes(np.arange(1.0, d + 1) ** -decay, n=2 * n, seed=seed) * np.sqrt(n)
    targets = data @ rng.standard_normal(d) + noise * rng.standard_normal(2 * n)
    x, x_test, y, y_test = (jnp.asarray(a, dtype) for a in (data[:n], data[n:], targets[:n], targets[n:]))
    found = kernel_regression(linear, jnp.asarray(np.zeros(d, dtype)), x, lj.square_loss(y), x_test=x_test)
    return found, lj.square_loss(y_test)


GRID = np.array([0.0, *np.geomspace(1e-4, 1e15, 20_000), np.inf])


@eqx.filter_jit
def losses_at(found, loss, times):
    return jax.vmap(lambda t: loss(found.test_outputs(t)))(times)


@eqx.filter_jit
def slope_in_log_time(found, loss, time):
    return jax.grad(lambda s: loss(found.test_outputs(time * jnp.exp(s))))(0.0)


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("noise", [0.03, 0.3, 3.0])
@pytest.mark.parametrize("decay", [0.5, 4.0])
def test_the_best_time_is_that_of_a_dense_grid_and_better(seed, noise, decay):
    found, loss = noisy(seed, decay=decay, noise=noise)
    time, value = found.best_time(loss)
    brute = np.asarray(losses_at(found, loss, jnp.asarray(GRID)))
    at_best = float(losses_at(found, loss, time[None])[0])
    i = int(np.argmin(brute))
    assert float(value) <= brute[i] * (1 + 1e-12)
    np.testing.assert_allclose(value, at_best, rtol=1e-9)
    np.testing.assert_allclose(value, brute[i], rtol=1e-4)
    if np.isfinite(time) and np.sum(brute < brute[i] * (1 + 1e-9)) < 50:
        np.testing.assert_allclose(time, GRID[i], rtol=0.01)
        # At an inner optimum the loss is stationary, to the rounding of the two terms that cancel.
        assert abs(float(slope_in_log_time(found, loss, time))) < 1e-9 * brute[0]


def test_some_of_these_optima_are_inside():
    times = [float(found.best_time(loss)[0]) for found, loss in (noisy(s, decay=4.0, noise=0.3) for s in range(6))]
    assert sum(0 < t < np.inf for t in times) >= 4


def test_the_best_time_in_float32_and_with_several_outputs():
    for seed in (1, 2, 3):
        single, loss = noisy(seed, decay=1.0, noise=1.0, dtype=np.float32)
        double, exact = noisy(seed, decay=1.0, noise=1.0)
        (t32, l32), (t64, l64) = single.best_time(loss), double.best_time(exact)
        assert t32.dtype == l32.dtype == jnp.float32
        np.testing.assert_allclose(l32, l64, rtol=1e-4)
        np.testing.assert_allclose(t32, t64, rtol=0.02)
    found, loss = regression("three outputs"), lj.square_loss(CASES["three outputs"][3])
    assert float(found.best_time(loss)[1]) <= np.min(losses_at(found, loss, jnp.asarray(GRID))) * (1 + 1e-12)


@cases
def test_on_the_training_data_no_stop_is_better_than_the_end(case):
    f, w0, target, _ = CASES[case]
    found = kernel_regression(f, w0, X, lj.square_loss(target), x_test=X)
    time, value = found.best_time(lj.square_loss(target))
    assert float(time) == np.inf
    assert float(value) < 1e-15


def test_a_test_target_at_the_start_is_best_left_alone():
    found = regression("one output")
    assert [float(a) for a in found.best_time(lj.square_loss(found.test_outputs(0.0)))] == [0.0, 0.0]


def test_a_target_passed_long_before_anything_is_learned_is_found():
    """An optimum far below the first time of the grid: on one mode, the target a 1e-9th of the way."""
    zero, one, target = (jnp.asarray(np.full(1, value)) for value in (0.0, 1.0, 1e-9))
    found = kernel_regression(linear, zero, one[:, None], lj.square_loss(one), x_test=one[:, None])
    time, value = found.best_time(lj.square_loss(target))
    np.testing.assert_allclose(time, 1e-9, rtol=1e-5)
    assert float(value) < 1e-30


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_the_few_products_of_the_search_give_the_test_outputs_of_all_times_to_rounding(dtype):
    """Eigenvalues all the way down to rounding, the same coefficient of u on every mode: the hardest case."""
    m, eps = 400, float(jnp.finfo(dtype).eps)
    values = np.geomspace(2 * m**0.5 * eps, 1.0, m).astype(dtype)
    singular, zero, eye = (
        jnp.asarray(np.sqrt(values)),
        jnp.asarray(np.zeros(m, dtype)),
        jnp.asarray(np.eye(m, dtype=dtype)),
    )

    @eqx.filter_jit
    def at_start(values, singular):
        solution = tangent_solution(values, eye, singular, zero, 1.0)
        # J = diag(singular), and the outputs on test points are u itself.
        return KernelRegression(solution, GramTransfer(eye * singular[None]), zero), _time_grid(solution.eigenvalues)

    @eqx.filter_jit
    def error(found, time):
        return jnp.linalg.norm(_distance_on_test(found, lj.square_loss(found.test_outputs(time)))(time))

    found, grid = at_start(jnp.asarray(values), singular)
    grid = np.asarray(grid)
    np.testing.assert_allclose(np.linalg.norm(found.test_outputs(np.inf)), m**0.5, rtol=100 * eps)
    for i in (3, grid.size // 2, grid.size - 5):
        time = jnp.asarray(np.sqrt(grid[i] * grid[i + 1]))  # between two of those that the basis is made from
        assert float(error(found, time)) < 100 * eps * m**0.5


# ---- derivatives, compilation, maps, precision ----


@cases
def test_derivatives_in_targets_scale_and_time_are_those_of_finite_differences(case):
    f, w0, target, _ = CASES[case]
    probe = normal(13, *outputs_at_start(case, test=True).shape)

    def value(y, alpha, t):
        found = kernel_regression(f, w0, X, lj.square_loss(y), x_test=X_TEST, alpha=alpha)
        return jnp.vdot(probe, found.test_outputs(t)) + jnp.sum(found.test_ridge(1 / t) ** 2) + found.loss(t)

    point = (np.asarray(target), np.array(1.5), np.array(0.8))
    direction = (np.asarray(normal(14, *target.shape)), np.array(0.7), np.array(-0.4))
    both = jax.jit(jax.value_and_grad(value, argnums=(0, 1, 2)))
    # The error of a central difference is of the order of its step squared, 1e-10.
    (_, got), (ahead, _), (behind, _) = (
        both(*(a + s * d for a, d in zip(point, direction, strict=True))) for s in (0.0, 1e-5, -1e-5)
    )
    along = sum(np.vdot(g, d) for g, d in zip(got, direction, strict=True))
    np.testing.assert_allclose(along, (ahead - behind) / 2e-5, rtol=1e-7)


def test_derivatives_at_the_end_and_on_zero_eigenvalues_are_numbers():
    y, x = np.asarray(normal(15, 14)), jnp.asarray(np.concatenate([X, X]))

    def value(y, t):
        found = kernel_regression(f1, CASES["one output"][1], x, lj.square_loss(y), x_test=X_TEST)
        return jnp.sum(found.test_outputs(t)) + jnp.sum(found.outputs(t))

    both = jax.jit(jax.value_and_grad(value, argnums=(0, 1)))
    (at_y, (by_target, by_time)), (at_zero, _) = (both(targets, np.array(np.inf)) for targets in (y, 0 * y))
    by_target = np.asarray(by_target)
    assert float(by_time) == 0
    # Linear in the targets, and the same for the copies.
    np.testing.assert_allclose(at_y - at_zero, by_target @ y, rtol=1e-8)
    np.testing.assert_allclose(by_target[:7], by_target[7:], rtol=1e-6, atol=1e-8)


def test_by_the_inputs_and_parameters_where_eigenvalues_are_distinct():
    f, w0, target, _ = CASES["one output"]

    def value(s, t):
        w = jax.tree.map(lambda a: a * (1 + s), w0)
        found = kernel_regression(f, w, (1 - s) * X, lj.square_loss(target), x_test=X_TEST)
        return jnp.sum(jnp.sin(found.test_outputs(t)))

    both = jax.jit(jax.value_and_grad(value))
    for t in (1.0, np.inf):
        (_, slope), (ahead, _), (behind, _) = (both(s, np.array(t)) for s in (0.0, 1e-5, -1e-5))
        np.testing.assert_allclose(slope, (ahead - behind) / 2e-5, rtol=1e-4)


@cases
def test_compiled_and_mapped_it_is_the_same(case):
    f, w0, target, y_test = CASES[case]
    found = regression(case)
    for method in (found.outputs, found.test_outputs, found.loss, found.ridge, found.test_ridge):
        together = np.asarray(method(jnp.asarray(TIMES)))
        np.testing.assert_allclose(together, np.stack([method(t) for t in TIMES]), rtol=1e-12, atol=1e-13)
        np.testing.assert_allclose(together, jax.jit(jax.vmap(method))(jnp.asarray(TIMES)), rtol=1e-12, atol=1e-13)
        np.testing.assert_array_equal(together, method(TIMES))
        np.testing.assert_allclose(together[0], method(0), rtol=1e-12, atol=1e-13)
    best = lambda y: found.best_time(lj.square_loss(y))
    for a, b in zip(best(y_test), jax.jit(best)(y_test), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-7)
    whole = lambda y: kernel_regression(f, w0, X, lj.square_loss(y), x_test=X_TEST).test_outputs(TIMES)
    many = np.stack([target, 2 * np.asarray(target)])
    each = np.stack([whole(jnp.asarray(y)) for y in many])
    np.testing.assert_allclose(jax.jit(jax.vmap(whole))(many), each, rtol=1e-9, atol=1e-9)


@cases
def test_float32_is_float64_to_its_digits(case):
    f, w0, target, _ = CASES[case]
    double = regression(case, 0.5)
    w, y, x, x_test = jax.tree.map(lambda a: a.astype(jnp.float32), (w0, target, X, X_TEST))
    single = kernel_regression(f, w, x, lj.square_loss(y), x_test=x_test, alpha=0.5)
    eps = float(jnp.finfo(jnp.float32).eps)
    for t, digits in ((0.5, 30), (100.0, 30 * 100), (jnp.inf, 3 * float(double.condition))):
        for method in ("outputs", "test_outputs"):
            got = getattr(single, method)(t)
            assert got.dtype == jnp.float32
            assert relative_error(got, getattr(double, method)(t)) < digits * eps


# ---- errors ----


SPOILT = np.where(np.arange(20).reshape(5, 4) == 6, np.nan, X_TEST)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"loss": lj.logistic_loss}, TypeError, r"loss must be a square loss, .* got LogisticLoss"),
        ({"loss": lambda _: lj.square_loss(ones(6))}, ValueError, "outputs and target must have the same shape"),
        ({"alpha": 0.0}, ValueError, r"alpha must be a scale in \(0, inf\], got 0"),
        ({"alpha": np.inf}, ValueError, r"alpha=inf needs a model with h\(w0\) = 0.*center"),
        ({"rtol": 1.0}, ValueError, r"rtol must be a share of the largest eigenvalue in \[0, 1\), .* got 1"),
        ({"rtol": -0.1}, ValueError, "rtol must be a share"),
        ({"x": np.asarray(X)[:0]}, ValueError, "x must hold at least one sample"),
        ({"x_test": np.asarray(X_TEST)[:0]}, ValueError, r"x_test must hold at least one sample .* got shape \(0, 4\)"),
        ({"x_test": np.asarray(X_TEST)[:, :3]}, ValueError, r"x_test must .* those of x, \(4,\), got \(3,\)"),
        (
            {"x_test": SPOILT},
            ValueError,
            r"x_test must be finite, .* index \(1, 2\)",
        ),
        ({"f": lambda w, x: jnp.sqrt(x[:, 0] + 2) + f1(w, x)}, ValueError, r"h\(w0\) must be finite, but 1 of its 7"),
        ({"f": lambda w, x: f1(w, x) - jnp.mean(f1(w, x))}, ValueError, "f must treat every sample by itself"),
        ({"w0": {}}, TypeError, "w0 must hold at least one real floating array"),
    ],
)
def test_bad_arguments_are_refused(change, error, match):
    arguments = {"f": f1, "w0": CASES["one output"][1], "x": X, "loss": lj.square_loss, **change}
    arguments["loss"] = arguments["loss"](ones(7))
    arguments |= {name: jnp.asarray(arguments[name]) for name in ("x", "x_test") if name in arguments}
    with pytest.raises(error, match=match):
        kernel_regression(**arguments)


def test_a_model_that_is_not_finite_on_the_test_points_only_is_refused():
    f = lambda w, x: jnp.sqrt(x[:, 0]) * f1(w, x)
    x = np.abs(np.asarray(X))
    with pytest.raises(ValueError, match=r"alpha f\(w0, x_test\) must be finite"):
        kernel_regression(f, CASES["one output"][1], jnp.asarray(x), lj.square_loss(ones(7)), x_test=jnp.asarray(-x))


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda r: r.outputs(-1.0), ValueError, r"t must be a flow time in \[0, inf\], got -1"),
        (lambda r: r.outputs(np.nan), ValueError, "t must be a flow time"),
        (lambda r: r.test_ridge(np.array([1.0, -2.0])), ValueError, r"penalty must be .* in \[0, inf\], got -2"),
        (lambda r: r.best_time(lj.square_loss(ones(4))), ValueError, "outputs and target must have the same shape"),
        (lambda r: r.best_time(lj.logistic_loss(ones(5))), TypeError, "loss must be a square loss"),
    ],
)
def test_bad_times_penalties_and_losses_are_refused(call, error, match):
    with pytest.raises(error, match=match):
        call(regression("one output"))


@pytest.mark.parametrize("call", ["test_outputs", "test_ridge", "best_time"])
def test_predictions_need_test_points(call):
    found = kernel_regression(f1, CASES["one output"][1], X, lj.square_loss(ones(7)))
    with pytest.raises(ValueError, match="x_test must be given to predict on test points"):
        getattr(found, call)(lj.square_loss(ones(5)) if call == "best_time" else 1.0)


def test_what_the_shape_annotations_would_refuse_first_has_messages_too():
    unchecked = getattr(kernel_regression, "__wrapped__", kernel_regression)
    with pytest.raises(TypeError, match=r"loss must be a square loss, .* got ArrayImpl"):
        unchecked(f1, CASES["one output"][1], X, ones(7))
    found = regression("one output")
    outputs = getattr(type(found.solution)._each, "__wrapped__", type(found.solution)._each)
    with pytest.raises(ValueError, match=r"t must be a number or a vector of them, got shape \(2, 2\)"):
        outputs(found.solution, ones((2, 2)), "t", lambda s: s)
