"""Write the numbers of README.md from the committed benchmark records, or check that they stand there.

Each block between <!-- numbers: NAME --> and <!-- end --> is made from benchmarks/results/NAME.json (flows, explicit
and gram: from those of their works).

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
    """Return the time compared with jax.jvp, and errors compared with the plain difference, one row per model."""
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
    """Return the verdict on the default network, and how long it took."""
    results = record["results"]
    wall = results["wall_s"]
    verdict = "\n".join(f"> {line}" for line in results["verdict"].split("\n"))
    return (
        f"{verdict}\n\nIt takes {wall['cold']:.0f} s on the first run and {wall['warm']:.0f} s on later ones, when the "
        f"compiled programs\nare in the cache. {made(record)}"
    )


def fig1c(record: dict[str, Any]) -> str:
    """Return the time of one column of Figure 1(c), ours and others, and of the figure at its full size."""
    labels = {"ours": "lazyjax", "numpy": "NumPy", "torch_batched": "PyTorch, `torch.func`", "torch_loop": "PyTorch"}
    results = record["results"]
    rows = [
        "| gradient descent of Figure 1(c) | time / ours | share of the GEMM rate | error of w − w0 | paper's size |",
        "|---|---|---|---|---|",
    ]
    for name, label in labels.items():
        row, minutes = results["rows"][name], results["paper_size_minutes"][name]
        cells = [label, f"{results['ratios'][name]:.1f}", f"{row['fraction_of_gemm']:.0%}", f"{row['error']:.0e}"]
        rows.append(f"| {' | '.join([*cells, f'{minutes:.0f} min'])} |")
    note = (
        f"Float32; errors after {results['steps']} steps, relative to float64, of the worst τ; minutes at the paper's "
        "size are extrapolated."
    )
    return "\n".join([*rows, "", f"{note} {made(record)}"])


def train_step(record: dict[str, Any]) -> str:
    """Return what a step at finite alpha costs compared with the plain one."""
    results = record["results"]
    time, memory = (results[name]["finite"] for name in ("ratios", "memory_ratios"))
    return (
        f"A training step at finite α costs {time:.2f} times the plain step of the same network, and {memory:.2f} "
        f"times its memory.\n{made(record)}"
    )


WORKS = {
    "W1": "two-layer tanh, n = 200, T = 10⁴",
    "W2": "two-layer ReLU, n = 1000, T = 10³",
    "W3": "two-layer tanh, n = 1000, T = 10⁴",
    "W4": "MLP on 256 digits, squares, nk = 2560, T = 10⁴",
    "W4b": "MLP on 256 digits, cross-entropy to a loss of 10⁻³",
    "W6": "W1 and W2 with learned features, τ = 0.1",
    "explicit_wins": "two-layer tanh, n = 200",
}
SHORT = ("W4b", "W6", "explicit_wins")
"""Works with a label of their own for each case, in the second table: there an explicit method may be the best."""


def flows(records: dict[str, dict[str, Any]]) -> str:
    """Return seconds of the best peer and of ours, one row per flow."""
    rows = [
        "| flow | α | best peer | its time | ours, solve | all counted | solve ratio | counted ratio |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, result, _ in _cases(records, [work for work in WORKS if work not in SHORT]):
        times = {row: found["solve_s"] for row, found in result["rows"].items()}
        peer_s, whole_s = times[result["best_peer"]], times["auto"]
        cells = [WORKS[name], f"{result['alpha']:g}", result["best_peer"], f"{peer_s:.3g} s"]
        cells += [f"{times['ours']:.2g} s" if "ours" in times else "", f"{whole_s:.2g} s"]
        cells += [f"{peer_s / times['ours']:.3g}" if "ours" in times else "", f"{peer_s / whole_s:.3g}"]
        rows.append(f"| {' | '.join(cells)} |")
    note = (
        "All counted: `gradient_flow` with `solver=None`, Gram and eigendecomposition included. Every solver at its "
        "loosest tolerance for a relative error of the outputs below 10⁻⁴ all along the flow."
    )
    return "\n".join([*rows, "", f"{note} {_made(records, [work for work in WORKS if work not in SHORT])}"])


def explicit(records: dict[str, dict[str, Any]]) -> str:
    """Return the flows for which `solver=None` has a choice: what it took, and its time next to the best peer's."""
    rows = [
        "| flow | case | best peer | its time | `solver=None` takes | its time | ratio |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, result, label in _cases(records, list(SHORT)):
        peer, auto = result["rows"][result["best_peer"]], result["rows"]["auto"]
        peer_s, whole_s = peer["solve_s"], auto["solve_s"]
        cells = [WORKS[name], label, result["best_peer"], f"{peer_s:.2g} s", auto["solver"], f"{whole_s:.2g} s"]
        rows.append(f"| {' | '.join([*cells, f'{peer_s / whole_s:.2g}'])} |")
    return "\n".join([*rows, "", _made(records, list(SHORT))])


def _cases(records: dict[str, dict[str, Any]], works: list[str]) -> list[tuple[str, dict[str, Any], str]]:
    return [(work, result, label) for work in works for label, result in records[work]["results"]["cases"].items()]


GRAMS = {
    "a": "a: two-layer ReLU, 100-1000-1, n = 500",
    "b": "b: ReLU, 784-512-512-512-10, n = 128",
    "c": "c: VGG-11, channels / 8, n = 64, k = 10",
    "d": "d: ResNet, channels / 8, n = 32, k = 10",
    "e": "e: transformer block, n = 32, k = 10",
}


def gram(records: dict[str, dict[str, Any]]) -> str:
    """Return time, peak memory and first call of the peer's best and of ours, one row per network and dtype."""
    rows = [
        "| network | dtype | peer's best | time, peer | ours | ratio | memory, peer | ours | first call, peer | ours |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    fractions = []
    for name, record in records.items():
        for dtype, case in record["results"]["cases"].items():
            best, found = case["best_peer"], case["rows"]
            ours = _gram_cells(found["ours"], found["eager"]["first_s"])
            peer = _gram_cells(found[best], found[best]["compile_s"] + found[best]["first_s"]) if best else [""] * 3
            label, ratio = (best.lower().replace("_", " "), f"{case['ratios']['peer']:.3g}") if best else ("none", "")
            cells = [GRAMS[name], dtype, label, peer[0], ours[0], ratio, peer[1], ours[1], peer[2], ours[2]]
            rows.append(f"| {' | '.join(cells)} |")
            if "products" in case:
                fractions.append(f"{min(case['products']['fraction_of_gemm'].values()):.0%} in {dtype}")
    note = (
        "The peer is neural-tangents 0.6.5 on jax 0.5.3, by the quickest of its four implementations; ≈: extrapolated "
        "from fewer samples. Memory: peak over what is resident before the first run. First call: tracing, compilation "
        f"and a run. Ours of b does its dominant products at {', '.join(fractions)} of the rate of a matrix product."
    )
    command = "python benchmarks/gram.py --peer benchmarks/.peer"
    return "\n".join([*rows, "", f"{note} {made(*records.values(), command=command)}"])


def _gram_cells(row: dict[str, Any], first_s: float) -> list[str]:
    """Return time, memory and first call; of an extrapolated row only the time is that of the full size."""
    time = f"{row['run_s']:.2g} s"
    if row["extrapolated"]:
        return [f"≈ {time}", "", ""]
    return [time, "" if row["peak_bytes"] is None else f"{1e-6 * row['peak_bytes']:.0f} MB", f"{first_s:.1f} s"]


def made(record: dict[str, Any], *others: dict[str, Any], command: str | None = None) -> str:
    """Return where and how records were made, all on one machine; `command` makes them all, None: the record's own."""
    machine, versions = record["machine"], record["versions"]
    if any((other["machine"], other["versions"]) != (machine, versions) for other in others):
        msg = "records of one table must be of one machine and one set of versions; make them anew."
        raise ValueError(msg)
    dates = " and ".join(sorted({each["date"][:10] for each in (record, *others)}))
    return (
        f"(`{command or record['command']}` on {machine['cores']} cores of an {machine['cpu']}, {machine['device']}, "
        f"jax {versions['jax']}, {dates}.)"
    )


def _made(records: dict[str, dict[str, Any]], works: list[str]) -> str:
    return made(*(records[work] for work in works), command=f"python benchmarks/flows.py --only {' '.join(works)}")


def _read(name: str) -> dict[str, Any]:
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8"))


SINGLE = {"finite_jvp": finite_jvp, "report_time": report_time, "fig1c": fig1c, "train_step": train_step}
"""Blocks that are made from one record of their name."""


def rewritten(text: str) -> str:
    """Return the text with every block of numbers made anew."""

    def block(match: re.Match[str]) -> str:
        name = match.group(1)
        if name in ("flows", "explicit"):
            body = {"flows": flows, "explicit": explicit}[name]({work: _read(f"flows_{work}") for work in WORKS})
        elif name == "gram":
            body = gram({work: _read(f"gram_{work}") for work in GRAMS})
        else:
            body = SINGLE[name](_read(name))
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
