"""Kill what keeps files, at its writes and at random times, run it again, and compare the results bit by bit.

    python scripts/kill_writers.py                     # 25 kills at writes and 25 at random times of each of the four
    python scripts/kill_writers.py --only sweep --number 5

The four are `sweep`, `train`, `lazyjax reproduce` and `lazyjax report` (its flows replaced by a small sweep). Each runs
in a fork, so that a kill takes no import. Exits with status 1 if a second run fails, gives other results, leaves files
that do not belong there, or computes a finished chunk again.
"""

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import optax
import xarray

import lazyjax as lj
from lazyjax.cli import command
from lazyjax.report.diagnose import LazinessReport

CALLS = ("fsync", "replace", "rename", "mkdir", "unlink", "rmdir")
"""What changes names in folders, or is between the writing of a file and its name."""

ALPHAS = [1.0, 10.0, 100.0, 1000.0]
TINY = ["n=10", "d=5", "width=4", "taus=0.2,2", "seeds=3", "steps=20", "frames=3", "lazy_from=100"]


# ---- the four: each works in a folder and writes its results to a file ----


def run_sweep(folder: Path, out: Path) -> None:
    save(out, small_sweep(folder / "kept"))


def small_sweep(folder: Path) -> xarray.Dataset:
    return lj.sweep(lambda alpha: {"y": jnp.sin(alpha * jr.normal(jr.key(0), (50,)))}, over={"alpha": ALPHAS},
                    chunk=1, folder=folder)  # fmt: skip


def run_train(folder: Path, out: Path) -> None:
    net = lj.models.two_layer(jnp.tanh)
    x = jr.normal(jr.key(1), (12, 3))
    options = lj.training.TrainingOptions(folder=folder / "kept")
    given = {"alpha": jnp.asarray(ALPHAS), "epochs": 4, "batch_size": 4, "key": jr.key(2), "options": options}
    training = lj.train(net, net.init(jr.key(0), d=3, width=4), x, x[:, 0], optax.sgd(0.1, 0.9), **given)
    np.savez(out, *jtu.tree_leaves(eqx.filter(training, eqx.is_array)))


def run_reproduce(folder: Path, out: Path) -> None:
    command.main(["reproduce", "fig1c", "--size", "small", "--cache", str(folder.parent / "cache"),
                  "--out", str(folder), "--set", *TINY])  # fmt: skip
    assert sorted(path.name for path in folder.iterdir()) == ["fig1c.nc", "fig1c.png", "fig1c.svg"]
    save(out, xarray.load_dataset(folder / "fig1c.nc", engine="netcdf4"))


class Told(LazinessReport):
    """A report of a sweep that has none of its measures."""

    def __str__(self) -> str:
        return self.verdict


def run_report(folder: Path, out: Path) -> None:
    def diagnose(*_: Any, folder: Path, **__: Any) -> LazinessReport:
        return Told(small_sweep(folder / "scales"), {}, "lazy", ())

    command.diagnose = diagnose
    command.report_figures = lambda _: {}
    command.render_files = lambda *_: {"report.html": b"page", "report.json": b'{"configuration": {}}'}
    command.describe = lambda *_, **__: {}
    command.main(["report", "--train", "10", "--no-cache", "--out", str(folder)])
    assert sorted(path.name for path in folder.iterdir()) == ["report.html", "report.json", "sweep.nc"]
    save(out, xarray.load_dataset(folder / "sweep.nc", engine="netcdf4"))


def save(out: Path, data: xarray.Dataset) -> None:
    np.savez(out, **{str(name): values for name, values in data.variables.items() if values.dtype.kind in "iufb"})


MECHANISMS = {"sweep": run_sweep, "train": run_train, "reproduce": run_reproduce, "report": run_report}


# ---- kills ----


def fork(function: Callable[[], Any], wait: float | None = None) -> int:
    """Run a function in a fork, which is killed after some seconds if they are given; return the exit status."""
    child = os.fork()
    if child == 0:
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            if wait is not None:
                os.dup2(1, 2)
            function()
        except SystemExit as end:
            os._exit(end.code if isinstance(end.code, int) else 1)
        except BaseException as error:  # told by the exit status
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            os._exit(1)
        os._exit(0)
    if wait is not None:
        time.sleep(wait)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killing(number: int, told: Path) -> None:
    """Kill this process before a call that changes files; the number of calls goes to a file."""
    calls = 0

    def counted(real: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == number:
                os.kill(os.getpid(), signal.SIGKILL)
            told.write_text(str(calls))
            return real(*args, **kwargs)

        return call

    for name in CALLS:
        setattr(os, name, counted(getattr(os, name)))


def survive(name: str, number: int, home: Path) -> tuple[int, int]:
    """Return how many kills hit, and how many of them were not survived."""
    run = MECHANISMS[name]
    whole, told = home / f"{name}.npz", home / "calls"

    def counted() -> None:
        killing(-1, told)
        run(home / name / "whole", whole)

    fork(lambda: run(home / name / "first", home / "first.npz"))  # fills the cache of compiled programs
    start = time.perf_counter()
    if fork(counted) != 0:
        sys.exit(f"{name} does not run")
    seconds, total = time.perf_counter() - start, int(told.read_text())
    places: list[tuple[str, float]] = [("write", int(n)) for n in np.unique(np.linspace(1, total, number).astype(int))]
    rng = random.Random(name)
    places += [("time", rng.uniform(0.1 * seconds, seconds)) for _ in range(number)]
    hits = bad = 0
    for i, (kind, place) in enumerate(places):
        folder, out = home / name / str(i), home / f"{name}-{i}.npz"

        def killed(folder: Path = folder, place: float = place, kind: str = kind) -> None:
            if kind == "write":
                killing(int(place), told)
            run(folder, home / "unused.npz")

        hits += fork(killed, None if kind == "write" else place) == -signal.SIGKILL
        kept = {path: path.stat().st_mtime_ns for path in folder.rglob("lanes-*.npz")}
        status = fork(lambda folder=folder, out=out: run(folder, out))
        again = [path for path, at in kept.items() if path.exists() and path.stat().st_mtime_ns != at]
        if status != 0 or not same(whole, out) or again:
            bad += 1
            print(f"    not survived: {name} killed at {kind} {place}, status {status}", flush=True)
    return hits, bad


def same(one: Path, other: Path) -> bool:
    with np.load(one) as a, np.load(other) as b:
        return a.files == b.files and all(
            (a[n].dtype, a[n].shape, a[n].tobytes()) == (b[n].dtype, b[n].shape, b[n].tobytes()) for n in a.files
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=MECHANISMS, default=list(MECHANISMS))
    parser.add_argument("--number", type=int, default=25, help="kills at writes, and at random times, of each")
    options = parser.parse_args()
    lost = 0
    for name in options.only:
        with tempfile.TemporaryDirectory() as home:
            hits, bad = survive(name, options.number, Path(home))
        print(f"{name:10} {hits} kills, {bad} not survived", flush=True)
        lost += bad
    sys.exit(lost > 0)


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    main()
