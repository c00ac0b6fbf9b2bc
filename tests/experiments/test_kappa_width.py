"""Kappa against the width: a run, numbers and drawing of a dataset made by hand."""

import numpy as np
import pytest
import xarray

from figures import lines
from lazyjax.experiments import kappa_width
from lazyjax.experiments.figure import record


def by_hand():
    """Powers 0, -1/2, -1 of the width from m = 100 on; narrower nets do not count."""
    widths, powers = np.array([10, 100, 1000, 10_000]), np.array([1.0, 0.5, 0.0])
    kappa = 2.0 * widths[:, None] ** -(1 - powers)
    kappa[0] = 7.0
    data = xarray.Dataset(
        {
            "kappa": (("width", "power", "seed"), np.stack([0.5 * kappa, 1.5 * kappa], axis=-1)),
            "failed": (("width", "power", "seed"), np.zeros((4, 3, 2), bool)),
        },
        coords={"width": widths, "power": powers, "seed": [0, 1]},
    )
    return record(data, kappa_width.Settings(), 0)


def test_powers_are_fitted_to_the_means_of_wide_nets():
    data = by_hand()
    for power, slope in ((1.0, 0.0), (0.5, -0.5), (0.0, -1.0)):
        assert kappa_width.slope_of(data, power) == pytest.approx(slope, abs=1e-9)
    rows = {row.label: row for row in kappa_width.numbers(data)}
    assert rows["power of m in E kappa, alpha(m) = 1/sqrt(m)"].reference == -0.498
    assert rows["nets that failed"].value == 0
    shown = lines(kappa_width.draw(data).axes[0])
    np.testing.assert_allclose(shown[r"$\alpha=1$: $m^{-1.00}$"].get_ydata(), [7.0, 2e-2, 2e-3, 2e-4])


@pytest.mark.end_to_end
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
    assert kappa_width.draw(data).axes
