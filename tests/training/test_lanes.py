"""Lanes of a training: several scales or starts at once are single runs, and one that diverges leaves the others be."""

import importlib

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import optax
import pytest

import lazyjax as lj
from helpers import relative_error
from lazyjax.training.arguments import TrainingOptions, make_lanes, make_setup
from lazyjax.training.lanes import choose_size, memory_of
from shared_training import ALPHAS, EPOCHS, LABELS, MLP, SGD, TEST, W0, X, key, lane_of, start, train, trained

# The function `train` hides its module.
MODULE = importlib.import_module("lazyjax.training.train")
LANES = importlib.import_module("lazyjax.training.lanes")


def prepared(alpha=ALPHAS):
    lanes = make_lanes(alpha, key(), W0)
    given = {"loss": "square", "batch_size": 5, "test": None, "options": TrainingOptions()}
    return make_setup(MLP, W0, X, LABELS, SGD, lanes, **given), lanes


@pytest.fixture(scope="module")
def side_by_side():
    """All three lanes of the shared training in one program."""
    return train(test=TEST, options={"chunk": 3})


@pytest.mark.parametrize("by", ["two and one", "memory"])
def test_lanes_are_single_runs_however_they_are_grouped(by, side_by_side, monkeypatch):
    sizes, run_epoch = set(), MODULE.run_epoch

    def watched(setup, lanes, *args):
        sizes.add(lanes.count)
        return run_epoch(setup, lanes, *args)

    monkeypatch.setattr(MODULE, "run_epoch", watched)
    if by == "memory":  # a byte too little for three
        monkeypatch.setattr(LANES, "memory_of", lambda setup, lanes, size: 100 * size)
        run = train(test=TEST, options={"memory": 299})
    else:
        run = train(test=TEST, options={"chunk": 2})
    assert sizes == {2}
    assert relative_error(run.displacement, side_by_side.displacement) < 1e-12


def test_lanes_one_by_one_and_a_run_alone_are_lanes_side_by_side(side_by_side):
    assert relative_error(trained().displacement, side_by_side.displacement) < 1e-12
    for name in ("loss", "accuracy", "test_loss", "test_accuracy"):
        np.testing.assert_allclose(getattr(trained(), name), getattr(side_by_side, name), rtol=1e-12)
    alone = train(alpha=10.0)
    assert relative_error(lane_of(side_by_side.displacement, 1), alone.displacement) < 1e-12
    assert alone.loss.shape == (EPOCHS,)
    assert alone.alpha.shape == alone.result._value.shape == ()


def test_starts_and_keys_may_have_lanes_of_their_own():
    starts = [start(8), start(9)]
    stacked = jtu.tree_map(lambda *leaves: jnp.asarray(np.stack(leaves)), *starts)
    keys = jr.split(key(9), 2)
    run = train(w0=stacked, key=keys, alpha=30.0, options={"stacked": True, "chunk": 2})
    assert run.alpha.shape == (2,)
    outputs = lj.training.trained_outputs(MLP, stacked, run, X)
    for lane in range(2):
        alone = train(w0=starts[lane], key=keys[lane], alpha=30.0)
        assert relative_error(lane_of(run.displacement, lane), alone.displacement) < 1e-12
        np.testing.assert_allclose(
            outputs[lane], lj.training.trained_outputs(MLP, starts[lane], alone, X), rtol=1e-9, atol=1e-12
        )
    # Another order of the batches is another path.
    assert relative_error(lane_of(run.displacement, 0), train(w0=starts[0], alpha=30.0).displacement) > 1e-3


def explosive(w, x):
    """NaN beyond |w| = 2, linear within."""
    return jnp.where(jnp.abs(w) < 2, w, jnp.nan) * x


FAST = optax.sgd(0.5)


def train_explosive(alpha, options=None, **given):
    x = np.linspace(0.5, 1.5, 8)
    given = {"epochs": 6, "batch_size": 4, "test": (x, 3 * x), **given}
    return train(explosive, jnp.zeros(()), x, 3 * x, FAST, alpha=alpha, options=options, **given)


@pytest.mark.parametrize("chunk", [1, 3])
def test_a_diverged_lane_is_marked_and_kept_apart(chunk):
    run = train_explosive(np.array([10.0, 1.0, np.inf]), {"chunk": chunk}, throw=False)
    assert (run.result == diffrax.RESULTS.nonfinite).tolist() == [False, True, False]
    for lane, alpha in ((0, 10.0), (2, np.inf)):
        alone = train_explosive(alpha)
        assert relative_error(run.displacement[lane], alone.displacement) < 1e-14
        np.testing.assert_allclose(run.test_loss[lane], alone.test_loss, rtol=1e-12, atol=1e-30)
    loss, test_loss = np.asarray(run.loss), np.asarray(run.test_loss)
    assert np.isfinite(loss[[0, 2]]).all()
    assert np.isnan(loss[1, -3:]).all()
    # All measures end with the same epoch, whichever of them saw the end first.
    np.testing.assert_array_equal(np.isnan(loss), np.isnan(test_loss))
    assert "diverged" in str(run).splitlines()[3]
    assert str(run).count("diverged") == 1


def test_a_diverged_lane_raises_unless_told_otherwise():
    with pytest.raises(
        eqx.EquinoxRuntimeError, match=r"diverged within [1-6] epochs at alpha = 1:.*smaller learning rate"
    ):
        train_explosive(np.array([10.0, 1.0]))


def test_progress_is_shown_on_demand(capfd):
    train_explosive(10.0)
    assert "epoch" not in capfd.readouterr().err
    train_explosive(np.array([10.0, 1.0]), {"progress": True}, throw=False)
    err = capfd.readouterr().err
    assert "6/6" in err
    assert "1 diverged" in err


def test_as_many_lanes_as_fit_the_memory_go_side_by_side(monkeypatch):
    monkeypatch.setattr(LANES, "memory_of", lambda setup, lanes, size: 100 * size)
    made = prepared(np.arange(1.0, 6.0))
    assert choose_size(*made, None, 500) == 5
    assert choose_size(*made, None, 1) == 1
    # Five lanes in equal chunks: three and two need less room than four and one.
    assert choose_size(*made, None, 499) == 3
    assert choose_size(*made, 9, None) == 5
    assert choose_size(*made, None, None) == (1 if jax.default_backend() == "cpu" else 5)


def test_the_memory_of_lanes_is_that_of_their_program_and_asked_for_once(monkeypatch):
    three = memory_of(*prepared(), 3)
    states = 3 * 2 * sum(leaf.nbytes for leaf in jtu.tree_leaves(W0))  # u and its momentum
    assert states < three < 100 * states
    # The same training made ready anew compiles nothing for its choice.
    monkeypatch.setattr(jax.stages.Lowered, "compile", None)
    again = prepared(np.array([2.0, 3.0, 4.0]))
    assert memory_of(*again, 3) == three
    with pytest.raises(TypeError, match="not callable"):
        memory_of(*again, 2)


def test_steps_one_by_one_are_those_of_the_scan(side_by_side, monkeypatch):
    """As convolutions need them on a CPU."""
    monkeypatch.setattr(importlib.import_module("lazyjax.training.arguments"), "may_scan", lambda *_: False)
    stepped = train(test=TEST, options={"chunk": 3})
    assert relative_error(stepped.displacement, side_by_side.displacement) < 1e-13
    for name in ("loss", "accuracy", "test_loss", "test_accuracy"):
        np.testing.assert_allclose(getattr(stepped, name), getattr(side_by_side, name), rtol=1e-12)
