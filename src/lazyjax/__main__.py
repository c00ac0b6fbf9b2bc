"""Run the command `lazyjax` as `python -m lazyjax`."""

from lazyjax.cli import main

if __name__ == "__main__":
    main()
