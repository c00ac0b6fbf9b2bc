"""What does a training step at a finite alpha cost beside the plain step of the same network, in time and memory?

A VGG-like convolutional network in float32, SGD with momentum on minibatches, an epoch of steps in one compiled scan.
The plain epoch is what one writes in JAX and optax for alpha = 1 without centring. Ours are the programs of
`lazyjax.train`: with `finite_jvp` at a finite alpha and at infinity (the tangent model, by the same program), and with
the plain difference, as the paper trained.

    python benchmarks/train_step.py
    python benchmarks/train_step.py --toy      # a size for trying out; writes nothing
"""

import argparse
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax

import harness
from finite_jvp import init_vgg, vgg
from lazyjax._train_checks import prepare
from lazyjax._train_step import Lane, start, train_epoch

TARGET = {"time": 3.0, "memory": 3.0}
OPTIMISER = optax.sgd(0.01, momentum=0.9)
SIZES = {
    "toy": {"image": 8, "channels": (4, 4, 8, 8), "hidden": 8, "batch_size": 4, "steps": 2},
    "default": {"image": 32, "channels": (32, 32, 64, 64, 128, 128), "hidden": 128, "batch_size": 64, "steps": 4},
}
Epoch = Callable[[Any, Any, jax.Array, jax.Array], Any]


def plain_epoch(batch_size: int, steps: int) -> Epoch:
    """Shuffle, then value, gradient and update, batch by batch."""

    def epoch(w: Any, memory: Any, x: jax.Array, y: jax.Array) -> Any:
        def step(carry: Any, rows: jax.Array) -> Any:
            w, memory = carry

            def loss(w: Any) -> jax.Array:
                return 0.5 * jnp.mean(jnp.sum((vgg(w, x[rows]) - y[rows]) ** 2, axis=1))

            value, gradient = jax.value_and_grad(loss)(w)
            updates, memory = OPTIMISER.update(gradient, memory, w)
            return (optax.apply_updates(w, updates), memory), value

        order = jr.permutation(jr.key(1), x.shape[0])[: steps * batch_size].reshape(steps, batch_size)
        return jax.lax.scan(step, (w, memory), order)

    return epoch


def our_epochs(w: Any, x: jax.Array, y: jax.Array, batch_size: int) -> dict[str, tuple[Callable[..., Any], Any]]:
    """The programs of `lazyjax.train` for one lane, and their arguments."""
    options = {"loss": "square", "batch_size": batch_size, "key": jr.key(1), "augment": None, "test": None}
    cases = {"finite": ("finite", 1e3), "tangent": ("finite", jnp.inf), "subtracted": ("plain", 1e3)}
    epochs = {}
    for name, (difference, alpha) in cases.items():
        made = prepare(vgg, w, x, y, OPTIMISER, alpha=alpha, difference=difference, stacked=False, **options)
        lane = Lane(made.lanes.alpha[0], made.lanes.key, made.lanes.coordinates)
        # Data, parameters and scale are arguments; functions stay outside.
        arrays, static = eqx.partition(made.course, eqx.is_array)

        def epoch(arrays: Any, lane: Lane, state: Any, static: Any = static) -> Any:
            return train_epoch(eqx.combine(arrays, static), lane, state, jnp.zeros((), jnp.uint32))

        epochs[name] = (epoch, (arrays, lane, start(made.course, lane)))
    return epochs


def peak_bytes(fn: Callable[..., Any], args: Any, donated: int) -> int:
    """Arguments, results and temporaries of a compiled program, its state handed over."""
    need = jax.jit(fn, donate_argnums=donated).lower(*args).compile().memory_analysis()
    return need.argument_size_in_bytes + need.output_size_in_bytes + need.temp_size_in_bytes - need.alias_size_in_bytes


def question(*, image: int, channels: tuple[int, ...], hidden: int, batch_size: int, steps: int, repeats: int) -> Any:
    """Times of all epochs, run in turn, and their memory, each over the plain one."""
    keys = jr.split(jr.key(0), 3)
    w = init_vgg(keys[0], image, channels, hidden)
    x = jr.normal(keys[1], (steps * batch_size, image, image, 3), jnp.float32)
    y = jr.normal(keys[2], (steps * batch_size, 10), jnp.float32)
    epochs = our_epochs(w, x, y, batch_size)
    plain = plain_epoch(batch_size, steps)
    # The state of a lane is one argument; so it is here.
    epochs = {"plain": (lambda data, state: plain(*state, *data), ((x, y), (w, OPTIMISER.init(w)))), **epochs}
    memory = {name: peak_bytes(fn, args, len(args) - 1) for name, (fn, args) in epochs.items()}
    arguments = {name: args for name, (_, args) in epochs.items()}
    fns = {name: lambda given, fn=fn, name=name: fn(*given[name]) for name, (fn, _) in epochs.items()}
    times = harness.compare(fns, arguments, repeats=repeats)
    return {
        **times,
        "steps": steps,
        "num_params": sum(leaf.size for leaf in jax.tree.leaves(w)),
        "memory_bytes": memory,
        "memory_ratios": {name: value / memory["plain"] for name, value in memory.items()},
        "target": TARGET,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--toy", action="store_true", help="a size for trying out; writes nothing")
    args = parser.parse_args()
    found = question(**SIZES["toy" if args.toy else "default"], repeats=args.repeats)
    for name, ratio in found["ratios"].items():
        print(
            f"{name:11} {1e3 * found[name]['run_s'] / found['steps']:8.1f} ms a step, {ratio:.2f} of plain; "
            f"memory {found['memory_bytes'][name] / 2**20:.0f} MiB, {found['memory_ratios'][name]:.2f} of plain; "
            f"compiled in {found[name]['compile_s']:.1f} s"
        )
    if not args.toy:
        print(harness.write("train_step", found).relative_to(harness.ROOT))


if __name__ == "__main__":
    main()
