"""Predicted costs: of a function, counted from its jaxpr, and of the methods that take functions of L."""

import math
from collections.abc import Callable
from typing import Any, Literal

import equinox as eqx

ATTEMPTS = 40
"""Steps to plan for: lazy flows take 5 to 20, those that learn features up to a hundred."""

MATVEC = 10.0
"""Time of a multiply-add of a matrix-vector product, which waits for memory, relative to a matrix-matrix product."""

STIFFNESS = 1e5
"""lambda_max T to plan for if the horizon is not known, and the most that is planned for."""

POWERS = 2
"""Powers of BB^T by which a random guess at its leading eigenvectors is multiplied; more save no steps (measured)."""

DENSE_LIMIT = 10_000
"""Outputs above which no matrix of them squared is formed: with its eigenvectors and work space it takes 3 GB there."""


def count_flops(fn: Callable[..., Any], *args: Any) -> float:
    """Count multiply-adds: those of products and convolutions, and one per number of any other result."""
    arrays, static = eqx.partition(args, eqx.is_array)
    closed = eqx.filter_make_jaxpr(lambda a: fn(*eqx.combine(a, static)))(arrays)[0]
    return _count(closed.jaxpr)


def _count(jaxpr: Any) -> float:
    total = 0.0
    for eqn in jaxpr.eqns:
        inner = [sub for value in eqn.params.values() for sub in _jaxprs(value)]
        size = sum(math.prod(getattr(v.aval, "shape", ())) for v in eqn.outvars)
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            size *= math.prod(eqn.invars[0].aval.shape[i] for i in contracted)
        elif eqn.primitive.name == "conv_general_dilated":
            kernel = eqn.invars[1].aval.shape
            size *= math.prod(kernel) / kernel[eqn.params["dimension_numbers"].rhs_spec[0]]
        counts = [_count(sub) for sub in inner]
        # A cond costs its most expensive branch; a while loop counts once.
        repeat = eqn.params.get("length", 1) if eqn.primitive.name == "scan" else 1
        total += repeat * (max(counts) if eqn.primitive.name == "cond" else sum(counts)) if inner else size
    return total


def _jaxprs(value: Any) -> list[Any]:
    values = value if isinstance(value, tuple | list) else [value]
    closed = [getattr(v, "jaxpr", v) for v in values]
    return [v for v in closed if hasattr(v, "eqns")]


def eigh_cost(size: int) -> float:
    """Return the multiply-adds of a product that takes as long as an eigendecomposition (measured from 200 to 2560)."""
    return min(80.0 * size**3, 5.0 * size**3 + 1.6e3 * size**2)


def dense_cost(flops: float, outputs: int, rank: int | None = None, powers: int = POWERS) -> tuple[float, float]:
    """Return the multiply-adds of the set-up and of one step, with the Gram (or its leading part) diagonalized."""
    if rank is None:
        setup = 4 * flops * outputs + eigh_cost(outputs)
    else:
        # A QR decomposition runs at a sixth of the speed of products.
        setup = (powers + 1) * 4 * flops * rank + (6 * powers + 2) * outputs * rank**2 + eigh_cost(rank)
    return setup, 42 * flops + MATVEC * 18 * outputs * (rank or outputs)


def cheapest_rank(flops: float, outputs: int, leading: Callable[[int], float]) -> tuple[int | None, float]:
    """Return how much of the linear part to keep, and the multiply-adds of a flow that takes tens of steps with it.

    `leading(r)` is the r-th eigenvalue times the time of the flow: what is left out limits the steps like those of
    an explicit method, to 3.3 over its largest eigenvalue.
    """
    best, least = None, math.inf
    rank = 64
    while 2 * rank <= outputs and rank * outputs <= DENSE_LIMIT**2:
        setup, step = dense_cost(flops, outputs, rank)
        cost = setup + step * (ATTEMPTS + leading(rank) / 3.3)
        best, least = (rank, cost) if cost < least else (best, least)
        rank *= 2
    return best, least


def krylov_cost(flops: float, outputs: int, num_lanczos: int) -> float:
    """Return the multiply-adds of one step with five Krylov spaces, orthogonalized twice, and diagonalized."""
    m = min(num_lanczos, outputs)
    return 42 * flops + 5 * (m * (4 * flops + MATVEC * 4 * m * outputs) + eigh_cost(m))


def method_cost(
    flops: float, outputs: int, num_lanczos: int, stiffness: float = STIFFNESS
) -> tuple[Literal["dense", "lanczos"], float]:
    """Return the cheaper method and the multiply-adds of a flow; above 10^4 outputs Lanczos, to save memory."""
    setup, step = dense_cost(flops, outputs)
    dense = setup + ATTEMPTS * step
    # A Krylov space of dimension m reaches a step of (m / 2)^2 / lambda_max.
    steps = ATTEMPTS + min(stiffness, STIFFNESS) / (num_lanczos / 2) ** 2
    lanczos = steps * krylov_cost(flops, outputs, num_lanczos)
    return ("dense", dense) if dense <= lanczos and outputs <= DENSE_LIMIT else ("lanczos", lanczos)


def explicit_cost(flops: float, stiffness: float) -> float:
    """Return the multiply-adds of Tsit5 over the time `stiffness` / lambda_max, 3.3 / lambda_max per step."""
    return 6 * 6 * flops * (ATTEMPTS + stiffness / 3.3)
