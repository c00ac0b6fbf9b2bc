"""Figure 1(c): the time of one column, all tau of a seed, compared with NumPy, plain PyTorch and the machine's GEMM.

One question: at what share of the machine's matrix products does the figure's gradient descent run, and how long would
all of it take at the paper's size? All contenders get the same arrays and take the same steps in float32;
ours runs the loss and the gradient of the library's own net under `vmap`, as the figure does. NumPy runs one net
after the other; PyTorch one after the other, and all at once by `torch.func`, if it is installed.

    python benchmarks/fig1c.py [--taus 33] [--steps 30] [--repeats 5]
"""

import argparse
import importlib.util
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import harness
import lazyjax as lj
from lazyjax.experiments import fig1c_student_scale as student_scale
from lazyjax.experiments.descent import descend
from lazyjax.experiments.student import sample_problem

PAPER = student_scale.PRESETS["paper"]


def flops(taus: int, steps: int) -> float:
    """Count the operations of a step: x b^T, the gradient by b, and the matrix-vector products of both."""
    return 4.0 * PAPER.n * (PAPER.d + 1) * PAPER.width * taus * steps


def make_ours(x: Any, y: Any, etas: Any, steps: int) -> Callable[[Any, Any], Any]:
    """Run the figure's engine: all nets in one program; its state, and so its result, is the displacement."""
    x, y = jnp.asarray(x), jnp.asarray(y)
    loss, f = lj.square_loss(y), lj.models.two_layer()
    gradient = jax.grad(lambda w: loss(f(w, x)))

    def lane(a: Any, b: Any, eta: Any) -> Any:
        start = {"a": a, "b": b}
        v, _ = descend(lambda w, _: gradient(w), start, optax.sgd(eta), np.array([steps]), lambda v: v["a"][0])
        return v

    program = jax.jit(jax.vmap(lane))
    return lambda a, b: jax.block_until_ready(program(a, b, etas))


def make_numpy(x: Any, y: Any, etas: Any, steps: int) -> Callable[[Any, Any], Any]:
    """Run plain NumPy, one net after the other."""

    def one(a: Any, b: Any, eta: Any) -> Any:
        for _ in range(steps):
            hidden = np.maximum(x @ b.T, 0)
            r = (hidden @ a - y) / len(y)
            a, b = a - eta * (hidden.T @ r), b - eta * ((np.outer(r, a) * (hidden > 0)).T @ x)
        return a, b

    def run(a: Any, b: Any) -> Any:
        found = [one(*net) for net in zip(a, b, etas, strict=True)]
        return {"a": np.stack([net[0] for net in found]), "b": np.stack([net[1] for net in found])}

    return run


def make_torch(x: Any, y: Any, etas: Any, steps: int, *, batched: bool) -> Callable[[Any, Any], Any]:
    """Run PyTorch on the CPU: autograd net by net, or `torch.func.vmap` of `torch.func.grad` over all."""
    import torch

    x, y, rates = (torch.from_numpy(np.array(array)) for array in (x, y, etas))

    def loss(a: Any, b: Any) -> Any:
        return 0.5 * torch.mean((torch.relu(x @ b.T) @ a - y) ** 2)

    gradient = torch.func.grad(loss, argnums=(0, 1))

    def follow(step: Any, a: Any, b: Any, eta: Any) -> Any:
        for _ in range(steps):
            da, db = step(a, b)
            a, b = a - eta * da, b - eta.unsqueeze(-1) * db
        return a, b

    def run(a: Any, b: Any) -> Any:
        a, b = torch.from_numpy(np.array(a)), torch.from_numpy(np.array(b))
        if batched:
            found = follow(torch.func.vmap(gradient), a, b, rates.unsqueeze(-1))
        else:
            nets = [follow(gradient, *net) for net in zip(a, b, rates, strict=True)]
            found = [torch.stack(part) for part in zip(*nets, strict=True)]
        return {"a": found[0].numpy(), "b": found[1].numpy()}

    return run


def gemm_rate(repeats: int) -> float:
    """Return the operations per second of the machine's float32 matrix products: the best of some at 2000 x 2000."""
    product, matrix = jax.jit(jnp.matmul), jnp.ones((2000, 2000), jnp.float32)
    product(matrix, matrix).block_until_ready()
    seconds = []
    for _ in range(max(repeats, 3)):
        start = time.perf_counter()
        product(matrix, matrix).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return 2 * 2000.0**3 / min(seconds)


def measure(taus: int, steps: int, repeats: int) -> dict[str, Any]:
    """Return medians of times taken in turn; displacements at the end are compared with NumPy's in float64."""
    x, y, _, start = sample_problem(0, PAPER.n, PAPER.d, PAPER.width, dtype="float32")
    grid = np.geomspace(PAPER.taus[0], PAPER.taus[-1], taus).astype(np.float32)
    etas = np.minimum(np.float32(PAPER.largest_step), np.float32(PAPER.step) / grid**2)
    x, y = np.asarray(x), np.asarray(y)
    a, b = (np.multiply.outer(grid, np.asarray(start[name])) for name in "ab")
    contenders = {"ours": make_ours(x, y, etas, steps), "numpy": make_numpy(x, y, etas, steps)}
    if importlib.util.find_spec("torch") is None:
        print("PyTorch is not installed: left out")
    else:
        contenders |= {
            f"torch_{name}": make_torch(x, y, etas, steps, batched=name == "batched") for name in ("loop", "batched")
        }
    truth = make_numpy(x.astype(float), y.astype(float), etas.astype(float), steps)(a.astype(float), b.astype(float))
    runs: dict[str, list[float]] = {name: [] for name in contenders}
    found = {name: run(a, b) for name, run in contenders.items()}  # compiles
    for _ in range(repeats):
        for name, run in contenders.items():
            begin = time.perf_counter()
            run(a, b)
            runs[name].append(time.perf_counter() - begin)
    rate = gemm_rate(repeats)
    rows = {}
    for name, seconds in runs.items():
        second = float(np.median(seconds))
        rows[name] = {"run_s": second, "fraction_of_gemm": flops(taus, steps) / second / rate}
        rows[name]["error"] = largest_error(found[name], truth, (a, b), displaced=name == "ours")
    scale = len(PAPER.taus) * PAPER.seeds * PAPER.steps / (taus * steps)
    return {
        "taus": taus, "steps": steps, "gemm_flops": rate, "rows": rows,
        "ratios": {name: row["run_s"] / rows["ours"]["run_s"] for name, row in rows.items()},
        "paper_size_minutes": {name: scale * row["run_s"] / 60 for name, row in rows.items()},
    }  # fmt: skip


def largest_error(found: Any, truth: Any, start: Any, *, displaced: bool) -> float:
    """Return the relative error of the worst net's displacement: one that hardly moves shows what float32 loses."""
    wrong, moved = 0.0, 0.0
    for name, start32 in zip("ab", start, strict=True):
        first = start32.astype(float)
        there = truth[name] - first
        here = np.asarray(found[name], float) - (0 if displaced else first)
        wrong = wrong + np.sum((here - there).reshape(len(first), -1) ** 2, axis=1)
        moved = moved + np.sum(there.reshape(len(first), -1) ** 2, axis=1)
    return float(np.max(np.sqrt(wrong / moved)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--taus", type=int, default=len(PAPER.taus))
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    results = measure(args.taus, args.steps, args.repeats)
    print(f"GEMM {results['gemm_flops'] / 1e9:.0f} Gflop/s")
    for name, row in results["rows"].items():
        ratio, minutes = results["ratios"][name], results["paper_size_minutes"][name]
        share = f"{row['fraction_of_gemm']:.0%} of GEMM"
        print(f"{name:14} {row['run_s']:.3f} s, {share}, {ratio:.1f} times ours, paper size {minutes:.0f} min, "
              f"error {row['error']:.1e}")  # fmt: skip
    print(harness.write("fig1c", results))


if __name__ == "__main__":
    main()
