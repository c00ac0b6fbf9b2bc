"""The command `lazyjax`; `main` is its entry point."""

import gc
import os
import sys
from collections.abc import Sequence

from lazyjax.cli.signals import ending_at_once, interrupting

SELDOM = (1_000_000, 10, 10)
"""Thresholds of Python's garbage collector. Tracing makes millions of small objects and few cycles among them: to look
for cycles as often as Python does by itself takes a sixth of the time."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line with run-time errors as NaN instead of calls back into Python.

    JAX keeps no compiled program on disk that calls back into Python, so every report would compile all its flows
    again. The report looks for NaN in every lane anyway. Equinox reads EQX_ON_ERROR when it is imported, so it is set
    here, before anything imports Equinox; a value that is already set stays. Cycles are looked for seldom.

    Args:
        argv: Arguments; None for those of the process.
    """
    os.environ.setdefault("EQX_ON_ERROR", "nan")
    thresholds = gc.get_threshold()
    gc.set_threshold(*SELDOM)
    try:
        with ending_at_once():
            from lazyjax.cli import command
        with interrupting():
            command.main(argv)
    finally:
        gc.set_threshold(*thresholds)


def run() -> None:
    """Run the command line as a process of its own, which ends with it.

    Once it was interrupted it ends without the usual clearing up, which waits for whatever is under way.
    """
    try:
        main()
    except SystemExit as end:
        if end.code in (130, 143):
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(end.code)
        raise
