r"""One answer to "how lazily does this model train?": a sweep over alpha next to the tangent model, summed up."""

import textwrap
import time as clock
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, PRNGKeyArray

from lazyjax._core.checks import check_alpha
from lazyjax._core.tables import format_table
from lazyjax._core.trees import tree_norm
from lazyjax._core.types import Model, Params
from lazyjax.difference.finite_jvp import check_difference
from lazyjax.laziness.one_step import lazy_ratio
from lazyjax.losses.loss import Loss
from lazyjax.report.certificate import certify_scale, format_certificate
from lazyjax.report.kernel_prediction import (
    Spectrum,
    check_horizon,
    choose_horizon,
    choose_solver,
    diagonalize,
    predict,
)
from lazyjax.report.lane import Reference, follow_tangent
from lazyjax.report.problem import Problem, make_problem
from lazyjax.report.scales import announce, follow_scales
from lazyjax.report.verdict import Slope, fit_slopes, kernel_facts, rounding_notes, table_columns, write_verdict
from lazyjax.theory.certify import Certificate

if TYPE_CHECKING:
    import xarray

ALPHAS = (1.0, 10.0, 100.0, 1e3, 1e4, 1e5, 1e6, 1e7, float("inf"))
NUM_TIMES = 33

UNITS = {
    "alpha": ("output scale", "1"),
    "time": ("flow time", "flow time"),
    "mode": ("index of the eigenvalue of the kernel", "1"),
    "train_loss": ("training loss R", "loss"),
    "test_loss": ("test loss R", "loss"),
    "train_accuracy": ("share of correct training answers", "1"),
    "test_accuracy": ("share of correct test answers", "1"),
    "output_gap": ("norm in F of alpha h(w) - alpha hbar(wbar)", "output"),
    "param_gap": ("|w - wbar|", "parameter"),
    "scaled_param_gap": ("alpha |w - wbar|", "parameter"),
    "displacement_norm": ("|w - w0|", "parameter"),
    "kernel_drift": ("|K(w) - K(w0)| / |K(w0)| in Frobenius norm, on the first num_probe training samples", "1"),
    "stability": ("share of preactivations that kept their sign", "1"),
    "kernel_eigenvalue": ("eigenvalue of Dh Dh* in F's metric", "1 / flow time"),
    "stop": ("when kernel regression stops: best on the test data, or never", "1"),
    "kernel_time": ("flow time at which kernel regression stops", "flow time"),
    "kernel_train_loss": ("training loss R of kernel regression", "loss"),
    "kernel_test_loss": ("test loss R of kernel regression", "loss"),
    "kernel_train_accuracy": ("share of correct training answers of kernel regression", "1"),
    "kernel_test_accuracy": ("share of correct test answers of kernel regression", "1"),
}
"""Long name and unit of each variable of a report's dataset."""


class LazinessReport(eqx.Module):
    r"""A report on how lazily a model trains; made by `diagnose`. Printing it gives one screen of text.

    Attributes:
        dataset: Everything measured, an `xarray.Dataset` over alpha, time, kernel mode and stop. Per alpha and time:
            train_loss, output_gap (norm in F), param_gap, displacement_norm ($\|w - w_0\|$), and with test data
            test_loss, with classes train_accuracy and test_accuracy. Per time the same of the tangent model
            (tangent_train_loss, ...). Per alpha: kernel_drift (on the first `num_probe` training samples),
            stability, num_steps, failed, message. Per mode: kernel_eigenvalue (F's metric). Per stop, for the square
            loss and kernels that are diagonalized: kernel_time, kernel_train_loss, ..., what kernel regression predicts
            at the stop that is "best" on the test data and at the "end", t = inf. The attributes hold the settings,
            and kernel_condition, kernel_rank, kernel_effective_rank if all eigenvalues are known.
        slopes: Fitted power laws of "output_gap" and "param_gap" on alpha.
        verdict: What the numbers say, in plain words.
        notes: What could not be measured, and why.
        certificate: From `certify`, at the smallest lazy alpha (without one, the largest finite alpha): what every
            theorem bounds, next to what was measured. None if it could not be made; a note says why.
    """

    dataset: Any
    slopes: dict[str, Slope]
    verdict: str
    notes: tuple[str, ...]
    certificate: Certificate | None = None

    def __str__(self) -> str:
        """Return one screen: verdict, table, slopes, kernel."""
        a = self.dataset.attrs
        head = (
            f"lazyjax report: {a['num_params']} parameters, {a['num_train']} training samples, {a['outputs']} outputs "
            f"each, {a['loss']} loss, {a['dtype']}, flow time {a['horizon']:.4g}"
        )
        headings, columns = zip(*table_columns(self.dataset), strict=True)
        table = format_table([headings, *zip(*columns, strict=True)], ">")
        lines = [head, "", textwrap.fill(self.verdict, 110), "", table, ""]
        for name, slope in self.slopes.items():
            lines.append(f"{name.replace('_', ' ')}{' ~ ' if np.isfinite(slope.value) else ': '}{slope}")
        lines += [textwrap.fill(f"{name}: {text}", 110) for name, text in kernel_facts(self.dataset).items()]
        if self.certificate is not None:
            lines += ["", format_certificate(self.certificate)]
        lines += [textwrap.fill(f"note: {note}", 110) for note in self.notes]
        return "\n".join(lines)

    def __repr__(self) -> str:
        """Return the screen of `str`, so that a notebook shows it."""
        return str(self)


def diagnose(
    f: Model,
    w0: Params,
    x: Array | np.ndarray,
    y: Array | np.ndarray,
    *,
    loss: str | Callable[[Array], Loss] = "square",
    test: tuple[Array | np.ndarray, Array | np.ndarray] | None = None,
    alphas: Sequence[float] = ALPHAS,
    time: float | None = None,
    key: PRNGKeyArray | None = None,
    progress: bool = False,
    folder: str | Path | None = None,
) -> LazinessReport:
    r"""Train a model and its tangent model at many scales alpha, and tell how lazily the model trains.

    The model is centered (its output at w0 is subtracted), so that every alpha up to inf makes sense. Flows that
    fail are followed again with `lazyjax.flow.ThroughKinks` if the model has kinks (ReLU), along which adaptive steps
    collapse; a note says so. For tens of thousands of activations that can take long.

    Args:
        f: Model f(w, x) with outputs (n,) or (n, k). If it has `preactivations(w, x)`, the stability of its
            activations is measured too.
        w0: Its parameters at the start.
        x: Training inputs, samples first.
        y: Training targets: classes (n,) or real values of the outputs' shape.
        loss: "square" (classes become one-hot rows), "softmax", "logistic" (two classes), or a function of the
            targets to a loss, such as `lambda y: lj.square_loss(y, mean=False)`.
        test: (x_test, y_test), for test loss and accuracy.
        alphas: Scales, each in (0, inf]; sorted, and inf is added, since it shows the numerical floor.
        time: Flow time to train for; None: until the training loss of the tangent model is down to 1% (square loss),
            but no more than 1000, or 300 for other losses, over the largest eigenvalue of the kernel.
        key: For the Lanczos starts; None for a fixed one.
        progress: Say on stderr what is being done, and show a progress bar.
        folder: Where to keep each scale that is finished, so that the same call continues if it was interrupted; see
            `sweep`.

    Returns:
        `LazinessReport`.

    Raises:
        ValueError, TypeError: a bad argument, found before any long computation; `folder` holds something else or is
            in use.
        OSError: a scale cannot be written to `folder`.

    Source:
        Chizat, Oyallon, Bach (2019), sections 1 and 3.2, theorems 2.2 to 2.5.

    Example:
        >>> import jax.random as jr
        >>> from lazyjax.models import two_layer
        >>> x = jr.normal(jr.key(1), (8, 3))
        >>> net = two_layer(jnp.tanh)
        >>> report = diagnose(net, net.init(jr.key(0), d=3, width=8), x, x[:, 0], alphas=[1.0, 1e4])  # doctest: +SKIP
        >>> report.verdict.startswith("At alpha = 1 this model")  # doctest: +SKIP
        True
    """
    started = clock.perf_counter()
    problem, notes = make_problem(f, w0, x, y, loss, test)
    alphas = _check_alphas(alphas)
    check_difference(problem.model, problem.w0)
    if time is not None and not (np.isfinite(time) and time > 0):
        msg = f"time must be a finite positive flow time, got {time}."
        raise ValueError(msg)
    announce("the tangent kernel and its eigenvalues", progress)
    spectrum = diagonalize(problem)
    horizon = choose_horizon(spectrum) if time is None else float(time)
    check_horizon(horizon, spectrum, problem.loss)
    solver = choose_solver(spectrum, horizon)
    ts = jnp.asarray([0.0, *(horizon * np.geomspace(1e-3, 1.0, NUM_TIMES - 1))], jnp.result_type(float))
    announce(f"the flow of the tangent model up to time {horizon:.4g}", progress)
    reference = follow_tangent(problem, ts, solver)
    data, solvers = follow_scales(problem, reference, alphas, ts, solver, progress, folder)
    again = [alpha for alpha in alphas if solvers[alpha] is not solver]
    if again:
        scales = ", ".join(f"{alpha:g}" for alpha in again)
        notes = [*notes, f"adaptive steps failed, and the model has kinks: followed through them at alpha = {scales}"]
    announce("the step criterion and the prediction from the kernel", progress)
    _complete(data, problem, reference, spectrum, key)
    announce("the theorems at one scale", progress)
    certificate, more = certify_scale(problem, data, reference, solvers, key)
    data.attrs["seconds"] = clock.perf_counter() - started
    slopes = fit_slopes(data)
    notes = (*notes, *more, *rounding_notes(data))
    return LazinessReport(data, slopes, write_verdict(data, slopes), notes, certificate)


def _check_alphas(alphas: Sequence[float]) -> list[float]:
    if len(alphas) == 0:
        msg = "alphas must hold at least one scale, got none."
        raise ValueError(msg)
    for alpha in alphas:
        check_alpha(alpha)
    return sorted({*(float(alpha) for alpha in alphas), float("inf")})


def _complete(
    data: "xarray.Dataset", problem: Problem, reference: Reference, spectrum: Spectrum, key: PRNGKeyArray | None
) -> None:
    """Add to the lanes what all of them share: the curves of the tangent model, the kernel, the settings."""
    measures, numbers = _measure_shared(problem, reference, key)
    for name, values in measures.items():
        data[f"tangent_{name}"] = ("time", np.asarray(values))
    data.coords["mode"] = np.arange(1, spectrum.eigenvalues.size + 1)
    data["kernel_eigenvalue"] = ("mode", spectrum.eigenvalues)
    for name, values in predict(problem, spectrum).items():
        data[name] = values
    num_train, *outputs = problem.shape
    data.attrs.update(
        num_params=sum(leaf.size for leaf in jtu.tree_leaves(eqx.filter(problem.w0, eqx.is_inexact_array))),
        num_train=num_train,
        num_probe=0 if problem.probe_model is None else problem.probe_model.x.shape[0],
        num_test=0 if problem.test_model is None else problem.test_model.x.shape[0],
        outputs=outputs[0] if outputs else 1,
        loss=problem.loss_name,
        dtype=str(reference.outputs.dtype),
        horizon=float(data["time"][-1]),
        **{name: float(value) for name, value in numbers.items()},
        **spectrum.summary,
    )
    for name, (long_name, units) in UNITS.items():
        if name in data.variables:
            data[name].attrs.update(long_name=long_name, units=units)


@eqx.filter_jit
def _measure_shared(
    problem: Problem, reference: Reference, key: PRNGKeyArray | None
) -> tuple[dict[str, Array], dict[str, Array]]:
    """Measure the flow of the tangent model, and the start: one program instead of some fifty small ones."""
    loss = problem.loss
    numbers = {
        "w0_norm": tree_norm(eqx.filter(problem.w0, eqx.is_inexact_array)),
        "initial_residual": loss.norm(loss.gradient(jnp.zeros_like(reference.outputs[0]))),
        "lazy_ratio": lazy_ratio(problem.model, loss, problem.w0, starts=4, key=key),
    }
    return problem.measure(reference.outputs, reference.test_outputs), numbers
