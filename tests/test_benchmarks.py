"""The benchmark harness at toy size: what it times, what it writes."""

import json
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import harness
import readme_numbers


def test_measure_keeps_compile_and_run_apart():
    result = harness.measure(lambda x: jnp.sin(x) @ x, jnp.ones(8), repeats=3, min_time=0.0)
    assert result["compile_s"] > result["run_s"] > 0
    assert len(result["runs"]) == 3
    assert result["run_s"] == sorted(result["runs"])[1]


def test_measure_without_jit_times_any_function():
    result = harness.measure(lambda x: time.sleep(0.01) or x, np.ones(2), repeats=3, min_time=0.0, jit=False)
    assert result["run_s"] >= 0.01
    assert result["compile_s"] < 0.1


def test_measure_repeats_a_quick_function_for_a_while():
    result = harness.measure(lambda x: x + 1, jnp.ones(2), repeats=1, min_time=0.01)
    assert sum(result["runs"]) >= 0.01
    assert len(result["runs"]) > 1


def test_compare_gives_ratios_and_errors():
    def slow(x):
        time.sleep(0.02)
        return np.asarray(x) * 2.5

    result = harness.compare(
        {"quick": lambda x: 2 * x, "slow": slow},
        jnp.ones(3),
        repeats=3,
        min_time=0.0,
        jit={"quick": True, "slow": False},
        reference=2 * np.ones(3),
    )
    assert result["ratios"]["quick"] == 1
    assert result["ratios"]["slow"] > 1
    assert result["quick"]["error"] == 0
    assert result["slow"]["error"] == pytest.approx(0.25)


def test_write_records_the_results_with_versions_and_machine(tmp_path):
    path = harness.write(
        "toy", {"ours": {"run_s": jnp.asarray(0.5), "sizes": np.arange(2)}}, directory=tmp_path / "new"
    )
    record = json.loads(path.read_text(encoding="utf-8"))
    assert path.name == "toy.json"
    assert record["results"] == {"ours": {"run_s": 0.5, "sizes": [0, 1]}}
    assert set(record["versions"]) == {"python", *harness.PACKAGES}
    assert record["machine"]["cores"] >= 1
    assert not any(Path(word).is_absolute() for word in record["command"].split()[:2])


def test_index_names_every_benchmark():
    folder = Path(harness.__file__).parent
    index = (folder / "README.md").read_text(encoding="utf-8")
    for path in folder.glob("*.py"):
        assert path.name == "harness.py" or f"`{path.name}`" in index


def test_the_numbers_of_the_readme_are_those_of_the_records():
    text = (harness.ROOT / "README.md").read_text(encoding="utf-8")
    assert text.count("<!-- numbers: ") == 4
    assert readme_numbers.rewritten(text) == text
    altered = text.replace(" s on the first run", "0 s on the first run")
    assert altered != text
    assert readme_numbers.rewritten(altered) == text
