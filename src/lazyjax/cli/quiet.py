"""A filter that keeps the false alarms of XLA about cached programs off the screen, and nothing else."""

import contextlib
import os
import sys
import threading
from collections.abc import Iterator

NOISE = b"cpu_aot_loader"
"""The source file that XLA names in these lines."""


@contextlib.contextmanager
def without_cache_noise() -> Iterator[None]:
    """Drop the lines on stderr that XLA writes for every program that it finds in the compilation cache on CPU.

    They say, twice per program, that the machine does not fit, with the list of its features, because the check takes
    two preferences of XLA's own compiler for features (jax issue 38445). XLA's log level can only be set before JAX is
    imported, so its lines are filtered here, on their way from XLA to the file descriptor. Python's own stderr,
    progress bars included, goes where it went before.
    """
    try:
        direct = sys.stderr.fileno() == 2
    except (OSError, ValueError, AttributeError):
        direct = False
    if not direct:  # a notebook or a test has its own stderr already
        yield
        return
    sys.stderr.flush()
    terminal = os.dup(2)
    reader, writer = os.pipe()
    os.dup2(writer, 2)
    os.close(writer)
    thread = threading.Thread(target=_forward, args=(reader, terminal), daemon=True)
    thread.start()
    python_stderr = sys.stderr
    sys.stderr = os.fdopen(os.dup(terminal), "w", buffering=1, encoding=python_stderr.encoding, errors="replace")
    try:
        yield
    finally:
        sys.stderr.close()
        sys.stderr = python_stderr
        os.dup2(terminal, 2)  # closes the pipe's last writer, which ends the thread
        thread.join()
        os.close(terminal)


def _forward(reader: int, terminal: int) -> None:
    with os.fdopen(reader, "rb") as lines:
        for line in lines:
            if NOISE not in line:
                os.write(terminal, line)
