"""How a flow is solved by what users have today: diffrax's own solvers on the vector field as one writes it by hand.

The peers get every advantage: the state is u = alpha (w - w0), so that their tolerances mean something at every alpha;
the field is the plain float64 one, up to twice as quick as the library's, which keeps its digits in float32 too; the
step-size controller is a PI one, with which they are quicker and more accurate than with diffrax's default; and of all
tolerances they get the loosest that is good enough.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
from jax.flatten_util import ravel_pytree

import harness
import lazyjax as lj
from _problems import Case, Problem
from lazyjax.flow.gradient_flow import EXPLICIT_PI, EXPONENTIAL_GROWTH, EXPONENTIAL_PI

EXPLICIT = {"Tsit5": diffrax.Tsit5(), "Dopri8": diffrax.Dopri8()}
LEVEL = 1e-4
"""Relative error of the outputs that everybody has to reach, all along the flow: see `errors_against`."""
MOMENTS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Parts of the horizon at which the error is taken: at its end a flow that has arrived forgets how it got there."""
RTOLS = tuple(m * 10.0**-k for k in range(3, 9) for m in (1.0, 0.3))
"""The grid of relative tolerances, loosest first; the absolute one is always a hundredth."""

SHORT_S = 5.0
"""Seconds that a run may be predicted to take and be made nevertheless, at every tolerance."""

Solve = Callable[[float, float], dict[str, Any]]
"""(horizon, rtol) to what `integrate` returns."""
Errors = Callable[[Any], dict[str, float]]
"""What `errors_against` returns."""


@eqx.filter_jit
def integrate(
    term: Any, solver: diffrax.AbstractSolver, u0: Any, args: Any, horizon: jax.Array, rtol: jax.Array
) -> dict[str, Any]:
    """The states at the moments of the horizon, the last one at its end, and the steps it took."""
    controls, dt0 = EXPLICIT_PI, None
    if isinstance(solver, lj.TangentExponential):  # as `gradient_flow` does it
        controls = EXPONENTIAL_PI | {"factormax": EXPONENTIAL_GROWTH}
        dt0 = jnp.minimum(1 / solver.linear.top, horizon)
    solution = diffrax.diffeqsolve(
        term,
        solver,
        t0=jnp.zeros_like(horizon),
        t1=horizon,
        dt0=dt0,
        y0=u0,
        args=args,
        saveat=diffrax.SaveAt(ts=horizon * jnp.asarray(MOMENTS)),
        stepsize_controller=diffrax.PIDController(rtol, rtol / 100, **controls),
        max_steps=10**7,
        throw=False,
    )
    return {
        "u": solution.ys,
        "accepted": solution.stats["num_accepted_steps"],
        "rejected": solution.stats["num_rejected_steps"],
    }


def descent(t: Any, u: Any, args: tuple[Problem, jax.Array, jax.Array]) -> Any:
    """Return u' by the textbook: the gradient of R(alpha (f(w0 + u / alpha) - f(w0))) in u."""
    del t
    problem, start, alpha = args

    def objective(u: Any) -> jax.Array:
        w = jtu.tree_map(lambda w, v: w + v / alpha, problem.w0, u)
        return problem.loss(alpha * (problem.f(w, problem.x) - start))

    return jtu.tree_map(jnp.negative, jax.grad(objective)(u))


def descent_args(problem: Problem, alpha: float | jax.Array) -> tuple[Problem, jax.Array, jax.Array]:
    return problem, problem.f(problem.w0, problem.x), jnp.asarray(alpha)


def compiled(term: Any, solver: diffrax.AbstractSolver, u0: Any, args: Any) -> tuple[Solve, float]:
    """Return one compiled solve for every horizon and tolerance, and the seconds of its compilation."""
    numbers = (jnp.asarray(1.0), jnp.asarray(1e-3))
    seconds, program = timed(lambda: integrate.lower(term, solver, u0, args, *numbers).compile())

    def solve(horizon: float, rtol: float) -> dict[str, Any]:
        return program(term, solver, u0, args, jnp.asarray(horizon), jnp.asarray(rtol))

    return solve, seconds


def compiled_peer(case: Case, name: str) -> tuple[Solve, float]:
    u0 = jtu.tree_map(jnp.zeros_like, case.problem.w0)
    return compiled(diffrax.ODETerm(descent), EXPLICIT[name], u0, descent_args(case.problem, case.alpha))


def outputs(case: Case, u: Any) -> jax.Array:
    """Return alpha h(w0 + u / alpha) at every moment, with all its digits."""
    return _outputs(case.problem, u, jnp.asarray(case.alpha))


@eqx.filter_jit
def _outputs(problem: Problem, u: Any, alpha: jax.Array) -> jax.Array:
    return jax.lax.map(lambda v: lj.finite_jvp(problem.h, problem.w0, v, 1 / alpha), u)


def errors_against(case: Case, truth: Any) -> Errors:
    """Return the largest relative errors over all moments, of the outputs (they choose tolerances) and of the states.

    Of a flow with kinks the outputs are better determined than the parameters.
    """
    y = outputs(case, truth)
    return lambda u: {"error": moment_error(outputs(case, u), y), "displacement_error": moment_error(u, truth)}


def moment_error(found: Any, truth: Any) -> float:
    """Return the largest of the relative errors at the moments, the leading axis of every leaf."""
    at = lambda tree, i: jtu.tree_map(lambda leaf: leaf[i], tree)
    return max(harness.relative_error(at(found, i), at(truth, i)) for i in range(len(MOMENTS)))


def timed(fn: Callable[..., Any], *args: Any) -> tuple[float, Any]:
    start = time.perf_counter()
    out = jax.block_until_ready(fn(*args))
    return time.perf_counter() - start, out


def bound(fn: Callable[..., Any], *args: Any) -> Callable[[], Any]:
    return lambda: fn(*args)


def in_turn(rows: dict[str, dict[str, Any]], calls: dict[str, Callable[[], Any]]) -> None:
    """Replace the times of the tuning runs by medians of runs in turn; of long ones the tuning run stands."""
    counts = {name: min(15, int(40 / rows[name]["solve_s"])) for name in calls}
    runs: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(max(counts.values(), default=0)):
        for name, call in calls.items():
            if turn < counts[name]:
                runs[name].append(timed(call)[0])
    for name, times in runs.items():
        if times:
            rows[name] |= {"solve_s": statistics.median(times), "runs": times}


def best(rows: dict[str, dict[str, Any]]) -> str:
    """Return the quickest peer of those that are accurate enough, as far as that is known."""
    good = [name for name in (*EXPLICIT, "Kvaerno5") if rows[name]["reached"] is not False]
    return min(good, key=lambda name: rows[name]["solve_s"])


def tuned(solve: Solve, errors: Errors, horizon: float, rtols: Sequence[float] = RTOLS) -> dict[str, Any]:
    """Return the run at the loosest tolerance of a grid whose error is at most `LEVEL`; the last one if none is."""
    row: dict[str, Any] = {}
    for rtol in rtols:
        seconds, out = timed(solve, horizon, rtol)
        row = {"rtol": rtol, "solve_s": seconds, "extrapolated": False, **errors(out["u"])}
        row |= {"accepted": int(out["accepted"]), "rejected": int(out["rejected"])}
        row["reached"] = row["error"] <= LEVEL
        if row["reached"]:
            break
    return row


def predicted(solve: Solve, horizon: float) -> dict[str, Any]:
    """Return what a run at the loosest tolerance would take: no less than what one that is right takes.

    Stability holds the step size of an explicit method at a constant, so that time and steps grow linearly with the
    horizon once the start is over: the second half of a short run gives the slope.
    """
    first_s, first = timed(solve, horizon / 64, RTOLS[0])
    second_s, second = timed(solve, horizon / 32, RTOLS[0])
    steps = {name: int(second[name] + 62 * (second[name] - first[name])) for name in ("accepted", "rejected")}
    seconds = second_s + 62 * max(0.0, second_s - first_s)
    return {"rtol": RTOLS[0], "error": None, "solve_s": seconds, "extrapolated": True, "reached": None, **steps}


def explicit(
    case: Case, errors: Errors | None, limit_s: float
) -> tuple[dict[str, dict[str, Any]], dict[str, Callable[[], Any]]]:
    """Return the explicit peers, tuned, and what to call for their times.

    The one that promises to be quickest goes first. Another one is not run, and its prediction stands, if that is
    beyond the limit, or beyond what the first has taken and a few seconds: it cannot win. (Where stiffness fades, or
    little of it is there, a prediction is too high, but not by minutes.)
    """
    rows: dict[str, dict[str, Any]] = {}
    calls: dict[str, Callable[[], Any]] = {}
    solves: dict[str, Solve] = {}
    for name in EXPLICIT:
        solves[name], compile_s = compiled_peer(case, name)
        rows[name] = predicted(solves[name], case.horizon) | {"compile_s": compile_s}
    quickest = limit_s
    for name in sorted(rows, key=lambda name: rows[name]["solve_s"]):
        if errors is not None and rows[name]["solve_s"] <= max(quickest, SHORT_S):
            # Steps that stability sets cost the same at every tolerance: no need to try the loose ones.
            rtols = RTOLS[4::2] if rows[name]["solve_s"] > SHORT_S else RTOLS
            rows[name] |= tuned(solves[name], errors, case.horizon, rtols)
            calls[name] = bound(solves[name], case.horizon, rows[name]["rtol"])
            if rows[name]["reached"]:
                quickest = min(quickest, rows[name]["solve_s"])
    return rows, calls


def implicit(case: Case) -> dict[str, Any]:
    """Predict Kvaerno5: its steps on the tangent flow of the outputs, each with a Newton matrix of size p and its LU.

    That favors it: stages, iterations and rejected steps are free, and so is whatever the model's flow has that its
    tangent's has not.
    """
    problem = case.problem
    shape = jax.eval_shape(problem.h, problem.w0).shape
    size = int(np.prod(shape))
    kernel = lj.gram(problem.f, problem.w0, problem.x).reshape(size, size)
    numbers = (jnp.asarray(case.horizon), jnp.asarray(RTOLS[0]))
    flow = diffrax.ODETerm(_output_flow)
    out = integrate(flow, diffrax.Kvaerno5(), jnp.zeros(shape), (kernel, problem.loss), *numbers)
    step_s = _newton_seconds(descent_args(problem, case.alpha))
    steps = int(out["accepted"])
    row = {"rtol": RTOLS[0], "error": None, "solve_s": steps * step_s, "extrapolated": True, "reached": None}
    return row | {"accepted": steps, "rejected": int(out["rejected"]), "step_s": step_s}


def _newton_seconds(args: tuple[Problem, jax.Array, jax.Array], columns: int = 64) -> float:
    """Time one p x p Jacobian, by a block of its columns, and one LU decomposition."""
    flat, unravel = ravel_pytree(args[0].w0)
    matrix = jr.normal(jr.key(0), (flat.size, flat.size)) + flat.size**0.5 * jnp.eye(flat.size)

    def block(args: Any, vectors: jax.Array) -> Any:
        field = lambda u: descent(0.0, u, args)
        return jax.vmap(lambda v: jax.jvp(field, (unravel(0 * flat),), (unravel(v),))[1])(vectors)

    block = eqx.filter_jit(block)
    block_s = min(timed(block, args, matrix[:columns])[0] for _ in range(3))
    factor = jax.jit(jax.scipy.linalg.lu_factor)
    return block_s * flat.size / columns + min(timed(factor, matrix)[0] for _ in range(2))


def _output_flow(t: Any, y: jax.Array, args: tuple[jax.Array, Any]) -> jax.Array:
    del t
    kernel, loss = args
    return -(kernel @ loss.cotangent(y).ravel()).reshape(y.shape)


def worst(found: list[Any], errors: list[Errors]) -> float:
    return max(error(u)["error"] for u, error in zip(found, errors, strict=True))


def loop(few: list[Case], errors: list[Errors], lanes: int) -> dict[str, Any]:
    """Return Tsit5 at the loosest tolerance that is enough for all sampled lanes."""
    flow = diffrax.ODETerm(descent)

    def solve(case: Case, horizon: float, rtol: float) -> Any:
        u0 = jtu.tree_map(jnp.zeros_like, case.problem.w0)
        args = descent_args(case.problem, case.alpha)
        return integrate(flow, EXPLICIT["Tsit5"], u0, args, jnp.asarray(horizon), jnp.asarray(rtol))["u"]

    row: dict[str, Any] = {"compile_s": timed(solve, few[0], 1e-3, 1e-3)[0], "extrapolated": len(few) < lanes}
    for rtol in RTOLS:
        runs = [timed(solve, case, case.horizon, rtol) for case in few]
        seconds, error = [run[0] for run in runs], worst([run[1] for run in runs], errors)
        row |= {"rtol": rtol, "error": error, "runs": seconds, "solve_s": lanes * statistics.mean(seconds)}
        row["reached"] = error <= LEVEL
        if row["reached"]:
            break
    return row
