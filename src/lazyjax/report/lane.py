"""One scale of a report as a lane of a sweep: the flows of the model and of its tangent model, and what they give."""

from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array

from lazyjax._core.trees import move, tree_norm
from lazyjax._core.types import Params
from lazyjax.difference.finite_jvp import finite_jvp
from lazyjax.difference.gates import NoGatesError, gated
from lazyjax.flow.gradient_flow import gradient_flow
from lazyjax.flow.through_kinks import ThroughKinks
from lazyjax.laziness.compare import activation_stability, measure_kernel_drift
from lazyjax.report.problem import Problem

MEASURES = (
    "train_loss",
    "test_loss",
    "train_accuracy",
    "test_accuracy",
    "output_gap",
    "param_gap",
    "scaled_param_gap",
    "displacement_norm",
)
"""What a lane gives at every save time."""

SOLVE: dict[str, Any] = {
    "rtol": 1e-5,
    "atol": 1e-8,
    "save": ("outputs", "displacement"),
    "max_steps": 2**15,
}
"""The model and the tangent model are followed by the same solver at the same tolerances, so that their errors cancel
in the gaps. (The closed form, through a float32 eigendecomposition, is only good to 1e-3 at a stiffness of 1000; the
exponential solver evaluates the true gradient at every stage, and so corrects it.)"""


Solver = diffrax.AbstractSolver | ThroughKinks


class Reference(eqx.Module):
    """The flow of the tangent model, from a zero start the same for every alpha.

    Attributes:
        displacement: u at the save times.
        outputs: On the training data, (time, n[, k]).
        test_outputs: On the test data; None without.
    """

    displacement: Params
    outputs: Array
    test_outputs: Array | None


def has_gates(problem: Problem) -> bool:
    """Return whether the model has kinks that a flow can be followed through."""
    try:
        return len(gated(problem.model, problem.w0).kinks) > 0
    except NoGatesError:
        return False


@eqx.filter_jit
def follow_tangent(problem: Problem, ts: Array, solver: diffrax.AbstractSolver) -> Reference:
    """Follow the tangent model."""
    flow = gradient_flow(problem.tangent, problem.loss, problem.w0, ts, alpha=jnp.inf, solver=solver, **SOLVE)
    test_outputs = None
    if problem.test_model is not None:
        test_outputs = jax.lax.map(problem.test_tangent.jvp, flow.displacement)
    return Reference(flow.displacement, flow.outputs, test_outputs)


def run_lane(
    alpha: Array,
    *,
    problem: Problem,
    ts: Array,
    solver: Solver,
    reference: Reference,
) -> dict[str, Any]:
    """Follow the model at one scale, and measure everything along its flow."""
    w0, loss = problem.w0, problem.loss
    flow = gradient_flow(problem.model, loss, w0, ts, alpha=alpha, solver=solver, throw=False, **SOLVE)
    eps = 1 / flow.alpha
    test_outputs = None
    if problem.test_model is not None:
        on_test = problem.test_model
        test_outputs = jax.lax.map(lambda u: finite_jvp(on_test, w0, u, eps), flow.displacement)
    gap = jax.vmap(tree_norm)(jtu.tree_map(jnp.subtract, flow.displacement, reference.displacement))
    out = {
        **problem.measure(flow.outputs, test_outputs),
        "output_gap": jax.vmap(loss.norm)(flow.outputs - reference.outputs),
        "scaled_param_gap": gap,
        "param_gap": eps * gap,
        "displacement_norm": eps * jax.vmap(tree_norm)(flow.displacement),
        "num_steps": flow.stats["num_steps"],
        "result": flow.result,
    }
    last = jtu.tree_map(lambda leaf: leaf[-1], flow.displacement)
    if problem.probe_model is not None:
        out["kernel_drift"] = measure_kernel_drift(problem.probe_model, w0, last, eps)
    f, x = problem.model.f, problem.model.x
    if hasattr(f, "preactivations"):
        coordinates, rest = eqx.partition(w0, eqx.is_inexact_array)
        out["stability"] = activation_stability(f, w0, eqx.combine(move(coordinates, eps, last), rest), x)
    return out
