"""What `train` refuses, each with one clear error, before anything is compiled."""

import inspect

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest

import lazyjax as lj
from lazyjax.training.arguments import make_lanes, make_setup
from problems import normal
from shared_training import LABELS as CLASSES  # of the shared training, which is compiled already
from shared_training import MLP, SGD, W0, key, start, train, trained
from shared_training import X as INPUTS

X = normal(1, 6, 3)
REAL = np.asarray(X)[:, 0]
LABELS = np.array([0, 1, 0, 1, 1, 0])
STACKED = jax.tree.map(lambda *leaves: jnp.asarray(np.stack(leaves)), start(0), start(1))
MIXED = (jnp.asarray(np.zeros(3, np.float16)), jnp.asarray(np.zeros(3)))
OPTIONS = ("augment", "difference", "stacked", "chunk", "memory", "folder", "progress")


def HALF(w, x):  # noqa: N802
    return x @ (w[0].astype(x.dtype) + w[1])


def SCALAR(w, x):  # noqa: N802
    return MLP(w, x)[:, 0]


def key2(*more):
    """Two random keys, or more."""
    return jr.wrap_key_data(jnp.asarray(np.zeros((2, *more, 2), np.uint32)))


def attempt(**given):
    """A training of 6 samples, fields of its options among the keywords."""
    given = {"x": X, "y": LABELS, "alpha": 1.0, "epochs": 1, "batch_size": 2, **given}
    options = {name: given.pop(name) for name in OPTIONS if name in given}
    if "options" in given:
        return lj.train(MLP, W0, X, LABELS, SGD, epochs=1, key=key(), options=given["options"])
    return train(options=options, **given)


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
        ({"options": {"chunk": 2}}, TypeError, "options must be a lazyjax.training.TrainingOptions, got dict"),
        ({"stacked": "yes"}, TypeError, "stacked must be True or False, got 'yes'"),
        ({"folder": 3}, TypeError, "folder must be a path or None, got int"),
        ({"difference": "finite"}, ValueError, 'difference must be "exact" or "plain", got \'finite\''),
        ({"difference": "plain", "alpha": jnp.inf}, ValueError, 'difference="plain" needs finite alpha'),
        ({"alpha": -1.0}, ValueError, "alpha must be a scale"),
        ({"alpha": np.array([1.0, 0.0])}, ValueError, "alpha must be a scale"),
        ({"alpha": np.ones((2, 2))}, ValueError, r"one scale or a vector of scales.*got shape \(2, 2\)"),
        ({"alpha": np.ones(0)}, ValueError, r"got shape \(0,\)"),
        ({"alpha": 1e200}, ValueError, r"alpha must be at most 1.3e\+154 in float64.*use alpha=jnp.inf"),
        (
            {"f": HALF, "w0": MIXED, "y": REAL, "alpha": 1e7},
            ValueError,
            r"alpha must be at most 2.6e\+02 in float16",
        ),
        (
            {"f": HALF, "w0": MIXED, "y": REAL, "alpha": 257.0},
            ValueError,
            "the narrowest dtype of w0's arrays, whose",
        ),
        ({"f": lambda w, x: MLP(w, x).astype(jnp.float16), "alpha": 1e3}, ValueError, "alpha must be at .* in float16"),
        ({"alpha": np.ones(3), "key": key2()}, ValueError, "got 3 of alpha, 2 of key"),
        ({"alpha": np.ones(3), "w0": STACKED, "stacked": True}, ValueError, "got 3 of alpha, 2 of w0"),
        ({"stacked": True}, ValueError, "with stacked=True every floating array of w0 must have a first axis"),
        (
            {"w0": (STACKED, jnp.asarray(np.arange(6).reshape(2, 3))), "stacked": True},
            ValueError,
            r"shared by the 2 of them, got w0\[1\] of shape \(2, 3\) and dtype int.*keep one lane of it",
        ),
        ({"key": 0}, TypeError, r"key must be a random key such as jax.random.key\(0\)"),
        ({"key": key2(2)}, ValueError, r"key must be one random key.*\(2, 2\)"),
        ({"w0": {"a": np.arange(3)}}, TypeError, "w0 must hold at least one real floating array"),
        ({"x": np.ones((0, 3))}, ValueError, "x must hold at least one sample"),
        ({"x": np.where(np.arange(18).reshape(6, 3) == 0, np.nan, X)}, ValueError, "x must be finite"),
        ({"y": LABELS[:4]}, ValueError, "y must hold one target per sample|one target a sample"),
        ({"y": LABELS + 3}, ValueError, r"labels must lie in 0\.\.3"),
        ({"loss": "hinge"}, ValueError, 'loss must be "square", "softmax", "logistic"'),
        (
            {"loss": lj.softmax_cross_entropy(jnp.asarray(LABELS))},
            TypeError,
            "loss must be a name or a function of the targets",
        ),
        ({"augment": "flip"}, TypeError, r"augment must be a function of \(key, x\)"),
        ({"augment": lambda key, x: x[:1]}, ValueError, "augment must keep one input per sample"),
        ({"test": X}, ValueError, r"test must be a pair \(x_test, y_test\)"),
        ({"test": (X, LABELS[:2])}, ValueError, "y_test must hold one target per sample|one target a sample"),
        ({"f": SCALAR, "y": 2 * LABELS - 1, "test": (X, LABELS)}, ValueError, r"y_test must hold the signs.*\[0, 1\]"),
        ({"test": (np.ones((0, 3)), LABELS)}, ValueError, "x_test must hold at least one sample"),
        ({"f": lambda w, x: MLP(w, x)[0]}, ValueError, "f must return one row of outputs (a|per) sample"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_compiled(options, error, match, untyped, monkeypatch):
    monkeypatch.setattr("lazyjax.training.arguments._check_first_step", None)
    with pytest.raises(error, match=match):
        attempt(**options)


def test_what_goes_wrong_at_the_start_is_refused():
    with pytest.raises(ValueError, match=r"h\(w0\) must be finite"):
        attempt(f=lambda w, x: jnp.inf * MLP(w, x))


def test_an_optimizer_without_a_limit_is_refused_at_infinity(monkeypatch):
    """By the check that descents have too."""

    def refuse(optimizer, coordinates):
        msg = f"{optimizer is SGD} {[leaf.shape for leaf in jax.tree.leaves(coordinates)]}"
        raise ValueError(msg)

    monkeypatch.setattr("lazyjax.training.arguments.check_proportional", refuse)
    with pytest.raises(ValueError, match=r"True \[\(6,\), \(6, 3\), \(4,\), \(4, 6\)\]"):
        attempt(alpha=np.array([1.0, np.inf]), w0=STACKED, stacked=True)


def test_a_misplaced_keyword_is_an_error_of_python():
    with pytest.raises(TypeError, match="unexpected keyword argument 'chunk'"):
        lj.train(MLP, W0, X, LABELS, SGD, epochs=1, key=key(), chunk=2)
    with pytest.raises(TypeError, match="unexpected keyword argument 'alpha'"):
        lj.training.TrainingOptions(alpha=2.0)
    assert len(inspect.signature(lj.train).parameters) <= 13


def test_narrow_coordinates_next_to_wide_ones_are_trained_within_their_range():
    run = attempt(f=HALF, w0=MIXED, y=REAL, alpha=200.0, epochs=4, optimizer=optax.sgd(0.1))
    assert [leaf.dtype for leaf in run.displacement] == [jnp.float16, jnp.float64]
    assert run.loss[-1] < run.loss[0]


def test_whether_targets_are_signs_the_training_says():
    def setup(y, y_test):
        lanes = make_lanes(1.0, key(), W0)
        given = {"batch_size": 2, "test": (X, y_test), "options": lj.training.TrainingOptions()}
        return make_setup(SCALAR, W0, X, y, SGD, lanes, loss="square", **given)

    signs, ones = np.where(LABELS > 0, 1, -1), np.ones(6, int)
    # A test of one class has an accuracy.
    test = setup(signs, ones).test
    outputs = np.array([1.0, -1.0, 2.0, 3.0, -0.5, 0.1])
    assert float(test.task.share(jnp.asarray(outputs), test.task.targets)) == pytest.approx(4 / 6)
    # And a training of one class has none, whatever its test.
    assert setup(ones, signs).test.task.right is None


def inverse_net(w, x):
    square = w[0]["weight"].ravel()[:4].reshape(2, 2)
    return MLP(w, x) * jnp.linalg.inv(square + 3 * jnp.eye(2))[0, 0]


def test_a_model_with_linear_algebra_is_trained_plainly_and_has_outputs():
    run = attempt(f=inverse_net, alpha=np.array([3.0, 30.0]), difference="plain", test=(X, LABELS))
    with pytest.raises(ValueError, match='difference must be "exact" or "plain", got \'no\''):
        lj.training.trained_outputs(inverse_net, W0, run, X, difference="no")
    outputs = lj.training.trained_outputs(inverse_net, W0, run, X, batch_size=4, difference="plain")
    exact = lj.training.trained_outputs(inverse_net, W0, run, X, batch_size=4)
    np.testing.assert_allclose(outputs, exact, rtol=1e-8, atol=1e-10)
    loss = 0.5 * np.sum((np.asarray(outputs) - np.eye(4)[LABELS]) ** 2, axis=(-2, -1)) / 6
    np.testing.assert_allclose(np.asarray(run.test_loss)[:, -1], loss, rtol=1e-12)


def test_training_under_jit_is_refused():
    with pytest.raises(ValueError, match="call it outside jit and vmap"):
        jax.jit(lambda alpha: attempt(alpha=alpha).loss)(1.0)
    with pytest.raises(ValueError, match="call it outside jit and vmap"):
        jax.jit(lambda x: attempt(x=x).loss)(X)


def test_old_style_keys_are_keys():
    old = jnp.asarray(np.asarray(jr.key_data(key())))
    np.testing.assert_array_equal(train(y=CLASSES, alpha=10.0, key=old).loss, np.asarray(trained().loss)[1])


def test_schedule_is_constant_within_an_epoch():
    schedule = lj.training.inverse_time_decay(0.6, 0.5, steps_per_epoch=4)
    rates = [float(schedule(np.asarray(count))) for count in (0, 3, 4, 7, 8)]
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
def test_bad_schedules_are_refused(options, match, untyped):
    with pytest.raises(ValueError, match=match):
        lj.training.inverse_time_decay(**{"init_value": 1.0, "beta": 1.0, "steps_per_epoch": 5, **options})


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"batch_size": 0}, "batch_size must be a whole number of at least 1"),
        ({"x": np.ones((0, 3))}, "x must hold at least one sample"),
        ({"w0": [*W0, *W0]}, "w0 must be the start of the training"),
    ],
)
def test_outputs_of_what_was_not_trained_are_refused(options, match):
    given = {"w0": W0, "x": INPUTS, **options}
    with pytest.raises(ValueError, match=match):
        lj.training.trained_outputs(MLP, given.pop("w0"), trained(), **given)
