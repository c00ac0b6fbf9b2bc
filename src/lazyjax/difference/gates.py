r"""The kinks of a model as gates: its program with the branches of maxima, absolute values and selections given.

A piecewise smooth model is smooth inside each activation pattern. This transform walks the program of h, as
`finite_jvp` does, and turns every kink into a gate: with switching value g and gate value $\lambda$

    out = off + lambda (on - off),       lambda = 1 where g > 0, 0 where g < 0.

With the gates given, h is smooth in w, and g(w) tells where they switch. A flow that slides along g = 0 has a
$\lambda$ in between: an element of Clarke's subdifferential.

What is a gate: a maximum or minimum (also over an axis or a window, as pairs of a tournament), an absolute value, a
clamp, a sign, and a selection by the order of two numbers (`jnp.where(x > 0, ...)`, `x * (x > 0)`), if it depends on
the parameters and the outputs on it by more than `jax.lax.stop_gradient`: the maximum of a stable logsumexp is none.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jax import lax
from jax.extend import core
from jaxtyping import Array

from lazyjax._core.program import as_function, aval_of, literal_value
from lazyjax._core.types import Params
from lazyjax.difference.control_flow import CALLS, body_of, reached, reached_carries, scan_carries
from lazyjax.difference.finite_jvp import coordinates_of
from lazyjax.difference.pair import is_floating
from lazyjax.difference.pooling import Windows


class Kink(NamedTuple):
    """An array of gates of one primitive at one place of a program.

    Attributes:
        primitive: The primitive that switches.
        shape: The shape of its switching values.
        tie: The gate value at g = 0 by which the derivative is JAX's.
    """

    primitive: str
    shape: tuple[int, ...]
    tie: float


class NoGatesError(ValueError):
    """A program switches by a primitive of which no gates can be made."""


@dataclasses.dataclass
class Evaluation:
    """One evaluation of a program: gates are read, and switching values written, in the order of the program.

    Attributes:
        gates: An array per kink; None: as the switching values have it.
        between: An array of booleans per kink: which gates are mixed; None: those strictly between 0 and 1.
        kinks: The kinks met so far.
        values: Their switching values.
        custom: Whether the walk is inside a function with a derivative rule of its own, as relu is.
    """

    gates: Sequence[Array] | None = None
    between: Sequence[Array] | None = None
    kinks: list[Kink] = dataclasses.field(default_factory=list)
    values: list[Array] = dataclasses.field(default_factory=list)
    custom: bool = False

    def gate(self, primitive: str, g: Array) -> tuple[Array, Array]:
        """Return a new gate: its value, and whether it is mixed."""
        index = len(self.kinks)
        self.kinks.append(Kink(primitive, g.shape, 0.0 if self.custom else _tie(primitive)))
        self.values.append(g)
        if self.gates is None:
            return (g > 0).astype(g.dtype), jnp.zeros(g.shape, bool)
        gate = self.gates[index].astype(g.dtype)
        mixed = (gate > 0) & (gate < 1) if self.between is None else self.between[index]
        return gate, mixed

    def switch(self, primitive: str, g: Array, on: Array, off: Array) -> Array:
        """Return what a new gate lets through of two branches."""
        return mix(*self.gate(primitive, g), on, off)


TIES = {
    **dict.fromkeys(("max", "min", "sign", "reduce_max", "reduce_min"), 0.5),
    **dict.fromkeys(("clamp", "gt", "lt"), 0.0),
    **dict.fromkeys(("ge", "le", "reduce_window_max", "reduce_window_min"), 1.0),
}
"""The gate values at a tie that JAX's derivatives have; in functions with a rule of their own (relu) it is 0."""


@functools.cache
def _tie(primitive: str) -> float:
    if primitive == "abs":  # what it is has changed between versions of JAX: ask
        with jax.ensure_compile_time_eval():
            return 0.5 + 0.5 * float(jax.grad(jnp.abs)(0.0))
    return TIES[primitive]


def mix(gate: Array, mixed: Array, on: Array, off: Array) -> Array:
    """Return off + gate (on - off): selected, not weighted, where it is all or nothing."""
    # The branch that is not taken may be infinite.
    jump = jnp.where(mixed, on - off, 0)
    return jnp.where(mixed, off + gate.astype(jump.dtype) * jump, jnp.where(gate >= 0.5, on, off))


@dataclasses.dataclass(frozen=True)
class Order:
    """A comparison that is a gate: true where the gate is on (or off, if it is inverted)."""

    gate: Array
    mixed: Array

    def truth(self) -> Array:
        """Return the comparison as booleans."""
        return self.gate >= 0.5

    def number(self, dtype: Any) -> Array:
        """Return the comparison as a number, that of the gate where it is mixed."""
        return jnp.where(self.mixed, self.gate, self.truth().astype(self.gate.dtype)).astype(dtype)

    def inverted(self) -> "Order":
        """Return the opposite comparison."""
        return Order(1 - self.gate, self.mixed)

    def reshaped(self, function: Callable[[Array], Array]) -> "Order":
        """Return the comparison in another shape."""
        return Order(function(self.gate), function(self.mixed))


# ---- which values matter ----

FLAT = ("stop_gradient", "eq", "ne", "is_finite", "round", "floor", "ceil", "argmax", "argmin")
"""Primitives through which no derivative passes, though values do."""

SWITCHING = ("max", "min", "abs", "clamp", "sign", "reduce_max", "reduce_min", "reduce_window_max", "reduce_window_min")
ORDERS = ("lt", "le", "gt", "ge")
UNKNOWN = ("cummax", "cummin", "sort", "top_k", "approx_top_k", "round", "floor", "ceil", "rem")
"""Primitives that switch, and of which no gates are made."""

SHAPING = ("broadcast_in_dim", "reshape", "squeeze", "transpose", "expand_dims", "copy", "slice", "rev")
"""Primitives that only arrange the entries of one operand."""


def _inner(eqn: core.JaxprEqn) -> list[core.Jaxpr]:
    """Return the programs inside an equation."""
    values = [v for value in eqn.params.values() for v in (value if isinstance(value, tuple | list) else [value])]
    return [getattr(v, "jaxpr", v) for v in values if hasattr(getattr(v, "jaxpr", v), "eqns")]


def _switches(jaxpr: core.Jaxpr, *, beyond: str = "") -> bool:
    """Return whether anything in a program may be a kink, apart from what the primitive `beyond` runs."""
    names = {*SWITCHING, *ORDERS, *UNKNOWN, "cond"}
    eqns = [eqn for eqn in jaxpr.eqns if eqn.primitive.name != beyond]
    return any(e.primitive.name in names or any(_switches(j, beyond=beyond) for j in _inner(e)) for e in eqns)


def _live(jaxpr: core.Jaxpr, outs: Sequence[bool]) -> tuple[set[Any], list[bool]]:
    """Return the variables of a program that its flagged outputs depend on differentiably, or by a choice."""
    live = {v for v, flag in zip(jaxpr.outvars, outs, strict=True) if flag and isinstance(v, core.Var)}
    for eqn in reversed(jaxpr.eqns):
        if eqn.primitive.name in FLAT:
            continue
        flags = [v in live for v in eqn.outvars]
        if any(flags):
            wanted = [True] * len(eqn.invars)
            if eqn.primitive.name in CALLS:
                wanted = _live(body_of(eqn)[0], flags)[1]
            live.update(v for v, flag in zip(eqn.invars, wanted, strict=True) if flag and isinstance(v, core.Var))
    return live, [v in live for v in jaxpr.invars]


def _is_kinked(eqn: core.JaxprEqn) -> bool:
    """Return whether the derivative rule of a `custom_jvp` function switches: if not, it is smooth, whatever it runs.

    So logaddexp, which runs a maximum, is smooth, and relu is not.
    """
    if not _switches(body_of(eqn)[0]):
        return False
    avals = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in map(aval_of, eqn.invars)]
    moving = [i for i, a in enumerate(avals) if is_floating(a)]
    function = as_function(eqn)

    def tangents(args: list[Any], directions: list[Any]) -> list[Any]:
        def of_moving(*some: Any) -> list[Any]:
            full = list(args)
            for i, value in zip(moving, some, strict=True):
                full[i] = value
            return [out for out in function(*full) if is_floating(out)]

        return jax.jvp(of_moving, [args[i] for i in moving], directions)[1]

    closed = jax.make_jaxpr(tangents)(avals, [avals[i] for i in moving])
    return _switches(closed.jaxpr, beyond="custom_jvp_call")  # the function itself, which the rule may evaluate


# ---- the walk ----


@dataclasses.dataclass(frozen=True)
class Value:
    """A value of a program, and whether it depends on the parameters."""

    array: Any
    moves: bool


def _plain(value: Value) -> Any:
    return value.array.truth() if isinstance(value.array, Order) else value.array


def _walk(
    run: Evaluation, jaxpr: core.Jaxpr, consts: Sequence[Any], values: Sequence[Value], outs: Sequence[bool]
) -> list[Value]:
    """Evaluate a program whose outputs matter where they are flagged."""
    live, _ = _live(jaxpr, outs)
    env: dict[Any, Value] = {v: Value(c, False) for v, c in zip(jaxpr.constvars, consts, strict=True)}
    env.update(zip(jaxpr.invars, values, strict=True))

    def read(atom: Any) -> Value:
        return Value(literal_value(atom), False) if isinstance(atom, core.Literal) else env[atom]

    for eqn in jaxpr.eqns:
        flags = [v in live for v in eqn.outvars]
        env.update(zip(eqn.outvars, _apply(run, eqn, [read(a) for a in eqn.invars], flags), strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _apply(run: Evaluation, eqn: core.JaxprEqn, values: list[Value], live: list[bool]) -> list[Value]:
    """Evaluate one equation."""
    name, moves = eqn.primitive.name, any(v.moves for v in values)
    if moves and any(live):
        if name in RULES:
            return [Value(RULES[name](run, eqn, values), True)]
        if name in UNKNOWN or (name == "cond" and values[0].moves):
            msg = (
                f"h switches by the primitive {name!r}, of which no gates can be made; write it with maxima, "
                "absolute values or jnp.where."
            )
            raise NoGatesError(msg)
        if name in ("custom_jvp_call", *CALLS) and any(map(_switches, _inner(eqn))):
            if name != "custom_jvp_call" or _is_kinked(eqn):
                jaxpr, consts = body_of(eqn)
                outer, run.custom = run.custom, run.custom or name == "custom_jvp_call"
                outs = _walk(run, jaxpr, consts, values, live)
                run.custom = outer
                return outs
        elif name == "scan" and _switches(eqn.params["jaxpr"].jaxpr):
            return _scan(run, eqn, values, live)
        elif name in ("while", "cond") and any(map(_switches, _inner(eqn))):
            msg = f"h has kinks inside a {name!r} that depends on the parameters, of which no gates can be made."
            raise NoGatesError(msg)
    arrays = as_function(eqn)(*[_plain(v) for v in values])
    return [Value(array, moves) for array in arrays]


def _scan(run: Evaluation, eqn: core.JaxprEqn, values: list[Value], live: list[bool]) -> list[Value]:
    """Enter a loop: its gates have the turns as their first axis."""
    params = eqn.params
    jaxpr, consts = params["jaxpr"].jaxpr, params["jaxpr"].consts
    start, stop = scan_carries(params)
    carries = slice(start, stop)
    flags = reached_carries(jaxpr, [v.moves for v in values], carries)
    outs = [True] * (stop - start) + live[stop - start :]
    moved = reached(jaxpr, flags)
    fixed = [_plain(v) for v in values[:start]]
    first = len(run.kinks)
    inner: list[Kink] = []

    def turn(carry: list[Any], xs: tuple[list[Any], list[Any] | None, list[Any] | None]) -> Any:
        arrays, gates, between = xs
        here = Evaluation(gates, between, custom=run.custom)
        operands = [Value(a, f) for a, f in zip([*fixed, *carry, *arrays], flags, strict=True)]
        found = [_plain(v) for v in _walk(here, jaxpr, consts, operands, outs)]
        inner[:] = here.kinks
        return found[: stop - start], (found[stop - start :], here.values)

    initial = [jnp.asarray(_plain(v)) for v in values[carries]]
    scanned = [_plain(v) for v in values[stop:]]
    if run.gates is None:
        xs = (scanned, None, None)
    else:
        row = jtu.tree_map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), scanned)
        jax.eval_shape(lambda c, x: turn(c, (x, None, None)), initial, row)  # counts the kinks of a turn
        count = len(inner)
        between = None if run.between is None else list(run.between[first : first + count])
        xs = (scanned, list(run.gates[first : first + count]), between)
    carry, (ys, found) = lax.scan(turn, initial, xs, length=params["length"], reverse=params["reverse"])
    run.kinks.extend(k._replace(shape=(params["length"], *k.shape)) for k in inner)
    run.values.extend(found)
    return [Value(a, m) for a, m in zip([*carry, *ys], moved, strict=True)]


# ---- the rules ----


def _larger(run: Evaluation, name: str, a: Any, b: Any, sign: int = 1) -> Any:
    """Return the larger of two values (the smaller, with sign -1) through a gate that is on where it is the first."""
    a, b = jnp.broadcast_arrays(a, b)
    return run.switch(name, _gap(sign, a, b), a, b)


def _gap(sign: int, a: Any, b: Any) -> Any:
    """Return a - b, finite also if one of them is not."""
    largest = float(jnp.finfo(a.dtype).max)
    return sign * (jnp.clip(a, -largest / 2, largest / 2) - jnp.clip(b, -largest / 2, largest / 2))


def _is_infinite(value: Value) -> bool:
    """Return whether a value is a known infinity, with which a maximum or minimum does nothing."""
    return isinstance(value.array, np.ndarray | np.generic | float) and bool(np.all(np.isinf(value.array)))


def _binary(sign: int) -> Callable[..., Any]:
    def rule(run: Evaluation, eqn: core.JaxprEqn, values: list[Value]) -> Any:
        for one, other in (values, values[::-1]):
            if _is_infinite(one):
                return as_function(eqn)(*[_plain(v) for v in values])[0] if one.moves else other.array
        return _larger(run, eqn.primitive.name, *[v.array for v in values], sign=sign)

    return rule


def _reduce(sign: int) -> Callable[..., Any]:
    def rule(run: Evaluation, eqn: core.JaxprEqn, values: list[Value]) -> Any:
        axes, z = eqn.params["axes"], values[0].array
        rows = jnp.moveaxis(z, axes, range(len(axes)))
        rows = rows.reshape(-1, *rows.shape[len(axes) :])
        return _tournament(run, eqn.primitive.name, rows, sign)

    return rule


def _tournament(run: Evaluation, name: str, rows: Any, sign: int) -> Any:
    """Return the largest of the rows by pairs, half as many in each round."""
    while rows.shape[0] > 1:
        half = rows.shape[0] // 2
        left = rows[2 * half :]
        rows = jnp.concatenate([_larger(run, name, rows[:half], rows[half : 2 * half], sign), left])
    return rows[0]


def _window(sign: int) -> Callable[..., Any]:
    def rule(run: Evaluation, eqn: core.JaxprEqn, values: list[Value]) -> Any:
        z = values[0].array
        # What pads never wins, and a finite number keeps derivatives finite.
        fill = -sign * float(jnp.finfo(z.dtype).max) / 4
        rows = jnp.stack(list(Windows.of(eqn).slices(z, fill)))
        return _tournament(run, eqn.primitive.name, rows, sign)

    return rule


def _abs(run: Evaluation, eqn: core.JaxprEqn, values: list[Value]) -> Any:
    z = values[0].array
    return run.switch(eqn.primitive.name, z, z, -z)


def _sign(run: Evaluation, eqn: core.JaxprEqn, values: list[Value]) -> Any:
    z = values[0].array
    one = jnp.ones_like(z)
    return run.switch(eqn.primitive.name, z, one, -one)


def _clamp(run: Evaluation, eqn: core.JaxprEqn, values: list[Value]) -> Any:
    low, x, high = (v.array for v in values)
    name = eqn.primitive.name
    return _larger(run, name, _larger(run, name, x, low), high, sign=-1)


def _order(run: Evaluation, eqn: core.JaxprEqn, values: list[Value]) -> Any:
    a, b = (v.array for v in values)
    if not jnp.issubdtype(jnp.result_type(a), jnp.floating):
        return as_function(eqn)(*[_plain(v) for v in values])[0]
    sign = 1 if eqn.primitive.name in ("gt", "ge") else -1
    gate, mixed = run.gate(eqn.primitive.name, _gap(sign, *jnp.broadcast_arrays(a, b)))
    return Order(gate, mixed)


def _select(run: Evaluation, eqn: core.JaxprEqn, values: list[Value]) -> Any:
    del run
    which, *cases = values
    if isinstance(which.array, Order) and len(cases) == 2:
        off, on = (_plain(v) for v in cases)
        gate, mixed = which.array.gate, which.array.mixed
        if is_floating(jax.typeof(on)):
            shape = jnp.shape(on)
            return mix(jnp.broadcast_to(gate, shape), jnp.broadcast_to(mixed, shape), on, off)
    return as_function(eqn)(*[_plain(v) for v in values])[0]


def _convert(run: Evaluation, eqn: core.JaxprEqn, values: list[Value]) -> Any:
    del run
    (value,) = values
    dtype = eqn.params["new_dtype"]
    if isinstance(value.array, Order) and jnp.issubdtype(dtype, jnp.floating):
        return value.array.number(dtype)
    return as_function(eqn)(_plain(value))[0]


def _not(run: Evaluation, eqn: core.JaxprEqn, values: list[Value]) -> Any:
    del run
    (value,) = values
    return value.array.inverted() if isinstance(value.array, Order) else as_function(eqn)(_plain(value))[0]


def _shape(run: Evaluation, eqn: core.JaxprEqn, values: list[Value]) -> Any:
    del run
    value = values[0]
    if not isinstance(value.array, Order) or len(values) > 1:
        return as_function(eqn)(*[_plain(v) for v in values])[0]
    return value.array.reshaped(lambda a: eqn.primitive.bind(a, **eqn.params))


RULES: dict[str, Callable[[Evaluation, core.JaxprEqn, list[Value]], Any]] = {
    "max": _binary(1),
    "min": _binary(-1),
    "abs": _abs,
    "sign": _sign,
    "clamp": _clamp,
    "reduce_max": _reduce(1),
    "reduce_min": _reduce(-1),
    "reduce_window_max": _window(1),
    "reduce_window_min": _window(-1),
    "select_n": _select,
    "convert_element_type": _convert,
    "not": _not,
    **dict.fromkeys(ORDERS, _order),
    **dict.fromkeys(SHAPING, _shape),
}
"""What makes gates, and what passes a comparison on; each returns the one result of an equation."""


class Gated(NamedTuple):
    """The program of a model with its kinks as gates; made by `gated`.

    Attributes:
        kinks: Its kinks, in the order of the program; none if the model is smooth.
        run: `run(w, gates=None, mixed=None)` returns the outputs at parameters w, and the switching values, an array
            per kink. `gates` are the gate values, an array per kink; None: 1 where the switching value is positive, 0
            elsewhere. `mixed` tells which of them weigh both branches, by default those strictly between 0 and 1; the
            others let one branch through.
    """

    kinks: list[Kink]
    run: Callable[..., tuple[Any, list[Array]]]


def gated(h: Callable[[Any], Any], w0: Params) -> Gated:
    r"""Return a model with its kinks as gates: to evaluate it with the gates given, and to see where they switch.

    Between two switches h is the smooth function `lambda w: run(w, gates)[0]`. The signs of the switching values are
    its activation pattern.

    Args:
        h: Model, parameters to a pytree of floating arrays, the data inside.
        w0: Parameters; any pytree. Its real floating array leaves are the coordinates.

    Returns:
        `Gated`: `.kinks` and `.run`.

    Raises:
        NoGatesError: h switches by a primitive of which no gates can be made (a sort, a branch, a loop with kinks whose
            length depends on the parameters).
        TypeError, ValueError: w0 has no floating array, or is not finite.

    Source:
        Filippov (1988), Differential equations with discontinuous right-hand sides.

    Example:
        >>> h = lambda w: jax.nn.relu(w) + jnp.abs(w)
        >>> model = gated(h, jnp.array([1.0, -2.0]))
        >>> [kink.primitive for kink in model.kinks]
        ['max', 'abs']
        >>> outputs, values = model.run(jnp.array([1.0, -2.0]))
        >>> print(outputs, values[0])
        [2. 2.] [ 1. -2.]
        >>> print(model.run(jnp.array([1.0, -2.0]), [jnp.ones(2), jnp.ones(2)])[0])
        [ 2. -4.]
    """
    leaves, rebuild = coordinates_of(w0)
    kinks: list[Kink] = []
    jax.eval_shape(lambda c: kinks.extend(evaluate(h, rebuild(c))[1].kinks), leaves)

    def run(w: Params, gates: Sequence[Array] | None = None, mixed: Sequence[Array] | None = None) -> Any:
        outputs, here = evaluate(h, w, gates, mixed)
        return outputs, here.values

    return Gated(kinks, run)


def evaluate(
    h: Callable[[Any], Any], w: Params, gates: Sequence[Array] | None = None, mixed: Sequence[Array] | None = None
) -> tuple[Any, Evaluation]:
    """Return the outputs of h with its gates given, and what was met on the way; see `Gated`."""
    leaves, rebuild = coordinates_of(w)
    closed, shapes = jax.make_jaxpr(lambda *c: h(rebuild(c)), return_shape=True)(*leaves)
    here, jaxpr = Evaluation(gates, mixed), closed.jaxpr
    outs = _walk(here, jaxpr, closed.consts, [Value(c, True) for c in leaves], [True] * len(jaxpr.outvars))
    return jax.tree.unflatten(jax.tree.structure(shapes), [_plain(v) for v in outs]), here
