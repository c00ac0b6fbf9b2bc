"""From the numbers of a report to its sentences: slopes on alpha, a verdict in plain words, a screen of text."""

from typing import TYPE_CHECKING

import equinox as eqx
import numpy as np

if TYPE_CHECKING:
    import xarray

LAZY = 0.01
"""Training is called lazy if the relative output gap is below this."""


class Slope(eqx.Module):
    r"""A power law fitted to a gap over a range of alpha: gap ~ alpha^value.

    Attributes:
        value: The fitted exponent; NaN if fewer than three points lie between the floor and saturation.
        first, last: The range of alpha fitted.
        points: How many.
        theory: The exponent that theorem 2.2 gives for a centered model.
    """

    value: float
    first: float
    last: float
    points: int
    theory: float

    def shifted(self, by: float) -> "Slope":
        """Return the law of the gap times alpha^by."""
        return Slope(self.value + by, self.first, self.last, self.points, self.theory + by)

    def __str__(self) -> str:
        """Return the law in one line."""
        if not np.isfinite(self.value):
            return f"no slope, only {self.points} point(s) between the numerical floor and saturation"
        return (
            f"alpha^{self.value:.2f} over alpha = {self.first:g} to {self.last:g} "
            f"({self.points} points; theorem 2.2: {self.theory:g} or faster)"
        )


def fit_slope(alphas: np.ndarray, gaps: np.ndarray, floor: float, ceiling: float, theory: float) -> Slope:
    """Fit log gap on log alpha by least squares, over the points between ten times the floor and the ceiling.

    Below the floor a gap is numerical error; above the ceiling the flows are not close and no rate is promised.
    """
    use = np.isfinite(alphas) & np.isfinite(gaps) & (gaps > 10 * floor) & (gaps < ceiling)
    if use.sum() < 3:
        return Slope(float("nan"), float("nan"), float("nan"), int(use.sum()), theory)
    log_alpha = np.log(alphas[use])
    value = float(np.polyfit(log_alpha, np.log(gaps[use]), 1)[0])
    return Slope(value, float(alphas[use].min()), float(alphas[use].max()), int(use.sum()), theory)


def fit_slopes(data: "xarray.Dataset") -> dict[str, Slope]:
    """Fit the power laws of both gaps, above the numerical floor that the lane alpha = inf shows."""
    alphas = np.asarray(data["alpha"], dtype=np.float64)
    output = np.asarray(data["output_gap"].max("time"), dtype=np.float64)
    scaled = np.asarray(data["scaled_param_gap"].max("time"), dtype=np.float64)
    finite = np.isfinite(alphas)
    moved = np.asarray(data["displacement_norm"].max("time"), dtype=np.float64)[finite] * alphas[finite]
    # The floor and the ceiling of the parameter gap are those of alpha times it.
    param = fit_slope(alphas, scaled, scaled[-1], 0.1 * float(np.nanmax(moved, initial=0)), -1.0)
    return {
        "output_gap": fit_slope(alphas, output, output[-1], 0.1 * data.attrs["initial_residual"], -1.0),
        "param_gap": param.shifted(-1.0),
    }


def relative_gap(data: "xarray.Dataset") -> np.ndarray:
    """Return the largest output gap over time in units of the norm of the initial residual, one per lane."""
    return np.asarray(data["output_gap"].max("time"), float) / data.attrs["initial_residual"]


def write_verdict(data: "xarray.Dataset", slopes: dict[str, Slope]) -> str:
    """Tell how lazily the model trains at the smallest alpha, from where on it is lazy, and at what price."""
    alphas = np.asarray(data["alpha"])
    gap = relative_gap(data)
    first = data.isel(alpha=0)
    if bool(first["failed"]):
        start = f"The flow at alpha = {alphas[0]:g} failed ({first['message'].item()}), so nothing is said about it."
    else:
        near = "trains almost lazily" if gap[0] < 10 * LAZY else "does not train lazily"
        lazy = "trains lazily" if gap[0] < LAZY else near
        moved = _movement(float(first["displacement_norm"][-1]), data.attrs["w0_norm"])
        start = (
            f"At alpha = {alphas[0]:g} this model {lazy}: its outputs differ from those of its tangent model by up to "
            f"{_short(100 * gap[0])}% of the initial residual, and its parameters move by {moved}."
        )
        if "kernel_drift" in data:
            start += f" Its tangent kernel changes by {_short(100 * float(first['kernel_drift']))}%."
    sentences = [start, _onset(alphas, gap), *_price(data)]
    slope = slopes["output_gap"]
    if np.isfinite(slope.value):
        sentences.append(
            f"The output gap falls as alpha^{slope.value:.2f} from alpha = {slope.first:g} to {slope.last:g} "
            f"(theorem 2.2: {slope.theory:g} or faster)."
        )
    return " ".join(sentences)


def _short(value: float) -> str:
    """Return two digits, without an exponent for large numbers."""
    return f"{value:.2g}" if value < 99.5 else f"{value:.0f}"


def _movement(distance: float, norm: float) -> str:
    return f"{_short(100 * distance / norm)}% of their norm" if norm > 0 else f"{_short(distance)}, from zero"


def _onset(alphas: np.ndarray, gap: np.ndarray) -> str:
    finite = np.isfinite(alphas)
    # The smallest alpha after which no gap is larger (or missing, for a failed lane).
    above = ~(gap[finite] < LAZY)
    first = int(np.max(np.nonzero(above)[0], initial=-1)) + 1
    if first == finite.sum():
        return f"No finite alpha of this sweep is lazy (gap below {100 * LAZY:g}%)."
    return f"It is lazy (gap below {100 * LAZY:g}%) from alpha = {alphas[first]:g} of this sweep on."


def _price(data: "xarray.Dataset") -> list[str]:
    """Tell what laziness costs, or gains, in generalization at the end of training."""
    model, tangent = data.isel(alpha=0, time=-1), data.isel(time=-1)
    if bool(model["failed"]):
        return []
    alpha = float(model["alpha"])
    if "test_accuracy" in data:
        ours, theirs = float(model["test_accuracy"]), float(tangent["tangent_test_accuracy"])
        return [
            f"Test accuracy at the end: {100 * ours:.1f}% at alpha = {alpha:g}, {100 * theirs:.1f}% for the tangent "
            f"model ({100 * (ours - theirs):+.1f} points)."
        ]
    if "test_loss" in data:
        ours, theirs = float(model["test_loss"]), float(tangent["tangent_test_loss"])
        return [f"Test loss at the end: {ours:.3g} at alpha = {alpha:g}, {theirs:.3g} for the tangent model."]
    return []


def table_columns(data: "xarray.Dataset") -> list[tuple[str, list[str]]]:
    """Return the columns of the report's table: heading and one cell per lane, the tangent model's row last."""
    last = data.isel(time=-1)
    columns = [("alpha", [*(f"{a:g}" for a in np.asarray(data["alpha"])), "tangent"])]
    for name, heading, scale in (
        ("train_loss", "train loss", 1.0),
        ("test_loss", "test loss", 1.0),
        ("train_accuracy", "train acc %", 100.0),
        ("test_accuracy", "test acc %", 100.0),
    ):
        if name in data:
            style = ".1f" if scale > 1 else ".3g"
            values = [*np.asarray(last[name]), float(last[f"tangent_{name}"])]
            columns.append((heading, [f"{scale * v:{style}}" for v in values]))
    gaps = [
        ("out gap %", 100 * relative_gap(data)),
        ("|w-wbar|", np.asarray(data["param_gap"].max("time"))),
        ("|w-w0|", np.asarray(last["displacement_norm"])),
    ]
    if "kernel_drift" in data:
        gaps.append(("drift %", 100 * np.asarray(data["kernel_drift"])))
    if "stability" in data:
        gaps.append(("stable %", 100 * np.asarray(data["stability"])))
    columns += [(heading, [*(f"{v:.2g}" if v < 99 else f"{v:.4g}" for v in values), ""]) for heading, values in gaps]
    columns.append(("steps", [*(str(int(v)) for v in np.asarray(data["num_steps"])), ""]))
    return columns


def kernel_facts(data: "xarray.Dataset") -> dict[str, str]:
    """Return what the kernel at w0 tells, heading to text: only what was computed."""
    a, facts = data.attrs, {}
    if "kernel_condition" in a:
        rounding = f" above {a['dtype']} rounding" if _lost_modes(data) else ""
        facts["tangent kernel at w0"] = (
            f"rank {a['kernel_rank']} of {a['num_train'] * a['outputs']} outputs{rounding}, condition number "
            f"{a['kernel_condition']:.2g}, effective rank {a['kernel_effective_rank']:.3g}"
        )
    if "stop" not in data.coords:
        return facts
    which = "on these modes, " if _lost_modes(data) else ""
    facts["kernel regression, t = inf"] = which + _predicted(data.sel(stop="end"))
    if "best" in data["stop"].values:
        best = data.sel(stop="best")
        time = float(best["kernel_time"])
        facts["stopped when best on the test data"] = (
            f"t = {time:.3g}, {_predicted(best)}" if np.isfinite(time) else "t = inf, no earlier stop is better"
        )
    return facts


def _lost_modes(data: "xarray.Dataset") -> int:
    """Return how many eigenvalues are not above rounding, of those that parameters and outputs are enough for."""
    a = data.attrs
    return min(a["num_params"], a["num_train"] * a["outputs"]) - a["kernel_rank"]


def rounding_notes(data: "xarray.Dataset") -> list[str]:
    """Tell up to when the prediction holds if single precision may hide modes of the kernel."""
    a = data.attrs
    if a["dtype"] == "float64" or "stop" not in data.coords or not (lost := _lost_modes(data)):
        return []
    # At this time a mode at the edge, the largest that may be missing, would be learned to a tenth.
    sure = 0.1 * a["kernel_condition"] / float(data["kernel_eigenvalue"][0])
    return [
        f"{lost} modes of the kernel are zero or below {a['dtype']} rounding and taken as zero, so what kernel "
        f"regression predicts is reliable up to flow times of about {sure:.2g}; float64 (--x64) resolves more of them."
    ]


def _predicted(data: "xarray.Dataset") -> str:
    parts = []
    for part, name in (("train", "training"), ("test", "test")):
        loss, accuracy = f"kernel_{part}_loss", f"kernel_{part}_accuracy"
        if loss in data:
            right = f" ({100 * float(data[accuracy]):.1f}%)" if accuracy in data else ""
            parts.append(f"{name} loss {float(data[loss]):.3g}{right}")
    return ", ".join(parts)
