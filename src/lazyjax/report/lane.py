"""One scale of a report as a lane of a sweep: what all lanes share, the tangent model's flow, the measures."""

from collections.abc import Callable
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array

from lazyjax._core.checks import check_inputs
from lazyjax._core.lanczos import top_eigenvalues
from lazyjax._core.trees import move, tree_norm
from lazyjax._core.types import Model, Params
from lazyjax.difference.finite_jvp import finite_jvp
from lazyjax.flow.choose_solver import DENSE_OUTPUTS
from lazyjax.flow.closed_form import TangentSolution, tangent_gram, tangent_solution
from lazyjax.flow.exponential import TangentExponential
from lazyjax.flow.field import check_start, make_field
from lazyjax.flow.gradient_flow import gradient_flow
from lazyjax.flow.linear_part import SpectralPart
from lazyjax.laziness.compare import activation_stability, measure_kernel_drift
from lazyjax.losses.losses import Loss, SquareLoss
from lazyjax.losses.targets import Accuracy, make_task
from lazyjax.models.maps import center, on_data
from lazyjax.models.tangent import linearize

PROBE_OUTPUTS = 320
"""The kernel's drift is measured on as many samples as give at most this many outputs."""

LEADING = 20
"""So many eigenvalues of the kernel are computed where it is too large to diagonalize."""

MEASURES = (
    "train_loss",
    "test_loss",
    "train_accuracy",
    "test_accuracy",
    "output_gap",
    "param_gap",
    "scaled_param_gap",
    "displacement",
)
"""What a lane gives at every save time."""


class Problem(eqx.Module):
    """What all lanes share; `probe` is None where the drift cannot be measured."""

    f: Model
    w0: Params
    x: Array
    loss: Loss
    accuracy: Accuracy | None
    x_test: Array | None
    loss_test: Loss | None
    accuracy_test: Accuracy | None
    probe: Array | None
    loss_name: str = eqx.field(static=True)
    num_outputs: int = eqx.field(static=True)


def prepare(
    f: Model, w0: Params, x: Any, y: Any, loss: str | Callable[[Array], Loss], test: tuple[Any, Any] | None
) -> Problem:
    x, shape = check_inputs(f, w0, x, "x")
    made, accuracy = make_task(loss, y, shape, "y")
    made.check(shape)
    x_test = loss_test = accuracy_test = None
    if test is not None:
        x_test, test_shape = check_inputs(f, w0, test[0], "x_test")
        loss_test, accuracy_test = make_task(loss, test[1], test_shape, "y_test", like=y)
    check_start(on_data(center(f, w0), x), made, w0, 1.0, rtol=1e-6)
    name = loss if isinstance(loss, str) else type(made).__name__
    return Problem(f, w0, x, made, accuracy, x_test, loss_test, accuracy_test, None, name, int(np.prod(shape)))


class Spectrum(eqx.Module):
    """What the kernel at w0 gives: eigenvalues in F's metric, falling; the closed form and the solver it allows."""

    eigenvalues: np.ndarray
    solution: TangentSolution | None
    solver: diffrax.AbstractSolver


def diagonalize(setting: Problem) -> Spectrum:
    """The kernel's spectrum, all of it up to 4096 outputs, and what to follow the flows with.

    The exponential solver where one eigendecomposition serves all lanes; Tsit5 above that size, and for other losses,
    whose Hessian fades as they are fitted, and the stiffness with it.

    Raises:
        ValueError: the kernel is zero: no first-order change of the outputs, nothing for a tangent model to learn.
    """
    if setting.num_outputs > DENSE_OUTPUTS:
        spectrum = Spectrum(np.asarray(_leading(setting)), None, diffrax.Tsit5())
    elif isinstance(setting.loss, SquareLoss):
        solution, solver = _solve(setting)
        spectrum = Spectrum(np.asarray(solution.eigenvalues), solution, solver)
    else:
        spectrum = Spectrum(np.asarray(_all(setting)), None, diffrax.Tsit5())
    if not spectrum.eigenvalues[0] > 0:
        msg = (
            "f must depend on w0 to first order, but its tangent kernel on x is zero at w0 (all parameters zero, or "
            "every unit dead?); start from another w0."
        )
        raise ValueError(msg)
    return spectrum


@eqx.filter_jit
def _solve(s: Problem) -> tuple[TangentSolution, TangentExponential]:
    assert isinstance(s.loss, SquareLoss)
    h = on_data(center(s.f, s.w0), s.x)
    field = make_field(h, s.loss, s.w0, jnp.inf, zero_start=True)
    solver = TangentExponential(method="dense").attach(field)
    assert isinstance(solver.linear, SpectralPart)
    values, vectors = solver.linear.values, solver.linear.vectors
    solution = tangent_solution(values, vectors, jnp.zeros_like(field.start), s.loss.minimizer, s.loss.weight)
    # The flows of the lanes have fields of their own.
    return solution, TangentExponential(method="dense", linear=solver.linear)


@eqx.filter_jit
def _all(s: Problem) -> Array:
    return s.loss.weight * jnp.linalg.eigvalsh(tangent_gram(linearize(on_data(s.f, s.x), s.w0)))[::-1]


def _leading(s: Problem) -> Array:
    tangent = linearize(on_data(s.f, s.x), s.w0)
    shape, dtype = tangent.outputs.shape, tangent.outputs.dtype

    def product(r: Array) -> Array:
        return s.loss.weight * tangent.jvp(tangent.vjp(r.reshape(shape))).ravel()

    return top_eigenvalues(product, tangent.outputs.size, LEADING, dtype=dtype)


def choose_horizon(spectrum: Spectrum) -> float:
    """Flow time at which the tangent model has learned, at most 1000 over the largest eigenvalue."""
    eigenvalues, solution = spectrum.eigenvalues, spectrum.solution
    if solution is None:
        return 300 / float(eigenvalues[0])
    times = np.geomspace(1, 1000, 400) / float(eigenvalues[0])
    losses = np.asarray(jax.vmap(solution.loss)(jnp.asarray(times, eigenvalues.dtype)))
    start, end = float(solution.loss(jnp.zeros((), eigenvalues.dtype))), losses[-1]
    return float(times[np.argmax(losses <= max(0.01 * start, end))])


def check_horizon(horizon: float, spectrum: Spectrum, loss: Loss) -> None:
    """Refuse a flow time that an explicit solver cannot reach within its steps, each about 3 over the stiffness."""
    if isinstance(spectrum.solver, TangentExponential):
        return
    eigenvalues = spectrum.eigenvalues
    stiffness = getattr(loss, "smoothness", 1.0) * float(eigenvalues[0])
    longest = 2.5 * SOLVE["max_steps"] / stiffness if stiffness > 0 else np.inf
    if horizon > longest:
        msg = (
            f"time must be at most {longest:.3g} for this model, whose kernel's largest eigenvalue is "
            f"{float(eigenvalues[0]):.3g}, got {horizon:.3g}; an explicit solver cannot go further in "
            f"{SOLVE['max_steps']} steps."
        )
        raise ValueError(msg)


def follower(spectrum: Spectrum, horizon: float) -> diffrax.AbstractSolver:
    """The solver for flows of this length: the exponential one for what is stiff over it."""
    solver = spectrum.solver
    if not isinstance(solver, TangentExponential):
        return solver
    assert isinstance(solver.linear, SpectralPart)
    return TangentExponential(method="dense", linear=solver.linear.leading(horizon))


class Reference(eqx.Module):
    """The tangent model's flow: displacement and outputs at the save times."""

    displacement: Params
    outputs: Array
    test_outputs: Array | None


SOLVE: dict[str, Any] = {
    "rtol": 1e-5,
    "atol": 1e-8,
    "save": ("outputs", "displacement"),
    "max_steps": 2**15,
}
"""Model and tangent model are followed by the same solver at the same tolerances, so that their errors cancel in
the gaps (the closed form, through a float32 eigendecomposition, is only good to 1e-3 at a stiffness of 1000; the
exponential solver evaluates the true gradient at every stage, and so corrects it)."""


@eqx.filter_jit
def follow_tangent(setting: Problem, ts: Array, solver: diffrax.AbstractSolver) -> Reference:
    """The tangent model's flow, from a zero start the same for every alpha."""
    model = center(setting.f, setting.w0)
    tangent = linearize(on_data(model, setting.x), setting.w0)
    flow = gradient_flow(tangent, setting.loss, setting.w0, ts, alpha=jnp.inf, solver=solver, **SOLVE)
    test_outputs = None
    if setting.x_test is not None:
        test_outputs = jax.lax.map(linearize(on_data(model, setting.x_test), setting.w0).jvp, flow.displacement)
    return Reference(flow.displacement, flow.outputs, test_outputs)


def run_lane(
    alpha: Array, *, setting: Problem, ts: Array, solver: diffrax.AbstractSolver, reference: Reference
) -> dict[str, Any]:
    """One scale: the flow, and everything measured along it."""
    s = setting
    model = center(s.f, s.w0)
    flow = gradient_flow(on_data(model, s.x), s.loss, s.w0, ts, alpha=alpha, solver=solver, throw=False, **SOLVE)
    eps = 1 / flow.alpha
    test_outputs = None
    if s.x_test is not None:
        on_test = on_data(s.f, s.x_test)
        test_outputs = jax.lax.map(lambda u: finite_jvp(on_test, s.w0, u, eps), flow.displacement)
    gap = jax.vmap(tree_norm)(jtu.tree_map(jnp.subtract, flow.displacement, reference.displacement))
    last = jtu.tree_map(lambda leaf: leaf[-1], flow.displacement)
    out = {
        **measure(s, flow.outputs, test_outputs),
        "output_gap": jax.vmap(s.loss.norm)(flow.outputs - reference.outputs),
        "scaled_param_gap": gap,
        "param_gap": eps * gap,
        "displacement": eps * jax.vmap(tree_norm)(flow.displacement),
        "num_steps": flow.stats["num_steps"],
        "result": flow.result,
    }
    if s.probe is not None:
        out["kernel_drift"] = measure_kernel_drift(on_data(s.f, s.probe), s.w0, last, eps)
    if hasattr(s.f, "preactivations"):
        coordinates, rest = eqx.partition(s.w0, eqx.is_inexact_array)
        out["stability"] = activation_stability(s.f, s.w0, eqx.combine(move(coordinates, eps, last), rest), s.x)
    return out


def add_probe(setting: Problem) -> tuple[Problem, list[str]]:
    """Measure the kernel's drift where `finite_jvp` can go through the model's derivative, else say why not."""
    k = setting.num_outputs // setting.x.shape[0]
    probe = setting.x[: max(1, PROBE_OUTPUTS // k)]
    zero = jtu.tree_map(jnp.zeros_like, eqx.filter(setting.w0, eqx.is_inexact_array))
    try:
        eqx.filter_eval_shape(measure_kernel_drift, on_data(setting.f, probe), setting.w0, zero, jnp.ones(()))
    except ValueError as error:
        return setting, [f"the kernel's drift is not measured: {error}"]
    return eqx.tree_at(lambda s: s.probe, setting, probe, is_leaf=lambda leaf: leaf is None), []


def measure(s: Problem, outputs: Array, test_outputs: Array | None) -> dict[str, Array]:
    """Losses and accuracies along a flow."""
    measures: dict[str, tuple[Callable[[Array], Array] | None, Array | None]] = {
        "train_loss": (s.loss, outputs),
        "test_loss": (s.loss_test, test_outputs),
        "train_accuracy": (s.accuracy, outputs),
        "test_accuracy": (s.accuracy_test, test_outputs),
    }
    return {
        name: jax.vmap(function)(values).astype(outputs.dtype)
        for name, (function, values) in measures.items()
        if function is not None and values is not None
    }
