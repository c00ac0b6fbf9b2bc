"""The Gram by layers: the rule of every kind of layer, J J^T by jacrev in every contraction, blocks and devices.

Rules are checked by tracing, one work at a time; values on a few composites: the Gram of a sum over disjoint parameters
is the sum of the Grams, so that one compiled program checks several works.
"""

import itertools
import os
import subprocess
import sys
from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.flatten_util
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh

import lazyjax as lj
from lazyjax.kernels import plan as _plan
from lazyjax.kernels import products as _products
from lazyjax.kernels.layer_rules import RULES
from lazyjax.kernels.plan import sample_jacobian


@pytest.fixture(autouse=True, scope="module")
def standard_rank_promotion():
    """Users' models add a bias (m,) to rows (n, m)."""
    with jax.numpy_rank_promotion("allow"):
        yield


def jacobian_of(f, w, x):
    coordinates, rest = eqx.partition(w, eqx.is_inexact_array)
    vector, unravel = jax.flatten_util.ravel_pytree(coordinates)
    return np.asarray(jax.jit(jax.jacrev(lambda v: f(eqx.combine(unravel(v), rest), x).ravel()))(vector))


NUMBERS = np.random.default_rng(0).normal(size=2**15)


def normal(seed, shape):
    size = int(np.prod(shape))
    return jnp.asarray(NUMBERS[997 * seed : 997 * seed + size].reshape(shape))


def draw(seed, **shapes):
    sizes = np.cumsum([0, *(int(np.prod(shape)) for shape in shapes.values())])
    numbers = normal(seed, (sizes[-1],))
    return {
        name: numbers[i:j].reshape(shape)
        for (name, shape), i, j in zip(shapes.items(), sizes[:-1], sizes[1:], strict=True)
    }


class Work(NamedTuple):
    """A model, its parameters and inputs, and the rules expected: a word a leaf, in the leaves' order."""

    f: Any
    w: Any
    x: jax.Array
    rules: dict[str, str]


def images(*shape):
    return normal(9, (3, *shape))


def head(z):
    """Two outputs that mix everything of a sample."""
    z = jnp.tanh(z).reshape(z.shape[0], -1)
    return z @ jnp.sin(jnp.arange(1, 2 * z.shape[1] + 1).astype(z.dtype)).reshape(-1, 2)


def conv(x, kernel, spec, **options):
    options = {"window_strides": (1,) * (kernel.ndim - 2), "padding": "SAME"} | options
    return lax.conv_general_dilated(x, kernel, dimension_numbers=spec, **options)


NHWC, NCHW, TURNED = ("NHWC", "HWIO", "NHWC"), ("NCHW", "OIHW", "NCHW"), ("HWCN", "WOHI", "WNHC")


def conv_work(kernel, image, spec=NHWC, bias=None, **options):
    w = draw(1, kernel=kernel) | ({} if bias is None else draw(2, bias=bias))

    def f(w, x):
        x = x if spec is not TURNED else x.transpose(1, 2, 3, 0)
        z = conv(x, w["kernel"] * 0.3, spec, **options)
        z = z + 0.1 * w["bias"] if "bias" in w else z
        return head(z if spec is not TURNED else jnp.moveaxis(z, 1, 0))

    return Work(f, w, images(*image), {"kernel": "convolution"} | ({} if bias is None else {"bias": "bias"}))


def attention(w, x):
    q, k, v = (jnp.einsum("ntd,dhe->nhte", x, w[name]) for name in "qkv")
    mixed = jax.nn.softmax(q @ k.swapaxes(-1, -2) / 2) @ v
    return jnp.einsum("nhte,hed->ntd", mixed, w["o"])


def normalized(w, x):
    z = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-3)
    return z * w["scale"] + w["shift"]


def recurrent(w, x):
    state = jnp.zeros((x.shape[0], 4))
    for t in range(3):
        state = jnp.tanh(x[:, t] @ w["in"] + state @ w["rec"] + w["bias"])
    return head(state)


def scanned(w, x):
    step = lambda z, layer: (jnp.tanh(z @ layer), None)
    return head(lax.scan(step, x, w["layers"])[0])


@jax.custom_jvp
def opaque(w, x):
    return jnp.sin(w) * x


opaque.defjvp(lambda primals, tangents: (opaque(*primals), jnp.cos(primals[0]) * tangents[0] * primals[1]))

ROWS, SEQUENCE = images(5), images(6, 4)
TOKENS = jnp.array([[0, 2, 2, 6], [5, -1, 0, 0], [3, 3, 3, 3]])
WORKS = {
    "dense": Work(lambda w, x: head(x @ w["W"] + w["b"]), draw(0, W=(5, 4), b=(4,)), ROWS, {"W": "dense", "b": "bias"}),
    "dense, transposed, scaled, shifted on": Work(
        lambda w, x: head((-(x @ (w["W"] * 0.7).T) / 3.0 + x[:, :4] - w["b"][None]) * 2.0),
        draw(0, W=(4, 5), b=(4,)),
        ROWS,
        {"W": "dense", "b": "bias"},
    ),
    "vectors of one sample": Work(
        jax.vmap(lambda w, x: head((w["W"] @ x + w["b"])[None])[0], (None, 0)),
        draw(0, W=(4, 5), b=(4,)),
        ROWS,
        {"W": "dense", "b": "bias"},
    ),
    "one output": Work(lambda w, x: jnp.tanh(x @ w["W"]) @ w["a"], draw(0, W=(5, 4), a=(4,)), ROWS, {"W": "dense"}),
    "sequence": Work(
        lambda w, x: head(x @ w["W"] + w["b"]), draw(0, W=(4, 3), b=(3,)), SEQUENCE, {"W": "dense", "b": "bias"}
    ),
    "position bias": Work(lambda w, x: head(x + w["b"]), draw(0, b=(6, 4)), SEQUENCE, {"b": "bias"}),
    "batched product": Work(
        lambda w, x: head(jnp.einsum("ngd,gdm->ngm", x, w["W"])), draw(0, W=(6, 4, 3)), SEQUENCE, {"W": "dense"}
    ),
    "batched product of positions": Work(
        lambda w, x: head(jnp.einsum("ngpd,gmd->ngpm", x, w["W"])),
        draw(0, W=(2, 3, 4)),
        images(2, 6, 4),
        {"W": "dense"},
    ),
    "attention": Work(
        lambda w, x: head(x + attention(w, normalized(w, x))),
        draw(0, q=(4, 2, 3), k=(4, 2, 3), v=(4, 2, 3), o=(2, 3, 4), scale=(4,), shift=(4,)),
        SEQUENCE,
        {"q": "dense", "o": "dense", "shift": "bias", "scale": "jacobian"},
    ),
    "convolution": conv_work((3, 3, 2, 4), (6, 5, 2), bias=(4,)),
    "convolution, channels first": conv_work((4, 2, 3, 2), (2, 6, 5), NCHW, bias=(4, 1, 1)),
    "convolution, axes in no order": conv_work((2, 4, 3, 2), (6, 5, 2), TURNED),
    "convolution, strides": conv_work((3, 2, 2, 4), (7, 6, 2), window_strides=(2, 3), padding="VALID"),
    "convolution, dilated": conv_work((3, 2, 2, 4), (7, 6, 2), rhs_dilation=(2, 3)),
    "convolution, transposed": conv_work(
        (3, 3, 2, 4), (4, 3, 2), lhs_dilation=(2, 2), padding=((1, 2), (2, 1)), window_strides=(1, 1)
    ),
    "convolution, cut": conv_work((2, 2, 2, 3), (6, 6, 2), padding=((-1, 1), (0, -2))),
    "convolution, groups": conv_work((3, 3, 2, 6), (5, 4, 4), feature_group_count=2, bias=(6,)),
    "convolution, depthwise": conv_work((3, 3, 1, 4), (5, 4, 4), feature_group_count=4),
    "convolution, one axis": conv_work((3, 2, 4), (7, 2), ("NWC", "WIO", "NWC")),
    "convolution, three axes": conv_work((2, 2, 2, 1, 3), (3, 4, 3, 1), ("NDHWC", "DHWIO", "NDHWC")),
    "look-up": Work(lambda w, x: head(w["E"][x] + w["b"]), draw(0, E=(7, 4), b=(4, 4)), TOKENS, {"E": "look-up"}),
    "look-up, clipped": Work(
        lambda w, x: head(jnp.take(w["E"], 2 * x, axis=0, mode="clip")), draw(0, E=(7, 4)), TOKENS, {"E": "look-up"}
    ),
    "look-up, out of range": Work(
        lambda w, x: head(jnp.take(w["E"], 2 * x, axis=0, mode="fill", fill_value=0.0)),
        draw(0, E=(7, 4)),
        TOKENS,
        {"E": "look-up"},
    ),
    "look-up, scaled": Work(
        lambda w, x: head((0.5 * w["E"])[x] * 3.0 + w["b"]), draw(0, E=(7, 4), b=(4,)), TOKENS, {"E": "look-up"}
    ),
    "difference of two look-ups": Work(
        lambda w, x: head(w["E"][x] / 2.0 - w["E"][x[:, ::-1]]), draw(0, E=(7, 4)), TOKENS, {"E": "look-up"}
    ),
    "two orders of one matrix": Work(
        lambda w, x: head(jnp.tanh(x @ w["W"].ravel())[:, None] + (x @ w["W"].ravel(order="F"))[:, None]),
        draw(0, W=(2, 3)),
        images(6),
        {"W": "jacobian"},
    ),
    "two orders by broadcasting": Work(
        lambda w, x: head(
            jnp.tanh(x @ w["W"][None].transpose(0, 2, 1).reshape(6))[:, None]
            + (x @ w["W"][:, None].transpose(0, 2, 1).reshape(6))[:, None]
        ),
        draw(0, W=(2, 3)),
        images(6),
        {"W": "jacobian"},
    ),
    "turned after the bias": Work(
        lambda w, x: head(
            jnp.tanh((x @ w["W"] + w["b"]).reshape(x.shape[0], 16, order="F") * jnp.arange(16.0)) @ jnp.ones((16, 3))
        ),
        draw(0, W=(4, 4), b=(4,)),
        images(4, 4),
        {"W": "dense", "b": "bias"},
    ),
    "one kernel in two shapes": Work(
        lambda w, x: head(conv(x, w["K"][None], NHWC)) + head(conv(x[..., :1], w["K"][:, :, None], NHWC)[..., :2]),
        draw(0, K=(2, 2, 2)),
        images(5, 4, 2),
        {"K": "jacobian"},
    ),
    "used twice": Work(
        lambda w, x: head(jnp.tanh(x @ w["W"] + w["b"]) @ w["W"] + w["b"]),
        draw(0, W=(5, 5), b=(5,)),
        ROWS,
        {"W": "dense", "b": "bias"},
    ),
    "used twice at one place": Work(
        lambda w, x: head(x @ w["W"] + jnp.sin(x) @ w["W"]), draw(0, W=(5, 4)), ROWS, {"W": "dense"}
    ),
    "recurrent": Work(
        recurrent,
        draw(0, **{"in": (4, 4), "rec": (4, 4), "bias": (4,)}),
        images(3, 4),
        {"in": "dense", "rec": "dense", "bias": "bias"},
    ),
    "used with its transpose": Work(
        lambda w, x: head(jnp.tanh(x @ w["W"]) @ w["W"].T), draw(0, W=(5, 4)), ROWS, {"W": "jacobian"}
    ),
    "tied look-up and output": Work(
        lambda w, x: head(jnp.tanh(w["E"][x].sum(1)) @ w["E"].T), draw(0, E=(7, 4)), TOKENS, {"E": "jacobian"}
    ),
    "also used by itself": Work(
        lambda w, x: head(x @ w["W"]) * jnp.exp(-jnp.sum(w["W"] ** 2)), draw(0, W=(5, 4)), ROWS, {"W": "jacobian"}
    ),
    "normalized weights": Work(
        lambda w, x: head(x @ (w["W"] / jnp.linalg.norm(w["W"], axis=0))), draw(0, W=(5, 4)), ROWS, {"W": "jacobian"}
    ),
    "masked weights": Work(
        lambda w, x: head(x @ (w["W"] * jnp.tril(jnp.ones((5, 4))))), draw(0, W=(5, 4)), ROWS, {"W": "jacobian"}
    ),
    "product of two": Work(
        lambda w, x: head(x @ (w["A"] @ w["B"])), draw(0, A=(5, 2), B=(2, 4)), ROWS, {"A": "jacobian", "B": "jacobian"}
    ),
    "scale of one number": Work(
        lambda w, x: head(x @ w["W"] * w["s"]), draw(0, W=(5, 4), s=()), ROWS, {"W": "dense", "s": "jacobian"}
    ),
    "scanned layers": Work(scanned, draw(0, layers=(3, 5, 5)), ROWS, {"layers": "jacobian"}),
    "custom derivative": Work(
        lambda w, x: head(opaque(w["W"], x @ w["V"])), draw(0, W=(4,), V=(5, 4)), ROWS, {"W": "jacobian", "V": "dense"}
    ),
    "calls": Work(
        lambda w, x: head(jax.checkpoint(jax.jit(lambda w, x: jax.nn.gelu(x @ w["W"]) @ w["V"]))(w, x)),
        draw(0, W=(5, 4), V=(4, 3)),
        ROWS,
        {"W": "dense", "V": "dense"},
    ),
    "no part in the outputs": Work(lambda w, x: head(x @ w["W"]), draw(0, W=(5, 4), unused=(3,)), ROWS, {"W": "dense"}),
    "parameter as output": Work(lambda w, x: x @ jnp.ones((5, 2)) + w["b"], draw(0, b=(2,)), ROWS, {"b": "bias"}),
}
POOL = ((1, 2, 2, 1), (1, 2, 2, 1), "VALID")
SPATIAL, ROWS_FIRST = 1e-6, 1e6
"""Prices at which every group with positions is contracted pair by pair, or by its Jacobian rows."""


def rules_of(work):
    """The rules that each leaf's uses are recognized by, "jacobian" for a leaf without any."""
    jacobian = sample_jacobian(work.f, work.w, work.x)
    names = [jax.tree_util.keystr(path).strip("[']") for path, _ in jax.tree_util.tree_leaves_with_path(work.w)]
    rules = {names[leaf]: {"jacobian"} for leaf in jacobian.direct}
    for group in jacobian.groups:
        rules |= {names[uses[0].leaf]: {use.rule.name for use in uses} for uses in group.leaves}
    return rules


def composite(*names):
    """The sum of the outputs of several works, each with parameters and a part of the inputs of its own."""
    works = [WORKS[name] for name in names]
    stops = np.cumsum([0, *(work.x[0].size for work in works)])
    x = jnp.concatenate([work.x.reshape(3, -1).astype(float) for work in works], axis=1)

    def f(w, x):
        total = 0.0
        for i, work in enumerate(works):
            part = x[:, stops[i] : stops[i + 1]].reshape(x.shape[0], *work.x.shape[1:])
            part = part.astype(int) if work.x.dtype == int else part
            out = work.f(w[i], part)
            total += out.reshape(x.shape[0], -1)
        return total

    rules = {f"{i}{leaf}": rule for i, work in enumerate(works) for leaf, rule in work.rules.items()}
    return Work(f, [work.w for work in works], x, rules)


COMPOSITES = {
    "dense": ["dense", "dense, transposed, scaled, shifted on", "vectors of one sample", "one output", "calls"],
    "positions": ["sequence", "position bias", "batched product", "batched product of positions", "recurrent"],
    "images": ["convolution", "convolution, channels first", "convolution, strides", "convolution, groups"],
    "more images": ["convolution, axes in no order", "convolution, dilated", "convolution, transposed"],
    "windows": ["convolution, cut", "convolution, depthwise", "convolution, one axis", "convolution, three axes"],
    "look-ups": ["look-up", "look-up, clipped", "look-up, out of range", "look-up, scaled"],
    "reused": ["used twice", "used twice at one place", "difference of two look-ups", "turned after the bias"],
    "attention": ["attention", "no part in the outputs", "scale of one number"],
    "orders": ["two orders of one matrix", "two orders by broadcasting", "one kernel in two shapes"],
    "no rule": ["tied look-up and output", "also used by itself", "masked weights", "product of two", "scanned layers"],
}
BY_ITSELF = {"parameter as output"}
"""Not the same work as a part of a sum."""


def test_every_use_is_recognized_by_its_rule():
    offenders = []
    for name, work in WORKS.items():
        rules = rules_of(work)
        offenders += [f"{name}: {leaf} by {rules[leaf]}" for leaf, rule in work.rules.items() if rules[leaf] != {rule}]
    assert not offenders, "\n".join(offenders)


def test_every_rule_has_works_and_primitives_of_its_own():
    tried = {rule for work in WORKS.values() for rule in work.rules.values()}
    assert {rule.name for rule in RULES} | {"jacobian"} == tried
    primitives = [primitive for rule in RULES for primitive in rule.primitives]
    assert len(primitives) == len(set(primitives))


def contractions_at(price, work, monkeypatch):
    monkeypatch.setattr(_plan, "SPATIAL_PRICE", price)
    return sample_jacobian(work.f, work.w, work.x).contractions


@pytest.mark.parametrize("name", COMPOSITES)
def test_the_gram_is_that_of_the_jacobian_in_every_contraction(name, monkeypatch):
    work = composite(*COMPOSITES[name])
    first, second = (contractions_at(price, work, monkeypatch) for price in (SPATIAL, ROWS_FIRST))
    # New function objects, or the program of the first price would answer for the second.
    cheap_pairs, cheap_rows = (lambda w, x: work.f(w, x)), (lambda w, x: work.f(w, x))

    @jax.jit
    def everything(w, x):
        monkeypatch.setattr(_plan, "SPATIAL_PRICE", SPATIAL)
        whole = lj.gram(cheap_pairs, w, x)
        monkeypatch.setattr(_plan, "SPATIAL_PRICE", ROWS_FIRST)
        cross = lj.gram(cheap_rows, w, x, x[:2])
        return whole, cross, jax.jacrev(lambda w: work.f(w, x))(w)

    whole, cross, jacobian = everything(work.w, work.x)
    jacobian = np.concatenate([np.reshape(leaf, (6, -1)) for leaf in jax.tree.leaves(jacobian)], axis=1)
    expected = jacobian @ jacobian.T
    close = partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-13 * np.abs(expected).max())
    close(np.reshape(whole, (6, 6)), expected)
    close(np.reshape(cross, (6, 4)), expected[:, :4])
    assert "spatial" not in second
    assert name in ("dense", "orders", "no rule") or first != second


def test_the_gram_of_a_parameter_that_is_the_output():
    assert set(WORKS) - BY_ITSELF >= {name for names in COMPOSITES.values() for name in names}
    work = WORKS["parameter as output"]
    np.testing.assert_array_equal(np.reshape(lj.gram(work.f, work.w, work.x), (6, 6)), np.tile(np.eye(2), (3, 3)))


def test_rows_of_the_jacobian_can_be_asked_for():
    work = composite("sequence", "look-up", "scale of one number")
    whole, rows = jax.jit(lambda w, x: [lj.gram(work.f, w, x, method=m) for m in ("auto", "jacobian")])(work.w, work.x)
    np.testing.assert_allclose(rows, whole, rtol=1e-12, atol=1e-13 * np.abs(whole).max())


# ---- of the whole Gram ----

CONV = WORKS["convolution"]
NET = lj.models.mlp(jnp.tanh)
DATA = normal(5, (101, 5))


def net_of(sizes):
    layers = itertools.pairwise(sizes)
    return [
        {"weight": normal(i, (n_out, n_in)) * (2 / (n_in + n_out)) ** 0.5, "bias": jnp.zeros(n_out)}
        for i, (n_in, n_out) in enumerate(layers)
    ]


NET_W = net_of([5, 40, 30, 3])


@pytest.fixture(scope="module")
def net_gram():
    jacobian = jacobian_of(NET, NET_W, DATA)
    return (jacobian @ jacobian.T).reshape(101, 3, 101, 3)


def test_triangles_give_the_whole_exactly_symmetric_and_without_negative_eigenvalues(net_gram):
    assert 2 * _products.SMALL < 101 * 3
    k = np.asarray(lj.gram(NET, NET_W, DATA))
    np.testing.assert_allclose(k, net_gram, rtol=1e-12, atol=1e-11)
    np.testing.assert_array_equal(k, k.transpose(2, 3, 0, 1))
    values = np.linalg.eigvalsh(k.reshape(303, 303))
    assert values[0] >= -303 * np.finfo(float).eps * values[-1]


@pytest.mark.parametrize("samples", [40, 3])
def test_the_block_size_changes_no_entry(net_gram, monkeypatch, samples):
    plan = lj.gram_plan(NET, NET_W, DATA)
    assert plan.blocks == (101, 101)
    per_sample = (plan.working_bytes - 4 * 303**2 * 8) // 101
    monkeypatch.setattr(_plan, "_budget", lambda result: samples * per_sample)
    f = lambda w, x: NET(w, x)
    assert lj.gram_plan(f, NET_W, DATA).blocks[0] < 101
    np.testing.assert_allclose(lj.gram(f, NET_W, DATA), net_gram, rtol=1e-12, atol=1e-11)
    other = (DATA[:30], DATA) if samples == 3 else (DATA, DATA[:30])
    expected = net_gram[:30] if samples == 3 else net_gram[:, :, :30]
    np.testing.assert_allclose(lj.gram(f, NET_W, *other), expected, rtol=1e-12, atol=1e-11)


@pytest.fixture(scope="module")
def mixture():
    """Four kinds of groups and a leaf without a rule, with the Jacobian (3, 2, p)."""
    work = composite("sequence", "convolution", "look-up", "attention")
    return work, jacobian_of(work.f, work.w, work.x).reshape(3, 2, -1)


def test_float32_is_right_to_rounding(mixture):
    work, _ = mixture
    w, x = jax.tree.map(lambda a: jnp.asarray(np.asarray(a, np.float32)), (work.w, work.x))
    # Of the same rounded numbers, so that only the Gram's own rounding is left.
    jacobian = jacobian_of(work.f, *jax.tree.map(lambda a: jnp.asarray(np.asarray(a, float)), (w, x)))
    k = lj.gram(work.f, w, x)
    assert k.dtype == jnp.float32
    exact = jacobian @ jacobian.T
    np.testing.assert_allclose(np.reshape(k, exact.shape), exact, rtol=0, atol=2e-6 * np.abs(exact).max())


def test_the_trace_and_the_diagonal_are_those_of_the_gram(mixture):
    work, jacobian = mixture
    expected = np.einsum("ikp,jkp->ij", jacobian, jacobian)

    @jax.jit
    def everything(w, x):
        traces = lj.gram(work.f, w, x, trace=True), lj.gram(work.f, w, x, x[:2], trace=True)
        return *traces, lj.gram_diagonal(work.f, w, x)

    whole, cross, diagonal = everything(work.w, work.x)
    np.testing.assert_allclose(whole, expected, rtol=1e-11, atol=1e-12)
    np.testing.assert_allclose(cross, expected[:, :2], rtol=1e-11, atol=1e-12)
    np.testing.assert_allclose(diagonal, np.sum(jacobian**2, -1), rtol=1e-11, atol=1e-12)


def test_one_output_has_its_trace_and_diagonal_too():
    f, w, x = lj.models.two_layer(jnp.tanh), draw(0, a=(8,), b=(8, 5)), DATA[:7]
    whole = lambda w, x: (lj.gram(f, w, x), lj.gram(f, w, x, trace=True), lj.gram_diagonal(f, w, x))
    k, trace, diagonal = jax.jit(whole)(w, x)
    assert k.shape == (7, 7)
    np.testing.assert_allclose(trace, k, rtol=1e-12)
    np.testing.assert_allclose(diagonal, np.diagonal(k), rtol=1e-12)


def test_a_functional_of_the_gram_has_the_gradient_of_finite_differences(mixture):
    work, _ = mixture
    size = normal(3, (6, 6))

    @jax.jit
    @jax.value_and_grad
    def value_and_slope(w):
        return jnp.sum(size * lj.gram(work.f, w, work.x).reshape(6, 6))

    direction = jax.tree.map(lambda a: normal(4, a.shape), work.w)
    slopes = jax.tree.map(np.vdot, value_and_slope(work.w)[1], direction)
    slope = sum(jax.tree.leaves(slopes))

    def move(t):
        w = jax.tree.map(lambda a, d: jnp.asarray(np.asarray(a) + t * np.asarray(d)), work.w, direction)
        return float(value_and_slope(w)[0])

    t = 1e-4
    # Fourth order in t.
    expected = (8 * (move(t) - move(-t)) - (move(2 * t) - move(-2 * t))) / (12 * t)
    np.testing.assert_allclose(slope, expected, rtol=1e-7)


def test_the_gradient_passes_through_blocks(monkeypatch):
    value = lambda f, w: jnp.sum(jnp.sin(lj.gram(f, w, DATA[:6])))
    small = net_of([5, 6, 3])
    whole = jax.jit(jax.grad(lambda w: value(NET, w)))(small)
    monkeypatch.setattr(_plan, "_budget", lambda result: 1)
    parts = jax.jit(jax.grad(lambda w: value(lambda w, x: NET(w, x), w)))(small)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-11), parts, whole)


def pooled(w, x):
    """A look-up as an image, convolved, pooled in overlapping windows, with explicit ranks throughout."""
    z = conv(w["E"][x].reshape(x.shape[0], 6, 6, 3), w["kernel"], NHWC) + w["bias"][None, None, None]
    return head(lax.reduce_window(z, -jnp.inf, lax.max, (1, 3, 2, 1), (1, 2, 2, 1), "SAME"))


def test_pooling_and_strict_ranks(monkeypatch):
    w = draw(0, E=(7, 3), kernel=(2, 2, 3, 4), bias=(4,))
    x = jnp.asarray(np.random.default_rng(1).integers(0, 7, (4, 36)))
    with jax.numpy_rank_promotion("raise"):
        jacobian = jacobian_of(pooled, w, x)
        expected = (jacobian @ jacobian.T).reshape(4, 2, 4, 2)
        monkeypatch.setattr(_plan, "SPATIAL_PRICE", SPATIAL)
        np.testing.assert_allclose(lj.gram(pooled, w, x), expected, rtol=1e-12, atol=1e-12)


def test_the_first_of_equal_entries_takes_the_derivative_of_a_maximum():
    """As in JAX's own pooling: here all four windows are ties, and the parameters tell the entries apart."""
    x = jnp.ones((2, 4, 4, 1))
    w = jnp.ones((4, 4))
    f = lambda w, x: lax.reduce_window(x * w[None, ..., None], -jnp.inf, lax.max, *POOL).reshape(x.shape[0], -1)
    jacobian = jacobian_of(f, w, x)
    assert jacobian.sum() == 8
    assert jacobian[0, 0] == 1
    np.testing.assert_array_equal(lj.gram(f, w, x).reshape(8, 8), jacobian @ jacobian.T)


def test_many_parameters_are_mapped_over():
    nets = jax.tree.map(lambda a: normal(7, (3, *a.shape)), net_of([5, 6, 2]))
    many = jax.jit(jax.vmap(lambda w: lj.gram(NET, w, DATA[:4])))(nets)
    for i in range(3):
        one = jax.tree.map(lambda a, i=i: a[i], nets)
        np.testing.assert_allclose(many[i], lj.gram(NET, one, DATA[:4]), rtol=1e-12, atol=1e-13)


def test_the_cheapest_contraction_is_taken():
    wide = jax.eval_shape(lambda: lj.models.mlp().init(jr.key(0), [5, 400, 300, 3]))
    assert {part.contraction for part in lj.gram_plan(NET, wide, DATA).parts} == {"outer"}
    many_positions = conv_work((3, 3, 2, 4), (30, 30, 2), bias=(4,))
    few_positions = conv_work((3, 3, 40, 40), (2, 2, 40), bias=(40,))
    (part,) = lj.gram_plan(many_positions.f, many_positions.w, many_positions.x).parts
    assert (part.contraction, part.sizes) == ("jacobian", (900, 1, 19, 4))
    (part,) = lj.gram_plan(few_positions.f, few_positions.w, few_positions.x).parts
    assert (part.contraction, part.sizes) == ("spatial", (4, 1, 361, 40))


def test_the_plan_counts_operations_of_the_contraction_taken():
    plan = lj.gram_plan(NET, NET_W, DATA)
    pairs = 101 * 102 / 2
    expected = [2 * pairs * (d + 1 + 9 * m) for d, m in ((5, 40), (40, 30), (30, 3))]
    assert [part.flops for part in plan.parts] == expected
    assert plan.flops == sum(expected)
    assert plan.result_bytes == 303**2 * 8
    rows = lj.gram_plan(NET, NET_W, DATA, DATA[:7], method="jacobian")
    assert rows.flops == 2 * 101 * 7 * 9 * sum(leaf.size for leaf in jax.tree.leaves(NET_W))
    assert rows.shape == (303, 21)


@pytest.mark.parametrize("name", ["net", "images"])
def test_the_memory_of_the_plan_is_that_of_the_compiled_program(name):
    work = {
        "net": (NET, [50, 300, 200, 5], (60, 50)),
        "images": (*conv_work((3, 3, 3, 16), (16, 16, 3), bias=(16,))[:2], (40, 16, 16, 3)),
    }[name]
    f, w, x = work
    # Shapes are enough.
    w = jax.eval_shape(lambda: lj.models.mlp().init(jr.key(0), w)) if name == "net" else w
    x = jax.ShapeDtypeStruct(x, jnp.float64)
    plan = lj.gram_plan(f, w, x)
    compiled = jax.jit(lambda w, x: lj.gram(f, w, x)).lower(w, x).compile()
    measured = compiled.memory_analysis().temp_size_in_bytes
    assert measured <= plan.working_bytes <= 8 * measured


def test_a_plan_needs_shapes_only_and_prints_a_table():
    shapes = jax.eval_shape(lambda: (NET_W, DATA))
    text = str(lj.gram_plan(NET, *shapes))
    assert text == str(lj.gram_plan(NET, NET_W, DATA))
    lines = text.splitlines()
    assert lines[0].split() == ["parameters", "rule", "contraction", "p", "x", "g", "x", "d", "x", "m", "Gflop"]
    assert "[0]['bias'] (+1)" in text
    assert "dense + bias" in text or "bias + dense" in text
    assert lines[-1].startswith("303 x 303 in blocks of 101 x 101 samples")
    assert "of memory (717 KiB the result)" in lines[-1]


def test_unfit_arguments_of_the_plan_are_refused():
    # What users see without the tests' own check of annotations.
    users = getattr(lj.gram_plan, "__wrapped__", lj.gram_plan)
    with pytest.raises(ValueError, match=r'method must be "auto" or "jacobian", got \'fast\''):
        users(NET, NET_W, DATA, method="fast")
    with pytest.raises(ValueError, match="x1 and x2 must hold samples of one shape"):
        lj.gram_plan(NET, NET_W, DATA, DATA[:, :4])


def test_one_device_of_a_mesh_changes_nothing(net_gram):
    mesh = Mesh(np.array(jax.devices()[:1]), ("rows",))
    np.testing.assert_allclose(lj.gram(NET, NET_W, DATA, mesh=mesh), net_gram, rtol=1e-12, atol=1e-11)


MIXED = {
    "earlier samples": (lambda w, x: jnp.cumsum(x @ w["W"], axis=0), draw(0, W=(5, 2))),
    "a last layer of zeros": (
        lambda w, x: (jnp.tanh(x @ w["W"]) - jnp.tanh(x @ w["W"]).mean(0)) @ w["a"],
        draw(0, W=(5, 4)) | {"a": jnp.zeros(4)},
    ),
}


@pytest.mark.parametrize("name", MIXED)
def test_models_that_mix_samples_unseen_by_the_first_output_are_refused(name):
    f, w = MIXED[name]
    with pytest.raises(ValueError, match=r"f must treat every sample by itself.*slopes by .*%"):
        lj.gram(f, w, DATA)
    # Equal samples at the start tell nothing: others are looked for, in x2 too.
    with pytest.raises(ValueError, match="f must treat every sample by itself"):
        lj.gram(f, w, jnp.concatenate([DATA[:1], DATA[:3]]))
    with pytest.raises(ValueError, match="f must treat every sample by itself"):
        lj.gram(f, w, DATA[:1], DATA[:3])


def test_a_model_that_drops_the_axis_of_a_single_sample_is_refused():
    f = lambda w, x: jnp.squeeze(x @ w["W"])
    with pytest.raises(ValueError, match=r"f must keep the axis of samples for a single one.*\(2,\).*\(101, 2\)"):
        jax.jit(lambda x: lj.gram(f, draw(0, W=(5, 2)), x))(DATA)


def test_half_precision_has_a_gram_summed_in_the_dtype_of_the_outputs():
    w = draw(0, W=(5, 40), a=(40, 2))
    x = DATA[:9]
    half = lambda w, x: jnp.tanh(x.astype(jnp.bfloat16) @ w["W"].astype(jnp.bfloat16)) @ w["a"].astype(jnp.bfloat16)
    outputs = {jnp.bfloat16: half, jnp.float32: lambda w, x: half(w, x).astype(jnp.float32)}
    jacobian = jacobian_of(lambda w, x: jnp.tanh(x @ w["W"]) @ w["a"], w, x)
    exact = (jacobian @ jacobian.T).reshape(9, 2, 9, 2)
    for dtype, f in outputs.items():
        k = lj.gram(f, w, x)
        assert k.dtype == dtype
        np.testing.assert_allclose(np.asarray(k, float), exact, rtol=0, atol=0.03 * np.abs(exact).max())


def test_masks_are_pooled_and_empty_leaves_are_no_parameters():
    def f(w, x):
        mask = lax.reduce_window((x > 0).astype(jnp.int32), np.int32(-1), lax.max, (1, 2), (1, 1), "SAME")
        return head(x @ w["W"] * mask[:, :4].astype(x.dtype)) + jnp.sum(w["none"] + 1.0)

    w = draw(0, W=(5, 4)) | {"none": jnp.zeros(0)}
    jacobian = jacobian_of(f, w, DATA[:4])
    np.testing.assert_allclose(lj.gram(f, w, DATA[:4]).reshape(8, 8), jacobian @ jacobian.T, rtol=1e-12, atol=1e-12)


SHARDED = """
import jax, jax.numpy as jnp, jax.random as jr, numpy as np
from jax.sharding import Mesh
import lazyjax as lj

jax.config.update("jax_enable_x64", True)
assert jax.device_count() == 8
f, w = lj.models.two_layer(jnp.tanh), lj.models.two_layer().init(jr.key(0), d=5, width=20)
x = jnp.asarray(np.random.default_rng(0).normal(size=(37, 5)))
devices = np.array(jax.devices())
whole = np.asarray(lj.gram(f, w, x))
for mesh, other in (
    (Mesh(devices.reshape(2, 4), ("a", "b")), None),
    (Mesh(devices[:3], ("rows",)), None),
    (Mesh(devices, ("rows",)), x[:11]),
):
    shared = lj.gram(f, w, x, other, mesh=mesh)
    assert len(shared.sharding.device_set) == mesh.size, shared.sharding
    np.testing.assert_allclose(shared, whole if other is None else whole[:, :11], rtol=1e-12, atol=1e-12)
print("equal")
"""


def test_eight_devices_give_the_gram_of_one(tmp_path):
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", SHARDED], env=env, capture_output=True, text=True, check=False)
    assert done.stdout == "equal\n", done.stderr


def test_a_sample_without_a_derivative_is_named():
    f, x = lambda w, x: jnp.sqrt(x @ w), jnp.array([[1.0], [2.0], [-1.0], [3.0]])
    for call in (lj.gram, lj.gram_diagonal, lj.spectrum):
        with pytest.raises(ValueError, match=r"f must be differentiable at every sample.* 1 of 4 .* at index 2"):
            call(f, jnp.ones(1), x)
