"""The report: what it measures agrees with the modules it is made of, and bad input stops it at once."""

import math

import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import lazyjax as lj
from helpers import relative_error
from lazyjax.flow.kernel_regression import kernel_regression
from lazyjax.kernels.spectrum import condition_number
from lazyjax.losses.targets import make_task
from lazyjax.report.certificate import choose_scale
from lazyjax.report.verdict import fit_slope, kernel_facts, rounding_notes

F = lj.models.mlp(jnp.tanh)
W0 = lj.models.mlp().init(jr.key(0), [4, 16, 3])
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


def test_the_kernel_s_prediction_is_that_of_kernel_regression(report):
    data, a = report.dataset, report.dataset.attrs
    losses = [lj.square_loss(jnp.eye(3)[labels]) for labels in (LABELS, LABELS_TEST)]
    found = kernel_regression(lj.center(F, W0), W0, X, losses[0], x_test=X_TEST)
    time, best = found.best_time(losses[1])
    times = jnp.stack([time, jnp.inf])
    assert list(data["stop"].values) == ["best", "end"]
    np.testing.assert_allclose(data["kernel_time"], times, rtol=1e-6)
    np.testing.assert_allclose(data["kernel_test_loss"][0], best, rtol=1e-9)
    for part, loss, outputs, labels in (
        ("train", losses[0], found.outputs(times), LABELS),
        ("test", losses[1], found.test_outputs(times), LABELS_TEST),
    ):
        np.testing.assert_allclose(data[f"kernel_{part}_loss"], [loss(y) for y in outputs], rtol=1e-6, atol=1e-15)
        right = np.mean(np.argmax(np.asarray(outputs), axis=2) == np.asarray(labels), axis=1)
        np.testing.assert_allclose(data[f"kernel_{part}_accuracy"], right)
    # The best stop is no worse than any time of the tangent model's own flow.
    assert float(best) <= float(data["tangent_test_loss"].min()) * (1 + 1e-6)
    np.testing.assert_allclose(a["kernel_condition"], found.condition, rtol=1e-6)
    np.testing.assert_allclose(a["kernel_effective_rank"], found.effective_rank, rtol=1e-6)
    assert a["kernel_rank"] == 36


def test_the_screen_tells_of_the_kernel(report):
    screen, a = str(report), report.dataset.attrs
    assert f"rank 36 of 36 outputs, condition number {a['kernel_condition']:.2g}, effective rank" in screen
    end, best = report.dataset.sel(stop="end"), report.dataset.sel(stop="best")
    assert (
        f"test loss {float(end['kernel_test_loss']):.3g} ({100 * float(end['kernel_test_accuracy']):.1f} %)" in screen
    )
    assert f"t = {float(best['kernel_time']):.3g}, training loss {float(best['kernel_train_loss']):.3g}" in screen


def test_a_best_stop_at_the_end_is_called_so(report):
    data = report.dataset.copy(deep=True)
    data["kernel_time"][0] = np.inf
    assert kernel_facts(data)["stopped when best on the test data"] == "t = inf, no earlier stop is better"
    assert not kernel_facts(data.drop_dims("stop").drop_attrs())


def test_modes_lost_to_single_precision_are_told_of(report):
    assert report.notes == ()
    # The same numbers as if ten modes had been cut in float32: the smallest kept is 2e-3, learned to a tenth at 50.
    data = report.dataset.copy(deep=True)
    data["kernel_eigenvalue"][0] = 20.0
    data.attrs.update(dtype="float32", kernel_rank=26, kernel_condition=1e4)
    assert "rank 26 of 36 outputs above float32 rounding" in kernel_facts(data)["tangent kernel at w0"]
    assert kernel_facts(data)["kernel regression, t = inf"].startswith("on these modes, training loss")
    (note,) = rounding_notes(data)
    assert note.startswith("10 modes of the kernel are zero or below float32 rounding")
    assert "sure up to flow times of about 50;" in note
    assert not rounding_notes(data.drop_dims("stop").drop_vars("stop", errors="ignore"))
    # With fewer parameters than outputs no mode is missing.
    data.attrs.update(num_params=26)
    assert not rounding_notes(data)


def test_the_slopes_are_those_of_theorem_2_2(report):
    assert abs(report.slopes["output_gap"].value + 1) < 0.1
    assert abs(report.slopes["param_gap"].value + 2) < 0.1
    assert report.slopes["param_gap"].last >= 1e3


def test_the_verdict_and_the_screen_say_what_the_numbers_say(report):
    gap = float(report.dataset["output_gap"].sel(alpha=1.0).max()) / report.dataset.attrs["initial_residual"]
    assert f"{100 * gap:.2g} % of the initial residual" in report.verdict
    screen = str(report)
    assert max(len(line) for line in screen.splitlines()) <= 130
    assert len(screen.splitlines()) < 50
    for word in ("alpha", "train loss", "test acc %", "drift %", "stable %", "tangent", "inf"):
        assert word in screen


def test_the_report_certifies_the_first_lazy_scale(report):
    gap = np.asarray(report.dataset["output_gap"].max("time")) / report.dataset.attrs["initial_residual"]
    lazy = float(np.asarray(report.dataset["alpha"])[gap < 0.01].min())
    certificate = report.certificate
    assert float(certificate.facts.alpha) == lazy
    assert not certificate.violated
    # The same numbers as of the sweep, at every fourth time.
    lane = report.dataset.sel(alpha=lazy)
    for name, claimed in (
        ("output_gap", "output_gap"),
        ("param_gap", "param_gap"),
        ("displacement", "displacement_norm"),
    ):
        measured = np.asarray(certificate.claim("2.2", claimed).measured)
        np.testing.assert_allclose(measured, lane[name][::4], rtol=1e-6, atol=1e-12)
    # A bound that says something: of the displacement, within a factor of 20 (Cauchy-Schwarz in time).
    assert 1 <= float(certificate.claim("2.2", "displacement_norm").ratio) < 20
    assert f"certificate at alpha = {lazy:g}" in str(report)


def test_the_certified_scale_is_one_that_has_a_flow(report):
    data = report.dataset.copy(deep=True)
    data["failed"][:] = True
    assert choose_scale(data) is None
    data["failed"][1] = False
    assert choose_scale(data) == float(data["alpha"][1])


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
    assert list(report.dataset["stop"].values) == ["end"]
    assert names >= {"kernel_time", "kernel_train_loss"}
    assert not names & {"kernel_test_loss", "kernel_train_accuracy"}
    assert "stopped when best" not in str(report)


def test_softmax_runs_without_a_closed_form():
    report = lj.diagnose(F, W0, X, LABELS, loss="softmax", alphas=[1.0, 1e4])
    data = report.dataset
    np.testing.assert_allclose(data["train_loss"].isel(time=0), np.log(3.0), rtol=1e-5)
    assert float(data["train_loss"].sel(alpha=1.0)[-1]) < 0.5
    np.testing.assert_allclose(data["time"][-1], 300 / float(data["kernel_eigenvalue"][0]), rtol=1e-5)
    assert "stop" not in data.coords
    np.testing.assert_allclose(data.attrs["kernel_condition"], condition_number(lj.spectrum(F, W0, X)), rtol=1e-5)
    assert "effective rank" in str(report)
    assert "kernel regression" not in str(report)


def test_a_kernel_too_large_to_diagonalize_gives_its_leading_eigenvalues(monkeypatch):
    monkeypatch.setattr("lazyjax.report.lane.DENSE_OUTPUTS", 10)
    report = lj.diagnose(F, W0, X, LABELS, alphas=[100.0], time=0.5)
    np.testing.assert_allclose(report.dataset["kernel_eigenvalue"], lj.spectrum(F, W0, X)[:20] / 12, rtol=1e-6)
    # Of some eigenvalues follows no condition number.
    assert "kernel_condition" not in report.dataset.attrs
    assert "tangent kernel at w0" not in str(report)


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

    from lazyjax.report.verdict import write_verdict

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
