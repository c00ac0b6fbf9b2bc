r"""Gradient flow of $F_\alpha(w) = R(\alpha h(w))/\alpha^2$ for a model or, by the same call, its tangent model."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Float

from lazyjax._core.checks import check_outputs, check_times, is_concrete
from lazyjax._core.tables import format_table
from lazyjax._core.trees import tree_norm
from lazyjax._core.types import Model, Outputs, Params, RealScalar
from lazyjax.difference.gates import NoGatesError, gated
from lazyjax.flow.choose_solver import DENSE_OUTPUTS, choose_solver, name_of, stages_of
from lazyjax.flow.closed_form import solve_tangent, tangent_gram
from lazyjax.flow.exponential import TangentExponential, Velocity
from lazyjax.flow.field import ModelField, ScaledObjective, TangentField
from lazyjax.flow.gated_field import GatedField
from lazyjax.flow.result import RESULTS, SOLVERS, Result, as_result, check_successful, in_words, is_array, solver_words
from lazyjax.flow.start import as_scalar, check_start
from lazyjax.flow.step_collapse import COLLAPSED, WatchedController
from lazyjax.flow.through_kinks import ThroughKinks, follow_through_kinks, no_kinks
from lazyjax.losses.loss import Loss, as_loss
from lazyjax.losses.square import SquareLoss
from lazyjax.models.tangent import Tangent

EXPLICIT_PI, EXPONENTIAL_PI = {"pcoeff": 0.4, "icoeff": 0.3}, {"pcoeff": 0.3, "icoeff": 0.7}
"""Coefficients of the step-size controller: at a stability bound and at kinks it rejects a third of the steps that an I
controller does (0 and 1, diffrax's default), and errors are smaller. The steps of the exponential solver must be free
to grow."""

EXPONENTIAL_GROWTH = 100.0
"""Most that a step of the exponential solver may grow by. Its rounding errors are eps h |f|, and |f| falls as 1/t:
with this much they stay below 1e-5 in float32 for any horizon."""

FEW_GATES = 2**14
"""Up to this many gates a model's kinks are passed one by one by default. With more of them the field is smooth but for
jumps that are small each, and steps of an ordinary solver pass over many at a time."""

LONG = 1e-6
"""A horizon is long if it is more than this over the unit of rounding: for eigenvalues of a thousand, rounding errors
then add up to a thousandth."""

WITHIN = 0.25
"""Share of the tolerances to which flows are followed through kinks: errors add up over many changes of the pattern,
and the number of steps, which is that of the changes, hardly grows."""


class Flow(eqx.Module):
    r"""A computed flow; made by `gradient_flow`.

    Attributes:
        ts: The times (time,), flow time; the last may be inf.
        outputs: $\alpha h(w_\alpha(t))$, (time, n) or (time, n, k); None unless saved.
        displacement: $u = \alpha(w_\alpha(t) - w_0)$, a tree of w0's coordinates with a leading time axis; None
            unless saved.
        params: $w_\alpha(t)$, of w0's structure: its coordinates with a leading time axis, other leaves as they are;
            None unless saved.
        loss: $R(\alpha h(w_\alpha(t)))$, (time,).
        alpha: The scale.
        result: An item of `RESULTS` (diffrax's items compare with it): `successful`, or why it stopped early (then
            later values are infinite): `max_steps_reached` (with ts ending in inf: not stationary by then),
            `steps_collapsed` (sliding along a kink), `kinks_unresolved`, `nonfinite`, ...
        stats: "num_steps", "num_accepted_steps", "num_rejected_steps", and "num_vector_field", the gradients
            taken by the Runge-Kutta stages (-1 for an implicit solver, whose iterations are not counted; the choice
            of the first step and the search for a stationary point take a few more). All 0 in closed form.
            "solver": an item of `SOLVERS`, what the flow was followed with. With `ThroughKinks` "num_crossings",
            "num_slides" and "num_meetings": how often gates have switched, how often the flow has begun to slide along
            a kink, and at how many of these changes other gates were on their surfaces too.
    """

    ts: Float[Array, " time"]
    outputs: Any
    displacement: Params
    params: Params
    loss: Float[Array, " time"]
    alpha: Float[Array, ""]
    result: Result
    stats: dict[str, Any]

    def __repr__(self) -> str:
        """Return the scale, the times, the first and last loss, what was saved, and how it ended, in a few lines."""
        if not all(is_array(a) for a in (self.ts, self.loss, self.alpha, *jtu.tree_leaves((self.result, self.stats)))):
            return eqx.tree_pformat(self)
        loss, ts, steps = np.asarray(self.loss), np.asarray(self.ts), np.asarray(self.stats["num_steps"])
        lanes = "".join(f", {size} lanes" for size in loss.shape[:-1])
        rows = [("loss", f"{in_words(loss[..., 0])} at the start, {in_words(loss[..., -1])} at the end")]
        for name in ("outputs", "displacement", "params"):
            saved = jtu.tree_leaves(eqx.filter(getattr(self, name), eqx.is_array))
            if saved:
                rows.append((name, ", ".join(str(leaf.shape) for leaf in saved)))
        rows.append(("result", str(self.result)))
        rows.append(("solver", f"{solver_words(self.stats['solver'])}, {in_words(steps)} steps"))
        table = "\n  ".join(format_table(rows).splitlines())
        times = f"{ts.shape[-1]} times from {in_words(ts[..., 0])} to {in_words(ts[..., -1])}"
        return f"Flow at alpha = {in_words(self.alpha)}, {times}{lanes}\n  {table}"

    __str__ = __repr__


def gradient_flow(
    h: Model,
    loss: Loss | Callable[[Outputs], RealScalar],
    w0: Params,
    ts: Float[Array, " time"],
    *,
    alpha: RealScalar = 1.0,
    solver: diffrax.AbstractSolver | ThroughKinks | None = None,
    stepsize_controller: diffrax.AbstractStepSizeController | None = None,
    dt0: RealScalar | None = None,
    rtol: float = 1e-6,
    atol: float = 1e-9,
    save: Sequence[str] = ("outputs",),
    max_steps: int = 4096,
    progress: bool = False,
    throw: bool = True,
    adjoint: diffrax.AbstractAdjoint | None = None,
) -> Flow:
    r"""Follow $w'(t) = -\nabla F_\alpha(w(t))$, $F_\alpha(w) = R(\alpha h(w))/\alpha^2$, from $w(t_0) = w_0$.

    Give it `h` for the model and `linearize(h, w0)` for its tangent model: the same call. Everything runs in
    $u = \alpha(w - w_0)$ with cancellation-free differences, so float32 is right at any alpha.

    Args:
        h: Model h(w) with outputs (n,) or (n, k), the data inside; or a `Tangent`.
        loss: R on outputs, from `lazyjax.losses`, or any function of the outputs.
        w0: Start; any pytree, its floating arrays are the coordinates.
        ts: Times to save at, strictly increasing; the first is the start, the last may be inf: run until
            $\|u'(t)\| \le$ rtol $\|u'(t_0)\|$. A finite horizon too long for the precision ends likewise, once the
            gradient has fallen to its rounding. Flow time, not steps: a gradient-descent step of size eta on
            $F_\alpha$ advances it by eta.
        alpha: Output scale in (0, inf]; inf is the tangent flow and needs h(w0) = 0.
        solver: Any diffrax solver, or `lazyjax.flow.ThroughKinks` of one for models with kinks. None: for a `Tangent`
            with the square loss and at most 4096 outputs, the closed form at all times at once; else
            `TangentExponential` (re-linearizing where that pays) or Tsit5, by predicted cost; under a trace, where no
            value can be looked at, the former (Tsit5 for cross-entropies, whose stiffness fades). If the model has
            kinks (ReLU), up to 16,384 gates of them, either passes through them as `ThroughKinks` does; with more,
            only once its steps have collapsed.
            `Flow.stats["solver"]` says which.
        stepsize_controller: Any diffrax controller. None: `PIDController(rtol, atol, pcoeff=0.4, icoeff=0.3)`, for
            `TangentExponential` 0.3 and 0.7, watched for the collapse of its steps; other solvers than
            `TangentExponential`, whose interpolation is exact enough, step exactly onto ts.
        dt0: First step size; None lets the solver choose (a solver without error estimate needs it, together
            with `stepsize_controller=diffrax.ConstantStepSize()`).
        rtol: Relative tolerance of u. Below 32 rounding units of the state's dtype it is taken as that
            (3.8e-6 in float32), where a tighter one would only measure rounding.
        atol: Absolute tolerance of u.
        save: Any of "outputs", "displacement", "params"; the loss always is.
        max_steps: Steps after which to stop with a `result`.
        progress: Show a progress bar.
        throw: Raise if the flow stopped early; False leaves that to `result`, for sweeps under `jax.vmap`.
        adjoint: How diffrax differentiates the flow: None is its default, for `jax.grad`; `diffrax.ForwardMode()`
            for `jax.jvp`. With one, a flow is not followed through kinks by default; without one, it has no `jax.grad`
            if it is.

    Returns:
        `Flow`.

    Raises:
        ValueError, TypeError: bad arguments, seen before any step is taken.
        equinox.EquinoxRuntimeError: `throw` and the flow stopped early.

    Warns:
        UserWarning: h(w0) is a rounding residue that alpha makes large.

    Source:
        Chizat, Oyallon, Bach (2019), equations (2) to (5).

    Example:
        >>> from lazyjax import square_loss
        >>> flow = gradient_flow(lambda w: w, square_loss(jnp.zeros(1)), jnp.ones(1), jnp.array([0.0, 1.0]))
        >>> print(f"{flow.outputs[-1, 0]:.3f}")
        0.368
    """
    loss = as_loss(loss)
    check_times(ts)
    check_options(save, rtol, atol, max_steps)
    zero_start = check_start(h, loss, w0, alpha, rtol)
    objective = ScaledObjective.of(h, loss, w0, alpha, zero_start)
    chosen = solver is None and not _has_closed_form(h, loss)
    options = Options(
        choose_solver(objective, ts) if chosen else solver,
        chosen,
        stepsize_controller,
        dt0,
        as_scalar(rtol),
        as_scalar(atol),
        tuple(save),
        max_steps,
        progress,
        throw and not zero_start,  # a start declared zero has nothing to throw at
        adjoint,
        _is_long(w0, ts),
    )
    times = _since_start(h, w0, ts)
    flow = _follow(objective, times, options, ends_at_infinity(ts))
    if chosen and adjoint is None and _ended_at_kinks(flow, h, w0):
        assert isinstance(options.solver, diffrax.AbstractSolver)
        options = dataclasses.replace(options, chosen=False, solver=ThroughKinks(options.solver))
        flow = _follow(objective, times, options, ends_at_infinity(ts))
    flow = eqx.tree_at(lambda f: f.ts, flow, jnp.asarray(ts, flow.ts.dtype))
    return check_successful(flow.result, flow) if throw else flow


def _ended_at_kinks(flow: Flow, h: Model, w0: Params) -> bool:
    """Return whether it is known that steps have collapsed in a model with gates, too many to pass through at first."""
    stopped = flow.result == RESULTS.steps_collapsed
    if not is_concrete(stopped) or not bool(np.all(stopped)):
        return False
    try:
        return len(gated(h, w0).kinks) > 0
    except NoGatesError:
        return False


def _since_start(h: Model, w0: Params, ts: Array) -> Array:
    """Return the times since the first one, which stay apart in single precision where the times themselves do not.

    Raises:
        ValueError: they do not stay apart.
    """
    if not is_concrete(ts):
        return ts - ts[0]
    times = np.asarray(ts, np.float64)
    times = times - times[0]
    if (np.diff(times.astype(np.float32)) <= 0).any():
        dtype = check_outputs(h, w0).dtype
        rounded = times.astype(dtype)
        if (np.diff(rounded) <= 0).any():
            i = int(np.argmax(np.diff(rounded) <= 0))
            msg = (
                f"ts must be strictly increasing in the precision of the outputs, {dtype}, but ts[{i}] and ts[{i + 1}] "
                f"are both {times[i]} after ts[0]; take fewer times, or outputs in float64."
            )
            raise ValueError(msg)
    return jnp.asarray(times)


class Options(eqx.Module):
    """The numerical options of `gradient_flow`; the tolerances as arrays: another one is no other program.

    A horizon is `long` if rounding may add up over it.

    A solver that was `chosen` here passes through the kinks of the model, if they can be read from its program and are
    not too many.
    """

    solver: diffrax.AbstractSolver | ThroughKinks | None
    chosen: bool = eqx.field(static=True)
    stepsize_controller: diffrax.AbstractStepSizeController | None
    dt0: RealScalar | None
    rtol: Array
    atol: Array
    save: tuple[str, ...] = eqx.field(static=True)
    max_steps: int = eqx.field(static=True)
    progress: bool = eqx.field(static=True)
    throw: bool = eqx.field(static=True)
    adjoint: diffrax.AbstractAdjoint | None = None
    long: bool = eqx.field(static=True, default=True)


def _is_long(w0: Params, ts: Array) -> bool:
    """Return whether rounding over the horizon may add up to something, in the precision of the parameters.

    Of a traced one that is taken for granted in single precision, and in double precision for excluded.
    """
    leaves = jtu.tree_leaves(eqx.filter(w0, eqx.is_inexact_array))
    unit = max(float(jnp.finfo(leaf.dtype).eps) for leaf in leaves)
    if not is_concrete(ts):
        return unit > float(jnp.finfo(jnp.float64).eps)
    return float(np.ptp(np.asarray(ts, np.float64))) * unit > LONG


def check_options(save: Sequence[str], rtol: float, atol: float, max_steps: int) -> None:
    """Check what is to be saved, the tolerances and the number of steps.

    Raises:
        ValueError: one of them is out of its range.
    """
    unknown = [name for name in save if name not in ("outputs", "displacement", "params")]
    if isinstance(save, str) or unknown:
        msg = f'save must be a tuple of "outputs", "displacement", "params", got {save!r}.'
        raise ValueError(msg)
    if not rtol > 0 or not atol >= 0:
        msg = f"rtol must be positive and atol not negative, got rtol={rtol}, atol={atol}."
        raise ValueError(msg)
    if max_steps < 1:
        msg = f"max_steps must be at least 1, got {max_steps}."
        raise ValueError(msg)


def ends_at_infinity(ts: Array) -> bool:
    """Return whether the last time is known to be infinite."""
    return is_concrete(ts) and bool(np.isinf(np.asarray(ts)[-1]))


def _has_closed_form(h: Model, loss: Loss) -> bool:
    return isinstance(h, Tangent) and isinstance(loss, SquareLoss) and h.outputs.size <= DENSE_OUTPUTS


@eqx.filter_jit
def _follow(objective: ScaledObjective, ts: Array, options: Options, to_infinity: bool) -> Flow:
    field = objective.field(throw=options.throw)
    dtype = field.start.dtype
    ts = ts.astype(dtype)
    if options.solver is None:
        assert isinstance(field, TangentField)
        saved, result, stats = _closed_form(field, ts)
    else:
        saved, result, stats = _solve(field, options.solver, ts, options, to_infinity)
    values = jax.vmap(field.loss)(saved["outputs"])
    displacement = saved["displacement"]
    return Flow(
        ts=ts,
        outputs=saved["outputs"] if "outputs" in options.save else None,
        displacement=displacement if "displacement" in options.save else None,
        params=eqx.combine(jax.vmap(field.moved)(displacement), field.rest) if "params" in options.save else None,
        loss=values,
        alpha=jnp.asarray(objective.alpha, dtype),
        result=nonfinite_unless(jnp.all(jnp.isfinite(values)), result),
        stats=stats,
    )


def nonfinite_unless(finite: Array, result: Result) -> Result:
    """Return the result, but `nonfinite` instead of `successful` if what was computed is not finite."""
    broken = (result == RESULTS.successful) & ~finite
    return as_result(RESULTS.where(broken, RESULTS.nonfinite, result))  # pyright: ignore[reportArgumentType]


def _closed_form(field: TangentField, ts: Array) -> tuple[dict[str, Any], Result, dict[str, Any]]:
    loss = field.loss
    assert isinstance(loss, SquareLoss)
    solution = solve_tangent(tangent_gram(field.tangent), field.start, loss.minimizer, loss.weight)
    times = ts - ts[0]
    saved = {
        "outputs": jax.vmap(solution.outputs)(times),
        "displacement": jax.lax.map(lambda t: field.tangent.vjp(solution.cotangent(t)), times),
    }
    names = ("num_steps", "num_accepted_steps", "num_rejected_steps", "num_vector_field")
    stats: dict[str, Any] = {name: jnp.asarray(0) for name in names}
    return saved, as_result(RESULTS.successful), stats | no_kinks() | {"solver": SOLVERS.closed_form}


def _solve(
    field: ModelField | TangentField,
    solver: diffrax.AbstractSolver | ThroughKinks,
    ts: Array,
    options: Options,
    to_infinity: bool,
) -> tuple[dict[str, Any], Result, dict[str, Any]]:
    """Return what is saved along the flow at ts, how it ended, and what it took: through kinks, if there are any."""
    gated_field = _gated_field(field, solver, options)
    solver = solver.solver if isinstance(solver, ThroughKinks) else solver
    if gated_field is None:
        saved, result, stats = integrate(field, solver, ts, options, to_infinity=to_infinity)
        return saved, result, stats | no_kinks()
    if options.adjoint is not None:
        msg = "adjoint is for flows without kinks on their way, got one with ThroughKinks; leave it out."
        raise ValueError(msg)
    options = dataclasses.replace(options, rtol=WITHIN * options.rtol, atol=WITHIN * options.atol)
    solver, controller, rtol, dt0 = _prepare(field, solver, ts, options, to_infinity, _pid)
    saved, result, stats = follow_through_kinks(
        gated_field,
        solver,
        controller,
        ts,
        _observer(field, options),
        rtol=rtol,
        atol=options.atol,
        dt0=dt0,
        max_steps=options.max_steps,
        to_infinity=to_infinity,
        progress=_progress(options),
    )
    return saved, result, stats | {"solver": name_of(solver)}


def _gated_field(
    field: ModelField | TangentField, solver: diffrax.AbstractSolver | ThroughKinks, options: Options
) -> GatedField | None:
    """Return the field with the gates of a model with kinks, if the flow is to be followed through them."""
    chosen = options.chosen and options.adjoint is None
    if not isinstance(field, ModelField) or not (chosen or isinstance(solver, ThroughKinks)):
        return None
    try:
        gated_field = GatedField.of(field)
    except NoGatesError:
        if not options.chosen:
            raise
        return None
    few = sum(math.prod(kink.shape) for kink in gated_field.kinks) <= FEW_GATES
    return gated_field if gated_field.kinks and (few or not options.chosen) else None


def integrate(
    field: ModelField | TangentField, solver: diffrax.AbstractSolver, ts: Array, options: Options, *, to_infinity: bool
) -> tuple[dict[str, Any], Result, dict[str, Any]]:
    """Return what is saved along u' = field(u) at ts, how the solve ended, and what it took."""
    finite = ts[:-1] if to_infinity else ts
    solver, controller, rtol, dt0 = _prepare(field, solver, ts, options, to_infinity, _controller)
    u0 = jtu.tree_map(jnp.zeros_like, field.coordinates)
    observe = _observer(field, options)

    def save(t: Any, u: Params, args: Any) -> dict[str, Any]:
        del t, args
        return observe(u)

    subs = [diffrax.SubSaveAt(ts=finite, fn=save), diffrax.SubSaveAt(t1=True, fn=save)]
    if to_infinity:
        end = diffrax.Event(_stationary(field, field(u0), finite[-1], rtol))
    elif isinstance(solver, TangentExponential) and options.long:
        # Only then: an event keeps a linear part for every lane of a vmap.
        end = diffrax.Event(_settled(field, field(u0), ts[-1], rtol, options.atol))
    else:
        end = None
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
        adjoint=diffrax.RecursiveCheckpointAdjoint() if options.adjoint is None else options.adjoint,
        event=end,
        progress_meter=_progress(options),
        throw=False,
    )
    (times, _), (saved, last) = cast("Any", solution.ts), cast("Any", solution.ys)
    if to_infinity:
        saved = jtu.tree_map(lambda *parts: jnp.concatenate(parts), saved, last)
    else:
        settled = jnp.isinf(times) & (solution.result == diffrax.RESULTS.event_occurred)
        saved = jtu.tree_map(
            lambda a, b: jnp.where(jnp.expand_dims(settled, tuple(range(1, a.ndim))), b, a), saved, last
        )
    # A flow that fails in its first step has its start all the same.
    saved = jtu.tree_map(lambda a, b: a.at[0].set(b), saved, observe(u0))
    return saved, _result(solution.result), _count(solution.stats, solver)


def _prepare(
    field: ModelField | TangentField,
    solver: diffrax.AbstractSolver,
    ts: Array,
    options: Options,
    to_infinity: bool,
    default: Callable[..., diffrax.AbstractStepSizeController],
) -> tuple[diffrax.AbstractSolver, diffrax.AbstractStepSizeController, Array, RealScalar | None]:
    """Return the solver, an exponential one with its linear part, the controller, rtol, and the first step if given.

    rtol is at least that at which rounding is not all that is measured.
    """
    finite = ts[:-1] if to_infinity else ts
    rtol = jnp.maximum(options.rtol.astype(ts.dtype), 32 * float(jnp.finfo(ts.dtype).eps))
    dt0 = options.dt0
    if isinstance(solver, TangentExponential):
        solver = solver if solver.linear is not None else solver.attach(field, ts[-1] - ts[0])
        assert solver.linear is not None
        # A kernel that is zero sets no time; neither does a flow without an end.
        top = solver.linear.top
        scale = jnp.where(top > 0, 1 / jnp.where(top > 0, top, 1), 1).astype(ts.dtype)
        first = jnp.minimum(scale, finite[-1] - finite[0]) if finite.size > 1 else scale
        dt0 = first if dt0 is None else dt0
    controller = options.stepsize_controller
    if controller is None:
        controller = default(solver, finite, rtol, options)
    return solver, controller, rtol, dt0


def _observer(field: ModelField | TangentField, options: Options) -> Callable[[Params], dict[str, Any]]:
    """Return the function of a displacement that gives what is to be saved of it."""
    keep_displacement = "displacement" in options.save or "params" in options.save

    def observe(u: Params) -> dict[str, Any]:
        return {"outputs": field.outputs(u), "displacement": u if keep_displacement else None}

    return observe


def _progress(options: Options) -> diffrax.AbstractProgressMeter:
    return diffrax.TqdmProgressMeter() if options.progress else diffrax.NoProgressMeter()


def _controller(solver: diffrax.AbstractSolver, finite: Array, rtol: Array, options: Options) -> WatchedController:
    """Return the default controller of a flow that is not told of its kinks: it notices when its steps collapse."""
    pid = _pid(solver, finite, rtol, options)
    # Polynomial dense output is too rough for gaps at large alpha: step exactly onto the save times.
    exact = isinstance(solver, TangentExponential)
    return WatchedController(pid if exact else diffrax.ClipStepSizeController(pid, step_ts=finite), options.max_steps)


def _pid(solver: diffrax.AbstractSolver, finite: Array, rtol: Array, options: Options) -> diffrax.PIDController:
    # A lane that turned NaN rejects every step: the smallest step ends it, far below any step of use.
    # A long horizon may begin with short steps.
    span = jnp.min(jnp.diff(finite)) if finite.size > 1 else jnp.zeros((), finite.dtype)
    dtmin = 1e-6 * float(jnp.finfo(finite.dtype).eps) * span
    exponential = isinstance(solver, TangentExponential)
    if isinstance(solver, TangentExponential) and solver.linear is not None:
        top = solver.linear.top.astype(span.dtype)
        span = jnp.where(top * span > 1, 1 / jnp.where(top > 0, top, 1), span)
    growth = EXPONENTIAL_GROWTH if exponential else 10.0
    coefficients: dict[str, Any] = EXPONENTIAL_PI if exponential else EXPLICIT_PI
    return diffrax.PIDController(
        rtol, options.atol.astype(rtol.dtype), dtmin=dtmin, force_dtmin=False, factormax=growth, **coefficients
    )


def _stationary(field: ModelField | TangentField, start: Params, after: Array, rtol: Array) -> Any:
    """Return the event that the gradient has fallen to rtol of its start, not before the last finite save time."""
    bound = rtol * tree_norm(start)

    def reached(t: Any, u: Params, args: Any, **kwargs: Any) -> Array:
        del args, kwargs
        # Strictly after: an event at the very start would leave nothing saved.
        return (t > after) & (tree_norm(field(u)) <= bound)

    return reached


def _settled(field: ModelField | TangentField, start: Params, end: Array, rtol: Array, atol: Array) -> Any:
    """Return the event that the gradient has fallen to its rounding, while the time left would make that an error.

    The rounding errors of a step h are eps h |f|. Where the rest of the horizon is too long for one, only noise is left
    to be followed, by many steps: the point is stationary, as for an infinite horizon.
    """
    unit = float(jnp.finfo(end.dtype).eps)
    bound = 32 * unit * tree_norm(start)

    def reached(t: Any, u: Params, args: Any, **kwargs: Any) -> Array:
        del args, kwargs
        long = unit * bound * (end - t) > atol.astype(end.dtype) + rtol * tree_norm(u)
        return jax.lax.cond(long, lambda: tree_norm(field(u)) <= bound, lambda: jnp.asarray(False))

    return reached


def _result(result: diffrax.RESULTS) -> Result:
    theirs, ours = diffrax.RESULTS, as_result(result)
    # The event is the arrival at a stationary point; without it, max_steps ended the search for one.
    for found, meant in ((theirs.event_occurred, RESULTS.successful), (COLLAPSED, RESULTS.steps_collapsed)):
        ours = RESULTS.where(result == found, meant, ours)  # pyright: ignore[reportArgumentType]
    return as_result(ours)


def _count(stats: dict[str, Any], solver: diffrax.AbstractSolver) -> dict[str, Any]:
    """Return diffrax's step counts, the vector-field evaluations they stand for, and the solver."""
    stages, tableau = stages_of(solver), getattr(solver, "tableau", None)
    # The first step of a method whose last stage is the first of the next one.
    first = isinstance(solver, TangentExponential) or getattr(tableau, "fsal", False)
    evaluations = jnp.asarray(-1) if stages < 0 else stages * stats["num_steps"] + int(first)
    names = ("num_steps", "num_accepted_steps", "num_rejected_steps")
    return {**{name: stats[name] for name in names}, "num_vector_field": evaluations, "solver": name_of(solver)}
