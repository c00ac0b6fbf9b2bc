"""Figures 1(a), 1(b) and 6: descent against NumPy, numbers and drawing of a dataset made by hand."""

import dataclasses

import numpy as np
import pytest
import xarray

from figures import lines, numpy_descent, sample, scaled, texts
from lazyjax.experiments import fig1ab_fig6_trajectories
from lazyjax.experiments.fig1ab_fig6_trajectories import FIGURE_1A, FIGURE_6B, Settings, draw, numbers, run
from lazyjax.experiments.figure import record

SETTINGS = Settings(tau=2.0, n=9, width=6, steps=200, step=0.002, frames=10, flow_steps=256)


def by_hand(message=""):
    """Two units, one of each sign, in three frames; the flow's are the same, but for the last frame if it stopped."""
    units = np.array([[[0.1, 0.0], [0.0, 0.1]], [[0.5, 0.1], [0.1, 0.5]], [[2.0, 0.5], [0.2, 1.0]]])
    loss = np.array([1.0, 0.5, 0.25])
    flow = loss.copy()
    flow[2] = np.nan if message else flow[2]
    data = xarray.Dataset(
        {
            "unit": (("step", "j", "coordinate"), units),
            "flow_unit": (("step", "j", "coordinate"), units + np.array([0.1, 0.0])),
            "sign": (("step", "j"), [[1.0, -1.0]] * 3),
            "train_loss": ("step", loss),
            "flow_train_loss": ("step", flow),
            "risk": ("step", 2 * loss),
            "moved": ("step", [0.0, 0.5, 1.5]),
            "initial_output": ((), 0.0),
            "teacher": (("teacher_unit", "part"), [[1.0, 0.0, 1.0], [0.0, 1.0, -1.0]]),
        },
        coords={"step": [0, 10, 200]},
    )
    return record(data, SETTINGS, 0, flow_message=message)


def test_numbers_stand_next_to_the_reference_of_the_same_settings():
    rows = {row.label: row for row in numbers(by_hand(), SETTINGS, {"moved": 0.1})}
    assert (rows["|w - w0| / |w0|"].value, rows["|w - w0| / |w0|"].reference) == (1.5, 0.1)
    assert (rows["population loss"].value, rows["population loss"].reference) == (0.5, None)
    assert rows["largest distance of units, descent to flow, relative"].value == pytest.approx(0.1 / 2)
    others = numbers(by_hand(), dataclasses.replace(SETTINGS, step=0.001), {"moved": 0.1})
    assert all(row.reference is None for row in others)
    # Of the figures themselves.
    own = record(by_hand(), FIGURE_6B.presets["default"], 0)
    assert [row.reference for row in FIGURE_6B.numbers(own)][:4] == [0.117, 1.3e-3, None, 82.0]


def test_a_flow_that_stopped_is_told_in_numbers_and_drawing():
    data = by_hand("The step sizes collapsed: at a kink.")
    last = numbers(data, SETTINGS, {})[-1]
    assert last.label == "frames of 3 that the exact flow reached before it stopped"
    assert (last.value, last.note) == (2, "descent is drawn; the flow: the step sizes collapsed")
    assert any("the exact flow slides along kinks" in text for text in texts(draw(data).axes[0]))
    assert any("stopped early" in text for text in texts(draw(by_hand("Too many steps: more.")).axes[0]))
    assert not any("exact flow" in text for text in texts(draw(by_hand()).axes[0]))


def test_the_drawing_shows_every_unit_and_the_teacher():
    (ax,) = FIGURE_1A.draw(by_hand()).axes
    shown = lines(ax)
    assert {"student, $a_j>0$", "student, $a_j<0$", "unit circle", "teacher, $a^*_j>0$", "teacher, $a^*_j<0$"} == set(
        shown
    )
    np.testing.assert_array_equal(shown["student, $a_j>0$"].get_xydata(), [[2.0, 0.5]])
    np.testing.assert_array_equal(shown["student, $a_j<0$"].get_xydata(), [[0.2, 1.0]])
    assert shown["teacher, $a^*_j<0$"].get_linestyle() == "--"
    assert ax.get_xlim() == ax.get_ylim() == (-2.2, 2.2)


@pytest.mark.end_to_end
def test_trajectories_are_those_of_numpy():
    data = run(SETTINGS, seed=1)
    x, y, teacher, start = sample(1, 9, 2, 6)
    w = numpy_descent(scaled(start, 2.0), x, y, 200, 0.002)
    np.testing.assert_allclose(data["unit"][-1], np.abs(w["a"])[:, None] * w["b"], rtol=1e-9)
    np.testing.assert_allclose(data["teacher"][:, :2], teacher["b"], rtol=1e-12)
    stopped = bool(data.attrs["flow_message"])
    rows = numbers(data, SETTINGS, {})
    assert any("before it stopped" in row.label for row in rows) is stopped
    assert draw(data).axes


def test_too_long_a_step_is_refused(monkeypatch):
    diverged = {"risk": np.array([1.0, np.nan]), "result": None}
    monkeypatch.setattr(fig1ab_fig6_trajectories, "follow", lambda *_: diverged)
    with pytest.raises(ValueError, match=r"gradient descent diverged: step=5\.0 is too long at tau=2\.0"):
        run(dataclasses.replace(SETTINGS, step=5.0), seed=1)
