r"""Flows that pass through kinks: smooth pieces by a solver of diffrax, the changes of the activation pattern located.

A step is taken with the gates held (`GatedField`). If gates have crossed at its end, they are turned. Where that
makes a difference below the tolerance, the step stands. Else they are passed: the jump of the field at each one is
counted from where it crosses, to first order, and if what is left is below the tolerance, the step stands, or a shorter
part of it. Else, and where the field leads a gate back, the first change is located by the solver's dense output, and
the step ends there: a gate whose surface the field leaves on the other side too is turned, the others slide. A gate
that slides leaves its surface when its gate value arrives at 0 or 1, or when the surface begins to repel. Where more
surfaces meet than the parameters that move there, the first change says nothing of the next ones: a few tiny steps of
gradient descent tell which gates leave, and which slide.

Source: Filippov (1988), Differential equations with discontinuous right-hand sides; Dieci, Lopez (2012), A survey of
numerical methods for IVPs of ODEs with discontinuous right-hand side, J. Comput. Appl. Math. 236.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Bool, Float, Int

from lazyjax._core.trees import tree_norm
from lazyjax._core.types import Params
from lazyjax.flow.choose_solver import stages_of
from lazyjax.flow.exponential import TangentExponential
from lazyjax.flow.first_change import LATE, FirstChange, Look, Search
from lazyjax.flow.gated_field import OFF, ON, SLIDING, GatedField, Pattern, Surfaces
from lazyjax.flow.result import RESULTS, Result, as_result

UNRESOLVED = 64
"""Changes of the pattern at one time, beyond one for every gate that slides, after which its order counts as lost."""

ROUNDING = 16
"""Units of rounding of the largest switching value within which one counts as zero."""

LOCATION = 0.01
"""To what share of rtol the length of a step to a change is located."""

GRAZE = 0.3
"""Share of the tolerance of u by which a gate may be on the other side of its surface while its mode is kept."""

MOST_GROWTH = 3
"""Of the next step over one that was cut short so that several gates could be passed."""

FREE = 0.25
"""Most by which a gate value may leave [0, 1] while the flow still slides, where the tolerance allows it."""

DESCENT_STEPS = 128
"""Steps of gradient descent that are taken where surfaces meet."""

SETTLING = 1000
"""Times as long as those take, gates that come back to where they met stay there."""

DESCENT_LENGTH = 0.01
"""The length of such a step, as a share of the tolerance of u."""

LEAST_DESCENT = 32
"""The least length of such a step in units of rounding of u: shorter ones would not move it as they should."""


class ThroughKinks(eqx.Module):
    r"""A solver for models with kinks (ReLU, max pooling), whose steps end where the activation pattern changes.

    Give it to `gradient_flow(solver=...)`. Where the flow meets a kink from both sides it slides along it, as small
    steps of gradient descent do on average, and leaves it again when the field lets go. So a flow of ReLU units, along
    which adaptive steps collapse, runs to its end, to the tolerance asked for. For smooth models it is the solver
    inside. It cannot be differentiated backward.

    Where more surfaces meet than the parameters that move there (all those of a unit of a two-layer net meet at zero),
    the next branch need not be unique; it is that of gradient descent with tiny steps. `Flow.stats["num_meetings"]`
    counts the changes at which other gates were on their surfaces too. If the order of several changes at one time is
    not found, the `result` is `kinks_unresolved`.

    Attributes:
        solver: Any explicit diffrax solver, or `TangentExponential`, for the smooth pieces.

    Source:
        Filippov (1988); Dieci, Lopez (2012), A survey of numerical methods for IVPs of ODEs with discontinuous
        right-hand side, J. Comput. Appl. Math. 236.

    Example:
        >>> from lazyjax import gradient_flow, square_loss
        >>> loss = square_loss(-jnp.ones(1))  # |w| would have to be negative
        >>> ts = jnp.array([0.0, 0.5, 2.0])
        >>> solver = ThroughKinks(diffrax.Tsit5())
        >>> flow = gradient_flow(jnp.abs, loss, jnp.ones(1), ts, solver=solver)
        >>> print(flow.outputs[:, 0].round(4), flow.stats["num_slides"])
        [1.     0.2131 0.    ] 1
    """

    solver: diffrax.AbstractSolver = diffrax.Tsit5()

    def __check_init__(self) -> None:
        if not isinstance(self.solver, diffrax.AbstractSolver) or isinstance(
            self.solver, diffrax.AbstractImplicitSolver
        ):
            msg = (
                "solver must be an explicit diffrax solver, or lazyjax.TangentExponential, got "
                f"{type(self.solver).__name__}; for example ThroughKinks(diffrax.Tsit5())."
            )
            raise TypeError(msg)


def no_kinks() -> dict[str, Array]:
    """Return what a flow reports that is not told of kinks."""
    return dict.fromkeys(("num_crossings", "num_slides", "num_meetings"), jnp.asarray(0))


class GatedVelocity(eqx.Module):
    """A gated field as the vector field of a `diffrax.ODETerm`; its arguments are the pattern and the surfaces."""

    field: GatedField

    def __call__(self, t: Any, u: Params, args: tuple[Pattern, Surfaces]) -> Params:
        """Return u', whatever t."""
        del t
        return self.field.velocity(u, *args)


class Counts(NamedTuple):
    """The counts of what a flow took and met."""

    num_steps: Array
    num_accepted_steps: Array
    num_rejected_steps: Array
    num_vector_field: Array
    num_crossings: Array
    num_slides: Array
    num_meetings: Array

    @classmethod
    def zeros(cls) -> "Counts":
        """Return the counts at the start."""
        return cls(*[jnp.asarray(0)] * len(cls._fields))

    def plus(self, **more: Array | int) -> "Counts":
        """Return the counts with more of some."""
        return self._replace(**{name: getattr(self, name) + jnp.asarray(n, int) for name, n in more.items()})


class State(eqx.Module):
    """The state between two steps.

    Attributes:
        t: Time.
        u: Displacement.
        pattern: The mode of every gate.
        look: What is seen there.
        surfaces: Rows of the gates that slide.
        solver: The solver's own state.
        controller: The controller's own state.
        length: Of the next step.
        jumped: Whether the pattern has changed since the solver's last step.
        index: Number of the next time to save at.
        saved: What has been saved.
        result: Why the flow has ended; successful as long as it has not.
        counts: What it took.
        changes: Changes of the pattern since time last moved.
        meeting: Whether other gates were on their surfaces at the last change, and may leave them.
        settled: Time before which gates that are back on their surfaces stay there.
        progress: The state of the progress meter.
    """

    t: Array
    u: Params
    pattern: Pattern
    look: Look
    surfaces: Surfaces
    solver: Any
    controller: Any
    length: Array
    jumped: Bool[Array, ""]
    index: Int[Array, ""]
    saved: Any
    result: Result
    counts: Counts
    changes: Int[Array, ""]
    meeting: Bool[Array, ""]
    settled: Array
    progress: Any


class Follower(eqx.Module):
    """A flow through kinks, and how it is followed.

    Attributes:
        field: The field with gates.
        solver: Takes the steps.
        controller: Chooses their lengths.
        ts: Times to save at; the last may be infinite.
        observe: What to save of a displacement.
        rtol: Relative tolerance.
        atol: Absolute tolerance.
        zero: What counts as zero of the switching values, by their rounding.
        norms: About |grad g_s|, for every gate.
        meter: Shows the progress.
        rest: |u'| at which a flow without an end has arrived; None for one with an end.
        max_steps: Steps after which to stop.
        stages: Evaluations of the field in a step of the solver.
    """

    field: GatedField
    solver: diffrax.AbstractSolver
    controller: diffrax.AbstractStepSizeController
    ts: Array
    observe: Callable[[Params], Any]
    rtol: Array
    atol: Array
    zero: Float[Array, ""]
    norms: Float[Array, " s"]
    meter: diffrax.AbstractProgressMeter
    rest: Array | None
    max_steps: int = eqx.field(static=True)
    stages: int = eqx.field(static=True)

    @property
    def term(self) -> diffrax.ODETerm:
        """The field as the solver takes it."""
        return diffrax.ODETerm(GatedVelocity(self.field))

    @property
    def order(self) -> Any:
        """The order of the solver's error estimate."""
        return self.solver.error_order(self.term)

    @property
    def sharpness(self) -> Array:
        """The share of a step to which a change of the pattern is located."""
        return jnp.maximum(LOCATION * self.rtol, 16 * jnp.finfo(self.zero.dtype).eps)

    def start(self, u: Params, values: Array, pattern: Pattern, first: Any, dt0: Any) -> State:
        """Return the state at the start, where `first` is saved."""
        dtype, size = self.zero.dtype, sum(leaf.size for leaf in jtu.tree_leaves(u))
        surfaces = Surfaces.empty(pattern.modes.size, size, dtype)
        args = (pattern, surfaces)
        t0 = self.ts[0]

        def smooth(terms: Any, t: Any, y: Params, args: Any) -> Params:
            """Return the field without surfaces: nothing slides yet."""
            del terms, t, args
            return self.field.field(y)

        t1, controller = self.controller.init(self.term, t0, self.ts[1], u, dt0, args, smooth, self.order)
        inner = self.solver.init(self.term, t0, t1, u, args)
        gates = pattern.gates
        nothing = jtu.tree_map(jnp.zeros_like, u)
        look = Look(jnp.abs(values) / self.zero, jnp.zeros_like(gates), gates, values, nothing, nothing)
        saved = jtu.tree_map(lambda a: jnp.full((self.ts.size, *a.shape), jnp.inf, a.dtype).at[0].set(a), first)
        return State(
            t=t0,
            u=u,
            pattern=pattern,
            look=look,
            surfaces=surfaces,
            solver=inner,
            controller=controller,
            length=jnp.asarray(t1 - t0),
            jumped=jnp.asarray(False),
            index=jnp.asarray(1),
            saved=saved,
            result=as_result(RESULTS.successful),
            counts=Counts.zeros(),
            changes=jnp.asarray(0),
            meeting=jnp.asarray(False),
            settled=t0,
            progress=self.meter.init(),
        )

    def goes_on(self, state: State) -> Array:
        """Return whether the flow has not ended."""
        return (state.index < self.ts.size) & (state.result == RESULTS.successful)

    def step(self, state: State) -> State:
        """Take one step, or where surfaces meet a few of gradient descent."""
        return jax.lax.cond(state.meeting, lambda s: self._descend(s), lambda s: self._step(s), state)  # noqa: PLW0108

    def _descend(self, state: State) -> State:
        """Take a few tiny steps of gradient descent, which tell what gates leave their surfaces, and what gates slide.

        Where more surfaces meet than the parameters that move there, no first change says where the flow goes on.
        """
        span = self.ts[state.index] - state.t
        speed = tree_norm(self.field.free(state.u)[0])
        least = LEAST_DESCENT * jnp.finfo(self.zero.dtype).eps * tree_norm(state.u)
        size = jnp.maximum(DESCENT_LENGTH * self._tolerance(state.u), least)
        length = size / jnp.where(speed > 0, speed, 1)
        length = jnp.minimum(length, 0.5 * span / DESCENT_STEPS)
        # On the surfaces themselves a gate would be what JAX takes at a tie.
        noise = jtu.tree_map(lambda a: a[1], self.field.directions)
        share = length * speed / tree_norm(noise)
        moved = jtu.tree_map(lambda a, b: a + share.astype(a.dtype) * b, state.u, noise)

        def descend(carry: tuple[Params, Array, Array, Array], k: Array) -> tuple[Any, None]:
            u, on, switches, times_on = carry
            velocity, g = self.field.free(u)
            late = k >= DESCENT_STEPS // 2
            switches = switches + (late & ((g > 0) != on)).astype(int)
            times_on = times_on + (late & (g > 0)).astype(int)
            u = jtu.tree_map(lambda a, b: a + length.astype(a.dtype) * b, u, velocity)
            return (u, g > 0, switches, times_on), None

        modes = state.pattern.modes
        none = jnp.zeros(modes.shape, int)
        (u, on, switches, times_on), _ = jax.lax.scan(
            descend, (moved, modes == ON, none, none), jnp.arange(DESCENT_STEPS)
        )
        slides = switches > 1
        found = jnp.where(slides, SLIDING, jnp.where(on, ON, OFF)).astype(modes.dtype)
        mean = times_on.astype(state.pattern.gates.dtype) / (DESCENT_STEPS - DESCENT_STEPS // 2)
        pattern = Pattern(found, jnp.where(slides, mean, on.astype(mean.dtype)))
        changed = found != modes
        surfaces = self._renew(u, pattern, state.surfaces, state.counts.num_steps)
        return dataclasses.replace(
            state,
            t=state.t + DESCENT_STEPS * length,
            u=u,
            pattern=pattern,
            look=self._look(u, pattern, surfaces, state.length),
            surfaces=surfaces,
            jumped=jnp.asarray(True),
            counts=state.counts.plus(
                num_vector_field=DESCENT_STEPS + 2,
                num_crossings=jnp.sum(changed & (found != SLIDING) & (modes != SLIDING)),
                num_slides=jnp.sum(changed & (found == SLIDING)),
            ),
            meeting=jnp.asarray(False),
            settled=state.t + SETTLING * DESCENT_STEPS * length,
        )

    def _step(self, state: State) -> State:
        """Take one step, or the part of it up to the first change of the pattern."""
        args = (state.pattern, state.surfaces)
        target = self.ts[state.index]
        clipped = state.t + state.length >= target
        t1 = jnp.where(clipped, target, state.t + state.length)
        u1, error, dense, inner = self._advance(state, t1)
        accepted, begin, end, _, controller, verdict = self.controller.adapt_step_size(
            state.t, t1, state.u, u1, args, error, self.order, state.controller
        )
        keep = jnp.asarray(accepted)
        # A step that was cut short by a time to save at says nothing against a longer one.
        length = jnp.where(keep & clipped, jnp.maximum(end - begin, state.length), end - begin)
        piece = self.solver.interpolation_cls(t0=state.t, t1=t1, **dense)
        found = self._find(state, piece, u1, keep)
        # Where only some of many gates were passed, the next step is of the same kind.
        passed = (found.share < 1) & (jnp.sum(found.pattern.modes != state.pattern.modes) > 1)
        length = jnp.where(passed, jnp.minimum(length, MOST_GROWTH * found.share * (t1 - state.t)), length)
        whole = found.share >= 1
        t = jnp.where(whole, t1, state.t + found.share * (t1 - state.t))
        u = jtu.tree_map(lambda a, b: jnp.where(whole, a, b), u1, piece.evaluate(t))
        u = jtu.tree_map(lambda a, shift, back: a + shift - back, u, found.shift, found.look.correction)
        pattern = self._settle(found.pattern, found.look)
        surfaces = self._renew(u, pattern, state.surfaces, state.counts.num_steps)
        counts = self._count(state, found, keep)
        arrived = keep & ((t >= target) | self._rests(state, t, found.look.velocity))
        meeting = (counts.num_meetings > state.counts.num_meetings) & (t > state.settled)
        taken = State(
            t=t,
            u=u,
            pattern=pattern,
            look=found.look,
            surfaces=surfaces,
            solver=inner,
            controller=controller,
            length=length,
            jumped=jnp.any(pattern.modes != state.pattern.modes),
            index=state.index + arrived.astype(state.index.dtype),
            saved=state.saved,
            result=state.result,
            counts=counts,
            changes=jnp.where((found.share <= 4 * self.sharpness) | (t <= state.t), state.changes + 1, 0),
            meeting=self._may_leave(u, state.pattern, pattern, surfaces, meeting),
            settled=state.settled,
            progress=state.progress,
        )
        left = dataclasses.replace(state, controller=controller, length=length, counts=counts)
        after = jtu.tree_map(lambda a, b: jnp.where(keep, a, b), taken, left)
        saved = jax.lax.cond(
            arrived,
            lambda: jtu.tree_map(lambda all_, a: all_.at[state.index].set(a), state.saved, self.observe(u)),
            lambda: state.saved,
        )
        progress = self.meter.step(state.progress, (after.t - self.ts[0]) / (self.ts[-1] - self.ts[0]))
        after = dataclasses.replace(after, saved=saved, progress=progress)
        return dataclasses.replace(after, result=self._judge(after, verdict))

    def _rests(self, state: State, t: Array, velocity: Params) -> Array:
        """Return whether a flow without an end has arrived, after the last time to save at."""
        if self.rest is None:
            return jnp.asarray(False)
        return (state.index == self.ts.size - 1) & (t > self.ts[-2]) & (tree_norm(velocity) <= self.rest)

    def _find(self, state: State, piece: diffrax.AbstractLocalInterpolation, end: Params, wanted: Array) -> Search:
        """Return what happens first in a step, if that is wanted."""
        length = jnp.asarray(piece.t1 - state.t)
        step = FirstChange(
            look=lambda u, pattern: self._look(u, pattern, state.surfaces, length),
            at=lambda share: piece.evaluate(state.t + share * length),
            end=end,
            before=state.pattern,
            seen=state.look,
            length=length,
            tolerance=self._tolerance(end),
            sharpness=self.sharpness,
        )
        return step.find(wanted)

    def _count(self, state: State, found: Search, keep: Array) -> Counts:
        """Return the counts after a step."""
        new, old = found.pattern.modes, state.pattern.modes
        changed = keep & (new != old)
        # Gates that stay off or on, but on their surfaces, where others change: what comes next hangs on the order.
        idle = jnp.any((jnp.abs(found.look.margins) <= 1) & (new != SLIDING) & (new == old))
        return state.counts.plus(
            num_steps=1,
            num_accepted_steps=keep,
            num_rejected_steps=~keep,
            num_vector_field=self.stages + state.jumped.astype(int) + found.looks,
            num_crossings=jnp.sum(changed & (new != SLIDING) & (old != SLIDING)),
            num_slides=jnp.sum(changed & (new == SLIDING)),
            num_meetings=jnp.any(changed) & idle,
        )

    def _may_leave(self, u: Params, before: Pattern, after: Pattern, surfaces: Surfaces, meeting: Array) -> Array:
        """Return whether a change of the pattern where surfaces meet may be the start of another branch.

        It is none if gates have only let go whose surfaces hold the flow still, by those that go on sliding.
        """
        changed = after.modes != before.modes
        let_go = changed & before.sliding
        doubtful = meeting & jnp.all(changed == let_go)
        return jax.lax.cond(doubtful, lambda: ~self.field.holds(u, after, surfaces, let_go), lambda: meeting)

    def _advance(self, state: State, t1: Array) -> tuple[Params, Any, Any, Any]:
        """Return the solver's step, its error, dense output and state."""
        args = (state.pattern, state.surfaces)
        inner, jumped, solver = state.solver, state.jumped, self.solver
        if isinstance(solver, TangentExponential):
            inner = jax.lax.cond(
                jumped, lambda: solver.restart(self.term, state.t, state.u, args, inner), lambda: inner
            )
        u1, error, dense, inner, _ = solver.step(self.term, state.t, t1, state.u, args, inner, jumped)
        return u1, error, dense, inner

    def _look(self, u: Params, pattern: Pattern, surfaces: Surfaces, length: Array) -> Look:
        """Return what is seen at u, in a step of this length."""
        motion = self.field.motion(u, pattern, surfaces)
        eps = jnp.finfo(self.zero.dtype).eps
        scale = self.field.field.eps
        unit = jnp.maximum(self.zero, GRAZE * scale * self._tolerance(u) * self.norms)
        signs = jnp.where(pattern.sliding, 0, jnp.where(pattern.modes == ON, 1, -1)) / unit
        slopes = signs * scale * motion.along(motion.velocity)

        def slide() -> tuple[Array, Array, Params]:
            gates, jumps = self.field.gate_values(u, pattern, motion)
            # A velocity is known to a share of the tolerance over the step; where c is small, so are gate values.
            known = jnp.maximum(LATE * self._tolerance(u) / length, jnp.finfo(self.zero.dtype).tiny)
            jump = jnp.abs(jumps) * jnp.sqrt(surfaces.squares(jumps.size))
            slack = jnp.where(jump > 0, known / jnp.where(jump > 0, jump, 1), FREE)
            inside = jnp.minimum(gates, 1 - gates) / jnp.clip(slack, 1e3 * eps, FREE)
            # Where c < 0 the field leads away from both sides, and nothing small keeps the flow there.
            attracted = jnp.sign(jumps) * jump / known
            inside = jnp.where(surfaces.stand_alone(jumps.size), jnp.minimum(inside, attracted), inside)
            back = motion.normal(surfaces.newton(motion.values))
            # At scale 0 nothing moves, and nothing slides.
            inverse = jnp.where(scale > 0, 1 / jnp.where(scale > 0, scale, 1), 0)
            return gates, inside, jtu.tree_map(lambda a: inverse.astype(a.dtype) * a, back)

        gates, inside, correction = jax.lax.cond(
            jnp.any(pattern.sliding),
            slide,
            lambda: (pattern.gates, jnp.zeros_like(slopes), jtu.tree_map(jnp.zeros_like, u)),
        )
        margins = jnp.where(pattern.sliding, inside, signs * motion.values)
        return Look(margins, slopes, gates, motion.values, motion.velocity, correction)

    def _tolerance(self, u: Params) -> Array:
        size = sum(leaf.size for leaf in jtu.tree_leaves(u))
        return self.rtol * tree_norm(u) + self.atol * math.sqrt(size)

    def _settle(self, pattern: Pattern, look: Look) -> Pattern:
        """Return the pattern with the gate values that were found; a tie that has been left is one no more."""
        sliding = pattern.sliding
        tied = jnp.abs(look.values) <= self.zero
        settled = jnp.where(tied, pattern.gates, pattern.modes.astype(pattern.gates.dtype))
        return Pattern(pattern.modes, jnp.where(sliding, jnp.clip(look.gates, 0, 1), settled))

    def _renew(self, u: Params, pattern: Pattern, surfaces: Surfaces, number: Array) -> Surfaces:
        """Return the surfaces with a row for a gate that has none yet, or else one of the rows taken anew, in turn."""

        def renew() -> Surfaces:
            slots = surfaces.slots
            bare = pattern.sliding.at[slots].set(False, mode="drop")
            old = jnp.minimum(slots[number % slots.size], pattern.modes.size - 1)
            index = jnp.where(jnp.any(bare), jnp.argmax(bare).astype(slots.dtype), old)
            return surfaces.with_row(index, self.field.row(u, pattern, index), pattern.sliding)

        return jax.lax.cond(jnp.any(pattern.sliding), renew, lambda: surfaces)

    def _judge(self, state: State, verdict: Any) -> Result:
        """Return why the flow has ended, if it has."""
        lost = state.changes > UNRESOLVED + jnp.sum(state.pattern.sliding)
        over = (state.counts.num_steps >= self.max_steps) & (state.index < self.ts.size)
        result: Any = state.result
        for happened, meant in (
            (verdict != diffrax.RESULTS.successful, RESULTS.dt_min_reached),
            (lost, RESULTS.kinks_unresolved),
            (over, RESULTS.max_steps_reached),
        ):
            ended: Any = meant
            result = RESULTS.where((result == RESULTS.successful) & happened, ended, result)
        return as_result(result)


def follow_through_kinks(
    field: GatedField,
    solver: diffrax.AbstractSolver,
    controller: diffrax.AbstractStepSizeController,
    ts: Array,
    observe: Callable[[Params], Any],
    *,
    rtol: Array,
    atol: Array,
    dt0: Any,
    max_steps: int,
    to_infinity: bool,
    progress: diffrax.AbstractProgressMeter,
) -> tuple[Any, Result, dict[str, Array]]:
    """Return what is observed along a flow at ts, how it ended, and what it took and met."""
    u0 = jtu.tree_map(jnp.zeros_like, field.field.coordinates)
    values, pattern = field.start(u0)
    dtype = values.dtype
    zero = ROUNDING * jnp.finfo(dtype).eps * jnp.max(jnp.abs(values))
    zero = jnp.where(zero > 0, zero, jnp.finfo(dtype).tiny)
    follower = Follower(
        field=field,
        solver=solver,
        controller=controller,
        ts=ts,
        observe=observe,
        rtol=rtol,
        atol=atol.astype(dtype),
        zero=zero,
        norms=field.norms(u0, pattern),
        meter=progress,
        rest=rtol * tree_norm(field.field(u0)) if to_infinity else None,
        max_steps=max_steps,
        stages=stages_of(solver),
    )
    start = follower.start(u0, values, pattern, observe(u0), dt0)
    state = jax.lax.while_loop(lambda s: follower.goes_on(s), lambda s: follower.step(s), start)  # noqa: PLW0108
    progress.close(state.progress)
    return state.saved, state.result, state.counts._asdict()
