"""Compiled against eager, to rounding: every model we ship, and what is computed from models and losses.

XLA for CPU has miscompiled derivatives: of pooling by `x.max()`, of mapped matrix-vector products. Our models and
the pooling that we recommend (`lax.reduce_window`, `jax.nn.relu`, `where`) must not be among them.
"""

from functools import partial

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
from lazyjax.flow.closed_form import solve_tangent


def conv_net(w, x):
    """Images (n, 8, 8, 1): convolution, max pooling, convolution, average pooling, dense; as users write it."""
    dimensions = ("NHWC", "HWIO", "NHWC")
    z = jax.lax.conv_general_dilated(x, w["first"], (1, 1), "SAME", dimension_numbers=dimensions)
    z = jax.lax.reduce_window(jax.nn.relu(z), -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    z = jax.lax.conv_general_dilated(z, w["second"], (1, 1), "SAME", dimension_numbers=dimensions)
    z = jax.lax.reduce_window(jnp.where(z > 0, z, 0.1 * z), 0.0, jax.lax.add, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    return z.reshape(x.shape[0], -1) @ w["head"]


def cases():
    key = jr.key(0)
    x = jr.normal(key, (6, 5))
    two, layers = lj.models.two_layer().init(key, d=5, width=8), lj.models.mlp().init(key, [5, 7, 6, 3])
    keys = jr.split(key, 4)
    filters = {
        "first": 0.5 * jr.normal(keys[0], (3, 3, 1, 4)),
        "second": 0.3 * jr.normal(keys[1], (3, 3, 4, 3)),
        "head": jr.normal(keys[2], (12, 2)),
    }
    diagonal = {"u": jr.normal(keys[0], (5,)), "v": jr.normal(keys[1], (5,))}
    moved = jtu.tree_map(lambda leaf: leaf + 0.1, two)
    f2, w2 = lj.symmetrize(lj.models.two_layer(), two)
    return {
        "two_layer relu": (lj.models.two_layer(), two, x),
        "two_layer tanh": (lj.models.two_layer(jnp.tanh), two, x),
        "mlp relu": (lj.models.mlp(), layers, x),
        "mlp tanh": (lj.models.mlp(jnp.tanh), layers, x),
        "diagonal_linear": (lj.models.diagonal_linear(), diagonal, x),
        "centered": (lj.center(lj.models.two_layer(jnp.tanh), two), moved, x),
        "symmetrized": (f2, (w2[0], moved), x),
        "rescaled": (lj.rescale(lj.models.two_layer(jnp.tanh), 3.0), two, x),
        "convolutions": (conv_net, filters, jr.normal(keys[3], (5, 8, 8, 1))),
    }


CASES = cases()


EPS = 1e-3


def _on(f, x, w):
    return f(w, x)


def reference(f, w, x, u):
    """What all the rest follows from, one primitive at a time."""
    h = partial(_on, f, x)
    with jax.disable_jit():
        return h(w), jax.jvp(h, (w,), (u,))[1], jax.jacrev(h)(w), lj.finite_jvp(h, w, u, EPS)


@eqx.filter_jit
def compiled(f, w, x, u, r):
    """The derivatives and products of a model, in one program."""
    h = partial(_on, f, x)
    tangent = lj.linearize(h, w)
    return {
        "forward": h(w),
        "jvp": jax.jvp(h, (w,), (u,))[1],
        "vjp": jax.vjp(h, w)[1](r)[0],
        "jacrev": jax.jacrev(h)(w),
        "finite_jvp": lj.finite_jvp(h, w, u, EPS),
        "finite_jvp at 0": lj.finite_jvp(h, w, u, 0.0),
        "tangent.jvp": tangent.jvp(u),
        "tangent.vjp": tangent.vjp(r),
        "gram": lj.gram(f, w, x),
        "cross gram": lj.gram(f, w, x[:2], x),
        "kernel_matvec": lj.kernel_matvec(f, w, x)(r),
    }


def flat(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jtu.tree_leaves(tree)])


@pytest.mark.parametrize("name", CASES)
def test_compiled_operations_agree_with_eager_ones(name):
    f, w, x = CASES[name]
    leaves, tree = jtu.tree_flatten(w)
    keys = jr.split(jr.key(1), len(leaves))
    u = tree.unflatten([jr.normal(k, leaf.shape) for k, leaf in zip(keys, leaves, strict=True)])
    outputs, jvp, jacobian, difference = reference(f, w, x, u)
    r = jr.normal(jr.key(2), outputs.shape)
    rows = np.concatenate([np.reshape(leaf, (r.size, -1)) for leaf in jtu.tree_leaves(jacobian)], axis=1)
    pulled, gram = rows.T @ np.ravel(r), rows @ rows.T
    expected = {
        "forward": outputs,
        "jvp": jvp,
        "vjp": pulled,
        "jacrev": jacobian,
        "finite_jvp": difference,
        "finite_jvp at 0": jvp,
        "tangent.jvp": jvp,
        "tangent.vjp": pulled,
        "gram": gram,
        "cross gram": gram[: 2 * r.size // len(r)],
        "kernel_matvec": gram @ np.ravel(r),
    }
    got = compiled(f, w, x, u, r)
    assert got.keys() == expected.keys()
    for operation, truth in expected.items():
        # Sums of some hundred terms in another order; the miscompilations were of order 1.
        scale = np.max(np.abs(flat(truth)))
        assert scale > 0
        np.testing.assert_allclose(flat(got[operation]), flat(truth), rtol=0, atol=1e-12 * scale, err_msg=operation)


def test_compiled_jacobians_of_pooling_agree_with_eager_ones_also_in_float32():
    # Larger than above: the miscompilations came with vectorized loops, which small arrays do not reach.
    f, w, _ = CASES["convolutions"]
    x = jr.normal(jr.key(3), (32, 8, 8, 1))
    jacobian = jax.jit(lambda w, x: jax.jacrev(lambda w: f(w, x))(w))
    double = flat(jacobian(w, x))
    single = flat(jacobian(*jtu.tree_map(lambda leaf: leaf.astype(jnp.float32), (w, x))))
    with jax.disable_jit():
        eager = flat(jax.jacrev(lambda w: f(w, x))(w))
    scale = np.max(np.abs(eager))
    np.testing.assert_allclose(double, eager, rtol=0, atol=1e-12 * scale)
    np.testing.assert_allclose(single, eager, rtol=0, atol=1e-5 * scale)


LOSSES = {
    "square": (lj.square_loss(jr.normal(jr.key(4), (4, 3))), (4, 3)),
    "logistic": (lj.logistic_loss(jnp.array([0, 1, 1, 0])), (4,)),
    "softmax": (lj.softmax_cross_entropy(jnp.array([0, 2, 1, 1])), (4, 3)),
}


def agree(operation, *args, rtol=1e-12):
    """One program of the whole against one primitive at a time, number by number of the result."""
    got = eqx.filter_jit(operation)(*args)
    with jax.disable_jit():
        expected = operation(*args)
    for a, b in zip(jtu.tree_leaves(got), jtu.tree_leaves(expected), strict=True):
        scale = np.max(np.abs(b))
        assert scale > 0
        np.testing.assert_allclose(a, b, rtol=0, atol=rtol * scale)


@pytest.mark.parametrize("name", LOSSES)
def test_compiled_losses_agree_with_eager_ones(name):
    loss, shape = LOSSES[name]
    y, v = jr.normal(jr.key(5), shape), jr.normal(jr.key(6), shape)
    agree(lambda y, v: (loss(y), loss.gradient(y), loss.hvp(y, v), loss.norm(y), jax.grad(loss)(y)), y, v)


def small(n=3):
    """h(w) of n outputs with a loss and a start, as small as may be."""
    x, w = jr.normal(jr.key(7), (n, 2)), lj.models.two_layer().init(jr.key(8), d=2, width=3)
    return partial(_on, lj.models.two_layer(jnp.tanh), x), lj.square_loss(jnp.arange(1.0, n + 1)), w


def test_compiled_singular_values_and_closed_form_agree_with_eager_ones():
    h, loss, w = small(2)

    def values(w):
        found = lj.singular_values(lj.linearize(h, w), loss)
        return found.largest, found.smallest

    def solution(matrix, start):
        solved = solve_tangent(matrix, start, loss.minimizer, loss.weight)
        time = jnp.asarray(0.7)
        return solved.outputs(time), solved.loss(time), solved.cotangent(time)

    agree(values, w, rtol=1e-11)
    agree(solution, lj.gram(lambda w, x: x @ w["b"].T @ w["a"], w, jr.normal(jr.key(9), (2, 2))), jnp.ones(2))


def test_compiled_measures_of_laziness_agree_with_eager_ones():
    h, loss, w = small(2)
    alpha = 1e4
    u = jtu.tree_map(jnp.cos, w)
    agree(lambda w, u: lj.laziness.measure_kernel_drift(h, w, u, 1 / alpha), w, u)
    model = lj.center(h, w)
    agree(lambda w: lj.laziness.step_criterion(model, loss, w, alpha=alpha).jacobian_change, w, rtol=1e-9)


def test_a_compiled_flow_agrees_with_the_eager_one_and_with_descent():
    h, loss, w = small()
    euler = {"solver": diffrax.Euler(), "stepsize_controller": diffrax.ConstantStepSize(), "dt0": 0.1}

    def flow(w):
        return lj.gradient_flow(h, loss, w, jnp.array([0.0, 0.3]), alpha=2.0, **euler).outputs

    def descent(w):
        return lj.gradient_descent(h, loss, w, optax.sgd(0.1), 3, alpha=2.0).params

    agree(flow, w)
    # Three steps of each are the same numbers.
    np.testing.assert_allclose(flow(w)[-1], 2.0 * h(descent(w)), rtol=1e-12)
