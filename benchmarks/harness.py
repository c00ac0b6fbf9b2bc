"""Measure compile time, run time and accuracy apart, and write them down with what they were measured on.

One question a file, one record a question. A file under `benchmarks/` builds its functions, calls `compare`
(or `measure` for one alone), and ends with `write`:

    results = harness.compare({"ours": ours, "peer": peer}, x, reference=truth)
    harness.write("gram", results)
"""

import datetime as dt
import importlib.metadata
import json
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.tree_util as jtu
import numpy as np

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = ["jax", "jaxlib", "numpy", "diffrax", "equinox", "optax", "lazyjax"]


def measure(
    fn: Callable[..., Any], *args: Any, repeats: int = 5, min_time: float = 0.2, jit: bool = True
) -> dict[str, Any]:
    """Return times of one function.

    Args:
        fn: The function; a pytree of arrays in and out.
        *args: Its arguments.
        repeats: Runs to time at least.
        min_time: Seconds of timed runs at least: more runs of a quick function.
        jit: Compile ahead of time, `jax.jit(fn).lower(*args).compile()`. False for what compiles itself or
            is not JAX at all: then the first call, less a usual one, counts as compilation.

    Returns:
        {"compile_s", "run_s" (median), "runs" (list)}, all in seconds.
    """
    return compare({"fn": fn}, *args, repeats=repeats, min_time=min_time, jit=jit)["fn"]


def compare(
    fns: dict[str, Callable[..., Any]],
    *args: Any,
    repeats: int = 5,
    min_time: float = 0.2,
    jit: bool | dict[str, bool] = True,
    reference: Any = None,
) -> dict[str, Any]:
    """Return times of several functions of the same arguments, run in turn so that a busy machine slows all alike.

    Args:
        fns: Functions by name; the first is what the ratios refer to.
        *args: The arguments of each.
        repeats: Rounds at least.
        min_time: Seconds of timed runs at least, for each function.
        jit: As in `measure`; or by name.
        reference: The true result, for the errors; None for no errors.

    Returns:
        For each name what `measure` returns and, given a reference, "error" (relative, in the Euclidean norm
        of all leaves); and "ratios": run time over that of the first function, by name.
    """
    ready, results = {}, {}
    for name, fn in fns.items():
        call, first_s, out = _first_call(fn, args, jit[name] if isinstance(jit, dict) else jit)
        ready[name] = call
        results[name] = {"compile_s": first_s, "run_s": None, "runs": []}
        if reference is not None:
            results[name]["error"] = relative_error(out, reference)
    names = list(fns)
    for turn in range(10**6):
        times = {name: sum(results[name]["runs"]) for name in names}
        if turn >= repeats and min(times.values()) >= min_time:
            break
        # Each round starts with another function: none always runs in the wake of the same neighbor.
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            results[name]["runs"].append(_seconds(ready[name], args)[0])
    for name, result in results.items():
        result["run_s"] = statistics.median(result["runs"])
        if ready[name] is fns[name]:
            result["compile_s"] = max(0.0, result["compile_s"] - result["run_s"])
    base = results[names[0]]["run_s"]
    return results | {"ratios": {name: results[name]["run_s"] / base for name in names}}


def _first_call(fn: Callable[..., Any], args: tuple[Any, ...], jit: bool) -> tuple[Callable[..., Any], float, Any]:
    """Return what to time from now on, the seconds to get there, and a result; the timed runs start warm."""
    if not jit:
        first_s, out = _seconds(fn, args)
        return fn, first_s, out
    start = time.perf_counter()
    compiled = jax.jit(fn).lower(*args).compile()
    compile_s = time.perf_counter() - start
    return compiled, compile_s, _seconds(compiled, args)[1]


def _seconds(fn: Callable[..., Any], args: tuple[Any, ...]) -> tuple[float, Any]:
    start = time.perf_counter()
    out = jax.block_until_ready(fn(*args))
    return time.perf_counter() - start, out


def relative_error(x: Any, truth: Any) -> float:
    """Return ||x - truth|| / ||truth|| over all leaves, in float64."""
    a, b = (np.concatenate([np.ravel(np.asarray(leaf, np.float64)) for leaf in jtu.tree_leaves(t)]) for t in (x, truth))
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def environment() -> dict[str, Any]:
    """Return versions, machine, date and command of a record."""
    device = jax.devices()[0]
    return {
        "date": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        "command": _command(),
        "versions": {"python": platform.python_version()} | {p: importlib.metadata.version(p) for p in PACKAGES},
        "machine": {
            "cpu": _cpu_model(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
            "system": f"{platform.system()} {platform.machine()}",
            "backend": device.platform,
            "device": device.device_kind,
            "devices": jax.device_count(),
        },
    }


def _command() -> str:
    """Return the command line as one would type it in the repository: no paths of this machine."""
    script = Path(sys.argv[0]).resolve()
    name = str(script.relative_to(ROOT)) if script.is_relative_to(ROOT) else script.name
    return shlex.join(["python", name, *sys.argv[1:]])


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def write(name: str, results: Any, *, directory: Path = RESULTS) -> Path:
    """Write a record, `<directory>/<name>.json`: the results and the environment; where it lies."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{name}.json"
    record = {"name": name, **environment(), "results": results}
    path.write_text(json.dumps(record, indent=2, default=_plain) + "\n", encoding="utf-8")
    return path


def _plain(value: Any) -> Any:
    """Return arrays and NumPy or JAX scalars as JSON knows them."""
    return np.asarray(value).tolist()
