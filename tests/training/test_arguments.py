"""What `train` refuses, each with one clear error, before any step is taken."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest

import lazyjax as lj

MLP = lj.models.mlp(jnp.tanh)
W0 = lj.models.mlp().init(jr.key(0), (3, 4, 2))
X = jr.normal(jr.key(1), (6, 3))
LABELS = jnp.array([0, 1, 0, 1, 1, 0])
MIXED = (jnp.zeros(3, jnp.float16), jnp.zeros(3))
STACKED = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), W0)


def HALF(w, x):  # noqa: N802
    return x @ (w[0].astype(x.dtype) + w[1])


def SCALAR(w, x):  # noqa: N802
    return MLP(w, x)[:, 0]


def train(f=MLP, w0=W0, x=X, y=LABELS, optimizer=optax.sgd(0.1), **options):  # noqa: B008
    return lj.train(f, w0, x, y, optimizer, **{"epochs": 1, "batch_size": 2, "key": jr.key(0), **options})


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
        ({"optimizer": 0.1}, TypeError, r"optimizer must be an optax optimizer such as optax.sgd\(0.1\), got float"),
        ({"difference": "finite"}, ValueError, 'difference must be "exact" or "plain", got \'finite\''),
        ({"difference": "plain", "alpha": jnp.inf}, ValueError, 'difference="plain" needs finite alpha'),
        ({"alpha": -1.0}, ValueError, "alpha must be a scale"),
        ({"alpha": jnp.array([1.0, 0.0])}, ValueError, "alpha must be a scale"),
        ({"alpha": jnp.ones((2, 2))}, ValueError, r"one scale or a vector of scales.*got shape \(2, 2\)"),
        ({"alpha": jnp.ones(0)}, ValueError, r"got shape \(0,\)"),
        ({"alpha": 1e200}, ValueError, r"alpha must be at most 1.3e\+154 in float64.*use alpha=jnp.inf"),
        (
            {"f": HALF, "w0": MIXED, "y": X[:, 0], "alpha": 1e7},
            ValueError,
            r"alpha must be at most 2.6e\+02 in float16",
        ),
        ({"f": HALF, "w0": MIXED, "y": X[:, 0], "alpha": 257.0}, ValueError, "the narrowest dtype of w0's arrays and"),
        ({"f": lambda w, x: MLP(w, x).astype(jnp.float16), "alpha": 1e3}, ValueError, "alpha must be at .* in float16"),
        ({"alpha": jnp.ones(3), "key": jr.split(jr.key(0), 2)}, ValueError, "got 3 of alpha, 2 of key"),
        ({"alpha": jnp.ones(3), "w0": STACKED, "stacked": True}, ValueError, "got 3 of alpha, 2 of w0"),
        ({"stacked": True}, ValueError, "with stacked=True every floating array of w0 must have a first axis"),
        (
            {"w0": (STACKED, jnp.arange(6).reshape(2, 3)), "stacked": True},
            ValueError,
            r"shared by the 2 of them, got w0\[1\] of shape \(2, 3\) and dtype int.*keep one lane of it",
        ),
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
        ({"f": SCALAR, "y": 2 * LABELS - 1, "test": (X, LABELS)}, ValueError, r"y_test must hold the signs.*\[0, 1\]"),
        ({"test": (X[:0], LABELS)}, ValueError, "x_test must hold at least one sample"),
        ({"f": lambda w, x: jnp.inf * MLP(w, x)}, ValueError, r"h\(w0\) must be finite"),
        ({"f": lambda w, x: MLP(w, x)[0]}, ValueError, "f must return one row of outputs a sample"),
    ],
)
def test_bad_arguments_are_refused(options, error, match):
    with pytest.raises(error, match=match):
        train(**options)


def test_narrow_coordinates_beside_wide_ones_are_trained_within_their_range():
    run = train(f=HALF, w0=MIXED, y=X[:, 0], alpha=200.0, epochs=4)
    assert [leaf.dtype for leaf in run.displacement] == [jnp.float16, jnp.float64]
    assert float(run.train_loss[-1]) < float(run.train_loss[0])


def test_a_test_of_one_class_has_an_accuracy():
    """Whether targets are signs, the training says."""
    signs = jnp.where(LABELS > 0, 1, -1)
    run = train(f=SCALAR, y=signs, test=(X[:2], jnp.ones(2, int)))
    outputs = lj.training.trained_outputs(SCALAR, W0, run, X[:2])
    assert float(run.test_accuracy[-1]) == float(jnp.mean(outputs > 0))
    # And a training of one class has none, whatever its test.
    assert train(f=SCALAR, y=jnp.ones(6, int), test=(X, signs)).test_accuracy is None


@pytest.mark.parametrize("alpha", [3.0, jnp.array([3.0, 30.0])])
def test_a_model_with_a_primitive_without_a_rule_is_trained_plainly_and_has_outputs(alpha):
    def f(w, x):
        square = jax.tree.leaves(w)[0].ravel()[:4].reshape(2, 2)
        return MLP(w, x) * jnp.linalg.inv(square + 3 * jnp.eye(2))[0, 0]

    run = train(f=f, alpha=alpha, difference="plain", test=(X, LABELS))
    with pytest.raises(ValueError, match="no exact rule for it"):
        lj.training.trained_outputs(f, W0, run, X)
    with pytest.raises(ValueError, match='difference must be "exact" or "plain", got \'no\''):
        lj.training.trained_outputs(f, W0, run, X, difference="no")
    outputs = lj.training.trained_outputs(f, W0, run, X, batch_size=4, difference="plain")
    loss = 0.5 * np.sum((np.asarray(outputs) - np.eye(2)[np.asarray(LABELS)]) ** 2, axis=(-2, -1)) / 6
    np.testing.assert_allclose(run.test_loss[..., -1], loss, rtol=1e-12)


def test_training_under_jit_is_refused():
    with pytest.raises(ValueError, match="call it outside jit and vmap"):
        jax.jit(lambda alpha: train(alpha=alpha).train_loss)(1.0)


def test_old_style_keys_are_keys():
    run = train(key=jr.PRNGKey(3))
    assert bool((run.train_loss == train(key=jr.key(3)).train_loss).all())


def test_schedule_is_constant_within_an_epoch():
    schedule = lj.training.inverse_time_decay(0.6, 0.5, steps_per_epoch=4)
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
        lj.training.inverse_time_decay(**{"init_value": 1.0, "beta": 1.0, "steps_per_epoch": 5, **options})


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
        lj.training.trained_outputs(MLP, given.pop("w0"), train(), **given)
