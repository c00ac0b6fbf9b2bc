"""A process that makes one Gram matrix, and tells its time, memory and accuracy, at the word of `gram.py`.

Requests and replies are lines of JSON on its standard streams; `Worker` has a method for each request. Both sides of
the race run this file, each with its own jax, and so it imports neither library.
"""

import ctypes
import gc
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import _gram_works as works

SAMPLES = 4
"""How many samples' rows of the Gram are compared with the reference."""

MOST_MEMORY = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
"""A program that XLA plans more bytes for is not run: it would take the machine down."""


class Contender(NamedTuple):
    """A way to a Gram: from a network f to a function of (w, x)."""

    make: Callable[[Any], Callable[[Any, Any], Any]]
    jit: bool = True
    """Compiled here, ahead of time; or called as it is."""
    axes: tuple[int, ...] = (0, 1, 2, 3)
    """Brings its result to the axes (n, k, n, k)."""
    versions: dict[str, str] = {}  # noqa: RUF012


class Worker:
    """One work in one dtype, by one contender."""

    def __init__(self, name: str, dtype: str, size: str, contender: Contender):
        self.name, self.dtype, self.size, self.contender = name, dtype, size, contender
        self.call: Any = None
        self.gram: Any = None

    def build(self, n: int | None = None) -> dict[str, Any]:
        """Compile for n samples and run once, with the peak of memory over what was resident before that run."""
        self.gram = self.call = None
        work = works.make(self.name, self.dtype, self.size, n)
        w, x = jax.tree_util.tree_map(jnp.asarray, (work.w, work.x))
        fn = self.contender.make(work.f)
        start, planned = time.perf_counter(), None
        if self.contender.jit:
            fn = jax.jit(fn).lower(w, x).compile()
            analysis = fn.memory_analysis()
            planned = analysis and analysis.temp_size_in_bytes + analysis.output_size_in_bytes
            if planned and planned > MOST_MEMORY:
                msg = f"{1e-9 * planned:.0f} GB of memory would be needed"
                raise MemoryError(msg)
        compile_s = time.perf_counter() - start
        self.call = lambda: fn(w, x)
        before = settled()
        first_s = self.run()["seconds"]
        facts = {"n": len(work.x), "k": work.k, "num_params": work.num_params, "versions": self.contender.versions}
        peak = None if before is None else resident("VmHWM") - before
        return facts | {"compile_s": compile_s, "first_s": first_s, "peak_bytes": peak, "planned_bytes": planned}

    def run(self, repeats: int = 1) -> dict[str, Any]:
        """Run some more times, and return the median."""
        return {"seconds": statistics.median(self._run() for _ in range(repeats))}

    def _run(self) -> float:
        self.gram = None
        start = time.perf_counter()
        self.gram = jax.block_until_ready(self.call())
        return time.perf_counter() - start

    def check(self, file: str) -> dict[str, Any]:
        """Return the largest error of the reference's rows, in units of the largest entry."""
        want = np.load(file)
        gram = np.asarray(self.gram, np.float64).transpose(self.contender.axes)
        rows = gram[samples(len(gram))].reshape(want.shape)
        return {"error": float(np.max(np.abs(rows - want)) / np.max(np.abs(want)))}

    def gemm(self, shape: list[int]) -> dict[str, Any]:
        """Return the rate of a compiled matrix product (m, inner) by (inner, n), median of eight runs."""
        m, inner, n = shape
        draw = np.random.default_rng(1).standard_normal
        a, b = (jnp.asarray(draw(each).astype(self.dtype)) for each in ((m, inner), (inner, n)))
        product = jax.jit(jnp.matmul).lower(a, b).compile()
        seconds = statistics.median(_seconds(lambda: product(a, b)) for _ in range(8))
        return {"gflops": 2e-9 * m * inner * n / seconds}

    def reference(self, file: str, of: str) -> dict[str, Any]:
        """Write rows of the Gram of the arrays of dtype `of`, contracted in float64, this worker's own dtype."""
        work = works.make(self.name, of, self.size)
        upcast = lambda leaf: leaf.astype(self.dtype) if np.issubdtype(leaf.dtype, np.floating) else leaf
        work = work._replace(w=jax.tree_util.tree_map(upcast, work.w), x=upcast(work.x))
        np.save(file, jacobian_rows(work, samples(len(work.x))))
        return {"n": len(work.x), "k": work.k, "num_params": work.num_params}


def samples(n: int) -> np.ndarray:
    return np.arange(0, n, max(1, n // SAMPLES))[:SAMPLES]


def jacobian_rows(work: works.Work, chosen: np.ndarray) -> np.ndarray:
    """Return rows of J J^T by the definition, one sample's `jacrev` at a time: (len(chosen) k, n k)."""
    jacobian = jax.jit(lambda w, row: jax.jacrev(lambda v: work.f(v, row[None])[0])(w))

    def rows(i: int) -> np.ndarray:
        leaves = jax.tree_util.tree_leaves(jacobian(work.w, work.x[i]))
        return np.concatenate([np.asarray(leaf).reshape(work.k, -1) for leaf in leaves], axis=1)

    few = np.concatenate([rows(i) for i in chosen])
    return np.concatenate([few @ rows(i).T for i in range(len(work.x))], axis=1)


def _seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start


def settled() -> int | None:
    """Give freed memory back, set the peak to what is resident (proc(5)), and tell it; None where that is not known."""
    if not Path("/proc/self/clear_refs").exists():
        return None
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return resident("VmRSS")


def resident(field: str) -> int:
    """Return the bytes of this process, now (VmRSS) or at its peak (VmHWM)."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return next(1024 * int(line.split()[1]) for line in status.splitlines() if line.startswith(field))


def answer(worker: Worker, line: str) -> str:
    """Return the reply to one request, {"do": method, **arguments}; {"failed": why} if it cannot be met."""
    request = json.loads(line)
    try:
        reply = getattr(worker, request.pop("do"))(**request)
    except Exception as error:
        reason = (str(error).strip() or "no reason given").splitlines()[0]
        reply = {"failed": f"{type(error).__name__}: {reason[:200]}"}
    return json.dumps(reply)


def serve(prepare: Callable[[str], Contender]) -> None:
    """Answer requests until there are none; the command line is WORK DTYPE KIND SIZE."""
    name, dtype, kind, size = sys.argv[1:]
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what libraries print is no reply
    if dtype == "float64":
        jax.config.update("jax_enable_x64", True)
    worker = Worker(name, dtype, size, prepare(kind))
    for line in sys.stdin:
        print(answer(worker, line), file=replies, flush=True)
