r"""One answer to "how lazily does this model train?": a sweep over alpha beside the tangent model, summed up."""

import sys
import textwrap
import time as clock
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, PRNGKeyArray
from tqdm import tqdm

from lazyjax._core.checks import check_alpha
from lazyjax._core.trees import tree_norm
from lazyjax._core.types import Model, Params
from lazyjax.laziness.one_step import lazy_ratio
from lazyjax.losses.losses import Loss
from lazyjax.models.maps import center, on_data
from lazyjax.report.certificate import certify_scale, format_certificate
from lazyjax.report.kernel_prediction import describe_kernel, predict
from lazyjax.report.lane import (
    MEASURES,
    Problem,
    Reference,
    Spectrum,
    add_probe,
    check_horizon,
    choose_horizon,
    diagonalize,
    follow_tangent,
    follower,
    measure,
    prepare,
    run_lane,
)
from lazyjax.report.sweep import sweep
from lazyjax.report.verdict import (
    Slope,
    fit_slope,
    format_slope,
    format_table,
    kernel_facts,
    rounding_notes,
    table_columns,
    write_verdict,
)
from lazyjax.theory.certify import Certificate

if TYPE_CHECKING:
    import xarray

ALPHAS = (1.0, 10.0, 100.0, 1e3, 1e4, 1e5, 1e6, 1e7, float("inf"))
NUM_TIMES = 33


class LazinessReport(eqx.Module):
    r"""How lazily a model trains; made by `diagnose`. Printing it gives one screen of text.

    Attributes:
        dataset: Everything measured, an `xarray.Dataset` over alpha, time, kernel mode and stop. Per alpha and time:
            train_loss, output_gap (norm in F), param_gap, displacement ($\|w - w_0\|$), and with test data
            test_loss, with classes train_accuracy and test_accuracy. Per time the same of the tangent model
            (tangent_train_loss, ...). Per alpha: kernel_drift (on the first `num_probe` training samples),
            stability, num_steps, failed, message. Per mode: kernel_eigenvalue (F's metric). Per stop, for the square
            loss and kernels that are diagonalized: kernel_time, kernel_train_loss, ..., what kernel regression predicts
            at the stop that is "best" on the test data and at the "end", t = inf. The attributes hold the settings,
            and kernel_condition, kernel_rank, kernel_effective_rank where all eigenvalues are known.
        slopes: Fitted power laws of "output_gap" and "param_gap" on alpha.
        verdict: What it comes to, in plain words.
        notes: What could not be measured, and why.
        certificate: From `certify`, at the smallest lazy alpha (without one, the largest finite): what every theorem
            bounds, beside what was measured. None where it could not be made; a note says why.
    """

    dataset: Any
    slopes: dict[str, Slope]
    verdict: str
    notes: tuple[str, ...]
    certificate: Certificate | None = None

    def __str__(self) -> str:
        """One screen: verdict, table, slopes, kernel."""
        a = self.dataset.attrs
        head = (
            f"lazyjax report: {a['num_params']} parameters, {a['num_train']} training samples, {a['outputs']} outputs "
            f"each, {a['loss']} loss, {a['dtype']}, flow time {a['horizon']:.4g}"
        )
        lines = [head, "", textwrap.fill(self.verdict, 110), "", format_table(table_columns(self.dataset)), ""]
        lines += [format_slope(name.replace("_", " "), slope) for name, slope in self.slopes.items()]
        lines += [textwrap.fill(f"{name}: {text}", 110) for name, text in kernel_facts(self.dataset).items()]
        if self.certificate is not None:
            lines += ["", format_certificate(self.certificate)]
        lines += [textwrap.fill(f"note: {note}", 110) for note in self.notes]
        return "\n".join(lines)


def diagnose(
    f: Model,
    w0: Params,
    x: Array,
    y: Array,
    *,
    loss: str | Callable[[Array], Loss] = "square",
    test: tuple[Array, Array] | None = None,
    alphas: Sequence[float] = ALPHAS,
    time: float | None = None,
    key: PRNGKeyArray | None = None,
    progress: bool = False,
) -> LazinessReport:
    r"""Train a model and its tangent model at many scales alpha, and tell how lazily it trains.

    The model is centered (its output at w0 is subtracted), so that every alpha up to inf makes sense.

    Args:
        f: Model f(w, x) with outputs (n,) or (n, k). If it has `preactivations(w, x)`, the stability of its
            activations is measured too.
        w0: Its parameters.
        x: Training inputs, samples first.
        y: Training targets: classes (n,) or real values of the outputs' shape.
        loss: "square" (classes become one-hot rows), "softmax", "logistic" (two classes), or a function of the
            targets to a loss, such as `lambda y: lj.square_loss(y, mean=False)`.
        test: (x_test, y_test), for test loss and accuracy.
        alphas: Scales, each in (0, inf]; sorted, and inf is added, since it shows the numerical floor.
        time: Flow time to train for; None: until the tangent model's training loss is down to 1 % (square loss),
            but no more than 1000, or 300 for other losses, over the kernel's largest eigenvalue.
        key: For the Lanczos starts; None for a fixed one.
        progress: Say on stderr what is being done, and show a progress bar.

    Returns:
        `LazinessReport`.

    Raises:
        ValueError, TypeError: bad arguments, seen before any long computation.

    Source:
        Chizat, Oyallon, Bach (2019), sections 1 and 3.2, theorems 2.2 to 2.5.

    Example:
        >>> import jax.random as jr
        >>> from lazyjax.models import two_layer
        >>> x = jr.normal(jr.key(1), (8, 3))
        >>> net = two_layer(jnp.tanh)
        >>> report = diagnose(net, net.init(jr.key(0), d=3, width=8), x, x[:, 0], alphas=[1.0, 1e4])
        >>> report.verdict.startswith("At alpha = 1 this model")
        True
    """
    started = clock.perf_counter()
    setting = prepare(f, w0, x, y, loss, test)
    alphas = _check_alphas(alphas)
    if time is not None and not (np.isfinite(time) and time > 0):
        msg = f"time must be a finite positive flow time, got {time}."
        raise ValueError(msg)
    _announce("the tangent kernel and its eigenvalues", progress)
    setting, notes = add_probe(setting)
    spectrum = diagonalize(setting)
    eigenvalues = spectrum.eigenvalues
    horizon = choose_horizon(spectrum) if time is None else float(time)
    check_horizon(horizon, spectrum, setting.loss)
    solver = follower(spectrum, horizon)
    ts = jnp.concatenate([jnp.zeros(1), horizon * jnp.geomspace(1e-3, 1.0, NUM_TIMES - 1)])
    _announce(f"the tangent model's flow up to time {horizon:.4g}", progress)
    reference = follow_tangent(setting, ts, solver)
    _announce(f"the model's flows at {len(alphas)} scales alpha (compiled first)", progress)
    data = sweep(
        run_lane,
        over={"alpha": alphas},
        shared={"setting": setting, "ts": ts, "solver": solver, "reference": reference},
        dims=dict.fromkeys(MEASURES, ("time",)),
        coords={"time": np.asarray(ts), "mode": np.arange(1, eigenvalues.size + 1)},
        # On a CPU lanes side by side are no faster than one by one, which shows more progress.
        chunk=1 if jax.default_backend() == "cpu" else None,
        progress=progress,
    )
    _announce("the step criterion and the prediction from the kernel", progress)
    _complete(data, setting, reference, spectrum, key)
    _announce("the theorems at one scale", progress)
    certificate, more = certify_scale(setting, data, reference, solver, key)
    data.attrs["seconds"] = clock.perf_counter() - started
    slopes = _slopes(data)
    notes = (*notes, *more, *rounding_notes(data))
    return LazinessReport(data, slopes, write_verdict(data, slopes), notes, certificate)


def _announce(text: str, progress: bool) -> None:
    """One line before seconds or minutes of silence, where progress is asked for."""
    if progress:
        tqdm.write(f"lazyjax: {text}", file=sys.stderr)


def _check_alphas(alphas: Sequence[float]) -> list[float]:
    if len(alphas) == 0:
        msg = "alphas must hold at least one scale, got none."
        raise ValueError(msg)
    for alpha in alphas:
        check_alpha(alpha)
    return sorted({*(float(alpha) for alpha in alphas), float("inf")})


def _complete(
    data: "xarray.Dataset", s: Problem, reference: Reference, spectrum: Spectrum, key: PRNGKeyArray | None
) -> None:
    """Add to the lanes what is the same for all of them: the tangent model's curves, the kernel, the settings."""
    for name, values in measure(s, reference.outputs, reference.test_outputs).items():
        data[f"tangent_{name}"] = ("time", np.asarray(values))
    data["kernel_eigenvalue"] = ("mode", spectrum.eigenvalues)
    for name, values in predict(s, spectrum).items():
        data[name] = values
    coordinates = eqx.filter(s.w0, eqx.is_inexact_array)
    data.attrs.update(
        num_params=sum(leaf.size for leaf in jtu.tree_leaves(coordinates)),
        num_train=s.x.shape[0],
        num_probe=0 if s.probe is None else s.probe.shape[0],
        num_test=0 if s.x_test is None else s.x_test.shape[0],
        outputs=s.num_outputs // s.x.shape[0],
        loss=s.loss_name,
        dtype=str(reference.outputs.dtype),
        horizon=float(data["time"][-1]),
        w0_norm=float(tree_norm(coordinates)),
        initial_residual=float(s.loss.norm(s.loss.gradient(jnp.zeros_like(reference.outputs[0])))),
        lazy_ratio=float(_measure_lazy_ratio(s, key)),
        **describe_kernel(spectrum, s.num_outputs),
    )
    for name, text in _UNITS.items():
        if name in data.variables:
            data[name].attrs["long_name"], data[name].attrs["units"] = text


@eqx.filter_jit
def _measure_lazy_ratio(s: Problem, key: PRNGKeyArray | None) -> Array:
    """As one program: operation by operation it compiles three times as long."""
    return lazy_ratio(on_data(center(s.f, s.w0), s.x), s.loss, s.w0, starts=4, key=key)


_UNITS = {
    "alpha": ("output scale", "1"),
    "time": ("flow time", "flow time"),
    "mode": ("index of the kernel's eigenvalue", "1"),
    "train_loss": ("training loss R", "loss"),
    "test_loss": ("test loss R", "loss"),
    "train_accuracy": ("share of right training answers", "1"),
    "test_accuracy": ("share of right test answers", "1"),
    "output_gap": ("norm in F of alpha h(w) - alpha hbar(wbar)", "output"),
    "param_gap": ("|w - wbar|", "parameter"),
    "scaled_param_gap": ("alpha |w - wbar|", "parameter"),
    "displacement": ("|w - w0|", "parameter"),
    "kernel_drift": ("|K(w) - K(w0)| / |K(w0)| in Frobenius norm, on the first num_probe training samples", "1"),
    "stability": ("share of pre-activations that kept their sign", "1"),
    "kernel_eigenvalue": ("eigenvalue of Dh Dh* in F's metric", "1 / flow time"),
    "stop": ("when kernel regression stops: best on the test data, or never", "1"),
    "kernel_time": ("flow time at which kernel regression stops", "flow time"),
    "kernel_train_loss": ("training loss R of kernel regression", "loss"),
    "kernel_test_loss": ("test loss R of kernel regression", "loss"),
    "kernel_train_accuracy": ("share of right training answers of kernel regression", "1"),
    "kernel_test_accuracy": ("share of right test answers of kernel regression", "1"),
}


def _slopes(data: "xarray.Dataset") -> dict[str, Slope]:
    """Power laws of the gaps, above the numerical floor that the lane alpha = inf shows."""
    alphas = np.asarray(data["alpha"], dtype=np.float64)
    output = np.asarray(data["output_gap"].max("time"), dtype=np.float64)
    scaled = np.asarray(data["scaled_param_gap"].max("time"), dtype=np.float64)
    finite = np.isfinite(alphas)
    moved = np.asarray(data["displacement"].max("time"), dtype=np.float64)[finite] * alphas[finite]
    return {
        "output_gap": fit_slope(alphas, output, output[-1], 0.1 * data.attrs["initial_residual"], -1.0),
        # The floor and the ceiling of the parameters' gap are those of alpha times it.
        "param_gap": fit_slope(alphas, scaled, scaled[-1], 0.1 * float(np.nanmax(moved, initial=0)), -1.0).shifted(
            -1.0
        ),
    }
