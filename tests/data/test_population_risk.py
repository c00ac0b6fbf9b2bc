"""Exact population risk: Monte Carlo, finite differences, angles 0 and pi, the tangent model."""

import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import pytest

import lazyjax as lj
from helpers import relative_error
from lazyjax.data.datasets import draw_teacher, sphere
from lazyjax.data.population_risk import population_inner, population_risk, tangent_population_risk

D = 6
TEACHER = draw_teacher(jr.key(1), D)
STUDENT = lj.models.two_layer().init(jr.key(2), d=D, width=8, tau=0.7)


def sampled(gap, getkey, num=200_000):
    """Half the mean square of a function on the sphere, and its standard error."""
    squares = np.asarray(0.5 * gap(sphere(getkey(), num, D)) ** 2)
    return squares.mean(), squares.std() / num**0.5


def test_it_is_the_mean_over_the_sphere(getkey):
    f = lj.models.two_layer()
    mean, error = sampled(lambda x: f(STUDENT, x) - f(TEACHER, x), getkey)
    assert abs(mean - float(population_risk(STUDENT, TEACHER))) < 4 * error
    mean, error = sampled(lambda x: f(TEACHER, x), getkey)
    nothing = {"a": jnp.zeros(1), "b": jnp.ones((1, D))}
    assert abs(mean - float(population_risk(nothing, TEACHER))) < 4 * error
    np.testing.assert_allclose(0.5 * population_inner(TEACHER, TEACHER), population_risk(nothing, TEACHER), rtol=1e-14)


def test_the_tangent_models_risk_is_the_mean_over_the_sphere(getkey):
    w0 = lj.models.two_layer().init(jr.key(2), d=D, width=8, tau=0.7, symmetric=True)
    v = jtu.tree_map(lambda leaf: 0.1 * jr.normal(jr.key(9), leaf.shape), w0)
    f = lj.models.two_layer()

    def gap(x):
        return lj.linearize(lambda w: f(w, x), w0).jvp(v) - f(TEACHER, x)

    mean, error = sampled(gap, getkey)
    assert abs(mean - float(tangent_population_risk(w0, v, TEACHER))) < 4 * error


def test_the_tangent_models_risk_is_the_limit_of_the_models():
    w0 = lj.models.two_layer().init(jr.key(2), d=D, width=8, symmetric=True)
    v = jtu.tree_map(lambda leaf: jr.normal(jr.key(9), leaf.shape), w0)
    limit = float(tangent_population_risk(w0, v, TEACHER))

    def risk(scale):  # of alpha f(w0 + v/alpha) at alpha = scale^2: by homogeneity that of scale w0 + v/scale
        return float(population_risk(jtu.tree_map(lambda a, b: scale * a + b / scale, w0, v), TEACHER))

    gaps = [abs(risk(scale) - limit) for scale in (30.0, 300.0)]
    # First order in 1/alpha, for two decades of alpha.
    assert gaps[1] < 0.02 * gaps[0] < 1e-3 * limit


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_a_student_that_is_the_teacher_has_no_risk(dtype):
    teacher = jtu.tree_map(lambda leaf: leaf.astype(dtype), TEACHER)
    assert abs(float(population_risk(teacher, teacher))) < 10 * float(jnp.finfo(dtype).eps)
    permuted = jtu.tree_map(lambda leaf: leaf[::-1], teacher)
    assert abs(float(population_risk(permuted, teacher))) < 10 * float(jnp.finfo(dtype).eps)


def test_its_gradient_is_the_difference_quotient(getkey):
    gradient = jax.grad(population_risk)(STUDENT, TEACHER)
    direction = jtu.tree_map(lambda leaf: jr.normal(getkey(), leaf.shape), STUDENT)

    def risk(s):
        return population_risk(jtu.tree_map(lambda a, b: a + s * b, STUDENT, direction), TEACHER)

    # A central difference is off by s^2, and by rounding/s.
    quotient = (risk(1e-5) - risk(-1e-5)) / 2e-5
    slope = sum(jnp.vdot(a, b) for a, b in zip(*map(jtu.tree_leaves, (gradient, direction)), strict=True))
    np.testing.assert_allclose(slope, quotient, rtol=1e-8)


@pytest.mark.parametrize("sign", [1.0, -1.0], ids=["angle 0", "angle pi"])
def test_its_gradient_where_student_and_teacher_are_parallel(sign):
    """Of one unit b = c u and a teacher of one unit +-u; the risk is once differentiable there."""
    u = sphere(jr.key(4), 1, D)
    teacher = {"a": jnp.ones(1), "b": sign * u}
    gradient = jax.grad(population_risk)({"a": jnp.array([1.5]), "b": 2 * u}, teacher)
    # E[relu(u.x)^2] = 1/(2d); for sign -1 the two units are never active together.
    gap = 1.5 * 2 - (sign > 0)
    np.testing.assert_allclose(gradient["a"], [2 * gap / (2 * D)], rtol=1e-12)
    np.testing.assert_allclose(gradient["b"], 1.5 * gap / (2 * D) * u, rtol=1e-12, atol=1e-15)


def test_at_zero_weights_the_gradient_is_finite():
    zero = jtu.tree_map(jnp.zeros_like, STUDENT)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jtu.tree_leaves(jax.grad(population_risk)(zero, TEACHER)))


def test_it_maps_over_students():
    students = jtu.tree_map(lambda leaf: jnp.stack([leaf, 2 * leaf]), STUDENT)
    both = jax.vmap(lambda w: population_risk(w, TEACHER))(students)
    single = [population_risk(jtu.tree_map(lambda leaf, s=s: s * leaf, STUDENT), TEACHER) for s in (1.0, 2.0)]
    assert relative_error(both, jnp.stack(single)) < 1e-12


def test_parameters_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"w1 must hold one output weight a unit, got a \(3,\) and b \(8, 6\)"):
        population_inner(STUDENT | {"a": jnp.ones(3)}, TEACHER)
    with pytest.raises(ValueError, match=r"w and teacher must have inputs of one dimension d, got .* teacher \(3, 7\)"):
        population_risk(STUDENT, draw_teacher(jr.key(1), D + 1))
