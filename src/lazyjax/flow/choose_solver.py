"""The solver of a flow for which the caller names none: chosen by predicted cost."""

import math

import diffrax
import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array

from lazyjax._core.checks import is_concrete
from lazyjax._core.cost import cheapest_rank, explicit_cost, method_cost
from lazyjax._core.lanczos import krylov
from lazyjax.flow.exponential import TangentExponential
from lazyjax.flow.field import ScaledObjective
from lazyjax.flow.result import SOLVERS

DENSE_OUTPUTS = 4096
"""Up to this many outputs n*k, a tangent flow of the square loss is solved in closed form by default."""

EXPLICIT_MARGIN = 3.0
"""The exponential solver must promise to be cheaper by this factor: a kernel that moves much costs it more steps than
planned, and an explicit method loses little if the two are close."""

FADING_STIFFNESS = 12.0
"""Stiffness over its logarithm, for a loss whose Hessian fades as it is fitted (cross-entropy)."""

DENSITY_STEPS = 32
"""Lanczos steps by which the density of the eigenvalues is estimated."""

LOW_RANK_MARGIN = 1.5
"""A linear part of low rank must promise to be cheaper than a whole one by this factor: what it leaves out may grow."""


def choose_solver(objective: ScaledObjective, ts: Array) -> diffrax.AbstractSolver:
    """Return Tsit5 or `TangentExponential`, by predicted cost: lambda_max T / 3.3 steps, or a set-up and some tens.

    The linear part is whole, of low rank, or by Lanczos, whatever promises to be cheapest.

    If values are traced, as under a vmap over alpha, nothing can be measured: then the choice must do for every
    horizon. It is the exponential solver, unless the Hessian of the loss, and the stiffness with it, fades.
    """
    fading = objective.loss.hessian_fades
    if not is_concrete((eqx.filter(objective, eqx.is_array), ts)):
        return diffrax.Tsit5() if fading else TangentExponential()
    size, flops, *measured = _measure_stiffness(objective)
    values, counts = (np.asarray(a) for a in measured)
    times = np.asarray(ts, np.float64)
    horizon = times[-1] - times[0]
    stiffness = float(values[0]) * horizon
    positive = values > 0  # 0 inf is no number
    leading = np.where(positive, np.where(positive, values, 1) * horizon, 0)
    if fading:
        stiffness, leading = FADING_STIFFNESS * math.log1p(stiffness), FADING_STIFFNESS * np.log1p(leading)
    method, planned = method_cost(flops, size, TangentExponential().num_lanczos, stiffness)
    exponential = TangentExponential(method, relinearize=True)
    if np.isfinite(horizon):  # what a low rank leaves out would limit the steps without end
        rank, ranked = cheapest_rank(flops, size, lambda r: float(leading[np.searchsorted(counts, r)]))
        if LOW_RANK_MARGIN * ranked < planned:
            exponential, planned = TangentExponential("dense", relinearize=True, rank=rank), ranked
    return exponential if EXPLICIT_MARGIN * planned < explicit_cost(flops, stiffness) else diffrax.Tsit5()


@eqx.filter_jit
def _measure_stiffness(objective: ScaledObjective) -> tuple[int, float, Array, Array]:
    """Return the number of outputs, multiply-adds of a model evaluation, eigenvalues of the linear part, their numbers.

    The eigenvalues are Ritz values, falling, each with how many there are down to it: a Ritz value stands for as many
    as the start vector's share in it says.
    """
    field = objective.field()
    point = field.linearization_point()
    b, size = point.products(), field.start.size
    start = jr.normal(jr.key(1), (size,), b.dtype)
    space = krylov(lambda r: b.matvec(b.rmatvec(r, point.coordinates)), start, DENSITY_STEPS)
    values, vectors = jnp.linalg.eigh(space.projected)
    return size, point.flops(), values[::-1], size * jnp.cumsum(vectors[0, ::-1] ** 2)


def name_of(solver: diffrax.AbstractSolver) -> SOLVERS:
    """Return what `Flow.stats` says of a solver."""
    if isinstance(solver, TangentExponential):
        return SOLVERS.tangent_exponential
    return SOLVERS.tsit5 if isinstance(solver, diffrax.Tsit5) else SOLVERS.given


def stages_of(solver: diffrax.AbstractSolver) -> int:
    """Return how often a step evaluates the field; -1 for an implicit solver, whose iterations are not counted."""
    tableau = getattr(solver, "tableau", None)
    if isinstance(solver, TangentExponential):
        return 4
    if isinstance(solver, diffrax.AbstractERK) and isinstance(tableau, diffrax.ButcherTableau):
        return tableau.num_stages - int(tableau.fsal)
    return 1 if isinstance(solver, diffrax.Euler) else -1
