"""Forward products of functions with a reverse rule only: right values, and a warning where the two rules differ."""

import warnings

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.experimental.ode import odeint

import lazyjax as lj
from lazyjax._core import forward

X = np.array([[1.0, 0.0], [0.5, -1.0], [0.0, 2.0]])
W = np.array([0.4, -0.3])
Y = np.array([1.0, 0.0, 0.5])


@jax.custom_vjp
def act(z):
    return jnp.tanh(z)


# The forward pass calls the function itself, as users write it.
act.defvjp(lambda z: (act(z), jnp.tanh(z)), lambda out, g: (g * (1 - out * out),))


@jax.custom_vjp
def clipped(z):
    return 3 * z


clipped.defvjp(lambda z: (3 * z, None), lambda _, g: (jnp.clip(g, -1e-3, 1e-3),))


@jax.custom_vjp
def squares(y):
    return jnp.mean((y - Y) ** 2)


squares.defvjp(lambda y: (squares(y), y), lambda y, g: (g * 2 / y.size * (y - Y),))


def special(w, x):
    return act(x @ w)


def usual(w, x):
    return jnp.tanh(x @ w)


def both(call):
    """What a call gives for the model with a reverse rule of its own, and for the same one without."""
    return [jax.tree.map(np.asarray, call(f)) for f in (special, usual)]


@pytest.fixture(autouse=True)
def _warned():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


def assert_same(pair, **tolerance):
    for ours, right in zip(*map(jax.tree.leaves, pair), strict=True):
        np.testing.assert_allclose(ours, right, **{"rtol": 1e-12, "atol": 1e-13, **tolerance})


def test_kernels_and_tangent_models():
    w, x = jnp.asarray(W), jnp.asarray(X)

    def call(f):
        tangent = lj.linearize(lj.on_data(f, x), w)
        product = lj.kernel_matvec(f, w, x)(jnp.ones(3))
        return lj.gram(f, w, x), product, lj.spectrum(f, w, x), tangent.jvp(w), tangent.vjp(jnp.ones(3)), tangent(2 * w)

    assert_same(both(call))


def test_differences_at_every_step_and_the_limit():
    w, u = jnp.asarray(W), jnp.ones(2)

    def call(f):
        h = lj.on_data(f, jnp.asarray(X))
        traced = jax.jit(jax.vmap(lambda eps: lj.finite_jvp(h, w, u, eps)))(jnp.array([0.5, 1e-9, 0.0]))
        return lj.finite_jvp(h, w, u, 0.0), traced, lj.finite_jvp(h, w, u, 0.0, difference="plain")

    assert_same(both(call))


@pytest.mark.parametrize("alpha", [1.0, np.inf])
def test_flows(alpha):
    w, ts = jnp.asarray(W), jnp.array([0.0, 2.0])
    solver = lj.TangentExponential()

    def call(f):
        h = lj.center(lj.on_data(f, jnp.asarray(X)), w)
        flow = lj.gradient_flow(h, lj.square_loss(jnp.asarray(Y)), w, ts, alpha=alpha, solver=solver)
        return flow.outputs

    assert_same(both(call), rtol=1e-6)


def test_descent_training_and_kappa():
    w, x, y = jnp.asarray(W), jnp.asarray(X), jnp.asarray(Y)
    optimizer = optax.sgd(0.1)

    def call(f):
        h = lj.on_data(f, x)
        descent = lj.gradient_descent(h, lj.square_loss(y), w, optimizer, 3)
        training = lj.train(f, w, x, y, optimizer, epochs=2, batch_size=3, key=jax.random.key(0))
        kappa = lj.kappa(h, lj.square_loss(y), w)
        return descent.outputs, training.displacement, (kappa.value, kappa.upper)

    assert_same(both(call), rtol=1e-9)


def test_a_loss_with_a_reverse_rule_of_its_own():
    y, v = jnp.asarray(W)[:1] + jnp.arange(3.0), jnp.array([1.0, -1.0, 2.0])
    loss, known = lj.losses.function_loss(squares), lj.losses.function_loss(lambda y: jnp.mean((y - Y) ** 2))
    np.testing.assert_allclose(loss.hvp(y, v), known.hvp(y, v), rtol=1e-14)
    np.testing.assert_allclose(loss.root(y).apply(v), known.root(y).apply(v), rtol=1e-12)
    flows = [
        lj.gradient_flow(lj.on_data(usual, jnp.asarray(X)), R, jnp.asarray(W), jnp.array([0.0, 1.0])).outputs
        for R in (loss, known)
    ]
    np.testing.assert_allclose(*flows, rtol=1e-7)


@pytest.mark.end_to_end
def test_neural_odes():
    """dy/dt = -w y from 1: y(1) = e^-w, whose derivative is -e^-w; adjoints that solve an equation of their own."""
    w = jnp.array([0.3, 1.0])

    def by_odeint(w):
        return odeint(lambda y, t, w: -w * y, jnp.ones(2), jnp.array([0.0, 1.0]), w, rtol=1e-9, atol=1e-9)[-1]

    def by_diffrax(w):
        term = diffrax.ODETerm(lambda t, y, w: -w * y)
        controller = diffrax.PIDController(1e-9, 1e-9)
        return diffrax.diffeqsolve(
            term, diffrax.Dopri8(), 0.0, 1.0, 0.1, jnp.ones(2), args=w, stepsize_controller=controller
        ).ys[-1]

    for h in (by_odeint, by_diffrax):
        value, derivative = eqx.filter_jit(forward.products)(h, w)
        np.testing.assert_allclose(value, np.exp(-w), rtol=1e-7)
        np.testing.assert_allclose(derivative.push(w), -w * np.exp(-w), rtol=1e-7)
        np.testing.assert_allclose(derivative.transpose(jnp.ones(2), w), -np.exp(-w), rtol=1e-7)
    # The steps of the solver, chosen by values that move, are the same at both ends.
    slope = jax.jit(lambda eps: lj.finite_jvp(by_diffrax, w, w, eps))(1e-10)
    np.testing.assert_allclose(slope, -w * np.exp(-w), rtol=1e-7)


def test_programs_inside_programs_are_entered():
    def inner(z):
        z, _ = lax.scan(lambda c, _: (act(c), None), z, None, length=2)
        z = lax.cond(z[0] > 0, act, lambda a: 2 * act(a), z)
        z = lax.fori_loop(0, 2, lambda i, a: jax.checkpoint(act)(a), z)
        return jax.vmap(jax.jit(act))(z)

    def known(z):
        for _ in range(6):
            z = jnp.tanh(z)
        return z

    w, u = jnp.array([0.7, -0.4]), jnp.array([1.0, 2.0])
    ours, right = (function(h, (w,), (u,)) for function, h in ((forward.jvp, inner), (jax.jvp, known)))
    assert_same((ours, right))
    assert_same((forward.hessian(lambda z: act(z).sum(), w), jax.hessian(lambda z: jnp.tanh(z).sum())(w)))
    assert_same((forward.linearize(inner, w)[1](u), right[1]))


def test_a_rule_that_is_not_the_derivative_is_told():
    h, w, loss = lambda w: clipped(jnp.asarray(X) @ w), jnp.asarray(W), lj.square_loss(jnp.asarray(Y))
    for call in (lambda: lj.linearize(h, w), lambda: lj.gradient_flow(h, loss, w, jnp.array([0.0, 0.1]))):
        with pytest.warns(UserWarning, match="custom_vjp rule that is not the derivative of the program") as told:
            call()
        assert len(told) == 1
