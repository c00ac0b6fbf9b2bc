"""Minibatch training in u = alpha (w - w0): it is that in w, at every scale, lane by lane; and its refusals."""

import functools

import diffrax
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import optax
import pytest

import lazyjax as lj
from helpers import relative_error, tree_allclose

N, BATCH, EPOCHS = 23, 5, 4  # 3 samples fill no batch
STEPS = N // BATCH
ALPHAS = jnp.array([1.0, 10.0, 100.0])
KEY = jr.key(7)
MLP = lj.mlp(jnp.tanh)
W0 = lj.init_mlp(jr.key(0), (3, 6, 4))
X = jr.normal(jr.key(1), (N, 3))
LABELS = jr.randint(jr.key(2), (N,), 0, 4)
TEST = (jr.normal(jr.key(3), (7, 3)), jr.randint(jr.key(4), (7,), 0, 4))
SCHEDULE = lj.inverse_time_decay(0.3, 1 / 3, steps_per_epoch=STEPS)
SGD = optax.sgd(SCHEDULE, momentum=0.9)


def train(f=MLP, w0=W0, x=X, y=LABELS, optimiser=SGD, **options):
    defaults = {"alpha": ALPHAS, "epochs": EPOCHS, "batch_size": BATCH, "key": KEY}
    return lj.train(f, w0, x, y, optimiser, **{**defaults, **options})


@functools.cache
def trained(loss="softmax", **options):
    return train(loss=loss, test=TEST, **options)


def batches(n=N, batch_size=BATCH, epochs=EPOCHS, key=KEY):
    """The rows, and the key of the augmentation, of every batch in turn."""
    for epoch in range(epochs):
        key_order, key_augment = jr.split(jr.fold_in(key, epoch))
        steps = n // batch_size
        rows = jr.permutation(key_order, n)[: steps * batch_size].reshape(steps, batch_size)
        yield from zip(rows, jr.split(key_augment, steps), strict=True)


def direct(objective, w, optimiser=SGD, augment=None, x=X, **options):
    """A plain optax loop in w: the final parameters and the objective before every step."""

    @jax.jit
    def step(w, state, x, rows):
        value, gradient = jax.value_and_grad(objective)(w, x, rows)
        updates, state = optimiser.update(gradient, state, w)
        return optax.apply_updates(w, updates), state, value

    state, values = optimiser.init(w), []
    for rows, key in batches(**options):
        some = x[rows] if augment is None else augment(key, x[rows])
        w, state, value = step(w, state, some, rows)
        values.append(value)
    return w, np.asarray(values)


def scaled_objective(alpha, loss="softmax"):
    """F_alpha on a batch, written down."""

    def objective(w, x, rows):
        y = alpha * (MLP(w, x) - MLP(W0, x))
        labels = jax.nn.one_hot(LABELS[rows], 4)
        if loss == "softmax":
            terms = -jnp.sum(labels * jax.nn.log_softmax(y), axis=1)
        else:
            terms = 0.5 * jnp.sum((y - labels) ** 2, axis=1)
        return jnp.mean(terms) / alpha**2

    return objective


@pytest.mark.parametrize("loss", ["softmax", "square"])
def test_training_in_u_is_plain_optax_in_w(loss):
    run = trained(loss)
    for lane, alpha in enumerate(ALPHAS):
        w, values = direct(scaled_objective(alpha, loss), W0)
        moved = jtu.tree_map(lambda a, b: alpha * (a - b), w, W0)
        assert relative_error(jtu.tree_map(lambda leaf: leaf[lane], run.displacement), moved) < 1e-10
        assert relative_error(jtu.tree_map(lambda leaf: leaf[lane], run.params), w) < 1e-12
        means = alpha**2 * values.reshape(EPOCHS, STEPS).mean(axis=1)
        np.testing.assert_allclose(run.train_loss[lane], means, rtol=1e-10)


def test_measures_after_an_epoch_are_those_of_the_outputs():
    run = trained()
    outputs = lj.trained_outputs(MLP, W0, run, TEST[0], batch_size=3)
    for lane, alpha in enumerate(ALPHAS):
        w = jtu.tree_map(lambda leaf, lane=lane: leaf[lane], run.params)
        np.testing.assert_allclose(outputs[lane], alpha * (MLP(w, TEST[0]) - MLP(W0, TEST[0])), rtol=1e-9, atol=1e-12)
        loss = lj.softmax_cross_entropy(TEST[1])(outputs[lane])
        np.testing.assert_allclose(run.test_loss[lane, -1], loss, rtol=1e-12)
        right = np.mean(np.argmax(outputs[lane], axis=1) == np.asarray(TEST[1]))
        assert float(run.test_accuracy[lane, -1]) == pytest.approx(right)
    assert run.train_accuracy.shape == run.test_accuracy.shape == (3, EPOCHS)
    assert run.epochs == EPOCHS
    assert bool((run.result == diffrax.RESULTS.successful).all())


def test_at_infinity_the_tangent_model_is_trained():
    def objective(w, x, rows):
        y = lj.linearize(lambda w: MLP(w, x) - MLP(W0, x), W0)(w)
        return 0.5 * jnp.mean(jnp.sum((y - jax.nn.one_hot(LABELS[rows], 4)) ** 2, axis=1))

    run = train(alpha=jnp.inf)
    w, values = direct(objective, W0)
    assert relative_error(run.displacement, jtu.tree_map(jnp.subtract, w, W0)) < 1e-12
    np.testing.assert_allclose(run.train_loss, values.reshape(EPOCHS, STEPS).mean(axis=1), rtol=1e-12)
    assert tree_allclose(run.params, W0, rtol=0, atol=0)


@pytest.mark.standard_promotion  # optax mixes dtypes inside adam
@pytest.mark.parametrize("optimiser", [optax.adam(0.02), optax.adamw(0.02, weight_decay=0.3)], ids=["adam", "adamw"])
def test_any_optimiser_takes_its_steps_in_w_and_is_refused_at_infinity_without_a_limit(optimiser):
    run = train(optimiser=optimiser, alpha=10.0, loss="softmax")
    w, _ = direct(scaled_objective(10.0), W0, optimiser)
    assert relative_error(run.params, w) < 1e-10
    with pytest.raises(ValueError, match="updates are proportional to the gradients"):
        train(optimiser=optimiser, alpha=jnp.array([1.0, jnp.inf]))


def test_the_plain_difference_is_the_same_where_it_has_digits():
    run, plain = trained(), train(loss="softmax", test=TEST, difference="plain")
    assert relative_error(plain.displacement, run.displacement) < 1e-9
    assert relative_error(plain.test_loss, run.test_loss) < 1e-10
    assert not any(leaf.is_deleted() for leaf in jtu.tree_leaves((W0, X, LABELS)))


def test_augmented_batches_are_what_their_key_makes_of_them():
    def turn(key, x):
        return x * jr.rademacher(key, x.shape, x.dtype)

    run = train(alpha=10.0, loss="softmax", augment=turn)
    w, _ = direct(scaled_objective(10.0), W0, augment=turn)
    assert relative_error(run.displacement, jtu.tree_map(lambda a, b: 10.0 * (a - b), w, W0)) < 1e-10


@pytest.mark.parametrize("chunk", [1, 2, None], ids=["one by one", "two and one", "by memory"])
def test_lanes_are_single_runs_however_they_are_grouped(chunk):
    options = {"memory": 2**30} if chunk is None else {"chunk": chunk}
    run = trained(**options)
    assert relative_error(run.displacement, trained(chunk=3).displacement) < 1e-12
    alone = train(loss="softmax", alpha=10.0)
    assert relative_error(jtu.tree_map(lambda leaf: leaf[1], run.displacement), alone.displacement) < 1e-12
    assert alone.train_loss.shape == (EPOCHS,)
