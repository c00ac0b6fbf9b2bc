"""How long does `lazyjax report` take at its default size, on the first run and on later ones?

Cold: a fresh process, an empty compilation cache. Warm: another fresh process, the cache that the first one
filled. Wall time and peak memory are those of the process; what the report itself timed is kept next to them.

    python benchmarks/report_time.py
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import harness


def run_report(out: Path, cache: Path, options: list[str]) -> dict[str, Any]:
    """Time one `lazyjax report` in a fresh process: wall seconds, CPU seconds, peak memory, its own timings."""
    command = [
        str(Path(sys.executable).with_name("lazyjax")),
        "report",
        "--out",
        str(out),
        "--cache",
        str(cache),
        *options,
    ]
    start = time.perf_counter()
    # As installed for a user: with Python's bytecode on disk.
    env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=env)
    # wait4 and not RUSAGE_CHILDREN: that one keeps the largest peak of all children so far.
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    unit = 1 if sys.platform == "darwin" else 1024
    return {
        "wall_s": wall,
        "cpu_s": usage.ru_utime + usage.ru_stime,
        "peak_rss_mib": usage.ru_maxrss * unit / 2**20,
        "reported": reported_timings(out),
    }


def reported_timings(out: Path) -> dict[str, Any]:
    """Return the timings that the report wrote into its report.json."""
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    return {key: value for key, value in report.items() if "time" in key or "timing" in key or key.endswith("_s")}


def keep_figures(folder: Path) -> None:
    """Store the two figures of this run that the README shows."""
    target = harness.ROOT / "docs" / "figures"
    target.mkdir(parents=True, exist_ok=True)
    for name in ("scores.png", "gaps.png"):
        shutil.copyfile(folder / name, target / name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="pairs of a cold and a warm run")
    parser.add_argument("options", nargs="*", help="options of `lazyjax report`, after --")
    args = parser.parse_args()
    runs: dict[str, list[dict[str, Any]]] = {"cold": [], "warm": []}
    for _ in range(args.repeats):
        with tempfile.TemporaryDirectory() as folder:
            for kind in ("cold", "warm"):
                runs[kind].append(run_report(Path(folder) / kind, Path(folder) / "cache", args.options))
                print(f"{kind}: {runs[kind][-1]['wall_s']:.1f} s, {runs[kind][-1]['peak_rss_mib']:.0f} MiB")
            verdict = json.loads((Path(folder) / "cold" / "report.json").read_text(encoding="utf-8"))["verdict"]
            keep_figures(Path(folder) / "cold" / "figures")
    best = {kind: min(run["wall_s"] for run in found) for kind, found in runs.items()}
    results = {"verdict": verdict, "wall_s": best, "warm_over_cold": best["warm"] / best["cold"], "runs": runs}
    print(harness.write("report_time", results).relative_to(harness.ROOT))


if __name__ == "__main__":
    main()
