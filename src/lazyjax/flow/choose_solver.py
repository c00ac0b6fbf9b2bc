"""Which solver a flow gets where the caller names none: by predicted cost."""

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
from lazyjax._core.types import Model, Params
from lazyjax.flow.exponential import TangentExponential
from lazyjax.flow.field import make_field
from lazyjax.flow.result import SOLVERS
from lazyjax.losses.losses import LogisticLoss, Loss, SoftmaxCrossEntropy
from lazyjax.models.tangent import linearize

DENSE_OUTPUTS = 4096
"""Up to this many outputs n*k, a tangent flow of the square loss is solved in closed form by default."""

EXPLICIT_MARGIN = 3.0
"""By how much the exponential solver must promise to win: a kernel that moves much costs it more steps than planned,
and an explicit method loses little where the two are close."""

FADING = 12.0
"""Stiffness over its logarithm, for a loss whose Hessian fades as it is fitted (cross-entropy)."""


DENSITY = 32
"""Lanczos steps by which the density of the eigenvalues is estimated."""

GAIN = 1.5
"""By how much a linear part of low rank must promise to win over a whole one: what it leaves out may grow."""


def choose_solver(
    model: tuple[Model, Params | None], loss: Loss, w0: Params, ts: Array, alpha: Array, *, zero_start: bool
) -> diffrax.AbstractSolver:
    """Tsit5 or `TangentExponential`, by predicted cost: lambda_max T / 3.3 steps, or a set-up and some tens.

    The linear part is whole, of low rank, or by Lanczos, whatever promises to be cheapest.

    Where values are traced, as under a vmap over alpha, nothing can be measured: then the choice must do for every
    horizon. It is the exponential solver, but for losses whose Hessian, and the stiffness with it, fades.
    """
    fading = isinstance(loss, LogisticLoss | SoftmaxCrossEntropy)
    if not is_concrete((eqx.filter((model, loss, w0), eqx.is_array), ts, alpha)):
        return diffrax.Tsit5() if fading else TangentExponential()
    size, flops, values, counts = _measure(model, loss, w0, alpha, zero_start)
    times = np.asarray(ts, np.float64)
    horizon = times[-1] - times[0]
    stiffness = float(values[0]) * horizon
    leading = np.maximum(values, 0) * horizon
    if fading:
        stiffness, leading = FADING * math.log1p(stiffness), FADING * np.log1p(leading)
    method, planned = method_cost(flops, size, TangentExponential().num_lanczos, stiffness)
    exponential = TangentExponential(method, relinearize=True)
    if np.isfinite(horizon):  # what a low rank leaves out would hold the steps for ever
        rank, ranked = cheapest_rank(flops, size, lambda r: float(leading[np.searchsorted(counts, r)]))
        if GAIN * ranked < planned:
            exponential, planned = TangentExponential("dense", relinearize=True, rank=rank), ranked
    return exponential if EXPLICIT_MARGIN * planned < explicit_cost(flops, stiffness) else diffrax.Tsit5()


@eqx.filter_jit
def _measure(
    model: tuple[Model, Params | None], loss: Loss, w0: Params, alpha: Array, zero_start: bool
) -> tuple[int, float, Array, Array]:
    """Number of outputs, multiply-adds of a model evaluation, eigenvalues of the linear part, their numbers.

    The eigenvalues are Ritz values, falling, each with how many there are down to it: a Ritz value stands for as many
    as the start vector's share in it says.
    """
    h, anchor = model
    field = make_field(h if anchor is None else linearize(h, anchor), loss, w0, alpha, zero_start=zero_start)
    anchored = field.anchored()
    b, size = anchored.products(), field.start.size
    space = krylov(
        lambda r: b.matvec(b.rmatvec(r, anchored.coordinates)), jr.normal(jr.key(1), (size,), b.dtype), DENSITY
    )
    values, vectors = jnp.linalg.eigh(space.projected)
    return size, anchored.flops(), values[::-1], size * jnp.cumsum(vectors[0, ::-1] ** 2)


def name_of(solver: diffrax.AbstractSolver) -> SOLVERS:
    """What `Flow.stats` says of a solver."""
    if isinstance(solver, TangentExponential):
        return SOLVERS.tangent_exponential
    return SOLVERS.tsit5 if isinstance(solver, diffrax.Tsit5) else SOLVERS.given
