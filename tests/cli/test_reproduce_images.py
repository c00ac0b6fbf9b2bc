"""`lazyjax reproduce` of the figures of images: their data, one run for two figures, and every bad request."""

import numpy as np
import pytest
import xarray

from figures import Tiny
from lazyjax.cli import command as cli
from lazyjax.experiments import fig3a_fig7a_deep_scale as deep_scale
from lazyjax.models.deep import NETWORKS

INF = float("inf")
pytestmark = pytest.mark.standard_promotion  # as the command line runs


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fig3a", "--data", "cifar"], "there is no data set 'cifar' among digits, fashion-mnist, cifar10; did you"),
        (["fig3a", "--data", "cifar10"], "cifar10 needs its files, which no package has"),
        (["fig7b", "--data", "cifar10", "--data-dir", "nowhere"], "nowhere holds neither data_batch_1.bin nor"),
        (["fig3b", "--data-dir", "nowhere"], "train-images-idx3-ubyte.gz does not exist"),
        (["fig1c", "--data", "digits"], "--data is for the figures of images (fig3a, fig3b, fig7a, fig7b, precision)"),
        (["fig1c", "--data-dir", "x"], "--data-dir is for the figures of images"),
        (["fig1c", "--size", "gpu"], "size must be one of small, default, paper for fig1c, got 'gpu'"),
        (["fig3a", "--size", "paper"], "size must be one of small, default, gpu for fig3a, got 'paper'"),
        (["fig3a", "--set", "network=lenet"], "there is no network 'lenet'"),
    ],
)
def test_bad_requests_get_one_line_and_nothing_is_written(arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["reproduce", *arguments, "--no-cache", "--out", str(tmp_path / "out")])
    assert stopped.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert len(lines) == 1
    assert message in lines[0]
    assert not (tmp_path / "out").exists()


@pytest.mark.end_to_end
def test_one_run_makes_both_figures(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(NETWORKS, "tiny", Tiny)
    rng, names = np.random.default_rng(0), ("train_loss", "test_loss", "train_accuracy", "test_accuracy")
    measured = {name: rng.uniform(0.1, 1.0, (2, 1)) for name in names}
    measured |= {"stability": np.array([0.9, 1.0]), "failed": np.array([False, False])}
    monkeypatch.setattr(deep_scale, "run_seed", lambda *_, **__: measured)
    changes = ["alphas=1,inf", "seeds=1", "epochs=1", "train=32", "test=20", "batch=16", "width=0.125", "network=tiny"]
    common = ["--size", "small", "--no-cache", "--out", str(tmp_path / "out"), "--set", *changes]
    cli.main(["reproduce", "fig3a", *common])
    assert "stability of activations %, alpha = inf" in capsys.readouterr().out
    monkeypatch.setattr(deep_scale, "run_seed", None)  # what is called again fails
    cli.main(["reproduce", "fig7a", *common])
    assert "training loss, alpha = 1" in capsys.readouterr().out
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {f"{figure}.{kind}" for figure in ("fig3a", "fig7a") for kind in ("nc", "png", "svg")}
    with xarray.open_dataset(tmp_path / "out" / "fig7a.nc") as data:
        assert data.attrs["figure"] == "fig7a"
        assert list(data["alpha"]) == [1.0, INF]
    with pytest.raises(TypeError, match="not callable"):  # other settings are another run
        cli.run_reproduce(cli.Reproduce("fig7a", size="small", out=tmp_path / "b", no_cache=True))
