"""The kinks of a model as gates: the model itself with the gates as they are, smooth with the gates given."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lazyjax as lj
from lazyjax.difference import NoGatesError, gated

RNG = np.random.default_rng(0)
X = RNG.normal(size=(5, 3))
W = RNG.normal(size=(3, 4))
POOL = {"window_dimensions": (1, 2, 2), "window_strides": (1, 2, 2), "padding": "VALID"}


def pooled(z):
    return jax.lax.reduce_window(z.reshape(5, 2, 2), -jnp.inf, jax.lax.max, **POOL).reshape(5)


def scanned(w):
    def layer(x, _):
        return jax.nn.relu(x @ (w @ w.T)), None

    return jax.lax.scan(layer, X, None, length=3)[0].sum(axis=1)


# Models of the pre-activations X @ w, and the primitives and shapes of their gates.
KINKED = {
    "relu": (jax.nn.relu, [("max", (5, 4))]),
    "leaky relu": (jax.nn.leaky_relu, [("ge", (5, 4))]),
    "relu6": (lambda z: jax.nn.relu6(3 * z), [("max", (5, 4)), ("min", (5, 4))]),
    "hard tanh": (jax.nn.hard_tanh, [("gt", (5, 4)), ("lt", (5, 4))]),
    "mask": (lambda z: z * (z > 0).astype(z.dtype), [("gt", (5, 4))]),
    "not": (lambda z: jnp.where(~(z > 0), 0, z), [("gt", (5, 4))]),
    "abs": (jnp.abs, [("abs", (5, 4))]),
    "sign": (lambda z: z * jnp.sign(z), [("sign", (5, 4))]),
    "clip": (lambda z: jnp.clip(z, -0.5, 0.5), [("max", (5, 4)), ("min", (5, 4))]),
    "clamp": (lambda z: jax.lax.clamp(-0.5, z, 0.5), [("clamp", (5, 4)), ("clamp", (5, 4))]),
    "maximum": (lambda z: jnp.max(z, axis=1), [("reduce_max", (2, 5)), ("reduce_max", (1, 5))]),
    "minimum": (lambda z: jnp.min(z, axis=1), [("reduce_min", (2, 5)), ("reduce_min", (1, 5))]),
    "pooling": (pooled, [("reduce_window_max", (2, 5, 1, 1)), ("reduce_window_max", (1, 5, 1, 1))]),
    "remat": (jax.checkpoint(jax.nn.relu), [("max", (5, 4))]),
}
SMOOTH = {
    "tanh": jnp.tanh,
    "gelu": jax.nn.gelu,
    "softplus": jax.nn.softplus,
    "softmax": jax.nn.softmax,
    "shifted exponentials": lambda z: jnp.exp(z - jax.lax.stop_gradient(z.max(axis=1, keepdims=True))),
    "data alone": lambda z: z * jnp.maximum(X[:, :1], 0),
}


def check_is_model(h, kinks):
    """The gates as they are, and given: the values and gradients of h; a run does not depend on who asks."""
    model = gated(h, jnp.asarray(W))
    assert [(kink.primitive, kink.shape) for kink in model.kinks] == kinks

    def both(w):
        outputs, values = model.run(w)
        gates = [(v > 0).astype(v.dtype) for v in values]
        given = lambda w: model.run(w, gates)[0]
        gradients = [jax.grad(lambda w, f=f: jnp.sum(f(w) ** 2))(w) for f in (given, h)]
        return outputs, given(w), h(w), gradients

    outputs, given, right, (gradient, right_gradient) = jax.jit(both)(W)
    np.testing.assert_allclose(outputs, right, rtol=1e-14)
    np.testing.assert_allclose(given, right, rtol=1e-14)
    np.testing.assert_allclose(gradient, right_gradient, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", KINKED)
def test_with_its_gates_a_model_is_itself(name):
    activation, kinks = KINKED[name]
    check_is_model(lambda w: activation(jnp.asarray(X) @ w), kinks)


def test_a_loop_has_its_gates_turn_by_turn():
    check_is_model(scanned, [("max", (3, 5, 3))])


@pytest.mark.parametrize("name", SMOOTH)
def test_smooth_models_have_no_gates(name):
    assert gated(lambda w: SMOOTH[name](jnp.asarray(X) @ w), jnp.asarray(W)).kinks == []


def test_outputs_are_linear_in_a_gate_and_smooth_across_its_surface():
    model = gated(lambda w: jax.nn.relu(w) + 2 * jnp.abs(w), jnp.ones(1))
    run = lambda w, *gates: model.run(jnp.array([w]), [jnp.array([g]) for g in gates])[0][0]
    assert run(-2.0, 1.0, 1.0) == -6.0  # both branches of positive numbers, at a negative one
    np.testing.assert_allclose(run(3.0, 0.25, 0.5), 0.25 * 3 + 0.0)
    np.testing.assert_allclose(run(3.0, 0.5, 0.75), 0.5 * 3 + 2 * (0.75 * 3 - 0.25 * 3))


@pytest.mark.parametrize(
    "h",
    [
        jax.nn.relu,
        lambda w: jnp.maximum(w, 0),
        lambda w: jnp.minimum(w, 0),
        jnp.abs,
        jax.nn.leaky_relu,
        lambda w: jnp.where(w > 0, 3 * w, w),
        lambda w: jax.lax.clamp(0.0, w, 1.0),
    ],
)
def test_ties_are_those_of_jax(h):
    model = gated(h, jnp.zeros(1))
    ties = [jnp.full(kink.shape, kink.tie) for kink in model.kinks]
    if len(ties) > 1:
        ties[1] = jnp.ones(1)  # the upper end of the clamp is far
    slope = jax.grad(lambda w: model.run(w, ties)[0][0])(jnp.zeros(1))
    np.testing.assert_array_equal(slope, jax.grad(lambda w: h(w)[0])(jnp.zeros(1)))


def test_any_parameters_and_a_module_will_do():
    net = eqx.nn.MLP(3, 2, 8, 2, key=jax.random.key(0))
    model = gated(lambda net: jax.vmap(net)(jnp.asarray(X)), net)
    assert [kink.shape for kink in model.kinks] == [(5, 8), (5, 8)]
    outputs, values = model.run(net)
    np.testing.assert_allclose(outputs, jax.vmap(net)(jnp.asarray(X)), rtol=1e-12)
    hidden = jax.vmap(net.layers[0])(jnp.asarray(X))
    np.testing.assert_allclose(values[0], hidden, rtol=1e-12)


def branched(w):
    return jax.lax.cond(w[0, 0] > 0, lambda: w.sum(axis=0), lambda: -w.sum(axis=0))


def looped(w):
    return jax.lax.while_loop(lambda w: w[0, 0] > -9, lambda w: jax.nn.relu(w) - 10, w).sum(axis=0)


@pytest.mark.parametrize(
    ("h", "match"),
    [
        (lambda w: jnp.sort(w)[0], "switches by the primitive 'sort', of which no gates can be made"),
        (lambda w: jax.lax.cummax(w).sum(axis=0), "the primitive 'cummax'"),
        (branched, "the primitive 'cond'"),
        (looped, "kinks inside a 'while'"),
    ],
)
def test_what_has_no_gates_is_refused(h, match):
    with pytest.raises(NoGatesError, match=match):
        gated(h, jnp.asarray(W))


def test_no_parameters_are_refused():
    with pytest.raises(TypeError, match="at least one real floating array"):
        gated(jnp.abs, jnp.arange(3))


def test_it_is_reached_by_name():
    assert lj.difference.gated is gated
