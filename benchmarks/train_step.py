"""What does a training step at a finite alpha cost compared with a plain step of the same network, in time and memory?

A VGG-like convolutional network in float32, SGD with momentum, one step on a batch drawn by its rows. The plain step
is what one writes in JAX and optax for alpha = 1 without centering. Ours are those of `lazyjax.train`: with
`finite_jvp` at a finite alpha and at infinity (the tangent model, by the same program), and with the plain difference,
as the paper trained. (On a CPU `train` runs its steps one by one for such a network, elsewhere in a scan.)

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
from lazyjax.training.arguments import TrainingOptions, make_lanes, make_setup
from lazyjax.training.step import train_step

TARGET = {"time": 3.0, "memory": 3.0}
OPTIMIZER = optax.sgd(0.01, momentum=0.9)
SIZES = {
    "toy": {"image": 8, "channels": (4, 4, 8, 8), "hidden": 8, "batch_size": 4},
    "default": {"image": 32, "channels": (32, 32, 64, 64, 128, 128), "hidden": 128, "batch_size": 64},
}
Step = tuple[Callable[..., Any], tuple[Any, Any]]


def plain_step(w: Any, x: jax.Array, y: jax.Array, rows: jax.Array) -> Step:
    """Return a step of value, gradient and update; its data and its state."""

    def step(data: Any, state: Any) -> Any:
        (x, y, rows), (w, memory) = data, state

        def loss(w: Any) -> jax.Array:
            return 0.5 * jnp.mean(jnp.sum((vgg(w, x[rows]) - y[rows]) ** 2, axis=1))

        value, gradient = jax.value_and_grad(loss)(w)
        updates, memory = OPTIMIZER.update(gradient, memory, w)
        return (optax.apply_updates(w, updates), memory), value

    return step, ((x, y, rows), (w, OPTIMIZER.init(w)))


def our_step(w: Any, x: jax.Array, y: jax.Array, rows: jax.Array, difference: str, alpha: float) -> Step:
    """Return the step of `lazyjax.train` for one lane."""
    lanes = make_lanes(alpha, jr.key(1), w)
    given = {"loss": "square", "batch_size": rows.size, "test": None}
    setup = make_setup(vgg, w, x, y, OPTIMIZER, lanes, **given, options=TrainingOptions(difference=difference))
    lane = lanes.parts._replace(alpha=lanes.alpha[0])
    # Data, parameters and scale are arguments; functions stay outside.
    arrays, static = eqx.partition(setup, eqx.is_array)

    def step(data: Any, state: Any) -> Any:
        arrays, lane, rows = data
        return train_step(eqx.combine(arrays, static), lane, state, (rows, lane.key))

    return step, ((arrays, lane, rows), setup.start(lane))


def peak_bytes(step: Callable[..., Any], data: Any, state: Any) -> int:
    """Count the bytes of arguments, results and temporaries of the compiled program, its state handed over."""
    need = jax.jit(step, donate_argnums=1).lower(data, state).compile().memory_analysis()
    sizes = need.argument_size_in_bytes + need.output_size_in_bytes + need.temp_size_in_bytes
    return sizes - need.alias_size_in_bytes


def question(*, image: int, channels: tuple[int, ...], hidden: int, batch_size: int, repeats: int) -> dict[str, Any]:
    """Return times of all steps, run in turn, and their memory, each over the plain one."""
    keys = jr.split(jr.key(0), 4)
    w = init_vgg(keys[0], image, channels, hidden)
    x = jr.normal(keys[1], (4 * batch_size, image, image, 3), jnp.float32)
    y = jr.normal(keys[2], (4 * batch_size, 10), jnp.float32)
    rows = jr.permutation(keys[3], 4 * batch_size)[:batch_size]
    steps = {
        "plain": plain_step(w, x, y, rows),
        "finite": our_step(w, x, y, rows, "exact", 1e3),
        "tangent": our_step(w, x, y, rows, "exact", jnp.inf),
        "subtracted": our_step(w, x, y, rows, "plain", 1e3),
    }
    memory = {name: peak_bytes(step, *given) for name, (step, given) in steps.items()}
    arguments = {name: given for name, (_, given) in steps.items()}
    fns = {name: lambda given, step=step, name=name: step(*given[name]) for name, (step, _) in steps.items()}
    times = harness.compare(fns, arguments, repeats=repeats)
    return {
        **times,
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
            f"{name:11} {1e3 * found[name]['run_s']:8.1f} ms a step, {ratio:.2f} of plain; "
            f"memory {found['memory_bytes'][name] / 2**20:.0f} MiB, {found['memory_ratios'][name]:.2f} of plain; "
            f"compiled in {found[name]['compile_s']:.1f} s"
        )
    if not args.toy:
        print(harness.write("train_step", found).relative_to(harness.ROOT))


if __name__ == "__main__":
    main()
