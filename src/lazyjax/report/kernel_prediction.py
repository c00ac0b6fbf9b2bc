"""What the kernel at w0 tells without any flow, for a report: condition, effective rank, the end and the best stop."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lazyjax._core.types import Model, Params
from lazyjax.flow.closed_form import TangentSolution
from lazyjax.flow.kernel_regression import KernelRegression
from lazyjax.kernels.spectrum import condition_number, effective_rank, without_rounding
from lazyjax.losses.losses import SquareLoss
from lazyjax.models.maps import on_data
from lazyjax.models.tangent import linearize
from lazyjax.report.lane import Problem, Spectrum, measure

STOPS = ("best", "end")
"""When the predicted training stops: where the test loss is smallest, and never."""


class JacobianTransfer(eqx.Module):
    """Cotangents on the training data to changes of the test outputs, by a vjp and a jvp each.

    For the few tens that a report needs that is cheaper than the cross Gram of all test points.
    """

    f: Model
    w0: Params
    x: Array
    x_test: Array

    def __call__(self, cotangents: Float[Array, "..."]) -> Float[Array, "..."]:
        """One after the other, as the flows are taken to the test data."""
        train, test = (linearize(on_data(self.f, x), self.w0) for x in (self.x, self.x_test))
        return jax.lax.map(lambda r: test.jvp(train.vjp(r)), cotangents)


def describe_kernel(spectrum: Spectrum, num_outputs: int) -> dict[str, Any]:
    """Condition number, rank and effective rank, where all eigenvalues are known."""
    eigenvalues = jnp.asarray(spectrum.eigenvalues)
    if eigenvalues.size < num_outputs:
        return {}
    condition, rank, effective = _facts(eigenvalues)
    return {"kernel_condition": float(condition), "kernel_rank": int(rank), "kernel_effective_rank": float(effective)}


@eqx.filter_jit
def _facts(eigenvalues: Array) -> tuple[Array, Array, Array]:
    rank = jnp.sum(without_rounding(eigenvalues) > 0)
    return condition_number(eigenvalues), rank, effective_rank(eigenvalues)


def predict(setting: Problem, spectrum: Spectrum) -> dict[str, tuple[str, np.ndarray]]:
    """Losses and accuracies of kernel regression over `STOPS`, as variables of a dataset; none for other losses.

    The coordinate is "stop", with the flow times in "kernel_time".
    """
    if spectrum.solution is None:
        return {}
    times, measures = _predict(setting, spectrum.solution)
    values = {"time": times, **measures}
    found = {f"kernel_{name}": ("stop", np.asarray(value)) for name, value in values.items()}
    return {"stop": ("stop", np.asarray(STOPS[-times.size :])), **found}


@eqx.filter_jit
def _predict(s: Problem, solution: TangentSolution) -> tuple[Array, dict[str, Array]]:
    """The flow times of the stops, of the second one alone where nothing tells the first, and what is found there."""
    times = jnp.full(1, jnp.inf, solution.eigenvalues.dtype)
    if s.x_test is None or not isinstance(s.loss_test, SquareLoss):
        return times, measure(s, solution.outputs(times), None)
    # The report's model is centered: it starts from zero.
    start = jnp.zeros_like(s.loss_test.minimizer, times.dtype)
    regression = KernelRegression(solution, JacobianTransfer(s.f, s.w0, s.x, s.x_test), start)
    times = jnp.concatenate([regression.best_time(s.loss_test)[0][None], times])
    return times, measure(s, regression.outputs(times), regression.test_outputs(times))
