"""Figure 7(b): the spectra of a tiny network, numbers and drawing of a dataset made by hand."""

import numpy as np
import pytest
import xarray

import lazyjax as lj
from figures import lines
from lazyjax.experiments import deep
from lazyjax.experiments import fig7b_deep_spectrum as deep_spectrum
from lazyjax.experiments.figure import record


def by_hand(size=200):
    """Ten equal eigenvalues, a drop, and a tail of power -1.25, on both kinds of inputs."""
    index = np.arange(1, size + 1)
    value = np.where(index <= 10, 1.0, 0.1 * (index / 11.0) ** -1.25)
    data = xarray.Dataset(
        {
            "eigenvalue": (("inputs", "index"), np.stack([4 * value, 2 * value])),
            "value": (("inputs", "index"), np.stack([value, value])),
            "fraction": ("index", index / size),
        },
        coords={"inputs": ["images", "noise"], "index": index},
    )
    return record(data, deep_spectrum.PRESETS["small"], 0, outputs=10)


def test_the_slope_of_a_tail_is_its_power():
    assert deep_spectrum.tail_slope(by_hand(), "images") == pytest.approx(-1.25)
    assert np.isnan(deep_spectrum.tail_slope(by_hand(12), "images"))


def test_numbers_are_the_gap_the_tail_and_the_conditioning():
    rows = {row.label: row for row in deep_spectrum.numbers(by_hand())}
    row = rows["drop from eigenvalue k = 10 to k + 1, images"]
    assert (row.value, row.reference) == (pytest.approx(10), 10)
    assert rows["eigenvalue 1 over eigenvalue k + 1, noise"].value == pytest.approx(10)
    assert rows["condition number, images"].value == pytest.approx(10 * (200 / 11) ** 1.25, rel=1e-6)


def test_the_drawing_shows_both_spectra_and_where_the_first_k_end():
    (ax,) = deep_spectrum.draw(by_hand()).axes
    shown = lines(ax)
    assert list(shown) == ["digits", "uniform noise", "the first k = 10", "$1/i$"]
    assert shown["the first k = 10"].get_xdata()[0] == 0.05
    assert list(lines(deep_spectrum.draw(by_hand(12)).axes[0])) == ["digits", "uniform noise", "the first k = 10"]


@pytest.mark.end_to_end
def test_both_spectra_are_those_of_the_gram(tiny):
    settings = deep_spectrum.Settings(data="digits", network=tiny, width=1 / 8, train=6)
    data = deep_spectrum.run(settings, seed=1)
    assert data["eigenvalue"].shape == (2, 60)
    images = deep.load(settings, None)
    f, w0 = deep.start(tiny, 1, images, width=1 / 8, gain=1.0)
    values = np.linalg.eigvalsh(np.asarray(lj.gram(f, w0, images.x), np.float64).reshape(60, 60))[::-1]
    np.testing.assert_allclose(data["eigenvalue"].sel(inputs="images"), values, atol=1e-5 * values[0])
    assert not np.allclose(data["eigenvalue"][0], data["eigenvalue"][1], rtol=0.01)
    np.testing.assert_allclose(data["fraction"], np.arange(1, 61) / 60)
    rows = {row.label: row.value for row in deep_spectrum.numbers(data)}
    assert rows["drop from eigenvalue k = 10 to k + 1, images"] == pytest.approx(values[9] / values[10], rel=1e-3)
