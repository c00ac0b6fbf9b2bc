"""What the kernel at w0 tells without any flow: how stiff and how long the flows are, and how training ends."""

import math
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lazyjax._core.lanczos import top_eigenvalues
from lazyjax.flow.choose_solver import DENSE_OUTPUTS
from lazyjax.flow.closed_form import TangentSolution, tangent_gram, tangent_solution
from lazyjax.flow.exponential import TangentExponential
from lazyjax.flow.field import make_field
from lazyjax.flow.kernel_regression import KernelRegression
from lazyjax.flow.linear_part import SpectralPart
from lazyjax.kernels.spectrum import condition_number, effective_rank, without_rounding
from lazyjax.losses.loss import Loss
from lazyjax.losses.square import SquareLoss
from lazyjax.report.lane import SOLVE
from lazyjax.report.problem import Problem

LEADING = 20
"""The number of eigenvalues of the kernel that are computed if it is too large to diagonalize."""

GRID = np.concatenate([np.zeros(1), np.geomspace(1, 1000, 400)])
"""Flow times from which `choose_horizon` chooses, times the largest eigenvalue; the first is the start."""

STOPS = ("best", "end")
"""When the predicted training stops: when the test loss is smallest, and never."""


class Spectrum(eqx.Module):
    """The kernel at w0, and the solver that it allows; made by `diagonalize`.

    Attributes:
        eigenvalues: In F's metric, falling: all of them, or the largest.
        solution: The tangent flow in closed form, for the square loss.
        solver: What to follow the flows with.
        summary: Condition number, rank and effective rank if all eigenvalues are known, else empty.
        losses: Training loss of the tangent model at the flow times `GRID` over the largest eigenvalue; empty without
            a closed form.
    """

    eigenvalues: np.ndarray
    solution: TangentSolution | None
    solver: diffrax.AbstractSolver
    summary: dict[str, float]
    losses: np.ndarray


def diagonalize(problem: Problem) -> Spectrum:
    """Compute the spectrum of the kernel, all of it up to 4096 outputs, and choose what to follow the flows with.

    For the square loss the exponential solver, whose eigendecomposition serves all lanes; for other losses too, but
    each flow linearizes for itself. Tsit5 above that size, and if the Hessian of the loss fades as the outputs fit
    better, as that of a cross-entropy does: the stiffness fades with it.

    Raises:
        ValueError: the kernel is zero: no first-order change of the outputs, nothing for a tangent model to learn.
    """
    solution, solver, losses = None, diffrax.Tsit5(), np.zeros(0)
    if math.prod(problem.shape) > DENSE_OUTPUTS:
        eigenvalues, found = _compute_leading(problem), {}
    elif isinstance(problem.loss, SquareLoss):
        solution, solver, found, losses = _solve(problem)
        eigenvalues = solution.eigenvalues
    else:
        eigenvalues, found = _compute_all(problem)
        if not problem.loss.hessian_fades:
            solver = TangentExponential()
    summary = {name: value.item() for name, value in found.items()}
    spectrum = Spectrum(np.asarray(eigenvalues), solution, solver, summary, np.asarray(losses))
    if not spectrum.eigenvalues[0] > 0:
        msg = (
            "f must depend on w0 to first order, but its tangent kernel on x is zero at w0 (all parameters zero, or "
            "every unit dead?); start from another w0."
        )
        raise ValueError(msg)
    return spectrum


@eqx.filter_jit
def _solve(problem: Problem) -> tuple[TangentSolution, TangentExponential, dict[str, Array], Array]:
    assert isinstance(problem.loss, SquareLoss)
    loss = problem.loss
    field = make_field(problem.model, loss, problem.w0, jnp.inf, zero_start=True)
    solver = TangentExponential(method="dense").attach(field)
    assert isinstance(solver.linear, SpectralPart)
    values, vectors = solver.linear.values, solver.linear.vectors
    solution = tangent_solution(values, vectors, jnp.zeros_like(field.start), loss.minimizer, loss.weight)
    times = jnp.asarray(GRID, values.dtype) / solution.eigenvalues[0]
    # The flows of the lanes have fields of their own.
    solver = TangentExponential(method="dense", linear=solver.linear)
    return solution, solver, _summarize(solution.eigenvalues), solution.loss(times)


@eqx.filter_jit
def _compute_all(problem: Problem) -> tuple[Array, dict[str, Array]]:
    eigenvalues = problem.loss.weight * jnp.linalg.eigvalsh(tangent_gram(problem.tangent))[::-1]
    return eigenvalues, _summarize(eigenvalues)


@eqx.filter_jit
def _compute_leading(problem: Problem) -> Array:
    tangent, weight = problem.tangent, problem.loss.weight
    shape, dtype = tangent.outputs.shape, tangent.outputs.dtype

    def product(r: Array) -> Array:
        return weight * tangent.jvp(tangent.vjp(r.reshape(shape))).ravel()

    return top_eigenvalues(product, tangent.outputs.size, LEADING, dtype=dtype)


def _summarize(eigenvalues: Array) -> dict[str, Array]:
    return {
        "kernel_condition": condition_number(eigenvalues),
        "kernel_rank": jnp.sum(without_rounding(eigenvalues) > 0),
        "kernel_effective_rank": effective_rank(eigenvalues),
    }


def choose_horizon(spectrum: Spectrum) -> float:
    """Return the flow time in which the tangent model has learned, at most 1000 over the largest eigenvalue.

    Without a closed form, 300 over the largest eigenvalue.
    """
    losses = spectrum.losses
    if losses.size == 0:
        return 300 / float(spectrum.eigenvalues[0])
    learned = losses[1:] <= max(0.01 * losses[0], losses[-1])
    return float(GRID[1:][np.argmax(learned)] / float(spectrum.eigenvalues[0]))


def check_horizon(horizon: float, spectrum: Spectrum, loss: Loss) -> None:
    """Check that an explicit solver can reach a flow time within its steps, each about 3 over the stiffness.

    Raises:
        ValueError: it cannot.
    """
    if isinstance(spectrum.solver, TangentExponential):
        return
    largest = float(spectrum.eigenvalues[0])
    stiffness = (loss.smoothness or 1.0) * largest
    longest = 2.5 * SOLVE["max_steps"] / stiffness if stiffness > 0 else np.inf
    if horizon > longest:
        msg = (
            f"time must be at most {longest:.3g} for this model, whose kernel's largest eigenvalue is {largest:.3g}, "
            f"got {horizon:.3g}; an explicit solver cannot go further in {SOLVE['max_steps']} steps."
        )
        raise ValueError(msg)


def choose_solver(spectrum: Spectrum, horizon: float) -> diffrax.AbstractSolver:
    """Return the solver for flows of this length: the exponential one takes only what is stiff over it."""
    solver = spectrum.solver
    if isinstance(solver, TangentExponential) and isinstance(solver.linear, SpectralPart):
        return TangentExponential(method="dense", linear=solver.linear.leading(horizon))
    return solver


def predict(problem: Problem, spectrum: Spectrum) -> dict[str, tuple[str, np.ndarray]]:
    """Return losses and accuracies of kernel regression over `STOPS`, as variables of a dataset.

    The coordinate is "stop", with the flow times in "kernel_time". For losses other than the square one there are none.
    """
    if spectrum.solution is None:
        return {}
    times, measures = _predict(problem, spectrum.solution)
    values: dict[str, Any] = {"time": times, **measures}
    found = {f"kernel_{name}": ("stop", np.asarray(value)) for name, value in values.items()}
    return {"stop": ("stop", np.asarray(STOPS[-times.size :])), **found}


@eqx.filter_jit
def _predict(problem: Problem, solution: TangentSolution) -> tuple[Array, dict[str, Array]]:
    """Return the flow times of the stops, of "end" alone if nothing tells the best one, and what is found there."""
    times = jnp.full(1, jnp.inf, solution.eigenvalues.dtype)
    test_loss = problem.test_loss
    if not isinstance(test_loss, SquareLoss):
        return times, problem.measure(solution.outputs(times), None)
    train, test = problem.tangent, problem.test_tangent

    def transfer(cotangents: Float[Array, "..."]) -> Float[Array, "..."]:
        # One vjp and one jvp for each of a few tens, which is cheaper than the cross Gram of all test points.
        return jax.lax.map(lambda r: test.jvp(train.vjp(r)), cotangents)

    # The model is centered: it starts from zero.
    regression = KernelRegression(solution, transfer, jnp.zeros_like(test_loss.minimizer, times.dtype))
    times = jnp.concatenate([regression.best_time(test_loss)[0][None], times])
    return times, problem.measure(regression.outputs(times), regression.test_outputs(times))
