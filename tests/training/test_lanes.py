"""Lanes of a training: several scales or starts at once are single runs, and one that diverges leaves the others be."""

import functools

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
from lazyjax.training.arguments import prepare
from lazyjax.training.lanes import choose_size, memory_of

EPOCHS = 3
ALPHAS = jnp.array([1.0, 10.0, jnp.inf])
KEY = jr.key(7)
MLP = lj.models.mlp(jnp.tanh)
W0 = lj.models.mlp().init(jr.key(0), (3, 6, 4))
X = jr.normal(jr.key(1), (23, 3))
LABELS = jr.randint(jr.key(2), (23,), 0, 4)
SGD = optax.sgd(0.2, momentum=0.9)


def train(w0=W0, **options):
    defaults = {"alpha": ALPHAS, "epochs": EPOCHS, "batch_size": 5, "key": KEY}
    return lj.train(MLP, w0, X, LABELS, SGD, **{**defaults, **options})


@functools.cache
def trained(**options):
    return train(**options)


def lane_of(tree, lane):
    return jtu.tree_map(lambda leaf: leaf[lane], tree)


def prepared(alpha=ALPHAS):
    options = {"loss": "square", "batch_size": 5, "key": KEY, "augment": None, "test": None, "difference": "finite"}
    made = prepare(MLP, W0, X, LABELS, SGD, alpha=alpha, stacked=False, **options)
    return made.course, made.lanes


@pytest.mark.parametrize("chunk", [1, 2, None], ids=["one by one", "two and one", "by memory"])
def test_lanes_are_single_runs_however_they_are_grouped(chunk, monkeypatch):
    sizes, run_epoch = set(), lj.training.epochs.run_epoch

    def watched(course, lanes, *args):
        sizes.add(lanes.alpha.size)
        return run_epoch(course, lanes, *args)

    monkeypatch.setattr(lj.training.epochs, "run_epoch", watched)
    # A byte too little for three.
    run = train(memory=memory_of(*prepared(), 3) - 1) if chunk is None else train(chunk=chunk)
    assert sizes == {chunk or 2}
    assert relative_error(run.displacement, trained(chunk=3).displacement) < 1e-12
    alone = train(alpha=10.0)
    assert relative_error(lane_of(run.displacement, 1), alone.displacement) < 1e-12
    assert alone.train_loss.shape == (EPOCHS,)


def test_starts_and_keys_may_have_lanes_of_their_own():
    starts = jax.vmap(lambda key: lj.models.mlp().init(key, (3, 6, 4)))(jr.split(jr.key(8), 2))
    keys = jr.split(jr.key(9), 2)
    run = train(w0=starts, key=keys, stacked=True, alpha=30.0, chunk=2)
    assert run.alpha.shape == (2,)
    outputs = lj.training.trained_outputs(MLP, starts, run, X)
    for lane in range(2):
        alone = train(w0=lane_of(starts, lane), key=keys[lane], alpha=30.0)
        assert relative_error(lane_of(run.displacement, lane), alone.displacement) < 1e-12
        np.testing.assert_allclose(
            outputs[lane], lj.training.trained_outputs(MLP, lane_of(starts, lane), alone, X), rtol=1e-9
        )
    # Another order of the batches is another path.
    assert relative_error(run.displacement, train(w0=starts, stacked=True, alpha=30.0, chunk=2).displacement) > 1e-3


def explosive(w, x):
    """NaN beyond |w| = 2, linear within."""
    return jnp.where(jnp.abs(w) < 2, w, jnp.nan) * x


def train_explosive(alpha, **options):
    x = jnp.linspace(0.5, 1.5, 8)
    options = {"epochs": 6, "batch_size": 4, "key": KEY, "test": (x, 3 * x), **options}
    return lj.train(explosive, jnp.zeros(()), x, 3 * x, optax.sgd(0.5), alpha=alpha, **options)


@pytest.mark.parametrize("chunk", [1, 3])
def test_a_diverged_lane_is_marked_and_kept_apart(chunk):
    run = train_explosive(jnp.array([10.0, 1.0, jnp.inf]), chunk=chunk, throw=False)
    assert (run.result == diffrax.RESULTS.nonfinite).tolist() == [False, True, False]
    for lane, alpha in ((0, 10.0), (2, jnp.inf)):
        alone = train_explosive(alpha)
        assert relative_error(run.displacement[lane], alone.displacement) < 1e-14
        np.testing.assert_allclose(run.test_loss[lane], alone.test_loss, rtol=1e-12, atol=1e-30)
    assert np.isfinite(run.train_loss[jnp.array([0, 2])]).all()
    assert np.isnan(run.train_loss[1, -3:]).all()
    # All measures end with the same epoch, whichever of them saw the end first.
    np.testing.assert_array_equal(np.isnan(run.train_loss), np.isnan(run.test_loss))
    with pytest.raises(
        eqx.EquinoxRuntimeError, match=r"diverged within [1-6] epochs at alpha = 1:.*smaller learning rate"
    ):
        train_explosive(jnp.array([10.0, 1.0]))


def test_progress_is_shown_on_demand(capfd):
    train_explosive(10.0)
    assert "epoch" not in capfd.readouterr().err
    train_explosive(jnp.array([10.0, 1.0]), throw=False, progress=True)
    err = capfd.readouterr().err
    assert "6/6" in err
    assert "1 diverged" in err


def test_as_many_lanes_as_fit_the_memory_go_side_by_side(monkeypatch):
    made = prepared(jnp.arange(1.0, 6.0))
    need = [memory_of(*made, size) for size in (1, 2, 5)]
    assert need[0] < need[1] < need[2]
    assert choose_size(*made, None, need[2]) == 5
    assert choose_size(*made, None, 1) == 1
    # Five lanes in equal chunks: three and two need less room than four and one.
    some = choose_size(*made, None, need[2] - 1)
    assert some < 5
    assert memory_of(*made, some) <= need[2] - 1
    assert choose_size(*made, 9, None) == 5
    # The same training made ready anew compiles nothing for its choice.
    monkeypatch.setattr(jax.stages.Lowered, "compile", None)
    again = prepared(jnp.arange(2.0, 7.0))
    assert choose_size(*again, None, need[2] - 1) == some
    with pytest.raises(TypeError, match="not callable"):
        memory_of(*again, 4 if some == 3 else 3)


@pytest.mark.parametrize("chunk", [1, 3])
def test_steps_one_by_one_are_those_of_the_scan(chunk, monkeypatch):
    """As convolutions need them on a CPU."""
    data = {"test": (X[:7], LABELS[:7]), "chunk": chunk}
    scanned = train(**data)
    monkeypatch.setattr(lj.training.arguments, "_may_scan", lambda *_: False)
    stepped = train(**data)
    assert relative_error(stepped.displacement, scanned.displacement) < 1e-13
    for name in ("train_loss", "train_accuracy", "test_loss", "test_accuracy"):
        np.testing.assert_allclose(getattr(stepped, name), getattr(scanned, name), rtol=1e-12)
