"""Precision at large alpha: a tiny network in both ways, numbers and drawing of a dataset made by hand."""

import numpy as np
import pytest
import xarray

from figures import TINY, lines
from lazyjax.experiments import deep_precision
from lazyjax.experiments.figure import record


def by_hand():
    dims = ("difference", "alpha", "epoch")
    error = np.array([[[1e-7, 2e-7], [3e-7, 4e-7]], [[1e-3, 1e-4], [0.9, 0.6]]])
    accuracy = np.array([[[0.1, 0.5], [0.1, 0.6]], [[0.1, 0.5], [0.1, 0.2]]])
    data = xarray.Dataset(
        {"output_error": (dims, error), "test_accuracy": (dims, accuracy)},
        coords={"difference": ["exact", "plain"], "alpha": [1e3, 1e7], "epoch": [1, 2]},
    )
    return record(data, deep_precision.PRESETS["small"], 0)


def test_numbers_tell_the_two_differences_apart():
    rows = {row.label: row.value for row in deep_precision.numbers(by_hand())}
    assert rows["relative error of the outputs: plain difference, alpha = 1e+07"] == 0.6
    assert rows["relative error of the outputs: finite_jvp, alpha = 1e+07"] == 4e-7
    assert rows["test accuracy %: finite_jvp, alpha = 1e+07"] == pytest.approx(60)
    assert len(rows) == 8


def test_the_drawing_shows_errors_at_the_largest_alpha_and_accuracies_by_alpha():
    top, bottom = deep_precision.draw(by_hand()).axes
    np.testing.assert_array_equal(lines(top)["plain difference"].get_ydata(), [0.9, 0.6])
    np.testing.assert_array_equal(lines(top)["finite_jvp"].get_ydata(), [3e-7, 4e-7])
    np.testing.assert_allclose(lines(bottom)["plain difference"].get_ydata(), [50, 20])
    assert "10^{7}" in top.get_ylabel()


@pytest.mark.end_to_end
def test_the_plain_difference_loses_what_finite_jvp_keeps(tiny):
    settings = deep_precision.Settings(**TINY, network=tiny, probe=8, alphas=(1e3, 1e7), epochs=2, step=0.02)
    data = deep_precision.run(settings)
    error = data["output_error"]
    exact, plain = (error.sel(difference=name) for name in ("exact", "plain"))
    assert (exact < 1e-4).all()
    assert (plain.sel(alpha=1e7) > 0.1).all()
    # The rounding of w over its displacement, which falls with alpha.
    assert (plain.sel(alpha=1e3) < 0.05).all()
    assert (plain.sel(alpha=1e3) > exact.sel(alpha=1e3)).all()
    assert deep_precision.draw(data).axes
