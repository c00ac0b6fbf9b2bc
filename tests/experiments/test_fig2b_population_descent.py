"""Figure 2(b): SGD and the exact flow against each other and small steps, numbers and drawing of a dataset by hand."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import xarray

from figures import lines, sample, texts
from lazyjax.data.population_risk import population_risk
from lazyjax.experiments import fig2b_population_descent as population_descent
from lazyjax.experiments.figure import record


def by_hand(settings):
    """Two seeds, two scales, five frames: one flow stopped, one loss still falls, one teacher has a single sign."""
    flat, falling = [1.0, 0.6, 0.5, 0.3, 0.3], [1.0, 0.9, 0.8, 0.7, 0.6]
    risk = np.array([[flat, falling], [flat, falling]])
    flow = risk.copy()
    flow[1, 1] = np.nan
    data = xarray.Dataset(
        {
            "risk": (("seed", "tau", "step"), risk),
            "flow_risk": (("seed", "tau", "step"), flow),
            "failed": (("seed", "tau"), [[False, False], [False, True]]),
            "descent_failed": (("seed", "tau"), np.zeros((2, 2), bool)),
            "zero_risk": ("seed", [1.0, 2.0]),
            "teacher_sign": (("seed", "teacher_unit"), [[1.0, -1.0], [1.0, 1.0]]),
        },
        coords={"tau": [0.08, 0.8], "step": [0, 1, 2, 3, 4], "seed": [0, 1]},
    )
    return record(data, settings, 0, layer_factor_used=settings.factor)


SMALL = dataclasses.replace(population_descent.PRESETS["small"], taus=(0.08, 0.8))


def test_a_loss_that_falls_at_the_end_has_not_converged():
    data = by_hand(SMALL)
    assert list(population_descent.unconverged(data).values) == [False, True]
    assert list(population_descent.mixed_signs(data).values) == [True, False]
    rows = {row.label: row for row in population_descent.numbers(data)}
    assert rows["loss / zero predictor's, SGD, tau = 0.8"].value == pytest.approx((0.6 + 0.3) / 2)
    assert rows["loss / zero predictor's, SGD, tau = 0.8"].note == "still falling"
    assert rows["the same at the largest tau, SGD, teachers of mixed signs"].value == pytest.approx(0.6)
    assert all(row.reference is None for row in rows.values())


def test_numbers_in_the_codes_metric_stand_next_to_references():
    full = dataclasses.replace(population_descent.Settings(), taus=(0.08, 0.8), steps=20_000)
    rows = {row.label: row for row in population_descent.numbers(by_hand(full))}
    assert rows["loss / zero predictor's, SGD, tau = 0.08"].reference == 0.0008
    assert rows["loss / zero predictor's, SGD, tau = 0.8"].note == "still falling, reference after 10000 steps"
    euclidean = population_descent.numbers(by_hand(dataclasses.replace(full, layer_factor=1.0)))
    assert all(row.reference is None for row in euclidean)


def test_the_drawing_hatches_what_still_falls_and_tells_of_stopped_flows():
    (ax,) = population_descent.draw(by_hand(SMALL)).axes
    shown = lines(ax)
    np.testing.assert_allclose(shown["SGD"].get_ydata(), [0.225, 0.45])
    np.testing.assert_allclose(shown["exact population flow"].get_ydata(), [0.225, np.nan])
    (hatched,) = [patch for patch in ax.patches if patch.get_label() == "still falling"]
    assert hatched.get_x() == pytest.approx((0.08 * 0.8) ** 0.5)
    assert any("1 of 4 flows stopped early" in text for text in texts(ax))


@pytest.mark.end_to_end
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
    assert population_descent.draw(data).axes


@pytest.mark.end_to_end
def test_the_exact_population_flow_is_descent_of_small_steps():
    """Euler's error falls with the step, in the metric of the code."""
    settings = population_descent.Settings(d=5, width=4, taus=(1.0,), steps=40, frames=5, flow_steps=512)
    follow = eqx.filter_jit(lambda seed, tau: population_descent.run_flow(settings, seed, tau)["flow_risk"])
    found = float(follow(jnp.asarray(0), jnp.asarray(1.0))[-1])
    _, _, teacher, start = sample(0, 1, 5, 4)
    steps = {"a": 0.005, "b": 5 * 0.005}
    risk, gradient, gaps = jax.jit(population_risk), jax.jit(jax.grad(population_risk)), []
    for halvings in (4, 8):
        w = {name: np.asarray(leaf) for name, leaf in start.items()}
        for _ in range(40 * halvings):
            g = gradient(w, teacher)
            w = {name: w[name] - steps[name] / halvings * np.asarray(g[name]) for name in w}
        gaps.append(abs(float(risk(w, teacher)) - found))
    assert gaps[1] < 0.6 * gaps[0] < 0.01 * found
