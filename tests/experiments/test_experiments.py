"""The figures of the paper at toy size: engines against independent ones, every figure from settings to files."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import optax
import pytest
import xarray

import lazyjax as lj
from helpers import relative_error
from lazyjax.data.population_risk import population_risk, tangent_population_risk
from lazyjax.experiments import (
    catalogue,
    kappa_width,
    lazy_rates,
    sparse_regression,
)
from lazyjax.experiments import (
    fig1ab_fig6_trajectories as trajectories,
)
from lazyjax.experiments import (
    fig1c_student_scale as student_scale,
)
from lazyjax.experiments import (
    fig2a_student_width as student_width,
)
from lazyjax.experiments import (
    fig2b_population_descent as population_descent,
)
from lazyjax.experiments.descent import descend, even_frames, log_frames
from lazyjax.experiments.figure import plain, record
from lazyjax.experiments.student import draw, risk_at
from lazyjax.plot import report as plot

# In few dimensions the paper's largest step of 10 is beyond the stability of learned features, and runs are chaotic.
SCALE = student_scale.Settings(
    largest_step=1.0,
    d=8,
    n=30,
    width=6,
    taus=(0.1, 1.0, 5.0),
    seeds=2,
    steps=120,
    frames=7,
    lazy_from=1.0,
    flow_times=4,
    dtype="float64",
)


def numpy_descent(w, x, y, steps, rate_a, rate_b=None, alpha=1.0):
    """Gradient descent of a two-layer ReLU net by hand, in float64."""
    a, b = np.array(w["a"], np.float64), np.array(w["b"], np.float64)
    rate_b = rate_a if rate_b is None else rate_b
    for _ in range(steps):
        z = x @ b.T
        hidden = np.maximum(z, 0)
        r = (alpha * hidden @ a - y) / (len(y) * alpha)
        a, b = a - rate_a * hidden.T @ r, b - rate_b * ((r[:, None] * (z > 0)) * a).T @ x
    return {"a": a, "b": b}


# ---- the engine ----


@pytest.mark.parametrize("tau", [0.1, 2.0])
def test_descents_weights_are_those_of_numpy(tau):
    x, y, _, start = draw(3, 50, 10, 8)
    w0 = jtu.tree_map(lambda leaf: tau * leaf, start)
    step = min(1.0, 0.1 / tau**2)
    loss, f = lj.square_loss(y), lj.models.two_layer()
    gradient = jax.grad(lambda w: loss(f(w, x)))
    v, seen = descend(lambda w, _: gradient(w), w0, optax.sgd(step), np.array([0, 5, 1000]), optax.tree.norm)
    truth = numpy_descent(w0, np.asarray(x), np.asarray(y), 1000, step)
    assert relative_error(jtu.tree_map(jnp.add, w0, v), truth) < 1e-9
    assert float(seen[0]) == 0
    assert seen.shape == (3,)
    early = numpy_descent(w0, np.asarray(x), np.asarray(y), 5, step)
    moved = np.sqrt(sum(np.sum((early[name] - np.asarray(w0[name])) ** 2) for name in "ab"))
    assert float(seen[1]) == pytest.approx(moved, rel=1e-9)


def test_float32_agrees_where_every_step_is_below_a_rounding():
    """A lazy net moves by 1e-8 of its weights a step: added to them in float32, most of it would be lost."""
    settings = dataclasses.replace(SCALE, steps=2000)
    found = {}
    for dtype in ("float32", "float64"):
        one = dataclasses.replace(settings, dtype=dtype)
        problem = student_scale._draw(one, 0)
        found[dtype] = student_scale.run_descent(one, problem, jnp.asarray(10.0))
    assert found["float32"]["risk"].dtype == jnp.float64
    np.testing.assert_allclose(found["float32"]["risk"], found["float64"]["risk"], rtol=1e-3)
    np.testing.assert_allclose(found["float32"]["moved"], found["float64"]["moved"], rtol=1e-3)


def test_frames_hold_both_ends_and_rise():
    for frames in (even_frames(100, 7), log_frames(100, 7), even_frames(3, 100), log_frames(1, 5)):
        assert frames[0] == 0
        assert (np.diff(frames) > 0).all()
    assert even_frames(100, 7)[-1] == log_frames(100, 7)[-1] == 100
    with pytest.raises(ValueError, match="frames must be rising numbers of steps"):
        descend(lambda w, _: w, jnp.ones(1), optax.sgd(0.1), np.array([3, 3]), lambda v: v)


# ---- Figure 1(c) ----


@pytest.fixture(scope="module")
def scale():
    with jax.numpy_dtype_promotion("strict"):
        return student_scale.run(SCALE, seed=5)


def test_the_losses_are_those_of_numpy(scale):
    for seed in (5, 6):
        x, y, teacher, start = student_scale._draw(SCALE, seed)
        for tau in SCALE.taus:
            w0 = jtu.tree_map(lambda leaf, tau=tau: tau * leaf, start)
            w = numpy_descent(w0, np.asarray(x), np.asarray(y), 120, min(1.0, 0.1 / tau**2))
            one = scale.sel(seed=seed, tau=tau)
            v = jtu.tree_map(lambda a, b: jnp.asarray(a) - b, w, w0)
            np.testing.assert_allclose(one["risk"][-1], risk_at(w0, v, teacher), rtol=1e-9)
            z, z0 = np.asarray(x) @ w["b"].T, np.asarray(x) @ np.asarray(w0["b"]).T
            np.testing.assert_allclose(one["stability"], np.mean((z > 0) == (z0 > 0)))


def test_the_tangent_models_closed_form_is_its_descent_step_by_step(scale):
    x, y, teacher, start = student_scale._draw(SCALE, 5)
    tangent = lj.linearize(functools.partial(lj.models.two_layer(), x=x), start)
    v = jtu.tree_map(jnp.zeros_like, start)
    for _ in range(20):
        residual = (tangent.jvp(v) - y) / y.size
        v = jtu.tree_map(lambda a, g: a - SCALE.step * g, v, tangent.vjp(residual))
    expected = tangent_population_risk(start, v, teacher)
    np.testing.assert_allclose(scale["tangent_risk"].sel(seed=5, step=20), expected, rtol=1e-9)


def test_lazy_descents_end_as_the_tangent_model_and_as_the_exact_flow(scale):
    last = scale.isel(step=-1)
    np.testing.assert_allclose(last["risk"].sel(tau=5.0), last["tangent_risk"], rtol=0.05)
    flows = scale["flow_risk"].isel(flow_step=-1)
    assert not scale["failed"].any()
    # Euler's error, which at this step is small at the end of training.
    np.testing.assert_allclose(flows.sel(lazy_tau=5.0), last["risk"].sel(tau=5.0), rtol=5e-3)
    assert float(last["moved"].sel(tau=0.1).mean()) > 30 * float(last["moved"].sel(tau=5.0).mean())


def test_a_dataset_has_all_settings_and_versions_and_survives_netcdf(scale, tmp_path):
    assert scale.attrs["setting_width"] == 6
    assert list(scale.attrs["setting_taus"]) == list(SCALE.taus)
    assert scale.attrs["seed"] == 5
    assert {"version_jax", "version_lazyjax", "variant"} <= set(scale.attrs)
    scale.to_netcdf(tmp_path / "a.nc", engine="netcdf4")
    with xarray.open_dataset(tmp_path / "a.nc") as stored:
        first, second = (plot.encode(plot.plot_experiment("fig1c", data), "svg") for data in (scale, stored.load()))
    assert first == second


def test_numbers_at_the_papers_size_stand_beside_references(scale):
    rows = student_scale.numbers(scale)
    assert all(row.reference is None for row in rows)
    paper = {f"setting_{name}": plain(value) for name, value in dataclasses.asdict(student_scale.Settings()).items()}
    full = scale.assign_attrs(paper)
    assert all(row.reference is None for row in student_scale.numbers(full.assign_attrs(setting_step=0.2)))
    beside = {row.label: row.reference for row in student_scale.numbers(full)}
    assert beside["final loss x 1000, tau = 0.1"] == 1.525
    assert beside["best loss x 1000, tangent model"] == 1.824


# ---- the other figures ----


def test_trajectories_are_those_of_numpy():
    settings = trajectories.Settings(tau=2.0, n=9, width=6, steps=200, step=0.002, frames=10, flow_steps=256)
    data = trajectories.run(settings, seed=1)
    x, y, teacher, start = draw(1, 9, 2, 6)
    w = numpy_descent(jtu.tree_map(lambda leaf: 2.0 * leaf, start), np.asarray(x), np.asarray(y), 200, 0.002)
    np.testing.assert_allclose(data["unit"][-1], np.abs(w["a"])[:, None] * w["b"], rtol=1e-9)
    np.testing.assert_allclose(data["teacher"][:, :2], teacher["b"], rtol=1e-12)
    stopped = bool(data.attrs["flow_message"])
    for of, reference in ((settings, 0.1), (dataclasses.replace(settings, step=0.001), None)):
        rows = trajectories.numbers(data, of, {"moved": 0.1})
        assert rows[0].reference == reference
    assert any("before it stopped" in row.label for row in rows) is stopped
    figure = plot.plot_experiment("fig1b", data.assign_attrs(flow_message="The step sizes collapsed"))
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert any("the exact flow slides along kinks" in text for text in texts)


def test_starts_of_the_code_are_mirrored_and_of_their_law():
    _, _, teacher, start = draw(1, 9, 3, 400, unit=True)
    normal = draw(1, 9, 3, 400)
    np.testing.assert_array_equal(teacher["b"], normal.teacher["b"])
    np.testing.assert_array_equal(start["a"][:200], -start["a"][200:])
    np.testing.assert_array_equal(start["b"][:200], start["b"][200:])
    assert float(jnp.min(start["a"][:200])) >= 0
    # The mean of U[0, 1], within four standard errors of 200 draws.
    assert abs(float(jnp.mean(start["a"][:200])) - 1 / 2) < 4 * (1 / 12 / 200) ** 0.5
    # Correlated with none of the inputs' coordinates: both are drawn from one key.
    for values in (jnp.ravel(normal.start["b"][:200])[:200], *normal.start["b"][:200].T):
        assert abs(np.corrcoef(start["a"][:200], values)[0, 1]) < 0.25
    np.testing.assert_allclose(jnp.linalg.norm(start["b"], axis=1), 1, rtol=1e-12)
    assert (draw(1, 9, 3, 5, symmetric=False, unit=True).start["a"] >= 0).all()


def test_descents_of_either_scale_are_those_of_numpy():
    settings = student_width.Settings(
        d=20, n=15, widths=(4,), seeds=1, steps=50, step_root=0.1, step_mean=0.005, frames=3,
        flow_steps=2048, dtype="float64",
    )  # fmt: skip
    data = student_width.run(settings)
    x, y, teacher, start = draw(0, 15, 20, 4, symmetric=False, scale=100.0)
    for scaling, alpha, step in (("1/sqrt(m)", 0.5, 0.1 / 4), ("1/m", 0.25, 0.005 / 4)):
        w = numpy_descent(start, np.asarray(x), np.asarray(y), 50, step, alpha=alpha)
        v = jtu.tree_map(lambda a, b: jnp.asarray(a) - b, w, start)
        found = float(data["risk"].sel(scaling=scaling, width=4).isel(seed=0, step=-1))
        assert found == pytest.approx(float(risk_at(start, v, teacher, alpha)), rel=1e-8)
    # Euler's error, of an eighth of the step.
    w = numpy_descent(start, np.asarray(x), np.asarray(y), 400, 0.1 / 32, alpha=0.5)
    v = jtu.tree_map(lambda a, b: jnp.asarray(a) - b, w, start)
    assert float(data["flow_risk"].item()) == pytest.approx(float(risk_at(start, v, teacher, 0.5)), rel=2e-3)
    assert not data["failed"].any()
    assert not data["descent_failed"].any()
    assert len(student_width.numbers(data)) == 7
    assert plot.plot_experiment("fig2a", data).axes


def test_sgd_descends_the_risk_that_the_exact_flow_descends():
    settings = population_descent.Settings(
        d=5, width=4, taus=(0.3, 3.0), seeds=1, steps=200, batch=200, frames=5, dtype="float64"
    )
    data = population_descent.run(settings)
    flow, sgd = data["flow_risk"].isel(seed=0), data["risk"].isel(seed=0)
    assert not data["failed"].any()
    assert (flow.diff("step") < 0).all()
    np.testing.assert_allclose(flow.isel(step=0), sgd.isel(step=0), rtol=1e-10)
    np.testing.assert_allclose(flow.isel(step=-1), sgd.isel(step=-1), rtol=0.05)
    assert "code's metric" in data.attrs["variant"]
    assert len(population_descent.numbers(data)) == 8
    assert plot.plot_experiment("fig2b", data).axes


def test_a_descent_that_diverges_leaves_its_neighbors_alone():
    """From a start of 0.001 features of size 1 are learned, for which a step of 10^4 is far too long."""
    settings = dataclasses.replace(SCALE, taus=(0.001, 1.0), largest_step=1e4, lazy_from=100.0)
    data = student_scale.run(settings, seed=5)
    assert data["descent_failed"].sel(tau=0.001).all()
    assert data["risk"].sel(tau=0.001).isnull().all()
    assert not data["descent_failed"].sel(tau=1.0).any()
    assert data["risk"].sel(tau=1.0).notnull().all()
    assert data["stability"].sel(tau=1.0).notnull().all()
    rows = {row.label: row.value for row in student_scale.numbers(data)}
    assert rows["descents that diverged (left out)"] == 2
    figure = plot.plot_experiment("fig1c", data)
    assert any("2 of 4 descents diverged" in text.get_text() for text in figure.axes[0].texts)


def test_trajectories_of_too_long_a_step_are_refused():
    settings = trajectories.Settings(tau=2.0, n=9, width=6, steps=200, step=5.0, frames=10, flow_steps=256)
    with pytest.raises(ValueError, match=r"gradient descent diverged: step=5\.0 is too long at tau=2\.0"):
        trajectories.run(settings, seed=1)


def test_a_loss_that_falls_at_the_end_has_not_converged_and_stopped_flows_are_noted():
    """Two seeds, two scales, five frames: by hand."""
    flat, falling = [1.0, 0.6, 0.5, 0.3, 0.3], [1.0, 0.9, 0.8, 0.7, 0.6]
    risk = np.array([[flat, falling], [flat, falling]])
    flow = risk.copy()
    flow[1, 1] = np.nan
    flags = np.array([[False, False], [False, True]])
    data = xarray.Dataset(
        {
            "risk": (("seed", "tau", "step"), risk), "flow_risk": (("seed", "tau", "step"), flow),
            "failed": (("seed", "tau"), flags), "descent_failed": (("seed", "tau"), ~flags & False),
            "zero_risk": ("seed", [1.0, 2.0]), "teacher_sign": (("seed", "teacher_unit"), [[1.0, -1.0], [1.0, 1.0]]),
        },
        {"tau": [0.1, 1.0], "step": [0, 1, 2, 3, 4], "seed": [0, 1]},
    )  # fmt: skip
    settings = dataclasses.replace(population_descent.PRESETS["small"], taus=(0.1, 1.0))
    data = record(data, settings, 0, layer_factor_used=10.0)
    assert list(population_descent.unconverged(data).values) == [False, True]
    assert list(population_descent.mixed_signs(data).values) == [True, False]
    rows = {row.label: row for row in population_descent.numbers(data)}
    assert rows["loss / zero predictor's, SGD, tau = 1"].value == pytest.approx((0.6 + 0.3) / 2)
    assert rows["loss / zero predictor's, SGD, tau = 1"].note == "still falling"
    assert rows["the same at the largest tau, SGD, teachers of mixed signs"].value == pytest.approx(0.6)
    figure = plot.plot_experiment("fig2b", data)
    assert any("1 of 4 flows stopped early" in text.get_text() for text in figure.axes[0].texts)
    drawn = {line.get_label(): line.get_ydata() for line in figure.axes[0].lines}
    assert np.isnan(drawn["exact population flow"][1])
    assert drawn["SGD"][1] == pytest.approx(0.45)


def test_the_exact_population_flow_is_descent_of_small_steps():
    """Euler's error falls with the step, in the metric of the code."""
    settings = population_descent.Settings(d=5, width=4, taus=(1.0,), steps=40, frames=5, flow_steps=512)
    found = population_descent.run_flow(settings, jnp.asarray(0), jnp.asarray(1.0))
    _, _, teacher, start = draw(0, 1, 5, 4)
    rate = float(population_descent.step_of(settings, jnp.asarray(1.0)))
    gradient = jax.jit(jax.grad(population_risk))
    gaps = []
    for halvings in (4, 8):
        w = start
        for _ in range(40 * halvings):
            g = gradient(w, teacher)
            w = {"a": w["a"] - rate / halvings * g["a"], "b": w["b"] - 5 * rate / halvings * g["b"]}
        gaps.append(abs(float(population_risk(w, teacher)) - float(found["flow_risk"][-1])))
    assert gaps[1] < 0.6 * gaps[0] < 0.01 * float(found["flow_risk"][-1])


@pytest.fixture(scope="module")
def sparse():
    return sparse_regression.run(sparse_regression.PRESETS["small"], seed=1)


def test_flows_of_diagonal_nets_end_at_the_potentials_minimizers(sparse):
    gap = abs(sparse["flow"] - sparse["potential"]).max("coordinate") / abs(sparse["potential"]).max("coordinate")
    assert not sparse["failed"].any()
    # The flow is stopped at its horizon; its rate falls with alpha.
    assert float(gap.max()) < 2e-3
    assert float(gap.sel(alpha=[0.1, 1.0, 10.0]).max()) < 1e-4
    assert float(sparse["drift"].max()) < 1e-3


def test_the_potentials_minimizers_interpolate_and_tend_to_l1_and_l2(sparse):
    settings = sparse_regression.PRESETS["small"]
    x, truth = sparse_regression.draw(settings, 1)
    y = x @ truth
    for name in ("potential", "l1", "l2"):
        beta = sparse[name].values.reshape(-1, settings.d)
        np.testing.assert_allclose(beta @ np.asarray(x).T, np.broadcast_to(y, (len(beta), settings.n)), atol=1e-7)
    excess = sparse_regression.excess(sparse, "potential")
    assert (excess["excess_l1"] > -1e-8).all()
    assert (excess["excess_l2"] > -1e-8).all()
    assert float(excess["excess_l1"][0]) < 0.02
    # As alpha^-4: ten times the scale, ten thousand times nearer.
    far = np.linalg.norm(sparse["potential"].sel(alpha=[1.0, 10.0]) - sparse["l2"], axis=1)
    assert 5e3 < far[0] / far[1] < 2e4
    assert all(np.isfinite(row.value) for row in sparse_regression.numbers(sparse))
    assert plot.plot_experiment("woodworth", sparse).axes


def test_rates_and_constants_of_theorem_2_2():
    data = lazy_rates.run(lazy_rates.PRESETS["small"], seed=2)
    assert not data["failed"].any()
    for row in lazy_rates.numbers(data):
        if row.reference is not None:
            assert row.value == pytest.approx(row.reference, abs=0.02), row.label
    bound = data["displacement_bound"] / data["alpha"]
    assert (data["displacement_norm"] <= bound).all()
    assert (data["displacement_norm"] > 0.1 * bound).all()
    assert plot.plot_experiment("rates", data).axes


def test_kappa_falls_with_the_width_unless_the_scale_is_that_of_mean_fields():
    settings = kappa_width.Settings(d=2, n=5, widths=(10, 160), seeds=4, starts=4, fit_from=10)
    data = kappa_width.run(settings)
    mean_field, root, one = (kappa_width.slope_of(data, power) for power in (1.0, 0.5, 0.0))
    # Four nets a width over a factor of 16: a tenth of a power.
    assert mean_field == pytest.approx(0, abs=0.15)
    assert root == pytest.approx(-0.5, abs=0.15)
    assert one == pytest.approx(-0.5, abs=0.15)
    assert not data["failed"].any()
    assert len(kappa_width.numbers(data)) == 4
    assert plot.plot_experiment("kappa-width", data).axes


def test_figure_4_as_a_dataset_is_its_result_again():
    figure = catalogue.FIGURES["fig4"]
    settings = dataclasses.replace(figure.presets["small"], num_seeds=10, num_angles=5, widths=(10, 30), shown=(10,))
    data = figure.run(settings, seed=0)
    rows = {row.label: row for row in figure.numbers(data)}
    assert rows["K(1 pi/4)"].value == pytest.approx(rows["K(1 pi/4)"].reference, abs=1e-9)
    assert plot.plot_experiment("fig4", data).axes


# ---- settings ----


def test_every_figure_has_settings_of_each_size_and_a_drawing():
    assert set(plot.EXPERIMENTS) == set(catalogue.FIGURES)
    for name, figure in catalogue.FIGURES.items():
        assert list(figure.presets) == ["small", "default", "gpu" if figure.images else "paper"]
        for size, preset in figure.presets.items():
            assert catalogue.settings_of(name, size) == preset


@pytest.mark.parametrize(
    ("kind", "change", "match"),
    [
        (student_scale.Settings, {"taus": (0.0, 1.0)}, r"taus must be different positive finite numbers, got \(0.0"),
        (student_scale.Settings, {"taus": ()}, "taus must be different positive finite numbers"),
        (student_scale.Settings, {"width": 7}, "width must be even for a symmetrized init.*got 7; use 8"),
        (student_scale.Settings, {"steps": 0}, "steps must be a whole number of at least 1, got 0"),
        (student_scale.Settings, {"dtype": "float16"}, 'dtype must be "float32" or "float64"'),
        (trajectories.Settings, {"tau": -1.0}, "tau must be a positive finite number, got -1.0"),
        (trajectories.Settings, {"width": 3}, "width must be even"),
        (trajectories.Settings, {"variant": "mine"}, 'variant must be "paper" or "code", got .mine'),
        (student_width.Settings, {"widths": (0, 2)}, r"widths must be whole numbers of at least 1, got \(0, 2\)"),
        (student_width.Settings, {"widths": (2, 2)}, "widths must be different positive finite numbers"),
        (student_width.Settings, {"dtype": "float16"}, 'dtype must be "float32" or "float64"'),
        (population_descent.Settings, {"dtype": "float16"}, 'dtype must be "float32" or "float64"'),
        (population_descent.Settings, {"taus": (1.0, 0.5)}, r"taus must rise, got \(1.0, 0.5\)"),
        (kappa_width.Settings, {"widths": (0, 300)}, "widths must be whole numbers of at least 1"),
        (lazy_rates.Settings, {"alphas": (300.0, 100.0)}, "alphas must rise"),
        (population_descent.Settings, {"width": 5}, "width must be even"),
        (population_descent.Settings, {"layer_factor": -1.0}, "layer_factor must be a finite number >= 0"),
        (sparse_regression.Settings, {"n": 100}, "n must be below d"),
        (sparse_regression.Settings, {"alphas": (2.0, 1.0)}, "alphas must rise"),
        (kappa_width.Settings, {"fit_from": 1001}, "at least two from fit_from"),
        (lazy_rates.Settings, {"fit_from": 1e4}, "at least two from fit_from"),
    ],
)
def test_bad_settings_are_refused(kind, change, match):
    with pytest.raises(ValueError, match=match):
        kind(**change)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (("fig1",), "no figure 'fig1' among fig1a, .*did you mean fig1"),
        (("Figure2b",), "did you mean fig2b"),
        (("nothing",), "choose one of these"),
        (("fig1c", "huge"), "size must be one of small, default, paper for fig1c, got 'huge'"),
        (("fig1c", "small", {"tau": 1.0}), "fig1c has no setting 'tau'; it has d, n, width, taus"),
        (("fig2b", "small", {"factor": 2.0}), "fig2b has no setting 'factor'"),
        (("fig1c", "small", {"steps": "many"}), "steps must be of type int as 400 is, got 'many'"),
    ],
)
def test_bad_requests_are_refused(arguments, match):
    with pytest.raises(ValueError, match=match):
        catalogue.settings_of(*arguments)


def test_risks_are_not_taken_in_float32():
    with jax.enable_x64(False), pytest.raises(ValueError, match="they need float64"):
        student_scale.run(SCALE)


def test_a_potential_that_is_not_found_is_an_error(monkeypatch):
    monkeypatch.setattr("scipy.optimize.minimize", lambda *_, **__: optimum())
    with pytest.raises(ValueError, match=r"alphas: the potential's minimum at 1\.0 was not found \(stuck\)"):
        sparse_regression.minimize_potential(np.ones((1, 2)), np.ones(1), (1.0,))
    with pytest.raises(ValueError, match="have no interpolator of least l1 norm that SciPy finds"):
        sparse_regression.least_norms(np.zeros((1, 2)), np.ones(1))


def optimum():
    from scipy.optimize import OptimizeResult

    return OptimizeResult(success=False, jac=np.ones(1), message="stuck")


def test_keys_of_an_experiment_are_its_own():
    first, second = draw(0, 3, 4, 2), draw(1, 3, 4, 2)
    assert not np.allclose(first.x, second.x)
    assert np.allclose(first.x, draw(0, 3, 4, 2).x)
    np.testing.assert_allclose(first.y, lj.models.two_layer()(first.teacher, first.x))
    assert not np.allclose(first.start["b"][0], jr.normal(jr.key(0), (4,)))
