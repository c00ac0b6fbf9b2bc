"""A step-size controller that notices when the steps of another one have collapsed, and stops the solve.

The flow of a ReLU model slides along the kinks of its units (a Filippov mode): f points toward the kink from both
sides. An adaptive method crosses it back and forth at a step that its tolerance alone sets, for as long as it slides.
"""

from collections.abc import Callable
from typing import Any

import diffrax
import equinox as eqx
import jax.numpy as jnp
from diffrax import RESULTS
from jaxtyping import Array

WINDOW = 256
"""Attempts that must all be small before the steps count as collapsed."""

SMALL = 1 / 30
"""Share of the longest accepted step below which one is small: stiffness that grows with the features takes less."""

REJECTED = 0.25
"""Share of rejected attempts of a collapse: an explicit method at its stability bound rejects about a fifth."""

PROGRESS = 0.1
"""Share of the time gone by that the window must add in a flow without an end."""

COLLAPSED = RESULTS.max_steps_rejected
"""The result that the controller returns; nothing else in a flow does."""


class WatchState(eqx.Module):
    """The state of the watch.

    Attributes:
        inner: State of the wrapped controller.
        begin: Start of the flow.
        end: Its end.
        total: Attempts so far.
        longest: The longest accepted step.
        attempts: Attempts since the last accepted step that was not small.
        rejected: Those of them that were rejected.
        since: Time of that step.
    """

    inner: Any
    begin: Array
    end: Array
    total: Array
    longest: Array
    attempts: Array
    rejected: Array
    since: Array


class WatchedController(diffrax.AbstractAdaptiveStepSizeController):
    """A controller that wraps another one and watches its steps; implicit solvers take their tolerances from it."""

    rtol: Any
    atol: Any
    norm: Callable[[Any], Any]
    controller: diffrax.AbstractAdaptiveStepSizeController
    max_steps: int = eqx.field(static=True)

    def __init__(self, controller: diffrax.AbstractAdaptiveStepSizeController, max_steps: int) -> None:
        self.rtol, self.atol, self.norm = controller.rtol, controller.atol, controller.norm
        self.controller, self.max_steps = controller, max_steps

    def wrap(self, direction: Any) -> "WatchedController":
        """Return this watch over the wrapped controller's `wrap`."""
        wrapped = self.controller.wrap(direction)
        assert isinstance(wrapped, diffrax.AbstractAdaptiveStepSizeController)
        return WatchedController(wrapped, self.max_steps)

    def init(self, terms: Any, t0: Any, t1: Any, *args: Any, **kwargs: Any) -> tuple[Any, WatchState]:
        """Delegate to the wrapped controller; nothing has been attempted yet."""
        t_next, inner = self.controller.init(terms, t0, t1, *args, **kwargs)
        t0 = jnp.asarray(t0)
        zero = jnp.zeros_like(t0)  # counts too are held in the dtype of time, to be weighed against it
        return t_next, WatchState(inner, t0, jnp.asarray(t1, t0.dtype), zero, zero, zero, zero, t0)

    def adapt_step_size(
        self,
        t0: Any,
        t1: Any,
        y0: Any,
        y1_candidate: Any,
        args: Any,
        y_error: Any,
        error_order: Any,
        controller_state: WatchState,
    ) -> tuple[Any, Any, Any, Any, WatchState, RESULTS]:
        """Return the wrapped controller's answer, unless the steps have collapsed."""
        state = controller_state
        keep, next_t0, next_t1, jump, inner, result = self.controller.adapt_step_size(
            t0, t1, y0, y1_candidate, args, y_error, error_order, state.inner
        )
        length = t1 - t0
        small = length < SMALL * state.longest
        # A rejected step of usual length says nothing: only an accepted one ends a spell of small steps.
        over = keep & ~small
        attempts = jnp.where(over, 0.0, state.attempts + 1)
        rejected = jnp.where(over, 0.0, state.rejected + jnp.where(keep, 0.0, 1.0).astype(attempts.dtype))
        since = jnp.where(over, next_t0, state.since)
        longest = jnp.where(keep, jnp.maximum(state.longest, length), state.longest)
        total = state.total + 1
        stuck = (attempts >= WINDOW) & (rejected >= REJECTED * attempts)
        # What an attempt must add for the steps that are left to reach the end.
        needed = jnp.where(
            jnp.isinf(state.end),
            PROGRESS / WINDOW * (next_t0 - state.begin),
            (state.end - next_t0) / jnp.maximum(self.max_steps - total, 1),
        )
        stuck &= next_t0 - since < needed * attempts
        result = RESULTS.where(stuck & (result == RESULTS.successful), COLLAPSED, result)
        state = WatchState(inner, state.begin, state.end, total, longest, attempts, rejected, since)
        return keep, next_t0, next_t1, jump, state, result
