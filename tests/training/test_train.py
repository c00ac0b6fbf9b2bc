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
MLP = lj.models.mlp(jnp.tanh)
W0 = lj.models.mlp().init(jr.key(0), (3, 6, 4))
X = jr.normal(jr.key(1), (N, 3))
LABELS = jr.randint(jr.key(2), (N,), 0, 4)
TEST = (jr.normal(jr.key(3), (7, 3)), jr.randint(jr.key(4), (7,), 0, 4))
SCHEDULE = lj.training.inverse_time_decay(0.3, 1 / 3, steps_per_epoch=STEPS)
SGD = optax.sgd(SCHEDULE, momentum=0.9)


def train(f=MLP, w0=W0, x=X, y=LABELS, optimizer=SGD, **options):
    defaults = {"alpha": ALPHAS, "epochs": EPOCHS, "batch_size": BATCH, "key": KEY}
    return lj.train(f, w0, x, y, optimizer, **{**defaults, **options})


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


def direct(objective, w, optimizer=SGD, augment=None, x=X, **options):
    """A plain optax loop in w: the final parameters and the objective before every step."""

    @jax.jit
    def step(w, state, x, rows):
        value, gradient = jax.value_and_grad(objective)(w, x, rows)
        updates, state = optimizer.update(gradient, state, w)
        return optax.apply_updates(w, updates), state, value

    state, values = optimizer.init(w), []
    for rows, key in batches(**options):
        some = x[rows] if augment is None else augment(key, x[rows])
        w, state, value = step(w, state, some, rows)
        values.append(value)
    return w, np.asarray(values)


def moved(w, alpha):
    return jtu.tree_map(lambda a, b: alpha * (a - b), w, W0)


def lane_of(tree, lane):
    return jtu.tree_map(lambda leaf: leaf[lane], tree)


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
        assert relative_error(lane_of(run.displacement, lane), moved(w, alpha)) < 1e-10
        assert relative_error(lane_of(run.params, lane), w) < 1e-12
        means = alpha**2 * values.reshape(EPOCHS, STEPS).mean(axis=1)
        np.testing.assert_allclose(run.train_loss[lane], means, rtol=1e-10)


def test_measures_after_an_epoch_are_those_of_the_outputs():
    run = trained()
    outputs = lj.training.trained_outputs(MLP, W0, run, TEST[0], batch_size=3)
    for lane, alpha in enumerate(ALPHAS):
        w = lane_of(run.params, lane)
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
    assert relative_error(run.displacement, moved(w, 1.0)) < 1e-12
    np.testing.assert_allclose(run.train_loss, values.reshape(EPOCHS, STEPS).mean(axis=1), rtol=1e-12)
    assert tree_allclose(run.params, W0, rtol=0, atol=0)


@pytest.mark.standard_promotion  # optax mixes dtypes inside adam
def test_any_optimizer_takes_its_steps_in_w_and_is_refused_at_infinity_without_a_limit():
    optimizer = optax.adamw(0.02, weight_decay=0.3)
    run = train(optimizer=optimizer, alpha=10.0, loss="softmax")
    w, _ = direct(scaled_objective(10.0), W0, optimizer)
    assert relative_error(run.params, w) < 1e-10
    with pytest.raises(ValueError, match="updates are proportional to the gradients"):
        train(optimizer=optimizer, alpha=jnp.array([1.0, jnp.inf]))


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
    assert relative_error(run.displacement, moved(w, 10.0)) < 1e-10


def images_net(w, x):
    """A convolution with ReLU, a maximum of 2 x 2 pixels, a dense layer."""
    dims = ("NHWC", "HWIO", "NHWC")
    x = jax.nn.relu(jax.lax.conv_general_dilated(x, w["kernel"], (1, 1), "SAME", dimension_numbers=dims))
    x = jax.lax.reduce_window(x, np.asarray(-np.inf, x.dtype), jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    return x.reshape(x.shape[0], -1) @ w["dense"]


def images_problem(dtype, n=16):
    keys = jr.split(jr.key(11), 3)
    w0 = {"kernel": jr.normal(keys[0], (3, 3, 2, 4)) / 3, "dense": jr.normal(keys[1], (16, 3)) / 4}
    x = jr.normal(keys[2], (n, 4, 4, 2))
    return jtu.tree_map(lambda leaf: leaf.astype(jnp.float32).astype(dtype), (w0, x))


def train_images(dtype, epochs, **options):
    w0, x = images_problem(dtype)
    run = lj.train(
        images_net,
        w0,
        x,
        jnp.arange(16) % 3,
        optax.sgd(0.005, momentum=0.9),
        **{"alpha": 1e7, "epochs": epochs, "batch_size": 4, "key": KEY, "augment": lj.training.random_flip, **options},
    )
    return run, lj.training.trained_outputs(images_net, w0, run, x)


@pytest.mark.parametrize("epochs", [1, 5, 25])  # 4, 20 and 100 steps
def test_float32_at_a_large_alpha_stays_with_float64(epochs):
    """A flipped image and all: the outputs after so many steps on the same batches."""
    single, outputs = train_images(jnp.float32, epochs)
    double, truth = train_images(jnp.float64, epochs)
    assert outputs.dtype == single.train_loss.dtype == jnp.float32
    assert relative_error(outputs, truth) < 1e-5
    assert relative_error(single.displacement, double.displacement) < 1e-5
    assert float(double.train_loss[-1]) < float(double.train_loss[0]) or epochs == 1


def test_the_plain_difference_fails_in_float32_at_a_large_alpha():
    _, outputs = train_images(jnp.float32, 25, difference="plain", throw=False)
    _, truth = train_images(jnp.float64, 25)
    assert not relative_error(outputs, truth) < 0.3


@pytest.mark.parametrize("difference", ["exact", "plain"])
def test_the_start_is_exactly_zero(difference):
    """Without steps the loss toward zero targets is zero, whatever alpha makes of a residue."""
    w0, x = images_problem(jnp.float32)
    run = lj.train(
        images_net, w0, x, jnp.zeros((16, 3)), optax.sgd(0.0), alpha=1e7, epochs=1, batch_size=8, key=KEY,
        test=(x[:5], jnp.zeros((5, 3))), difference=difference,
    )  # fmt: skip
    assert float(run.train_loss[0]) == 0.0
    assert float(run.test_loss[0]) == 0.0
    assert run.train_accuracy is None


def test_a_centered_model_costs_and_is_the_same():
    run = train(f=lj.center(MLP, W0), alpha=10.0, loss="softmax")
    assert relative_error(run.displacement, lane_of(trained().displacement, 1)) < 1e-12


def test_two_classes_and_losses_of_ones_own():
    f, w0 = lj.models.two_layer(jnp.tanh), lj.models.two_layer().init(jr.key(0), d=3, width=6)
    signs = jnp.where(X[:, 0] > 0, 1, -1)
    run = lj.train(
        f, w0, X, signs, optax.sgd(0.2), loss="logistic", epochs=20, batch_size=BATCH, key=KEY, test=(X, signs)
    )
    assert float(run.train_accuracy[-1]) > 0.9
    assert float(run.test_accuracy[-1]) > 0.9
    sums = functools.partial(lj.square_loss, mean=False)
    run = train(f, w0, y=X[:, 0], loss=sums, alpha=1.0, optimizer=optax.sgd(0.1 / BATCH))
    means = train(f, w0, y=X[:, 0], alpha=1.0, optimizer=optax.sgd(0.1))
    assert relative_error(run.displacement, means.displacement) < 1e-12
    assert run.train_accuracy is None
