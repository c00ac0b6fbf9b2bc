"""Write the numbers of README.md from the committed benchmark records, or check that they stand there.

Each block between <!-- numbers: NAME --> and <!-- end --> is made from benchmarks/results/NAME.json.

    python scripts/readme_numbers.py          # rewrite the blocks
    python scripts/readme_numbers.py --check  # exit 1 if a block is out of date
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MODELS = {
    "mlp_tanh": "MLP, tanh",
    "mlp_relu": "MLP, ReLU",
    "mlp_gelu_tanh": "MLP, GELU (tanh)",
    "mlp_gelu_erf": "MLP, GELU (erf)",
    "vgg_relu": "CNN, ReLU, max pooling",
}


def finite_jvp(record: dict[str, Any]) -> str:
    """Time beside jax.jvp, and errors beside the plain difference, one row a model."""
    rows = [
        "| float32 | time / `jax.jvp` | error at α = 1 | 10³ | 10⁷ | 10¹² | plain difference at 10⁷ |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, label in MODELS.items():
        result = record["results"][name]
        errors = result["errors"]
        exact = " | ".join(f"{errors[alpha]['exact']:.0e}" for alpha in ("1", "1000", "1e+07", "1e+12"))
        ratio = result["ratios"]["finite_jvp"]
        rows.append(f"| {label} | {ratio:.1f} | {exact} | {errors['1e+07']['plain']:.0%} |")
    return "\n".join([*rows, "", made(record)])


def report_time(record: dict[str, Any]) -> str:
    """The verdict on the default network, and how long it took."""
    results = record["results"]
    wall = results["wall_s"]
    verdict = "\n".join(f"> {line}" for line in results["verdict"].split("\n"))
    return (
        f"{verdict}\n\nIt takes {wall['cold']:.0f} s on the first run and {wall['warm']:.0f} s on later ones, when the "
        f"compiled programs\nare in the cache. {made(record)}"
    )


def made(record: dict[str, Any]) -> str:
    """Where and how a record was made."""
    machine, versions = record["machine"], record["versions"]
    return (
        f"(`{record['command']}` on {machine['cores']} cores of an {machine['cpu']}, {machine['device']}, "
        f"jax {versions['jax']}, {record['date'][:10]}.)"
    )


def rewritten(text: str) -> str:
    """The text with every block of numbers made anew."""

    def block(match: re.Match[str]) -> str:
        name = match.group(1)
        record = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8"))
        body = {"finite_jvp": finite_jvp, "report_time": report_time}[name](record)
        return f"<!-- numbers: {name} -->\n{body}\n<!-- end -->"

    return re.sub(r"<!-- numbers: (\w+) -->\n.*?<!-- end -->", block, text, flags=re.DOTALL)


def main() -> int:
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    new = rewritten(text)
    if "--check" in sys.argv[1:]:
        return int(new != text)
    readme.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
