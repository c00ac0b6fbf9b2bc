"""`gradient_flow` by the exponential solver: precision, steps, re-linearization, choice, gradients, how flows end."""

import functools

import diffrax
import equinox as eqx
import jax
import jax.flatten_util
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import optax
import pytest

import lazyjax as lj
from helpers import relative_error
from lazyjax.flow.choose_solver import name_of
from lazyjax.flow.result import as_result, is_result
from lazyjax.flow.step_collapse import WINDOW
from problems import normal

EXPONENTIAL = lj.TangentExponential("dense")
MOVING = lj.TangentExponential("dense", relinearize=True)  # what solver=None takes if the flow is long
BOTH = ("outputs", "displacement")
LOOSE = {"rtol": 1e-4, "atol": 1e-6}
TIMES = np.array([0.0, *np.logspace(-1, 3, 9)])  # from twice 1 / lambda_max on


@functools.cache
def problem(tau, *, n=20, d=5, width=30, activation=jnp.tanh, seed=0):
    """(h, loss, w0): a centered two-layer net on random targets."""
    rng = np.random.default_rng(seed)
    w0 = {"a": normal(rng, width, scale=tau), "b": normal(rng, width, d, scale=tau)}
    x, target = normal(rng, n, d), normal(rng, n)
    return lj.on_data(lj.center(lj.models.two_layer(activation), w0), x), lj.square_loss(target), w0


def flow(problem, ts=TIMES, **options):
    """One program for each solver and precision: always as many times, what is saved, and steps at most."""
    options = {"save": BOTH, "max_steps": 2**14, **options}
    return lj.gradient_flow(*problem, jnp.asarray(ts), **options)


def until(horizon):
    return horizon * np.linspace(0.0, 1.0, TIMES.size)


def steps(flow):
    return int(flow.stats["num_steps"])


def cast(tree, dtype):
    return jtu.tree_map(lambda leaf: leaf.astype(dtype) if eqx.is_inexact_array(leaf) else leaf, tree)


def at(tree, i):
    return jtu.tree_map(lambda leaf: np.asarray(leaf)[i], tree)


LAZY, FEATURES = problem(1.0), problem(0.3)


# ---- precision and steps ----


def test_float32_agrees_with_float64_at_every_scale():
    ts = until(100.0)
    single = cast(LAZY, jnp.float32)
    for alpha in (1.0, 1e4, 1e12):
        run = flow(single, ts, alpha=alpha)
        truth = flow(cast(single, float), ts, alpha=alpha, rtol=1e-9, solver=diffrax.Tsit5())
        assert run.outputs.dtype == jnp.float32
        assert bool(run.stats["solver"] == lj.flow.SOLVERS.tangent_exponential)
        for i in range(1, ts.size):
            for name in BOTH:
                assert relative_error(at(getattr(run, name), i), at(getattr(truth, name), i)) < 1e-4, (alpha, i)


ALPHAS = (1e2, 1e3, 1e4, 1e6, 1e9, 1e12)
STEPS = {1.0: [4, 3, 3, 2, 2, 2], 1e2: [14, 10, 8, 5, 4, 3], 1e4: [17, 13, 10, 7, 5, 5], 1e7: [24, 16, 12, 9, 7, 6]}
"""Steps at each of these scales, per horizon: a change of the scheme, of its error estimate or of the cost of a linear
part shows here. Tsit5 takes 5e4 for a horizon of 1e4."""


@pytest.mark.parametrize("horizon", STEPS)
def test_steps_fall_with_the_scale_whatever_the_horizon(horizon):
    counts = [steps(flow(LAZY, until(horizon), alpha=alpha, solver=MOVING, **LOOSE)) for alpha in ALPHAS]
    assert sorted(counts, reverse=True) == counts, counts
    np.testing.assert_allclose(counts, STEPS[horizon], atol=1)  # rounding may turn one


def test_the_error_all_along_a_flow_follows_the_tolerance():
    """The error of u, also at times inside the layers of all modes, where the kernel moves by a few percent."""
    for alpha in (1.0, 10.0):
        truth = flow(LAZY, alpha=alpha, solver=diffrax.Tsit5(), rtol=1e-10, atol=1e-12)
        for rtol in (1e-3, 1e-4, 1e-5, 1e-6):
            run = flow(LAZY, alpha=alpha, solver=MOVING, rtol=rtol, atol=rtol / 100)
            for i in range(1, TIMES.size):
                found, right = (at(f.displacement, i) for f in (run, truth))
                assert relative_error(found, right) < 5 * rtol, (alpha, rtol, i)


# ---- re-linearization ----


def test_relinearization_saves_steps_if_features_are_learned():
    plain, moving = (flow(FEATURES, until(1000.0), solver=solver, **LOOSE) for solver in (EXPONENTIAL, MOVING))
    assert steps(plain) > 5 * steps(moving)
    assert abs(steps(moving) - 74) <= 3
    assert relative_error(moving.outputs[-1], plain.outputs[-1]) < 3e-4


def test_relinearization_stays_out_of_lazy_flows():
    for alpha in (1e3, 1e6):
        plain, moving = (
            flow(LAZY, until(1e4), alpha=alpha, solver=solver, **LOOSE) for solver in (EXPONENTIAL, MOVING)
        )
        assert steps(plain) == steps(moving) <= 15
        assert relative_error(moving.outputs[-1], plain.outputs[-1]) < 1e-14


# ---- the choice ----


def test_the_solver_that_is_chosen_is_recorded():
    assert bool(flow(LAZY, until(0.5)).stats["solver"] == lj.flow.SOLVERS.tsit5)
    assert bool(name_of(diffrax.Heun()) == lj.flow.SOLVERS.given)
    chosen, named = (flow(LAZY, until(1e4), alpha=1e3, solver=solver, **LOOSE) for solver in (None, MOVING))
    assert bool(chosen.stats["solver"] == lj.flow.SOLVERS.tangent_exponential)
    np.testing.assert_array_equal(chosen.outputs, named.outputs)


# ---- infinite time ----


@eqx.filter_jit
def gradient_norm(h, loss, w0, u, alpha, outputs):
    """The norm of J^T (y - y*) at w0 + u / alpha."""
    moved = jtu.tree_map(lambda w, v: w + v / alpha, w0, u)
    return optax.tree.norm(jax.vjp(h, moved)[1](loss.cotangent(outputs)))


def test_infinite_time_takes_a_bounded_number_of_steps_and_says_whether_it_arrived():
    h, loss, w0 = LAZY
    x = np.array(h.x)
    x[1] = x[0] + 1e-5  # two inputs almost the same: the smallest eigenvalue is 5e-10
    near = lj.on_data(h.f, jnp.asarray(x))
    ts, options = np.array([0.0, 1.0, np.inf]), {"max_steps": 60, "throw": False}
    for model, alpha in [(h, 1e4), (h, np.inf), (near, 1e8), (near, np.inf)]:
        run = flow((model, loss, w0), ts, alpha=alpha, **options)
        assert bool(run.result == lj.RESULTS.successful)
        # A new Gram costs four steps here, so that fewer steps and more Grams would take longer.
        assert steps(run) <= 30
        first, last = (
            float(gradient_norm(model, loss, w0, at(run.displacement, i), jnp.asarray(alpha), at(run.outputs, i)))
            for i in (0, -1)
        )
        assert last < 2e-6 * first
    run = flow(LAZY, ts, alpha=1.0, **options)  # it needs 120
    assert bool(run.result == lj.RESULTS.max_steps_reached)
    assert steps(run) == options["max_steps"]
    assert str(run.result).startswith("max_steps_reached: The maximum number of solver steps was reached")


# ---- gradients ----


class Unit(eqx.Module):
    x: jax.Array

    def __call__(self, w):
        return jnp.tanh(self.x @ w)


def test_gradients_of_a_flow_are_finite_differences():
    """With respect to the scale, the targets and the start, not centered; against differences by an explicit method."""
    rng = np.random.default_rng(1)
    unit, target, w0 = Unit(normal(rng, 5, 3)), normal(rng, 5), normal(rng, 3)
    ts, weights = jnp.asarray(np.array([0.0, 1.0, 4.0])), np.arange(10.0).reshape(2, 5)

    def functional(alpha, target, w0, solver, rtol, max_steps):
        options = {"solver": solver, "rtol": rtol, "atol": 1e-3 * rtol, "max_steps": max_steps, "save": BOTH}
        run = lj.gradient_flow(unit, lj.square_loss(target), w0, ts, alpha=alpha, **options)
        return jnp.sum(jnp.sin(run.outputs[1:]) * weights) + jnp.sum(run.displacement[-1] ** 2)

    arguments = (jnp.asarray(10.0), target, w0)
    found = jax.jit(jax.grad(lambda *args: functional(*args, EXPONENTIAL, 1e-8, 256), argnums=(0, 1, 2)))(*arguments)
    point, unravel = jax.flatten_util.ravel_pytree(arguments)
    reference = jax.jit(lambda v: functional(*unravel(v), diffrax.Tsit5(), 1e-12, 4096))
    step, rule = 1e-3, {-2: 1 / 12, -1: -8 / 12, 1: 8 / 12, 2: -1 / 12}  # right to step^4
    units = np.eye(point.size)
    shifted = lambda i, unit: float(reference(jnp.asarray(np.asarray(point) + i * step * unit)))
    differences = np.array([sum(c * shifted(i, unit) for i, c in rule.items()) / step for unit in units])
    found = np.concatenate([np.ravel(part) for part in found])
    assert relative_error(found, differences) < 1e-6
    np.testing.assert_allclose(found, differences, rtol=2e-5)


# ---- kinks ----

SLIDING = problem(0.1, n=15, d=2, width=20, activation=jax.nn.relu, seed=7)
SLIDING_TIMES = np.array([0.0, 1.0, 20.0])


@pytest.mark.parametrize("solver", [EXPONENTIAL, diffrax.Tsit5()], ids=["exponential", "explicit"])
def test_a_flow_that_slides_along_a_kink_is_stopped_and_named(solver):
    max_steps = 4096
    run = flow(SLIDING, SLIDING_TIMES, solver=solver, throw=False, max_steps=max_steps)
    assert bool(run.result == lj.RESULTS.steps_collapsed)
    assert bool(run.result != diffrax.RESULTS.successful)
    assert WINDOW < steps(run) < max_steps / 4
    # What came before is kept.
    np.testing.assert_array_equal(np.isfinite(run.loss), [True, True, False])
    with pytest.raises(eqx.EquinoxRuntimeError, match=r"slides along a kink.*lazyjax.gradient_descent"):
        flow(SLIDING, SLIDING_TIMES, solver=solver, max_steps=max_steps)


def test_the_remedies_go_through():
    """Gradient descent, and the fixed steps that it is."""
    descent = lj.gradient_descent(*SLIDING, optax.sgd(0.01), 2000)
    assert bool(descent.result == diffrax.RESULTS.successful)
    fixed = {"solver": diffrax.Euler(), "stepsize_controller": diffrax.ConstantStepSize(), "dt0": 0.01}
    run = flow(SLIDING, SLIDING_TIMES, **fixed)
    assert bool(run.result == lj.RESULTS.successful)
    assert float(run.loss[-1]) < 0.7 * float(run.loss[0])
    np.testing.assert_allclose(run.outputs[-1], descent.outputs, rtol=1e-10)


def test_a_flow_that_is_only_stiff_goes_on():
    """Tsit5 at its stability bound for thousands of steps, of which it rejects a fifth."""
    run = flow(LAZY, until(1000.0), alpha=100.0, solver=diffrax.Tsit5())
    assert bool(run.result == lj.RESULTS.successful)
    assert steps(run) > 3000


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

    ends = jax.jit(jax.vmap(end))(jnp.asarray(np.array([False, True, False])))
    np.testing.assert_array_equal(jax.vmap(lambda r: r == diffrax.RESULTS.successful)(ends), [True, False, True])
    np.testing.assert_array_equal(eqx.filter_jit(lambda r: r == lj.RESULTS.steps_collapsed)(ends), [False, True, False])
    raising = eqx.filter_jit(lambda r: r.error_if(jnp.ones(2), r != lj.RESULTS.successful))
    np.testing.assert_array_equal(raising(end(jnp.asarray(False))), 1.0)
    with pytest.raises(eqx.EquinoxRuntimeError, match=r"step sizes collapsed.*fixed steps"):
        raising(end(jnp.asarray(True)))
    assert str(ends) == "successful (2 of 3), steps_collapsed (1 of 3)"


def test_results_print_as_their_name_and_message():
    assert str(lj.RESULTS.successful) == repr(lj.RESULTS.successful) == "successful"
    assert str(lj.RESULTS.steps_collapsed).startswith("steps_collapsed: The step sizes collapsed")
    assert str(as_result(diffrax.RESULTS.nonfinite)).startswith("nonfinite: ")
    texts = []
    eqx.filter_jit(lambda result: texts.append(str(result)))(as_result(lj.RESULTS.successful))
    assert texts == ["traced result of shape ()"]
