"""Compiled against eager, to rounding: the models we ship, and what is computed from models and losses.

XLA for CPU has miscompiled derivatives: of pooling by `x.max()`, of mapped matrix-vector products. Our models and
the pooling that we recommend (`lax.reduce_window`, `jax.nn.relu`, `where`) must not be among them. Outputs and
Jacobians are evaluated one primitive at a time; all else follows from these two by NumPy.
"""

from functools import cache

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
from lazyjax.flow.closed_form import solve_tangent
from problems import conv_net, normal, normal_like

# Of the programs as a user gets them, whatever the default run compiles.
pytestmark = pytest.mark.optimized

EPS = 1e-3


def case(name):
    """A model f(w, x) with parameters and inputs."""
    two, x = problems.centered(0, d=5, width=8).w0, normal(1, 6, 5)
    relu, tanh = lj.models.two_layer(), lj.models.two_layer(jnp.tanh)
    if name == "two_layer relu":
        return relu, two, x
    if name == "mlp tanh":
        return lj.models.mlp(jnp.tanh), problems.rows(0, sizes=(5, 8, 3)).w0, x
    if name == "diagonal_linear":
        return lj.models.diagonal_linear(), {"u": normal(2, 5), "v": normal(3, 5)}, x
    if name == "rescaled":
        return lj.rescale(tanh, 3.0), two, x
    if name == "convolutions":
        # Large: the miscompilations came with vectorized loops, which small arrays do not reach.
        p = problems.images(0, n=32)
        return conv_net, p.w0, p.x
    moved = jtu.tree_map(lambda leaf: jnp.asarray(np.asarray(leaf) + 0.1), two)
    if name == "centered":
        return lj.center(tanh, two), moved, x
    f, (first, _) = lj.symmetrize(relu, two)
    return f, (first, moved), x


NAMES = ("two_layer relu", "mlp tanh", "diagonal_linear", "rescaled", "centered", "symmetrized", "convolutions")


def flat(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jtu.tree_leaves(tree)])


def matrix(jacobian, size):
    return np.concatenate([np.reshape(leaf, (size, -1)) for leaf in jtu.tree_leaves(jacobian)], axis=1)


@cache
def reference(name):
    """Outputs and Jacobian, one primitive at a time."""
    f, w, x = case(name)
    h = lj.on_data(f, x)
    with jax.disable_jit():
        outputs = np.asarray(h(w))
        return outputs, matrix(jax.jacrev(h)(w), outputs.size)


@eqx.filter_jit
def compiled(f, w, x, u, r):
    """The derivatives and products of a model, in one program."""
    h = lj.on_data(f, x)
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


@pytest.mark.parametrize("name", NAMES)
def test_compiled_operations_agree_with_eager_ones(name):
    f, w, x = case(name)
    outputs, jacobian = reference(name)
    u, r = normal_like(4, w), normal(5, *outputs.shape)
    with jax.disable_jit():
        moved = np.asarray(f(jtu.tree_map(lambda a, b: jnp.asarray(np.asarray(a) + EPS * np.asarray(b)), w, u), x))
    jvp, pulled, gram = jacobian @ flat(u), jacobian.T @ np.ravel(r), jacobian @ jacobian.T
    expected = {
        "forward": outputs,
        "jvp": jvp,
        "vjp": pulled,
        "finite_jvp": (moved - outputs) / EPS,
        "finite_jvp at 0": jvp,
        "tangent.jvp": jvp,
        "tangent.vjp": pulled,
        "gram": gram,
        "cross gram": gram[: 2 * r.size // len(r)],
        "kernel_matvec": gram @ np.ravel(r),
    }
    got = compiled(f, w, x, u, r)
    jacrev = matrix(got.pop("jacrev"), outputs.size)
    np.testing.assert_allclose(jacrev, jacobian, rtol=0, atol=1e-12 * np.max(np.abs(jacobian)))
    assert got.keys() == expected.keys()
    for operation, truth in expected.items():
        # Sums of some hundred terms in another order; the miscompilations were of order 1.
        scale = np.max(np.abs(truth))
        assert scale > 0
        rtol = 1e-12 / EPS if operation == "finite_jvp" else 1e-12
        np.testing.assert_allclose(flat(got[operation]), flat(truth), rtol=0, atol=rtol * scale, err_msg=operation)


def test_compiled_jacobians_of_pooling_agree_with_eager_ones_also_in_float32():
    f, w, x = jtu.tree_map(lambda leaf: leaf.astype(np.float32) if eqx.is_array(leaf) else leaf, case("convolutions"))
    outputs, jacobian = reference("convolutions")
    single = matrix(jax.jit(lambda w, x: jax.jacrev(lambda w: f(w, x))(w))(w, x), outputs.size)
    np.testing.assert_allclose(single, jacobian, rtol=0, atol=1e-5 * np.max(np.abs(jacobian)))


LOSSES = {
    "square": (lambda: lj.square_loss(normal(4, 4, 3)), (4, 3)),
    "logistic": (lambda: lj.logistic_loss(jnp.asarray(np.array([0, 1, 1, 0]))), (4,)),
    "softmax": (lambda: lj.softmax_cross_entropy(jnp.asarray(np.array([0, 2, 1, 1]))), (4, 3)),
}


@pytest.mark.parametrize("name", LOSSES)
def test_compiled_losses_agree_with_eager_ones(name):
    build, shape = LOSSES[name]
    loss, y, v = build(), normal(5, *shape), normal(6, *shape)

    def operation(loss, y, v):
        return loss(y), loss.gradient(y), loss.hvp(y, v), loss.norm(y)

    got = eqx.filter_jit(operation)(loss, y, v)
    with jax.disable_jit():
        expected = operation(loss, y, v)
    for a, b in zip(got, expected, strict=True):
        scale = np.max(np.abs(b))
        assert scale > 0
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-12 * scale)


def test_compiled_singular_values_and_closed_form_are_those_of_the_eager_jacobian():
    f, w, x = case("two_layer relu")
    outputs, jacobian = reference("two_layer relu")
    n = len(outputs)
    loss, start = lj.square_loss(normal(7, n)), normal(8, n)
    found = eqx.filter_jit(lambda f, w, x: lj.singular_values(lj.linearize(lj.on_data(f, x), w), loss))(f, w, x)
    singular = np.linalg.svd(jacobian / n**0.5, compute_uv=False)
    np.testing.assert_allclose([found.largest, found.smallest], singular[[0, -1]], rtol=1e-10)

    @eqx.filter_jit
    def solution(gram, start, time):
        solved = solve_tangent(gram, start, loss.minimizer, loss.weight)
        return solved.outputs(time), solved.loss(time)

    gram, time = jacobian @ jacobian.T, 0.7
    got, value = solution(jnp.asarray(gram), start, jnp.asarray(time))
    values, vectors = np.linalg.eigh(gram / n)
    decay = vectors @ (np.exp(-values * time) * (vectors.T @ np.asarray(start - loss.minimizer)))
    np.testing.assert_allclose(got, np.asarray(loss.minimizer) + decay, rtol=0, atol=1e-11)
    np.testing.assert_allclose(value, 0.5 * np.sum(decay**2) / n, rtol=1e-11)


def test_the_compiled_kernel_drift_is_that_of_eager_jacobians():
    f, w, x = case("mlp tanh")
    h, u, eps = lj.on_data(f, x), normal_like(9, w), 1e-2
    outputs, jacobian = reference("mlp tanh")
    moved = jtu.tree_map(lambda a, b: jnp.asarray(np.asarray(a) + eps * np.asarray(b)), w, u)
    with jax.disable_jit():
        after = matrix(jax.jacrev(h)(moved), outputs.size)
    before, after = jacobian @ jacobian.T, after @ after.T
    drift = eqx.filter_jit(lj.laziness.measure_kernel_drift)(h, w, u, eps)
    np.testing.assert_allclose(drift, np.linalg.norm(after - before) / np.linalg.norm(before), rtol=1e-9)


def test_compiled_flows_and_descents_take_the_steps_of_eager_jacobians():
    p, alpha, eta = problems.centered(2, n=3, width=4), 2.0, 0.1
    ts = jnp.asarray(np.array([0.0, 3 * eta]))
    euler = {"solver": diffrax.Euler(), "stepsize_controller": diffrax.ConstantStepSize(), "dt0": eta}
    flow = lj.gradient_flow(p.h, p.loss, p.w0, ts, alpha=alpha, **euler)
    descent = lj.gradient_descent(p.h, p.loss, p.w0, optax.sgd(eta), 3, alpha=alpha)
    w, leaves = flat(p.w0), jtu.tree_leaves(p.w0)
    structure, ends = jtu.tree_structure(p.w0), np.cumsum([leaf.size for leaf in leaves])[:-1]

    def tree(w):
        parts = zip(np.split(w, ends), leaves, strict=True)
        return structure.unflatten([jnp.asarray(part.reshape(leaf.shape)) for part, leaf in parts])

    for _ in range(3):
        with jax.disable_jit():
            outputs, jacobian = np.asarray(p.h(tree(w))), matrix(jax.jacrev(p.h)(tree(w)), 3)
        w = w - eta / alpha * jacobian.T @ (alpha * outputs - np.asarray(p.target)) / 3
    np.testing.assert_allclose(flat(descent.params), w, rtol=0, atol=1e-13)
    with jax.disable_jit():
        np.testing.assert_allclose(flow.outputs[-1], alpha * p.h(tree(w)), rtol=1e-11)
