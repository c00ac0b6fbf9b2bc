"""Figure 4: random tangent kernels, their limit, the rate between them, and the drawing."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import lazyjax as lj
from figures import lines
from lazyjax.experiments import fig4_limit_kernel as limit_kernel
from lazyjax.experiments.fig4_limit_kernel import Settings, run, sample_kernels, term_variance

SETTINGS = Settings(widths=(8, 32, 128, 512), shown=(8, 128), num_shown=3, num_seeds=150, num_angles=13)


@pytest.fixture(scope="module")
def data():
    return run(SETTINGS)


# ---- the experiment ----


def test_realizations_are_the_random_feature_kernels_of_the_first_units(monkeypatch):
    num, together = 6, 4  # nets in two batches of three
    monkeypatch.setattr(limit_kernel, "JACOBIAN_BYTES", together * 3 * 5 * 10 * 8)
    x = np.random.default_rng(0).normal(size=(3, 4))
    kernels = sample_kernels(jr.key(1), jnp.asarray(7), x[:1], x, units=10, num=num)
    draw = jax.jit(lambda key: lj.models.two_layer().init(key, d=4, width=10))
    for k, key in zip(kernels, jr.split(jr.key(1), num), strict=True):
        w = {name: np.asarray(value)[:7] for name, value in draw(key).items()}
        z = x @ w["b"].T
        on, features = z > 0, np.maximum(z, 0)
        expected = (x[0] @ x.T) * ((on[0] * on) @ w["a"] ** 2) / 7 + features @ features[0] / 7
        np.testing.assert_allclose(k, expected, rtol=1e-12, atol=1e-14)


def test_nets_larger_than_the_memory_are_computed_one_by_one(monkeypatch):
    monkeypatch.setattr(limit_kernel, "JACOBIAN_BYTES", 0)
    x = np.zeros((3, 4))
    shape = eqx.filter_eval_shape(sample_kernels, jr.key(1), jnp.asarray(7), x[:1], x, units=10, num=5)
    assert shape.shape == (5, 3)


def test_the_limit_is_equation_8_on_the_unit_circle(data):
    angles = np.asarray(data["angle"])
    np.testing.assert_allclose(angles, np.linspace(0, np.pi, 13), rtol=1e-15)
    expected = (2 * (np.pi - angles) * np.cos(angles) + np.sin(angles)) / (2 * np.pi)
    np.testing.assert_allclose(data["limit"], expected, atol=1e-14)
    rows = {row.label: row for row in limit_kernel.numbers(data)}
    assert rows["K(1 pi/4)"].value == pytest.approx(rows["K(1 pi/4)"].reference, abs=1e-9)


def test_the_error_falls_as_one_over_the_root_of_the_width(data):
    # 150 nets a width over a factor of 64: the fit's standard deviation is below 0.02.
    assert float(data["slope"]) == pytest.approx(-0.5, abs=0.04)
    # Each error is the predicted one within its own sampling error of about five percent.
    np.testing.assert_allclose(data["errors"], data["expected"], rtol=0.15)


def test_the_realizations_are_the_first_nets_of_the_widths_shown(data):
    assert data["realizations"].shape == (2, 3, 13)
    narrow, wide = np.sqrt(((data["realizations"] - data["limit"]) ** 2).mean(("net", "angle")))
    assert narrow > 2 * wide


def test_the_slope_holds_for_other_seeds_which_compile_nothing_new(data):
    del data
    slopes = [float(run(SETTINGS, seed=seed)["slope"]) for seed in (1, 2)]
    np.testing.assert_allclose(slopes, -0.5, atol=0.05)


def test_the_variance_of_one_term_is_that_of_features_drawn_by_numpy():
    angles = np.array([0.0, 0.6, 1.5, 2.4, np.pi])
    circle = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    rng = np.random.default_rng(0)
    z, b = rng.normal(size=(200_000, 2)) @ circle.T, rng.normal(size=(200_000, 1))
    on, features = z > 0, np.maximum(z, 0)
    kernels = b**2 * np.cos(angles) * (on[:, :1] & on) + features[:, :1] * features
    limit = (2 * (np.pi - angles) * np.cos(angles) + np.sin(angles)) / (2 * np.pi)
    np.testing.assert_allclose(kernels.mean(0), limit, atol=0.02)
    # The fourth powers of Gaussians are wild: 2 percent of the variance at one standard deviation.
    variance = np.asarray(jax.jit(term_variance)(angles))
    np.testing.assert_allclose(kernels.var(0), variance, rtol=0.08, atol=1e-12)
    assert variance[0] == pytest.approx(3.0)


@pytest.mark.end_to_end
def test_nothing_need_be_shown():
    data = run(Settings(widths=(2, 4), shown=(), num_shown=1, num_seeds=2, num_angles=3))
    assert data["realizations"].shape == (0, 1, 3)
    assert list(lines(limit_kernel.draw(data).axes[0])) == ["limit $K$"]


# ---- the drawing ----


@pytest.fixture(scope="module")
def figure(data):
    return limit_kernel.draw(data)


def test_the_upper_axes_show_each_net_and_the_limit(figure, data):
    ax = figure.axes[0]
    shown = lines(ax)
    assert list(shown) == ["$m=8$", "$m=128$", "limit $K$"]
    assert len(ax.get_lines()) == 2 * 3 + 1
    np.testing.assert_array_equal(shown["limit $K$"].get_ydata(), data["limit"])
    np.testing.assert_array_equal(shown["$m=128$"].get_ydata(), data["realizations"][1, 0])
    # No width is told by color alone.
    assert len({shown[f"$m={m}$"].get_linestyle() for m in (8, 128)}) == 2
    assert "varphi" in ax.get_xlabel()
    assert ax.get_ylabel()


def test_the_lower_axes_show_errors_theory_and_fit(figure, data):
    ax = figure.axes[1]
    shown = lines(ax)
    assert ax.get_xscale() == ax.get_yscale() == "log"
    np.testing.assert_array_equal(shown["150 nets per width"].get_xdata(), SETTINGS.widths)
    np.testing.assert_array_equal(shown["150 nets per width"].get_ydata(), data["errors"])
    np.testing.assert_array_equal(shown[r"theory: $(\bar V/m)^{1/2}$"].get_ydata(), data["expected"])
    (fit,) = (line for label, line in shown.items() if label.startswith("fit"))
    assert f"{float(data['slope']):.3f}" in fit.get_label()
    slope = np.diff(np.log(fit.get_ydata())) / np.diff(np.log(fit.get_xdata()))
    np.testing.assert_allclose(slope, float(data["slope"]), rtol=1e-12)


def test_legends_cover_no_data_and_fit_the_column(figure):
    figure.draw_without_rendering()
    for ax in figure.axes:
        legend = ax.get_legend().get_window_extent()
        assert not legend.overlaps(ax.get_window_extent())
        assert figure.bbox.x0 <= legend.x0
        assert legend.x1 <= figure.bbox.x1


def test_each_panel_has_its_own_scale(figure):
    upper, lower = figure.axes
    assert upper.get_xlim() != lower.get_xlim()
    assert (upper.get_xscale(), lower.get_xscale()) == ("linear", "log")
