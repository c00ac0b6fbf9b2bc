"""The one-step criterion: against dense linear algebra, at every scale."""

import functools

import jax
import jax.flatten_util as jfu
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import lazyjax as lj
import problems
from helpers import relative_error
from lazyjax.laziness.hessian_norm import SecondDerivative, norm_lower
from lazyjax.laziness.one_step import lazy_ratio, step_criterion

CENTERED = problems.centered(2)
N = CENTERED.target.size


@functools.cache
def flat():
    vector, unravel = jfu.ravel_pytree(CENTERED.w0)
    h = jax.jit(lambda v: CENTERED.h(unravel(v)))
    return vector, h, jax.jit(jax.jacrev(h))


def jacobian(v):
    return np.asarray(flat()[2](v))


@pytest.mark.parametrize("alpha", [1.0, 30.0])
def test_the_criterion_is_what_one_dense_step_gives(alpha):
    step = step_criterion(CENTERED.h, CENTERED.loss, CENTERED.w0, alpha=alpha)
    w0, h, _ = flat()
    before = jacobian(w0)
    norm = np.linalg.norm(before, 2) / np.sqrt(N)
    np.testing.assert_allclose(step.step_size, 1 / norm**2, rtol=1e-8)
    gradient = before.T @ (alpha * np.asarray(h(w0)) - np.asarray(CENTERED.target)) / (N * alpha)
    w1 = np.asarray(w0) - gradient / norm**2
    change = np.linalg.norm(jacobian(jnp.asarray(w1)) - before, 2) / np.sqrt(N) / norm
    objectives = [float(CENTERED.loss(alpha * h(jnp.asarray(w)))) for w in (w0, w1)]
    np.testing.assert_allclose(step.jacobian_change, change, rtol=1e-7)
    np.testing.assert_allclose(step.objective_change, abs(objectives[1] / objectives[0] - 1), rtol=1e-7)
    np.testing.assert_allclose(step.ratio, step.jacobian_change / step.objective_change)


@pytest.mark.parametrize("alpha", [1e7, 1e12])
def test_the_change_of_the_differential_keeps_its_digits_in_float32(alpha):
    single = problems.centered(2, dtype=jnp.float32)
    step = step_criterion(single.h, single.loss, single.w0, alpha=alpha)
    wide, x, target = jax.tree.map(lambda leaf: leaf.astype(float), (single.w0, single.x, single.target))
    h = lj.on_data(lj.center(lj.models.two_layer(jnp.tanh), wide), x)
    truth = step_criterion(h, lj.square_loss(target), wide, alpha=alpha)
    assert step.jacobian_change.dtype == jnp.float32
    assert relative_error(step.jacobian_change, truth.jacobian_change) < 1e-4
    assert relative_error(step.ratio, truth.ratio) < 1e-4


def test_the_criterion_vanishes_at_infinity_and_for_a_linear_model():
    assert float(step_criterion(CENTERED.h, CENTERED.loss, CENTERED.w0, alpha=jnp.inf).ratio) == 0.0
    linear = step_criterion(lambda w: 2.0 * w, lj.square_loss(jnp.ones(3)), jnp.zeros(3))
    assert float(linear.jacobian_change) == 0.0
    assert float(linear.objective_change) > 0.1


def brute_hessian_norm(starts=300, iterations=400):
    """sup over unit u of |D2h(u, u)|_F by projected gradient ascent from many starts, on dense Hessians."""
    w0, h, _ = flat()
    hessians = np.asarray(jax.jit(jax.hessian(h))(w0))
    u = np.random.default_rng(0).normal(size=(starts, w0.size))
    for _ in range(iterations):
        u /= np.linalg.norm(u, axis=1, keepdims=True)
        hu = np.einsum("npq,sq->snp", hessians, u)
        value = np.einsum("snp,sp->sn", hu, u)
        u = u + 2 * np.einsum("sn,snp->sp", value, hu)  # ascent with a shift: monotone for this form
    return np.sqrt(np.max(np.sum(value**2, axis=1)) / N)


@functools.cache
def searched_norm():
    return float(norm_lower(SecondDerivative(CENTERED.h, CENTERED.w0, N**-0.5), N, jr.key(0), 10))


def test_the_lower_hessian_norm_reaches_the_supremum():
    """A two-layer net, whose Hessians have +- pairs of eigenvalues."""
    brute = brute_hessian_norm()
    estimate = searched_norm()
    assert estimate <= brute * (1 + 1e-6)
    assert estimate >= brute * (1 - 1e-6)


def test_the_lazy_ratio_is_its_formula_and_at_least_half_of_kappa():
    alpha = 3.0
    ratio = float(lazy_ratio(CENTERED.h, CENTERED.loss, CENTERED.w0, alpha=alpha))
    w0, h, _ = flat()
    dense, residual = jacobian(w0), -np.asarray(CENTERED.target)
    dh, d2h = np.linalg.norm(dense, 2) / np.sqrt(N), searched_norm()
    objective = float(CENTERED.loss(h(w0))) / alpha**2
    gradient = np.linalg.norm(dense.T @ residual) / (N * alpha)
    np.testing.assert_allclose(ratio, objective * alpha * d2h / (gradient * alpha * dh), rtol=1e-8)
    kappa = np.linalg.norm(residual) / np.sqrt(N) * d2h / dh**2 / alpha
    assert ratio >= 0.5 * kappa


@pytest.mark.parametrize(
    ("criterion", "h", "w0"),
    [(step_criterion, lambda w: w, np.ones(3)), (lazy_ratio, lambda w: w**2, np.zeros(3))],
    ids=["nothing left to fit", "no gradient"],
)
def test_a_start_with_nothing_to_train_is_refused(criterion, h, w0):
    with pytest.raises(ValueError, match="w0 must not be a stationary point"):
        criterion(h, lj.square_loss(jnp.ones(3)), jnp.asarray(w0))


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="step_size must be positive"):
        step_criterion(CENTERED.h, CENTERED.loss, CENTERED.w0, step_size=-0.1)
    with pytest.raises(ValueError, match="alpha must be a scale"):
        lazy_ratio(CENTERED.h, CENTERED.loss, CENTERED.w0, alpha=0.0)
    with pytest.raises(ValueError, match="starts must be at least 1"):
        lazy_ratio(CENTERED.h, CENTERED.loss, CENTERED.w0, starts=0)


def test_a_criterion_prints_its_numbers():
    step = step_criterion(CENTERED.h, CENTERED.loss, CENTERED.w0, alpha=30.0)
    assert f"{float(step.ratio):.3g}" in str(step)
    assert repr(step) == str(step)
    assert "ratio=f64[2]" in str(jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), step))
