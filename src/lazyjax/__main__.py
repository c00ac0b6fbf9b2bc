"""`python -m lazyjax` is the command `lazyjax`."""

from lazyjax.cli.main import main

if __name__ == "__main__":
    main()
