"""What `train` refuses, each with one clear error, before any step is taken."""

import jax
import jax.numpy as jnp
import jax.random as jr
import optax
import pytest

import lazyjax as lj

MLP = lj.mlp(jnp.tanh)
W0 = lj.init_mlp(jr.key(0), (3, 4, 2))
X = jr.normal(jr.key(1), (6, 3))
LABELS = jnp.array([0, 1, 0, 1, 1, 0])
STACKED = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), W0)


def train(f=MLP, w0=W0, x=X, y=LABELS, optimiser=optax.sgd(0.1), **options):  # noqa: B008
    return lj.train(f, w0, x, y, optimiser, **{"epochs": 1, "batch_size": 2, "key": jr.key(0), **options})


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"batch_size": 7}, ValueError, "batch_size must be a whole number from 1 to the 6 samples of x, got 7"),
        ({"batch_size": 0}, ValueError, "batch_size must be"),
        ({"batch_size": 2.0}, ValueError, r"batch_size must be a whole number.*got 2\.0"),
        ({"epochs": 0}, ValueError, "epochs must be a whole number of at least 1, got 0"),
        ({"epochs": 1.5}, ValueError, "epochs must be"),
        ({"chunk": 0}, ValueError, "chunk must be a whole number of at least 1, or None, got 0"),
        ({"memory": -1}, ValueError, "memory must be a whole number"),
        ({"optimiser": 0.1}, TypeError, r"optimiser must be an optax optimiser such as optax.sgd\(0.1\), got float"),
        ({"difference": "exact"}, ValueError, 'difference must be "finite" or "plain", got \'exact\''),
        ({"difference": "plain", "alpha": jnp.inf}, ValueError, 'difference="plain" needs finite alpha'),
        ({"alpha": -1.0}, ValueError, "alpha must be a scale"),
        ({"alpha": jnp.array([1.0, 0.0])}, ValueError, "alpha must be a scale"),
        ({"alpha": jnp.ones((2, 2))}, ValueError, r"one scale or a vector of scales.*got shape \(2, 2\)"),
        ({"alpha": jnp.ones(0)}, ValueError, r"got shape \(0,\)"),
        ({"alpha": 1e200}, ValueError, r"alpha must be at most 1.3e\+154 in float64.*use alpha=jnp.inf"),
        ({"alpha": jnp.ones(3), "key": jr.split(jr.key(0), 2)}, ValueError, "got 3 of alpha, 2 of key"),
        ({"alpha": jnp.ones(3), "w0": STACKED, "stacked": True}, ValueError, "got 3 of alpha, 2 of w0"),
        ({"stacked": True}, ValueError, "with stacked=True every floating array of w0 must have a first axis"),
        ({"key": 0}, TypeError, r"key must be a random key such as jax.random.key\(0\)"),
        ({"key": jr.split(jr.key(0), (2, 2))}, ValueError, r"key must be one random key.*\(2, 2\)"),
        ({"w0": {"a": jnp.arange(3)}}, TypeError, "w0 must hold at least one real floating array"),
        ({"x": X[:0]}, ValueError, "x must hold at least one sample"),
        ({"x": X.at[0, 0].set(jnp.nan)}, ValueError, "x must be finite"),
        ({"y": LABELS[:4]}, ValueError, "y must hold one target a sample"),
        ({"y": LABELS + 1}, ValueError, r"labels must lie in 0\.\.1"),
        ({"loss": "hinge"}, ValueError, 'loss must be "square", "softmax", "logistic"'),
        ({"loss": lj.softmax_cross_entropy(LABELS)}, TypeError, "loss must be a name or a function of the targets"),
        ({"augment": "flip"}, TypeError, r"augment must be a function of \(key, x\)"),
        ({"augment": lambda key, x: x[:1]}, ValueError, "augment must keep one input a sample"),
        ({"test": X}, ValueError, r"test must be a pair \(x_test, y_test\)"),
        ({"test": (X, LABELS[:2])}, ValueError, "y_test must hold one target a sample"),
        ({"test": (X[:0], LABELS)}, ValueError, "x_test must hold at least one sample"),
        ({"f": lambda w, x: jnp.inf * MLP(w, x)}, ValueError, r"h\(w0\) must be finite"),
        ({"f": lambda w, x: MLP(w, x)[0]}, ValueError, "f must return one row of outputs a sample"),
    ],
)
def test_bad_arguments_are_refused(options, error, match):
    with pytest.raises(error, match=match):
        train(**options)


def test_training_under_jit_is_refused():
    with pytest.raises(ValueError, match="call it outside jit and vmap"):
        jax.jit(lambda alpha: train(alpha=alpha).train_loss)(1.0)


def test_old_style_keys_are_keys():
    run = train(key=jr.PRNGKey(3))
    assert bool((run.train_loss == train(key=jr.key(3)).train_loss).all())


def test_schedule_is_constant_within_an_epoch():
    schedule = lj.inverse_time_decay(0.6, 0.5, steps_per_epoch=4)
    rates = [float(schedule(jnp.asarray(count))) for count in (0, 3, 4, 7, 8)]
    assert rates == pytest.approx([0.6, 0.6, 0.4, 0.4, 0.3], rel=1e-15)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"beta": -1.0}, "beta must be a decay per epoch of at least 0, got -1"),
        ({"beta": float("nan")}, "beta must be"),
        ({"steps_per_epoch": 0}, "steps_per_epoch must be a whole number of at least 1"),
        ({"steps_per_epoch": 2.5}, "steps_per_epoch must be"),
    ],
)
def test_bad_schedules_are_refused(options, match):
    with pytest.raises(ValueError, match=match):
        lj.inverse_time_decay(**{"init_value": 1.0, "beta": 1.0, "steps_per_epoch": 5, **options})


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"batch_size": 0}, "batch_size must be a whole number of at least 1"),
        ({"x": X[:0]}, "x must hold at least one sample"),
        ({"w0": STACKED}, "w0 must be the start of the training"),
    ],
)
def test_outputs_of_what_was_not_trained_are_refused(options, match):
    given = {"w0": W0, "x": X, **options}
    with pytest.raises(ValueError, match=match):
        lj.trained_outputs(MLP, given.pop("w0"), train(), **given)
