"""How a problem of a teacher and a student is drawn, and its risk."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

from figures import sample
from lazyjax.experiments.student import sample_problem


def test_starts_of_the_code_are_symmetrized_and_of_their_law():
    _, _, teacher, start = sample(1, 9, 3, 400, unit=True)
    normal = sample(1, 9, 3, 400)
    a, b = (np.asarray(start[name]) for name in "ab")
    np.testing.assert_array_equal(teacher["b"], normal.teacher["b"])
    np.testing.assert_array_equal(a[:200], -a[200:])
    np.testing.assert_array_equal(b[:200], b[200:])
    assert a[:200].min() >= 0
    # The mean of U[0, 1], within four standard errors of 200 draws.
    assert abs(a[:200].mean() - 1 / 2) < 4 * (1 / 12 / 200) ** 0.5
    # Correlated with none of the inputs' coordinates: both are drawn from one key.
    gaussian = np.asarray(normal.start["b"])[:200]
    for values in (gaussian.ravel()[:200], *gaussian.T):
        assert abs(np.corrcoef(a[:200], values)[0, 1]) < 0.25
    np.testing.assert_allclose(np.linalg.norm(b, axis=1), 1, rtol=1e-12)
    assert (np.asarray(sample(1, 9, 3, 400, symmetric=False, unit=True).start["a"]) >= 0).all()


def test_keys_of_a_problem_are_its_own():
    first, second = sample(0, 9, 3, 400), sample(1, 9, 3, 400)
    assert not np.allclose(first.x, second.x)
    np.testing.assert_array_equal(first.x, sample(0, 9, 3, 400).x)
    a, b = (np.asarray(first.teacher[name]) for name in "ab")
    np.testing.assert_allclose(first.y, np.maximum(np.asarray(first.x) @ b.T, 0) @ a, atol=1e-14)
    assert not np.allclose(first.start["b"][0], jr.normal(jr.key(0), (3,)))


def test_only_what_the_student_sees_is_rounded():
    problem = jax.eval_shape(lambda seed: sample_problem(seed, 9, 3, 400, dtype="float32"), 0)
    assert {leaf.dtype for leaf in (problem.x, problem.y, *problem.start.values())} == {jnp.dtype("float32")}
    assert problem.teacher["b"].dtype == jnp.float64
