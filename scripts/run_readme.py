"""Run what the documents show, so that it cannot drift from what the code does.

    python scripts/run_readme.py README.md              # every ```python block, in order, in one namespace
    python scripts/run_readme.py --print main README.md # the ```bash block under <!-- ci: main -->

A block fails by raising. Line numbers in a traceback are those of the document.
"""

import argparse
import re
import sys
from pathlib import Path

BLOCK = re.compile(
    r"(?:^<!-- *ci: *(?P<marker>[\w-]+) *-->[ \t]*\n\s*)?"
    r"^```(?P<language>\w+)[^\n]*\n(?P<code>.*?)^```[ \t]*$",
    re.MULTILINE | re.DOTALL,
)


def blocks(text: str) -> list[tuple[str, str | None, int, str]]:
    """Return (language, marker, lines before the code, code) of every fenced block of a document."""
    return [(m["language"], m["marker"], text[: m.start("code")].count("\n"), m["code"]) for m in BLOCK.finditer(text)]


def marked(path: Path, marker: str) -> str:
    """Return the one bash block of a document under a marker."""
    text = path.read_text(encoding="utf-8")
    found = [code for language, name, _, code in blocks(text) if language == "bash" and name == marker]
    if len(found) != 1:
        msg = f"{path} must have one ```bash block under <!-- ci: {marker} -->, found {len(found)}."
        raise SystemExit(msg)
    return found[0]


def run(path: Path) -> int:
    """Run the Python blocks of a document in one namespace; return how many there were."""
    namespace = {"__name__": "__main__", "__file__": str(path)}
    python = [block for block in blocks(path.read_text(encoding="utf-8")) if block[0] == "python"]
    for _, _, line, code in python:
        exec(compile("\n" * line + code, str(path), "exec"), namespace)
    return len(python)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--print", metavar="MARKER", help="print the bash block under this marker, run nothing")
    parser.add_argument("documents", nargs="+", type=Path)
    args = parser.parse_args()
    for path in args.documents:
        if args.print:
            sys.stdout.write(marked(path, args.print))
        elif (count := run(path)) == 0:
            msg = f"{path} shows no ```python block to run."
            raise SystemExit(msg)
        else:
            print(f"{path}: {count} blocks ran")


if __name__ == "__main__":
    main()
