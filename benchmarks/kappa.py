"""How long does `kappa` take with a million parameters and a thousand outputs, and how wide is its bracket?

float32, no Hessian formed. The first call has tracing and compilation in it. The same multilayer perceptron once more
as a closure, which hides that its samples are independent: the bound from above is then by random outputs.

    python benchmarks/kappa.py
    python benchmarks/kappa.py --toy      # a size for trying out; writes nothing
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr

import harness
import lazyjax as lj

TARGET = {"first_s": 60.0, "ratio": 1.5}


def cases(*, toy: bool) -> dict[str, tuple[Callable[[Any], jax.Array], Any, jax.Array]]:
    """Return model h(w), parameters and target by name; the closure hides its inputs from `kappa`."""
    keys = jr.split(jr.key(0), 6)
    sizes, n, (d, m, many) = ((3, 4, 2), 4, (3, 5, 6)) if toy else ((100, 950, 940, 10), 100, (100, 9804, 1000))
    deep = lj.models.mlp(jnp.tanh)
    x = jr.normal(keys[0], (n, sizes[0]), jnp.float32)
    w_deep = deep.init(keys[1], sizes, dtype=jnp.float32)
    y = jr.normal(keys[2], (n, sizes[-1]), jnp.float32)
    inputs = jr.normal(keys[3], (many, d), jnp.float32)
    wide = lj.models.two_layer(jnp.tanh)
    w_wide = wide.init(keys[4], d=d, width=m, dtype=jnp.float32)
    return {
        "mlp": (lj.on_data(deep, x), w_deep, y),
        "two_layer": (lj.on_data(wide, inputs), w_wide, jr.normal(keys[5], (many,))),
        "mlp_closure": (lambda w: deep(w, x), w_deep, y),
    }


def timed(h: Callable[[Any], jax.Array], w0: Any, target: jax.Array) -> tuple[float, lj.Kappa]:
    start = time.perf_counter()
    out = jax.block_until_ready(lj.kappa(h, lj.square_loss(target), w0))
    return time.perf_counter() - start, out


def question(h: Callable[[Any], jax.Array], w0: Any, target: jax.Array, *, repeats: int) -> dict[str, Any]:
    """Return seconds of the first call and of later ones, and the bracket."""
    first_s, found = timed(h, w0, target)
    runs = [timed(h, w0, target)[0] for _ in range(repeats)]
    names = ("value", "lower", "upper", "d2h_norm_lower", "d2h_norm_upper", "dh_norm", "lazy_ratio", "kink_share")
    return {
        "num_params": sum(leaf.size for leaf in jax.tree.leaves(w0)),
        "outputs": target.size,
        "first_s": first_s,
        "run_s": statistics.median(runs),
        "runs": runs,
        "ratio": float(found.upper / found.lower),
        "how": found.how,
        "failure": found.failure,
        **{name: float(getattr(found, name)) for name in names},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--toy", action="store_true", help="a size for trying out; writes nothing")
    args = parser.parse_args()
    results: dict[str, Any] = {"target": TARGET}
    for name, (h, w0, target) in cases(toy=args.toy).items():
        row = results[name] = question(h, w0, target, repeats=args.repeats)
        print(
            f"{name}: {row['num_params']} parameters, {row['outputs']} outputs, first {row['first_s']:.1f} s, later "
            f"{row['run_s']:.1f} s, kappa {row['value']:.3g} in [{row['lower']:.3g}, {row['upper']:.3g}], "
            f"{row['ratio']:.2f} wide ({row['how']})"
        )
    if not args.toy:
        print(harness.write("kappa", results).relative_to(harness.ROOT))


if __name__ == "__main__":
    main()
