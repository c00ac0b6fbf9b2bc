"""What does `finite_jvp` cost compared with `jax.jvp`, and what does it buy?

Time: a divided difference without cancellation against the derivative and against the plain difference of two
evaluations, float32, compiled, nothing constant. Accuracy: the relative error of the exact and of the plain
difference, float32, against the exact one in float64 (which is itself compared with the plain difference in
float64 where that one has digits left).

    python benchmarks/finite_jvp.py
"""

import argparse
import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax import lax

import harness
import lazyjax as lj

ALPHAS = (1.0, 1e3, 1e7, 1e12)
Forward = Callable[[Any, jax.Array], jax.Array]

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "tanh": jnp.tanh,
    "relu": jax.nn.relu,
    "gelu_tanh": jax.nn.gelu,
    "gelu_erf": partial(jax.nn.gelu, approximate=False),
}


def mlp(w: Any, x: jax.Array, activation: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """Apply dense layers with an activation between them."""
    for kernel, bias in w[:-1]:
        x = activation(x @ kernel + bias[None])
    kernel, bias = w[-1]
    return x @ kernel + bias[None]


def init_mlp(key: jax.Array, sizes: tuple[int, ...]) -> list[tuple[jax.Array, jax.Array]]:
    pairs = list(itertools.pairwise(sizes))
    keys = jr.split(key, len(pairs))
    return [
        (jr.normal(k, (m, n), jnp.float32) * (2 / m) ** 0.5, jnp.zeros(n, jnp.float32))
        for k, (m, n) in zip(keys, pairs, strict=True)
    ]


def vgg(w: Any, x: jax.Array) -> jax.Array:
    """Apply blocks of two 3 x 3 convolutions with ReLU and a 2 x 2 maximum, then a dense net."""
    for i, kernel in enumerate(w["convolutions"]):
        x = jax.nn.relu(lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")))
        if i % 2:
            x = lax.reduce_window(x, -np.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    return mlp(w["dense"], x.reshape(len(x), -1), jax.nn.relu)


def init_vgg(key: jax.Array, image: int, channels: tuple[int, ...], hidden: int) -> dict[str, Any]:
    key_c, key_d = jr.split(key)
    shapes = list(itertools.pairwise((3, *channels)))
    keys = jr.split(key_c, len(shapes))
    kernels = [
        jr.normal(k, (3, 3, m, n), jnp.float32) * (2 / (9 * m)) ** 0.5 for k, (m, n) in zip(keys, shapes, strict=True)
    ]
    side = image // 2 ** (len(channels) // 2)
    return {"convolutions": kernels, "dense": init_mlp(key_d, (side * side * channels[-1], hidden, 10))}


def direction(key: jax.Array, w: Any) -> Any:
    """Return a random displacement as large as the parameters."""
    leaves, structure = jax.tree.flatten(w)
    keys = jr.split(key, len(leaves))
    scale = float(np.sqrt(sum(float(jnp.sum(z * z)) for z in leaves) / sum(z.size for z in leaves)))
    return structure.unflatten([scale * jr.normal(k, z.shape, z.dtype) for k, z in zip(keys, leaves, strict=True)])


def derivative(f: Forward, w: Any, u: Any, eps: jax.Array, x: jax.Array) -> jax.Array:
    del eps
    return jax.jvp(lambda v: f(v, x), (w,), (u,))[1]


def exact(f: Forward, w: Any, u: Any, eps: jax.Array, x: jax.Array) -> jax.Array:
    return lj.finite_jvp(lambda v: f(v, x), w, u, eps)


def plain(f: Forward, w: Any, u: Any, eps: jax.Array, x: jax.Array) -> jax.Array:
    moved = jax.tree.map(lambda z, d: z + eps * d, w, u)
    return (f(moved, x) - f(w, x)) / eps


def errors(f: Forward, w: Any, u: Any, x: jax.Array) -> dict[str, dict[str, float]]:
    """Return relative errors by alpha, and how far the two float64 differences agree."""
    run = {"exact": jax.jit(partial(exact, f)), "plain": jax.jit(partial(plain, f))}
    single = (w, u, x)
    double = jax.tree.map(lambda z: z.astype(jnp.float64), single)
    table = {}
    for alpha in ALPHAS:
        eps = np.float32(1 / alpha)

        def call(name: str, args: Any, eps: Any) -> jax.Array:
            return run[name](args[0], args[1], eps, args[2])

        reference = call("exact", double, np.float64(eps))
        table[f"{alpha:g}"] = {
            "exact": harness.relative_error(call("exact", single, eps), reference),
            "plain": harness.relative_error(call("plain", single, eps), reference),
            "plain_float64": harness.relative_error(call("plain", double, np.float64(eps)), reference),
        }
    return table


def question(f: Forward, w: Any, x: jax.Array, *, repeats: int, few: int) -> dict[str, Any]:
    """Return times on all inputs, errors on a few of them (float64 convolutions are slow)."""
    u = direction(jr.key(2), w)
    names = {"jvp": derivative, "finite_jvp": exact, "plain": plain}
    fns = {name: partial(fn, f) for name, fn in names.items()}
    times = harness.compare(fns, w, u, np.float32(1e-3), x, repeats=repeats)
    return {**times, "errors": errors(f, w, u, x[:few])}


def problems(*, toy: bool) -> dict[str, tuple[Forward, Any, jax.Array]]:
    """Return model, parameters and inputs by name."""
    keys = jr.split(jr.key(0), 4)
    sizes, batch, image, channels, images, hidden = (
        ((8, 8, 8, 3), 4, 4, (2, 2), 2, 4) if toy else ((784, 512, 512, 10), 256, 32, (32, 32, 64, 64), 64, 128)
    )
    w, x = init_mlp(keys[0], sizes), jr.normal(keys[1], (batch, sizes[0]), jnp.float32)
    pictures = jr.normal(keys[3], (images, image, image, 3), jnp.float32)
    return {
        **{f"mlp_{name}": (partial(mlp, activation=act), w, x) for name, act in ACTIVATIONS.items()},
        "vgg_relu": (vgg, init_vgg(keys[2], image, channels, hidden), pictures),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--toy", action="store_true", help="a size for trying out; writes nothing")
    args = parser.parse_args()
    # For the references; all timed arrays are float32.
    jax.config.update("jax_enable_x64", True)
    results = {}
    for name, (f, w, x) in problems(toy=args.toy).items():
        results[name] = question(f, w, x, repeats=args.repeats, few=8)
        ratios = {k: f"{v:.2f}" for k, v in results[name]["ratios"].items()}
        print(name, "time over jvp", ratios, f"jvp {1e3 * results[name]['jvp']['run_s']:.1f} ms")
        for alpha, row in results[name]["errors"].items():
            print(f"  alpha {alpha:>6}", {k: f"{v:.1e}" for k, v in row.items()})
    if not args.toy:
        print(harness.write("finite_jvp", results).relative_to(harness.ROOT))


if __name__ == "__main__":
    main()
