"""Diagonal linear nets: the potential's minimizers, flows, numbers and drawing of a dataset made by hand."""

import numpy as np
import pytest
import xarray
from scipy.optimize import OptimizeResult

from figures import lines, texts
from lazyjax.experiments import sparse_regression
from lazyjax.experiments.figure import record

SETTINGS = sparse_regression.PRESETS["small"]


def problem(seed):
    """Inputs and targets by NumPy; the truth has two coordinates."""
    x = np.random.default_rng(seed).normal(size=(SETTINGS.n, SETTINGS.d))
    truth = np.where(np.arange(SETTINGS.d) < SETTINGS.sparsity, SETTINGS.sparsity**-0.5, 0.0)
    return x, truth


@pytest.fixture(scope="module")
def data():
    """The minimizers of the potential, and flows that end at them but for a thousandth; the last one stopped."""
    x, truth = problem(1)
    y = x @ truth
    least = sparse_regression.minimize_potential(x, y, SETTINGS.alphas)
    l1, l2 = sparse_regression.least_norms(x, y)
    found = xarray.Dataset(
        {
            "potential": (("alpha", "coordinate"), least),
            "flow": (("alpha", "coordinate"), 1.001 * least),
            "l1": ("coordinate", l1),
            "l2": ("coordinate", l2),
            "truth": ("coordinate", truth),
            "drift": ("alpha", [0.0, 0.0, 1e-5, 0.0, 0.0]),
            "failed": ("alpha", [False] * 4 + [True]),
        },
        coords={"alpha": list(SETTINGS.alphas)},
    )
    return record(found, SETTINGS, 1)


def test_the_potentials_minimizers_interpolate_and_tend_to_l1_and_l2(data):
    x, truth = problem(1)
    for name in ("potential", "l1", "l2"):
        beta = data[name].values.reshape(-1, SETTINGS.d)
        np.testing.assert_allclose(beta @ x.T, np.broadcast_to(x @ truth, (len(beta), SETTINGS.n)), atol=1e-7)
    excess = sparse_regression.excess(data, "potential")
    assert (excess["excess_l1"] > -1e-8).all()
    assert (excess["excess_l2"] > -1e-8).all()
    assert float(excess["excess_l1"][0]) < 0.02
    # As alpha^-4: ten times the scale, ten thousand times nearer.
    far = np.linalg.norm(data["potential"].sel(alpha=[1.0, 10.0]) - data["l2"], axis=1)
    assert 5e3 < far[0] / far[1] < 2e4


def test_numbers_are_those_of_the_ends_of_the_range(data):
    rows = {row.label: row for row in sparse_regression.numbers(data)}
    assert rows["largest relative distance of flow and potential"].value == pytest.approx(1e-3)
    assert rows["largest relative drift of u v"].value == 1e-5
    assert rows["flows that stopped early"].value == 1
    assert rows["test error at alpha = 0.0001"].note == "zero predictor 0.5"
    assert rows["excess l2 norm at alpha = 10"].value == pytest.approx(1e-3, rel=0.01)


def test_the_drawing_shows_flows_on_the_potentials_lines(data):
    upper, lower = sparse_regression.draw(data).axes
    excess = sparse_regression.excess(data, "potential")
    np.testing.assert_array_equal(lines(upper)[r"least $Q_\alpha$, $\ell_1$"].get_ydata(), excess["excess_l1"])
    np.testing.assert_array_equal(lines(lower)[r"least $Q_\alpha$"].get_ydata(), excess["test_error"])
    assert lines(lower)[r"least $\ell_2$"].get_ydata()[0] == pytest.approx(float(excess["test_error"][-1]), rel=1e-4)
    assert any("1 of 5 flows stopped early" in text for text in texts(lower))


def test_a_potential_that_is_not_found_is_an_error(monkeypatch):
    stuck = OptimizeResult(success=False, jac=np.ones(1), message="stuck")
    monkeypatch.setattr("scipy.optimize.minimize", lambda *_, **__: stuck)
    with pytest.raises(ValueError, match=r"alphas: the potential's minimum at 1\.0 was not found \(stuck\)"):
        sparse_regression.minimize_potential(np.ones((1, 2)), np.ones(1), (1.0,))
    with pytest.raises(ValueError, match="have no interpolator of least l1 norm that SciPy finds"):
        sparse_regression.least_norms(np.zeros((1, 2)), np.ones(1))


@pytest.mark.end_to_end
def test_flows_of_diagonal_nets_end_at_the_potentials_minimizers():
    sparse = sparse_regression.run(SETTINGS, seed=1)
    gap = abs(sparse["flow"] - sparse["potential"]).max("coordinate") / abs(sparse["potential"]).max("coordinate")
    assert not sparse["failed"].any()
    # The flow is stopped at its horizon; its rate falls with alpha.
    assert float(gap.max()) < 2e-3
    assert float(gap.sel(alpha=[0.1, 1.0, 10.0]).max()) < 1e-4
    assert float(sparse["drift"].max()) < 1e-3
    assert all(np.isfinite(row.value) for row in sparse_regression.numbers(sparse))
    assert sparse_regression.draw(sparse).axes
