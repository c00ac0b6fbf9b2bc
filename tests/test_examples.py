"""The example networks, through the command line at toy size."""

import json
from pathlib import Path

import pytest

from lazyjax import cli

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*_cnn.py")), ids=lambda path: path.stem)
def test_example_network_is_diagnosed(path, tmp_path, capsys):
    argv = [
        "report",
        "--model",
        f"{path}:build",
        "--train",
        "10",
        "--alphas",
        "1",
        "1e4",
        "--time",
        "0.1",
        "--no-cache",
    ]
    cli.main([*argv, "--out", str(tmp_path / "out")])
    assert "scales alpha" in capsys.readouterr().err
    content = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    assert content["notes"] == []
    first, lazy, *_ = content["table"]
    assert not first["failed"]
    assert not lazy["failed"]
    # Theorem 2.2: ten thousand times the scale, ten thousandth of the gap.
    assert lazy["output_gap"] < 1e-3 * first["output_gap"]
    assert path.name in content["configuration"]["model"]
