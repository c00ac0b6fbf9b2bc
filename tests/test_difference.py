"""Divided differences: float64 against independent truths, float32 against float64, and every rule."""

import itertools
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from jax import lax

import lazyjax as lj
from helpers import relative_error, tree_allclose
from lazyjax.difference import finite_value_and_jvp

# Step sizes that float32 holds exactly enough: both precisions see the same number.
ALPHAS = tuple(10.0**k for k in range(13))
EPS = np.float32([*(1 / alpha for alpha in ALPHAS), 0.0]).astype(np.float64)
DIMENSIONS = ("NHWC", "HWIO", "NHWC")


def cast(tree: Any, dtype: Any) -> Any:
    return jax.tree.map(lambda z: z.astype(dtype) if jnp.issubdtype(z.dtype, jnp.floating) else z, tree)


def normal_like(key: Any, tree: Any) -> Any:
    """A random tree of float32 numbers in float64: rounding to float32 changes nothing."""
    leaves, structure = jax.tree.flatten(tree)
    keys = jr.split(key, len(leaves))
    return structure.unflatten(
        [jr.normal(k, z.shape, jnp.float32).astype(jnp.float64) for k, z in zip(keys, leaves, strict=True)]
    )


def weights(*shapes: tuple[int, ...], seed: int = 0) -> list[jax.Array]:
    """Random weights at the usual scale, 1/sqrt(fan in), again of float32 numbers."""
    raw = normal_like(jr.key(seed), [jnp.zeros(shape) for shape in shapes])
    return [cast(cast(z / max(1, int(np.prod(z.shape[:-1]))) ** 0.5, jnp.float32), jnp.float64) for z in raw]


X = cast(jr.normal(jr.key(5), (6, 5), jnp.float32), jnp.float64)
IMAGES = cast(jr.normal(jr.key(6), (2, 6, 6, 2), jnp.float32), jnp.float64)


def data(like: jax.Array, x: jax.Array = X) -> jax.Array:
    return x.astype(like.dtype)


def mlp(activation: Callable[[jax.Array], jax.Array], w: list[jax.Array]) -> jax.Array:
    z = activation(data(w[0]) @ w[0] + w[1][None])
    return activation(z @ w[2]) @ w[3]


MLP = ((5, 9), (9,), (9, 9), (9, 3))


def normed(w: list[jax.Array]) -> jax.Array:
    z = data(w[0]) @ w[0]
    centred = z - z.mean(1, keepdims=True)
    z = w[1][None] * centred * lax.rsqrt(jnp.var(z, 1, keepdims=True) + 1e-5)
    return jnp.tanh(z @ w[2]) @ w[3]


def attention(w: list[jax.Array]) -> jax.Array:
    """Masked self-attention: -inf in the scores, softmax with its subtracted maximum."""
    z = data(w[0]) @ w[0]
    scores = jnp.where(jnp.tril(jnp.ones((6, 6), bool)), (z @ w[1]) @ z.T, -jnp.inf)
    return jax.nn.softmax(scores) @ z @ w[2]


def pooled(x: jax.Array, size: int = 2, padding: str = "VALID") -> jax.Array:
    return lax.reduce_window(x, -jnp.inf, lax.max, (1, size, size, 1), (1, 2, 2, 1), padding)


def cnn(w: list[jax.Array], pool: Callable[[jax.Array], jax.Array] = pooled) -> jax.Array:
    z = lax.conv_general_dilated(data(w[0], IMAGES), w[0], (1, 1), "SAME", dimension_numbers=DIMENSIONS)
    z = pool(jax.nn.relu(z + w[1].reshape(1, 1, 1, -1)))
    z = lax.conv_general_dilated(z, w[2], (1, 1), "VALID", dimension_numbers=DIMENSIONS)
    return jnp.tanh(z).reshape(len(z), -1) @ w[3]


CNN = ((3, 3, 2, 4), (4,), (2, 2, 4, 3), (12, 3))

# name -> model and shapes of its weights
MODELS: dict[str, tuple[Callable[[Any], Any], tuple[tuple[int, ...], ...]]] = {
    "tanh": (partial(mlp, jnp.tanh), MLP),
    "relu": (partial(mlp, jax.nn.relu), MLP),
    "gelu_tanh": (partial(mlp, jax.nn.gelu), MLP),
    "gelu_erf": (partial(mlp, partial(jax.nn.gelu, approximate=False)), MLP),
    "silu": (partial(mlp, jax.nn.silu), MLP),
    "softplus": (partial(mlp, jax.nn.softplus), MLP),
    "elu": (partial(mlp, jax.nn.elu), MLP),
    "log_softmax": (partial(mlp, partial(jax.nn.log_softmax, axis=1)), MLP),
    "norm": (normed, MLP),
    "attention": (attention, ((5, 7), (7, 7), (7, 2))),
    "cnn": (cnn, CNN),
}


def problem(name: str) -> tuple[Callable[[Any], Any], Any, Any]:
    h, shapes = MODELS[name]
    w0 = weights(*shapes)
    return h, w0, normal_like(jr.key(1), w0)


def second_order(h: Callable[[Any], Any], w: Any, u: Any, eps: float) -> Any:
    """Dh u + (eps/2) D^2 h(u, u): the difference up to O(eps^2), by derivatives only."""

    def slope(v: Any) -> Any:
        return jax.jvp(h, (v,), (u,))[1]

    first, second = jax.jvp(slope, (w,), (u,))
    return jax.tree.map(lambda a, b: a + eps / 2 * b, first, second)


def plain(h: Callable[[Any], Any], w: Any, u: Any, eps: Any) -> Any:
    moved = h(jax.tree.map(lambda z, d: z + eps * d, w, u))
    return jax.tree.map(lambda a, b: (a - b) / eps, moved, h(w))


@cache
def differences(name: str, dtype: str) -> np.ndarray:
    """The difference of a model at all step sizes, 0 among them: one program, vmapped over eps."""
    h, w0, u = problem(name)
    run = jax.jit(jax.vmap(partial(lj.finite_jvp, h), in_axes=(None, None, 0)))
    out = run(cast(w0, dtype), cast(u, dtype), EPS.astype(dtype))
    assert out.dtype == dtype
    return np.asarray(out)


@pytest.mark.parametrize("name", MODELS)
class TestModels:
    def test_double_precision_is_the_plain_difference_where_that_has_digits(self, name):
        h, w0, u = problem(name)
        truth = jax.jit(partial(plain, h))
        for alpha, eps, ours in list(zip(ALPHAS, EPS, differences(name, "float64"), strict=False))[:5]:
            assert relative_error(ours, truth(w0, u, eps)) < 2e-14 + 2e-15 * alpha

    def test_double_precision_is_the_expansion_where_that_is_exact(self, name):
        h, w0, u = problem(name)
        # Beyond alpha = 1e8 the remainder is below rounding, and no kink is crossed.
        truth = jax.jit(partial(second_order, h))
        for eps, ours in list(zip(EPS, differences(name, "float64"), strict=True))[8:]:
            assert relative_error(ours, truth(w0, u, eps)) < 1e-13

    def test_single_precision_keeps_its_digits_at_every_scale(self, name):
        for ours, truth in zip(differences(name, "float32"), differences(name, "float64"), strict=True):
            assert relative_error(ours, truth) < 5e-6

    def test_is_the_derivative_at_zero(self, name):
        h, w0, u = problem(name)
        truth = jax.jvp(h, (w0,), (u,))[1]
        np.testing.assert_allclose(differences(name, "float64")[-1], truth, rtol=1e-12, atol=1e-13)


def test_kinks_are_crossed_in_these_tests():
    _, w0, u = problem("relu")
    old, new = (data(w[0]) @ w[0] + w[1][None] for w in (w0, jax.tree.map(jnp.add, w0, u)))
    assert 0.2 < float(jnp.mean((old > 0) != (new > 0))) < 0.8


def test_the_plain_difference_loses_all_digits():
    # The reason for this module: the paper's own largest alpha, in its own precision.
    h, w0, u = problem("tanh")
    single = plain(h, cast(w0, jnp.float32), cast(u, jnp.float32), np.float32(1e-7))
    assert relative_error(single, differences("tanh", "float64")[7]) > 0.1


A, B = weights((5, 7), (5, 7), seed=3)
A, B = 2 * A, 3 * B
POSITIVE = jnp.abs

# name -> function of two (5, 7) arrays; what a rule may find difficult is crossed at large steps
OPERATIONS: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "abs": lambda a, b: jnp.abs(a),
    "acos": lambda a, b: jnp.arccos(0.9 * jnp.tanh(a)),
    "acosh": lambda a, b: jnp.arccosh(1.5 + a * a),
    "add": lambda a, b: a + b[:1, :1],
    "argmax": lambda a, b: jnp.take_along_axis(a, jnp.argmax(b, 1, keepdims=True), 1),
    "asin": lambda a, b: jnp.arcsin(0.9 * jnp.tanh(a)),
    "asinh": lambda a, b: jnp.arcsinh(a),
    "atan": lambda a, b: jnp.arctan(a),
    "atan2": jnp.arctan2,
    "atan2_constant": lambda a, b: jnp.arctan2(a, 0.5),
    "atanh": lambda a, b: jnp.arctanh(0.9 * jnp.tanh(a)),
    "cbrt": lambda a, b: jnp.cbrt(a),
    "ceil_floor_round": lambda a, b: a * (jnp.ceil(a) + jnp.floor(b) + jnp.round(2 * b)),
    "clip": lambda a, b: jnp.clip(a, -POSITIVE(b), 0.5),
    "concatenate": lambda a, b: jnp.concatenate([a, jnp.ones_like(b), b], axis=1),
    "cos": lambda a, b: jnp.cos(3 * a),
    "cosh": lambda a, b: jnp.cosh(a),
    "cummax": lambda a, b: lax.cummax(a, 0) + lax.cummin(b, 1, reverse=True),
    "cumprod": lambda a, b: jnp.cumprod(a, 1),
    "cumsum": lambda a, b: jnp.cumsum(a, 1),
    "div": lambda a, b: a / (1 + POSITIVE(b)),
    "div_by": lambda a, b: 1 / (1 + POSITIVE(b)),
    "dynamic_slice": lambda a, b: lax.dynamic_slice(a, (jnp.argmax(b[:, 0]) // 2, 0), (3, 2)),
    "dynamic_update_slice": lambda a, b: lax.dynamic_update_slice(a, b[:2, :2], (1, 1)),
    "equal": lambda a, b: jnp.where(a.max(1, keepdims=True) == a, b, 2.0),
    "erf": lambda a, b: lax.erf(2 * a) - lax.erfc(b),
    "erf_inv": lambda a, b: lax.erf_inv(0.9 * jnp.tanh(a)),
    "exp": lambda a, b: jnp.exp(a) + jnp.exp2(3 * b),
    "expm1": lambda a, b: jnp.expm1(2 * a),
    "gather": lambda a, b: a[jnp.array([0, 3, 3])] * b[-1:],
    "gather_fill": lambda a, b: jnp.take(a, jnp.array([0, 2]), axis=0, mode="fill"),
    "integer_pow": lambda a, b: a**5 + b**2 + (1 + POSITIVE(b)) ** -3,
    "log": lambda a, b: jnp.log(0.1 + POSITIVE(a)) + jnp.log1p(POSITIVE(b)),
    "logaddexp": lambda a, b: jnp.logaddexp(a, 2 * b),
    "logistic": lambda a, b: jax.nn.sigmoid(5 * a),
    "mask": lambda a, b: a * (b > 0).astype(a.dtype),
    "maximum": lambda a, b: jnp.maximum(a, b) - jnp.minimum(3 * a, b),
    "norm": lambda a, b: jnp.linalg.norm(a, axis=1),
    "ordered": lambda a, b: jnp.where((a <= b) & (a >= -1.0) | ~(b < 0.1), a, 3 * b),
    "pad": lambda a, b: lax.pad(a, b[0, 0], ((1, -1, 0), (0, 2, 1))),
    "pow": lambda a, b: (0.1 + POSITIVE(a)) ** b,
    "pow_constant": lambda a, b: POSITIVE(a) ** 1.5 + (a**2) ** 0.3 + 2.0**b,
    "prod": lambda a, b: a.prod(1) + b.prod(),
    "reduce_max": lambda a, b: a.max(1) - b.min(),
    "rsqrt": lambda a, b: lax.rsqrt(0.1 + POSITIVE(a)),
    "scatter": lambda a, b: a.at[jnp.array([1, 2])].add(b[:2]).at[0].set(b[1]),
    "select": lambda a, b: jnp.where(a > b, a * b, 1.0),
    "sign": lambda a, b: jnp.sign(a) * jnp.cos(b),
    "sin": lambda a, b: jnp.sin(3 * a) * jnp.sin(b),
    "sinh": lambda a, b: jnp.sinh(2 * a),
    "sort_of_dims": lambda a, b: jnp.flip(a, 0).T.reshape(5, 7) - jnp.squeeze(b[:, None]),
    "split": lambda a, b: jnp.subtract(*jnp.split(a[:, :6], 2, axis=1)),
    "sqrt": lambda a, b: jnp.sqrt(POSITIVE(a)),
    "square": lambda a, b: jnp.square(a),
    "tan": lambda a, b: jnp.tan(jnp.tanh(a)),
    "window_dilated": lambda a, b: lax.reduce_window(
        a, -jnp.inf, lax.max, (2, 3), (1, 2), ((1, 0), (-1, 2)), base_dilation=(2, 1), window_dilation=(1, 2)
    ),
    "window_min": lambda a, b: lax.reduce_window(a, jnp.inf, lax.min, (2, 2), (2, 1), "SAME"),
    "window_sum": lambda a, b: lax.reduce_window(a, 0.0, lax.add, (2, 2), (2, 1), "SAME"),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_rule(name):
    h = lambda w: OPERATIONS[name](*w)
    w0, u = [A, B], normal_like(jr.key(4), [A, B])
    # One kink crossed or many, a negative step, none, and the limit.
    eps = np.float32([1.0, 1 / 3, -0.5, 1e-2, 1e-8, 1e-12, 0.0]).astype(np.float64)
    run = jax.jit(jax.vmap(partial(lj.finite_jvp, h), in_axes=(None, None, 0)))
    double = np.asarray(run(w0, u, eps))
    single = np.asarray(run(cast(w0, jnp.float32), cast(u, jnp.float32), eps.astype(np.float32)))
    assert single.dtype == jnp.float32
    truth = [plain(h, w0, u, e) for e in eps[:4]]
    truth += [jax.jit(partial(second_order, h))(w0, u, e) for e in eps[4:]]
    for e, ours, small, right in zip(eps, double, single, truth, strict=True):
        scale = 1 + np.linalg.norm(right)
        # The plain difference is right to rounding/eps only.
        assert np.linalg.norm(ours - right) < scale * (1e-13 if abs(e) < 1e-3 else 2e-14 / abs(e))
        assert np.linalg.norm(small - ours) < scale * 5e-6
