"""Gradient descent: against NumPy, against the flow, at every scale, and its refusals."""

import functools

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import optax
import pytest

import lazyjax as lj
from helpers import centered_problem, relative_error
from lazyjax.flow.gradient_descent import check_proportional

CENTERED = centered_problem(jr.key(2))
SINGLE = centered_problem(jr.key(2), dtype=jnp.float32)
SGD = optax.sgd(0.05)
MOMENTUM = optax.sgd(0.05, momentum=0.9)


def descend(problem=CENTERED, optimizer=SGD, steps=30, **options):
    return lj.gradient_descent(problem.h, problem.loss, problem.w0, optimizer, steps, **options)


def numpy_descent(alpha, steps, rate, momentum=0.0):
    """w -= rate grad F_alpha(w) for the centered two-layer tanh net, by hand."""
    x, target = np.asarray(CENTERED.x), np.asarray(CENTERED.target)
    n = target.size
    a0, b0 = (np.asarray(CENTERED.w0[name]) for name in ("a", "b"))
    start = np.tanh(x @ b0.T) @ a0
    a, b, va, vb, losses = a0.copy(), b0.copy(), np.zeros_like(a0), np.zeros_like(b0), []
    for _ in range(steps):
        hidden = np.tanh(x @ b.T)
        residual = alpha * (hidden @ a - start) - target
        losses.append(0.5 * np.mean(residual**2))
        r = residual / (n * alpha)
        va = momentum * va + hidden.T @ r
        vb = momentum * vb + ((r[:, None] * (1 - hidden**2)) * a).T @ x
        a, b = a - rate * va, b - rate * vb
    return {"a": a, "b": b}, np.asarray(losses)


@pytest.mark.parametrize(("optimizer", "momentum"), [(SGD, 0.0), (MOMENTUM, 0.9)], ids=["sgd", "momentum"])
@pytest.mark.parametrize("alpha", [0.5, 20.0])
def test_descent_is_what_numpy_computes(optimizer, momentum, alpha):
    run = descend(optimizer=optimizer, alpha=alpha)
    params, losses = numpy_descent(alpha, 30, 0.05, momentum)
    assert relative_error(run.params, params) < 1e-12
    assert relative_error(run.losses, losses) < 1e-11
    moved = jtu.tree_map(lambda w, w0: alpha * (w - np.asarray(w0)), params, dict(CENTERED.w0))
    assert relative_error(run.displacement, moved) < 1e-10
    np.testing.assert_allclose(run.outputs, alpha * CENTERED.h(run.params), rtol=1e-10, atol=1e-13)


def test_halving_the_step_halves_the_distance_to_the_flow():
    """Euler's error is O(step)."""
    flow = lj.gradient_flow(CENTERED.h, CENTERED.loss, CENTERED.w0, jnp.array([0.0, 1.5]), rtol=1e-10, atol=1e-12)
    errors = [
        relative_error(descend(optimizer=optax.sgd(1.5 / steps), steps=steps).outputs, flow.outputs[-1])
        for steps in (100, 200)
    ]
    assert 1.9 < errors[0] / errors[1] < 2.1


@pytest.mark.parametrize("alpha", [1e7, jnp.inf])
def test_float32_keeps_its_digits_at_large_alpha(alpha):
    run = descend(SINGLE, MOMENTUM, 60, alpha=alpha)
    double = CENTERED._replace(
        h=lj.center(functools.partial(lj.models.two_layer(jnp.tanh), x=SINGLE.x.astype(float)), _widen(SINGLE.w0)),
        w0=_widen(SINGLE.w0),
        loss=lj.square_loss(SINGLE.target.astype(float)),
    )
    truth = descend(double, MOMENTUM, 60, alpha=alpha)
    assert run.outputs.dtype == jnp.float32
    assert relative_error(run.outputs, truth.outputs) < 1e-5
    assert relative_error(run.displacement, truth.displacement) < 1e-5


def _widen(tree):
    return jtu.tree_map(lambda leaf: leaf.astype(float), tree)


def test_at_infinity_descent_is_that_of_the_tangent_model():
    run = descend(optimizer=MOMENTUM, alpha=jnp.inf)
    tangent = lj.gradient_descent(lj.linearize(CENTERED.h, CENTERED.w0), CENTERED.loss, CENTERED.w0, MOMENTUM, 30)
    assert relative_error(run.outputs, tangent.outputs) < 1e-12
    assert relative_error(run.displacement, tangent.displacement) < 1e-12


@pytest.mark.standard_promotion  # optax mixes dtypes inside adam and the line search
@pytest.mark.parametrize(
    "optimizer", [optax.adam(0.02), optax.chain(optax.clip_by_global_norm(0.5), optax.sgd(0.05)), optax.lbfgs()]
)
def test_any_optax_optimizer_descends_and_is_refused_at_infinity_without_a_limit(optimizer):
    run = descend(optimizer=optimizer, alpha=3.0, steps=25)
    assert float(run.losses[-1]) < 0.5 * float(run.losses[0])
    with pytest.raises(ValueError, match="updates are proportional to the gradients"):
        descend(optimizer=optimizer, alpha=jnp.inf)


@pytest.mark.standard_promotion  # optax mixes dtypes inside adam
@pytest.mark.parametrize(
    ("optimizer", "limit"),
    [
        (SGD, True),
        (MOMENTUM, True),
        (optax.sgd(0.05, momentum=0.9, nesterov=True), True),
        (optax.sgd(optax.warmup_cosine_decay_schedule(0.0, 0.05, 5, 50), momentum=0.9), True),
        (optax.MultiSteps(SGD, 4).gradient_transformation(), True),
        # What a decay of 5e-4, a warm-up from zero and a wide clipping hide from a look at one gradient and its double.
        (optax.chain(optax.add_decayed_weights(5e-4), MOMENTUM), False),
        (optax.adam(optax.warmup_cosine_decay_schedule(0.0, 0.05, 5, 50)), False),
        (optax.chain(optax.clip(10.0), SGD), False),
    ],
    ids=["sgd", "momentum", "nesterov", "warm-up", "gathered", "decay", "warm adam", "clip"],
)
@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float16])
def test_proportional_updates_are_told_from_others(optimizer, limit, dtype):
    """At zero parameters too, where a weight decay has nothing to pull at."""
    coordinates = {"a": jnp.zeros(3, dtype), "b": jnp.full((2, 2), 1e-3, dtype)}
    if limit:
        check_proportional(optimizer, coordinates)
        return
    with pytest.raises(ValueError, match="updates are proportional to the gradients"):
        check_proportional(optimizer, coordinates)


def test_alphas_of_a_vmap_are_single_descents():
    alphas = jnp.array([1.0, 100.0, jnp.inf])
    runs = jax.vmap(lambda alpha: descend(alpha=alpha, throw=False).outputs)(alphas)
    for i, alpha in enumerate(alphas):
        assert relative_error(runs[i], descend(alpha=alpha).outputs) < 1e-12


def test_a_diverging_descent_says_so():
    run = descend(optimizer=optax.sgd(1e3), steps=200, throw=False)
    assert bool(run.result == diffrax.RESULTS.nonfinite)
    with pytest.raises(eqx.EquinoxRuntimeError, match="Nonfinite"):
        descend(optimizer=optax.sgd(1e3), steps=200)


def test_progress_is_shown_on_demand(capfd):
    descend(progress=True)
    jax.effects_barrier()
    assert "100.00%" in capfd.readouterr().err


@pytest.mark.parametrize("steps", [0, -3, 2.5, "ten"])
def test_a_bad_number_of_steps_is_refused(steps):
    with pytest.raises(ValueError, match="steps must be a whole number"):
        descend(steps=steps)


def test_what_is_no_optimizer_is_refused():
    with pytest.raises(TypeError, match=r"optax.sgd\(0.1\)"):
        descend(optimizer=0.1)
    with pytest.raises(ValueError, match="alpha must be a scale"):
        descend(alpha=-1.0)
