"""The comparison of the two flows, the drift of the kernel, switched activations."""

import functools
import logging

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import pytest

import lazyjax as lj
import problems
from helpers import relative_error
from lazyjax.laziness.compare import activation_stability, compare_flows, measure_kernel_drift

TIMES = np.array([0.0, 0.5, 2.0])
CENTERED = problems.centered(2)
N = CENTERED.target.size


@functools.cache
def compared():
    return lj.compare(CENTERED.h, CENTERED.loss, CENTERED.w0, jnp.asarray(TIMES), alpha=4.0, kernel_drift=True)


def numpy_norm(tree):
    return np.sqrt(sum(np.sum(np.asarray(leaf) ** 2) for leaf in jtu.tree_leaves(tree)))


def test_another_problem_of_the_same_shapes_compiles_nothing(caplog):
    """A first comparison compiles a few whole stages; other data, parameters, scales and tolerances none."""

    def count(function):
        caplog.clear()
        with caplog.at_level(logging.WARNING), jax.log_compiles():
            function()
        return [m for m in caplog.messages if m.startswith("Compiling ")]

    def compare(seed, alpha, rtol):
        p = problems.centered(seed)
        lj.compare(p.h, p.loss, p.w0, jnp.asarray(TIMES), alpha=alpha, rtol=rtol)

    assert len(count(lambda: jax.jit(lambda z: 3 * z)(1.0))) >= 1
    first = count(lambda: compare(0, 4.0, 1e-6))
    assert len(first) <= 14, first
    assert count(lambda: compare(1, 30.0, 1e-5)) == []


def test_every_gap_is_what_its_name_says():
    both = compared()
    difference = np.asarray(both.flow.outputs) - np.asarray(both.tangent_flow.outputs)
    np.testing.assert_allclose(both.output_gap, np.linalg.norm(difference, axis=1) / np.sqrt(N), rtol=1e-12)
    u, ubar = (jtu.tree_map(np.asarray, run.displacement) for run in (both.flow, both.tangent_flow))
    before = np.asarray(lj.gram(CENTERED.f, CENTERED.w0, CENTERED.x))
    for i in range(3):
        gap = {k: (u[k][i] - ubar[k][i]) / 4.0 for k in "ab"}
        np.testing.assert_allclose(both.param_gap[i], numpy_norm(gap), rtol=1e-9, atol=1e-16)
        moved = {k: u[k][i] / 4.0 for k in "ab"}
        np.testing.assert_allclose(both.displacement_norm[i], numpy_norm(moved), rtol=1e-9, atol=1e-16)
        w = {k: jnp.asarray(np.asarray(CENTERED.w0[k]) + moved[k]) for k in "ab"}
        after = np.asarray(lj.gram(CENTERED.f, w, CENTERED.x))
        drift = np.linalg.norm(after - before) / np.linalg.norm(before)
        np.testing.assert_allclose(both.kernel_drift[i], drift, rtol=1e-9, atol=1e-14)
    assert float(both.kernel_drift[-1]) > 1e-3


def test_the_metric_of_the_gap_is_that_of_the_loss():
    both = compared()
    total = compare_flows(both.flow, both.tangent_flow, lj.square_loss(CENTERED.target, mean=False))
    np.testing.assert_allclose(total.output_gap, np.sqrt(N) * np.asarray(both.output_gap), rtol=1e-14)
    np.testing.assert_array_equal(total.param_gap, both.param_gap)


def test_the_gradient_of_a_gap_is_finite_though_it_starts_at_zero():
    both = compared()

    @jax.jit
    def gaps(size):
        flow = eqx.tree_at(
            lambda f: (f.outputs, f.displacement),
            both.flow,
            jtu.tree_map(lambda leaf: size * leaf, (both.flow.outputs, both.flow.displacement)),
        )
        found = compare_flows(flow, both.tangent_flow, CENTERED.loss)
        return jnp.stack([found.output_gap, found.displacement_norm, found.param_gap])

    step = 1e-4
    slope = jax.jit(jax.jacrev(gaps))(2.0)
    difference = (np.asarray(gaps(2.0 + step)) - np.asarray(gaps(2.0 - step))) / (2 * step)
    np.testing.assert_allclose(slope, difference, rtol=1e-6, atol=1e-12)
    assert np.all(slope[:, 0] == 0)


def test_a_linear_model_has_no_gap_and_no_drift():
    p = problems.linear(1)
    ts = jnp.asarray(TIMES)
    both = lj.compare(p.h, p.loss, p.w0, ts, alpha=1.0, kernel_drift=True, solver=diffrax.Tsit5())
    assert float(both.output_gap.max()) < 1e-14
    assert float(both.kernel_drift.max()) == 0.0
    assert float(both.displacement_norm[-1]) > 0.1
    # A flow that diverged has no gap either: it has none that is known, and not one of zero.
    diverged = jtu.tree_map(lambda leaf: leaf.at[-1].set(jnp.nan), (both.flow.outputs, both.flow.displacement))
    flow = eqx.tree_at(lambda flow: (flow.outputs, flow.displacement), both.flow, diverged)
    spoilt = compare_flows(flow, both.tangent_flow, p.loss)
    for name in ("output_gap", "param_gap", "displacement_norm"):
        assert np.isnan(getattr(spoilt, name)).tolist() == [False, False, True]


def test_a_comparison_prints_its_numbers_and_inside_a_trace_its_shapes():
    both = compared()
    lines = str(both).splitlines()
    assert lines[0] == "comparison with the tangent model at alpha = 4"
    assert "kernel_drift" in lines[1]
    assert len(lines) == 2 + TIMES.size
    assert f"{float(both.output_gap[-1]):.3g}" in lines[-1]
    assert repr(both) == str(both)
    seen = []
    eqx.filter_eval_shape(lambda b: seen.append(str(b)) or b.output_gap, both)
    assert "output_gap=f64[3]" in seen[0]


def test_the_drift_keeps_its_digits_in_float32():
    narrow = functools.partial(jtu.tree_map, lambda leaf: leaf.astype(jnp.float32))
    u = problems.normal_like(5, CENTERED.w0)
    net = lj.models.two_layer(jnp.tanh)
    wide, single = lj.on_data(net, CENTERED.x), lj.on_data(net, narrow(CENTERED.x))
    truths = {alpha: measure_kernel_drift(wide, CENTERED.w0, u, 1 / alpha) for alpha in (1.0, 1e7, 1e9, 1e12)}
    for alpha in (1.0, 1e7, 1e12):
        drift = measure_kernel_drift(single, narrow(CENTERED.w0), narrow(u), 1 / alpha)
        assert drift.dtype == jnp.float32
        assert relative_error(drift, truths[alpha]) < 1e-5
    for alpha in (1e7, 1e12):  # first order in 1/alpha: from 1e7 to 1e12 by 1e5 exactly
        np.testing.assert_allclose(truths[alpha] * alpha, 1e9 * truths[1e9], rtol=1e-5)


def test_the_drift_goes_through_max_pooling_and_softmax():
    rng = np.random.default_rng(6)
    w0 = {"filter": problems.normal(rng, 3, 1, 2, 2), "head": problems.normal(rng, 3, 4)}
    x = problems.normal(rng, 2, 1, 5, 5)

    def h(w):
        z = jax.lax.conv_general_dilated(x, w["filter"], (1, 1), "VALID")
        z = jax.lax.reduce_window(z, -jnp.inf, jax.lax.max, (1, 1, 2, 2), (1, 1, 2, 2), "VALID")
        return jax.nn.softmax(jnp.mean(z, axis=(2, 3)) @ w["head"], axis=1)

    u, eps = problems.normal_like(8, w0), 1e-3
    moved = jtu.tree_map(lambda w, v: jnp.asarray(np.asarray(w) + eps * np.asarray(v)), w0, u)

    @jax.jit
    def kernel(w):
        rows = [leaf.reshape(8, -1) for leaf in jtu.tree_leaves(jax.jacrev(lambda v: h(v).ravel())(w))]
        return sum(row @ row.T for row in rows)

    before, after = np.asarray(kernel(w0)), np.asarray(kernel(moved))
    plain = np.linalg.norm(after - before) / np.linalg.norm(before)
    np.testing.assert_allclose(measure_kernel_drift(h, w0, u, eps), plain, rtol=1e-9)


def test_stability_counts_the_signs_that_stay():
    f, sizes = lj.models.mlp(), (3, 5, 4, 2)
    (w0, x), (w, _) = ((p.w0, p.x) for p in (problems.rows(seed, n=6, sizes=sizes) for seed in (9, 10)))
    preactivations = jax.jit(f.preactivations)
    shares = [
        np.mean((np.asarray(a) > 0) == (np.asarray(b) > 0))
        for a, b in zip(preactivations(w0, x), preactivations(w, x), strict=True)
    ]
    np.testing.assert_allclose(activation_stability(f, w0, w, x), np.mean(shares))
    assert 0.2 < np.mean(shares) < 0.8
    assert float(activation_stability(lj.center(f, w0), w0, w0, x)) == 1.0
    doubled, start = lj.symmetrize(f, w0)
    np.testing.assert_allclose(activation_stability(doubled, start, (w, w), x), np.mean(shares))


def test_stability_under_jit_and_vmap_loses_no_sign():
    """A mean of these comparisons comes as 0.72 there with jax 0.10.1 on a CPU."""
    rng = np.random.default_rng(2)
    w = {"a": problems.normal(rng, 50, dtype=np.float32), "b": problems.normal(rng, 50, 100, dtype=np.float32)}
    x = problems.normal(rng, 1000, 100, dtype=np.float32)

    def stability(t):
        w0 = jtu.tree_map(lambda leaf: t * leaf, w)
        return activation_stability(lj.models.two_layer(), w0, jtu.tree_map(lambda leaf: 1.00001 * leaf, w0), x)

    scales = jnp.asarray(np.arange(1, 13, dtype=np.float32))
    np.testing.assert_array_equal(jax.jit(jax.vmap(stability))(scales), 1)


def test_a_model_without_preactivations_has_no_stability():
    with pytest.raises(TypeError, match=r"f.preactivations\(w, x\)"):
        activation_stability(lambda w, x: x @ w, jnp.ones(2), jnp.ones(2), jnp.ones((3, 2)))


def test_a_start_that_is_not_finite_at_one_sample_is_refused():
    w0, ts = jnp.asarray(np.array([1.0, 0.0, 1.0])), jnp.asarray(np.array([0.0, 1.0]))
    with pytest.raises(ValueError, match=r"h\(w0\) must be finite, but 1 of its 3"):
        lj.compare(lambda w: 1 / w, lj.square_loss(jnp.asarray(np.ones(3))), w0, ts, alpha=1.0)
