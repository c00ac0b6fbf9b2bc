"""The example networks: their shapes by tracing; at toy size in the command and in training loops, as a user runs them.

The Equinox network goes through the whole command in tests/cli.
"""

import json
import runpy
from pathlib import Path

import equinox as eqx
import jax
import jax.random as jr
import numpy as np
import pytest

from lazyjax.cli import command as cli
from lazyjax.data.datasets import digits

EXAMPLES = Path(__file__).parents[1] / "examples"


each_network = pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*_cnn.py")), ids=lambda path: path.stem)


@each_network
def test_a_batch_gives_a_row_an_image(path):
    key, x = jr.key(0), digits(10).x
    outputs = eqx.filter_eval_shape(lambda key, x: _outputs(path, key, x), key, x)
    assert outputs.shape == (10, 10)
    assert outputs.dtype == x.dtype


def _outputs(path, key, x):
    f, params = runpy.run_path(str(path))["build"](key)
    return f(params, x)


@pytest.mark.end_to_end
@each_network
def test_a_row_depends_on_its_image_only(path):
    f, params = runpy.run_path(str(path))["build"](jr.key(0))
    x = digits(10).x
    outputs = jax.jit(f)(params, x)
    np.testing.assert_allclose(f(params, x[:3]), outputs[:3], rtol=1e-10)


@pytest.mark.end_to_end
def test_the_flax_network_is_diagnosed_by_the_command(tmp_path, capsys):
    data = digits(10)
    np.savez(tmp_path / "my.npz", x=data.x, y=data.y)
    argv = ["report", "--model", f"{EXAMPLES / 'flax_cnn.py'}:build", "--data", str(tmp_path / "my.npz")]
    cli.main([*argv, "--alphas", "1", "1e4", "--time", "0.1", "--no-cache", "--out", str(tmp_path / "out")])
    assert "scales alpha" in capsys.readouterr().err
    content = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    first, lazy, *_ = content["table"]
    assert lazy["output_gap"] < 1e-3 * first["output_gap"]
    assert content["notes"] == []
    assert content["settings"]["num_test"] == 0
    assert "flax_cnn.py:build" in content["configuration"]["model"]


@pytest.mark.end_to_end
@pytest.mark.parametrize("name", ["optax", "flax", "equinox"])
def test_laziness_is_tracked_in_every_training_loop(name, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    example = runpy.run_path(str(EXAMPLES / "track.py"))
    data = digits(20)
    first, *_, last = example["LOOPS"][name](data.x, data.y, data.x[:4], 4)
    for field in ("relative_displacement", "relative_error", "kernel_drift"):
        assert 0 < getattr(first, field) < getattr(last, field) < 2
    assert 0.5 < last.kernel_alignment < first.kernel_alignment < 1
    assert (last.stability is None) == (name != "optax")
    example["main"](name, samples=20, steps=1)
    assert len(capsys.readouterr().out.splitlines()) == 2
