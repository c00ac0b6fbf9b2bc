"""Divided differences: float64 against independent truths, float32 against float64, and every rule.

Cases of a kind are one program (a dict of them in, a dict of differences out): one compilation instead of dozens.
"""

import os
from collections.abc import Callable, Iterator, Mapping
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
from jax.ad_checkpoint import checkpoint_name
from jax.extend import core

import lazyjax as lj
from helpers import relative_error, tree_allclose
from lazyjax.difference.finite_jvp import RULES, finite_value_and_jvp

# Step sizes that float32 holds exactly enough: both precisions see the same number.
ALPHAS = tuple(10.0**k for k in range(13))
EPS = np.float32([*(1 / alpha for alpha in ALPHAS), 0.0]).astype(np.float64)
DIMENSIONS = ("NHWC", "HWIO", "NHWC")

Shapes = tuple[tuple[int, ...], ...]
Cases = dict[str, tuple[Callable[[Any], Any], Shapes]]


def cast(tree: Any, dtype: Any) -> Any:
    return jax.tree.map(lambda z: np.asarray(z).astype(dtype) if jnp.issubdtype(z.dtype, jnp.floating) else z, tree)


def normal(seed: int, *shape: int) -> np.ndarray:
    """Random float32 numbers in float64: rounding to float32 changes nothing."""
    return np.random.default_rng(seed).standard_normal(shape, np.float32).astype(np.float64)


def weights(*shapes: tuple[int, ...], seed: int = 0) -> list[np.ndarray]:
    """Random weights at the usual scale, 1/sqrt(fan in), again float32 numbers."""
    raw = [normal(seed + i, *shape) / max(1, int(np.prod(shape[:-1]))) ** 0.5 for i, shape in enumerate(shapes)]
    return [z.astype(np.float32).astype(np.float64) for z in raw]


def normal_like(seed: int, tree: Any) -> Any:
    leaves, structure = jax.tree.flatten(tree)
    return structure.unflatten([normal(seed + i, *z.shape) for i, z in enumerate(leaves)])


X, IMAGES = jnp.asarray(normal(5, 6, 5)), jnp.asarray(normal(6, 2, 6, 6, 2))


def mlp(activation: Callable[[jax.Array], jax.Array], w: list[jax.Array]) -> jax.Array:
    z = activation(X.astype(w[0].dtype) @ w[0] + w[1][None])
    return activation(z @ w[2]) @ w[3]


MLP = ((5, 9), (9,), (9, 9), (9, 3))


def normed(w: list[jax.Array]) -> jax.Array:
    z = X.astype(w[0].dtype) @ w[0]
    centered = z - z.mean(1, keepdims=True)
    z = w[1][None] * centered * lax.rsqrt(jnp.var(z, 1, keepdims=True) + 1e-5)
    return jnp.tanh(z @ w[2]) @ w[3]


def attention(w: list[jax.Array]) -> jax.Array:
    """Masked self-attention: -inf in the scores, softmax with its subtracted maximum."""
    z = X.astype(w[0].dtype) @ w[0]
    scores = jnp.where(jnp.tril(jnp.ones((6, 6), bool)), (z @ w[1]) @ z.T, -jnp.inf)
    return jax.nn.softmax(scores) @ z @ w[2]


def pooled(x: jax.Array, size: int = 2, padding: str = "VALID") -> jax.Array:
    return lax.reduce_window(x, -jnp.inf, lax.max, (1, size, size, 1), (1, 2, 2, 1), padding)


def cnn(w: list[jax.Array]) -> jax.Array:
    z = lax.conv_general_dilated(IMAGES.astype(w[0].dtype), w[0], (1, 1), "SAME", dimension_numbers=DIMENSIONS)
    z = pooled(jax.nn.relu(z + w[1].reshape(1, 1, 1, -1)))
    z = lax.conv_general_dilated(z, w[2], (1, 1), "VALID", dimension_numbers=DIMENSIONS)
    return jnp.tanh(z).reshape(len(z), -1) @ w[3]


CNN = ((3, 3, 2, 4), (4,), (2, 2, 4, 3), (12, 3))

# name -> model and shapes of its weights
MODELS: Cases = {
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


def merged(functions: Mapping[str, Callable[[Any], Any]], w: Mapping[str, Any]) -> dict[str, Any]:
    """Many models as one: a dict of parameters to a dict of outputs."""
    return {name: function(w[name]) for name, function in functions.items()}


def merge(cases: Cases) -> tuple[Callable[[Any], Any], Any, Any]:
    """One model of all cases, its parameters and a direction."""
    h = partial(merged, {name: function for name, (function, _) in cases.items()})
    w0 = {name: weights(*shapes) for name, (_, shapes) in cases.items()}
    return h, w0, {name: normal_like(100, w) for name, w in w0.items()}


def plain(h: Callable[[Any], Any], w: Any, u: Any, eps: Any) -> Any:
    moved = h(jax.tree.map(lambda z, d: z + eps * d, w, u))
    return jax.tree.map(lambda a, b: (a - b) / eps, moved, h(w))


def limit(h: Callable[[Any], Any], w: Any, u: Any) -> Any:
    return jax.jvp(h, (w,), (u,))[1]


def second_order(h: Callable[[Any], Any], w: Any, u: Any, eps: float) -> Any:
    """Dh u + (eps/2) D^2 h(u, u): the difference up to O(eps^2), by derivatives only."""
    first, second = jax.jvp(lambda v: limit(h, v, u), (w,), (u,))
    return jax.tree.map(lambda a, b: a + eps / 2 * b, first, second)


# For float64 truths: quick to compile. Single precision is judged as it is compiled by default.
quick = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def over_eps(function: Callable[..., Any], h: Callable[[Any], Any]) -> Callable[..., Any]:
    """A function of (w, u, eps), a model before them, at several step sizes."""
    return jax.vmap(partial(function, h), in_axes=(None, None, 0))


def single_precision(h: Callable[[Any], Any], w0: Any, u: Any, eps: np.ndarray) -> Any:
    return jax.jit(over_eps(lj.finite_jvp, h))(*cast((w0, u, eps), np.float32))


def each(*trees: Mapping[str, Any]) -> Iterator[tuple[Any, ...]]:
    """(name, the entries of that name) of several dicts, each entry a list over the step sizes."""
    for name in trees[0]:
        entries = [jax.tree.map(np.asarray, tree[name]) for tree in trees]
        yield (
            name,
            *([jax.tree.map(lambda z, i=i: z[i], e) for i in range(len(jax.tree.leaves(e)[0]))] for e in entries),
        )


@cache
def of_models() -> tuple[Any, ...]:
    """The differences of all models at all step sizes, 0 among them, and what they are compared with."""
    h, w0, u = merge(MODELS)

    @quick
    def double(w, u):
        return (
            over_eps(lj.finite_jvp, h)(w, u, EPS),
            over_eps(plain, h)(w, u, EPS[:5]),
            over_eps(second_order, h)(w, u, EPS[8:]),
        )

    return *double(w0, u), single_precision(h, w0, u, EPS)


def test_models_are_differenced_to_rounding_at_every_scale():
    for name, double, differences, expansions, single in each(*of_models()):
        assert single[0].dtype == np.float32
        # The plain difference where that has digits.
        for alpha, ours, right in zip(ALPHAS, double, differences, strict=False):
            assert relative_error(ours, right) < 2e-14 + 2e-15 * alpha, (name, alpha)
        # Beyond alpha = 1e8 the remainder of the expansion is below rounding, and no kink is crossed.
        for ours, right in zip(double[8:], expansions, strict=True):
            assert relative_error(ours, right) < 1e-13, name
        # Single precision keeps its digits at every scale.
        for small, truth in zip(single, double, strict=True):
            assert relative_error(small, truth) < 5e-6, name


def test_kinks_are_crossed_in_these_tests():
    _, w0, u = merge(MODELS)
    old, new = (np.asarray(X) @ w[0] + w[1][None] for w in (w0["relu"], jax.tree.map(np.add, w0, u)["relu"]))
    assert 0.2 < np.mean((old > 0) != (new > 0)) < 0.8


def test_the_plain_difference_loses_all_digits():
    # The reason for this module: the paper's own largest alpha, in its own precision.
    _, w0, u = merge(MODELS)
    h = MODELS["tanh"][0]
    truth = quick(partial(second_order, h))(w0["tanh"], u["tanh"], 1e-7)
    single = jax.jit(partial(plain, h))(*cast((w0["tanh"], u["tanh"], np.float64(1e-7)), np.float32))
    assert relative_error(single, truth) > 0.1


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
    "clamp": lambda a, b: lax.clamp(-POSITIVE(b), a, 0.5 + POSITIVE(b)),
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
    "log": lambda a, b: jnp.log(0.1 + POSITIVE(a)) + jnp.log1p(POSITIVE(b)) * jnp.log2(0.1 + POSITIVE(a)),
    "logaddexp": lambda a, b: jnp.logaddexp(a, 2 * b),
    "logistic": lambda a, b: jax.nn.sigmoid(5 * a),
    "mask": lambda a, b: a * (b > 0).astype(a.dtype),
    "maximum": lambda a, b: jnp.maximum(a, b) - jnp.minimum(3 * a, b),
    "named": lambda a, b: checkpoint_name(lax.reduce_precision(a, 11, 52), "a"),
    "norm": lambda a, b: jnp.linalg.norm(a, axis=1),
    "ordered": lambda a, b: jnp.where((a <= b) & (a >= -1.0) | ~(b < 0.1), a, 3 * b),
    "pad": lambda a, b: lax.pad(a, b[0, 0], ((1, -1, 0), (0, 2, 1))),
    "pow": lambda a, b: (0.1 + POSITIVE(a)) ** b,
    "pow_constant": lambda a, b: POSITIVE(a) ** 1.5 + (a**2) ** 0.3 + 2.0**b,
    "prod": lambda a, b: a.prod(1) + b.prod(),
    "reduce_max": lambda a, b: a.max(1) - b.min(),
    "rsqrt": lambda a, b: lax.rsqrt(0.1 + POSITIVE(a)),
    "scatter": lambda a, b: a.at[jnp.array([1, 2])].add(b[:2]).at[0].set(b[1]),
    "scatter_sub": lambda a, b: a.at[jnp.array([1, 2])].subtract(b[:2]),
    "select": lambda a, b: jnp.where(a > b, a * b, 1.0),
    "sign": lambda a, b: jnp.sign(a) * jnp.cos(b),
    "sin": lambda a, b: jnp.sin(3 * a) * jnp.sin(b),
    "sinh": lambda a, b: jnp.sinh(2 * a),
    "sort_of_dims": lambda a, b: jnp.flip(a, 0).T.reshape(5, 7) - jnp.squeeze(b[:, None]),
    "unstack": lambda a, b: jnp.subtract(*jnp.unstack(a[:2])),
    "split": lambda a, b: jnp.subtract(*jnp.split(a[:, :6], 2, axis=1)),
    "sqrt": lambda a, b: jnp.sqrt(POSITIVE(a)),
    "square": lambda a, b: jnp.square(a),
    "stack": lambda a, b: jnp.tile(jnp.stack([a, jnp.ones_like(b), b], axis=1), (1, 2, 1)),
    "tan": lambda a, b: jnp.tan(jnp.tanh(a)),
    "window_dilated": lambda a, b: lax.reduce_window(
        a, -jnp.inf, lax.max, (2, 3), (1, 2), ((1, 0), (-1, 2)), base_dilation=(2, 1), window_dilation=(1, 2)
    ),
    "window_min": lambda a, b: lax.reduce_window(a, jnp.inf, lax.min, (2, 2), (2, 1), "SAME"),
    "window_sum": lambda a, b: lax.reduce_window(a, 0.0, lax.add, (2, 2), (2, 1), "SAME"),
}


# Collectives, which ask for several devices, and names that JAX has in some versions only.
ELSEWHERE = {
    *("all_gather", "all_to_all", "pbroadcast", "ppermute", "psum", "psum2", "psum_invariant", "pvary"),
    *("layout_constraint", "mesh_cast", "reduce_scatter", "reshard", "sharding_constraint"),
    *("log2", "one_minus_square", "scatter_add", "scatter_max", "scatter_min", "scatter_mul", "scatter_sub"),
    *("select_if_vmap", "stack", "tile", "unstack"),
}

# In `test_every_primitive`.
IN_PUBLIC_FUNCTIONS = {
    *("bessel_i0e", "bessel_i1e", "complex", "conj", "digamma", "fft", "imag", "lgamma", "nextafter"),
    *("ragged_dot_general", "real", "rem", "scatter-max", "scatter-min", "scatter-mul", "triangular_solve"),
}


def primitives(jaxpr: core.Jaxpr) -> set[str]:
    """Names of all primitives of a program, those of its calls included."""
    names = set()
    for eqn in jaxpr.eqns:
        names.add(eqn.primitive.name)
        for value in jax.tree.leaves(dict(eqn.params), is_leaf=lambda v: hasattr(v, "eqns") or hasattr(v, "jaxpr")):
            inner = getattr(value, "jaxpr", value)
            names |= primitives(inner) if hasattr(inner, "eqns") else set()
    return names


def test_every_rule_is_tested():
    h = partial(merged, {name: lambda w, f=f: f(*w) for name, f in OPERATIONS.items()})
    w = {name: [jnp.zeros((5, 7))] * 2 for name in OPERATIONS}
    found = primitives(jax.make_jaxpr(h)(w).jaxpr)
    for cases in (MODELS, DERIVATIVES):
        h, w, _ = merge(cases)
        found |= primitives(jax.make_jaxpr(h)(w).jaxpr)
    assert set(RULES) - found <= ELSEWHERE | IN_PUBLIC_FUNCTIONS


def test_every_rule():
    h = partial(merged, {name: lambda w, f=f: f(*w) for name, f in OPERATIONS.items()})
    a, b = weights((5, 7), (5, 7), seed=3)
    w0 = {name: [2 * a, 3 * b] for name in OPERATIONS}
    u = {name: normal_like(4, [a, b]) for name in OPERATIONS}
    # Many kinks crossed, a negative step, few kinks, none, and the limit.
    eps = np.float32([1.0, 1 / 3, -0.5, 1e-2, 1e-12, 0.0]).astype(np.float64)

    @quick
    def double(w, u):
        return over_eps(lj.finite_jvp, h)(w, u, eps), over_eps(plain, h)(w, u, eps[:4]), limit(h, w, u)

    ours, differences, limits = jax.tree.map(np.asarray, double(w0, u))
    # The plain difference is right to rounding/eps, the limit to a multiple of eps.
    bounds = [*(2e-14 / np.abs(eps[:4])), 1e-10, 1e-13]
    for name, doubles, right, singles in each(ours, differences, single_precision(h, w0, u, eps)):
        truth = [*right, limits[name], limits[name]]
        for double_, single, true, bound in zip(doubles, singles, truth, bounds, strict=True):
            scale = 1 + np.linalg.norm(true)
            assert single.dtype == np.float32
            assert np.linalg.norm(double_ - true) < scale * bound, name
            assert np.linalg.norm(single - double_) < scale * 5e-6, name


# At a tie the derivative is a convention: `jax.jvp`'s, whatever it is.
TIES: dict[str, Callable[[jax.Array], jax.Array]] = {
    "abs": jnp.abs,
    "clip": lambda z: jnp.clip(z, -1.0, 1.0),
    "hardtanh": jax.nn.hard_tanh,
    "maximum": lambda z: jnp.maximum(z, 0.0) + jnp.minimum(z, -z),
    "max": lambda z: z.max() - z.min(),
    "pool": lambda z: lax.reduce_window(z, -jnp.inf, lax.max, (2,), (1,), "SAME"),
    "prod": lambda z: z.prod(keepdims=True),
    "relu": jax.nn.relu,
    "relu6": jax.nn.relu6,
    "sign": lambda z: jnp.sign(z) * z + jnp.round(z),
    "stop_gradient": lambda z: z * lax.stop_gradient(z**2),
    "where": lambda z: jnp.where(z > 0, z, 0.1 * z),
}


def test_ties_at_zero_are_those_of_jvp():
    z, u = np.array([0.0, 0.0, 1.0, 1.0, -1.0, 6.0, 0.5]), np.array([1.0, -2.0, 3.0, 0.7, 1.0, -1.0, 0.3])
    h = partial(merged, TIES)

    @quick
    def traced(z, u, eps):
        w, v = dict.fromkeys(TIES, z), dict.fromkeys(TIES, u)
        return lj.finite_jvp(h, w, v, eps), limit(h, w, v)

    ours, right = traced(z, u, 0.0)
    for name in TIES:
        np.testing.assert_array_equal(ours[name], right[name], err_msg=name)


@pytest.mark.parametrize("eps", [0, np.float64(1e-310)])
def test_a_step_known_to_be_zero_is_the_derivative(eps):
    z, u = jnp.asarray([0.0, -1.0, 2.0]), jnp.asarray([1.0, 2.0, 3.0])
    np.testing.assert_array_equal(lj.finite_jvp(jnp.abs, z, u, eps), jax.jvp(jnp.abs, (z,), (u,))[1])


def test_known_and_traced_steps_agree():
    h, w, u = lambda w: jnp.tanh(jax.nn.relu(w)), jnp.asarray(normal(0, 7)), jnp.asarray(normal(1, 7))
    traced = jax.jit(partial(finite_value_and_jvp, h))
    for eps in (0.5, -0.25, np.float32(1e-3)):
        known = lj.finite_jvp(h, w, u, eps)
        value, difference = traced(w, u, jnp.asarray(eps))
        assert relative_error(known, difference) < 1e-13
        assert relative_error(known, plain(h, w, u, float(eps))) < 1e-12
    np.testing.assert_allclose(value, h(w), rtol=1e-13, atol=1e-14)


def test_derivatives_of_differences_are_known_in_terms_of_those_of_the_model():
    """Gradients of c . [h(w + eps u) - h(w)]/eps with respect to w, u and eps."""
    cases = {name: MODELS[name] for name in ("gelu_erf", "attention", "cnn")}
    _, w0, u = merge(cases)
    eps = np.array([0.25, 1e-2, 1e-12, 0.0])

    def score(name, w):
        z = cases[name][0](w)
        return jnp.vdot(jnp.cos(jnp.arange(z.size, dtype=z.dtype)).reshape(z.shape), z)

    def scalars(w):
        return {name: score(name, w[name]) for name in cases}

    def total(w):
        return sum(scalars(w).values())

    @quick
    def derivatives(w, u):
        def ours(w, u, eps):
            # A step size of its own for each model, so that the derivatives are apart.
            return sum(lj.finite_jvp(partial(score, name), w[name], u[name], eps[name]) for name in cases)

        return jax.vmap(jax.grad(ours, (0, 1, 2)), in_axes=(None, None, 0))(w, u, dict.fromkeys(cases, eps))

    @quick
    def truths(w, u):
        slope = partial(limit, jax.grad(total))
        moved = jax.vmap(lambda e: jax.grad(total)(jax.tree.map(lambda z, d: z + e * d, w, u)))(eps)
        of_base = over_eps(plain, jax.grad(total))(w, u, eps[:2]), slope(w, u)

        def of_step(e):
            line = jax.jvp(lambda e: scalars(jax.tree.map(lambda z, d: z + e * d, w, u)), (e,), (1.0,))[1]
            return jax.tree.map(lambda a, b: (a - b) / e, line, plain(scalars, w, u, e))

        half = jax.jvp(lambda v: limit(scalars, v, u), (w,), (u,))[1]
        return moved, of_base, (jax.vmap(of_step)(eps[:2]), jax.tree.map(lambda z: z / 2, half))

    base, direction, step = derivatives(w0, u)
    moved, (base_plain, base_limit), (step_plain, step_limit) = truths(w0, u)
    for name in cases:
        assert all(np.isfinite(g).all() for g in jax.tree.leaves((base[name], direction[name], step[name]))), name
        assert relative_error(direction[name], moved[name]) < 1e-10, name
        first, last = (jax.tree.map(lambda g, part=part: g[part], base[name]) for part in (slice(2), slice(2, 4)))
        assert relative_error(first, base_plain[name]) < 1e-10, name
        assert relative_error(last, jax.tree.map(lambda g: jnp.stack([g, g]), base_limit[name])) < 1e-10, name
        np.testing.assert_allclose(step[name][:2], step_plain[name], rtol=1e-9, atol=1e-10, err_msg=name)
        np.testing.assert_allclose(step[name][2:], [step_limit[name]] * 2, rtol=1e-9, atol=1e-10, err_msg=name)


def cross_entropy(w: list[jax.Array]) -> jax.Array:
    return -jax.nn.log_softmax(mlp(jnp.tanh, w))[:, 0].mean()


DERIVATIVES: Cases = {
    "gradient": (jax.grad(cross_entropy), MLP),
    "jacobian": (jax.jacrev(partial(mlp, jax.nn.relu)), ((5, 4), (4,), (4, 4), (4, 2))),
    # The derivative of a maximum compares it with its arguments, which the new winner must equal.
    "jacobian_of_maxima": (
        jax.jacrev(lambda w: mlp(lambda z: jnp.maximum(z, 0.0), w).max(1)),
        ((5, 4), (4,), (4, 4), (4, 3)),
    ),
    "pooling_reverse": (jax.grad(lambda w: (cnn(w) ** 2).sum()), CNN),
    "pooling_forward": (
        lambda w: jax.jvp(lambda z: pooled(IMAGES.astype(z.dtype) * z, 3, "SAME"), (w[0],), (jnp.sin(w[0]),))[1],
        ((2, 6, 6, 2),),
    ),
    "attention": (jax.grad(lambda w: (attention(w) ** 2).sum()), ((5, 3), (3, 3), (3, 1))),
}


@pytest.mark.optimized
def test_derivatives_of_a_model_may_be_differenced():
    h, w0, u = merge(DERIVATIVES)
    eps = EPS[[0, 1, 3, 9, 12, 13]]

    @quick
    def double(w, u):
        return over_eps(lj.finite_jvp, h)(w, u, eps), over_eps(plain, h)(w, u, eps[:3]), limit(h, w, u)

    ours, differences, limits = jax.tree.map(np.asarray, double(w0, u))
    for name, doubles, right, singles in each(ours, differences, single_precision(h, w0, u, eps)):
        # At alpha = 1 the attention scores move by 80 and saturate the softmax: the new end of the step, old plus
        # delta, is rounded in proportion to that move, where the plain difference would have exact zeros and ones.
        # Elsewhere the order in which sums are rounded matters; a program compiled quickly does that a little worse.
        elsewhere = 7e-6 if "JAX_DISABLE_MOST_OPTIMIZATIONS" in os.environ else 5e-6
        bound = 3e-5 if name == "attention" else elsewhere
        for i, e in enumerate(eps):
            assert relative_error(singles[i], doubles[i]) < bound, name
            if i < 3:
                assert relative_error(doubles[i], right[i]) < 1e-14 / e + 1e-13, name
            else:
                # The remainder of the first order, a few times eps.
                assert relative_error(doubles[i], limits[name]) < 1e-12 + 50 * e, name


class EquinoxNet(eqx.Module):
    convolution: eqx.nn.Conv2d
    norm: eqx.nn.LayerNorm
    attention: eqx.nn.MultiheadAttention
    head: eqx.nn.Linear
    steps: jax.Array
    name: str = eqx.field(static=True)
    activation: Callable[[jax.Array], jax.Array]

    def __init__(self, key):
        keys = jr.split(key, 3)
        self.convolution = eqx.nn.Conv2d(2, 4, 3, key=keys[0])
        self.norm = eqx.nn.LayerNorm(4)
        self.attention = eqx.nn.MultiheadAttention(2, 4, key=keys[1])
        self.head = eqx.nn.Linear(4, 2, key=keys[2])
        self.steps = jnp.arange(2)
        self.name = "net"
        self.activation = jax.nn.gelu

    def __call__(self, image):
        z = eqx.nn.MaxPool2d(2, 1)(self.activation(self.convolution(jnp.moveaxis(image, -1, 0))))
        z = eqx.nn.AvgPool2d(2, 1)(z).reshape(4, -1).T
        z = jax.vmap(self.norm)(z)
        return self.head(self.attention(z, z, z).mean(0)) * self.steps.astype(z.dtype)


class FlaxNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.max_pool(nn.relu(nn.Conv(4, (3, 3), param_dtype=x.dtype)(x)), (2, 2), (2, 2))
        x = nn.GroupNorm(2, param_dtype=x.dtype)(nn.avg_pool(x, (2, 2), (1, 1))).reshape(len(x), -1, 4)
        x = nn.RMSNorm(param_dtype=x.dtype)(nn.LayerNorm(param_dtype=x.dtype)(x))
        x = nn.MultiHeadDotProductAttention(2, param_dtype=x.dtype)(x)
        return nn.Dense(2, param_dtype=x.dtype)(nn.silu(x).mean(1))


def check_module(h: Callable[[Any], Any], w0: Any) -> None:
    """Check the differences of a module at its shapes, with random parameters."""
    params, rest = eqx.partition(w0, lambda leaf: hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating))
    params, u = (jax.tree.map(jnp.asarray, normal_like(seed, params)) for seed in (0, 100))
    params = jax.tree.map(lambda z: z / max(1, int(np.prod(z.shape[1:]))) ** 0.5, jax.tree.map(np.asarray, params))

    # The direction is an argument: with all operands constant, XLA of JAX 0.7 folds convolutions wrongly.
    @quick
    def run(p, u, eps):
        of_params = lambda p: h(eqx.combine(p, rest))
        ours = lj.finite_jvp(lambda w: h(w), eqx.combine(p, rest), u, eps)
        return ours, plain(of_params, p, u, eps), limit(of_params, p, u)

    ours, difference, _ = run(params, u, 1e-2)
    assert relative_error(ours, difference) < 1e-11
    ours, _, derivative = run(params, u, 0.0)
    assert relative_error(ours, derivative) < 1e-13


def test_equinox_modules_integer_and_static_leaves():
    net = eqx.filter_eval_shape(EquinoxNet, jr.key(0))
    check_module(lambda net: jax.vmap(net)(IMAGES), eqx.tree_at(lambda net: net.steps, net, jnp.asarray([0, 1])))


@pytest.mark.standard_promotion
def test_flax_modules():
    net = FlaxNet()
    with jax.numpy_rank_promotion("allow"):
        check_module(lambda w: net.apply(w, IMAGES), jax.eval_shape(net.init, jr.key(0), IMAGES))


def loop(w: dict[str, jax.Array], kind: str) -> jax.Array:
    """A recurrence whose carry holds a moving state, a fixed counter and a switching flag."""

    def body(carry, x):
        z, count, flag = carry
        z = jnp.tanh(w["a"] @ z + x * w["b"][count % 3])
        flag = flag | (z[0] > 0.2)
        return (z, count + 1, flag), jnp.where(flag, z, -z)

    start = (jnp.ones(3), 0, False)
    if kind == "scan":
        (z, _, flag), ys = lax.scan(body, start, X[:, 0], reverse=True)
        return jnp.concatenate([z, ys.ravel(), flag[None].astype(z.dtype)])
    return lax.fori_loop(0, jnp.asarray(4), lambda i, c: body(c, X[i, 1])[0], start)[0]


CONTROL: dict[str, Callable[[dict[str, jax.Array]], jax.Array]] = {
    "scan": partial(loop, kind="scan"),
    "while": partial(loop, kind="while"),
    "cond": lambda w: lax.cond(w["b"].sum() > 0, lambda a: (a, 1), lambda a: (jnp.sin(a), 0), w["a"])[0],
    "cond_fixed": lambda w: lax.cond(X[0, 0] > 0, jnp.sin, lambda a: jnp.ones_like(a), w["a"]),
    "switch": lambda w: lax.switch(jnp.argmax(w["b"]), [lambda a: 2 * a, jnp.cos, lambda a: jnp.zeros_like(a)], w["a"]),
    "checkpoint": jax.checkpoint(lambda w: jnp.tanh(w["a"] @ w["b"])),
    "vmap": lambda w: jax.vmap(lambda a: jax.jit(jnp.vdot)(a, jnp.sin(w["b"])))(w["a"]),
    "mean_over_axis": lambda w: jax.vmap(lambda z: z * lax.pmean(z, "i"), axis_name="i")(w["a"]),
    "barrier": lambda w: lax.optimization_barrier((w["a"], 1.0))[0] ** 2,
    "constant": lambda w: jnp.ones(2) + 0 * jax.lax.stop_gradient(3.0),
    "callback": lambda w: jax.debug.callback(lambda z: None, w["a"]) or w["a"] ** 2,
}


def test_calls_and_control_flow_are_entered():
    h = partial(merged, CONTROL)
    w0 = {name: {"a": weights((3, 3), seed=2)[0], "b": np.array([-0.3, 0.1, 0.2])} for name in CONTROL}
    u = {name: {"a": np.eye(3) - 0.5, "b": np.array([1.0, 0.3, -0.5])} for name in CONTROL}

    @jax.jit
    def run(w, u, eps):
        return lj.finite_jvp(h, w, u, eps), plain(h, w, u, eps), limit(h, w, u)

    for eps in (1.0, 0.01, 0.0):
        ours, difference, derivative = run(w0, u, eps)
        for name in CONTROL:
            right, tolerance = (difference[name], 1e-12) if eps else (derivative[name], 1e-13)
            np.testing.assert_allclose(ours[name], right, rtol=tolerance, atol=tolerance, err_msg=name)


def test_a_custom_jvp_rule_holds_in_the_limit_only():
    @jax.custom_jvp
    def straight_through(z):
        return jnp.round(z)

    straight_through.defjvps(lambda dz, out, z: dz)
    run = jax.jit(partial(lj.finite_jvp, straight_through))
    np.testing.assert_array_equal(run(jnp.array([0.4]), jnp.array([1.0]), jnp.array([0.5, 0.0])[0]), [2.0])
    np.testing.assert_array_equal(run(jnp.array([0.4]), jnp.array([1.0]), 0.0), [1.0])


def test_a_custom_vjp_function_is_differenced_itself():
    square = jax.custom_vjp(lambda z: z**2)
    square.defvjp(lambda z: (z**2, z), lambda z, g: (g * 100.0,))
    got = jax.jit(partial(lj.finite_jvp, square))(jnp.array([3.0]), jnp.array([1.0]), 0.5)
    np.testing.assert_allclose(got, [6.5])


def test_embedding_rows_move_only_where_looked_up():
    tokens = jnp.array([[0, 2], [2, 5]])
    h = lambda w: jnp.take(w["table"], tokens, axis=0, mode="fill")
    w0 = {"table": jnp.ones((4, 3)), "tokens": tokens}
    out = lj.finite_jvp(h, w0, {"table": jnp.arange(12.0).reshape(4, 3), "tokens": None}, 1e-9)
    np.testing.assert_array_equal(out[0, 1], [6.0, 7.0, 8.0])
    # Out of bounds the table answers NaN, a constant.
    np.testing.assert_array_equal(out[1, 1], np.zeros(3))


def test_dtypes_are_kept():
    h, shapes = MODELS["gelu_erf"]
    w0 = weights(*shapes)
    u = normal_like(100, w0)
    dtypes = ("float64", "float32", "float16", "bfloat16")
    run = jax.jit(lambda args: {d: lj.finite_jvp(h, *args[d], jnp.asarray(1e-9)) for d in dtypes})
    out = run({dtype: cast((w0, u), jnp.dtype(dtype)) for dtype in dtypes})
    for dtype in dtypes:
        assert out[dtype].dtype == dtype
        assert relative_error(out[dtype], out["float64"]) < 8 * float(jnp.finfo(dtype).eps), dtype


def test_leaves_that_are_no_coordinates_are_ignored_in_directions():
    h = lambda w: w["a"] * w["n"] * w["scale"]
    w0 = {"a": jnp.ones(2), "n": np.array([1, 2]), "scale": 3.0, "f": jnp.tanh, "none": None}
    full = {"a": jnp.array([1.0, 2.0]), "n": jnp.ones(5), "scale": jnp.tanh, "f": 1, "none": None}
    with jax.numpy_dtype_promotion("standard"):
        for u in (full, full | {"n": None, "scale": None, "f": None}):
            np.testing.assert_allclose(lj.finite_jvp(h, w0, u, 1e-9), [3.0, 12.0], rtol=1e-15)


def test_outputs_are_any_pytree_and_directions_are_cast():
    h = lambda w: {"twice": 2 * w, "none": None, "fixed": jnp.ones(2)}
    out = lj.finite_jvp(h, jnp.ones(2, jnp.float32), np.array([1.0, 3.0]), 1e-7)
    right = {"twice": jnp.array([2.0, 6.0], jnp.float32), "none": None, "fixed": jnp.zeros(2)}
    assert tree_allclose(out, right, rtol=0.0, atol=0.0)


@pytest.mark.parametrize("eps", [0.5, 0.0])
@pytest.mark.parametrize("jit", [False, True])
def test_the_plain_difference_serves_any_model(eps, jit):
    h, w0, u = jnp.sort, jnp.array([1.0, 0.8, 3.0]), jnp.array([1.0, 2.0, -1.0])
    run = partial(lj.finite_jvp, h, difference="plain")
    out = (jax.jit(run) if jit else run)(w0, u, eps)
    np.testing.assert_allclose(out, [1.4, 1.6, -1.0] if eps else [2.0, 1.0, -1.0], rtol=1e-14)


class TestErrors:
    z = np.ones(3)

    def test_a_primitive_without_a_derivative(self):
        with pytest.raises(ValueError, match=r"h applies the primitive 'schur'.*stop_gradient"):
            lj.finite_jvp(lambda w: lax.linalg.schur(jnp.outer(w, w))[0], self.z, self.z, 0.1)

    def test_the_bits_of_a_number(self):
        assert lj.finite_jvp(lambda w: w * (w.view(jnp.int64) > 0).astype(w.dtype), self.z, self.z, 0.1).shape == (3,)
        with pytest.raises(ValueError, match="h makes numbers of bits that depend on the parameters"):
            lj.finite_jvp(lambda w: w.view(jnp.int64).view(w.dtype), self.z, self.z, 0.1)

    def test_complex_parameters(self):
        with pytest.raises(TypeError, match="w0 must have real floating leaves"):
            lj.finite_jvp(jnp.abs, 1j * self.z, 1j * self.z, 0.1)
        with pytest.raises(ValueError, match=r"u must have a real floating array.*got \(3,\) complex128"):
            lj.finite_jvp(jnp.sin, self.z, 1j * self.z, 0.1)

    @pytest.mark.parametrize("h", [jnp.argmax, lambda w: (w, w > 0), lambda w: lax.complex(w, w)])
    def test_outputs(self, h):
        with pytest.raises(ValueError, match="h must return real floating arrays"):
            lj.finite_jvp(h, self.z, self.z, 0.1)

    @pytest.mark.parametrize("u", [np.ones(4), np.ones(3, int), None, 1.0])
    def test_direction(self, u):
        with pytest.raises(ValueError, match=r"u must have a real floating array.*shape \(3,\)"):
            lj.finite_jvp(jnp.sin, self.z, u, 0.1)

    def test_structure(self):
        with pytest.raises(ValueError, match="u must have the structure of w0"):
            lj.finite_jvp(jnp.sin, self.z, [self.z], 0.1)

    @pytest.mark.parametrize("eps", [np.ones(2), 1j])
    def test_step(self, eps):
        with pytest.raises(ValueError, match="eps must be a real scalar"):
            lj.finite_jvp(jnp.sin, self.z, self.z, eps)

    @pytest.mark.parametrize("eps", [np.nan, np.inf])
    def test_finite_step(self, eps):
        with pytest.raises(ValueError, match=f"eps must be finite, got {eps}"):
            lj.finite_jvp(jnp.sin, self.z, self.z, eps)

    def test_parameters(self):
        with pytest.raises(TypeError, match="w0 must hold at least one real floating array"):
            lj.finite_jvp(lambda w: jnp.ones(2), {"n": 3}, {"n": 3}, 0.1)

    def test_kind(self):
        with pytest.raises(ValueError, match="difference must be 'exact' or 'plain', got 'fast'"):
            lj.finite_jvp(jnp.sin, self.z, self.z, 0.1, difference="fast")
