"""What a function costs, counted from its jaxpr, and what the two ways to take functions of L cost in total."""

import math
from collections.abc import Callable
from typing import Any, Literal

import equinox as eqx

ATTEMPTS = 40
"""Steps to plan for: lazy flows take 5 to 20, those that learn features up to a hundred."""

MATVEC = 10.0
"""Time of a multiply-add of a matrix and a vector, which waits for memory, against one of two matrices (measured)."""

STIFFNESS = 1e5
"""lambda_max T to plan for where the horizon is not known, and the most that is planned for."""

POWERS = 2
"""Of BB^T that a random guess at its leading eigenvectors is multiplied by; more save no steps (measured)."""

DENSE_LIMIT = 10_000
"""Outputs above which no matrix of them squared is formed: with its eigenvectors and work space it takes 3 GB there."""


def count_flops(fn: Callable[..., Any], *args: Any) -> float:
    """Multiply-adds of products and convolutions, one a number made by all else, times the lengths of scans."""
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
        # Of the branches of a cond the dearest one; a while loop counts once.
        repeat = eqn.params.get("length", 1) if eqn.primitive.name == "scan" else 1
        total += repeat * (max(counts) if eqn.primitive.name == "cond" else sum(counts)) if inner else size
    return total


def _jaxprs(value: Any) -> list[Any]:
    values = value if isinstance(value, tuple | list) else [value]
    closed = [getattr(v, "jaxpr", v) for v in values]
    return [v for v in closed if hasattr(v, "eqns")]


def eigh_cost(size: int) -> float:
    """Multiply-adds of a product that takes as long as an eigendecomposition (measured from 200 to 2560)."""
    return min(80.0 * size**3, 5.0 * size**3 + 1.6e3 * size**2)


def dense_cost(flops: float, outputs: int, rank: int | None = None, powers: int = POWERS) -> tuple[float, float]:
    """Multiply-adds of the set-up, and of one step, with the Gram of all outputs diagonalized, or its leading part."""
    if rank is None:
        setup = 4 * flops * outputs + eigh_cost(outputs)
    else:
        # A QR decomposition runs at a sixth of the pace of products.
        setup = (powers + 1) * 4 * flops * rank + (6 * powers + 2) * outputs * rank**2 + eigh_cost(rank)
    return setup, 42 * flops + MATVEC * 18 * outputs * (rank or outputs)


def cheapest_rank(flops: float, outputs: int, leading: Callable[[int], float]) -> tuple[int | None, float]:
    """How much of the linear part to keep, and the multiply-adds of a flow that takes tens of steps with all of it.

    `leading(r)` is the r-th eigenvalue times the time of the flow: what is left out holds the steps as an explicit
    method's, 3.3 over its largest eigenvalue.
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
    """Multiply-adds of one step with five Krylov spaces, orthogonalized twice over, and their eigendecompositions."""
    m = min(num_lanczos, outputs)
    return 42 * flops + 5 * (m * (4 * flops + MATVEC * 4 * m * outputs) + eigh_cost(m))


def method_cost(
    flops: float, outputs: int, num_lanczos: int, stiffness: float = STIFFNESS
) -> tuple[Literal["dense", "lanczos"], float]:
    """The cheaper method and the multiply-adds of a whole flow; above 10^4 outputs Lanczos, for the memory's sake."""
    setup, step = dense_cost(flops, outputs)
    dense = setup + ATTEMPTS * step
    # A Krylov space of dimension m reaches a step of (m / 2)^2 / lambda_max.
    steps = ATTEMPTS + min(stiffness, STIFFNESS) / (num_lanczos / 2) ** 2
    lanczos = steps * krylov_cost(flops, outputs, num_lanczos)
    return ("dense", dense) if dense <= lanczos and outputs <= DENSE_LIMIT else ("lanczos", lanczos)


def explicit_cost(flops: float, stiffness: float) -> float:
    """Multiply-adds of Tsit5 over the time `stiffness` / lambda_max: six gradients a step, 3.3 of stiffness each."""
    return 6 * 6 * flops * (ATTEMPTS + stiffness / 3.3)
