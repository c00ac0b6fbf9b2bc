"""The rates of Theorem 2.2: a run, numbers and drawing of a dataset made by hand."""

import numpy as np
import pytest
import xarray

from figures import lines, texts
from lazyjax.experiments import lazy_rates
from lazyjax.experiments.figure import record


def by_hand():
    """Gaps that are exactly their limits, but at alpha = 10, which is not far out; one flow stopped."""
    alphas = np.array([10.0, 100.0, 1000.0])
    gaps = {}
    for gap, powers in lazy_rates.GAPS.items():
        values = np.stack([2.0 * alphas**power for power in powers])
        values[:, 0] = 1.0
        gaps[gap] = (("model", "alpha"), values)
    constants = {name: ("model", [2.0, 2.0]) for name in ("param_constant", "output_constant")}
    data = xarray.Dataset(
        gaps
        | constants
        | {
            "displacement_bound": ("model", [3.0, 3.0]),
            "failed": (("model", "alpha"), [[True, False, False], [False] * 3]),
        },
        coords={"model": list(lazy_rates.MODELS), "alpha": alphas},
    )
    return record(data, lazy_rates.PRESETS["small"], 0)


def test_powers_and_constants_are_those_of_the_limits():
    rows = {row.label: row for row in lazy_rates.numbers(by_hand())}
    compared = [row for row in rows.values() if row.reference is not None]
    assert len(compared) == 9
    for row in compared:
        assert row.value == pytest.approx(row.reference), row.label
    assert rows["flows that stopped early"].value == 1
    alone = by_hand().isel(alpha=[0, 1])
    assert np.isnan(lazy_rates.slope_of(alone, "param_gap", "centered"))


def test_the_drawing_shows_every_gap_of_both_models():
    axes = lazy_rates.draw(by_hand()).axes
    assert [ax.get_ylabel() for ax in axes] == list(lazy_rates.LABELS.values())
    for ax in axes:
        assert {"centered", "symmetrized"} < set(lines(ax))
    np.testing.assert_allclose(lines(axes[2])["symmetrized"].get_ydata(), [1.0, 2e-4, 2e-6])
    # Both models have a bound, and a limit of the parameters; outputs of a symmetrized net have none.
    assert [len(ax.get_lines()) for ax in axes] == [5, 5, 4]
    assert any("1 of 6 flows stopped early" in text for text in texts(axes[2]))


@pytest.mark.end_to_end
def test_rates_and_constants_of_theorem_2_2():
    data = lazy_rates.run(lazy_rates.PRESETS["small"], seed=2)
    assert not data["failed"].any()
    for row in lazy_rates.numbers(data):
        if row.reference is not None:
            assert row.value == pytest.approx(row.reference, abs=0.02), row.label
    bound = data["displacement_bound"] / data["alpha"]
    assert (data["displacement_norm"] <= bound).all()
    assert (data["displacement_norm"] > 0.1 * bound).all()
    assert lazy_rates.draw(data).axes
