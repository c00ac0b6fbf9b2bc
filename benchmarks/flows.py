"""How long does a gradient flow take with `lj.TangentExponential`, and with diffrax's solvers at the same error?

Solve time, set-up (Gram matrix and eigendecomposition) and compilation apart. W1 to W4b follow one flow an output
scale, W5 a whole sweep, W6 flows that learn features, where the choice of `solver=None` must not lose;
`explicit_wins` has the short horizons at which an explicit method is the better choice, `steps` the steps against
the output scale, `memory` the peak of the dense path, whole and of the rank that W4 gets, and of Lanczos (Linux only).

    python benchmarks/flows.py
    python benchmarks/flows.py --only W1 W2 --peers-only

One record a work, `results/flows_<work>.json`.
"""

import argparse
import itertools
import json
import multiprocessing
import statistics
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np

import _peers as peers
import harness
import lazyjax as lj
from _problems import RACES, SIZES, TARGETS, TAU, Case, Problem, Size, cases, digits_net, two_layer, wide_net


class Settings(NamedTuple):
    """How the benchmark was called."""

    size: Size
    peers_only: bool
    limit_s: float


def race(case: Case, kinds: tuple[str, ...], settings: Settings) -> dict[str, Any]:
    """Race the peers and ours on one flow: each tuned, then timed in turn, so that a busy machine slows all alike."""
    truth, made_by = reference(case, settings)
    errors = None if truth is None else peers.errors_against(case, truth)
    # The reference has compiled some of what follows; every compilation here is to be a first one.
    jax.clear_caches()
    rows, calls = peers.explicit(case, errors, settings.limit_s)
    rows["Kvaerno5"] = peers.implicit(case)
    if not settings.peers_only and errors is not None:
        for kind in kinds:
            rows[kind], calls[kind] = ours(kind, case, errors)
    peers.in_turn(rows, calls)
    best = peers.best(rows)
    loss = None if truth is None else float(case.problem.loss(peers.outputs(case, truth)[-1]))
    facts = {"alpha": case.alpha, "horizon": case.horizon, "num_params": case.problem.num_params}
    facts |= {"final_loss": loss, "reference": made_by, "best_peer": best}
    return facts | {"rows": rows, "ratios": ratios(rows, rows[best]["solve_s"])}


def reference(case: Case, settings: Settings) -> tuple[Any, str | None]:
    """Return the states at a tight tolerance: by Dopri8, or if that is slow by `gradient_flow`; Tsit5 across kinks.

    A peer that reaches the common error level against ours confirms it by other means: they share no code.
    """
    # At a kink every method is of first order, and pays with steps the more the tighter the tolerance.
    name, rtol = ("Dopri8", 1e-10) if case.problem.smooth else ("Tsit5", 1e-7)
    solve, _ = peers.compiled_peer(case, name)
    predicted_s = peers.predicted(solve, case.horizon)["solve_s"]
    if settings.peers_only and predicted_s > settings.limit_s:
        return None, None
    lazy = case.alpha >= 100
    if not settings.peers_only and case.problem.smooth and predicted_s > (5 if lazy else min(120, settings.limit_s)):
        rtol = 1e-10 if lazy else 1e-8
        flow = follow(case, None, rtol)
        name, u = lj.flow.SOLVERS[flow.stats["solver"]], states(flow)
    else:
        u = solve(case.horizon, rtol)["u"]
    return eqx.error_if(u, ~jnp.isfinite(peers.outputs(case, u)).all(), "the reference failed."), f"{name}, {rtol:.0e}"


def prepare(case: Case) -> tuple[Any, diffrax.AbstractSolver, Any]:
    return lj.TangentExponential().prepare(case.problem.h, case.problem.loss, case.problem.w0, alpha=case.alpha)


def run_prepared(case: Case, errors: peers.Errors) -> tuple[dict[str, Any], Callable[[], Any]]:
    """Time set-up and solve apart."""
    first_s, (term, solver, u0) = peers.timed(prepare, case)
    setup_s = statistics.median(peers.timed(prepare, case)[0] for _ in range(3))
    solve, compile_s = peers.compiled(term, solver, u0, None)
    row = peers.tuned(solve, errors, case.horizon)
    row |= {"compile_s": compile_s, "setup_s": setup_s, "setup_compile_s": max(0.0, first_s - setup_s)}
    return row, peers.bound(solve, case.horizon, row["rtol"])


def follow(case: Case, solver: diffrax.AbstractSolver | None, rtol: float) -> lj.Flow:
    """Time `lj.gradient_flow` as a user calls it: checks, set-up and solve."""
    problem, ts = case.problem, case.horizon * jnp.asarray([0.0, *peers.MOMENTS])
    options = {"rtol": rtol, "atol": rtol / 100, "max_steps": 10**7, "save": ("displacement",), "throw": False}
    return lj.gradient_flow(problem.h, problem.loss, problem.w0, ts, alpha=case.alpha, solver=solver, **options)


def states(flow: lj.Flow) -> Any:
    """Return u at the moments: all save times but the start."""
    return jtu.tree_map(lambda leaf: leaf[1:], flow.displacement)


def run_followed(
    solver: diffrax.AbstractSolver | None, case: Case, errors: peers.Errors
) -> tuple[dict[str, Any], Callable[[], Any]]:
    """Return the time of everything; another tolerance is another program."""
    row: dict[str, Any] = {"extrapolated": False}
    first_s = 0.0
    for rtol in peers.RTOLS:
        first_s, found = peers.timed(follow, case, solver, rtol)
        row |= {"rtol": rtol, "solver": lj.flow.SOLVERS[found.stats["solver"]], **errors(states(found))}
        row |= {name: int(found.stats[f"num_{name}_steps"]) for name in ("accepted", "rejected")}
        row["reached"] = row["error"] <= peers.LEVEL
        if row["reached"]:
            break
    row["solve_s"] = peers.timed(follow, case, solver, row["rtol"])[0]
    row["compile_s"] = max(0.0, first_s - row["solve_s"])
    return row, peers.bound(follow, case, solver, row["rtol"])


def ours(kind: str, case: Case, errors: peers.Errors) -> tuple[dict[str, Any], Any]:
    if kind == "ours":
        return run_prepared(case, errors)
    solvers = {"flow": lj.TangentExponential, "auto": lambda: None, "flow_Tsit5": diffrax.Tsit5}
    return run_followed(solvers[kind](), case, errors)


def ratios(rows: dict[str, dict[str, Any]], peer_s: float) -> dict[str, float]:
    """Return the time of the best peer over ours: the solve alone, the set-up counted, and `gradient_flow` whole."""
    out = {name: peer_s / rows[name]["solve_s"] for name in ("flow", "auto", "flow_Tsit5") if name in rows}
    if "ours" in rows:
        solve_s, setup_s = rows["ours"]["solve_s"], rows["ours"]["setup_s"]
        out |= {"solve": peer_s / solve_s, "counted": peer_s / (solve_s + setup_s)}
    return out


def sweep_race(settings: Settings) -> dict[str, Any]:
    """Race W5: every output scale and seed as one vmapped program, against a loop over one compiled Tsit5 solve.

    Of the loop a few lanes are run, the rest is charged their mean.
    """
    size, horizon = settings.size, min(1e4, settings.size.longest)
    scales = [*np.logspace(0, 6, 31 if size.alphas is None else 2).tolist(), float("inf")]
    lanes = list(itertools.product(scales, range(4)))
    places = [lanes.index((alpha, seed)) for alpha in (scales[0], scales[len(scales) // 2]) for seed in (0, 1)]
    few = [Case("", sweep_problem(size, seed), alpha, horizon) for alpha, seed in (lanes[i] for i in places)]
    settings = settings._replace(limit_s=float("inf"))
    errors = [peers.errors_against(case, reference(case, settings)[0]) for case in few]
    jax.clear_caches()
    rows = {"Tsit5": peers.loop(few, errors, len(lanes))}
    record = {"lanes": len(lanes), "sample": [lanes[i] for i in places], "rows": rows, "ratios": {}}
    if not settings.peers_only:
        rows["ours"] = sweep_ours(size, lanes, horizon, places, errors)
        record["ratios"] = {"solve": rows["Tsit5"]["solve_s"] / rows["ours"]["solve_s"]}
    return record


def sweep_problem(size: Size, seed: Any) -> Problem:
    return two_layer(jnp.tanh, size.few, size.d, size.width, tau=TAU, seed=seed)


def sweep_ours(
    size: Size, lanes: list[Any], horizon: float, places: list[int], errors: list[peers.Errors]
) -> dict[str, Any]:
    """Build one program for all lanes: a start, one eigendecomposition for it, its output scales one after the other.

    On a CPU lanes side by side are no quicker, and all of them take as many steps as the one that takes the most.
    """
    alphas = jnp.asarray(sorted({alpha for alpha, _ in lanes}))
    seeds = jnp.asarray(sorted({seed for _, seed in lanes}))

    def from_start(rtol: float, seed: jax.Array) -> Any:
        problem = sweep_problem(size, seed)
        _, solver, _ = prepare(Case("", problem, jnp.inf, horizon))
        return jax.lax.map(lambda alpha: states(follow(Case("", problem, alpha, horizon), solver, rtol)), alphas)

    row: dict[str, Any] = {"extrapolated": False}
    for rtol in peers.RTOLS:
        many = jax.jit(lambda seeds, rtol=rtol: jax.lax.map(partial(from_start, rtol), seeds))
        compile_s, program = peers.timed(lambda many=many: many.lower(seeds).compile())
        runs = [peers.timed(program, seeds) for _ in range(3)]
        row |= {"rtol": rtol, "compile_s": compile_s, "runs": [run[0] for run in runs]}
        by_lane = lambda i, u=runs[0][1]: jtu.tree_map(lambda leaf: leaf[lanes[i][1], i // len(seeds)], u)
        row["error"] = peers.worst([by_lane(i) for i in places], errors)
        row |= {"solve_s": statistics.median(row["runs"]), "reached": row["error"] <= peers.LEVEL}
        if row["reached"]:
            break
    return row


def steps_by_alpha(settings: Settings) -> dict[str, Any]:
    """Count the steps of W1 at rtol 1e-4, atol 1e-6, for every output scale and several horizons."""
    problem = sweep_problem(settings.size, 0)
    table: dict[str, dict[str, int]] = {}
    for horizon in sorted({min(horizon, settings.size.longest) for horizon in (1.0, 1e2, 1e4, 1e6)}):
        row = table[f"{horizon:g}"] = {}
        for alpha in 10.0 ** np.arange(1, 13):
            found = follow(Case("", problem, float(alpha), horizon), lj.TangentExponential(), 1e-4)
            row[f"{alpha:g}"] = int(found.stats["num_steps"])
    counts = [list(row.values()) for row in table.values()]
    falling = all(a >= b for row in counts for a, b in itertools.pairwise(row))
    return {"steps": table, "non_increasing": falling, "most_from_1e4": max(max(row[3:]) for row in counts)}


def memory(settings: Settings) -> dict[str, Any]:
    """Measure peak memory, each case in a process of its own."""
    size = settings.size
    jobs = {
        "dense": (dense_memory, size.digits, size.hidden, None),
        "low_rank": (dense_memory, size.digits, size.hidden, size.rank),
        "lanczos": (lanczos_memory, *size.wide),
    }
    record = {}
    for name, job in jobs.items():
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), use_float64) as pool:
            record[name] = pool.submit(*job).result()
    return record


def use_float64() -> None:
    jax.config.update("jax_enable_x64", True)


def dense_memory(n: int, hidden: tuple[int, ...], rank: int | None) -> dict[str, Any]:
    """Return what a compiled flow takes on top of the program and the data, in float64 numbers."""
    problem = digits_net(n, hidden, classify=False)
    solver = lj.TangentExponential("dense", relinearize=rank is not None, rank=rank)
    program = eqx.filter_jit(lambda p: states(follow(Case("", p, 100.0, 1e4), solver, 1e-4)))
    program = program.lower(problem).compile()
    before = resident("VmRSS")
    # Sets the peak back to what is resident now (proc(5)).
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    jax.block_until_ready(program(problem))
    taken = (resident("VmHWM") - before) / 8
    yardstick = (10 * n) ** 2 + 10 * problem.num_params
    return {"numbers": taken, "yardstick": yardstick, "ratio": taken / yardstick}


def lanczos_memory(n: int, width: int) -> dict[str, Any]:
    """Return what a whole process takes that follows a flow with too many outputs for a dense matrix."""
    problem = wide_net(n, width)
    seconds, found = peers.timed(follow, Case("", problem, 1e4, 1.0), lj.TangentExponential(), 1e-4)
    facts = {"outputs": 10 * n, "num_params": problem.num_params, "first_s": seconds}
    return facts | {"steps": int(found.stats["num_steps"]), "peak_gib": resident("VmHWM") / 2**30}


def resident(field: str) -> int:
    """Return the bytes of this process, now (VmRSS) or at its peak (VmHWM)."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(field):
            return 1024 * int(line.split()[1])
    msg = f"/proc/self/status has no {field}."
    raise OSError(msg)


SPECIAL = {"W5": sweep_race, "steps": steps_by_alpha, "memory": memory}


def work(name: str, settings: Settings) -> dict[str, Any]:
    """Return the record of one work; every case is printed as it comes."""
    if name in SPECIAL:
        record = SPECIAL[name](settings)
        print(name, json.dumps(record, default=float))
    else:
        record = {}
        for case in cases(name, settings.size):
            record[case.label] = race(case, RACES[name], settings)
            show(f"{name} {case.label}", record[case.label])
    return {"targets": TARGETS.get(name), "level": peers.LEVEL, "cases": record}


def show(label: str, record: dict[str, Any]) -> None:
    print(label, {name: f"{ratio:.3g}" for name, ratio in record["ratios"].items()}, "best", record["best_peer"])
    for name, row in record["rows"].items():
        error = "unknown" if row["error"] is None else f"{row['error']:.1e}"
        mark = " (extrapolated)" if row["extrapolated"] else "" if row["reached"] else " (not accurate enough)"
        steps = f"{row['accepted']}+{row['rejected']} steps"
        print(f"  {name:10} {row['solve_s']:9.3g} s{mark}, {steps}, rtol {row['rtol']:.0e}, error {error}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [*RACES, *SPECIAL]
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="WORK", help=" ".join(names))
    parser.add_argument("--size", choices=list(SIZES), default="full", help="smoke is for trying out; writes nothing")
    parser.add_argument("--peers-only", action="store_true", help="without ours; writes nothing")
    parser.add_argument("--limit", type=float, default=1200.0, help="seconds; longer peer runs are extrapolated")
    args = parser.parse_args()
    use_float64()
    settings = Settings(SIZES[args.size], args.peers_only, args.limit)
    for name in args.only:
        if args.peers_only and name in ("steps", "memory"):
            continue
        record = work(name, settings)
        if args.size == "full" and not args.peers_only:
            print(harness.write(f"flows_{name}", record).relative_to(harness.ROOT))


if __name__ == "__main__":
    main()
