"""Losses against JAX's derivatives in the metric of F, and their constants against Rayleigh quotients."""

import math
from functools import partial

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array

import lazyjax as lj
import problems
from helpers import relative_error
from lazyjax.flow.choose_solver import choose_solver
from lazyjax.flow.field import ScaledObjective
from lazyjax.losses.loss import Loss, as_loss, function_loss
from lazyjax.theory.claims import Status
from problems import normal

N, K = 6, 3
LABELS, CLASSES = np.array([0, 1, 1, 0, 1, 0]), np.array([0, 1, 2, 2, 1, 0])
SHAPES = {"square": (N, K), "square vector": (N,), "logistic": (N,), "softmax": (N, K)}


def make(name, mean=True):
    if name.startswith("square"):
        return lj.square_loss(normal(1, *SHAPES[name]), mean=mean)
    if name == "logistic":
        return lj.logistic_loss(jnp.asarray(LABELS), mean=mean)
    return lj.softmax_cross_entropy(jnp.asarray(CLASSES), mean=mean)


def by_hand(name, loss, y):
    """The sum over samples in plain NumPy."""
    if name.startswith("square"):
        return 0.5 * np.sum((y - np.asarray(loss.minimizer)) ** 2)
    if name == "logistic":
        return np.sum(np.log1p(np.exp(-np.where(LABELS, 1, -1) * y)))
    p = np.exp(y) / np.exp(y).sum(1, keepdims=True)
    return -np.sum(np.log(p[np.arange(N), CLASSES]))


@eqx.filter_jit
def evaluate(loss, y, v):
    """All that a loss computes at y, next to plain derivatives by JAX."""
    value, plain_gradient = jax.value_and_grad(loss)(y)
    root = loss.root(y)
    return {
        "value": value,
        "plain gradient": plain_gradient,
        "plain hvp": jax.jvp(jax.grad(loss), (y,), (v,))[1],
        "gradient": loss.gradient(y),
        "cotangent": loss.cotangent(y),
        "hvp": loss.hvp(y, v),
        "root": root.apply(root.transpose(v)),
        "norm": loss.norm(v),
    }


def check(loss, y, v, *, rtol=1e-13):
    """Check everything against the plain derivatives, and return it."""
    found = evaluate(loss, y, v)
    # Riesz: the plain derivative is the weight times the gradient of F; so for the Hessian.
    for name in ("gradient", "hvp"):
        np.testing.assert_allclose(loss.weight * found[name], found[f"plain {name}"], rtol=rtol, atol=1e-14)
    np.testing.assert_allclose(found["cotangent"], found["plain gradient"], rtol=rtol, atol=1e-14)
    np.testing.assert_allclose(found["root"], found["plain hvp"], rtol=rtol, atol=1e-14)
    np.testing.assert_allclose(found["norm"] ** 2, loss.weight * np.sum(np.asarray(v) ** 2), rtol=1e-14)
    return found


@pytest.mark.parametrize("name", SHAPES)
def test_value_gradient_and_hessian_are_those_of_the_formula_in_the_metric_of_f(name):
    y, v = normal(2, *SHAPES[name]), normal(3, *SHAPES[name])
    for mean in (True, False):
        loss = make(name, mean)
        assert loss.weight == (1 / N if mean else 1.0)
        found = check(loss, y, v)
        np.testing.assert_allclose(found["value"], loss.weight * by_hand(name, loss, np.asarray(y)), rtol=1e-14)
    # Single precision gives single precision; outputs of a thousand give numbers, in both.
    large = 1e3 * np.where(np.arange(y.size) % 3 == 0, 1, -1).reshape(y.shape)
    for dtype in (np.float32, np.float64):
        single = evaluate(loss, y.astype(dtype), v.astype(dtype))
        assert {leaf.dtype for leaf in single.values()} == {np.dtype(dtype)}
        assert relative_error(single["gradient"], found["gradient"]) < 1e-6
        far = evaluate(loss, jnp.asarray(large, dtype), v.astype(dtype))
        assert all(np.isfinite(leaf).all() for leaf in far.values())
    if name == "logistic":
        # Linear far out: log(1 + e^1000) = 1000 for each of the wrong signs.
        wrong = np.sum(np.sign(large) != np.where(LABELS, 1, -1))
        np.testing.assert_allclose(far["value"], 1e3 * wrong, rtol=1e-6)


def test_confident_samples_keep_their_digits_in_single_precision():
    """At a gap of 20 the probability of the label is 1 to rounding, its gradient -2.8e-9; in the wrong class, too."""
    gaps = np.float32([0.5, 5, 10, 15, 20, 40, 80, -15, -40])
    y = gaps[:, None] * np.float32([1.0, 0.0, 0.1]) + np.float32([0.0, 0.3, -0.2])
    v, r = normal(0, *y.shape, dtype=np.float32), np.zeros(len(gaps), int)
    loss = lj.softmax_cross_entropy(jnp.asarray(r), mean=False)

    @jax.jit
    def rows(y, v):
        root = loss.root(y)
        value = jax.vmap(lambda z: lj.softmax_cross_entropy(jnp.zeros(1, int))(z[None]))(y)
        return value[:, None], loss.gradient(y), loss.hvp(y, v), root.transpose(v), root.apply(v)

    single, double = (rows(jnp.asarray(y, dtype), jnp.asarray(v, dtype)) for dtype in ("float32", "float64"))
    for ours, right in zip(single, double, strict=True):
        np.testing.assert_allclose(ours, right, rtol=5e-6)
    np.testing.assert_allclose(single[1][4, 0], -np.sum(np.exp([0.3 - 20, 2 - 0.2 - 20])), rtol=5e-6)


def test_the_norm_has_a_zero_gradient_at_zero_and_its_own_elsewhere():
    zero, y = np.zeros((N, K)), np.asarray(normal(2, N, K))
    for mean in (True, False):
        norm = partial(eqx.filter_jit(lambda loss, y: loss.norm(y)), make("square", mean))
        value, slope = map(np.asarray, jax.vmap(jax.value_and_grad(norm))(jnp.stack([zero, y])))
        assert value[0] == 0
        np.testing.assert_array_equal(slope[0], zero)
        root = np.sqrt(make("square", mean).weight)
        np.testing.assert_allclose(value[1], root * np.linalg.norm(y), rtol=1e-15)
        np.testing.assert_allclose(slope[1], root * y / np.linalg.norm(y), rtol=1e-14)
    np.testing.assert_array_equal(jax.jacfwd(norm)(zero), zero)
    assert np.isnan(norm(jnp.where(y == y[0, 0], np.nan, y)))


def test_the_square_loss_is_half_the_squared_distance_to_its_minimizer():
    y, v = normal(4, N, K), normal(3, N, K)
    for mean in (True, False):
        loss = make("square", mean)
        distance = np.linalg.norm(np.asarray(y) - np.asarray(loss.minimizer))
        found = evaluate(loss, y, v)
        np.testing.assert_allclose(found["value"], 0.5 * loss.weight * distance**2, rtol=1e-14)
        assert evaluate(loss, loss.minimizer, v)["value"] == 0
        # One step of size 1/M of gradient descent on outputs reaches the minimum.
        np.testing.assert_allclose(y - found["gradient"], loss.minimizer, atol=1e-15)
    assert loss.strong_convexity() == loss.strong_convexity(3.0) == loss.smoothness == 1
    assert not loss.hessian_fades


@eqx.filter_jit
def quotients(loss, y, v):
    """Rayleigh quotients of the F-Hessian; the metric's weight cancels."""
    return jax.vmap(lambda y, v: jnp.sum(v * loss.hvp(y, v)) / jnp.sum(v**2))(y, v)


def test_smoothness_of_the_logistic_loss_is_its_largest_curvature_and_m_its_smallest_on_a_ball():
    loss, radius = make("logistic"), 2.0
    rng = np.random.default_rng(5)
    inside = rng.uniform(-radius, radius, (300, N))
    # Neither constant can be improved: both are attained, M at 0 and m at the edge of the ball.
    y = np.concatenate([inside, np.zeros((1, N)), np.full((1, N), radius)])
    v = np.concatenate([rng.standard_normal(inside.shape), np.ones((2, N))])
    values = np.asarray(quotients(loss, jnp.asarray(y), jnp.asarray(v)))
    m = loss.strong_convexity(radius)
    assert m <= values[:300].min() < values[:300].max() <= loss.smoothness == 0.25
    np.testing.assert_allclose(values[300:], [loss.smoothness, m], rtol=1e-14)
    assert loss.strong_convexity() == 0
    assert 0 <= loss.strong_convexity(1e4) < 1e-300
    assert loss.hessian_fades
    assert loss.minimizer is None


@pytest.mark.parametrize("k", [2, 10])
def test_constants_of_the_softmax_loss_bound_its_curvature_on_zero_sum_outputs(k):
    loss, radius = lj.softmax_cross_entropy(jnp.asarray(np.arange(k))), 1.0
    rng = np.random.default_rng(7)
    # Zero-sum outputs in the ball, its corners included; zero-sum directions.
    y = rng.uniform(-1, 1, (200, k, k))
    y -= y.mean(-1, keepdims=True)
    y *= radius / np.abs(y).max(-1, keepdims=True)
    v = rng.standard_normal(y.shape)
    v -= v.mean(-1, keepdims=True)
    # M is attained by two equally likely classes of which the others are far.
    far = np.tile(np.where(np.arange(k) < 2, 0.0, -800.0), (1, k, 1))
    steep = np.tile(np.array([1.0, -1.0] + [0.0] * (k - 2)), (1, k, 1))
    # A shift of all outputs of a sample costs nothing, so zero-sum directions are needed.
    y, v = np.concatenate([y, far, y[:1]]), np.concatenate([v, steep, np.ones((1, k, k))])
    values = np.asarray(quotients(loss, jnp.asarray(y), jnp.asarray(v)))
    m = loss.zero_sum_convexity(radius, classes=k)
    assert m <= values[:200].min() < values[:200].max() <= loss.smoothness == 0.5
    np.testing.assert_allclose(values[200:], [0.5, 0], rtol=1e-14, atol=1e-15)
    # The least probability is at least m, so no direction has less; at least 1/2k e^(-2r) of it is there to have.
    assert m >= np.exp(-2 * radius) / k
    assert loss.zero_sum_convexity(classes=k) == loss.zero_sum_convexity(1e4, classes=k) == loss.strong_convexity() == 0
    assert loss.hessian_fades
    assert loss.minimizer is None


def test_labels_0_and_1_mean_the_same_as_minus_1_and_1_in_every_dtype():
    y = normal(0, 4)
    expected = lj.logistic_loss(jnp.array([-1, 1, 1, -1]))(y)
    for labels in (jnp.array([0, 1, 1, 0]), jnp.array([0.0, 1.0, 1.0, 0.0], jnp.float32), jnp.array([-1.0, 1, 1, -1])):
        assert lj.logistic_loss(labels)(y) == expected
    # One class alone is no error; 0 is the negative one.
    assert lj.logistic_loss(jnp.zeros(4))(-1e3 * jnp.ones(4)) == 0


def test_a_loss_can_be_made_inside_a_jit_from_labels_that_are_constants_there():
    labels, target = jnp.array([0, 1, 1]), jnp.ones(3)

    def values(y):
        rows = jnp.stack([y, -y], axis=1)
        return lj.softmax_cross_entropy(labels)(rows), lj.logistic_loss(labels)(y), lj.square_loss(target)(y)

    y = jnp.array([0.5, -1.0, 2.0])
    np.testing.assert_allclose(jax.jit(values)(y), values(y), rtol=1e-14)


# ---- losses of the user's own ----


class Cosh(Loss):
    r"""$\sum_i (\cosh(y_i - y^*_i) - 1)$ by its values alone: m = 1, no M."""

    minimizer: Array
    weight: float = 0.25
    smoothness: float | None = None
    hessian_fades: bool = False

    def __call__(self, y):
        return jnp.sum(jnp.cosh(y - self.minimizer) - 1)

    def strong_convexity(self, radius=math.inf):
        return 1 / self.weight


def cosh_of_a_function(target):
    # The target is part of the function: another one is another program.
    values = np.asarray(target)
    return function_loss(
        lambda y: jnp.sum(jnp.cosh(y - values) - 1), weight=0.25, strong_convexity=4.0, minimizer=target
    )


@pytest.mark.parametrize("build", [Cosh, cosh_of_a_function])
def test_a_loss_of_the_users_own_has_derivatives_in_its_metric(build):
    target, y, v = normal(0, 5), normal(1, 5), normal(2, 5)
    loss = build(target)
    found = check(loss, y, v, rtol=1e-12)
    difference = np.asarray(y) - np.asarray(target)
    np.testing.assert_allclose(found["value"], np.sum(np.cosh(difference) - 1), rtol=1e-13)
    np.testing.assert_allclose(found["gradient"], 4 * np.sinh(difference), rtol=1e-13)
    np.testing.assert_allclose(found["hvp"], 4 * np.cosh(difference) * np.asarray(v), rtol=1e-13)
    assert (loss.smoothness, loss.strong_convexity(), loss.hessian_fades) == (None, 4.0, False)
    np.testing.assert_array_equal(loss.minimizer, target)
    loss.check((5,))


def test_any_callable_becomes_a_loss_in_the_euclidean_metric_of_which_nothing_is_known():
    loss = as_loss(jnp.sum)
    assert loss.weight == 1
    assert (loss.smoothness, loss.strong_convexity(), loss.minimizer, loss.hessian_fades) == (None, None, None, False)
    loss.check((5,))
    assert as_loss(loss) is loss


def test_a_class_that_does_not_say_what_it_knows_cannot_be_made():
    class Silent(Loss):
        weight: float = 1.0

        def __call__(self, y):
            return jnp.sum(y**2)

    with pytest.raises(TypeError, match=r"abstract.*(hessian_fades|minimizer|smoothness)"):
        Silent()  # pyright: ignore[reportCallIssue]


def test_whether_the_hessian_fades_decides_the_solver_of_a_scale_that_is_not_known():
    p = problems.linear(1)

    def chosen(loss):
        found = []

        def trace(alpha):
            found.append(choose_solver(ScaledObjective.of(p.h, loss, p.w0, alpha, True), jnp.arange(2.0)))

        jax.eval_shape(trace, jnp.ones(()))
        return type(found[0])

    assert chosen(function_loss(jnp.sum)) is chosen(lj.square_loss(p.target)) is lj.TangentExponential
    assert chosen(function_loss(jnp.sum, hessian_fades=True)) is diffrax.Tsit5
    assert chosen(lj.logistic_loss(jnp.asarray(LABELS))) is diffrax.Tsit5


def test_what_a_loss_declares_lets_theorems_apply():
    p = problems.linear(3, n=2, d=3)
    values = np.asarray(p.target)
    # Half the square loss plus a linear function far below rounding of its Hessian: no square loss by name.
    declared = function_loss(
        lambda y: 0.25 * jnp.sum((y - values) ** 2),
        weight=0.5,
        smoothness=1.0,
        strong_convexity=1.0,
        minimizer=p.target,
    )
    found = lj.certify(p.h, declared, p.w0, jnp.asarray([0.0, 0.1, 1.0]), alpha=1e3, solver=diffrax.Tsit5())
    assert found.violated == ()
    statuses = {a.name: a.status for claim in found.claims for a in claim.assumptions}
    assert statuses["R smooth"] is statuses["R strongly convex"] is Status.HOLDS
    assert statuses["square loss"] is Status.FAILS
    # The distance to the minimizer is known, and a theorem bounds it.
    residual = found.claim("2.4", "residual_norm")
    assert bool(residual.applies)
    np.testing.assert_allclose(residual.measured[0], np.linalg.norm(values) / 2**0.5, rtol=1e-12)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: lj.square_loss(jnp.zeros(0)), ValueError, r"target must be a non-empty array .* got shape \(0,\)"),
        (lambda: lj.square_loss(jnp.array([1.0, jnp.nan])), ValueError, r"target must be finite, but 1 of its 2"),
        (lambda: lj.logistic_loss(jnp.array([0, 1, 2])), ValueError, "labels must be -1 and 1, or 0 and 1"),
        (lambda: lj.logistic_loss(jnp.array([-1, 0, 1])), ValueError, "labels must be -1 and 1, or 0 and 1"),
        (lambda: lj.logistic_loss(jnp.array([1.0, jnp.inf])), ValueError, "labels must be finite"),
        (lambda: lj.logistic_loss(jnp.zeros(0)), ValueError, "labels must be a non-empty array"),
        (lambda: lj.softmax_cross_entropy(jnp.array([0, -2])), ValueError, "labels must be classes 0, 1, ..., got -2"),
        (lambda: lj.softmax_cross_entropy(jnp.zeros(0, int)), ValueError, "labels must be a non-empty array"),
        (lambda: lj.square_loss(jnp.zeros(3))(jnp.zeros((3, 1))), ValueError, r"outputs \(3, 1\) and target \(3,\)"),
        (lambda: lj.square_loss(jnp.zeros(3)).gradient(jnp.zeros(2)), ValueError, "must have the same shape"),
        (lambda: lj.logistic_loss(jnp.array([0, 1]))(jnp.zeros(3)), ValueError, "outputs and labels must have the"),
        (lambda: lj.softmax_cross_entropy(jnp.array([0, 2]))(jnp.zeros((2, 2))), ValueError, r"0..1 for 2 .* got 0..2"),
        (lambda: lj.softmax_cross_entropy(jnp.array([0, 1]))(jnp.zeros((3, 2))), ValueError, r"\(2, k\) for 2 labels"),
        (lambda: lj.softmax_cross_entropy(jnp.array([0, 1])).check((2,)), ValueError, r"\(2, k\) for 2 labels"),
        (lambda: function_loss(jnp.sum, weight=0.0), ValueError, "weight must be a positive finite number, got 0.0"),
        (lambda: function_loss(jnp.sum, smoothness=np.inf), ValueError, "smoothness must be a positive finite number"),
        (lambda: function_loss(jnp.sum, strong_convexity=-1.0), ValueError, "strong_convexity must be at least 0, got"),
        (
            lambda: function_loss(jnp.sum, smoothness=1.0, strong_convexity=2.0),
            ValueError,
            "at most smoothness = 1.0, got 2.0",
        ),
        (lambda: function_loss(jnp.sum, minimizer=jnp.array([np.nan])), ValueError, "minimizer must be finite"),
        (
            lambda: function_loss(jnp.sum, minimizer=jnp.zeros(3)).check((2,)),
            ValueError,
            r"outputs \(2,\) and minimizer \(3,\)",
        ),
        (
            lambda: as_loss(lambda y: y).check((2,)),
            ValueError,
            r"loss must map outputs of shape \(2,\) to one real number",
        ),
    ],
)
def test_unfit_targets_labels_and_outputs_are_refused(call, error, match):
    with pytest.raises(error, match=match):
        call()


@pytest.mark.parametrize(
    ("build", "match"),
    [
        (lj.logistic_loss, r"labels\[1\] must be a number that int32 holds, got 4294967297"),
        (lj.softmax_cross_entropy, r"labels\[1\] must be a number that int32 holds, got 4294967297"),
        (lj.square_loss, r"target\[1\] must be a number that int32 holds, got 4294967297"),
        (lambda y: lj.losses.function_loss(jnp.sum, minimizer=y), r"minimizer\[1\] must be a number that int32 holds"),
    ],
)
def test_numbers_that_would_wrap_around_are_refused(build, match, untyped):
    """To 1, which is a class."""
    with jax.enable_x64(False), pytest.raises(ValueError, match=match):
        build(np.array([0, 2**32 + 1]))


def test_targets_of_the_wrong_kind_are_refused():
    # The shape annotations that tests check would speak first; users do not have them.
    square, softmax, convert = (
        getattr(f, "__wrapped__", f) for f in (lj.square_loss, lj.softmax_cross_entropy, as_loss)
    )
    with pytest.raises(TypeError, match="target must be real, got complex128"):
        square(jnp.ones(2, complex))
    with pytest.raises(ValueError, match=r"\(n,\) or \(n, k\), got shape \(\)"):
        square(jnp.array(1.0))
    with pytest.raises(TypeError, match=r"integer classes, got float64; for one-hot rows use labels.argmax"):
        softmax(jnp.ones(2))
    with pytest.raises(TypeError, match=r"function of the outputs, got ArrayImpl; use lazyjax.square_loss"):
        convert(jnp.ones(2))


def test_integer_targets_become_floating():
    square = getattr(lj.square_loss, "__wrapped__", lj.square_loss)
    assert square(jnp.arange(3)).minimizer.dtype == jnp.float64
