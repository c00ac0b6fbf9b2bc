"""The shell's door to the command `lazyjax`: what must be set before Equinox is imported."""

import os


def main() -> None:
    """Run `lazyjax.cli`, its run-time errors as NaN instead of calls back into Python.

    JAX keeps no compiled program on disk that calls back, so a second report would compile all its flows again. The
    report looks for NaN in every lane anyway. Whoever sets EQX_ON_ERROR keeps it.
    """
    os.environ.setdefault("EQX_ON_ERROR", "nan")
    from lazyjax.cli.main import main as command

    command()
