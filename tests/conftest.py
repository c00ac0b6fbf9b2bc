"""Settings of all tests: float64, no silent promotion, one key per test, one compilation cache per run."""

import gc
import itertools
import os
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path

# Before anything imports matplotlib: no test opens a window.
os.environ["MPLBACKEND"] = "Agg"

import jax
import jax.random as jr
import jaxtyping
import pytest

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


QUICK_SELECTIONS = ("not end_to_end", "end_to_end")
"""What compiles quickly: the default run, as in `pyproject.toml`, and the long runs that only the gate makes."""

WHOLE_FLAGS = "--xla_cpu_parallel_codegen_split_count=1"
"""Compiles a program as one piece: the workers keep all cores busy already."""
QUICK_FLAGS = f"{WHOLE_FLAGS} --xla_cpu_use_fusion_emitters=false"
QUICK_SETTINGS = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
"""What more than halves the time of compilation, at the price of slower programs."""

SELDOM = (1_000_000, 10, 10)
"""Thresholds of Python's garbage collector: what tests trace are millions of objects, with few cycles among them, and
to look for those as often as Python does by itself takes a seventh of the time of a test."""

CASES_OF_NUMBERS = ("tests/flow/", "tests/kernels/", "tests/theory/")
"""Where the cases of a test differ by scales, solvers or tolerances, and hardly by the lines they run."""

CACHE = pytest.StashKey[tempfile.TemporaryDirectory]()

MOST_MAPS = 40_000
"""Memory maps of a process after which compiled programs are forgotten. Each program takes several, Linux allows 65530,
and XLA crashes without any left."""


def pytest_configure(config):
    """Let all workers of a run share what they compile, and compile quickly in the default run and in the long ones.

    Any other selection of tests (`-m optimized`, `-m ""`) compiles as a user's programs are compiled.
    """
    gc.set_threshold(*SELDOM)
    if hasattr(config, "workerinput"):
        return  # a worker has the environment of the process that started it
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        config.stash[CACHE] = tempfile.TemporaryDirectory(prefix="lazyjax-tests-")
        os.environ["JAX_COMPILATION_CACHE_DIR"] = config.stash[CACHE].name
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
    # On a CPU XLA says of each program from a cache that it "could lead to SIGILL", also on the machine that made it.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    quick = config.option.markexpr in QUICK_SELECTIONS
    if quick:
        os.environ.update(QUICK_SETTINGS)
        jax.config.update("jax_disable_most_optimizations", True)
    flags = QUICK_FLAGS if quick else WHOLE_FLAGS
    if "XLA_FLAGS" not in os.environ and _knows(flags):
        os.environ["XLA_FLAGS"] = flags


@pytest.hookimpl(trylast=True)  # after the selection by marks
def pytest_collection_modifyitems(config, items):
    """Start the longest tests first, on all workers: as the last ones, they would keep one worker busy alone.

    Each worker begins with an equal part of the list. Tests of one class stay together: they share what they made.
    """
    if config.pluginmanager.hasplugin("_cov"):  # pytest-cov, when asked for coverage
        _cover_first_cases(items)
    marked = [item for item in items if item.get_closest_marker("long")]
    rest = [item for item in items if not item.get_closest_marker("long")]
    groups = _grouped(marked)
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    left = len(items)
    items.clear()
    for i in range(workers):
        first = [item for group in groups[i::workers] for item in group]
        size = max(left // (workers - i) - len(first), 0)
        items += first + rest[:size]
        left -= len(first) + len(rest[:size])
        rest = rest[size:]
    items += rest


def _cover_first_cases(items):
    """Where cases differ by their numbers, measure the coverage of the first one of each test only.

    To note every line makes a test a half slower, and the other cases run few lines that the first one does not.
    """
    seen = set()
    for item in items:
        test = item.nodeid.partition("[")[0]
        if test in seen and item.nodeid.startswith(CASES_OF_NUMBERS):
            item.add_marker("no_cover")
        seen.add(test)


def pytest_collection_finish():
    """Leave what was imported out of every later search for cycles."""
    gc.collect()
    gc.freeze()


def _grouped(items):
    """Return the tests in groups: of one class, or one alone."""
    return [
        list(group) for _, group in itertools.groupby(items, key=lambda item: getattr(item, "cls", None) or item.nodeid)
    ]


def _knows(flags):
    """Return whether this XLA knows flags: one that it does not know ends the process."""
    env = {**os.environ, "XLA_FLAGS": flags}
    command = [sys.executable, "-c", "import jax; jax.devices()"]
    return subprocess.run(command, env=env, capture_output=True, check=False).returncode == 0


def pytest_unconfigure(config):
    if CACHE in config.stash:
        config.stash[CACHE].cleanup()


@pytest.fixture(autouse=True, scope="module")
def _forget_programs():
    """Forget compiled programs where the memory maps run short."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > MOST_MAPS:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(autouse=True)
def _dtype_promotion(request):
    """Strict everywhere but in tests that say why they cannot be: marked `standard_promotion`."""
    if request.node.get_closest_marker("standard_promotion") is None:
        yield
    else:
        with jax.numpy_dtype_promotion("standard"):
            yield


@pytest.fixture
def untyped():
    """As for users: without the types that are checked in tests, which refuse an argument before the library does."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def getkey(request):
    """A new random key a call; the same ones at every run of the same test, in any order of the tests."""
    key = jr.key(zlib.crc32(request.node.name.encode()))

    def next_key():
        nonlocal key
        key, out = jr.split(key)
        return out

    return next_key
