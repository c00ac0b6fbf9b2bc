"""Gradient descent: against NumPy, against the flow, at every scale, and its refusals."""

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import optax
import pytest

import lazyjax as lj
import problems
from helpers import relative_error
from lazyjax.flow.displacement_step import check_proportional

CENTERED = problems.centered(2)
SINGLE = problems.centered(2, dtype=np.float32)
STEPS = 30
START = jtu.tree_map(np.asarray, dict(CENTERED.w0))
SGD = optax.sgd(0.05)
MOMENTUM = optax.sgd(0.05, momentum=0.9)


def descend(problem=CENTERED, optimizer=MOMENTUM, steps=STEPS, **options):
    return lj.gradient_descent(problem.h, problem.loss, problem.w0, optimizer, steps, **options)


def numpy_outputs(w):
    return np.tanh(np.asarray(CENTERED.x) @ w["b"].T) @ w["a"]


def numpy_gradient(w, alpha):
    """R and grad F_alpha of the centered two-layer tanh net, by hand."""
    x, target, n = np.asarray(CENTERED.x), np.asarray(CENTERED.target), CENTERED.target.size
    hidden = np.tanh(x @ w["b"].T)
    residual = alpha * (hidden @ w["a"] - numpy_outputs(START)) - target
    r = residual / (n * alpha)
    return 0.5 * np.mean(residual**2), {"a": hidden.T @ r, "b": ((r[:, None] * (1 - hidden**2)) * w["a"]).T @ x}


def numpy_descent(alpha, steps, rate, momentum=0.0):
    """w -= rate grad F_alpha(w), and the losses before each step."""
    w, trace, losses = START, jtu.tree_map(np.zeros_like, START), []
    for _ in range(steps):
        loss, gradient = numpy_gradient(w, alpha)
        losses.append(loss)
        trace = jtu.tree_map(lambda t, g: momentum * t + g, trace, gradient)
        w = jtu.tree_map(lambda a, t: a - rate * t, w, trace)
    return w, np.asarray(losses)


def numpy_flow(time, steps=200):
    """w at a time of the flow at alpha = 1, by the classical Runge-Kutta method."""
    w, dt = START, time / steps

    def along(w, slope, size):
        return jtu.tree_map(lambda a, g: a - size * g, w, slope)

    for _ in range(steps):
        k1 = numpy_gradient(w, 1.0)[1]
        k2 = numpy_gradient(along(w, k1, dt / 2), 1.0)[1]
        k3 = numpy_gradient(along(w, k2, dt / 2), 1.0)[1]
        k4 = numpy_gradient(along(w, k3, dt), 1.0)[1]
        w = along(w, jtu.tree_map(lambda a, b, c, d: (a + 2 * b + 2 * c + d) / 6, k1, k2, k3, k4), dt)
    return w


@pytest.mark.parametrize("alpha", [0.5, 20.0])
def test_descent_is_what_numpy_computes(alpha):
    run = descend(alpha=alpha)
    params, losses = numpy_descent(alpha, STEPS, 0.05, momentum=0.9)
    assert relative_error(run.params, params) < 1e-12
    assert relative_error(run.loss, losses) < 1e-11
    moved = jtu.tree_map(lambda w, w0: alpha * (w - w0), params, START)
    assert relative_error(run.displacement, moved) < 1e-10
    outputs = alpha * (numpy_outputs(params) - numpy_outputs(START))
    np.testing.assert_allclose(run.outputs, outputs, rtol=1e-10, atol=1e-13)


def test_halving_the_step_halves_the_distance_to_the_flow():
    """Euler's error is O(step)."""
    truth = numpy_outputs(numpy_flow(1.5)) - numpy_outputs(START)
    errors = [
        relative_error(descend(optimizer=optax.sgd(1.5 / steps), steps=steps).outputs, truth) for steps in (100, 200)
    ]
    assert 1.9 < errors[0] / errors[1] < 2.1


@pytest.mark.parametrize("alpha", [1e7, np.inf])
def test_float32_keeps_its_digits_at_large_alpha(alpha):
    run = descend(SINGLE, alpha=alpha)
    # The same data, rounded to float32.
    w0, x, target = (jtu.tree_map(lambda leaf: jnp.asarray(np.asarray(leaf, np.float64)), tree) for tree in DATA)
    wide = CENTERED._replace(h=lj.on_data(lj.center(lj.models.two_layer(jnp.tanh), w0), x), w0=w0)
    truth = descend(wide._replace(loss=lj.square_loss(target)), alpha=alpha)
    assert run.outputs.dtype == jnp.float32
    assert relative_error(run.outputs, truth.outputs) < 1e-5
    assert relative_error(run.displacement, truth.displacement) < 1e-5


DATA = (SINGLE.w0, SINGLE.x, SINGLE.target)


def test_at_infinity_descent_is_that_of_the_tangent_model():
    run = descend(alpha=np.inf)
    tangent = lj.gradient_descent(lj.linearize(CENTERED.h, CENTERED.w0), CENTERED.loss, CENTERED.w0, MOMENTUM, STEPS)
    assert relative_error(run.outputs, tangent.outputs) < 1e-12
    assert relative_error(run.displacement, tangent.displacement) < 1e-12


@pytest.mark.standard_promotion  # optax mixes dtypes inside adam and the line search
@pytest.mark.parametrize("optimizer", [optax.adam(0.02), optax.lbfgs()], ids=["adam", "lbfgs"])
def test_any_optax_optimizer_descends_and_is_refused_at_infinity_without_a_limit(optimizer):
    run = descend(optimizer=optimizer, alpha=3.0, steps=25)
    loss = np.asarray(run.loss)
    assert loss[-1] < 0.5 * loss[0]
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
def test_proportional_updates_are_told_from_others(optimizer, limit):
    """At zero parameters too, where a weight decay has nothing to pull at, and in half precision."""
    coordinates = {"a": jnp.asarray(np.zeros(3)), "b": jnp.asarray(np.full((2, 2), 1e-3, np.float16))}
    if limit:
        check_proportional(optimizer, coordinates)
        return
    with pytest.raises(ValueError, match="updates are proportional to the gradients"):
        check_proportional(optimizer, coordinates)


def test_alphas_of_a_vmap_are_single_descents():
    alphas = jnp.asarray(np.array([1.0, 100.0, np.inf]))
    runs = jax.vmap(lambda alpha: descend(alpha=alpha, throw=False))(alphas)
    for i, alpha in enumerate(np.asarray(alphas)):
        assert relative_error(np.asarray(runs.outputs)[i], descend(alpha=alpha).outputs) < 1e-12
    lines = str(runs).splitlines()
    assert len(lines) == 4
    assert lines[0] == f"Descent of {STEPS} steps"
    assert "inf" in lines[3]


def test_a_descent_prints_its_loss_and_how_it_ended():
    run = descend(alpha=20.0)
    loss = np.asarray(run.loss)
    assert str(run).splitlines()[1].split() == (
        f"alpha = 20 loss {loss[0]:.4g} at the first step, {loss[-1]:.4g} at the last".split()
    )
    assert repr(run) == str(run)
    jax.eval_shape(lambda run: (str(run), run.loss)[1], run)  # inside a trace there are shapes


FAST = optax.sgd(1e3)


def test_a_diverging_descent_says_so():
    run = descend(optimizer=FAST, steps=200, throw=False)
    assert bool(run.result == diffrax.RESULTS.nonfinite)
    assert bool(run.result == lj.RESULTS.nonfinite)
    assert str(run.result).startswith("nonfinite: ")
    assert "became NaN or infinite" in str(run)
    with pytest.raises(eqx.EquinoxRuntimeError, match="Nonfinite"):
        descend(optimizer=FAST, steps=200)


def test_progress_is_shown_on_demand(capfd):
    descend(progress=True)
    jax.effects_barrier()
    assert "100.00%" in capfd.readouterr().err


@pytest.mark.parametrize("steps", [0, -3, 2.5, "ten"])
def test_a_bad_number_of_steps_is_refused(steps, untyped):
    with pytest.raises(ValueError, match="steps must be a whole number"):
        descend(steps=steps)


def test_what_is_no_optimizer_is_refused(untyped):
    with pytest.raises(TypeError, match=r"optax.sgd\(0.1\)"):
        descend(optimizer=0.1)
    with pytest.raises(ValueError, match="alpha must be a scale"):
        descend(alpha=-1.0)


def test_a_start_that_is_not_finite_at_one_sample_is_refused():
    w0 = jnp.asarray(np.array([1.0, 1.0, 0.0, 1.0, 1.0]))
    with pytest.raises(ValueError, match=r"h\(w0\) must be finite, but 1 of its 5"):
        descend(CENTERED._replace(h=lambda w: 1 / w, w0=w0))
