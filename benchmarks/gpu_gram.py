"""What does the exact 5000 x 5000 Gram of a full-width VGG-11, with its spectrum, take on one GPU?

9.2 million parameters, 500 images of 32 x 32 x 3, ten outputs, float32 with TF32 off. The first call has tracing and
compilation in it. Without a GPU this says so and does nothing else.

    python benchmarks/gpu_gram.py
    python benchmarks/gpu_gram.py --size smoke    # a small net, on a CPU too; writes nothing

The record is `results/gpu_gram.json`.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import _gram_works as works
import harness
import lazyjax as lj
from _gram_worker import jacobian_rows

PEAKS = {
    "B200": 75e12,
    "H200": 67e12,
    "H100 PCIe": 51e12,
    "H100": 67e12,
    "A100": 19.5e12,
    "L40S": 91.6e12,
    "RTX A6000": 38.7e12,
    "V100": 15.7e12,
    "T4": 8.1e12,
}
"""float32 operations a second without tensor cores, as the makers state them; the first name that fits counts."""
TARGET_S = 60.0


class Size(NamedTuple):
    """Sizes of a network and its inputs."""

    n: int
    image: int
    plan: tuple[Any, ...]
    k: int
    square: int


SIZES = {"full": Size(500, 32, works.WIDE_VGG, 10, 8192), "smoke": Size(6, 4, (2, "M", 3), 2, 64)}


def needed(size: Size) -> float:
    """Count the operations of the products between samples, each convolution in the cheaper of the two exact ways.

    For each pair of rows of the Gram (one triangle of them): either its two weight gradients contracted, 9 c c'
    multiplications and additions; or, over pairs of the s positions of the image, the cotangents contracted, the
    patches (once for all outputs), and the two multiplied: s^2 (c' + 9 c / k^2 + 1). All else, the gradients
    themselves included, is not counted. The dense layer is left out: its cotangents are the identity.
    """
    each, channels, side = 0.0, 3, size.image
    for item in size.plan:
        if item == "M":
            side //= 2
        else:
            patch = 9 * channels
            each += min(patch * item, side**4 * (item + patch / size.k**2 + 1))
            channels = item
    rows = size.n * size.k
    return rows * (rows + 1) * each


def timed(fn: Callable[..., Any], *args: Any) -> tuple[float, Any]:
    start = time.perf_counter()
    out = jax.block_until_ready(fn(*args))
    return time.perf_counter() - start, out


def gemm(square: int) -> float:
    """Return the operations per second of a compiled square product in float32, median of eight runs."""
    a = jnp.asarray(np.random.default_rng(1).standard_normal((square, square)).astype(np.float32))
    product = jax.jit(jnp.matmul)
    return 2.0 * square**3 / statistics.median(timed(product, a, a)[0] for _ in range(8))


def peak(kind: str) -> float | None:
    return next((rate for name, rate in PEAKS.items() if name in kind), None)


def error(work: works.Work, gram: Any) -> float:
    """Return the error of two samples' rows for eight samples, in units of the largest entry, against float64."""
    double = jax.tree_util.tree_map(lambda leaf: leaf.astype(np.float64), (work.w, work.x[:8]))
    want = jacobian_rows(work._replace(w=double[0], x=double[1]), np.arange(2))
    found = np.asarray(gram[:2, :, :8], np.float64).reshape(want.shape)
    return float(np.max(np.abs(found - want)) / np.max(np.abs(want)))


def question(size: Size, repeats: int) -> dict[str, Any]:
    """Return times of the Gram and of its eigenvalues, first and later, and the part of the peak of the Gram."""
    random = works.Random(np.random.default_rng(0), "float32")
    work = works.make_vgg(random, size.n, size.image, size.plan, size.k)
    w, x = jax.tree_util.tree_map(jnp.asarray, (work.w, work.x))
    rows = size.n * size.k
    eigenvalues = lambda gram: jnp.linalg.eigvalsh(gram.reshape(rows, rows))

    def once() -> tuple[dict[str, float], jax.Array, jax.Array]:
        gram_s, gram = timed(lj.gram, work.f, w, x)
        spectrum_s, spectrum = timed(eigenvalues, gram)
        return {"gram": gram_s, "spectrum": spectrum_s}, gram, spectrum

    first, gram, spectrum = once()
    later = [once()[0] for _ in range(repeats)]
    usual = {name: statistics.median(each[name] for each in later) for name in first}
    device = jax.devices()[0]
    memory = device.memory_stats() or {}
    rate, flops, known = gemm(size.square), needed(size), peak(device.device_kind)
    fraction = {"of_gemm": flops / usual["gram"] / rate, "of_peak": known and flops / usual["gram"] / known}
    return {
        "n": size.n,
        "k": size.k,
        "num_params": work.num_params,
        "target_s": TARGET_S,
        "first_s": first | {"both": sum(first.values())},
        "run_s": usual | {"both": sum(usual.values())},
        "peak_bytes": memory.get("peak_bytes_in_use"),
        "products": {"flops": flops, "gemm_flops_per_s": rate, "peak_flops_per_s": known, "fraction": fraction},
        "error": error(work, gram),
        "eigenvalues": {"smallest": float(spectrum[0]), "largest": float(spectrum[-1])},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(SIZES), default="full", help="smoke is for trying out; writes nothing")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    if args.size == "full" and jax.default_backend() != "gpu":
        print(f"No GPU here (JAX runs on {jax.default_backend()}): nothing was measured.")
        return
    # For the reference, and no TF32; all timed arrays are float32.
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_default_matmul_precision", "highest")
    results = question(SIZES[args.size], args.repeats)
    shown = {name: f"{results[name]['both']:.2f} s" for name in ("first_s", "run_s")}
    print(f"{results['num_params']} parameters, Gram and spectrum", shown, f"error {results['error']:.0e}")
    print("of the rate", results["products"]["fraction"], "peak bytes", results["peak_bytes"])
    if args.size == "full":
        print(harness.write("gpu_gram", results).relative_to(harness.ROOT))


if __name__ == "__main__":
    main()
