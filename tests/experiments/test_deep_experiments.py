"""Figures 3 and 7 and the precision of large scales, at tiny size: what they measure, their data, every bad request."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import pytest
import xarray

import lazyjax as lj
from lazyjax.cli import command as cli
from lazyjax.data.images import load_images
from lazyjax.experiments import catalogue, deep, deep_precision
from lazyjax.experiments import fig3a_fig7a_deep_scale as deep_scale
from lazyjax.experiments import fig3b_deep_wide as deep_wide
from lazyjax.experiments import fig7b_deep_spectrum as deep_spectrum
from lazyjax.models.convolution import Maker, convolve, pool
from lazyjax.models.deep import NETWORKS
from lazyjax.plot import report as plot

INF = float("inf")
# VGG-11 is tried in test_networks.py, and in the notebook with these figures; here compilation would be all the cost.
TINY = {"data": "digits", "width": 1 / 8, "train": 96, "test": 40, "batch": 16}


class Tiny(eqx.Module):
    """Two convolutions of images 32 x 32, and a last layer."""

    def __call__(self, w, x):
        return self.run(w, x)[0]

    def preactivations(self, w, x):
        return self.run(w, x)[1]

    def run(self, w, x):
        hidden = [convolve(w["first"], x, stride=4)]
        hidden.append(convolve(w["second"], pool(jax.nn.relu(hidden[0])), stride=2))
        z = jax.nn.relu(hidden[1]).reshape(x.shape[0], -1)
        return z @ w["last"]["weight"].T + w["last"]["bias"][None, :], hidden


def init_tiny(key, *, width, shape, gain, dtype):
    make, wide = Maker(key, gain, dtype), round(64 * width)
    layers = {"first": make.convolution(3, shape[2], wide), "second": make.convolution(3, wide, wide)}
    return layers | {"last": make.last(4 * wide, 10)}


@pytest.fixture(scope="module", autouse=True)
def networks():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(NETWORKS, "tiny", (Tiny, init_tiny))
        yield


@pytest.fixture(scope="module")
def settings():
    return deep_scale.Settings(**TINY, network="tiny", alphas=(1.0, 1e7, INF), seeds=2, epochs=2, step=0.02)


@pytest.fixture(scope="module")
def scale(settings):
    return deep_scale.run(settings, seed=3)


def start_of(settings, seed=3):
    data = deep.load(settings, None)
    return data, *deep.start("tiny", seed, data, width=settings.width, gain=1.0)


# ---- figures 3(a) and 7(a) ----


def test_every_measure_is_labeled_and_finite(scale):
    assert dict(scale.sizes) == {"seed": 2, "alpha": 3, "epoch": 2}
    assert list(scale["seed"]) == [3, 4]
    assert not scale["failed"].any()
    for name in ("train_loss", "test_loss", "train_accuracy", "test_accuracy"):
        assert scale[name].dims == ("seed", "alpha", "epoch")
        assert np.isfinite(scale[name]).all()
    assert (scale["train_loss"][..., -1] < 0.5).all()  # the loss of zero outputs
    assert scale.attrs["setting_data"] == "digits"
    assert scale.attrs["setting_alphas"][-1] == INF


def test_a_large_alpha_trains_as_the_tangent_model_and_keeps_its_activations(scale):
    far, tangent, near = (scale.sel(alpha=alpha) for alpha in (1e7, INF, 1.0))
    np.testing.assert_allclose(far["test_loss"], tangent["test_loss"], rtol=1e-4)
    assert (far["stability"] > 0.9999).all()
    assert (tangent["stability"] == 1).all()
    assert (near["stability"] < 0.95).all()
    assert (abs(near["test_loss"] - tangent["test_loss"]) > 1e-4).any()


def test_the_tangent_model_is_trained_by_hand(scale, settings):
    """Momentum on the linear model f(w0) + Df(w0) u, in its own loop, with the batches that `train` draws."""
    data, f, w0 = start_of(settings)
    key, targets = deep.order_key(3), jax.nn.one_hot(data.y, 10, dtype=jnp.float32)

    @jax.jit
    def gradient(u, x, y):
        outputs, tangent = jax.linearize(lambda w: f(w, x), w0)
        del outputs
        residual = tangent(u) - y
        (g,) = jax.linear_transpose(tangent, w0)(residual / x.shape[0])
        return g, 0.5 * jnp.sum(residual**2) / x.shape[0]

    u = trace = jtu.tree_map(jnp.zeros_like, w0)
    means = []
    for epoch in range(2):
        key_order, _ = jr.split(jr.fold_in(key, jnp.uint32(epoch)))
        order, losses = jr.permutation(key_order, 96).reshape(6, 16), []
        for rows in order:
            g, loss = gradient(u, data.x[rows], targets[rows])
            trace = jtu.tree_map(lambda t, d: jnp.float32(0.9) * t + d, trace, g)
            rate = np.float32(0.02 / (1 + epoch / 3))
            u = jtu.tree_map(lambda a, t, rate=rate: a - rate * t, u, trace)
            losses.append(float(loss))
        means.append(np.mean(losses))
    np.testing.assert_allclose(scale["train_loss"].sel(seed=3, alpha=INF), means, rtol=1e-4)


def test_an_interrupted_run_goes_on(scale, settings, tmp_path, monkeypatch):
    class StoppedError(Exception):
        pass

    runs, train = [], deep_scale.train

    def second_stops(*arguments, **options):
        if runs:
            raise StoppedError
        runs.append(None)
        return train(*arguments, **options)

    monkeypatch.setattr(deep_scale, "train", second_stops)
    with pytest.raises(StoppedError):
        deep_scale.run(settings, seed=3, folder=tmp_path)
    monkeypatch.setattr(deep_scale, "train", train)
    xarray.testing.assert_identical(deep_scale.run(settings, seed=3, folder=tmp_path), scale)
    assert {path.name for path in tmp_path.iterdir()} == {"seed-3", "seed-4"}


def test_numbers_and_drawings_of_one_run(scale, tmp_path):
    rows = {row.label: row for row in deep_scale.accuracy_numbers(scale)}
    assert rows["test accuracy %, alpha = inf"].value == pytest.approx(
        100 * float(scale["test_accuracy"].sel(alpha=INF).isel(epoch=-1).mean())
    )
    assert "over seeds" in rows["test accuracy %, alpha = 1"].note
    assert len(deep_scale.loss_numbers(scale)) == 7
    scale.to_netcdf(tmp_path / "a.nc", engine="netcdf4")
    with xarray.open_dataset(tmp_path / "a.nc") as stored:
        for name in ("fig3a", "fig7a"):
            first, second = (plot.encode(plot.plot_experiment(name, data), "svg") for data in (scale, stored.load()))
            assert first == second


def test_nothing_is_measured_of_a_training_that_diverged(scale, settings):
    """One image beyond all bounds in the last batch of the file; an answer of NaN is class 0, and right by chance."""
    data = deep.load(settings, None)
    data = data._replace(x=data.x.at[-1].set(1e30))
    optimizer = deep.sgd(settings, settings.step, data.x.shape[0])
    measured = deep_scale.run_seed(settings, data, optimizer, 3, None, progress=False)
    assert measured.pop("failed").all()
    assert len(measured) == 5
    assert all(np.isnan(values).all() for values in measured.values()), measured
    # Numbers and drawings are those of the seeds that are left.
    spoilt = scale.drop_vars("failed").where(scale["seed"] == 3).assign(failed=scale["failed"] | (scale["seed"] == 4))
    alone = deep_scale.accuracy_numbers(scale.sel(seed=[3]))
    for row, other in zip(deep_scale.accuracy_numbers(spoilt), alone, strict=True):
        if "diverged" not in row.label and "plateau" not in row.label:
            assert row.value == pytest.approx(other.value)
    assert plot.plot_experiment("fig3a", spoilt).axes


def test_the_plateau_begins_where_all_later_means_agree():
    accuracy = np.array([[0.8, 0.6, 0.51, 0.5, 0.5], [0.82, 0.61, 0.5, 0.51, 0.5]])
    data = xarray.Dataset(
        {"test_accuracy": (("seed", "alpha", "epoch"), accuracy[:, :, None])},
        coords={"seed": [0, 1], "alpha": [1.0, 10.0, 100.0, 1e3, INF]},
    )
    assert deep_scale.plateau_from(data) == 100
    assert np.isnan(deep_scale.plateau_from(data.isel(alpha=[0, 4])))
    assert deep_scale.plateau_from(data.isel(alpha=[2, 3])) == 100
    # A seed that is better at every alpha alike is no spread.
    shifted = data + xarray.DataArray([0.0, 0.3], dims="seed")
    assert deep_scale.plateau_from(shifted) == 100


def test_black_is_what_crops_bring_in():
    """With the paper's augmentation a pixel is one of the image's own, or black."""
    data = load_images("digits", num_train=8, dtype=jnp.float32)
    x = deep.augment_as("digits")(jr.key(0), data.x)
    assert x.shape == data.x.shape
    black = -0.3053 / 0.3760
    for old, new in zip(np.asarray(data.x), np.asarray(x), strict=True):
        levels = np.unique(np.concatenate([old.ravel(), [black]]))
        assert np.abs(new.ravel()[:, None] - levels[None]).min(axis=1).max() < 1e-5
    assert not np.allclose(x, data.x)
    np.testing.assert_allclose(
        deep.augment_as("cifar10")(jr.key(1), jnp.zeros((2, 32, 32, 3)))[0, 16, 16], 0, atol=1e-6
    )


def test_stability_is_that_of_all_images_at_once(settings):
    data, f, w0 = start_of(settings)
    w = jtu.tree_map(lambda leaf: leaf + 0.1 * jr.normal(jr.key(1), leaf.shape, leaf.dtype), w0)
    lanes = jtu.tree_map(lambda a, b: jnp.stack([a, b]), w0, w)
    found = deep.stability(f, w0, lanes, data.x_test, batch=7)
    assert float(found[0]) == 1
    np.testing.assert_allclose(found[1], lj.laziness.activation_stability(f, w0, w, data.x_test), rtol=1e-6)


# ---- figure 7(b) ----


def test_both_spectra_are_those_of_the_gram():
    settings = deep_spectrum.Settings(data="digits", network="tiny", width=1 / 8, train=6)
    data = deep_spectrum.run(settings, seed=1)
    assert data["eigenvalue"].shape == (2, 60)
    images = deep.load(settings, None)
    f, w0 = deep.start("tiny", 1, images, width=1 / 8, gain=1.0)
    values = np.linalg.eigvalsh(np.asarray(lj.gram(f, w0, images.x), np.float64).reshape(60, 60))[::-1]
    np.testing.assert_allclose(data["eigenvalue"].sel(inputs="images"), values, atol=1e-5 * values[0])
    assert not np.allclose(data["eigenvalue"][0], data["eigenvalue"][1], rtol=0.01)
    np.testing.assert_allclose(data["fraction"], np.arange(1, 61) / 60)
    rows = {row.label: row for row in deep_spectrum.numbers(data)}
    row = rows["drop from eigenvalue k = 10 to k + 1, images"]
    assert row.value == pytest.approx(values[9] / values[10], rel=1e-3)
    assert row.reference == 10
    assert plot.plot_experiment("fig7b", data).axes


def test_the_slope_of_a_tail_is_its_power():
    index = np.arange(1, 201)
    value = np.where(index <= 10, 1.0, 0.1 * (index / 11.0) ** -1.25)
    data = xarray.Dataset({"value": (("inputs", "index"), value[None])}, coords={"inputs": ["images"], "index": index})
    assert deep_spectrum.tail_slope(data.assign_attrs(outputs=10), "images") == pytest.approx(-1.25)
    assert np.isnan(deep_spectrum.tail_slope(data.isel(index=slice(12)).assign_attrs(outputs=10), "images"))


# ---- figure 3(b) ----


def test_wide_networks_in_both_regimes():
    tiny = {key: value for key, value in TINY.items() if key != "width"}
    settings = deep_wide.Settings(
        **tiny,
        networks=("tiny",),
        widths=(1 / 8,),
        gains=(1.3,),
        epochs=2,
        step=0.05,
        lazy_step=0.02,
    )
    data = deep_wide.run(settings)
    assert not data["failed"].any()
    assert data["test_accuracy"].dims == ("network", "seed", "regime", "epoch")
    stability = data["stability"].sel(network="tiny").isel(seed=0)
    assert float(stability.sel(regime="linearized")) > 0.9999
    assert float(stability.sel(regime="standard")) < 0.99
    loss = data["train_loss"].isel(epoch=-1)
    assert (loss < np.log(10)).all()
    assert all(row.reference is None for row in deep_wide.numbers(data))
    poster = data.assign_coords(network=["vgg11"]).assign_attrs(setting_data="cifar10")
    there = {row.label: row.reference for row in deep_wide.numbers(poster)}
    assert there["vgg11 standard: train accuracy %"] == 99.9
    assert there["vgg11 linearized: test accuracy %"] == 61.7
    assert there["best linearized: test accuracy %, beside random features"] == 84.2
    figures = [plot.plot_experiment("fig3b", part) for part in (data, poster)]
    assert len(figures[0].axes[0].lines) < len(figures[1].axes[0].lines)


# ---- precision ----


def test_the_plain_difference_loses_what_finite_jvp_keeps():
    settings = deep_precision.Settings(**TINY, network="tiny", probe=8, alphas=(1e3, 1e7), epochs=2, step=0.02)
    data = deep_precision.run(settings)
    error = data["output_error"]
    assert (error.sel(way="exact") < 1e-4).all()
    assert (error.sel(way="plain", alpha=1e7) > 0.1).all()
    # The rounding of w over its displacement, which falls with alpha.
    assert (error.sel(way="plain", alpha=1e3) < 0.05).all()
    assert (error.sel(way="plain", alpha=1e3) > error.sel(way="exact", alpha=1e3)).all()
    rows = {row.label: row.value for row in deep_precision.numbers(data)}
    assert rows["relative error of the outputs: plain difference, alpha = 1e+07"] > 0.1
    assert plot.plot_experiment("precision", data).axes


# ---- settings and the command line ----


def test_gpu_sizes_are_the_papers():
    fig3a, fig3b, fig7b = (catalogue.settings_of(name, "gpu") for name in ("fig3a", "fig3b", "fig7b"))
    assert (fig3a.data, fig3a.width, fig3a.train, fig3a.epochs, fig3a.batch) == ("cifar10", 1.0, 0, 70, 128)
    assert fig3a.alphas == (*(10.0**k for k in range(8)), INF)
    assert (fig3b.widths, fig3b.gains, fig3b.batch, fig3b.lazy_alpha) == ((8.0, 7.0), (1.3, 1.2), 8, 1e7)
    assert 10 * fig7b.train == 5000
    assert catalogue.settings_of("fig3a", "default").train == 4000


@pytest.mark.parametrize(
    ("kind", "change", "match"),
    [
        (
            deep_scale.Settings,
            {"data": "mnist"},
            "no data set 'mnist' among digits, fashion-mnist, cifar10; did you mean",
        ),
        (deep_scale.Settings, {"network": "vgg"}, "no network 'vgg' among vgg11, resnet18.*; did you mean vgg11"),
        (deep_scale.Settings, {"alphas": (10.0, 1.0)}, r"alphas must be rising numbers in \(0, inf\], got \(10"),
        (deep_scale.Settings, {"alphas": ()}, "alphas must be rising"),
        (deep_scale.Settings, {"alphas": (0.0, 1.0)}, "alphas must be rising"),
        (deep_scale.Settings, {"momentum": 1.0}, r"momentum must lie in \[0, 1\), got 1\.0"),
        (deep_scale.Settings, {"decay": -1.0}, "decay must be a finite number >= 0 per epoch, got -1"),
        (deep_scale.Settings, {"width": 0.0}, "width must be a positive finite number, got 0"),
        (deep_scale.Settings, {"epochs": 0}, "epochs must be a whole number of at least 1, got 0"),
        (deep_spectrum.Settings, {"train": 2}, "train must be a whole number of at least 5, got 2"),
        (deep_wide.Settings, {"gains": (1.0,)}, "networks must be different names with one of widths and gains each"),
        (deep_wide.Settings, {"networks": ("vgg11", "vgg11")}, "networks must be different names"),
        (deep_wide.Settings, {"networks": ()}, "networks must be different names"),
        (
            deep_wide.Settings,
            {"widths": (1.0, -1.0)},
            r"widths must be positive finite numbers, one a network, got \(1",
        ),
        (deep_wide.Settings, {"lazy_alpha": 0.0}, r"lazy_alpha must be a scale in \(0, inf\], got 0"),
        (deep_precision.Settings, {"alphas": (1.0, INF)}, "alphas must be different positive finite numbers"),
    ],
)
def test_bad_settings_are_refused(kind, change, match):
    with pytest.raises(ValueError, match=match):
        kind(**change)


def test_the_truth_is_not_taken_in_float32():
    with jax.enable_x64(False), pytest.raises(ValueError, match="float64"):
        deep_precision.run(dataclasses.replace(deep_precision.PRESETS["small"], train=32))


@pytest.mark.standard_promotion  # as the command line runs
class TestCommand:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (
                ["fig3a", "--data", "cifar"],
                "there is no data set 'cifar' among digits, fashion-mnist, cifar10; did you",
            ),
            (["fig3a", "--data", "cifar10"], "cifar10 needs its files, which no package has"),
            (["fig7b", "--data", "cifar10", "--data-dir", "nowhere"], "nowhere holds neither data_batch_1.bin nor"),
            (["fig3b", "--data-dir", "nowhere"], "train-images-idx3-ubyte.gz does not exist"),
            (
                ["fig1c", "--data", "digits"],
                "--data is for the figures of images (fig3a, fig3b, fig7a, fig7b, precision)",
            ),
            (["fig1c", "--data-dir", "x"], "--data-dir is for the figures of images"),
            (["fig1c", "--size", "gpu"], "size must be one of small, default, paper for fig1c, got 'gpu'"),
            (["fig3a", "--size", "paper"], "size must be one of small, default, gpu for fig3a, got 'paper'"),
            (["fig3a", "--set", "network=lenet"], "there is no network 'lenet'"),
        ],
    )
    def test_bad_requests_get_one_line_and_nothing_is_written(self, arguments, message, tmp_path, capsys, monkeypatch):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(SystemExit) as stopped:
            cli.main(["reproduce", *arguments, "--no-cache", "--out", str(tmp_path / "out")])
        assert stopped.value.code == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
        assert len(lines) == 1
        assert message in lines[0]
        assert not (tmp_path / "out").exists()

    def test_one_run_makes_both_figures(self, scale, tmp_path, capsys, monkeypatch):
        part = scale.isel(seed=0, alpha=[0, 2], epoch=[0])
        measured = {name: np.asarray(values) for name, values in part.data_vars.items()}
        monkeypatch.setattr(deep_scale, "run_seed", lambda *_, **__: measured)
        changes = ["alphas=1,inf", "seeds=1", "epochs=1", "train=32", "test=20", "batch=16", "width=0.125"]
        changes.append("network=tiny")
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
