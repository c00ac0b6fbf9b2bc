"""Drawings of reports and spectra: what is drawn is what was measured, and legends cover nothing."""

import subprocess
import sys

import matplotlib as mpl
import numpy as np
import pytest

from lazyjax import plot
from lazyjax.kernels.spectrum import normalized_spectrum
from reports import ALPHAS, TIMES, make_report


def legend(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


def line(ax, label):
    """The data of the line of that label."""
    (found,) = [found for found in ax.get_lines() if found.get_label() == label]
    return np.asarray(found.get_xdata()), np.asarray(found.get_ydata())


KINDS = [
    {},
    {"test": False},
    {"classes": False},
    {"classes": False, "test": False, "stability": False},
    {"failed": 0},
    {"failed": 5},
    {"alphas": np.array([3.0, np.inf])},
    {"alphas": np.array([np.inf])},
]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_every_report_has_all_figures_with_labels_and_legends(kind):
    report = make_report(**kind)
    figures = plot.report_figures(report)
    assert list(figures) == ["scores", "gaps", "drift", "eigenvalues", "curves"]
    for figure in figures.values():
        assert figure.get_figwidth() == 3.5
        for ax in figure.axes:
            assert ax.get_ylabel()
        assert figure.axes[-1].get_xlabel()
        assert any(ax.get_legend() is not None for ax in figure.axes)


@pytest.mark.parametrize("name", ["scores", "gaps", "drift", "curves", "eigenvalues"])
def test_a_dataset_is_drawn_like_its_report(name):
    figure = getattr(plot, f"plot_{name}")(make_report().dataset)
    assert figure.axes[0].get_legend() is not None


@pytest.mark.parametrize("name", ["scores", "gaps", "drift", "curves", "eigenvalues"])
def test_no_legend_covers_data(name):
    figure = getattr(plot, f"plot_{name}")(make_report())
    figure.draw_without_rendering()
    for ax in (ax for ax in figure.axes if ax.get_legend() is not None):
        assert not ax.get_legend().get_window_extent().overlaps(ax.get_window_extent())


class TestScores:
    def test_accuracy_in_percent_above_loss(self):
        upper, lower = plot.plot_scores(make_report()).axes
        assert upper.get_ylabel() == "accuracy (%)"
        assert lower.get_ylabel() == "loss R"
        assert legend(upper) == ["train", "train, tangent model", "test", "test, tangent model"]
        assert line(upper, "test")[1] == pytest.approx(90)
        assert line(lower, "train, tangent model")[1] == pytest.approx(0.5 * np.exp(-3))

    def test_regression_without_test_data_has_the_training_loss(self):
        (ax,) = plot.plot_scores(make_report(classes=False, test=False)).axes
        assert legend(ax) == ["train", "train, tangent model"]

    def test_alpha_is_logarithmic_with_inf_at_the_end(self):
        ax = plot.plot_scores(make_report()).axes[-1]
        assert ax.get_xscale() == "log"
        assert ax.get_xlabel() == r"output scale $\alpha$"
        assert [tick.get_text() for tick in ax.get_xticklabels()][-1] == r"$\infty$"
        assert ax.get_xticks()[-1] > 1e7
        # The line through the finite scales does not reach over the break.
        assert line(ax, "train")[0].max() == 1e7

    def test_a_failed_flow_is_marked_where_its_values_are_missing(self):
        ax = plot.plot_scores(make_report(failed=0)).axes[0]
        assert "flow failed" in legend(ax)
        assert line(ax, "flow failed")[0] == [1.0]
        assert np.isnan(line(ax, "train")[1][0])


class TestGaps:
    def test_values_relative_to_residual_and_start(self):
        upper, lower = plot.plot_gaps(make_report()).axes
        assert upper.get_yscale() == lower.get_yscale() == "log"
        assert line(upper, "largest over time")[1] == pytest.approx(np.maximum(0.5 / ALPHAS[:-1], 1e-5))
        assert line(lower, "largest over time")[1][0] == pytest.approx(0.5 / 2)

    def test_the_fit_runs_over_its_range_through_the_points(self):
        upper, lower = plot.plot_gaps(make_report()).axes
        x, y = line(upper, r"fit: $\alpha^{-1.00}$")
        assert x.tolist() == [1.0, 100.0]
        assert y == pytest.approx([0.5, 0.005])
        assert not any("fit" in text for text in legend(lower))

    def test_the_floor_is_shaded(self):
        upper, _ = plot.plot_gaps(make_report()).axes
        assert legend(upper)[-1] == r"numerical floor ($\alpha=\infty$)"
        (band,) = upper.collections
        assert band.get_paths()[0].vertices[:, 1].max() == pytest.approx(1e-5)

    def test_without_the_lane_at_inf_there_is_no_floor(self):
        upper, _ = plot.plot_gaps(make_report(failed=5)).axes
        assert not upper.collections


class TestDrift:
    def test_what_moves(self):
        (ax,) = plot.plot_drift(make_report()).axes
        assert ax.get_yscale() == "log"
        assert len(legend(ax)) == 3
        assert line(ax, "activations that changed sign")[1] == pytest.approx(0.3 / ALPHAS[:-1])

    def test_leaves_out_what_was_not_measured(self):
        report = make_report(stability=False)
        (ax,) = plot.plot_drift(report.dataset.drop_vars("kernel_drift")).axes
        assert len(legend(ax)) == 1

    def test_parameters_that_start_from_zero_move_by_their_norm(self):
        dataset = make_report().dataset.assign_attrs(w0_norm=0.0)
        (ax,) = plot.plot_drift(dataset).axes
        assert line(ax, r"parameters: $\|w-w_0\|$")[1] == pytest.approx(1 / ALPHAS[:-1])
        assert plot.plot_gaps(dataset).axes[1].get_ylabel() == "parameter gap"


class TestCurves:
    def test_a_few_scales_and_the_tangent_model_over_time(self):
        upper, lower = plot.plot_curves(make_report()).axes
        assert legend(upper) == [*(rf"$\alpha={a}$" for a in ("1", "10", "100", "10^{7}")), "tangent model"]
        assert upper.get_ylabel() == "training loss R"
        assert lower.get_ylabel() == "test accuracy (%)"
        assert lower.get_xscale() == "log"
        assert line(upper, "tangent model")[0] == pytest.approx(TIMES[1:])

    def test_regression_shows_the_test_loss(self):
        assert plot.plot_curves(make_report(classes=False)).axes[1].get_ylabel() == "test loss R"

    def test_without_test_data_there_is_one_panel(self):
        assert len(plot.plot_curves(make_report(test=False)).axes) == 1


class TestEigenvalues:
    def test_relative_to_the_largest_down_to_rounding(self):
        (ax,) = plot.plot_eigenvalues(make_report()).axes
        assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")
        fraction, values = line(ax, legend(ax)[0])
        assert fraction == pytest.approx(np.arange(1, 22) / 21)
        assert values[:7] == pytest.approx(np.geomspace(1, 1e-6, 7))
        assert np.all(np.isnan(values[7:]))
        _, learned = line(ax, legend(ax)[1])
        assert learned == pytest.approx(1 / 40)

    def test_the_leading_ones_lie_at_their_share_of_all_outputs(self):
        dataset = make_report().dataset.isel(mode=slice(0, 3)).assign_attrs(num_train=1000)
        (ax,) = plot.plot_eigenvalues(dataset).axes
        assert line(ax, legend(ax)[0])[0] == pytest.approx(np.arange(1, 4) / 3000)


CURVES = {
    name: normalized_spectrum(np.arange(1.0, size + 1) ** -1.0)
    for name, size in (("random pixels", 500), ("photographs", 50), ("few", 8))
}


class TestSpectrum:
    def test_the_curves_lie_on_common_axes_told_apart_by_color_and_dashes(self):
        figure = plot.plot_spectrum(CURVES)
        (ax,) = figure.axes
        assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")
        assert legend(ax) == list(CURVES)
        for name, (fraction, value) in CURVES.items():
            x, y = line(ax, name)
            assert x == pytest.approx(np.asarray(fraction))
            assert y == pytest.approx(np.asarray(value))
        styles = {(found.get_color(), found.get_linestyle()) for found in ax.get_lines()}
        assert len(styles) == 3
        figure.draw_without_rendering()
        assert not ax.get_legend().get_window_extent().overlaps(ax.get_window_extent())

    def test_eigenvalues_that_are_zero_are_left_out(self):
        (ax,) = plot.plot_spectrum({"one": normalized_spectrum(np.array([4.0, 1.0, 0.0]))}).axes
        assert line(ax, "one")[1][:2] == pytest.approx([1, 0.25])
        assert np.isnan(line(ax, "one")[1][2])

    @pytest.mark.parametrize(("size", "expected"), [(1, ["1"]), (4, ["1/4", "1"]), (10, ["$10^{-1}$", "1"])])
    def test_few_eigenvalues_have_few_ticks(self, size, expected):
        (ax,) = plot.plot_spectrum({"few": normalized_spectrum(np.ones(size))}).axes
        assert [tick.get_text() for tick in ax.get_xticklabels()] == expected

    def test_no_curve_is_refused(self):
        with pytest.raises(ValueError, match=r"spectra must map at least one label to .* got none"):
            plot.plot_spectrum({})


class TestEncode:
    def test_the_same_figure_gives_the_same_bytes(self):
        first, second = (plot.encode(plot.plot_drift(make_report()), "svg") for _ in range(2))
        assert first == second
        assert b"<svg" in first

    def test_matplotlib_is_left_as_it_was(self):
        before = dict(mpl.rcParams)
        assert plot.encode(plot.plot_gaps(make_report(failed=0)), "png", dpi=40).startswith(b"\x89PNG")
        assert dict(mpl.rcParams) == before


@pytest.mark.end_to_end
def test_the_package_loads_without_matplotlib_and_without_the_figures_of_the_paper():
    code = (
        "import sys, lazyjax.plot; sys.exit(any(name in sys.modules for name in ('matplotlib', 'lazyjax.experiments')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
