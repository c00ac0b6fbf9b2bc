r"""Gradient flow of $F_\alpha(w) = R(\alpha h(w))/\alpha^2$ for a model or, by the same call, its tangent model."""

from collections.abc import Callable, Sequence
from typing import Any, cast

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from diffrax import RESULTS
from jaxtyping import Array, Float

from lazyjax._check import check_alpha, check_times, is_concrete
from lazyjax._field import ModelField, TangentField, check_start, make_field, tree_norm
from lazyjax._types import Model, Outputs, Params, RealScalar
from lazyjax.closed_form import solve_tangent, tangent_gram
from lazyjax.loss import Loss, SquareLoss, as_loss
from lazyjax.tangent import Tangent, linearize

DENSE_OUTPUTS = 4096
"""Up to this many outputs n*k, a tangent flow of the square loss is solved in closed form by default."""


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
        result: `diffrax.RESULTS.successful`, or why it stopped early (then later values are infinite):
            `max_steps_reached` (with ts ending in inf: not stationary by then), `nonfinite`, ...
        stats: "num_steps", "num_accepted_steps", "num_rejected_steps", and "num_vector_field", the gradients
            taken by the Runge-Kutta stages (-1 for an implicit solver, whose iterations are not counted; the choice
            of the first step and the search for a stationary point take a few more). All 0 in closed form.
    """

    ts: Float[Array, " time"]
    outputs: Any
    displacement: Params
    params: Params
    loss: Float[Array, " time"]
    alpha: Float[Array, ""]
    result: RESULTS
    stats: dict[str, Any]


def gradient_flow(
    h: Model,
    loss: Loss | Callable[[Outputs], RealScalar],
    w0: Params,
    ts: Float[Array, " time"],
    *,
    alpha: RealScalar = 1.0,
    solver: diffrax.AbstractSolver | None = None,
    stepsize_controller: diffrax.AbstractStepSizeController | None = None,
    dt0: RealScalar | None = None,
    rtol: float = 1e-6,
    atol: float = 1e-9,
    save: Sequence[str] = ("outputs",),
    max_steps: int = 4096,
    progress: bool = False,
    throw: bool = True,
) -> Flow:
    r"""Follow $w'(t) = -\nabla F_\alpha(w(t))$, $F_\alpha(w) = R(\alpha h(w))/\alpha^2$, from $w(t_0) = w_0$.

    Give it `h` for the model and `linearize(h, w0)` for its linear twin: the same call. Everything runs in
    $u = \alpha(w - w_0)$ with cancellation-free differences, so float32 is right at any alpha.

    Args:
        h: Model h(w) with outputs (n,) or (n, k), the data inside; or a `Tangent`.
        loss: R on outputs, from `lazyjax.loss`, or any function of the outputs.
        w0: Start; any pytree, its floating arrays are the coordinates.
        ts: Times to save at, strictly increasing; the first is the start, the last may be inf: run until
            $\|u'(t)\| \le$ rtol $\|u'(t_0)\|$. Flow time, not steps: a gradient-descent step of size eta on
            $F_\alpha$ advances it by eta.
        alpha: Output scale in (0, inf]; inf is the tangent flow and needs h(w0) = 0.
        solver: Any diffrax solver. None: Tsit5; for a `Tangent` with the square loss and at most 4096 outputs,
            the closed form at all times at once.
        stepsize_controller: Any diffrax controller. None: `PIDController(rtol, atol)` stepping exactly onto ts.
        dt0: First step size; None lets the solver choose (a solver without error estimate needs it, together
            with `stepsize_controller=diffrax.ConstantStepSize()`).
        rtol: Relative tolerance of u. Below 32 rounding units of the state's dtype it is taken as that
            (3.8e-6 in float32), where a tighter one would only measure rounding.
        atol: Absolute tolerance of u.
        save: Any of "outputs", "displacement", "params"; the loss always is.
        max_steps: Steps after which to stop with a `result`.
        progress: Show a progress bar.
        throw: Raise if the flow stopped early; False leaves that to `result`, for sweeps under `jax.vmap`.

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
    check_alpha(alpha)
    check_times(ts)
    _check_options(save, rtol, atol, max_steps)
    zero_start = check_start(h, loss, w0, alpha, rtol)
    options = _Options(solver, stepsize_controller, dt0, rtol, atol, tuple(save), max_steps, progress, throw)
    endless = is_concrete(ts) and bool(np.isinf(np.asarray(ts)[-1]))
    model = (h.h, h.w0) if isinstance(h, Tangent) else (h, None)
    # As an array, so that another alpha is another argument of the same compiled program.
    scale = jnp.asarray(alpha, float)
    flow = _gradient_flow(model, loss, w0, jnp.asarray(ts), scale, options, zero_start, endless)
    return flow.result.error_if(flow, flow.result != RESULTS.successful) if throw else flow


class _Options(eqx.Module):
    solver: diffrax.AbstractSolver | None
    stepsize_controller: diffrax.AbstractStepSizeController | None
    dt0: RealScalar | None
    rtol: float = eqx.field(static=True)
    atol: float = eqx.field(static=True)
    save: tuple[str, ...] = eqx.field(static=True)
    max_steps: int = eqx.field(static=True)
    progress: bool = eqx.field(static=True)
    throw: bool = eqx.field(static=True)


def _check_options(save: Sequence[str], rtol: float, atol: float, max_steps: int) -> None:
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


@eqx.filter_jit
def _gradient_flow(
    model: tuple[Model, Params | None],
    loss: Loss,
    w0: Params,
    ts: Array,
    alpha: RealScalar,
    options: _Options,
    zero_start: bool,
    endless: bool,
) -> Flow:
    h, anchor = model
    # A Tangent is linearized again here: its residuals from outside would be compiled in as constants.
    h = h if anchor is None else linearize(h, anchor)
    field = make_field(h, loss, w0, alpha, zero_start=zero_start, throw=options.throw)
    dtype = field.start.dtype
    ts = ts.astype(dtype)
    quadratic = isinstance(loss, SquareLoss) and options.solver is None and field.start.size <= DENSE_OUTPUTS
    if quadratic and isinstance(h, Tangent) and isinstance(field, TangentField):
        saved, result, stats = _closed_form(h, field, ts)
    else:
        saved, result, stats = _integrate(field, ts, options, endless)
    values = jax.vmap(loss)(saved["outputs"])
    broken = (result == RESULTS.successful) & ~jnp.all(jnp.isfinite(values))
    result = RESULTS.where(broken, RESULTS.nonfinite, result)  # pyright: ignore[reportArgumentType]
    displacement = saved["displacement"]
    return Flow(
        ts=ts,
        outputs=saved["outputs"] if "outputs" in options.save else None,
        displacement=displacement if "displacement" in options.save else None,
        params=eqx.combine(jax.vmap(field.moved)(displacement), field.rest) if "params" in options.save else None,
        loss=values,
        alpha=jnp.asarray(alpha, dtype),
        result=result,
        stats=stats,
    )


def _closed_form(tangent: Tangent, field: TangentField, ts: Array) -> tuple[dict[str, Any], RESULTS, dict[str, Any]]:
    loss = field.loss
    assert isinstance(loss, SquareLoss)
    solution = solve_tangent(tangent_gram(tangent), field.start, loss.minimizer, loss.weight)
    times = ts - ts[0]
    saved = {
        "outputs": jax.vmap(solution.outputs)(times),
        "displacement": jax.lax.map(lambda t: field.tangent.vjp(solution.cotangent(t)), times),
    }
    names = ("num_steps", "num_accepted_steps", "num_rejected_steps", "num_vector_field")
    return saved, RESULTS.successful, {name: jnp.asarray(0) for name in names}


def _integrate(
    field: ModelField | TangentField, ts: Array, options: _Options, endless: bool
) -> tuple[dict[str, Any], RESULTS, dict[str, Any]]:
    finite = ts[:-1] if endless else ts
    dtype = ts.dtype
    rtol = max(options.rtol, 32 * float(jnp.finfo(dtype).eps))
    controller = options.stepsize_controller
    if controller is None:
        # A lane that turned NaN rejects every step: the smallest step ends it, far below any step of use.
        dtmin = 1e-6 * float(jnp.finfo(dtype).eps) * (finite[-1] - finite[0])
        # Polynomial dense output is too rough for gaps at large alpha: step exactly onto the save times.
        controller = diffrax.ClipStepSizeController(
            diffrax.PIDController(rtol, options.atol, dtmin=dtmin, force_dtmin=False), step_ts=finite
        )
    solver = diffrax.Tsit5() if options.solver is None else options.solver
    u0 = jtu.tree_map(jnp.zeros_like, field.coordinates)
    keep_displacement = "displacement" in options.save or "params" in options.save

    def observe(t: Any, u: Params, args: Any) -> dict[str, Any]:
        del t
        return {"outputs": args.outputs(u), "displacement": u if keep_displacement else None}

    subs = [diffrax.SubSaveAt(ts=finite, fn=observe)]
    subs += [diffrax.SubSaveAt(t1=True, fn=observe)] if endless else []
    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(_vector_field),
        solver,
        t0=ts[0],
        t1=ts[-1],
        dt0=options.dt0,
        y0=u0,
        args=field,
        saveat=diffrax.SaveAt(subs=subs),
        stepsize_controller=controller,
        max_steps=options.max_steps,
        event=diffrax.Event(_stationary(field(u0), finite[-1], rtol)) if endless else None,
        progress_meter=diffrax.TqdmProgressMeter() if options.progress else diffrax.NoProgressMeter(),
        throw=False,
    )
    saved = jtu.tree_map(lambda *parts: jnp.concatenate(parts), *cast("list[Any]", solution.ys))
    return saved, _result(solution, endless), _count(solution.stats, solver)


def _vector_field(t: Any, u: Params, field: ModelField | TangentField) -> Params:
    del t
    return field(u)


def _stationary(start: Params, after: Array, rtol: float) -> Any:
    """Event: the gradient has fallen to rtol of its start, not before the last finite save time."""
    bound = rtol * tree_norm(start)

    def reached(t: Any, u: Params, args: ModelField | TangentField, **kwargs: Any) -> Array:
        del kwargs
        return (t >= after) & (tree_norm(args(u)) <= bound)

    return reached


def _result(solution: diffrax.Solution, endless: bool) -> RESULTS:
    result = solution.result
    if not endless:
        return result
    # The event is the arrival at a stationary point; without it, max_steps ended the search for one.
    return RESULTS.where(result == RESULTS.event_occurred, RESULTS.successful, result)


def _count(stats: dict[str, Any], solver: diffrax.AbstractSolver) -> dict[str, Any]:
    """diffrax's step counts, and the vector-field evaluations they stand for."""
    evaluations = jnp.asarray(-1)
    tableau = getattr(solver, "tableau", None)
    if isinstance(solver, diffrax.AbstractERK) and isinstance(tableau, diffrax.ButcherTableau):
        stages = tableau.num_stages - (1 if tableau.fsal else 0)
        evaluations = stages * stats["num_steps"] + (1 if tableau.fsal else 0)
    elif isinstance(solver, diffrax.Euler):
        evaluations = stats["num_steps"]
    names = ("num_steps", "num_accepted_steps", "num_rejected_steps")
    return {**{name: stats[name] for name in names}, "num_vector_field": evaluations}
