"""A report made by hand, with the laws of a centered model: what is drawn, printed and written needs no training."""

import numpy as np
import xarray

from lazyjax import LazinessReport
from lazyjax.report.diagnose import UNITS
from lazyjax.report.verdict import Slope, write_verdict

ALPHAS = np.array([1.0, 10.0, 100.0, 1e3, 1e7, np.inf])
TIMES = np.concatenate([[0.0], np.geomspace(1e-2, 10, 8)])


def make_report(*, classes=True, test=True, failed=None, stability=True, alphas=ALPHAS):
    """Return a report whose output gap is 0.5/alpha above a floor of 1e-5; `failed` is the lane that has no numbers."""
    parts = ["train", "test"] if test else ["train"]
    finite = np.where(np.isfinite(alphas), alphas, 1e9)
    along = TIMES / TIMES[-1]
    data = {}
    for i, part in enumerate(parts):
        tangent = 0.5 * np.exp(-3 * along) + 0.1 * i
        data[f"{part}_loss"] = (("alpha", "time"), tangent + 0.05 * along / finite[:, None])
        data[f"tangent_{part}_loss"] = ("time", tangent)
        if classes:
            data[f"{part}_accuracy"] = (("alpha", "time"), np.tile(0.5 + 0.4 * along, (alphas.size, 1)))
            data[f"tangent_{part}_accuracy"] = ("time", 0.5 + 0.4 * along)
    gap = np.maximum(0.5 / finite, 1e-5)[:, None] * along
    eps = np.where(np.isfinite(alphas), 1 / alphas, 0)[:, None]
    data["output_gap"] = data["scaled_param_gap"] = (("alpha", "time"), gap)
    data["param_gap"] = (("alpha", "time"), eps * gap)
    data["displacement_norm"] = (("alpha", "time"), eps * along)
    data["kernel_drift"] = ("alpha", eps[:, 0])
    data["num_steps"] = ("alpha", np.full(alphas.size, 50))
    if stability:
        data["stability"] = ("alpha", 1 - 0.3 * eps[:, 0])
    bad = np.zeros(alphas.size, bool) if failed is None else np.arange(alphas.size) == failed
    for name in [name for name, (dims, _) in data.items() if dims[0] == "alpha" and name != "num_steps"]:
        dims, values = data[name]
        data[name] = (dims, np.where(bad if values.ndim == 1 else bad[:, None], np.nan, values))
    data["failed"] = ("alpha", bad)
    data["message"] = ("alpha", np.where(bad, "nonfinite", ""))
    data["kernel_eigenvalue"] = ("mode", 4.0 * np.geomspace(1, 1e-20, 21))
    attrs = {
        "num_params": 12,
        "num_train": 7,
        "num_test": 5 if test else 0,
        "outputs": 3,
        "loss": "square",
        "dtype": "float32",
        "horizon": 10.0,
        "w0_norm": 2.0,
        "initial_residual": 1.0,
        "lazy_ratio": 0.3,
    }
    coords = {"alpha": alphas, "time": TIMES, "mode": np.arange(1, 22)}
    slopes = {
        "output_gap": Slope(-1.0, 1.0, 100.0, 3, -1.0) if alphas.size > 3 else Slope(*[np.nan] * 3, 1, -1.0),
        "param_gap": Slope(np.nan, np.nan, np.nan, 1, -2.0),
    }
    dataset = xarray.Dataset(data, coords, attrs)
    assert set(dataset.variables) - {"message", "failed", "num_steps"} <= {*UNITS, *(f"tangent_{n}" for n in UNITS)}
    return LazinessReport(dataset, slopes, write_verdict(dataset, slopes), ("a note",))
