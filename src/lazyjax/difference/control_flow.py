r"""Difference rules of calls and control flow: each is entered, its body walked in pairs.

`walk(step, jaxpr, consts, values)`, which evaluates a program on pairs, is an argument, because it uses these rules.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core

from lazyjax._core.program import as_function
from lazyjax.difference import ordering
from lazyjax.difference.measured import measured
from lazyjax.difference.pair import (
    Moved,
    Step,
    Switched,
    Value,
    delta_of,
    derivative,
    is_floating,
    is_pair,
    old_of,
)
from lazyjax.difference.rules import RULES

Walk = Callable[[Step, core.Jaxpr, Sequence[Any], Sequence[Value]], list[Value]]
ControlRule = Callable[[Walk, Step, core.JaxprEqn, list[Value]], list[Value]]


def body_of(eqn: core.JaxprEqn) -> tuple[core.Jaxpr, Sequence[Any]]:
    """Return the program that a call runs and its constants, under whichever name it is kept."""
    for name in ("jaxpr", "call_jaxpr", "fun_jaxpr", "call"):
        if name in eqn.params:
            body = eqn.params[name]
            return (body.jaxpr, body.consts) if isinstance(body, core.ClosedJaxpr) else (body, ())
    msg = (
        f"h calls the primitive {eqn.primitive.name!r}, whose program cannot be found in its "
        f"parameters {sorted(eqn.params)}; write h without it."
    )
    raise ValueError(msg)


def _call(walk: Walk, step: Step, eqn: core.JaxprEqn, values: list[Value]) -> list[Value]:
    jaxpr, consts = body_of(eqn)
    return walk(step, jaxpr, consts, values)


def _custom_jvp(walk: Walk, step: Step, eqn: core.JaxprEqn, values: list[Value]) -> list[Value]:
    """Enter the function for eps != 0; at eps = 0 apply the custom rule, which decides ties for one.

    A function of primitives without a rule of their own (determinant, pseudo-inverse, a check that calls back) is
    differenced as one: it does not depend on the order of pivots or on signs of vectors, and its rule knows.
    """
    moves = any(isinstance(v, Moved) for v in values)
    if moves and not is_known(body_of(eqn)[0]):
        return measured(step, eqn, values)
    outs = _call(walk, step, eqn, values)
    if step.never_zero or not moves:
        return outs
    try:
        limits = derivative(eqn, values)
    except RuntimeError:
        # Solvers mark what no derivative passes (the sizes of their steps, behind a stop_gradient) by a rule that only
        # raises. There the difference is zero at eps = 0 already.
        return outs
    return [
        Moved(old_of(out), _at_zero(step, limit, delta_of(out))) if is_floating(var.aval) else out
        for var, out, limit in zip(eqn.outvars, outs, limits, strict=True)
    ]


def is_known(jaxpr: core.Jaxpr) -> bool:
    """Return whether every primitive of a program that gives floating numbers has a rule of its own."""
    for eqn in jaxpr.eqns:
        inner = [getattr(v, "jaxpr", v) for v in jax.tree.leaves(list(eqn.params.values()), is_leaf=_is_program)]
        if not all(is_known(j) for j in inner if hasattr(j, "eqns")):
            return False
        known = eqn.primitive.name in RULES or eqn.primitive.name in CONTROL_RULES
        if not known and any(is_floating(v.aval) for v in eqn.outvars) and eqn.invars:
            return False
    return True


def _is_program(value: Any) -> bool:
    return isinstance(value, core.ClosedJaxpr | core.Jaxpr)


def _at_zero(step: Step, limit: Any, delta: Any | None) -> Any:
    return jnp.where(step.is_zero(limit.dtype), limit, 0 if delta is None else delta)


def _stop_gradient(walk: Walk, step: Step, eqn: core.JaxprEqn, values: list[Value]) -> list[Value]:
    """Return the true difference for eps != 0, and zero at eps = 0, which is `jax.jvp`'s value."""
    del walk, eqn
    (value,) = values
    if step.never_zero or not isinstance(value, Moved):
        return [value]
    return [Moved(value.old, jnp.where(step.is_zero(value.old.dtype), 0, value.delta))]


def _identity(walk: Walk, step: Step, eqn: core.JaxprEqn, values: list[Value]) -> list[Value]:
    """Apply a primitive that returns its operands to the old values, and keep the differences."""
    del walk, step
    outs = as_function(eqn)(*[old_of(v) for v in values])
    return [v._replace(old=out) if is_pair(v) else out for v, out in zip(values, outs, strict=True)]


def reached(jaxpr: core.Jaxpr, flags: Sequence[bool]) -> list[bool]:
    """Return which outputs of a program may depend on the flagged inputs."""
    touched = {v for v, flag in zip(jaxpr.invars, flags, strict=True) if flag}
    for eqn in jaxpr.eqns:
        if any(v in touched for v in eqn.invars if isinstance(v, core.Var)):
            touched.update(eqn.outvars)
    return [isinstance(v, core.Var) and v in touched for v in jaxpr.outvars]


def reached_carries(jaxpr: core.Jaxpr, flags: list[bool], carries: slice) -> list[bool]:
    """Return `flags` with the loop-carried ones grown until the body adds no more."""
    while True:
        outs = reached(jaxpr, flags)[: carries.stop - carries.start]
        grown = [a or b for a, b in zip(flags[carries], outs, strict=True)]
        if grown == flags[carries]:
            return flags
        flags = flags[: carries.start] + grown + flags[carries.stop :]


def _lifted(value: Value, aval: Any, flag: bool) -> Value:
    """Return the value in the form that a loop or branch must return: a pair if flagged."""
    if not flag or is_pair(value):
        return value
    value = jnp.asarray(value)
    return Moved(value, jnp.zeros_like(value)) if is_floating(aval) else Switched(value, value)


def _lift_all(values: Sequence[Value], avals: Sequence[Any], flags: Sequence[bool]) -> list[Value]:
    return [_lifted(v, a, f) for v, a, f in zip(values, avals, flags, strict=True)]


def scan_carries(params: dict[str, Any]) -> tuple[int, int]:
    """Return where the carries lie among a scan's operands: constants, carries, scanned arrays."""
    if "num_consts" in params:
        return params["num_consts"], params["num_consts"] + params["num_carry"]
    # From JAX 0.11 on a tree of the three groups stands in place of the two numbers.
    constants, carries, _ = params["ft_in"].unpack()
    return len(constants), len(constants) + len(carries)


def _scan(walk: Walk, step: Step, eqn: core.JaxprEqn, values: list[Value]) -> list[Value]:
    params = eqn.params
    jaxpr, consts = params["jaxpr"].jaxpr, params["jaxpr"].consts
    start, stop = scan_carries(params)
    flags = reached_carries(jaxpr, [is_pair(v) for v in values], slice(start, stop))
    avals = [v.aval for v in jaxpr.invars[start:stop]]
    carry_flags = flags[start:stop]

    def body(carry: list[Value], xs: list[Value]) -> tuple[list[Value], list[Value]]:
        outs = walk(step, jaxpr, consts, [*values[:start], *carry, *xs])
        count = len(carry)
        return _lift_all(outs[:count], avals, carry_flags), outs[count:]

    carry, ys = lax.scan(
        body,
        [jnp.asarray(v) if not is_pair(v) else v for v in _lift_all(values[start:stop], avals, carry_flags)],
        values[stop:],
        length=params["length"],
        reverse=params["reverse"],
        unroll=params.get("unroll", 1),
    )
    return [*carry, *ys]


def _while(walk: Walk, step: Step, eqn: core.JaxprEqn, values: list[Value]) -> list[Value]:
    """Enter a loop as long as it goes on at both ends of the step; one that goes on at one end only, goes on there.

    With as many turns at both ends, no digit is lost. With another number of turns h jumps, and so does its difference.
    """
    params = eqn.params
    condition, body = params["cond_jaxpr"], params["body_jaxpr"]
    tests, start = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
    inputs = [is_pair(v) for v in values]
    carries = slice(start - tests, len(values) - tests)
    flags = reached_carries(body.jaxpr, inputs[tests:], carries)[carries]
    avals = [v.aval for v in body.jaxpr.invars[carries]]

    def going(carry: list[Value]) -> tuple[Any, Any]:
        (flag,) = walk(step, condition.jaxpr, condition.consts, [*values[:tests], *carry])
        return old_of(flag), step.new_of(flag)

    def turn(carry: list[Value]) -> list[Value]:
        outs = walk(step, body.jaxpr, body.consts, [*values[tests:start], *carry])
        outs = [v if is_pair(v) else jnp.asarray(v) for v in _lift_all(outs, avals, flags)]
        return [_chosen(jnp.logical_and(*going(carry)), out, kept) for out, kept in zip(outs, carry, strict=True)]

    initial = [v if is_pair(v) else jnp.asarray(v) for v in _lift_all(values[start:], avals, flags)]
    both = lax.while_loop(lambda carry: jnp.any(jnp.logical_and(*going(carry))), turn, initial)
    if not any(reached(condition.jaxpr, [*inputs[:tests], *flags])):
        return both
    before, after = (as_function(eqn)(*[end(v) for v in [*values[:start], *both]]) for end in (old_of, step.new_of))
    goes_on = jnp.not_equal(*going(both))
    outs: list[Value] = []
    for value, old, new in zip(both, before, after, strict=True):
        if isinstance(value, Moved):
            lanes = jnp.expand_dims(goes_on, tuple(range(goes_on.ndim, old.ndim)))
            outs.append(Moved(old, jnp.where(lanes, step.quotient(new - old), value.delta)))
        else:
            outs.append(Switched(old, new) if isinstance(value, Switched) else value)
    return outs


def _chosen(flags: Any, yes: Value, no: Value) -> Value:
    """Return a value after a turn of a loop, or without it in the lanes of a batch where the loop has ended."""
    if jnp.ndim(flags) == 0:  # it has not, or there would be no turn
        return yes
    return jax.tree.map(lambda a, b: jnp.where(jnp.expand_dims(flags, tuple(range(flags.ndim, a.ndim))), a, b), yes, no)


def _cond(walk: Walk, step: Step, eqn: core.JaxprEqn, values: list[Value]) -> list[Value]:
    """Enter the branch at the new end; if it switched, return the old branch's outputs and the jump."""
    index, operands = values[0], values[1:]
    branches = eqn.params["branches"]
    inputs = [is_pair(v) for v in operands]
    columns = zip(*(reached(b.jaxpr, inputs) for b in branches), strict=True)
    flags = [any(column) for column in columns]
    avals = [v.aval for v in eqn.outvars]

    def entered(branch: core.ClosedJaxpr) -> Callable[[list[Value]], list[Value]]:
        def run(args: list[Value]) -> list[Value]:
            outs = walk(step, branch.jaxpr, branch.consts, args)
            return [v if is_pair(v) else jnp.asarray(v) for v in _lift_all(outs, avals, flags)]

        return run

    runs = [entered(b) for b in branches]
    if not is_pair(index):
        return lax.switch(index, runs, operands)
    after = lax.switch(index.new, runs, operands)
    before = as_function(eqn)(*[old_of(v) for v in values])
    return [_switched(step, start, end, aval) for start, end, aval in zip(before, after, avals, strict=True)]


def _switched(step: Step, before: Any, after: Value, aval: Any) -> Value:
    """Return one output of a branch that may have switched."""
    if not is_floating(aval):
        return Switched(before, step.new_of(after))
    jump, delta = step.jump(old_of(after), before), delta_of(after)
    return Moved(before, jump if delta is None else delta + jump)


def _linear_solve(walk: Walk, step: Step, eqn: core.JaxprEqn, values: list[Value]) -> list[Value]:
    """Solve A x = b by a solver of its own: x moves by A^-1 (db - dA x), A at the end of the step."""
    lengths, programs = eqn.params["const_lengths"], eqn.params["jaxprs"]
    outs = as_function(eqn)(*[old_of(v) for v in values])
    constants, right = values[: len(values) - len(programs.matvec.out_avals)], values[-len(programs.matvec.out_avals) :]
    if len(outs) != len(right):
        return measured(step, eqn, values)  # a solver with something else to tell
    matrix = programs.matvec
    images = walk(step, matrix.jaxpr, matrix.consts, [*constants[: lengths.matvec], *outs])
    residuals = [_difference(b, image) for b, image in zip(right, images, strict=True)]
    deltas = as_function(eqn)(*[step.new_of(v) for v in constants], *residuals)
    return [Moved(out, delta) for out, delta in zip(outs, deltas, strict=True)]


def _difference(b: Value, image: Value) -> Any:
    """Return the difference of b without that of the other one."""
    first, second = (
        v.delta if isinstance(v, Moved) else jnp.zeros(jnp.shape(old_of(v)), jnp.result_type(old_of(v)))
        for v in (b, image)
    )
    return first - second


def _cumlogsumexp(walk: Walk, step: Step, eqn: core.JaxprEqn, values: list[Value]) -> list[Value]:
    """Add the logarithms of sums up pairwise."""

    def combine(x: Moved, y: Moved) -> Value:
        closed = jax.make_jaxpr(jnp.logaddexp)(x.old, y.old)
        return walk(step, closed.jaxpr, closed.consts, [x, y])[0]

    options = {name: eqn.params[name] for name in ("axis", "reverse")}
    return [lax.associative_scan(combine, values[0], **options)]


def _without_walk(rule: Callable[[Step, core.JaxprEqn, list[Value]], list[Value]]) -> ControlRule:
    return lambda walk, step, eqn, values: rule(step, eqn, values)  # noqa: ARG005


CALLS = (
    "jit",
    "pjit",
    "closed_call",
    "core_call",
    "core_closed_call",
    "remat",
    "remat2",
    "checkpoint",
    "composite",
    "custom_vmap_call",
    "custom_vjp_call",
    "custom_vjp_call_jaxpr",
)
"""Primitives that run one program."""

CONTROL_RULES: dict[str, ControlRule] = {
    **dict.fromkeys(CALLS, _call),
    "custom_jvp_call": _custom_jvp,
    "stop_gradient": _stop_gradient,
    "optimization_barrier": _identity,
    "device_put": _identity,
    "copy_to_host_async": _identity,
    "scan": _scan,
    "while": _while,
    "cond": _cond,
    "custom_linear_solve": _linear_solve,
    "cumlogsumexp": _cumlogsumexp,
    "sort": _without_walk(ordering.sort),
    "top_k": _without_walk(ordering.top_k),
}
