"""Gradient descent by optax in one program: against NumPy, its frames, and which descents diverged."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import xarray

import lazyjax as lj
from figures import moved, numpy_descent, sample, scaled
from helpers import relative_error
from lazyjax.experiments.descent import descend, even_frames, log_frames, mark_lanes

FRAMES = np.array([0, 5, 1000])


@eqx.filter_jit
def follow(w0, x, y, step):
    h, loss = lj.on_data(lj.models.two_layer(), x), lj.square_loss(y)
    gradient = jax.grad(lambda w: loss(h(w)))
    return descend(lambda w, _: gradient(w), w0, optax.sgd(step), FRAMES, optax.tree.norm)


@pytest.mark.parametrize("tau", [0.1, 2.0])
def test_the_weights_are_those_of_numpy(tau):
    x, y, _, start = sample(3, 50, 10, 8)
    w0 = scaled(start, tau)
    step = min(1.0, 0.1 / tau**2)
    v, seen = follow(w0, x, y, jnp.asarray(step))
    late, early = (numpy_descent(w0, x, y, steps, step) for steps in (1000, 5))
    assert relative_error({name: w0[name] + np.asarray(v[name]) for name in v}, late) < 1e-9
    assert seen.shape == (3,)
    assert float(seen[0]) == 0
    far = np.sqrt(sum(np.sum(part**2) for part in moved(early, w0).values()))
    assert float(seen[1]) == pytest.approx(far, rel=1e-9)


def test_frames_hold_both_ends_and_increase():
    for frames in (even_frames(100, 7), log_frames(100, 7), even_frames(3, 100), log_frames(1, 5)):
        assert frames[0] == 0
        assert (np.diff(frames) > 0).all()
    assert even_frames(100, 7)[-1] == log_frames(100, 7)[-1] == 100


@pytest.mark.parametrize("frames", [[3, 3], [-1, 2], []])
def test_frames_that_do_not_increase_are_refused(frames):
    with pytest.raises(ValueError, match="frames must be increasing numbers of steps, at least 0, got"):
        descend(lambda w, _: w, np.ones(1), optax.sgd(0.1), np.array(frames, int), lambda v: v)


def test_a_descent_that_diverged_leaves_its_neighbors_alone():
    """A sweep marks the whole column of a seed, and keeps its numbers aside."""
    risk = np.array([[[1.0, 0.5], [2.0, 1.0]], [[1.0, 0.4], [np.nan, np.inf]]])
    whole = risk.copy()
    whole[1] = np.nan
    found = xarray.Dataset(
        {
            "risk": (("seed", "tau", "step"), whole),
            "risk_failed": (("seed", "tau", "step"), np.where(np.isnan(whole), risk, np.nan)),
            "count": ("seed", [1, 2]),
            "failed": ("seed", [False, True]),
            "message": ("seed", ["", "not finite"]),
        },
        coords={"seed": [0, 1], "tau": [0.1, 1.0]},
    )
    marked = mark_lanes(found, "tau")
    assert set(marked) == {"risk", "count", "descent_failed"}
    np.testing.assert_array_equal(marked["descent_failed"], [[False, False], [False, True]])
    np.testing.assert_array_equal(marked["risk"], np.where(np.isfinite(risk), risk, np.nan))
