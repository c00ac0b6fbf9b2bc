"""How long does the exact tangent-kernel Gram take with `lj.gram`, and with neural-tangents or by Jacobians?

Five networks (`_gram_works.py`), all the same arrays: a, two-layer ReLU; b, dense, 784-512-512-512-10; c, a CNN like
VGG-11; d, one like ResNet without normalization; e, a transformer block. Every contender lives in a process of its
own: compilation, the first run with its peak of memory, then runs taken in turn. `eager` is `lj.gram` as a user calls
it, its first run with tracing and compilation in it. The error is that of some rows against `jacrev` in float64.

The peer is the best of its four implementations. It needs an old jax, and so an environment of its own:

    benchmarks/peer_env.sh
    python benchmarks/gram.py --peer benchmarks/.peer
    python benchmarks/gram.py --peer benchmarks/.peer --only b --dtypes float32

One record a work, `results/gram_<work>.json`. Linux only for the memory.
"""

import argparse
import json
import math
import os
import select
import statistics
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import _gram_works as works
import harness

HERE = Path(__file__).parent
OURS = ("ours", "eager", "jacobian")
PEERS = ("JACOBIAN_CONTRACTION", "NTK_VECTOR_PRODUCTS", "STRUCTURED_DERIVATIVES", "AUTO")
DTYPES = ("float32", "float64")
FACTS = ("n", "compile_s", "first_s", "peak_bytes", "planned_bytes", "versions")
"""What a row takes over from the process."""
PATIENCE_S = 1200.0
"""The longest reply that is waited for."""
TURN_S = 0.3
"""About what a turn of a quick contender takes."""
RIGHT = {"float32": 1e-3, "float64": 1e-9}
"""Errors above are wrong results; kinks of ReLU, which rounding crosses, are not."""
TARGETS = {
    "a": {"float32": {"peer": 1.5, "memory": 1}, "float64": {"peer": 1.5, "memory": 1}},
    "b": {"float32": {"peer": 1.5, "memory": 1}, "float64": {"peer": 1.5, "memory": 1}, "fraction_of_gemm": 0.4},
    "c": {"float32": {"peer": 2, "memory": 1}, "float64": {"peer": 20, "memory": 1}, "first_s": 6},
    "d": {"float32": {"peer": 2, "memory": 1}, "float64": {"peer": 20, "memory": 1}},
    "e": {"float32": {"jacobian": 1}, "float64": {"jacobian": 1}},
}
"""Ratios wanted, the other's over ours; of b the least fraction of the GEMM rate, of c the most seconds to a result."""


class Settings(NamedTuple):
    """How the benchmark was called."""

    size: str
    peer: Path | None
    ours: bool
    limit_s: float
    best_limit_s: float = PATIENCE_S


class Case(NamedTuple):
    """One work in one dtype, and the file with rows of its Gram."""

    name: str
    dtype: str
    settings: Settings
    n: int
    reference: str


class Worker:
    """A process that answers as `_gram_worker.py` says."""

    def __init__(self, kind: str, name: str, dtype: str, settings: Settings):
        python, script = sys.executable, "_gram_ours.py"
        if kind in PEERS and settings.peer:
            python, script = str(settings.peer / "bin" / "python"), "_gram_peer.py"
        # No user's settings of JAX, no cache of compiled programs.
        env = {key: value for key, value in os.environ.items() if not key.startswith(("JAX_", "XLA_"))}
        self.process: Any = subprocess.Popen(
            [python, str(HERE / script), name, dtype, kind, settings.size],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=env | {"JAX_PLATFORMS": "cpu", "PYTHONWARNINGS": "ignore"},
        )

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Return the reply, or {"failed": why}; after too long a wait or a crash there is nobody left to ask."""
        if self.process.poll() is None:
            self.process.stdin.write(json.dumps({"do": do, **arguments}).encode() + b"\n")
            self.process.stdin.flush()
            if not select.select([self.process.stdout], [], [], PATIENCE_S)[0]:
                self.process.kill()
                return {"failed": f"no result in {PATIENCE_S:g} s"}
            reply = self.process.stdout.readline()
            if reply:
                return json.loads(reply)
        return {"failed": f"the process ended, status {self.process.wait()}"}

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


def screen(kind: str, case: Case) -> dict[str, Any]:
    """Return what a contender that may be slow is predicted to take, from two small runs."""
    seconds = {}
    with Worker(kind, case.name, case.dtype, case.settings) as worker:
        for n in (max(1, case.n // 8), max(2, case.n // 4)):
            built = worker.ask("build", n=n)
            if "failed" in built:
                return {"failed": built["failed"], "n": n}
            seconds[n] = min(worker.ask("run")["seconds"] for _ in range(2))
    facts = {key: built[key] for key in FACTS}
    return facts | {"screened": seconds, "run_s": predicted(seconds, case.n), "extrapolated": True}


def predicted(seconds: dict[int, float], n: int) -> float:
    """Return the value at n of a t n + b t^2 through two times, with neither term negative."""
    (few, first_s), (more, second_s) = sorted(seconds.items())
    square = (second_s / more - first_s / few) / (more - few)
    square = min(max(square, 0.0), second_s / more**2)
    return n * (second_s / more + square * (n - more))


def enter(kind: str, case: Case, stack: ExitStack) -> tuple[dict[str, Any], Worker]:
    """A contender at full size, checked and ready for more runs."""
    worker = stack.enter_context(Worker(kind, case.name, case.dtype, case.settings))
    built = worker.ask("build")
    if "failed" in built:
        return {"failed": built["failed"], "n": case.n}, worker
    checked = worker.ask("check", file=case.reference)
    if "failed" in checked:
        return {"failed": checked["failed"], "n": case.n}, worker
    row = {key: built[key] for key in FACTS}
    if kind == "eager":
        row["compile_s"] = row["peak_bytes"] = None  # compilation is within the first run
    row |= {"run_s": built["first_s"], "extrapolated": False, **checked}
    return row | {"right": row["error"] <= RIGHT[case.dtype]}, worker


def best(rows: dict[str, dict[str, Any]]) -> str | None:
    """Return the quickest implementation of the peer whose result is right, as far as that is known."""
    good = [kind for kind in PEERS if kind in rows and "failed" not in rows[kind] and rows[kind].get("right", True)]
    return min(good, key=lambda kind: rows[kind]["run_s"], default=None)


def race(case: Case) -> dict[str, Any]:
    """Screen the slow ones, bring in all that are quick enough and the peer's best more readily, then run in turn."""
    slow = [*(["jacobian"] if case.settings.ours else []), *(PEERS if case.settings.peer else [])]
    rows = {kind: screen(kind, case) for kind in slow}
    quick = [kind for kind in slow if rows[kind].get("run_s", math.inf) <= case.settings.limit_s]
    workers: dict[str, Worker] = {}
    with ExitStack() as stack:
        for kind in (*(("ours", "eager") if case.settings.ours else ()), *quick):
            rows[kind], workers[kind] = enter(kind, case, stack)
        while (kind := best(rows)) and kind not in workers and rows[kind]["run_s"] <= case.settings.best_limit_s:
            rows[kind], workers[kind] = enter(kind, case, stack)
        workers = {kind: worker for kind, worker in workers.items() if "failed" not in rows[kind]}
        gemms = [gemm(case, workers)]
        in_turn(rows, workers)
        gemms.append(gemm(case, workers))
    rates = {shape: statistics.mean(each[shape] for each in gemms) for shape in gemms[0]}
    rows = {kind: rows[kind] for kind in (*OURS, *PEERS) if kind in rows}
    record = {"best_peer": best(rows), "rows": rows, "ratios": ratios(rows), "gemm_gflops": rates}
    return record | ({"products": products(case, rows, rates)} if case.name == "b" and "ours" in workers else {})


def in_turn(rows: dict[str, dict[str, Any]], workers: dict[str, Worker]) -> None:
    """Return medians of runs in turn, so that a busy machine slows all alike; of a long one its first run stands.

    Of quick ones a turn is several runs, whose median counts: one alone would pay for what its neighbors left in the
    caches, which is no cost of its own.
    """
    counts = {kind: min(25, int(40 / rows[kind]["run_s"])) for kind in workers}
    if "eager" in counts:
        counts["eager"] = max(1, counts.get("ours", 0))  # its first run told of its compilation
    runs: dict[str, list[float]] = {kind: [] for kind in counts}
    kinds = list(counts)
    for turn in range(max(counts.values(), default=0)):
        # Each round starts with another one: none always runs in the wake of the same neighbor.
        for kind in kinds[turn % len(kinds) :] + kinds[: turn % len(kinds)]:
            if turn < counts[kind]:
                repeats = max(1, min(9, int(TURN_S / rows[kind]["run_s"])))
                runs[kind].append(workers[kind].ask("run", repeats=repeats)["seconds"])
    for kind, times in runs.items():
        if times:
            rows[kind] |= {"run_s": statistics.median(times), "runs": times}


def gemm(case: Case, workers: dict[str, Worker]) -> dict[str, float]:
    """Return the rate of matrix products in one of the processes: square ones, and for b of its dominant shape."""
    if not workers:
        return {}
    shapes = [[1536] * 3] if case.settings.size == "full" else [[64] * 3]
    if case.name == "b":
        rows, width, _ = dominant(case)
        shapes.append([rows, width, rows])
    worker = next(iter(workers.values()))
    return {"x".join(map(str, shape)): worker.ask("gemm", shape=shape)["gflops"] for shape in shapes}


def dominant(case: Case) -> tuple[int, int, int]:
    """Return for b: rows of the cotangents of its hidden layers, their width, and the number of such layers."""
    _, sizes = works.SIZES[case.settings.size]["b"]
    return case.n * sizes[-1], sizes[1], len(sizes) - 2


def products(case: Case, rows: dict[str, dict[str, Any]], rates: dict[str, float]) -> dict[str, Any]:
    """Return the part of the rate of a GEMM at which ours of b does its dominant products, all its other work free.

    A hidden layer of width m takes D D^T from the cotangents D (n k, m) of its outputs. Only the n k (n k + 1) / 2
    entries of one triangle are counted, each 2 m flops: what a symmetric matrix needs, whatever is computed.
    """
    size, width, layers = dominant(case)
    flops = layers * size * (size + 1) * width
    rate = 1e-9 * flops / rows["ours"]["run_s"]
    counted = "hidden layers x one triangle of (nk, m) (m, nk): nk (nk + 1) m flops each"
    facts = {"flops": flops, "counted": counted, "gflops": rate}
    return facts | {"fraction_of_gemm": {shape: rate / found for shape, found in rates.items()}}


def ratios(rows: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Return the others' times over ours, and the peak of memory of the peer's best over ours."""
    peer, ours = best(rows), rows.get("ours", {"failed": ""})
    if "failed" in ours:
        return {}
    out = {"peer": rows[peer]["run_s"] / ours["run_s"]} if peer else {}
    if "failed" not in rows["jacobian"]:
        out["jacobian"] = rows["jacobian"]["run_s"] / ours["run_s"]
    if peer and not rows[peer]["extrapolated"] and rows[peer]["peak_bytes"] and ours["peak_bytes"]:
        out["memory"] = rows[peer]["peak_bytes"] / ours["peak_bytes"]
    return out


def work(name: str, dtypes: list[str], settings: Settings) -> dict[str, Any]:
    """Return the record of one work; every case is printed as it comes."""
    cases: dict[str, Any] = {}
    facts: dict[str, Any] = {}
    for dtype in dtypes:
        with tempfile.TemporaryDirectory() as folder:
            reference = str(Path(folder) / "rows.npy")
            with Worker("ours", name, "float64", settings) as worker:
                facts = worker.ask("reference", file=reference, of=dtype)
            cases[dtype] = race(Case(name, dtype, settings, facts["n"], reference))
        show(f"{name} {dtype}", cases[dtype])
    return facts | {"targets": TARGETS[name], "cases": cases}


def show(label: str, record: dict[str, Any]) -> None:
    rates = {shape: f"{rate:.0f}" for shape, rate in record["gemm_gflops"].items()}
    found = {name: f"{ratio:.3g}" for name, ratio in record["ratios"].items()}
    print(label, found, "best", record["best_peer"], "Gflop/s", rates)
    if "products" in record:
        print("  of the GEMM rate", {k: f"{v:.0%}" for k, v in record["products"]["fraction_of_gemm"].items()})
    for kind, row in record["rows"].items():
        if "failed" in row:
            print(f"  {kind:22} failed at n = {row['n']}: {row['failed']}", flush=True)
            continue
        times = " ".join(f"{name} {row[name]:.3g} s" for name in ("compile_s", "first_s") if row[name] is not None)
        peak = "" if row["peak_bytes"] is None else f", {1e-6 * row['peak_bytes']:.0f} MB"
        result = f"extrapolated from n = {row['n']}" if row["extrapolated"] else f"error {row['error']:.0e}"
        print(f"  {kind:22} {row['run_s']:9.3g} s, {times}{peak}, {result}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", type=Path, metavar="FOLDER", help="its environment; without it nothing is written")
    parser.add_argument("--only", nargs="+", choices=list(works.WORKS), default=list(works.WORKS), metavar="WORK")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES), metavar="DTYPE")
    parser.add_argument("--size", choices=list(works.SIZES), default="full", help="smoke is for trying out, no record")
    parser.add_argument("--peers-only", action="store_true", help="without ours; writes nothing")
    parser.add_argument("--limit", type=float, default=4.0, help="seconds; slower contenders are extrapolated")
    parser.add_argument("--best-limit", type=float, default=600.0, help="the same for the peer's best")
    args = parser.parse_args()
    peer = args.peer if args.peer and (args.peer / "bin" / "python").exists() else None
    if peer is None:
        where = f"no environment in {args.peer}" if args.peer else "no --peer"
        print(f"The peer is left out ({where}; benchmarks/peer_env.sh makes one), and no record is written.")
    elif not peer.absolute().is_relative_to(harness.ROOT):
        # The record's command has no path of this machine.
        sys.argv = [word.replace(str(args.peer), "FOLDER") for word in sys.argv]
    settings = Settings(args.size, peer, not args.peers_only, args.limit, args.best_limit)
    complete = peer and args.size == "full" and not args.peers_only and args.dtypes == list(DTYPES)
    for name in args.only:
        record = work(name, args.dtypes, settings)
        if complete:
            print(harness.write(f"gram_{name}", record).relative_to(harness.ROOT))


if __name__ == "__main__":
    main()
