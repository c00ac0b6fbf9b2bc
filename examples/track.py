"""How lazy is my training? `lazyjax.track` in three training loops: plain optax, Flax and Equinox.

    python examples/track.py optax
    python examples/track.py flax         (needs `pip install flax`)
    python examples/track.py equinox

Each trains a small network on the handwritten digits that come with scikit-learn, and asks the tracker every few
steps how far it is from training lazily.
"""

import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

import lazyjax as lj
from lazyjax.data.datasets import digits


def cross_entropy(logits, labels):
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))


def with_optax(x, labels, probe, steps):
    """Parameters in a plain pytree, a model that shows its pre-activations: their stability is tracked too."""
    f, params = lj.models.mlp(jax.nn.relu), lj.models.mlp().init(jax.random.key(0), (x.shape[1], 64, 64, 10))
    tracker = lj.track(f, params, probe)
    optimizer = optax.sgd(0.1, momentum=0.9)
    state = optimizer.init(params)

    @jax.jit
    def step(params, state):
        gradient = jax.grad(lambda w: cross_entropy(f(w, x), labels))(params)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(steps):
        params, state = step(params, state)
        yield tracker(params)


def with_flax(x, labels, probe, steps):
    """A linen module and a TrainState; the tracker takes what `apply` takes."""
    import flax_cnn
    from flax.training.train_state import TrainState

    apply, variables = flax_cnn.build(jax.random.key(0))
    tracker = lj.track(apply, variables, probe)
    state = TrainState.create(apply_fn=apply, params=variables, tx=optax.sgd(0.05, momentum=0.9))

    @jax.jit
    def step(state):
        gradient = jax.grad(lambda w: cross_entropy(state.apply_fn(w, x), labels))(state.params)
        return state.apply_gradients(grads=gradient)

    for _ in range(steps):
        state = step(state)
        yield tracker(state.params)


def with_equinox(x, labels, probe, steps):
    """A module is its own tree of parameters: f(model, x) is all that the tracker needs."""
    import equinox_cnn

    def f(model, x):
        return jax.vmap(model)(x.reshape(-1, 1, equinox_cnn.SIDE, equinox_cnn.SIDE))

    model = equinox_cnn.CNN(jax.random.key(0))
    tracker = lj.track(f, model, probe)
    optimizer = optax.sgd(0.05, momentum=0.9)
    state = optimizer.init(eqx.filter(model, eqx.is_inexact_array))

    @eqx.filter_jit
    def step(model, state):
        gradient = eqx.filter_grad(lambda m: cross_entropy(f(m, x), labels))(model)
        updates, state = optimizer.update(gradient, state, eqx.filter(model, eqx.is_inexact_array))
        return eqx.apply_updates(model, updates), state

    for _ in range(steps):
        model, state = step(model, state)
        yield tracker(model)


LOOPS = {"optax": with_optax, "flax": with_flax, "equinox": with_equinox}


def main(name, samples=256, steps=100):
    data = digits(samples)
    print("step   |w - w0|/|w0|   linearization error   kernel drift   alignment   stability")
    for i, now in enumerate(LOOPS[name](data.x, data.y, data.x[:16], steps), start=1):
        if i in (1, 2, 5, 10, 20, 50) or i == steps:
            stability = "-" if now.stability is None else f"{100 * now.stability:.1f} %"
            print(
                f"{i:4d} {now.relative_displacement:14.4f} {100 * now.relative_error:18.1f} % "
                f"{100 * now.kernel_drift:13.1f} % {now.kernel_alignment:11.3f} {stability:>11}"
            )


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "optax")
