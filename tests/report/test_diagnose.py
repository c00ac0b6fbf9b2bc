"""The report: what it measures is what NumPy and SciPy find, and bad input stops it at once."""

import doctest
import importlib
import itertools
import math

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import xarray
from scipy.integrate import solve_ivp

import lazyjax as lj
from flow.relu_reference import Reference, problem
from helpers import relative_error, sine_with_outside_slope
from lazyjax.losses.targets import make_task
from lazyjax.report import kernel_prediction
from lazyjax.report.certificate import choose_scale
from lazyjax.report.lane import has_gates
from lazyjax.report.problem import make_problem
from lazyjax.report.verdict import fit_slope, kernel_facts, rounding_notes, write_verdict
from reports import make_report

DIAGNOSE = importlib.import_module("lazyjax.report.diagnose")  # which its function hides
F = lj.models.mlp(jnp.tanh)
SIZES = (4, 8, 3)
N, N_TEST = 12, 20
RNG = np.random.default_rng(3)
W0 = [
    {"weight": RNG.normal(size=(b, a)) * math.sqrt(2 / (a + b)), "bias": np.zeros(b)}
    for a, b in itertools.pairwise(SIZES)
]
X, X_TEST = RNG.normal(size=(N, 4)), RNG.normal(size=(N_TEST, 4))
LABELS, LABELS_TEST = np.argmax(X[:, :3], axis=1), np.argmax(X_TEST[:, :3], axis=1)
TARGET, TARGET_TEST = np.eye(3)[LABELS], np.eye(3)[LABELS_TEST]
ALPHAS = [100.0, 1.0, 10.0, 1e3, 1e4]
TIME = 3.0


@pytest.fixture(scope="module")
def start():
    """W0 and both inputs as arrays of JAX."""
    return jax.tree.map(jnp.asarray, (W0, X, X_TEST))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the report keeps its scales."""
    return tmp_path_factory.mktemp("report")


@pytest.fixture(scope="module")
def report(start, folder):
    w0, x, x_test = start
    return lj.diagnose(F, w0, x, LABELS, test=(x_test, LABELS_TEST), alphas=ALPHAS, time=TIME, folder=folder)


@pytest.mark.end_to_end
def test_an_interrupted_report_goes_on_with_the_scales_that_are_missing(report, start, folder, monkeypatch):
    monkeypatch.setattr(DIAGNOSE, "certify_scale", lambda *_: (None, []))  # takes most of the time
    w0, x, x_test = start
    chunks = sorted((folder / "scales").glob("lanes-*.npz"))
    assert len(chunks) == len(ALPHAS) + 1
    chunks[2].unlink()
    times = {path: path.stat().st_mtime_ns for path in chunks if path.exists()}
    given = {"test": (x_test, LABELS_TEST), "alphas": ALPHAS, "folder": folder}
    again = lj.diagnose(F, w0, x, LABELS, time=TIME, **given)
    assert {path: path.stat().st_mtime_ns for path in chunks if path != chunks[2]} == times
    assert chunks[2].exists()
    xarray.testing.assert_equal(again.dataset, report.dataset)
    with pytest.raises(ValueError, match=r"scales holds another sweep \(.*arrays in shared .* there and"):
        lj.diagnose(F, w0, x, LABELS, time=2 * TIME, **given)


def pack(w):
    return np.concatenate([np.ravel(layer[name]) for layer in w for name in ("weight", "bias")])


def unpack(v):
    layers, at = [], 0
    for a, b in itertools.pairwise(SIZES):
        layers.append({"weight": v[at : at + a * b].reshape(b, a), "bias": v[at + a * b : at + a * b + b]})
        at += a * b + b
    return layers


def forward(v, x):
    """Outputs (n, 3), their Jacobian (n, 3, p), and the hidden layer before its activation, by hand."""
    first, last = unpack(v)
    z = x @ first["weight"].T + first["bias"]
    h = np.tanh(z)
    out = h @ last["weight"].T + last["bias"]
    back = last["weight"] * (1 - h**2)[:, None, :]  # (n, 3, hidden)
    n, eye = len(x), np.eye(3)
    blocks = [
        (back[..., None] * x[:, None, None, :]).reshape(n, 3, -1),
        back,
        (eye[None, :, :, None] * h[:, None, None, :]).reshape(n, 3, -1),
        np.broadcast_to(eye, (n, 3, 3)),
    ]
    return out, np.concatenate(blocks, axis=2), z


def kernel(v, x=X):
    jacobian = forward(v, x)[1].reshape(3 * len(x), -1)
    return jacobian @ jacobian.T


V0 = pack(W0)
(OUT0, JACOBIAN0, _), OUT0_TEST = forward(V0, X), forward(V0, X_TEST)[0]


def follow(alpha, times):
    """w(t) of the centered model at a finite alpha: (times, p), by SciPy."""

    def velocity(t, v):
        out, jacobian, _ = forward(v, X)
        return -np.einsum("nk,nkp->p", alpha * (out - OUT0) - TARGET, jacobian) / (alpha * N)

    return solve_ivp(velocity, (0, TIME), V0, "DOP853", times, rtol=1e-10, atol=1e-12).y.T


def follow_tangent(times):
    """u(t) of the tangent model in closed form: (times, p)."""
    left, sigma, right = np.linalg.svd(JACOBIAN0.reshape(3 * N, -1), full_matrices=False)
    decay = -np.expm1(-np.outer(times, sigma**2 / N)) / sigma
    return (decay * (left.T @ TARGET.ravel())) @ right


def loss_of(outputs, target):
    return 0.5 * np.mean(np.sum((outputs - target) ** 2, axis=-1), axis=-1)


def accuracy_of(outputs, labels):
    return np.mean(np.argmax(outputs, axis=-1) == labels, axis=-1)


def test_alphas_are_sorted_and_end_at_infinity(report):
    np.testing.assert_array_equal(report.dataset["alpha"], [1.0, 10.0, 100.0, 1e3, 1e4, np.inf])
    assert not report.dataset["failed"].any()


@pytest.mark.parametrize("alpha", [1.0, 100.0])
def test_a_lane_is_what_scipy_finds(report, alpha):
    lane, times = report.dataset.sel(alpha=alpha), report.dataset["time"].values
    w, u = follow(alpha, times), follow_tangent(times)
    outputs = np.array([alpha * (forward(v, X)[0] - OUT0) for v in w])
    gap = np.linalg.norm(outputs - (u @ JACOBIAN0.reshape(3 * N, -1).T).reshape(-1, N, 3), axis=(1, 2)) / math.sqrt(N)
    assert relative_error(lane["output_gap"], gap) < 1e-3
    assert relative_error(lane["param_gap"], np.linalg.norm(w - V0 - u / alpha, axis=1)) < 1e-3
    assert relative_error(lane["displacement_norm"], np.linalg.norm(w - V0, axis=1)) < 1e-4
    assert relative_error(lane["train_loss"], loss_of(outputs, TARGET)) < 1e-4
    np.testing.assert_allclose(lane["train_accuracy"], accuracy_of(outputs, LABELS))
    on_test = np.array([alpha * (forward(v, X_TEST)[0] - OUT0_TEST) for v in w])
    assert relative_error(lane["test_loss"], loss_of(on_test, TARGET_TEST)) < 1e-4
    np.testing.assert_allclose(lane["test_accuracy"], accuracy_of(on_test, LABELS_TEST))
    first, last = kernel(V0), kernel(w[-1])
    np.testing.assert_allclose(lane["kernel_drift"], np.linalg.norm(last - first) / np.linalg.norm(first), rtol=1e-3)
    signs = (forward(w[-1], X)[2] > 0) == (forward(V0, X)[2] > 0)
    np.testing.assert_allclose(lane["stability"], np.mean(signs))
    assert 0.8 < float(report.dataset["stability"].sel(alpha=1.0)) < 1.0


def test_the_tangent_model_is_its_closed_form(report):
    data, u = report.dataset, follow_tangent(report.dataset["time"].values)
    outputs = np.einsum("tp,nkp->tnk", u, JACOBIAN0)
    on_test = np.einsum("tp,nkp->tnk", u, forward(V0, X_TEST)[1])
    assert relative_error(data["tangent_train_loss"], loss_of(outputs, TARGET)) < 1e-4
    assert relative_error(data["tangent_test_loss"], loss_of(on_test, TARGET_TEST)) < 1e-4
    np.testing.assert_allclose(data["tangent_test_accuracy"], accuracy_of(on_test, LABELS_TEST))
    last = data.sel(alpha=np.inf)
    assert float(last["kernel_drift"]) == 0.0
    assert float(last["stability"]) == 1.0
    assert float(last["output_gap"].max()) < 1e-9
    np.testing.assert_allclose(data["kernel_drift"][4] / data["kernel_drift"][3], 0.1, rtol=0.01)


def test_the_kernel_and_what_it_predicts_are_those_of_numpy(report):
    data, a = report.dataset, report.dataset.attrs
    values, vectors = np.linalg.eigh(kernel(V0) / N)
    np.testing.assert_allclose(data["kernel_eigenvalue"], values[::-1], rtol=1e-6, atol=1e-12)
    np.testing.assert_allclose(a["kernel_condition"], values[-1] / values[0], rtol=1e-6)
    share = values / values.sum()
    np.testing.assert_allclose(a["kernel_effective_rank"], np.exp(-np.sum(share * np.log(share))), rtol=1e-6)
    assert a["kernel_rank"] == 36
    assert list(data["stop"].values) == ["best", "end"]
    cross = forward(V0, X_TEST)[1].reshape(3 * N_TEST, -1) @ JACOBIAN0.reshape(3 * N, -1).T / N
    best = float(data["kernel_time"][0])
    assert data["kernel_time"][1] == np.inf

    def on_test(time):
        return (cross @ vectors @ ((-np.expm1(-time * values)) / values * (vectors.T @ TARGET.ravel()))).reshape(-1, 3)

    np.testing.assert_allclose(data["kernel_test_loss"][0], loss_of(on_test(best), TARGET_TEST), rtol=1e-6)
    np.testing.assert_allclose(data["kernel_test_loss"][1], loss_of(on_test(np.inf), TARGET_TEST), rtol=1e-6)
    np.testing.assert_allclose(data["kernel_test_accuracy"][1], accuracy_of(on_test(np.inf), LABELS_TEST))
    np.testing.assert_allclose(data["kernel_train_loss"][1], 0, atol=1e-15)
    # No other time is better.
    losses = [loss_of(on_test(time), TARGET_TEST) for time in np.geomspace(1e-2, 1e6, 400)]
    assert float(data["kernel_test_loss"][0]) <= min(losses) * (1 + 1e-9)


def test_numbers_of_the_start(report):
    a = report.dataset.attrs
    assert (a["num_params"], a["num_train"], a["num_test"], a["outputs"]) == (len(V0), N, N_TEST, 3)
    assert a["num_probe"] == N
    np.testing.assert_allclose(a["w0_norm"], np.linalg.norm(V0))
    np.testing.assert_allclose(a["initial_residual"], 1.0)  # one-hot rows
    assert 0 < a["lazy_ratio"] < math.inf
    assert report.dataset["displacement_norm"].attrs["units"] == "parameter"


def test_the_screen_tells_of_the_kernel(report):
    screen, a = str(report), report.dataset.attrs
    assert repr(report) == screen
    assert f"rank 36 of 36 outputs, condition number {a['kernel_condition']:.2g}, effective rank" in screen
    end, best = report.dataset.sel(stop="end"), report.dataset.sel(stop="best")
    assert f"test loss {float(end['kernel_test_loss']):.3g} ({100 * float(end['kernel_test_accuracy']):.1f}%)" in screen
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
    assert "reliable up to flow times of about 50;" in note
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
    assert f"{100 * gap:.2g}% of the initial residual" in report.verdict
    screen = str(report)
    assert max(len(line) for line in screen.splitlines()) <= 130
    assert len(screen.splitlines()) < 50
    for word in ("alpha", "train loss", "test acc %", "drift %", "stable %", "tangent", "inf"):
        assert word in screen


def test_the_report_certifies_the_first_lazy_scale(report):
    gap = np.asarray(report.dataset["output_gap"].max("time")) / report.dataset.attrs["initial_residual"]
    lazy = float(np.asarray(report.dataset["alpha"])[gap < 0.01].min())
    certificate = report.certificate
    assert not certificate.violated
    # The same numbers as those of the sweep, at every fourth time.
    lane = report.dataset.sel(alpha=lazy)
    for name in ("output_gap", "param_gap", "displacement_norm"):
        measured = np.asarray(certificate.claim("2.2", name).measured)
        np.testing.assert_allclose(measured, lane[name][::4], rtol=1e-6, atol=1e-12)
    # A bound that says something: of the displacement, within a factor of 20 (Cauchy-Schwarz in time).
    assert 1 <= float(certificate.claim("2.2", "displacement_norm").ratio) < 20
    assert f"certificate at alpha = {lazy:g}" in str(report)


def test_the_certified_scale_is_one_that_has_a_flow():
    data = make_report().dataset
    assert choose_scale(data) == 100.0
    data["failed"][:] = True
    assert choose_scale(data) is None
    data["failed"][1] = False
    assert choose_scale(data) == 10.0


def test_the_dataset_goes_through_netcdf(report, tmp_path):
    report.dataset.to_netcdf(tmp_path / "sweep.nc")
    with xarray.open_dataset(tmp_path / "sweep.nc") as back:
        xarray.testing.assert_identical(back.load(), report.dataset)


@pytest.fixture(scope="module")
def classes(start):
    problem, notes = make_problem(F, start[0], start[1], LABELS, "softmax", None)
    assert notes == []
    return problem


class TestKernel:
    """The spectrum on which a report decides how to follow the flows."""

    def test_another_loss_has_the_eigenvalues_but_no_closed_form(self, classes):
        spectrum = kernel_prediction.diagonalize(classes)
        values = np.linalg.eigvalsh(kernel(V0) / N)[::-1]
        np.testing.assert_allclose(spectrum.eigenvalues, values, rtol=1e-6, atol=1e-12)
        np.testing.assert_allclose(spectrum.summary["kernel_condition"], values[0] / values[-1], rtol=1e-5)
        assert spectrum.solution is None
        assert kernel_prediction.predict(classes, spectrum) == {}
        np.testing.assert_allclose(kernel_prediction.choose_horizon(spectrum), 300 / values[0])
        with pytest.raises(ValueError, match=r"time must be at most .* for this model"):
            kernel_prediction.check_horizon(1e9, spectrum, classes.loss)

    def test_a_kernel_too_large_to_diagonalize_gives_its_leading_eigenvalues(self, classes, monkeypatch):
        monkeypatch.setattr(kernel_prediction, "DENSE_OUTPUTS", 10)
        spectrum = kernel_prediction.diagonalize(classes)
        np.testing.assert_allclose(spectrum.eigenvalues, np.linalg.eigvalsh(kernel(V0) / N)[:-21:-1], rtol=1e-6)
        assert spectrum.summary == {}  # from some eigenvalues follows no condition number

    def test_the_horizon_is_where_one_percent_of_the_loss_is_left(self):
        losses = np.exp(-np.arange(401) / 40)
        spectrum = kernel_prediction.Spectrum(np.array([2.0]), None, diffrax.Tsit5(), {}, losses)
        horizon = kernel_prediction.choose_horizon(spectrum)
        assert losses[2.0 * horizon * (1 + 1e-12) >= kernel_prediction.GRID][-1] <= 0.01 * losses[0]
        assert losses[2.0 * horizon * (1 - 1e-12) > kernel_prediction.GRID][-1] > 0.01 * losses[0]


@pytest.mark.end_to_end
def test_a_doubled_regression_without_test_data_and_without_preactivations_is_reported(start):
    model = lj.symmetrize(lambda w, x: jnp.tanh(x @ w), jnp.asarray(RNG.normal(size=4)))
    report = lj.diagnose(*model, start[1], np.sin(X[:, 0]), alphas=[1.0, 1e4], time=1.0)
    names = set(report.dataset.data_vars)
    assert not names & {"test_loss", "train_accuracy", "stability"}
    assert "kernel_drift" in names
    assert "no slope" in str(report)
    assert list(report.dataset["stop"].values) == ["end"]
    assert names >= {"kernel_time", "kernel_train_loss"}
    assert not names & {"kernel_test_loss", "kernel_train_accuracy"}
    assert "stopped when best" not in str(report)


@pytest.mark.end_to_end
def test_the_example_of_the_docstring_runs():
    """It is skipped among the doctests: it takes half a minute."""
    examples = doctest.DocTestParser().get_examples(lj.diagnose.__doc__)
    for example in examples:
        example.options.clear()
    runner = doctest.DocTestRunner()
    runner.run(doctest.DocTest(examples, {"diagnose": lj.diagnose, "jnp": jnp}, "diagnose", None, 0, None))
    assert (runner.tries, runner.failures) == (6, 0)


@pytest.mark.end_to_end
def test_softmax_runs_without_a_closed_form(start):
    report = lj.diagnose(F, *start[:2], LABELS, loss="softmax", alphas=[1.0, 1e4])
    data = report.dataset
    np.testing.assert_allclose(data["train_loss"].isel(time=0), np.log(3.0), rtol=1e-5)
    assert float(data["train_loss"].sel(alpha=1.0)[-1]) < 0.5
    np.testing.assert_allclose(data["time"][-1], 300 / float(data["kernel_eigenvalue"][0]), rtol=1e-5)
    assert "stop" not in data.coords
    assert "effective rank" in str(report)
    assert "kernel regression" not in str(report)


def test_the_loss_says_whether_stiffness_lasts(start):
    """No explicit solver reaches this time, which a loss whose Hessian stays needs one for."""
    for fades, solver in ((False, lj.TangentExponential), (True, diffrax.Tsit5)):
        loss = lambda y, fades=fades: lj.losses.function_loss(lambda z: jnp.mean((z - y) ** 4), hessian_fades=fades)
        problem, _ = make_problem(F, *start[:2], TARGET, loss, None)
        spectrum = kernel_prediction.diagonalize(problem)
        assert type(kernel_prediction.choose_solver(spectrum, 1e9)) is solver
        if fades:
            with pytest.raises(ValueError, match="time must be at most"):
                kernel_prediction.check_horizon(1e9, spectrum, problem.loss)
        else:
            kernel_prediction.check_horizon(1e9, spectrum, problem.loss)


@pytest.mark.end_to_end
def test_a_failed_lane_is_told_of_not_hidden(start):
    """A target so far off that the model at alpha = 1 gets ever stiffer: the report still comes, and says so."""
    f = lambda w, x: x @ (w["u"] ** 3)
    report = lj.diagnose(f, {"u": jnp.ones(4)}, start[1], 1e9 * np.ones(N), alphas=[1.0, 1e14], time=1.0)
    assert bool(report.dataset["failed"].sel(alpha=1.0))
    assert "stability" not in report.dataset  # f has no preactivations
    assert "failed (max_steps_reached: " in report.verdict


@pytest.mark.end_to_end
def test_a_flow_that_collapses_at_kinks_is_followed_through_them():
    """The training loss is that of a flow mode by mode, with NumPy."""
    x, y, b, a = problem(0)
    report = lj.diagnose(lj.models.two_layer(jax.nn.relu), {"a": a, "b": b}, x, y, alphas=[1.0], time=100.0)
    data = report.dataset
    assert not data["failed"].any()
    assert not any(str(name).endswith("_failed") for name in data)
    assert report.notes == ("adaptive steps failed, and the model has kinks: followed through them at alpha = 1",)
    assert data["alpha"].values.tolist() == [1.0, np.inf]
    right, slides = Reference(x, y, len(a)).run(b, a, data["time"].values)
    assert slides > 0
    inner, outer = right[:, : b.size].reshape(-1, *b.shape), right[:, b.size :]
    outputs = np.einsum("tij,tj->ti", np.maximum(np.einsum("id,tjd->tij", x, inner), 0), outer)
    losses = 0.5 * np.mean((outputs - y) ** 2, axis=1)
    np.testing.assert_allclose(data["train_loss"].sel(alpha=1.0), losses, rtol=1e-3)


def test_sorts_have_no_gates_and_neither_have_smooth_models():
    models = {"relu": jax.nn.relu, "sorted": lambda w: jnp.sort(w, axis=1), "smooth": jnp.tanh}
    w0 = {"a": np.ones(2), "b": np.ones((2, 4))}
    found = {
        name: has_gates(make_problem(lj.models.two_layer(activation), w0, X, X[:, 0], "square", None)[0])
        for name, activation in models.items()
    }
    assert found == {"relu": True, "sorted": False, "smooth": False}


@pytest.mark.end_to_end
def test_a_doubled_model_is_diagnosed_with_preactivations(start):
    report = lj.diagnose(*lj.symmetrize(F, start[0]), start[1], LABELS, alphas=[100.0], time=0.5)
    assert "stability" in report.dataset


def test_a_slope_is_fitted_between_floor_and_ceiling():
    alphas = np.array([1.0, 10.0, 100.0, 1e3, 1e4, np.inf])
    gaps = np.array([0.5, 0.03, 0.003, 3e-4, 1e-5, 1e-5])
    slope = fit_slope(alphas, gaps, 1e-5, 0.1, -1.0)
    assert (slope.first, slope.last, slope.points) == (10.0, 1e3, 3)
    np.testing.assert_allclose(slope.value, -1.0)
    np.testing.assert_allclose(slope.shifted(-1.0).value, -2.0)
    assert str(slope) == "alpha^-1.00 over alpha = 10 to 1000 (3 points; theorem 2.2: -1 or faster)"
    none = fit_slope(alphas, gaps, 1e-3, 0.1, -1.0)
    assert math.isnan(none.value)
    assert str(none) == "no slope, only 1 point(s) between the numerical floor and saturation"


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"x": X[:0], "y": LABELS[:0]}, "x must hold at least one sample"),
        ({"y": LABELS[:5]}, r"y must hold one target .* sample, got shape \(5,\) for 12 samples"),
        ({"x": np.where(X[3, 2] == X, np.nan, X)}, r"x must be finite, but 1 of its 48 entries .* index \(3, 2\)"),
        ({"y": np.sin(X)}, "outputs and target must have the same shape"),
        ({"y": LABELS + 1}, r"labels must lie in 0..2"),
        ({"y": X[:, 0], "loss": "softmax"}, "y must be integer classes"),
        ({"y": np.asarray(1.0)}, r"y must hold one target .* sample, got shape \(\)"),
        ({"loss": "hinge"}, '"square", "softmax", "logistic"'),
        ({"alphas": []}, "at least one scale"),
        ({"alphas": [1.0, -2.0]}, "alpha must be a scale"),
        ({"time": 0.0}, "finite positive flow time"),
        ({"time": math.inf}, "finite positive flow time"),
        ({"time": 1e9, "loss": "softmax"}, "time must be at most .* for this model"),
        ({"test": (X_TEST, LABELS)}, "y_test must hold one target"),
        ({"f": lambda w, x: F(w, x)[:-1]}, "one row of outputs"),
        ({"w0": [{"weight": w["weight"], "bias": w["bias"] * np.nan} for w in W0]}, "w0.*must be finite"),
    ],
)
def test_bad_input_is_refused_before_any_long_work(start, change, match):
    change = {name: jax.tree.map(jnp.asarray, value) if name == "w0" else value for name, value in change.items()}
    with pytest.raises(ValueError, match=match):
        lj.diagnose(**{"f": F, "w0": start[0], "x": X, "y": LABELS, **change})


@pytest.mark.parametrize("loss", [lambda y: lj.square_loss(jnp.zeros(3)) if y is None else 1.0, "a loss"])
def test_what_makes_no_loss_is_refused(start, loss):
    loss = lj.square_loss(jnp.asarray(TARGET)) if loss == "a loss" else loss
    with pytest.raises(TypeError, match="a function of the targets that returns a loss"):
        lj.diagnose(F, start[0], X, LABELS, loss=loss)


def test_a_model_that_is_flat_at_w0_is_refused():
    with pytest.raises(ValueError, match="tangent kernel on x is zero at w0"):
        lj.diagnose(lambda w, x: x @ w["u"] ** 3, {"u": jnp.zeros((4, 3))}, X, LABELS, loss="softmax")


def test_a_model_without_rule_for_its_derivative_is_reported_without_drift(start):
    problem, (note,) = make_problem(lambda w, x: sine_with_outside_slope(F(w, x)), *start[:2], TARGET, "square", None)
    assert problem.probe_model is None
    assert note.startswith("the drift of the kernel is not measured: ")


def test_lazy_begins_where_no_later_scale_is_not():
    alphas = np.array([1.0, 10.0, 100.0, 1e3, np.inf])
    gaps = np.array([0.5, 0.001, 0.03, 0.001, 0.0])
    data = xarray.Dataset(
        {
            "output_gap": (("alpha", "time"), gaps[:, None]),
            "displacement_norm": (("alpha", "time"), gaps[:, None]),
            "failed": ("alpha", np.zeros(5, bool)),
            "message": ("alpha", np.full(5, "stuck")),
        },
        coords={"alpha": alphas},
        attrs={"initial_residual": 1.0, "w0_norm": 1.0},
    )
    slopes = {"output_gap": fit_slope(alphas, gaps, 1.0, 0.1, -1.0)}
    assert "from alpha = 1000 of this sweep on" in write_verdict(data, slopes)
    data["output_gap"][3] = np.nan  # a failed lane is not lazy
    assert "No finite alpha of this sweep is lazy" in write_verdict(data, slopes)
    data["failed"][0] = True
    assert write_verdict(data, slopes).startswith("The flow at alpha = 1 failed (stuck), so nothing is said about it.")


def test_a_report_without_classes_tells_of_the_loss():
    assert "Test loss at the end: " in make_report(classes=False).verdict
    assert "at alpha = 1, 90.0% for the tangent model (+0.0 points)" in make_report().verdict


def test_targets_of_every_kind_become_a_loss():
    signs = np.array([1, -1, 1])
    loss, accuracy = make_task("square", signs, (3,))
    np.testing.assert_allclose(loss.minimizer, [1.0, -1.0, 1.0])
    np.testing.assert_allclose(accuracy(jnp.asarray([0.3, 0.2, -1.0])), 1 / 3)
    loss, accuracy = make_task("logistic", np.array([0, 1, 1]), (3,))
    np.testing.assert_allclose(accuracy(jnp.asarray([-0.3, 0.2, -1.0])), 2 / 3)
    loss, accuracy = make_task(lambda y: lj.square_loss(y, mean=False), jnp.ones(3), (3,))
    assert loss.weight == 1.0
    assert accuracy is None
    loss, accuracy = make_task("square", np.array([3, 4, 5]), (3,))
    np.testing.assert_allclose(loss.minimizer, [3.0, 4.0, 5.0])
    assert accuracy is None
