"""One flow by one diffrax solver: controller, save times, the search for a stationary point, the counts."""

from typing import Any, cast

import diffrax
import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from diffrax import RESULTS
from jaxtyping import Array

from lazyjax._core.trees import tree_norm
from lazyjax._core.types import Params, RealScalar
from lazyjax.flow import result as results
from lazyjax.flow.exponential import TangentExponential
from lazyjax.flow.field import ModelField, TangentField, Velocity
from lazyjax.flow.step_collapse import COLLAPSED, WatchedController

EXPLICIT_PI, EXPONENTIAL_PI = {"pcoeff": 0.4, "icoeff": 0.3}, {"pcoeff": 0.3, "icoeff": 0.7}
"""Of the step-size controller: at a stability bound and at kinks it rejects a third of the steps that an I controller
does (0 and 1, diffrax's default), and errors are smaller. The steps of the exponential solver must be free to grow."""

GROWTH = 100.0
"""Most that a step of the exponential solver may grow by. Its rounding errors are eps h |f|, and |f| falls as 1/t:
with this much they stay below 1e-5 in float32 for any horizon."""


class Options(eqx.Module):
    """The numerical options of `gradient_flow`; the tolerances as arrays: another one is no other program."""

    solver: diffrax.AbstractSolver | None
    stepsize_controller: diffrax.AbstractStepSizeController | None
    dt0: RealScalar | None
    rtol: Array
    atol: Array
    save: tuple[str, ...] = eqx.field(static=True)
    max_steps: int = eqx.field(static=True)
    progress: bool = eqx.field(static=True)
    throw: bool = eqx.field(static=True)


def integrate(
    field: ModelField | TangentField, solver: diffrax.AbstractSolver, ts: Array, options: Options, *, to_infinity: bool
) -> tuple[dict[str, Any], results.Result, dict[str, Any]]:
    """What is saved along u' = field(u) at ts, how the solve ended, and what it took."""
    finite = ts[:-1] if to_infinity else ts
    dt0 = options.dt0
    if isinstance(solver, TangentExponential):
        solver = solver if solver.linear is not None else solver.attach(field, ts[-1] - ts[0])
        assert solver.linear is not None
        # A kernel that is zero sets no time; neither does an to_infinity flow.
        top = solver.linear.top
        scale = jnp.where(top > 0, 1 / jnp.where(top > 0, top, 1), 1).astype(ts.dtype)
        first = jnp.minimum(scale, finite[-1] - finite[0]) if finite.size > 1 else scale
        dt0 = first if dt0 is None else dt0
    rtol = jnp.maximum(options.rtol.astype(ts.dtype), 32 * float(jnp.finfo(ts.dtype).eps))
    controller = options.stepsize_controller
    if controller is None:
        controller = _controller(solver, finite, rtol, options)
    u0 = jtu.tree_map(jnp.zeros_like, field.coordinates)
    keep_displacement = "displacement" in options.save or "params" in options.save

    def observe(t: Any, u: Params, args: Any) -> dict[str, Any]:
        del t, args
        return {"outputs": field.outputs(u), "displacement": u if keep_displacement else None}

    subs = [diffrax.SubSaveAt(ts=finite, fn=observe)]
    subs += [diffrax.SubSaveAt(t1=True, fn=observe)] if to_infinity else []
    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(Velocity(field)),
        solver,
        t0=ts[0],
        t1=ts[-1],
        dt0=dt0,
        y0=u0,
        saveat=diffrax.SaveAt(subs=subs),
        stepsize_controller=controller,
        max_steps=options.max_steps,
        event=diffrax.Event(_stationary(field, field(u0), finite[-1], rtol)) if to_infinity else None,
        progress_meter=diffrax.TqdmProgressMeter() if options.progress else diffrax.NoProgressMeter(),
        throw=False,
    )
    saved = jtu.tree_map(lambda *parts: jnp.concatenate(parts), *cast("list[Any]", solution.ys))
    return saved, _result(solution.result), _count(solution.stats, solver)


def _controller(solver: diffrax.AbstractSolver, finite: Array, rtol: Array, options: Options) -> WatchedController:
    # A lane that turned NaN rejects every step: the smallest step ends it, far below any step of use.
    span = finite[-1] - finite[0] if finite.size > 1 else jnp.zeros((), finite.dtype)
    dtmin = 1e-6 * float(jnp.finfo(finite.dtype).eps) * span
    exponential = isinstance(solver, TangentExponential)
    growth = GROWTH if exponential else 10.0
    coefficients: dict[str, Any] = EXPONENTIAL_PI if exponential else EXPLICIT_PI
    pid = diffrax.PIDController(
        rtol, options.atol.astype(rtol.dtype), dtmin=dtmin, force_dtmin=False, factormax=growth, **coefficients
    )  # fmt: skip
    # Polynomial dense output is too rough for gaps at large alpha: step exactly onto the save times.
    controller = pid if exponential else diffrax.ClipStepSizeController(pid, step_ts=finite)
    return WatchedController(controller, options.max_steps)


def _stationary(field: ModelField | TangentField, start: Params, after: Array, rtol: Array) -> Any:
    """Event: the gradient has fallen to rtol of its start, not before the last finite save time."""
    bound = rtol * tree_norm(start)

    def reached(t: Any, u: Params, args: Any, **kwargs: Any) -> Array:
        del args, kwargs
        # Strictly after: an event at the very start would leave nothing saved.
        return (t > after) & (tree_norm(field(u)) <= bound)

    return reached


def _result(result: RESULTS) -> results.Result:
    ours = results.RESULTS.promote(result)
    # The event is the arrival at a stationary point; without it, max_steps ended the search for one.
    for found, meant in (
        (RESULTS.event_occurred, results.RESULTS.successful),
        (COLLAPSED, results.RESULTS.steps_collapsed),
    ):
        ours = results.RESULTS.where(result == found, meant, ours)  # pyright: ignore[reportArgumentType]
    return results.as_result(ours)


def _count(stats: dict[str, Any], solver: diffrax.AbstractSolver) -> dict[str, Any]:
    """diffrax's step counts, and the vector-field evaluations they stand for."""
    evaluations = jnp.asarray(-1)
    tableau = getattr(solver, "tableau", None)
    if isinstance(solver, TangentExponential):
        evaluations = 4 * stats["num_steps"] + 1
    elif isinstance(solver, diffrax.AbstractERK) and isinstance(tableau, diffrax.ButcherTableau):
        stages = tableau.num_stages - (1 if tableau.fsal else 0)
        evaluations = stages * stats["num_steps"] + (1 if tableau.fsal else 0)
    elif isinstance(solver, diffrax.Euler):
        evaluations = stats["num_steps"]
    names = ("num_steps", "num_accepted_steps", "num_rejected_steps")
    return {**{name: stats[name] for name in names}, "num_vector_field": evaluations}
