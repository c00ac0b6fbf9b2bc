"""`gradient_flow` by the exponential solver: precision, steps, re-linearization, choice, gradients, how flows end."""

import diffrax
import equinox as eqx
import jax
import jax.flatten_util
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import optax
import pytest

import lazyjax as lj
from helpers import relative_error
from lazyjax.flow.result import as_result, is_result
from lazyjax.models.maps import on_data

EXPONENTIAL = lj.TangentExponential()
MOVING = lj.TangentExponential(relinearize=True)  # what solver=None takes where the flow is long
LOOSE = {"rtol": 1e-4, "atol": 1e-6, "max_steps": 2**14}
BOTH = ("outputs", "displacement")


def problem(tau, *, n=20, d=5, width=30, activation=jnp.tanh, seed=0):
    """(h, loss, w0): a centered two-layer net on random targets; its numbers are no part of the compiled programs."""
    keys = jr.split(jr.key(seed), 3)
    w0 = lj.models.two_layer().init(keys[0], d=d, width=width, tau=tau)
    x, target = jr.normal(keys[1], (n, d)), jr.normal(keys[2], (n,))
    return on_data(lj.center(lj.models.two_layer(activation), w0), x), lj.square_loss(target), w0


LAZY, FEATURES = problem(1.0), problem(0.3)


def steps(flow):
    return int(flow.stats["num_steps"])


def cast(tree, dtype):
    return jtu.tree_map(lambda leaf: leaf.astype(dtype) if eqx.is_inexact_array(leaf) else leaf, tree)


# ---- precision and steps ----


def test_float32_agrees_with_float64_at_every_scale():
    ts = jnp.array([0.0, 1.0, 10.0, 100.0])
    single = cast(LAZY, jnp.float32)
    for alpha in (1.0, 1e2, 1e4, 1e7, 1e12):
        run = lj.gradient_flow(*single, ts, alpha=alpha, save=BOTH)
        truth = lj.gradient_flow(*cast(single, float), ts, alpha=alpha, save=BOTH, rtol=1e-9, solver=diffrax.Tsit5())
        assert run.outputs.dtype == jnp.float32
        assert bool(run.stats["solver"] == lj.flow.SOLVERS.tangent_exponential)
        for i in (1, 2, 3):
            found, right = ({name: jtu.tree_map(lambda leaf, i=i: leaf[i], getattr(f, name)) for name in BOTH}
                            for f in (run, truth))  # fmt: skip
            # At most 5.1e-6 and 8.5e-6.
            assert all(relative_error(found[name], right[name]) < 1e-4 for name in BOTH), (alpha, i)


def test_steps_fall_with_the_scale_whatever_the_horizon():
    """From 25 to 6 at T = 1e4, where Tsit5 takes 5e4; and few more where the horizon is 1e8 / lambda_max."""
    top = float(EXPONENTIAL.prepare(*LAZY)[1].linear.top)
    for horizon in (1.0, 1e2, 1e4, 1e8 / top):
        ts = jnp.array([0.0, horizon])
        counts = [
            steps(lj.gradient_flow(*LAZY, ts, alpha=alpha, solver=MOVING, **LOOSE))
            for alpha in 10.0 ** np.arange(1, 13)
        ]
        assert sorted(counts, reverse=True) == counts, (horizon, counts)
        assert max(counts) <= 30
        assert max(counts[3:]) <= 13, (horizon, counts)  # alpha at least 1e4; the largest eigenvalue is 600 smallest


def test_the_error_all_along_a_flow_follows_the_tolerance():
    """Of u, at times inside the layers of all modes too, where the kernel moves by some percent: alpha = 1 and 10."""
    ts = jnp.concatenate([jnp.zeros(1), jnp.logspace(-1, 3, 9)])  # from twice 1 / lambda_max on
    for alpha in (1.0, 10.0):
        tight = {"solver": diffrax.Dopri8(), "rtol": 1e-11, "atol": 1e-13, "max_steps": 2**14}
        truth = lj.gradient_flow(*LAZY, ts, alpha=alpha, save=BOTH, **tight)
        for rtol in (1e-3, 1e-4, 1e-5, 1e-6):
            run = lj.gradient_flow(*LAZY, ts, alpha=alpha, solver=MOVING, rtol=rtol, atol=rtol / 100, save=BOTH)
            for i in range(1, ts.size):
                found, right = (jtu.tree_map(lambda leaf, i=i: leaf[i], f.displacement) for f in (run, truth))
                assert relative_error(found, right) < 5 * rtol, (alpha, rtol, i)


# ---- re-linearization ----


def test_relinearization_saves_steps_where_features_are_learned():
    ts = jnp.array([0.0, 1000.0])
    plain, moving = (lj.gradient_flow(*FEATURES, ts, solver=solver, **LOOSE) for solver in (EXPONENTIAL, MOVING))
    assert steps(plain) > 5 * steps(moving)
    assert relative_error(moving.outputs[-1], plain.outputs[-1]) < 3e-4  # 7.3e-5; the loss falls from 0.4 to 5e-9


def test_relinearization_stays_out_of_lazy_flows():
    ts = jnp.array([0.0, 1e4])
    for alpha in (1e3, 1e6):
        plain, moving = (
            lj.gradient_flow(*LAZY, ts, alpha=alpha, solver=solver, **LOOSE) for solver in (EXPONENTIAL, MOVING)
        )
        assert steps(plain) == steps(moving) <= 15
        assert relative_error(moving.outputs[-1], plain.outputs[-1]) < 1e-14


# ---- the choice ----


def test_the_solver_that_is_chosen_is_recorded():
    h, loss, w0 = LAZY
    short, long = jnp.array([0.0, 0.5]), jnp.array([0.0, 1e4])
    explicit = lj.gradient_flow(h, loss, w0, short)
    assert bool(explicit.stats["solver"] == lj.flow.SOLVERS.tsit5)
    given = lj.gradient_flow(h, loss, w0, short, solver=diffrax.Heun())
    assert bool(given.stats["solver"] == lj.flow.SOLVERS.given)
    assert relative_error(given.outputs, explicit.outputs) < 1e-5
    tangent = lj.gradient_flow(lj.linearize(h, w0), loss, w0, long)
    assert bool(tangent.stats["solver"] == lj.flow.SOLVERS.closed_form)
    chosen, named = (lj.gradient_flow(h, loss, w0, long, alpha=1e3, solver=s, **LOOSE) for s in (None, MOVING))
    assert bool(chosen.stats["solver"] == lj.flow.SOLVERS.tangent_exponential)
    np.testing.assert_array_equal(chosen.outputs, named.outputs)


# ---- infinite time ----


def test_infinite_time_takes_a_bounded_number_of_steps_and_says_whether_it_arrived():
    h, loss, w0 = LAZY
    near = on_data(h.f, h.x.at[1].set(h.x[0] + 1e-5))  # two inputs almost the same: the smallest eigenvalue is 5e-10
    ts, options = jnp.array([0.0, 1.0, jnp.inf]), {"max_steps": 150, "throw": False, "save": BOTH}
    for model, alpha in [(h, 1e4), (h, jnp.inf), (near, 1e8), (near, jnp.inf)]:
        run = lj.gradient_flow(model, loss, w0, ts, alpha=alpha, **options)
        assert bool(run.result == lj.RESULTS.successful)
        # 18, 4, 78, 11: a new Gram costs four steps here, so that fewer steps and more Grams would take longer.
        assert steps(run) < 100
        # The gradient in the outputs has fallen by rtol: J^T (y - y*).
        moved = jtu.tree_map(lambda w, u, alpha=alpha: w + u[-1] / alpha, w0, run.displacement)
        gradient = jax.vjp(model, moved)[1](loss.cotangent(run.outputs[-1]))
        start = jax.vjp(model, w0)[1](loss.cotangent(run.outputs[0]))
        assert optax.tree.norm(gradient) < 2e-6 * optax.tree.norm(start)
    run = lj.gradient_flow(h, loss, w0, ts, alpha=1.0, **options)
    assert bool(run.result == lj.RESULTS.max_steps_reached)
    assert steps(run) == 150


# ---- gradients ----


class Unit(eqx.Module):
    x: jax.Array

    def __call__(self, w):
        return jnp.tanh(self.x @ w)


def test_gradients_of_a_flow_are_finite_differences():
    """With respect to the scale, the targets and the start, not centered; against differences by Dopri8."""
    keys = jr.split(jr.key(1), 3)
    x, target, w0 = jr.normal(keys[0], (5, 3)), jr.normal(keys[1], (5,)), jr.normal(keys[2], (3,))
    ts, weights = jnp.array([0.0, 1.0, 4.0]), jnp.arange(10.0).reshape(2, 5)

    def functional(alpha, target, w0, solver, rtol, max_steps):
        options = {"solver": solver, "rtol": rtol, "atol": 1e-3 * rtol, "max_steps": max_steps, "save": BOTH}
        run = lj.gradient_flow(Unit(x), lj.square_loss(target), w0, ts, alpha=alpha, **options)
        return jnp.sum(jnp.sin(run.outputs[1:]) * weights) + jnp.sum(run.displacement[-1] ** 2)

    arguments = (jnp.array(10.0), target, w0)
    found = jax.jit(jax.grad(lambda *args: functional(*args, EXPONENTIAL, 1e-8, 512), argnums=(0, 1, 2)))(*arguments)
    point, unravel = jax.flatten_util.ravel_pytree(arguments)
    reference = jax.jit(lambda v: functional(*unravel(v), diffrax.Dopri8(), 1e-13, 4096))
    step, rule = 1e-3, {-2: 1 / 12, -1: -8 / 12, 1: 8 / 12, 2: -1 / 12}  # right to step^4
    units = jnp.eye(point.size)
    differences = [sum(c * reference(point + i * step * unit) for i, c in rule.items()) / step for unit in units]
    found = jax.flatten_util.ravel_pytree(found)[0]
    assert relative_error(found, jnp.array(differences)) < 1e-6  # 2.9e-8
    np.testing.assert_allclose(found, jnp.array(differences), rtol=2e-5)  # every entry: at most 1e-6


# ---- kinks ----


SLIDING = problem(0.1, n=15, d=2, width=20, activation=jax.nn.relu, seed=1)
SLIDING_TIMES = jnp.array([0.0, 1.0, 20.0])


def test_a_flow_that_slides_along_a_kink_is_stopped_and_named():
    run = lj.gradient_flow(*SLIDING, SLIDING_TIMES, solver=EXPONENTIAL, throw=False)
    assert bool(run.result == lj.RESULTS.steps_collapsed)
    assert bool(run.result != diffrax.RESULTS.successful)
    assert 256 < steps(run) < 1000  # of 4096; it slides from t = 1.65 on
    # What came before is kept.
    np.testing.assert_array_equal(jnp.isfinite(run.loss), [True, True, False])
    with pytest.raises(eqx.EquinoxRuntimeError, match=r"slides along a kink.*lazyjax.gradient_descent"):
        lj.gradient_flow(*SLIDING, SLIDING_TIMES, solver=diffrax.Tsit5())


def test_the_remedies_go_through():
    """Gradient descent, and the fixed steps that it is."""
    descent = lj.gradient_descent(*SLIDING, optax.sgd(0.01), 2000)
    assert bool(descent.result == diffrax.RESULTS.successful)
    assert bool(descent.loss[-1] < 0.7 * descent.loss[0])
    fixed = {"solver": diffrax.Euler(), "stepsize_controller": diffrax.ConstantStepSize(), "dt0": 0.01}
    run = lj.gradient_flow(*SLIDING, SLIDING_TIMES, **fixed)
    assert bool(run.result == lj.RESULTS.successful)
    np.testing.assert_allclose(run.outputs[-1], descent.outputs, rtol=1e-10)


def test_a_flow_that_is_only_stiff_goes_on():
    """Tsit5 at its stability bound for 6695 steps, of which it rejects a fifth."""
    run = lj.gradient_flow(*LAZY, jnp.array([0.0, 1000.0]), alpha=100.0, solver=diffrax.Tsit5(), max_steps=2**14)
    assert bool(run.result == lj.RESULTS.successful)


# ---- results ----


def test_results_compare_with_diffrax_both_ways():
    ours, theirs = as_result(diffrax.RESULTS.max_steps_reached), diffrax.RESULTS.max_steps_reached
    assert as_result(ours) is ours
    for left, right in [(ours, theirs), (theirs, ours), (ours, lj.RESULTS.max_steps_reached), (ours, ours)]:
        assert bool(left == right)
        assert not bool(left != right)
    collapsed = as_result(lj.RESULTS.steps_collapsed)
    for left, right in [(ours, diffrax.RESULTS.successful), (diffrax.RESULTS.successful, collapsed), (ours, collapsed)]:
        assert bool(left != right)
        assert not bool(left == right)
    # Every reason that diffrax has keeps its name and its text.
    for name in ("successful", "max_steps_reached", "event_occurred", "nonfinite"):
        assert bool(getattr(lj.RESULTS, name) == lj.RESULTS.promote(getattr(diffrax.RESULTS, name)))
        assert lj.RESULTS[getattr(lj.RESULTS, name)] == diffrax.RESULTS[getattr(diffrax.RESULTS, name)]
    assert all(is_result(item) for item in (ours, theirs, collapsed, lj.RESULTS.nonfinite))
    assert not is_result(0)
    assert not is_result(lj.flow.SOLVERS.tsit5)


def test_results_travel_through_jit_and_vmap_and_name_the_remedy():
    def end(bad):
        return as_result(lj.RESULTS.where(bad, lj.RESULTS.steps_collapsed, lj.RESULTS.successful))

    ends = jax.jit(jax.vmap(end))(jnp.array([False, True, False]))
    np.testing.assert_array_equal(jax.vmap(lambda r: r == diffrax.RESULTS.successful)(ends), [True, False, True])
    np.testing.assert_array_equal(eqx.filter_jit(lambda r: r == lj.RESULTS.steps_collapsed)(ends), [False, True, False])
    raising = eqx.filter_jit(lambda r: r.error_if(jnp.ones(2), r != lj.RESULTS.successful))
    np.testing.assert_array_equal(raising(end(jnp.array(False))), 1.0)
    with pytest.raises(eqx.EquinoxRuntimeError, match=r"step sizes collapsed.*fixed steps"):
        raising(end(jnp.array(True)))
