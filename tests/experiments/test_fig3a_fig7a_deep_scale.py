"""Figures 3(a) and 7(a): runs of a tiny network against training by hand, numbers and drawings of data made by hand."""

import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import pytest
import xarray

from figures import TINY, lines
from lazyjax.experiments import deep
from lazyjax.experiments import fig3a_fig7a_deep_scale as deep_scale
from lazyjax.experiments.figure import record
from lazyjax.plot.axes import encode

INF = float("inf")
MEASURES = ("train_loss", "test_loss", "train_accuracy", "test_accuracy")


def by_hand():
    """Two seeds, three scales, two epochs."""
    rng = np.random.default_rng(0)
    values = {name: (("seed", "alpha", "epoch"), rng.uniform(0.1, 1.0, (2, 3, 2))) for name in MEASURES}
    data = xarray.Dataset(
        values
        | {
            "stability": (("seed", "alpha"), rng.uniform(0.5, 1.0, (2, 3))),
            "failed": (("seed", "alpha"), np.zeros((2, 3), bool)),
        },
        coords={"seed": [3, 4], "alpha": [1.0, 1e7, INF], "epoch": [1, 2]},
    )
    return record(data, deep_scale.PRESETS["small"], 3)


def test_numbers_are_means_over_seeds():
    data = by_hand()
    rows = {row.label: row for row in deep_scale.accuracy_numbers(data)}
    last = 100 * data["test_accuracy"].sel(alpha=INF).isel(epoch=-1)
    assert rows["test accuracy %, alpha = inf"].value == pytest.approx(float(last.mean()))
    assert rows["test accuracy %, alpha = inf"].note == f"over seeds +- {float(last.std(ddof=1)):.3g}"
    assert len(deep_scale.loss_numbers(data)) == 7
    assert "over seeds" not in deep_scale.loss_numbers(data.isel(seed=[0]))[0].note


def test_the_drawings_show_means_and_a_place_for_infinity():
    data = by_hand()
    top, bottom = deep_scale.draw_accuracies(data).axes
    mean = 100 * data["train_accuracy"].isel(epoch=-1).mean("seed")
    np.testing.assert_allclose(lines(top)["training"].get_ydata(), mean[:2])
    np.testing.assert_allclose(lines(bottom)["activations that stay"].get_xdata(), [1.0, 1e7])
    assert [label.get_text() for label in bottom.get_xticklabels()][-1] == r"$\infty$"
    (ax,) = deep_scale.draw_losses(data).axes
    np.testing.assert_allclose(lines(ax)["test"].get_ydata(), data["test_loss"].isel(epoch=-1).mean("seed")[:2])


def test_the_same_drawing_is_made_of_data_read_back(tmp_path):
    data = by_hand()
    data.to_netcdf(tmp_path / "a.nc", engine="netcdf4")
    with xarray.open_dataset(tmp_path / "a.nc") as stored:
        first, second = (encode(deep_scale.draw_losses(one), "svg") for one in (data, stored.load()))
    assert first == second


def test_numbers_and_drawings_of_seeds_that_diverged_are_those_of_the_others():
    data = by_hand()
    spoilt = data.drop_vars("failed").where(data["seed"] == 3).assign(failed=data["failed"] | (data["seed"] == 4))
    alone = deep_scale.accuracy_numbers(data.sel(seed=[3]))
    for row, other in zip(deep_scale.accuracy_numbers(spoilt), alone, strict=True):
        if "diverged" not in row.label and "plateau" not in row.label:
            assert row.value == pytest.approx(other.value)
    assert deep_scale.accuracy_numbers(spoilt)[-1].value == 3
    shown = lines(deep_scale.draw_accuracies(spoilt).axes[0])
    np.testing.assert_allclose(shown["test"].get_ydata(), 100 * data["test_accuracy"].sel(seed=3).isel(epoch=-1)[:2])


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


@pytest.fixture(scope="module")
def settings(tiny):
    return deep_scale.Settings(**TINY, network=tiny, alphas=(1.0, 1e7, INF), seeds=2, epochs=2, step=0.02)


@pytest.fixture(scope="module")
def scale(settings):
    return deep_scale.run(settings, seed=3)


@pytest.mark.end_to_end
def test_every_measure_is_labeled_and_finite(scale):
    assert dict(scale.sizes) == {"seed": 2, "alpha": 3, "epoch": 2}
    assert list(scale["seed"]) == [3, 4]
    assert not scale["failed"].any()
    for name in MEASURES:
        assert scale[name].dims == ("seed", "alpha", "epoch")
        assert np.isfinite(scale[name]).all()
    assert (scale["train_loss"][..., -1] < 0.5).all()  # the loss of zero outputs
    assert scale.attrs["setting_data"] == "digits"
    assert scale.attrs["setting_alphas"][-1] == INF
    assert deep_scale.draw_accuracies(scale).axes
    assert deep_scale.draw_losses(scale).axes


@pytest.mark.end_to_end
def test_a_large_alpha_trains_as_the_tangent_model_and_keeps_its_activations(scale):
    far, tangent, near = (scale.sel(alpha=alpha) for alpha in (1e7, INF, 1.0))
    np.testing.assert_allclose(far["test_loss"], tangent["test_loss"], rtol=1e-4)
    assert (far["stability"] > 0.9999).all()
    assert (tangent["stability"] == 1).all()
    assert (near["stability"] < 0.95).all()
    assert (abs(near["test_loss"] - tangent["test_loss"]) > 1e-4).any()


@pytest.mark.end_to_end
def test_the_tangent_model_is_trained_by_hand(scale, settings):
    """Momentum on the linear model f(w0) + Df(w0) u, in its own loop, with the batches that `train` draws."""
    data = deep.load(settings, None)
    f, w0 = deep.start("tiny", 3, data, width=settings.width, gain=1.0)
    key, targets = deep.order_key(3), jax.nn.one_hot(data.y, 10, dtype=jnp.float32)

    @jax.jit
    def gradient(u, x, y):
        outputs, tangent = jax.linearize(lambda w: f(w, x), w0)
        del outputs
        residual = tangent(u) - y
        (g,) = jax.linear_transpose(tangent, w0)(residual / x.shape[0])
        return g, 0.5 * jnp.sum(residual**2) / x.shape[0]

    u = trace = jtu.tree_map(np.zeros_like, w0)
    means = []
    for epoch in range(2):
        key_order, _ = jr.split(jr.fold_in(key, jnp.uint32(epoch)))
        order, losses = np.asarray(jr.permutation(key_order, 96)).reshape(6, 16), []
        for rows in order:
            g, loss = gradient(u, data.x[rows], targets[rows])
            trace = jtu.tree_map(lambda t, d: np.float32(0.9) * t + np.asarray(d), trace, g)
            rate = np.float32(0.02 / (1 + epoch / 3))
            u = jtu.tree_map(lambda a, t, rate=rate: a - rate * t, u, trace)
            losses.append(float(loss))
        means.append(np.mean(losses))
    np.testing.assert_allclose(scale["train_loss"].sel(seed=3, alpha=INF), means, rtol=1e-4)


@pytest.mark.end_to_end
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


@pytest.mark.end_to_end
def test_nothing_is_measured_of_a_training_that_diverged(settings):
    """One image beyond all bounds in the last batch of the file; an answer of NaN is class 0, and right by chance."""
    data = deep.load(settings, None)
    data = data._replace(x=data.x.at[-1].set(1e30))
    optimizer = deep.sgd(settings, settings.step, data.x.shape[0])
    measured = deep_scale.run_seed(settings, data, optimizer, 3, None, progress=False)
    assert measured.pop("failed").all()
    assert len(measured) == 5
    assert all(np.isnan(values).all() for values in measured.values()), measured
