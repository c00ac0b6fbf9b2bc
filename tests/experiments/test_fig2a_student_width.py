"""Figure 2(a): descents of either scale against NumPy, numbers and drawing of a dataset made by hand."""

import dataclasses

import equinox as eqx
import numpy as np
import pytest
import xarray

from figures import lines, moved, numpy_descent, sample, texts
from lazyjax.experiments import fig2a_student_width as student_width
from lazyjax.experiments.figure import record
from lazyjax.experiments.student import risk_at


def by_hand(settings):
    """Two widths, two seeds and both scalings; one flow stopped."""
    last = np.array([[[10.0, 20.0], [12.0, 24.0]], [[1.0, 2.0], [3.0, 4.0]]])
    risk = np.stack([np.full_like(last, 60.0), last], axis=-1)
    data = xarray.Dataset(
        {
            "risk": (("width", "seed", "scaling", "step"), risk),
            "zero_risk": (("width", "seed", "scaling"), np.full_like(last, 60.0)),
            "flow_risk": (("width", "seed"), [[10.0, 18.0], [1.0, np.nan]]),
            "failed": (("width", "seed"), [[False, False], [False, True]]),
            "descent_failed": (("width", "seed", "scaling"), np.zeros((2, 2, 2), bool)),
        },
        coords={"width": [2, 32], "seed": [0, 1], "scaling": ["1/sqrt(m)", "1/m"], "step": [0, 100]},
    )
    return record(data, settings, 0)


def test_numbers_at_the_papers_size_stand_next_to_references():
    rows = {row.label: row for row in student_width.numbers(by_hand(student_width.Settings()))}
    row = rows["test loss, alpha = 1/sqrt(m), m = 2"]
    assert (row.value, row.reference, row.note) == (11.0, 14.5, "")
    assert rows["loss of the zero predictor"].reference == 60
    assert rows["largest gap of flow and descent over the zero predictor's loss"].value == pytest.approx(0.1)
    assert rows["flows that stopped early"].value == 1
    longer = dataclasses.replace(student_width.Settings(), steps=25_000)
    rows = {row.label: row for row in student_width.numbers(by_hand(longer))}
    assert rows["test loss, alpha = 1/m, m = 32"].note == "reference after 10000 steps"
    small = student_width.numbers(by_hand(student_width.PRESETS["small"]))
    assert all(row.reference is None for row in small)


def test_the_drawing_shows_both_scalings_and_only_means_of_all_flows():
    (ax,) = student_width.draw(by_hand(student_width.Settings())).axes
    shown = lines(ax)
    np.testing.assert_allclose(shown[r"$\alpha=1/\sqrt{m}$"].get_xydata(), [[2, 11], [32, 2]])
    np.testing.assert_allclose(shown[r"$\alpha=1/m$"].get_ydata(), [22, 3])
    np.testing.assert_allclose(shown[r"exact flow, $1/\sqrt{m}$"].get_ydata(), [14, np.nan])
    np.testing.assert_allclose(shown["zero predictor"].get_ydata(), 60)
    assert any("1 of 4 flows stopped early" in text for text in texts(ax))


@pytest.mark.end_to_end
def test_descents_of_either_scale_are_those_of_numpy():
    settings = student_width.Settings(
        d=20,
        n=15,
        widths=(4,),
        seeds=1,
        steps=50,
        step_root=0.1,
        step_mean=0.005,
        frames=3,
        flow_steps=2048,
        dtype="float64",
    )
    data = student_width.run(settings)
    x, y, teacher, start = sample(0, 15, 20, 4, symmetric=False, scale=100.0)
    risk = eqx.filter_jit(risk_at)
    for scaling, alpha, step in (("1/sqrt(m)", 0.5, 0.1 / 4), ("1/m", 0.25, 0.005 / 4)):
        w = numpy_descent(start, x, y, 50, step, alpha=alpha)
        found = float(data["risk"].sel(scaling=scaling, width=4).isel(seed=0, step=-1))
        assert found == pytest.approx(float(risk(start, moved(w, start), teacher, alpha)), rel=1e-8)
    # Euler's error, of an eighth of the step.
    w = numpy_descent(start, x, y, 400, 0.1 / 32, alpha=0.5)
    assert float(data["flow_risk"].item()) == pytest.approx(float(risk(start, moved(w, start), teacher, 0.5)), rel=2e-3)
    assert not data["failed"].any()
    assert not data["descent_failed"].any()
    assert len(student_width.numbers(data)) == 7
    assert student_width.draw(data).axes
