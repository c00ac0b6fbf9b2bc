"""Change files that lazyjax reads at random places, and see what its readers make of them.

    python scripts/fuzz_readers.py                     # 10,000 changed files of each kind, fewer of the slow ones
    python scripts/fuzz_readers.py --only idx --number 100

Every outcome must be the same data, other data of the right form where a format has no checksum, or one error of ours
that names the file. The readers run in a process of their own, in which a crash is seen; it may take 8 GB. Exits with
status 1 if one crashes, hangs, or lets an error of somebody else through.
"""

import argparse
import collections
import contextlib
import gzip
import json
import os
import pickle
import random
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from lazyjax._core.files import DamagedError

Read = Callable[[], Any]
"""Reads the file that was changed, to numbers and texts that can be compared."""

SLOW = {"checkpoint": 300}
"""How many of the kinds of which a reading takes more than a few milliseconds."""

SECONDS = 20
"""The longest that a reading may take."""

REMEDY = "have another one."


# ---- the kinds of files: each writes one into an empty folder, and returns its path and what reads it ----


def cifar_pickle(folder: Path, protocol: int = 2) -> tuple[Path, Read]:
    from lazyjax.data.image_files import _read_pickle

    planes = np.arange(2 * 3072).reshape(2, 3072).astype(np.uint8)
    content = {b"batch_label": b"training", b"labels": [3, 7], b"data": planes, b"filenames": [b"a.png", b"b.png"]}
    path = folder / "data_batch_1"
    path.write_bytes(pickle.dumps(content, protocol))
    return path, lambda: [array.tolist() for array in _read_pickle(path, REMEDY)]


def cifar_pickle_of_python_2(folder: Path) -> tuple[Path, Read]:
    path, read = cifar_pickle(folder)
    data = bytes(range(256)) * 24
    path.write_bytes(
        b"\x80\x02}q\x01(U\x04dataq\x02cnumpy.core.multiarray\n_reconstruct\nq\x03cnumpy\nndarray\nq\x04K\x00\x85U\x01b"
        b"\x87Rq\x05(K\x01K\x02M\x00\x0c\x86cnumpy\ndtype\nq\x06U\x02u1K\x00K\x01\x87Rq\x07(K\x03U\x01|NNNJ\xff\xff\xff\xffJ"
        b"\xff\xff\xff\xffK\x00tbI00\nT\x00\x18\x00\x00" + data + b"tbU\x06labelsq\x08]q\t(K\x01K\x02eu."
    )
    return path, read


def cifar_pickle_of_today(folder: Path) -> tuple[Path, Read]:
    return cifar_pickle(folder, 4)


def cifar_binary(folder: Path) -> tuple[Path, Read]:
    from lazyjax.data.image_files import _read_binary

    rows = np.arange(2 * 3073).reshape(2, 3073).astype(np.uint8)
    rows[:, 0] = (3, 7)
    path = folder / "data_batch_1.bin"
    path.write_bytes(rows.tobytes())
    return path, lambda: [array.tolist() for array in _read_binary(path, REMEDY)]


def idx(folder: Path, *, packed: bool = False) -> tuple[Path, Read]:
    from lazyjax.data.image_files import read_idx

    raw = bytes([0, 0, 8, 3]) + np.asarray((2, 5, 4), ">u4").tobytes() + bytes(range(40))
    path = folder / ("images.gz" if packed else "images")
    path.write_bytes(gzip.compress(raw) if packed else raw)
    return path, lambda: read_idx(folder, "images", 3, REMEDY).tolist()


def idx_packed(folder: Path) -> tuple[Path, Read]:
    return idx(folder, packed=True)


def npz(folder: Path) -> tuple[Path, Read]:
    from lazyjax.data.datasets import load_arrays

    path = folder / "my.npz"
    np.savez(path, x=np.arange(12.0).reshape(4, 3), y=np.array([0, 1, 1, 0]))
    return path, lambda: [np.asarray(array).tolist() for array in load_arrays(path)[:2]]


def chunk(folder: Path) -> tuple[Path, Read]:
    from lazyjax._core.files import read_arrays, write_arrays

    path = folder / "lanes-000000.npz"
    write_arrays(path, [np.arange(12.0).reshape(4, 3), np.array([True, False])], "0123456789abcdef")

    def read() -> Any:
        arrays, owner = read_arrays(path)
        return [owner, *(array.tolist() for array in arrays)]

    return path, read


def configuration(folder: Path) -> tuple[Path, Read]:
    from lazyjax._core.records import check_configuration, read_configuration, write_whole

    path, here = folder / "sweep.json", {"axis a": ["float64", "1.0", "inf"], "chunk": 2, "versions": {"jax": "0.10.1"}}
    write_whole(path, json.dumps(here, indent=1))

    def read() -> Any:
        there = read_configuration(path)
        if there is None:
            with contextlib.suppress(FileNotFoundError):
                path.with_name("sweep.json.damaged").unlink()
            msg = f"{path} was set aside"
            raise ValueError(msg)
        check_configuration(here, there, holder=str(path), kind="sweep")
        return here

    return path, read


def report(folder: Path) -> tuple[Path, Read]:
    from lazyjax.cli.output import check_folder

    path, here = folder / "report.json", {"model": "tanh network", "alphas": [1, "inf"], "time": None, "seed": 0}
    path.write_text(json.dumps({"about": "text", "verdict": "lazy", "table": [{"alpha": 1}], "configuration": here}))
    return path, lambda: check_folder(folder, folder / ".report-partial", here)


def netcdf(folder: Path) -> tuple[Path, Read]:
    import xarray

    from lazyjax.cli.command import _write
    from lazyjax.cli.reproduce import Reproduce, _shared_run, describe_run
    from lazyjax.experiments.figure import settings_of

    settings = settings_of("fig1a", "small")
    options = Reproduce("fig6b", size="small", out=folder)
    data = xarray.Dataset({"loss": (("seed", "step"), np.arange(12.0).reshape(3, 4))}, {"step": np.arange(4)})
    path = folder / "fig1a.nc"
    _write(folder, {path.name: data.assign_attrs(configuration=describe_run(options, settings, "fig1a"))}, {})

    def read() -> Any:
        found = _shared_run(options, settings, "fig1a")
        if found is None:
            msg = f"{path} is not used"
            raise ValueError(msg)
        return found["loss"].values.tolist()

    return path, read


def checkpoint(folder: Path) -> tuple[list[Path], Read]:
    import jax.numpy as jnp

    from lazyjax.training.checkpoint import Checkpoints

    kept, state = folder / "kept", {"u": jnp.arange(6.0), "count": jnp.asarray(3)}
    with Checkpoints(kept) as checkpoints:
        checkpoints.claim({"alpha": [1.0]})
        checkpoints.store(2, state)

    def read() -> Any:
        with Checkpoints(kept) as checkpoints:
            checkpoints.claim({"alpha": [1.0]})
            found = None if checkpoints.latest() is None else checkpoints.load(2, state)
        if found is None:
            msg = f"{kept / '2'} was set aside"
            raise ValueError(msg)
        return {name: np.asarray(value).tolist() for name, value in found.items()}

    return sorted(path for path in kept.rglob("*") if path.is_file()), read


KINDS = {
    kind.__name__: kind
    for kind in (
        cifar_pickle,
        cifar_pickle_of_python_2,
        cifar_pickle_of_today,
        cifar_binary,
        idx,
        idx_packed,
        npz,
        chunk,
        configuration,
        report,
        netcdf,
        checkpoint,
    )
}


# ---- changes ----


def change(raw: bytes, rng: random.Random) -> bytes:
    """Return other bytes: a few flipped, set to extremes, cut off, cut out, put in, doubled, or all new."""
    data, kind = bytearray(raw), rng.randrange(8)
    at = rng.randrange(len(data) + 1)
    size = rng.choice((1, 2, 4, 8, rng.randrange(1, 200)))
    if kind == 0:
        for _ in range(rng.choice((1, 1, 2, 8))):
            if data:
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif kind == 1:
        for _ in range(rng.choice((1, 1, 2, 8))):
            if data:
                data[rng.randrange(len(data))] = rng.randrange(256)
    elif kind == 2:
        data[at : at + size] = rng.choice((b"\xff", b"\x00", b"\x7f", b"\x80")) * size
    elif kind == 3:
        del data[at:]
    elif kind == 4:
        del data[at : at + size]
    elif kind == 5:
        data[at:at] = rng.randbytes(size)
    elif kind == 6:
        data[at:at] = data[at : at + size]
    else:
        data = bytearray(rng.randbytes(rng.randrange(len(data) + 1)))
    return bytes(data)


# ---- the process in which the readers run ----


def work(kind: str, first: int, last: int) -> Iterator[tuple[int, str]]:
    """Yield number and outcome of each changed file: "equal", "other data", "refused", or what went wrong."""
    resource.setrlimit(resource.RLIMIT_AS, (8 * 2**30, 8 * 2**30))
    signal.signal(signal.SIGALRM, _too_long)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as home:
        folder = Path(home) / "folder"
        folder.mkdir()
        path, read = KINDS[kind](folder)
        contents = {one: one.read_bytes() for one in (path if isinstance(path, list) else [path])}
        whole = read()
        for number in range(first, last):
            rng = random.Random(f"{kind} {number}")
            one = rng.choice(sorted(contents))
            changed = change(contents[one], rng)
            one.parent.mkdir(parents=True, exist_ok=True)
            one.write_bytes(changed)
            yield number, "begun"
            signal.alarm(SECONDS)
            yield number, _outcome(read, whole, folder)
            signal.alarm(0)
            if isinstance(path, list):  # a damaged folder was renamed
                for there in (folder / "kept").iterdir():
                    subprocess.run(["rm", "-r", str(there)], check=True)
            for there, content in contents.items():
                there.parent.mkdir(parents=True, exist_ok=True)
                there.write_bytes(content)


def _outcome(read: Read, whole: Any, folder: Path) -> str:
    try:
        found = read()
    except DamagedError:  # who asks for it names the file, and renames it
        return "refused"
    except (ValueError, TypeError, FileNotFoundError) as error:
        return "refused" if str(folder) in str(error) else f"unclear: {error!r:.200}"
    except TimeoutError:
        return "hangs"
    except BaseException as error:  # this is what is looked for
        return f"foreign: {error!r:.200}"
    return "equal" if repr(found) == repr(whole) else "other data"


def _too_long(*_: Any) -> None:
    raise TimeoutError


# ---- the process that watches it ----


def watch(kind: str, number: int) -> collections.Counter[str]:
    """Return how often each outcome came; after a crash the work goes on with the next file."""
    outcomes: collections.Counter[str] = collections.Counter()
    first = 0
    while first < number:
        command = [sys.executable, __file__, "--work", kind, str(first), str(number)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        begun = None
        while line := _next_line(process):
            at, _, outcome = line.rstrip("\n").partition(" ")
            if outcome == "begun":
                begun = int(at)
            else:
                outcomes[outcome] += 1
                first, begun = int(at) + 1, None
        _, errors = process.communicate()
        if process.returncode == 0:
            break
        if begun is None:
            sys.exit(f"{kind}: the readers did not run\n{errors}")
        outcomes[f"crash: status {process.returncode} at file {begun}"] += 1
        first = begun + 1
    return outcomes


def _next_line(process: subprocess.Popen[str]) -> str:
    """Return the next line of the process; end it if none comes: in compiled code it does not see its alarm."""
    assert process.stdout is not None
    timer = threading.Timer(3 * SECONDS, process.kill)
    timer.start()
    line = process.stdout.readline()
    timer.cancel()
    return line


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--only", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--number", type=int, help="changed files of each kind")
    parser.add_argument("--work", nargs=3, metavar=("KIND", "FIRST", "LAST"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        kind, first, last = options.work
        for number, outcome in work(kind, int(first), int(last)):
            print(number, outcome.replace("\n", " "), flush=True)
        return
    bad = 0
    for kind in options.only:
        outcomes = watch(kind, options.number or SLOW.get(kind, 10_000))
        fine = {name: outcomes.pop(name, 0) for name in ("equal", "other data", "refused")}
        print(f"{kind:22}", ", ".join(f"{name} {count}" for name, count in fine.items()), flush=True)
        for outcome, count in outcomes.most_common():
            print(f"    {count} times {outcome}", flush=True)
        bad += sum(outcomes.values())
    print(f"{bad} crashes, hangs and errors of others")
    sys.exit(bad > 0)


if __name__ == "__main__":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    main()
