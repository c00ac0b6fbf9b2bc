"""The tracker against the formulas written down, inside jit and scan, and its refusals."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import optax
import pytest

import lazyjax as lj
import problems
from helpers import relative_error

F = lj.models.mlp(jnp.tanh)
ROWS = problems.rows(0, sizes=(3, 6, 4))
W0, X = ROWS.w0, ROWS.x


def shifted(size, w0=W0):
    u = problems.normal_like(2, w0)
    return jtu.tree_map(lambda a, b: jnp.asarray(np.asarray(a) + np.asarray(size, a.dtype) * np.asarray(b)), w0, u)


def flat(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jtu.tree_leaves(tree)])


@jax.jit
def outputs_and_jacobian(w):
    return F(w, X), jax.jacrev(F)(w, X)


@pytest.mark.parametrize("difference", ["exact", "plain"])
def test_measures_are_their_formulas(difference):
    w = shifted(0.1)
    now = lj.track(F, W0, X, difference=difference)(w)
    step = jtu.tree_map(lambda a, b: np.asarray(a) - np.asarray(b), w, W0)
    (last_y, now_j), (first_y, start_j) = (outputs_and_jacobian(v) for v in (w, W0))
    change = last_y - first_y
    gap = change - sum(
        np.tensordot(j, v, v.ndim)
        for j, v in zip(map(np.asarray, jtu.tree_leaves(start_j)), jtu.tree_leaves(step), strict=True)
    )
    jacobians = [now_j, start_j]
    rows = [np.concatenate([np.reshape(leaf, (20, -1)) for leaf in jtu.tree_leaves(j)], axis=1) for j in jacobians]
    last, first = (r @ r.T for r in rows)
    expected = {
        "displacement_norm": np.linalg.norm(flat(step)),
        "relative_displacement": np.linalg.norm(flat(step)) / np.linalg.norm(flat(W0)),
        "output_change": np.linalg.norm(change) / 5**0.5,
        "linearization_error": np.linalg.norm(gap) / 5**0.5,
        "relative_error": np.linalg.norm(gap) / np.linalg.norm(change),
        "kernel_drift": np.linalg.norm(last - first) / np.linalg.norm(first),
        "kernel_alignment": np.sum(last * first) / np.linalg.norm(last) / np.linalg.norm(first),
    }
    assert {name: float(getattr(now, name)) for name in expected} == pytest.approx(expected, rel=1e-10)
    hidden = jax.jit(F.preactivations)
    kept = np.sign(hidden(w, X)[0]) == np.sign(hidden(W0, X)[0])
    assert float(now.stability) == pytest.approx(np.mean(kept), rel=1e-6)


def test_at_the_start_nothing_has_changed():
    now = lj.track(F, W0, X)(W0)
    for name in (
        "displacement_norm",
        "relative_displacement",
        "output_change",
        "linearization_error",
        "relative_error",
    ):
        assert float(getattr(now, name)) == 0.0
    assert float(now.kernel_drift) == 0.0
    assert float(now.kernel_alignment) == pytest.approx(1.0, rel=1e-14)
    assert float(now.stability) == 1.0


def test_changes_below_rounding_keep_their_digits_in_float32():
    """w itself is rounded to its dtype: what it is after that is measured exactly."""
    w0, x = jtu.tree_map(lambda leaf: leaf.astype(jnp.float32), (jtu.tree_map(lambda a: a / 100, W0), X))
    w = shifted(1e-7, w0)
    single = lj.track(F, w0, x)(w)
    double = lj.track(F, *jtu.tree_map(lambda leaf: leaf.astype(jnp.float64), (w0, x)))(jtu.tree_map(jnp.float64, w))
    assert single.kernel_drift.dtype == jnp.float32
    assert float(single.kernel_drift) == pytest.approx(float(double.kernel_drift), rel=1e-3)
    assert float(single.output_change) == pytest.approx(float(double.output_change), rel=1e-4)
    assert float(double.kernel_drift) < 1e-4


def test_the_tracker_runs_in_a_jitted_scan():
    tracker = lj.track(F, W0, X)
    optimizer = optax.sgd(0.3)

    def step(carry, _):
        w, state = carry
        gradient = jax.grad(lambda v: jnp.mean(F(v, X) ** 2))(w)
        updates, state = optimizer.update(gradient, state)
        w = optax.apply_updates(w, updates)
        return (w, state), tracker(w)

    (w, _), history = jax.jit(lambda: jax.lax.scan(step, (W0, optimizer.init(W0)), length=3))()
    assert relative_error(jtu.tree_map(lambda leaf: leaf[-1], history), tracker(w)) < 1e-12
    assert np.all(np.diff(history.displacement_norm) > 0)


def test_without_the_kernel_and_without_preactivations_there_are_none():
    now = lj.track(lambda w, x: F(w, x)[:, 0], W0, X, kernel=False)(shifted(0.1))
    assert now.kernel_drift is now.kernel_alignment is now.stability is None
    assert float(now.relative_error) > 0


def test_a_model_with_linear_algebra_is_tracked_exactly_and_plainly():
    def f(w, x):
        square = jtu.tree_leaves(w)[0].ravel()[:4].reshape(2, 2) + 3 * jnp.eye(2)
        return F(w, x) + jnp.linalg.inv(square)[0, 0]

    exact, plain = (lj.track(f, W0, X, difference=d, kernel=False)(shifted(0.1)) for d in ("exact", "plain"))
    assert 0 < float(plain.relative_error) < 1
    np.testing.assert_allclose(plain.relative_error, exact.relative_error, rtol=1e-6)


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match='difference must be "exact" or "plain", got \'no\''):
        lj.track(F, W0, X, difference="no")
    with pytest.raises(ValueError, match="x must hold at least one sample"):
        lj.track(F, W0, X[:0])
    with pytest.raises(TypeError, match="w0 must hold at least one real floating array"):
        lj.track(F, {}, X)
    with pytest.raises(ValueError, match="f must return one row of outputs per sample"):
        lj.track(lambda w, x: F(w, x)[:2], W0, X)
    with pytest.raises(ValueError, match=r"w must have the structure and shapes of w0.*without the optimizer's state"):
        lj.track(F, W0, X)({"params": W0})


@pytest.mark.parametrize("difference", ["exact", "plain"])
def test_a_diverged_training_does_not_look_lazy(difference):
    """NaN in one weight of one unit is NaN in every measure, not zero."""
    leaves, structure = jtu.tree_flatten(shifted(0.1))
    leaves[0] = np.array(leaves[0])
    leaves[0][(0,) * leaves[0].ndim] = np.nan
    leaves[0] = jnp.asarray(leaves[0])
    now = lj.track(F, W0, X, difference=difference)(structure.unflatten(leaves))
    found = {name: float(value) for name, value in vars(now).items()}
    assert len(found) == 8
    assert all(np.isnan(value) for value in found.values()), found


def test_a_measurement_prints_its_numbers_and_inside_a_trace_its_shapes():
    now = lj.track(F, W0, X)(shifted(0.1))
    lines = str(now).splitlines()
    assert len(lines) == 4
    assert f"moved by {float(now.displacement_norm):.3g}" in lines[0]
    assert "kernel" in lines[2]
    assert repr(now) == str(now)
    seen = []
    eqx.filter_eval_shape(lambda m: seen.append(str(m)) or m.stability, now)
    assert "displacement_norm=f64[]" in seen[0]
