"""Figure 3(b): a tiny network in both regimes, numbers and drawing of a dataset made by hand."""

import numpy as np
import pytest
import xarray

from figures import TINY
from lazyjax.experiments import fig3b_deep_wide as deep_wide
from lazyjax.experiments.figure import record


def by_hand(data="digits"):
    """One network and two seeds."""
    accuracy = np.array([[[0.2, 0.9], [0.1, 0.5]], [[0.2, 0.7], [0.1, 0.3]]])[None]
    dims = ("network", "seed", "regime", "epoch")
    found = xarray.Dataset(
        {
            "train_accuracy": (dims, accuracy),
            "test_accuracy": (dims, accuracy - 0.1),
            "stability": (dims[:3], np.full((1, 2, 2), 0.75)),
            "failed": (dims[:3], np.zeros((1, 2, 2), bool)),
        },
        coords={"network": ["vgg11"], "seed": [0, 1], "regime": list(deep_wide.REGIMES), "epoch": [1, 2]},
    )
    return record(found, deep_wide.Settings(data=data), 0)


def test_the_posters_numbers_stand_next_to_those_of_its_data_only():
    rows = {row.label: row for row in deep_wide.numbers(by_hand())}
    assert all(row.reference is None for row in rows.values())
    assert rows["vgg11 standard: train accuracy %"].value == pytest.approx(80)
    assert rows["vgg11 linearized: stability of activations %"].value == pytest.approx(75)
    there = {row.label: row for row in deep_wide.numbers(by_hand("cifar10"))}
    assert there["vgg11 standard: train accuracy %"].reference == 99.9
    assert there["vgg11 linearized: test accuracy %"].reference == 61.7
    best = there["best linearized: test accuracy %, compared with random features"]
    assert (best.value, best.reference) == (pytest.approx(30), 84.2)


def test_the_drawing_has_a_pair_of_bars_per_regime_and_the_posters_crosses():
    (ax,) = deep_wide.draw(by_hand()).axes
    np.testing.assert_allclose([bar.get_height() for bar in ax.patches], [80, 40, 70, 30])
    assert [label.get_text() for label in ax.get_xticklabels()] == ["vgg11\nstandard", "vgg11\nlinearized"]
    assert not ax.lines
    (ax,) = deep_wide.draw(by_hand("cifar10")).axes
    crosses = np.concatenate([line.get_xydata() for line in ax.lines])
    np.testing.assert_allclose(crosses, [[-0.19, 99.9], [0.81, 61.0], [0.19, 89.7], [1.19, 61.7]])


@pytest.mark.end_to_end
def test_wide_networks_in_both_regimes(tiny):
    options = {key: value for key, value in TINY.items() if key != "width"}
    settings = deep_wide.Settings(
        **options, networks=(tiny,), widths=(1 / 8,), gains=(1.3,), epochs=2, step=0.05, lazy_step=0.02
    )
    data = deep_wide.run(settings)
    assert not data["failed"].any()
    assert data["test_accuracy"].dims == ("network", "seed", "regime", "epoch")
    stability = data["stability"].sel(network=tiny).isel(seed=0)
    assert float(stability.sel(regime="linearized")) > 0.9999
    assert float(stability.sel(regime="standard")) < 0.99
    assert (data["train_loss"].isel(epoch=-1) < np.log(10)).all()
    assert all(row.reference is None for row in deep_wide.numbers(data))
    assert deep_wide.draw(data).axes
