"""The maps between models: exact zeros at the start, derivatives kept or doubled, zero declared where it is."""

from functools import cache, partial

import equinox as eqx
import jax
import jax.flatten_util
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from flax import linen

import lazyjax as lj
from lazyjax.models.maps import declares_zero, on_data


class ConvNet(eqx.Module):
    """Two convolutions with max pooling between them, as an Equinox user writes it; one static leaf."""

    first: eqx.nn.Conv2d
    second: eqx.nn.Conv2d
    head: eqx.nn.Linear
    scale: float

    def __init__(self, key, dtype=jnp.float32):
        keys = jr.split(key, 3)
        self.first = eqx.nn.Conv2d(1, 3, 3, key=keys[0], dtype=dtype)
        self.second = eqx.nn.Conv2d(3, 4, 3, key=keys[1], dtype=dtype)
        self.head = eqx.nn.Linear(4, 2, key=keys[2], dtype=dtype)
        self.scale = 0.3

    def __call__(self, x):
        x = jax.nn.relu(self.first(x))
        x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 2, 2), (1, 2, 2), "VALID")
        return self.scale * self.head(jnp.tanh(self.second(x)).ravel())


def conv_net(w, x):
    return jax.vmap(w)(x)


class FlaxNet(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.Dense(2)(jnp.tanh(linen.Dense(7)(x)))


def counted(w, x):
    """Parameters with an integer leaf, which picks a row."""
    return w["a"][w["row"]] * jnp.tanh(x @ w["b"])


NAMES = ["two_layer", "two_layer over sqrt m", "mlp", "equinox", "flax", "integer leaf"]
by_name = pytest.mark.parametrize("name", NAMES)


def normal(seed, *shape, dtype=float):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape).astype(dtype))


def linear(w, x):
    return x @ w


def over_root(w, x):
    """A product at the end of f is what a compiler likes to contract with the subtraction."""
    return lj.models.two_layer(jnp.tanh)(w, x) / np.float32(np.sqrt(12))


@cache
def case(name):
    """(f(w, x), w, x) in float32, the precision that shows every rounding residue."""
    single = partial(normal, dtype=np.float32)
    x, key = single(0, 7, 5), jr.key(3)
    two = {"a": single(1, 12), "b": single(2, 12, 5)}
    if name == "two_layer":
        return lj.models.two_layer(jnp.tanh), two, x
    if name == "two_layer over sqrt m":
        return over_root, two, x
    if name == "mlp":
        return lj.models.mlp(), lj.models.mlp().init(key, [5, 9, 9, 2], dtype=np.float32), x
    if name == "equinox":
        return conv_net, eqx.filter_jit(ConvNet)(key), single(3, 4, 1, 8, 8)
    if name == "flax":
        return FlaxNet().apply, jax.jit(FlaxNet().init)(key, x), x
    return counted, {"a": single(4, 3), "b": single(5, 5), "row": jnp.array(1)}, x


def net_start(width):
    return {"a": normal(0, width), "b": normal(1, width, 3)}


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: lj.rescale(lj.models.diagonal_linear(), jnp.inf), "factor must be a finite number, got inf"),
        (lambda: lj.rescale(lj.models.diagonal_linear(), jnp.nan), "factor must be a finite number, got nan"),
        (lambda: lj.center(jnp.sin, jnp.array([1.0, jnp.nan])), "w0 must be finite, but 1 of its 2"),
        (lambda: lj.symmetrize(jnp.sin, {"a": jnp.array([jnp.inf])}), r"w0\['a'\] must be finite"),
    ],
)
def test_unfit_arguments_are_refused(call, match):
    with pytest.raises(ValueError, match=match):
        call()


@pytest.mark.optimized
@by_name
def test_a_centered_model_is_exactly_zero_at_w0_in_float32_eager_and_compiled(name):
    f, w0, x = case(name)
    g = lj.center(f, w0)
    coordinates, rest = eqx.partition(w0, eqx.is_inexact_array)
    # w0 inside g is an argument of the first program, a constant next to a traced w in the second,
    # and all is constant but the data in the third.
    results = [
        eqx.filter_jit(g)(w0, x),
        *jax.jit(lambda c: twice(lambda c: g(eqx.combine(c, rest), x), c))(coordinates),
        jax.jit(lambda x: g(w0, x))(x),
    ]
    if name in EAGER:
        results.append(g(w0, x))
    assert all(out.dtype == jnp.float32 for out in results)
    assert [float(np.max(np.abs(out))) for out in results] == [0.0] * len(results)


EAGER = ("two_layer over sqrt m", "mlp")
"""The other models go through the same operations one by one."""


def twice(h, c):
    """The outputs, and those that the linearization starts from."""
    return h(c), jax.linearize(h, c)[0]


@pytest.mark.optimized
@by_name
def test_a_symmetrized_model_is_exactly_zero_at_its_start_in_float32_eager_and_compiled(name):
    f, w0, x = case(name)
    f2, w2 = lj.symmetrize(f, w0)
    coordinates, rest = eqx.partition(w2, eqx.is_inexact_array)
    results = [
        eqx.filter_jit(f2)(w2, x),
        *jax.jit(lambda c: twice(lambda c: f2(eqx.combine(c, rest), x), c))(coordinates),
    ]
    if name in EAGER:
        results.append(f2(w2, x))
    assert [float(np.max(np.abs(out))) for out in results] == [0.0] * len(results)


@pytest.mark.parametrize("name", ["two_layer", "equinox", "integer leaf"])
def test_centering_and_symmetrizing_keep_the_derivative(name):
    f, w0, x = case(name)
    g, f2 = lj.center(f, w0), lj.symmetrize(f, w0)[0]
    w = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf) + 1) if eqx.is_inexact_array(leaf) else leaf, w0)
    coordinates, rest = eqx.partition(w0, eqx.is_inexact_array)
    vector, unravel = jax.flatten_util.ravel_pytree(coordinates)

    @jax.jit
    def everything(vector, w):
        tree = lambda v: eqx.combine(unravel(v), rest)
        doubled = lambda pair: f2((tree(pair[0]), tree(pair[1])), x).ravel()
        jacobians = [jax.jacrev(lambda v, h=h: h(tree(v), x).ravel())(vector) for h in (f, g)]
        moved = eqx.combine(w, rest)
        return *jacobians, jax.jacrev(doubled)((vector, vector)), f(tree(vector), x), f(moved, x), g(moved, x)

    jacobian, centered, doubled, start, end, gap = everything(vector, eqx.filter(w, eqx.is_inexact_array))
    np.testing.assert_allclose(np.asarray(gap) + np.asarray(start), end, rtol=1e-5, atol=1e-5)
    assert np.max(np.abs(start)) > 1e-3, "the test needs a model that does not vanish"
    np.testing.assert_allclose(centered, jacobian, rtol=1e-5, atol=1e-6)
    # [J, -J], so twice the kernel.
    np.testing.assert_allclose(np.hstack(doubled), np.hstack([jacobian, -np.asarray(jacobian)]), atol=1e-6)


def test_second_derivatives_of_a_symmetrized_model_vanish_along_kernel_directions():
    f, w0 = lj.models.two_layer(jnp.tanh), net_start(6)
    x, r = normal(1, 5, 3), normal(2, 5)
    f2, w2 = lj.symmetrize(f, w0)

    @partial(jax.jit, static_argnums=0)
    def second(f, w):
        h = lambda w: f(w, x)
        (u,) = jax.vjp(h, w)[1](r)  # a direction in the range of Dh^T: the only ones the tangent flow takes
        return jax.jvp(lambda v: jax.jvp(h, (v,), (u,))[1], (w,), (u,))[1]

    generic = second(f, w0)
    assert float(jnp.min(jnp.abs(generic))) > 1e-3
    np.testing.assert_allclose(second(f2, w2), 0, atol=1e-13 * float(jnp.max(jnp.abs(generic))))


def test_center_and_symmetrize_take_models_of_the_parameters_alone():
    h = lambda w: jnp.exp(w["a"]) * w["b"]
    w0 = {"a": jnp.array([0.3, 1.0]), "b": jnp.array(2.0)[None].repeat(2)}
    w = {"a": jnp.array([0.0, -1.0]), "b": jnp.array([1.0, 3.0])}
    np.testing.assert_allclose(lj.center(h, w0)(w), np.asarray(h(w)) - np.asarray(h(w0)), rtol=1e-15)
    h2, (wa, wb) = lj.symmetrize(h, w0)
    assert wa is w0
    assert wb is w0
    np.testing.assert_allclose(h2((w, w0)), np.asarray(h(w)) - np.asarray(h(w0)), rtol=1e-15)


def test_a_difference_of_outputs_that_are_not_finite_is_not_finite():
    # The guard of the exact zero must not turn an overflow into a number.
    for bad in (jnp.inf, jnp.nan):
        out = lj.center(lambda w, c: w * c, jnp.ones(2))(jnp.array([2.0, 2.0]), jnp.array([1.0, bad]))
        assert float(out[0]) == 1
        assert not bool(jnp.isfinite(out[1]))


def test_preactivations_pass_through_the_maps():
    f, w0, x = lj.models.two_layer(), net_start(6), normal(1, 5, 3)
    (expected,) = f.preactivations(w0, x)
    f2, w2 = lj.symmetrize(f, w0)
    np.testing.assert_array_equal(lj.center(f, w0).preactivations(w0, x)[0], expected)
    np.testing.assert_array_equal(lj.rescale(f, 2.0).preactivations(w0, x)[0], expected)
    assert [bool(jnp.all(z == expected)) for z in f2.preactivations(w2, x)] == [True, True]


def test_maps_have_preactivations_only_where_their_model_has_them():
    f, plain, w0 = (
        lj.models.two_layer(),
        lambda w, x: x @ w["b"].T @ w["a"],
        net_start(6),
    )
    for wrap in (lambda g: lj.center(g, w0), lambda g: lj.symmetrize(g, w0)[0], lambda g: lj.rescale(g, 2.0)):
        assert hasattr(wrap(wrap(f)), "preactivations")
        assert not hasattr(wrap(wrap(plain)), "preactivations")


def test_rescaling_multiplies_the_outputs_in_their_dtype():
    f, w0, x = case("two_layer")
    out = lj.rescale(f, 2.5)(w0, x)
    assert out.dtype == jnp.float32
    np.testing.assert_array_equal(out, np.float32(2.5) * np.asarray(f(w0, x)))
    # The factor may be traced: a sweep over output scales is one program.
    traced = jax.jit(lambda c: lj.rescale(f, c)(w0, x))(jnp.array(2.5))
    np.testing.assert_allclose(traced, out, rtol=1e-6)


# ---- declared zeros ----


@pytest.mark.parametrize("wrap", [lj.center, lj.linearize, lambda h, w0: lj.rescale(h, 2.0), lambda h, w0: h])
def test_jax_takes_models_that_hold_arrays_where_it_takes_functions(wrap):
    w0 = normal(0, 3)
    h = wrap(on_data(linear, normal(1, 4, 3)), w0)
    w, outputs = w0 + 1, h(w0 + 1)
    for found in (jax.jit(h)(w), jax.checkpoint(h)(w), jax.lax.cond(True, h, h, w)):
        np.testing.assert_allclose(found, outputs, rtol=1e-14)
    assert h == h
    assert h != jax.tree.map(lambda leaf: leaf, h)


def test_zero_is_declared_at_w0_through_every_wrapper_and_nowhere_else():
    f, w0, x = lj.models.two_layer(), net_start(4), normal(1, 5, 3)
    f2, w2 = lj.symmetrize(f, w0)
    other = {"a": w0["a"].at[0].add(1e-15), "b": w0["b"]}
    copy = jax.tree.map(jnp.copy, w0)
    wrappers = [
        lambda g: g,
        lambda g: partial(g, x=x),
        lambda g: on_data(g, x),
        lambda g: lj.rescale(g, 3.0),
        lambda g: on_data(lj.rescale(partial(g), 3.0), x),
        lambda g: partial(partial(lj.rescale(g, 2.0)), x=x),
    ]
    for wrap in wrappers:
        centered, mirrored, plain = wrap(lj.center(f, w0)), wrap(f2), wrap(f)
        assert declares_zero(centered, w0)
        assert declares_zero(centered, copy)
        assert not declares_zero(centered, other)
        assert not declares_zero(centered, {"a": w0["a"]})
        assert declares_zero(mirrored, w2)
        assert declares_zero(mirrored, (w0, copy))
        assert not declares_zero(mirrored, (w0, other))
        assert not declares_zero(plain, w0)


def test_zero_is_declared_for_every_kind_of_parameters():
    for name in NAMES:
        f, w0, _ = case(name)
        f2, w2 = lj.symmetrize(f, w0)
        assert declares_zero(lj.center(f, w0), w0)
        assert declares_zero(f2, w2)
    keyed = {"a": jnp.ones(2), "key": jr.key(0)}
    assert declares_zero(lj.center(lambda w: w["a"], keyed), {"a": jnp.ones(2), "key": jr.key(0)})
    assert not declares_zero(lj.center(lambda w: w["a"], keyed), {"a": jnp.ones(2), "key": jr.key(1)})


def test_another_integer_or_static_leaf_is_another_model():
    w0 = {"a": jnp.ones(2), "row": jnp.array(1), "scale": 2.0}
    g = lj.center(lambda w: w["scale"] * w["a"][w["row"]] * jnp.ones(2), w0)
    assert declares_zero(g, {"a": jnp.ones(2), "row": jnp.array(1), "scale": 2.0})
    assert not declares_zero(g, w0 | {"row": jnp.array(0)})
    assert not declares_zero(g, w0 | {"scale": 3.0})
    assert not declares_zero(g, w0 | {"scale": jnp.array(2.0)})
    assert not declares_zero(g, w0 | {"a": jnp.ones(2, jnp.float32)})


def test_a_partial_that_fixes_the_parameters_declares_nothing():
    w0 = jnp.ones(2)
    f = lambda w, x: w * x
    assert not declares_zero(partial(lj.center(f, w0), w0), w0)


def test_zero_is_declared_of_traced_parameters_only_when_they_are_the_same_object():
    def inside(w, v):
        g = lj.center(jnp.sin, w)
        assert declares_zero(g, w)
        assert not declares_zero(g, v)
        return g(w)

    np.testing.assert_array_equal(jax.jit(inside)(jnp.ones(3), jnp.ones(3)), np.zeros(3))
