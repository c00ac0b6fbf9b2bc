"""Run the command `lazyjax` as `python -m lazyjax`."""

from lazyjax.cli import run

if __name__ == "__main__":
    run()
