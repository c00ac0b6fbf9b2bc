"""What Ctrl-C and a polite kill do to the command: one line, an exit status that says so, and nothing half-written."""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

SIGNALS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}
"""The signals that end the command, and what it says then."""

PATIENCE_SECONDS = 5.0
"""How long a signal may wait for a compiled program to return to Python; after that the process ends without it."""


class Interrupted(KeyboardInterrupt):
    """A signal that came while the command was at work.

    Attributes:
        line: What is to be said of it.
        code: The exit status.
    """

    def __init__(self, number: int) -> None:
        super().__init__()
        self.line, self.code = SIGNALS[signal.Signals(number)], exit_code(number)


def exit_code(number: int) -> int:
    """Return the exit status of a process that a signal has ended, as a shell has it."""
    return 128 + number


@contextlib.contextmanager
def ending_at_once() -> Iterator[None]:
    """End the process on a signal in the `with` block, which only imports: an import must not be broken off."""
    with _handling(lambda number, _: _end(number, "nothing written")):
        yield


@contextlib.contextmanager
def interrupting() -> Iterator[None]:
    """Raise `Interrupted` on a signal in the `with` block, or end the process if Python does not get to it in time.

    Every file is written whole or not at all, so that the end of a process takes no more than what is under way.
    """
    with _handling(_raise), _watching():
        yield


def _raise(number: int, _: FrameType | None) -> None:
    raise Interrupted(number)


def _end(number: int, left: str) -> None:
    # Not to 2, of which the command filters what others write.
    os.write(sys.stderr.fileno(), f"\nlazyjax: {SIGNALS[signal.Signals(number)]}, {left}\n".encode())
    os._exit(exit_code(number))


@contextlib.contextmanager
def _handling(handler: Callable[[int, FrameType | None], Any]) -> Iterator[None]:
    """Handle the signals in the `with` block; only the main thread may."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handled in before.items():
            signal.signal(number, handled)


@contextlib.contextmanager
def _watching() -> Iterator[None]:
    """Watch for signals from a thread of its own, which runs also while the main one is in a compiled program."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=_wait, args=(reader,), daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(writer)


def _wait(reader: int) -> None:
    with os.fdopen(reader, "rb", buffering=0) as numbers:
        while number := numbers.read(1):
            if number[0] in SIGNALS:
                time.sleep(PATIENCE_SECONDS)
                _end(number[0], "what was finished is kept: the same command continues from there")
