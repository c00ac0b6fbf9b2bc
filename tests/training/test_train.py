"""Minibatch training in u = alpha (w - w0): it is that in w, at every scale, lane by lane."""

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
from problems import normal
from shared_training import ALPHAS, BATCH, EPOCHS, LABELS, MLP, SGD, STEPS, TEST, W0, N, X

from shared_training import forward, key, lane_of, train, trained  # isort: skip


def turn(key, x):
    """An augmentation: random signs."""
    return x * jr.rademacher(key, x.shape, x.dtype)


@functools.partial(jax.jit, static_argnames=("objective", "optimizer", "augment"))
def direct(alpha, *, objective, optimizer=SGD, augment=None):
    """A plain optax loop in w: the final parameters and the objective before every step."""
    keys = jax.vmap(lambda epoch: jr.split(jr.fold_in(key(), epoch)))(jnp.arange(EPOCHS, dtype=jnp.uint32))
    orders = jax.vmap(lambda key: jr.permutation(key, N)[: STEPS * BATCH].reshape(STEPS, BATCH))(keys[:, 0])
    augments = jax.vmap(lambda key: jr.split(key, STEPS))(keys[:, 1])

    def step(carry, batch):
        (w, state), (rows, key) = carry, batch
        x = X[rows] if augment is None else augment(key, X[rows])
        value, gradient = jax.value_and_grad(objective)(w, alpha, x, jax.nn.one_hot(LABELS[rows], 4))
        updates, state = optimizer.update(gradient, state, w)
        return (optax.apply_updates(w, updates), state), value

    batches = (orders.reshape(-1, BATCH), augments.ravel())
    (w, _), values = jax.lax.scan(step, (W0, optimizer.init(W0)), batches)
    return w, values


def softmax(w, alpha, x, rows):
    """F_alpha on a batch, written down."""
    y = alpha * (MLP(w, x) - MLP(W0, x))
    return -jnp.mean(jnp.sum(rows * jax.nn.log_softmax(y), axis=1)) / alpha**2


def square(w, alpha, x, rows):
    y = alpha * (MLP(w, x) - MLP(W0, x))
    return jnp.mean(0.5 * jnp.sum((y - rows) ** 2, axis=1)) / alpha**2


def square_of_tangent(w, alpha, x, rows):
    _, y = jax.jvp(lambda w: MLP(w, x), (W0,), (jtu.tree_map(jnp.subtract, w, W0),))
    return jnp.mean(0.5 * jnp.sum((y - rows) ** 2, axis=1))


def moved(w, alpha):
    return jtu.tree_map(lambda a, b: alpha * (np.asarray(a) - np.asarray(b)), w, W0)


def test_training_in_u_is_plain_optax_in_w():
    run = trained()
    for lane, alpha in enumerate(ALPHAS[:2]):
        w, values = direct(alpha, objective=square)
        assert relative_error(lane_of(run.displacement, lane), moved(w, alpha)) < 1e-10
        assert relative_error(lane_of(run.params, lane), w) < 1e-12
        means = alpha**2 * np.asarray(values).reshape(EPOCHS, STEPS).mean(axis=1)
        np.testing.assert_allclose(np.asarray(run.loss)[lane], means, rtol=1e-10)


def test_at_infinity_the_tangent_model_is_trained():
    run = trained()
    w, values = direct(1.0, objective=square_of_tangent)
    assert relative_error(lane_of(run.displacement, 2), moved(w, 1.0)) < 1e-12
    np.testing.assert_allclose(
        np.asarray(run.loss)[2], np.asarray(values).reshape(EPOCHS, STEPS).mean(axis=1), rtol=1e-12
    )
    assert tree_allclose(lane_of(run.params, 2), jtu.tree_map(np.asarray, W0), rtol=0, atol=0)


def test_measures_after_an_epoch_are_those_of_the_outputs():
    run = trained()
    outputs = np.asarray(lj.training.trained_outputs(MLP, W0, run, TEST[0], batch_size=3))
    labels = np.asarray(TEST[1])
    for lane, alpha in enumerate(ALPHAS[:2]):
        truth = alpha * (forward(lane_of(run.params, lane), TEST[0]) - forward(W0, TEST[0]))
        np.testing.assert_allclose(outputs[lane], truth, rtol=1e-9, atol=1e-12)
        losses = 0.5 * np.sum((truth - np.eye(4)[labels]) ** 2, axis=1)
        assert np.asarray(run.test_loss)[lane, -1] == pytest.approx(losses.mean(), rel=1e-9)
        assert np.asarray(run.test_accuracy)[lane, -1] == pytest.approx(np.mean(truth.argmax(axis=1) == labels))
    assert run.accuracy.shape == run.test_accuracy.shape == (3, EPOCHS)
    assert run.epochs == EPOCHS
    assert np.asarray(run.result == diffrax.RESULTS.successful).all()


@pytest.mark.standard_promotion  # optax mixes dtypes inside adam
def test_any_optimizer_takes_its_steps_in_w_on_augmented_batches():
    optimizer = optax.adamw(0.02, weight_decay=0.3)
    run = train(optimizer=optimizer, alpha=10.0, loss="softmax", options={"augment": turn})
    w, _ = direct(10.0, objective=softmax, optimizer=optimizer, augment=turn)
    assert relative_error(run.params, w) < 1e-10


def test_the_plain_difference_is_the_same_where_it_has_digits():
    run, plain = trained(), train(alpha=ALPHAS[:2], test=TEST, options={"difference": "plain"})
    assert relative_error(plain.displacement, lane_of(run.displacement, slice(2))) < 1e-9
    assert relative_error(plain.test_loss, np.asarray(run.test_loss)[:2]) < 1e-10
    assert not any(leaf.is_deleted() for leaf in jtu.tree_leaves((W0, X, LABELS)))


def test_a_centered_model_costs_and_is_the_same():
    run = train(f=lj.center(MLP, W0), alpha=10.0)
    assert relative_error(run.displacement, lane_of(trained().displacement, 1)) < 1e-12


# ---- a convolutional network in float32 at a large alpha ----

ALPHA = 1e7


def images_net(w, x):
    """A convolution with ReLU, a maximum of 2 x 2 pixels, a dense layer."""
    dims = ("NHWC", "HWIO", "NHWC")
    x = jax.nn.relu(jax.lax.conv_general_dilated(x, w["kernel"], (1, 1), "SAME", dimension_numbers=dims))
    x = jax.lax.reduce_window(x, np.asarray(-np.inf, x.dtype), jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    return x.reshape(x.shape[0], -1) @ w["dense"]


def images_problem(dtype):
    shapes = {"kernel": (3, 3, 2, 4), "dense": (16, 3)}
    rng = np.random.default_rng(11)
    w0 = {name: normal(rng, *shape, scale=1 / 3, dtype=jnp.float32) for name, shape in shapes.items()}
    x = normal(rng, 16, 4, 4, 2, dtype=jnp.float32)
    return jtu.tree_map(lambda leaf: jnp.asarray(np.asarray(leaf).astype(dtype)), (w0, x))


# No step in the first epoch: what is measured there is the start.
STILL_FIRST = optax.sgd(lambda count: jnp.where(count < 4, 0.0, 0.005), momentum=0.9)
CLASSES = np.arange(16) % 3


@functools.cache
def train_images(dtype, epochs, difference="exact"):
    """The training, and its outputs at the end."""
    w0, x = images_problem(np.dtype(dtype))
    options = lj.training.TrainingOptions(augment=lj.training.random_flip, difference=difference)
    run = lj.train(
        images_net,
        w0,
        x,
        CLASSES,
        STILL_FIRST,
        epochs=epochs,
        key=key(),
        batch_size=4,
        alpha=ALPHA,
        throw=False,
        options=options,
    )
    return run, lj.training.trained_outputs(images_net, w0, run, x)


@pytest.mark.parametrize("epochs", [2, 6, 26])  # 4, 20 and 100 steps
def test_float32_at_a_large_alpha_stays_with_float64(epochs):
    """A flipped image and all: the outputs after so many steps on the same batches."""
    single, outputs = train_images(jnp.float32, epochs)
    double, truth = train_images(jnp.float64, epochs)
    assert outputs.dtype == single.loss.dtype == jnp.float32
    assert relative_error(outputs, truth) < 1e-5
    assert relative_error(single.displacement, double.displacement) < 1e-5
    assert np.asarray(double.loss)[-1] < np.asarray(double.loss)[0] or epochs == 2


def test_the_plain_difference_fails_in_float32_at_a_large_alpha():
    _, outputs = train_images(jnp.float32, 26, difference="plain")
    _, truth = train_images(jnp.float64, 26)
    assert not relative_error(outputs, truth) < 0.3


@pytest.mark.parametrize("difference", ["exact", "plain"])
def test_the_start_is_exactly_zero(difference):
    """Zero outputs are half the square of a one-hot row from it, whatever alpha makes of a residue."""
    run, _ = train_images(jnp.float32, 26, difference=difference)
    assert np.asarray(run.loss)[0] == 0.5


# ---- losses ----


def test_two_classes_have_signs():
    f, signs = lj.models.two_layer(jnp.tanh), np.where(np.asarray(X)[:, 0] > 0, 1, -1)
    w0 = {"a": normal(5, 6), "b": normal(6, 6, 3)}
    run = train(f, w0, X, signs, optax.sgd(0.2), loss="logistic", alpha=1.0, epochs=20, test=(X, signs))
    assert np.asarray(run.accuracy)[-1] > 0.9
    assert np.asarray(run.test_accuracy)[-1] > 0.9


def linear(w, x):
    return x @ w


def test_a_loss_and_an_optimizer_of_ones_own_are_taken_on_every_batch():
    """Summed squares of a linear model: gradient descent by NumPy on the whole data; the state is a Python number."""
    y, w = np.asarray(X)[:, 0] + 1.0, np.zeros(3)
    sums = functools.partial(lj.square_loss, mean=False)
    own = optax.GradientTransformation(lambda w: 0, lambda g, count, w=None: (-0.01 * g, count + 1))
    run = train(linear, jnp.zeros(3), X, y, own, loss=sums, alpha=1.0, batch_size=N)
    losses = []
    for _ in range(EPOCHS):
        residual = np.asarray(X) @ w - y
        losses.append(0.5 * np.sum(residual**2))
        w = w - 0.01 * np.asarray(X).T @ residual
    assert relative_error(run.params, w) < 1e-12
    np.testing.assert_allclose(run.loss, losses, rtol=1e-12)
    assert run.accuracy is None


def test_a_line_search_sees_the_objective_in_w():
    """From a step that is much too long, of w itself: its values are those of R over alpha^2."""
    optimizer = optax.chain(optax.sgd(30.0), optax.scale_by_backtracking_linesearch(20))
    given = {"alpha": 3.0, "batch_size": N, "epochs": 5, "options": {"difference": "plain"}}
    run = train(linear, jnp.zeros(3), X, np.asarray(X)[:, 0], optimizer, **given)
    assert (np.diff(run.loss) < 0).all()


# ---- printing ----


def test_a_training_prints_its_last_epoch_lane_by_lane():
    run = trained()
    lines = str(run).splitlines()
    assert lines[0] == f"Training of {EPOCHS} epochs; the last one:"
    assert lines[1].split() == ["alpha", "loss", "accuracy", "test_loss", "test_accuracy"]
    assert [line.split()[0] for line in lines[2:]] == ["1", "10", "inf"]
    assert lines[3].split()[1] == f"{np.asarray(run.loss)[1, -1]:.4g}"
    assert repr(run) == str(run)
    jax.eval_shape(lambda run: (str(run), run.loss)[1], run)  # inside a trace there are shapes
