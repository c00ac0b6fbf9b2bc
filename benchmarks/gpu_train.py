"""How long does a full-width VGG-11 train on all of Fashion-MNIST at eight output scales, on one GPU?

Figure 3(a) at its GPU size but for the data, 15 epochs and eight values of alpha: training, accuracies on 10,000 test
images after every epoch, stability of activations, compilation. Then two epochs more of the same programs, compiled
already, for the throughput. Its operations are counted as those of plain training, three forward passes an image;
ours needs more of them. In JAX's default precision, TF32 on recent GPUs, and so is the product that it is compared to.

    python benchmarks/gpu_train.py [--data-dir FOLDER]
    python benchmarks/gpu_train.py --size smoke    # a small net on digits, on a CPU too; writes nothing

The record is `results/gpu_train.json`, the figure next to it.
"""

import argparse
import dataclasses
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import gpu_gram
import harness
from lazyjax.experiments import deep
from lazyjax.experiments import fig3a_fig7a_deep_scale as deep_scale
from lazyjax.plot.axes import encode
from lazyjax.training.train import train

TARGET_S = 600.0
PEAKS = {"B200": 1100e12, "H200": 494e12, "H100 PCIe": 378e12, "H100": 494e12, "A100": 156e12, "L40S": 183e12}
"""TF32 operations a second of tensor cores without sparsity, as the makers state them; the first that fits counts."""
ALPHAS = (1.0, 10.0, 100.0, 1e3, 1e4, 1e5, 1e7, float("inf"))
FULL = dataclasses.replace(
    deep_scale.PRESETS["gpu"], data="fashion-mnist", alphas=ALPHAS, epochs=15, augment=False
)  # fmt: skip
SIZES = {
    "full": FULL,
    "smoke": dataclasses.replace(
        FULL, data="digits", width=1 / 32, train=32, test=8, batch=16, alphas=(1.0, float("inf")), epochs=1, step=0.01
    ),
}


def forward_flops(settings: deep_scale.Settings, data: deep.Images) -> float:
    """Count the operations of the network for one image, as XLA counts them."""
    f, w0 = deep.start(settings.network, 0, data, width=settings.width, gain=settings.gain)
    analysis = jax.jit(f).lower(w0, data.x[:1]).cost_analysis()
    return float(analysis["flops"])


def epoch_seconds(settings: deep_scale.Settings, data: deep.Images) -> float:
    """Return seconds of an epoch of all lanes with its test: three epochs less one, of compiled programs, halved."""
    f, w0 = deep.start(settings.network, 0, data, width=settings.width, gain=settings.gain)
    optimizer = deep.sgd(settings, settings.step, data.x.shape[0])
    times = {}
    for epochs in (1, 1, 3):
        start = time.perf_counter()
        training = train(
            f, w0, data.x, data.y, optimizer, alpha=jnp.asarray(settings.alphas, deep.DTYPE), epochs=epochs,
            batch_size=settings.batch, key=deep.order_key(0), test=data.test, throw=False,
        )  # fmt: skip
        jax.block_until_ready(training.params)
        times[epochs] = time.perf_counter() - start
    return (times[3] - times[1]) / 2


def question(settings: deep_scale.Settings, data_dir: Path | None, square: int) -> tuple[dict[str, Any], Any]:
    """Return the figure's data, and its time, throughput, and share of what the GPU can do."""
    start = time.perf_counter()
    found = deep_scale.run(settings, progress=True, data_dir=data_dir)
    wall_s = time.perf_counter() - start
    data = deep.load(settings, data_dir)
    epoch_s = epoch_seconds(settings, data)
    images = settings.batch * (data.x.shape[0] // settings.batch) * len(settings.alphas)
    flops, kind = 3 * forward_flops(settings, data) * images, jax.devices()[0].device_kind
    rate, peak = gpu_gram.gemm(square), next((rate for name, rate in PEAKS.items() if name in kind), None)
    last = {name: deep_scale.final(found, name).isel(seed=0) for name in ("train_accuracy", "test_accuracy")}
    results = {
        "settings": dataclasses.asdict(settings),
        "images": {"train": data.x.shape[0], "test": data.x_test.shape[0]},
        "target_s": TARGET_S,
        "wall_s": wall_s,
        "epoch_s": epoch_s,
        "images_per_s": images / epoch_s,
        "flops": {
            "per_s": flops / epoch_s,
            "gemm_per_s": rate,
            "of_gemm": flops / epoch_s / rate,
            "of_peak": peak and flops / epoch_s / peak,
        },
        "peak_bytes": (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use"),
        "accuracy": {
            name: dict(zip(map(str, settings.alphas), each.values, strict=True)) for name, each in last.items()
        },
        "stability": dict(zip(map(str, settings.alphas), np.asarray(found["stability"])[0], strict=True)),
    }
    return results, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(SIZES), default="full", help="smoke is for trying out; writes nothing")
    parser.add_argument("--data-dir", type=Path, help="folder of the four files of Fashion-MNIST")
    args = parser.parse_args()
    if args.size == "full" and jax.default_backend() != "gpu":
        print(f"No GPU here (JAX runs on {jax.default_backend()}): nothing was measured.")
        return
    results, found = question(SIZES[args.size], args.data_dir, 8192 if args.size == "full" else 64)
    print(f"all in {results['wall_s']:.0f} s; {results['images_per_s']:.0f} images/s", results["flops"])
    print(results["accuracy"], results["stability"])
    if args.size == "full":
        figure = harness.RESULTS / "gpu_train.png"
        figure.write_bytes(encode(deep_scale.FIGURE_3A.draw(found), "png"))
        print(harness.write("gpu_train", results).relative_to(harness.ROOT), figure.relative_to(harness.ROOT))


if __name__ == "__main__":
    main()
