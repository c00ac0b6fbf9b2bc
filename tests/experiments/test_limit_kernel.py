"""Figure 4: random tangent kernels, their limit, the rate between them, and the drawing."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from matplotlib.figure import Figure

import lazyjax as lj
from lazyjax.experiments import fig4_limit_kernel as limit_kernel
from lazyjax.experiments._plot_kernel import draw_limit_kernel
from lazyjax.experiments.fig4_limit_kernel import Settings, run, sample_kernels, term_variance
from lazyjax.kernels.infinite_width import arccos_kernel
from lazyjax.plot import report as plot

SETTINGS = Settings(widths=(8, 32, 128, 512), shown=(8, 128), num_shown=3, num_seeds=150, num_angles=13)


@pytest.fixture(scope="module")
def result():
    with jax.numpy_dtype_promotion("strict"):
        return run(SETTINGS, key=jr.key(0))


# ---- the experiment ----


@pytest.mark.parametrize(("num", "together"), [(4, 4), (6, 4), (5, 0)])
def test_realizations_are_the_random_feature_kernels_of_the_first_units(num, together, monkeypatch, getkey):
    monkeypatch.setattr(limit_kernel, "JACOBIAN_BYTES", together * 3 * 5 * 10 * 8)
    x = jr.normal(getkey(), (3, 4))
    kernels = sample_kernels(jr.key(1), jnp.asarray(7), x[:1], x, units=10, num=num)
    for k, key in zip(kernels, jr.split(jr.key(1), num), strict=True):
        w = {name: np.asarray(value)[:7] for name, value in lj.models.two_layer().init(key, d=4, width=10).items()}
        z = np.asarray(x) @ w["b"].T
        on, features = z > 0, np.maximum(z, 0)
        expected = (x[0] @ x.T) * ((on[0] * on) @ w["a"] ** 2) / 7 + features @ features[0] / 7
        np.testing.assert_allclose(k, expected, rtol=1e-12, atol=1e-14)


def test_the_limit_is_equation_8_on_the_unit_circle(result):
    angles = np.asarray(result.angles)
    np.testing.assert_allclose(angles, np.linspace(0, np.pi, 13), rtol=1e-15)
    expected = (2 * (np.pi - angles) * np.cos(angles) + np.sin(angles)) / (2 * np.pi)
    np.testing.assert_allclose(result.limit, expected, atol=1e-14)


def test_the_error_falls_as_one_over_the_root_of_the_width(result):
    # 150 nets a width over a factor of 64: the fit's standard deviation is below 0.02.
    assert float(result.slope) == pytest.approx(-0.5, abs=0.04)
    # Each error is the predicted one within its own sampling error of about five per cent.
    np.testing.assert_allclose(result.errors, result.expected, rtol=0.15)


def test_the_slope_holds_for_every_seed():
    slopes = [float(run(SETTINGS, key=jr.key(seed)).slope) for seed in (1, 2)]
    np.testing.assert_allclose(slopes, -0.5, atol=0.05)


def test_the_variance_of_one_term_is_that_of_nets_of_one_unit(getkey):
    angles = jnp.array([0.0, 0.6, 1.5, 2.4, np.pi])
    circle = jnp.stack([jnp.cos(angles), jnp.sin(angles)], axis=1)
    one_unit = {"units": 1, "num": 200_000}
    kernels = np.asarray(sample_kernels(getkey(), jnp.asarray(1), circle[:1], circle, **one_unit))
    limit = np.asarray(arccos_kernel(circle[0], circle, layer="both"))
    np.testing.assert_allclose(kernels.mean(0), limit, atol=0.02)
    # The fourth powers of Gaussians are wild: 2 per cent of the variance at one standard deviation.
    np.testing.assert_allclose(kernels.var(0), term_variance(angles), rtol=0.08, atol=1e-12)
    assert float(term_variance(angles)[0]) == pytest.approx(3.0)


def test_the_realizations_are_the_first_nets_of_the_widths_shown(result):
    assert result.realizations.shape == (2, 3, 13)
    narrow, wide = (np.sqrt(np.mean((k - np.asarray(result.limit)) ** 2)) for k in np.asarray(result.realizations))
    assert narrow > 2 * wide
    again = run(SETTINGS, key=jr.key(0))
    np.testing.assert_array_equal(again.realizations, result.realizations)


def test_nothing_need_be_shown():
    result = run(Settings(widths=(2, 4), shown=(), num_shown=1, num_seeds=2, num_angles=3), key=jr.key(0))
    assert result.realizations.shape == (0, 1, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"d": 1}, "d must be at least 2, .* got 1"),
        ({"widths": (10,)}, r"widths must be at least two positive numbers, for a rate, got \(10,\)"),
        ({"widths": (0, 10)}, r"widths must be at least two positive numbers"),
        ({"shown": (11,)}, r"shown must be some of widths .*, got \(11,\)"),
        ({"num_angles": 1}, r"num_angles must be at least 2 .*, got 1"),
        ({"num_shown": 201}, r"num_shown must lie in 1..num_seeds, got 201 of 200"),
        ({"num_shown": 0}, r"num_shown must lie in 1..num_seeds, got 0 of 200"),
    ],
)
def test_settings_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Settings(**options)


# ---- the drawing ----


def lines(ax):
    return {line.get_label(): line for line in ax.get_lines() if not line.get_label().startswith("_")}


@pytest.fixture
def axes(result):
    figure = Figure(figsize=(3.5, 4.5), layout="constrained")
    axes = list(figure.subplots(2, 1))
    draw_limit_kernel(axes, result)
    return axes


def test_the_upper_axes_show_each_net_and_the_limit(axes, result):
    shown = lines(axes[0])
    assert list(shown) == ["$m=8$", "$m=128$", "limit $K$"]
    assert len(axes[0].get_lines()) == 2 * 3 + 1
    np.testing.assert_array_equal(shown["limit $K$"].get_ydata(), result.limit)
    np.testing.assert_array_equal(shown["$m=128$"].get_ydata(), result.realizations[1, 0])
    # No width is told by color alone.
    assert len({shown[f"$m={m}$"].get_linestyle() for m in (8, 128)}) == 2
    assert "varphi" in axes[0].get_xlabel()
    assert axes[0].get_ylabel()


def test_the_lower_axes_show_errors_theory_and_fit(axes, result):
    shown = lines(axes[1])
    assert axes[1].get_xscale() == axes[1].get_yscale() == "log"
    np.testing.assert_array_equal(shown["150 nets a width"].get_xdata(), SETTINGS.widths)
    np.testing.assert_array_equal(shown["150 nets a width"].get_ydata(), result.errors)
    np.testing.assert_array_equal(shown[r"theory: $(\bar V/m)^{1/2}$"].get_ydata(), result.expected)
    (fit,) = (line for label, line in shown.items() if label.startswith("fit"))
    assert f"{float(result.slope):.3f}" in fit.get_label()
    slope = np.diff(np.log(fit.get_ydata())) / np.diff(np.log(fit.get_xdata()))
    np.testing.assert_allclose(slope, float(result.slope), rtol=1e-12)


def test_legends_cover_no_data_and_fit_the_column(axes):
    figure = axes[0].figure
    figure.draw_without_rendering()
    for ax in axes:
        legend = ax.get_legend().get_window_extent()
        assert not legend.overlaps(ax.get_window_extent())
        assert figure.bbox.x0 <= legend.x0
        assert legend.x1 <= figure.bbox.x1


def test_the_figure_has_both_panels_each_on_its_own_scale(result):
    figure = plot.plot_limit_kernel(result)
    upper, lower = figure.axes
    assert upper.get_xlim() != lower.get_xlim()
    assert (upper.get_xscale(), lower.get_xscale()) == ("linear", "log")
