"""What `import lazyjax` adds to the imports of the libraries it stands on; fails above a limit.

Both imports run in fresh processes, in turn, so that a busy machine slows both; the minimum of each counts.
"""

import argparse
import subprocess
import sys

BASE = "import jax, diffrax, optax, equinox"
TIMED = "import time; start = time.perf_counter(); {}; print(time.perf_counter() - start)"


def seconds(statement: str) -> float:
    """Return the time of an import statement in a fresh process."""
    command = [sys.executable, "-c", TIMED.format(statement)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=float, default=0.5, help="seconds that lazyjax may add")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    # The first run of each writes byte code and warms the file cache: not counted.
    pairs = [(seconds(BASE), seconds(f"{BASE}, lazyjax")) for _ in range(args.repeats + 1)][1:]
    base, full = (min(times) for times in zip(*pairs, strict=True))
    print(f"{BASE}: {base:.2f} s; with lazyjax: {full:.2f} s; difference {full - base:.2f} s")
    if full - base > args.limit:
        msg = f"import lazyjax adds {full - base:.2f} s, more than {args.limit} s."
        raise SystemExit(msg)


if __name__ == "__main__":
    main()
