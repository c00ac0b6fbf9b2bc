"""The comparison of the two flows, the drift of the kernel, switched activations."""

import functools

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import pytest

import lazyjax as lj
from helpers import centered_problem, linear_problem, relative_error
from lazyjax.laziness.compare import activation_stability, compare_flows, measure_kernel_drift

TIMES = jnp.array([0.0, 0.5, 2.0])
CENTERED = centered_problem(jr.key(2))


def test_every_gap_is_what_its_name_says():
    both = lj.compare(CENTERED.h, CENTERED.loss, CENTERED.w0, TIMES, alpha=4.0, kernel_drift=True)
    n = CENTERED.target.size
    difference = np.asarray(both.flow.outputs - both.tangent_flow.outputs)
    np.testing.assert_allclose(both.output_gap, np.linalg.norm(difference, axis=1) / np.sqrt(n), rtol=1e-12)
    w, wbar = (
        jtu.tree_map(lambda w0, u: w0[None] + u / 4.0, CENTERED.w0, run.displacement)
        for run in (both.flow, both.tangent_flow)
    )
    for i in range(3):
        squares = [np.sum((np.asarray(w[k][i]) - np.asarray(wbar[k][i])) ** 2) for k in "ab"]
        np.testing.assert_allclose(both.param_gap[i], np.sqrt(sum(squares)), rtol=1e-9, atol=1e-16)
        squares = [np.sum((np.asarray(w[k][i]) - np.asarray(CENTERED.w0[k])) ** 2) for k in "ab"]
        np.testing.assert_allclose(both.displacement_norm[i], np.sqrt(sum(squares)), rtol=1e-9, atol=1e-16)
        moved = {k: w[k][i] for k in "ab"}
        before, after = (lj.gram(CENTERED.f, p, CENTERED.x) for p in (CENTERED.w0, moved))
        drift = np.linalg.norm(after - before) / np.linalg.norm(before)
        np.testing.assert_allclose(both.kernel_drift[i], drift, rtol=1e-9, atol=1e-14)
    assert float(both.kernel_drift[-1]) > 1e-3


def test_the_metric_of_the_gap_is_that_of_the_loss():
    mean = lj.compare(CENTERED.h, CENTERED.loss, CENTERED.w0, TIMES, alpha=4.0)
    # Without 1/n the flow runs n times faster.
    n = CENTERED.target.size
    total = lj.compare(
        CENTERED.h, lj.square_loss(CENTERED.target, mean=False), CENTERED.w0, TIMES / n, alpha=4.0, rtol=1e-8
    )
    np.testing.assert_allclose(total.output_gap[1:], np.sqrt(n) * mean.output_gap[1:], rtol=1e-4)
    np.testing.assert_allclose(total.param_gap[1:], mean.param_gap[1:], rtol=1e-4)


def test_the_gradient_of_a_gap_is_finite_though_it_starts_at_zero():
    def gap(scale):
        both = lj.compare(CENTERED.h, CENTERED.loss, CENTERED.w0, TIMES, alpha=scale, solver=diffrax.Tsit5(), rtol=1e-8)
        return jnp.stack([both.output_gap[-1], both.displacement_norm[-1], both.param_gap[-1]])

    step = 1e-3
    difference = (gap(4.0 + step) - gap(4.0 - step)) / (2 * step)
    np.testing.assert_allclose(jax.jacrev(gap)(4.0), difference, rtol=1e-3)


def test_a_linear_model_has_no_gap_and_no_drift():
    problem = linear_problem(jr.key(1))
    both = lj.compare(problem.h, problem.loss, problem.w0, TIMES, alpha=1.0, kernel_drift=True, solver=diffrax.Tsit5())
    assert float(both.output_gap.max()) < 1e-14
    assert float(both.kernel_drift.max()) == 0.0
    assert float(both.displacement_norm[-1]) > 0.1
    # A flow that diverged has no gap either: it has none that is known, and not one of zero.
    diverged = jtu.tree_map(lambda leaf: leaf.at[-1].set(jnp.nan), (both.flow.outputs, both.flow.displacement))
    flow = eqx.tree_at(lambda flow: (flow.outputs, flow.displacement), both.flow, diverged)
    spoilt = compare_flows(flow, both.tangent_flow, problem.loss)
    for name in ("output_gap", "param_gap", "displacement_norm"):
        assert np.isnan(getattr(spoilt, name)).tolist() == [False, False, True]


@pytest.mark.parametrize("alpha", [1.0, 1e7, 1e12])
def test_the_drift_keeps_its_digits_in_float32(alpha):
    u = jtu.tree_map(lambda w: jr.normal(jr.key(5), w.shape), CENTERED.w0)
    h = functools.partial(lj.models.two_layer(jnp.tanh), x=CENTERED.x)
    single = functools.partial(lj.models.two_layer(jnp.tanh), x=CENTERED.x.astype(jnp.float32))
    narrow = functools.partial(jtu.tree_map, lambda leaf: leaf.astype(jnp.float32))
    drift = measure_kernel_drift(single, narrow(CENTERED.w0), narrow(u), 1 / alpha)
    truth = measure_kernel_drift(h, CENTERED.w0, u, 1 / alpha)
    assert drift.dtype == jnp.float32
    assert relative_error(drift, truth) < 1e-5
    if alpha > 1e6:  # first order in 1/alpha: from alpha = 1e7 to 1e12 by 1e5 exactly
        np.testing.assert_allclose(truth * alpha, 1e9 * measure_kernel_drift(h, CENTERED.w0, u, 1e-9), rtol=1e-5)


def test_the_drift_goes_through_max_pooling_and_softmax():
    key = jr.key(6)
    w0 = {"filter": jr.normal(key, (3, 1, 2, 2)), "head": jr.normal(key, (3, 4))}
    x = jr.normal(jr.key(7), (2, 1, 5, 5))

    def h(w):
        z = jax.lax.conv_general_dilated(x, w["filter"], (1, 1), "VALID")
        z = jax.lax.reduce_window(z, -jnp.inf, jax.lax.max, (1, 1, 2, 2), (1, 1, 2, 2), "VALID")
        return jax.nn.softmax(jnp.mean(z, axis=(2, 3)) @ w["head"], axis=1)

    u = jtu.tree_map(lambda w: jr.normal(jr.key(8), w.shape), w0)
    eps = 1e-3
    moved = jtu.tree_map(lambda w, v: w + eps * v, w0, u)

    def kernel(w):
        rows = [leaf.reshape(8, -1) for leaf in jtu.tree_leaves(jax.jacrev(lambda v: h(v).ravel())(w))]
        return sum(row @ row.T for row in rows)

    before, after = kernel(w0), kernel(moved)
    plain = jnp.linalg.norm(after - before) / jnp.linalg.norm(before)
    np.testing.assert_allclose(measure_kernel_drift(h, w0, u, eps), plain, rtol=1e-9)


def test_stability_counts_the_signs_that_stay():
    f = lj.models.mlp()
    w0 = lj.models.mlp().init(jr.key(9), [3, 5, 4, 2])
    w = lj.models.mlp().init(jr.key(10), [3, 5, 4, 2])
    x = jr.normal(jr.key(11), (6, 3))
    shares = [
        np.mean((np.asarray(a) > 0) == (np.asarray(b) > 0))
        for a, b in zip(f.preactivations(w0, x), f.preactivations(w, x), strict=True)
    ]
    np.testing.assert_allclose(activation_stability(f, w0, w, x), np.mean(shares))
    assert 0.2 < np.mean(shares) < 0.8
    assert float(activation_stability(lj.center(f, w0), w0, w0, x)) == 1.0
    doubled, start = lj.symmetrize(f, w0)
    np.testing.assert_allclose(activation_stability(doubled, start, (w, w), x), np.mean(shares))


def test_stability_under_jit_and_vmap_loses_no_sign():
    """A mean of these comparisons comes as 0.72 there with jax 0.10.1 on a CPU."""
    w = jtu.tree_map(lambda leaf: leaf.astype(jnp.float32), lj.models.two_layer().init(jr.key(2), d=100, width=50))
    x = jr.normal(jr.key(1), (1000, 100), jnp.float32)

    def stability(t):
        w0 = jtu.tree_map(lambda leaf: t * leaf, w)
        return activation_stability(lj.models.two_layer(), w0, jtu.tree_map(lambda leaf: 1.00001 * leaf, w0), x)

    scales = jnp.arange(1, 13, dtype=jnp.float32)
    np.testing.assert_array_equal(jax.jit(jax.vmap(stability))(scales), 1)


def test_a_model_without_preactivations_has_no_stability():
    with pytest.raises(TypeError, match=r"f.preactivations\(w, x\)"):
        activation_stability(lambda w, x: x @ w, jnp.ones(2), jnp.ones(2), jnp.ones((3, 2)))
