"""Exact population risk: Monte Carlo, finite differences, angles 0 and pi, the tangent model."""

import functools

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import pytest

from helpers import relative_error
from lazyjax.data.population_risk import population_inner, population_risk, tangent_population_risk
from problems import normal

D = 6
# Unit directions and signs as a teacher has them.
_B = np.random.default_rng(1).standard_normal((3, D))
TEACHER = {"a": jnp.asarray(np.array([1.0, -1.0, 1.0])), "b": jnp.asarray(_B / np.linalg.norm(_B, axis=1)[:, None])}
STUDENT = {"a": normal(2, 8, scale=0.7), "b": normal(3, 8, D, scale=0.7)}
NOTHING = {"a": jnp.asarray(np.zeros(3)), "b": TEACHER["b"]}
# At which a net of 8 units has no output.
SYMMETRIC = {
    name: jnp.asarray(np.concatenate([v[:4], s * v[:4]]))
    for (name, v), s in zip(jtu.tree_map(np.asarray, STUDENT).items(), (-1.0, 1.0), strict=True)
}
DIRECTION = {"a": normal(9, 8), "b": normal(10, 8, D)}


@functools.cache
def points(num=200_000):
    """On the sphere."""
    x = np.random.default_rng(5).standard_normal((num, D))
    return x / np.linalg.norm(x, axis=1)[:, None]


def net(w):
    """Outputs at these points, by NumPy."""
    return np.maximum(points() @ np.asarray(w["b"]).T, 0) @ np.asarray(w["a"])


def tangent(w0, v):
    """Df(w0, x) v at these points."""
    z = points() @ np.asarray(w0["b"]).T
    moved = (z > 0) * (points() @ np.asarray(v["b"]).T)
    return np.maximum(z, 0) @ np.asarray(v["a"]) + moved @ np.asarray(w0["a"])


def assert_mean(gap, risk):
    """Half the mean square of a function on the sphere is the risk, up to four standard errors."""
    squares = 0.5 * gap**2
    assert abs(squares.mean() - float(risk)) < 4 * squares.std() / len(gap) ** 0.5


def test_it_is_the_mean_over_the_sphere():
    assert_mean(net(STUDENT) - net(TEACHER), population_risk(STUDENT, TEACHER))
    assert_mean(net(TEACHER), population_risk(NOTHING, TEACHER))
    np.testing.assert_allclose(
        0.5 * float(population_inner(TEACHER, TEACHER)), population_risk(NOTHING, TEACHER), rtol=1e-14
    )


def test_the_tangent_models_risk_is_the_mean_over_the_sphere():
    v = jtu.tree_map(lambda leaf: 0.1 * np.asarray(leaf), DIRECTION)
    assert_mean(
        tangent(SYMMETRIC, v) - net(TEACHER), tangent_population_risk(SYMMETRIC, jtu.tree_map(jnp.asarray, v), TEACHER)
    )


def test_the_tangent_models_risk_is_the_limit_of_the_models():
    limit = float(tangent_population_risk(SYMMETRIC, DIRECTION, TEACHER))

    def risk(scale):  # of alpha f(w0 + v/alpha) at alpha = scale^2: by homogeneity that of scale w0 + v/scale
        w = jtu.tree_map(lambda a, b: jnp.asarray(scale * np.asarray(a) + np.asarray(b) / scale), SYMMETRIC, DIRECTION)
        return float(population_risk(w, TEACHER))

    gaps = [abs(risk(scale) - limit) for scale in (30.0, 300.0)]
    # First order in 1/alpha, for two decades of alpha.
    assert gaps[1] < 0.02 * gaps[0] < 1e-3 * limit


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_a_student_that_is_the_teacher_has_no_risk(dtype):
    teacher = jtu.tree_map(lambda leaf: jnp.asarray(np.asarray(leaf, dtype)), TEACHER)
    assert abs(float(population_risk(teacher, teacher))) < 10 * float(jnp.finfo(dtype).eps)
    permuted = jtu.tree_map(lambda leaf: jnp.asarray(np.asarray(leaf)[::-1]), teacher)
    assert abs(float(population_risk(permuted, teacher))) < 10 * float(jnp.finfo(dtype).eps)


gradient_of = jax.jit(jax.grad(population_risk))


def test_its_gradient_is_the_difference_quotient():
    gradient = gradient_of(STUDENT, TEACHER)

    def risk(s):
        w = jtu.tree_map(lambda a, b: jnp.asarray(np.asarray(a) + s * np.asarray(b)), STUDENT, DIRECTION)
        return float(population_risk(w, TEACHER))

    # A central difference is off by s^2, and by rounding/s.
    quotient = (risk(1e-5) - risk(-1e-5)) / 2e-5
    pairs = zip(*map(jtu.tree_leaves, (gradient, DIRECTION)), strict=True)
    slope = sum(np.vdot(np.asarray(a), np.asarray(b)) for a, b in pairs)
    np.testing.assert_allclose(slope, quotient, rtol=1e-8)


@pytest.mark.parametrize("sign", [1.0, -1.0], ids=["angle 0", "angle pi"])
def test_its_gradient_where_student_and_teacher_are_parallel(sign):
    """Of one unit b = c u and a teacher of one unit +-u; the risk is once differentiable there."""
    u = np.asarray(TEACHER["b"])[:1]
    teacher = {"a": jnp.asarray(np.ones(1)), "b": jnp.asarray(sign * u)}
    gradient = gradient_of({"a": jnp.asarray(np.array([1.5])), "b": jnp.asarray(2 * u)}, teacher)
    # E[relu(u.x)^2] = 1/(2d); for sign -1 the two units are never active together.
    gap = 1.5 * 2 - (sign > 0)
    np.testing.assert_allclose(gradient["a"], [2 * gap / (2 * D)], rtol=1e-12)
    np.testing.assert_allclose(gradient["b"], 1.5 * gap / (2 * D) * u, rtol=1e-12, atol=1e-15)


def test_at_zero_weights_the_gradient_is_finite():
    zero = jtu.tree_map(lambda leaf: jnp.asarray(np.zeros(leaf.shape)), STUDENT)
    assert all(np.isfinite(leaf).all() for leaf in jtu.tree_leaves(gradient_of(zero, TEACHER)))


def test_it_maps_over_students():
    twice = jtu.tree_map(lambda leaf: jnp.asarray(2 * np.asarray(leaf)), STUDENT)
    students = jtu.tree_map(lambda *leaves: jnp.asarray(np.stack(leaves)), STUDENT, twice)
    both = jax.vmap(lambda w: population_risk(w, TEACHER))(students)
    single = [float(population_risk(w, TEACHER)) for w in (STUDENT, twice)]
    assert relative_error(both, np.asarray(single)) < 1e-12


def test_parameters_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"w1 must hold one output weight per unit, got a \(3,\) and b \(8, 6\)"):
        population_inner(STUDENT | {"a": jnp.asarray(np.ones(3))}, TEACHER)
    with pytest.raises(ValueError, match=r"w and teacher must have inputs of one dimension d, got .* teacher \(3, 7\)"):
        population_risk(STUDENT, {"a": TEACHER["a"], "b": jnp.asarray(np.ones((3, D + 1)))})
