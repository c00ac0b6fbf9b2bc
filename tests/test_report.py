"""The report: what it measures agrees with the modules it is made of, and bad input stops it at once."""

import math

import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import lazyjax as lj
from helpers import relative_error
from lazyjax._summary import fit_slope
from lazyjax._task import make_task

F = lj.mlp(jnp.tanh)
W0 = lj.init_mlp(jr.key(0), [4, 16, 3])
X = jr.normal(jr.key(1), (12, 4))
LABELS = jnp.argmax(X[:, :3], axis=1)
X_TEST = jr.normal(jr.key(2), (20, 4))
LABELS_TEST = jnp.argmax(X_TEST[:, :3], axis=1)
ALPHAS = [100.0, 1.0, 10.0, 1e3, 1e4]
TIME = 3.0


@pytest.fixture(scope="module")
def report():
    return lj.diagnose(F, W0, X, LABELS, test=(X_TEST, LABELS_TEST), alphas=ALPHAS, time=TIME)


def test_alphas_are_sorted_and_end_at_infinity(report):
    np.testing.assert_array_equal(report.dataset["alpha"], [1.0, 10.0, 100.0, 1e3, 1e4, np.inf])
    assert not report.dataset["failed"].any()


def test_a_lane_is_the_comparison_of_the_two_flows(report):
    data = report.dataset
    target = jnp.eye(3)[LABELS]
    h = lj.center(lambda w: F(w, X), W0)
    ts = jnp.asarray(data["time"].values)
    both = lj.compare(h, lj.square_loss(target), W0, ts, alpha=1.0, rtol=1e-9, atol=1e-11)
    lane = data.sel(alpha=1.0)
    assert relative_error(lane["output_gap"], both.output_gap) < 1e-3
    assert relative_error(lane["param_gap"], both.param_gap) < 1e-3
    assert relative_error(lane["displacement"], both.displacement_norm) < 1e-4
    assert relative_error(lane["train_loss"], both.flow.loss) < 1e-4
    assert relative_error(data["tangent_train_loss"], both.tangent_flow.loss) < 1e-4
    accuracy = np.mean(np.argmax(both.flow.outputs[-1], axis=1) == np.asarray(LABELS))
    np.testing.assert_allclose(lane["train_accuracy"][-1], accuracy)


def test_the_test_data_are_followed_along(report):
    """The outputs on test data, by the parameters that the flow ends in."""
    target = jnp.eye(3)[LABELS]
    h = lj.center(lambda w: F(w, X), W0)
    ts = jnp.array([0.0, TIME])
    flow = lj.gradient_flow(h, lj.square_loss(target), W0, ts, alpha=10.0, save=("params",), rtol=1e-9, atol=1e-11)
    last = [{name: leaf[-1] for name, leaf in layer.items()} for layer in flow.params]
    outputs = 10.0 * (F(last, X_TEST) - F(W0, X_TEST))
    lane = report.dataset.sel(alpha=10.0).isel(time=-1)
    expected = lj.square_loss(jnp.eye(3)[LABELS_TEST])(outputs)
    np.testing.assert_allclose(lane["test_loss"], expected, rtol=1e-4)
    accuracy = np.mean(np.argmax(outputs, axis=1) == np.asarray(LABELS_TEST))
    np.testing.assert_allclose(lane["test_accuracy"], accuracy)


def test_drift_stability_and_spectrum_are_those_of_their_modules(report):
    data = report.dataset
    drift = data["kernel_drift"].values
    assert drift[-1] == 0.0
    np.testing.assert_allclose(drift[4] / drift[3], 0.1, rtol=0.01)
    assert 0.9 < float(data["stability"].sel(alpha=1.0)) < 1.0
    assert float(data["stability"].sel(alpha=np.inf)) == 1.0
    np.testing.assert_allclose(data["kernel_eigenvalue"][:20], lj.spectrum(F, W0, X)[:20] / 12, rtol=1e-6)


def test_the_slopes_are_those_of_theorem_2_2(report):
    assert abs(report.slopes["output_gap"].value + 1) < 0.1
    assert abs(report.slopes["param_gap"].value + 2) < 0.1
    assert report.slopes["param_gap"].last >= 1e3


def test_the_verdict_and_the_screen_say_what_the_numbers_say(report):
    gap = float(report.dataset["output_gap"].sel(alpha=1.0).max()) / report.dataset.attrs["initial_residual"]
    assert f"{100 * gap:.2g} % of the initial residual" in report.verdict
    screen = str(report)
    assert max(len(line) for line in screen.splitlines()) <= 130
    assert len(screen.splitlines()) < 40
    for word in ("alpha", "train loss", "test acc %", "drift %", "stable %", "tangent", "inf"):
        assert word in screen


def test_the_dataset_goes_through_netcdf(report, tmp_path):
    import xarray

    report.dataset.to_netcdf(tmp_path / "sweep.nc")
    with xarray.open_dataset(tmp_path / "sweep.nc") as back:
        np.testing.assert_array_equal(back["alpha"], report.dataset["alpha"])
        np.testing.assert_allclose(back["output_gap"], report.dataset["output_gap"])


def test_a_regression_without_test_data_and_without_preactivations_is_reported():
    f = lambda w, x: jnp.tanh(x @ w)
    report = lj.diagnose(f, jr.normal(jr.key(3), (4,)), X, jnp.sin(X[:, 0]), alphas=[1.0, 1e4], time=1.0)
    names = set(report.dataset.data_vars)
    assert not names & {"test_loss", "train_accuracy", "stability"}
    assert "kernel_drift" in names
    assert "no slope" in str(report)


def test_softmax_runs_without_a_closed_form():
    report = lj.diagnose(F, W0, X, LABELS, loss="softmax", alphas=[1.0, 1e4])
    data = report.dataset
    np.testing.assert_allclose(data["train_loss"].isel(time=0), np.log(3.0), rtol=1e-5)
    assert float(data["train_loss"].sel(alpha=1.0)[-1]) < 0.5
    np.testing.assert_allclose(data["time"][-1], 300 / float(data["kernel_eigenvalue"][0]), rtol=1e-5)


def test_a_kernel_too_large_to_diagonalize_gives_its_leading_eigenvalues(monkeypatch):
    monkeypatch.setattr("lazyjax._lanes.DENSE_OUTPUTS", 10)
    report = lj.diagnose(F, W0, X, LABELS, alphas=[100.0], time=0.5)
    np.testing.assert_allclose(report.dataset["kernel_eigenvalue"], lj.spectrum(F, W0, X)[:20] / 12, rtol=1e-6)


def test_a_slope_is_fitted_between_floor_and_ceiling():
    alphas = np.array([1.0, 10.0, 100.0, 1e3, 1e4, np.inf])
    gaps = np.array([0.5, 0.03, 0.003, 3e-4, 1e-5, 1e-5])
    slope = fit_slope(alphas, gaps, 1e-5, 0.1, -1.0)
    assert (slope.first, slope.last, slope.points) == (10.0, 1e3, 3)
    np.testing.assert_allclose(slope.value, -1.0)
    np.testing.assert_allclose(slope.shifted(-1.0).value, -2.0)
    assert math.isnan(fit_slope(alphas, gaps, 1e-3, 0.1, -1.0).value)


def test_a_failed_lane_is_told_of_not_hidden():
    """A target so far off that the model at alpha = 1 gets ever stiffer: the report still comes, and says so."""
    f = lambda w, x: x @ (w["u"] ** 3)
    w0 = {"u": jnp.ones(4)}
    report = lj.diagnose(f, w0, X, 1e9 * jnp.ones(12), alphas=[1.0, 1e14], time=1.0)
    assert bool(report.dataset["failed"].sel(alpha=1.0))
    assert "failed" in report.verdict


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"x": X[:0], "y": LABELS[:0]}, "x must hold at least one sample"),
        ({"y": LABELS[:5]}, r"y must hold one target a sample, got shape \(5,\) for 12 samples"),
        ({"x": X.at[3, 2].set(jnp.nan)}, r"x must be finite, but 1 of its 48 entries .* index \(3, 2\)"),
        ({"y": jnp.sin(X)}, "outputs and target must have the same shape"),
        ({"y": LABELS + 1}, r"labels must lie in 0..2"),
        ({"y": X[:, 0], "loss": "softmax"}, "y must be integer classes"),
        ({"y": jnp.asarray(1.0)}, r"y must hold one target a sample, got shape \(\)"),
        ({"loss": "hinge"}, '"square", "softmax", "logistic"'),
        ({"alphas": []}, "at least one scale"),
        ({"alphas": [1.0, -2.0]}, "alpha must be a scale"),
        ({"time": 0.0}, "finite positive flow time"),
        ({"time": math.inf}, "finite positive flow time"),
        ({"time": 1e9, "loss": "softmax"}, "time must be at most .* for this model"),
        ({"test": (X_TEST, LABELS)}, "y_test must hold one target a sample"),
        ({"f": lambda w, x: F(w, x)[:-1]}, "one row of outputs a sample"),
        ({"w0": [{"weight": w["weight"], "bias": w["bias"] * jnp.nan} for w in W0]}, "w0.*must be finite"),
    ],
)
def test_bad_input_is_refused_before_any_long_work(change, match):
    arguments = {"f": F, "w0": W0, "x": X, "y": LABELS, **change}
    with pytest.raises(ValueError, match=match):
        lj.diagnose(**arguments)


@pytest.mark.parametrize("loss", [lj.square_loss(jnp.eye(3)[LABELS]), lambda y: jnp.sum(y)])
def test_what_makes_no_loss_is_refused(loss):
    with pytest.raises(TypeError, match="a function of the targets that returns a loss"):
        lj.diagnose(F, W0, X, LABELS, loss=loss)


@pytest.mark.parametrize("loss", ["square", "softmax"])
def test_a_model_that_is_flat_at_w0_is_refused(loss):
    flat = {"u": jnp.zeros((4, 3))}
    with pytest.raises(ValueError, match="tangent kernel on x is zero at w0"):
        lj.diagnose(lambda w, x: x @ w["u"] ** 3, flat, X, LABELS, loss=loss)


def test_a_doubled_model_is_diagnosed_with_or_without_preactivations():
    for f, stable in ((F, True), (lambda w, x: F(w, x), False)):
        report = lj.diagnose(*lj.symmetrize(f, W0), X, LABELS, alphas=[100.0], time=0.5)
        assert ("stability" in report.dataset) == stable


def test_lazy_begins_where_no_later_scale_is_not():
    import xarray

    from lazyjax._summary import write_verdict

    alphas = np.array([1.0, 10.0, 100.0, 1e3, np.inf])
    gaps = np.array([0.5, 0.001, 0.03, 0.001, 0.0])
    data = xarray.Dataset(
        {
            "output_gap": (("alpha", "time"), gaps[:, None]),
            "displacement": (("alpha", "time"), gaps[:, None]),
            "failed": ("alpha", np.zeros(5, bool)),
            "message": ("alpha", [""] * 5),
        },
        coords={"alpha": alphas},
        attrs={"initial_residual": 1.0, "w0_norm": 1.0},
    )
    slopes = {"output_gap": fit_slope(alphas, gaps, 1.0, 0.1, -1.0)}
    assert "from alpha = 1000 of this sweep on" in write_verdict(data, slopes)
    data["output_gap"][3] = np.nan  # a failed lane is not lazy
    assert "No finite alpha of this sweep is lazy" in write_verdict(data, slopes)


def test_targets_of_every_kind_become_a_loss():
    signs = jnp.array([1, -1, 1])
    loss, accuracy = make_task("square", signs, (3,))
    np.testing.assert_allclose(loss.minimizer, [1.0, -1.0, 1.0])
    np.testing.assert_allclose(accuracy(jnp.array([0.3, 0.2, -1.0])), 1 / 3)
    loss, accuracy = make_task("logistic", jnp.array([0, 1, 1]), (3,))
    np.testing.assert_allclose(accuracy(jnp.array([-0.3, 0.2, -1.0])), 2 / 3)
    loss, accuracy = make_task(lambda y: lj.square_loss(y, mean=False), jnp.ones(3), (3,))
    assert loss.weight == 1.0
    assert accuracy is None
    loss, accuracy = make_task("square", jnp.array([3, 4, 5]), (3,))
    np.testing.assert_allclose(loss.minimizer, [3.0, 4.0, 5.0])
    assert accuracy is None
