"""A model's jaxpr as data: one equation as a function, and one sample's program as a flat list of equations.

Arrays of the program are numbered (slots); equations inside calls (`jit`, rematerialization) stand in the list
like all others, without nesting. Control flow and custom derivatives stay one equation.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

_CALLS = ("jit", "pjit", "closed_call", "core_call", "core_closed_call", "remat", "remat2", "checkpoint")


def literal_value(literal: core.Literal) -> np.ndarray:
    """Return the constant of a jaxpr literal in its own dtype, which a bare Python number would lose."""
    return np.asarray(literal.val, dtype=jnp.result_type(literal.aval))


def aval_of(atom: Any) -> Any:
    """Return shape and dtype of an operand or result of an equation."""
    return atom.aval


@cache
def _empty_jaxpr() -> core.Jaxpr:
    """Return a jaxpr to `replace` the parts of; the constructor's signature varies between versions."""
    return jax.make_jaxpr(lambda: ())().jaxpr


def as_function(eqn: core.JaxprEqn) -> Callable[..., list[Any]]:
    """Return one equation as a function of its operands, its own differentiation rule included.

    The function evaluates a jaxpr of that single equation instead of calling `Primitive.bind`, because
    call-like primitives expect their parameters in a form that is no public interface.
    """
    names = list(dict.fromkeys(v for v in eqn.invars if isinstance(v, core.Var)))
    jaxpr = _empty_jaxpr().replace(invars=names, outvars=list(eqn.outvars), eqns=[eqn], effects=eqn.effects)
    closed = core.jaxpr_as_fun(core.ClosedJaxpr(jaxpr, []))

    def function(*args: Any) -> list[Any]:
        given = {v: a for v, a in zip(eqn.invars, args, strict=True) if isinstance(v, core.Var)}
        return list(closed(*(given[v] for v in names)))

    return function


@dataclass(frozen=True, eq=False)
class Constant:
    """An operand known while tracing."""

    value: np.ndarray


Operand = int | Constant
"""A slot, or a constant."""


@dataclass(frozen=True)
class Line:
    """One equation of a program: where its operands come from and the slots of its results."""

    eqn: core.JaxprEqn
    inputs: tuple[Operand, ...]
    outputs: tuple[int, ...]

    @property
    def name(self) -> str:
        """Name of the primitive."""
        return self.eqn.primitive.name


@dataclass
class Program:
    """A flat program.

    Attributes:
        avals: Shape and dtype of every slot.
        arguments: Slots of the arguments.
        constants: Values of the slots that hold closed-over arrays.
        lines: The equations, in order.
        output: Where the result is.
    """

    avals: list[Any] = field(default_factory=list)
    arguments: list[int] = field(default_factory=list)
    constants: dict[int, Any] = field(default_factory=dict)
    lines: list[Line] = field(default_factory=list)
    output: Operand = 0

    def slot(self, aval: Any) -> int:
        """Return a new slot."""
        self.avals.append(aval)
        return len(self.avals) - 1

    def _append(self, jaxpr: core.Jaxpr, consts: Sequence[Operand], inputs: Sequence[Operand]) -> list[Operand]:
        names: dict[Any, Operand] = dict(zip(jaxpr.constvars, consts, strict=True))
        names.update(zip(jaxpr.invars, inputs, strict=True))

        def read(atom: Any) -> Operand:
            return Constant(literal_value(atom)) if isinstance(atom, core.Literal) else names[atom]

        for eqn in jaxpr.eqns:
            operands = tuple(read(atom) for atom in eqn.invars)
            inner = eqn.params.get("jaxpr") if eqn.primitive.name in _CALLS else None
            if inner is not None:
                closed = inner if isinstance(inner, core.ClosedJaxpr) else core.ClosedJaxpr(inner, [])
                held = [self._constant(value) for value in closed.consts]
                outs = self._append(closed.jaxpr, held, operands)
            else:
                outs = [self.slot(v.aval) for v in eqn.outvars]
                self.lines.append(Line(eqn, operands, tuple(outs)))
            names.update(zip(eqn.outvars, outs, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def _constant(self, value: Any) -> int:
        slot = self.slot(jax.typeof(value))
        self.constants[slot] = value
        return slot


def trace(function: Callable[..., Any], *args: Any) -> Program:
    """Return the flat program of a function of arrays (or their shapes) with one array as its result."""
    closed = jax.make_jaxpr(function)(*args)
    program = Program()
    program.arguments = [program.slot(v.aval) for v in closed.jaxpr.invars]
    consts = [program._constant(value) for value in closed.consts]
    (program.output,) = program._append(closed.jaxpr, consts, program.arguments)
    return program


def run(
    program: Program,
    args: Sequence[Any],
    *,
    replace: Callable[[Line, list[Any]], list[Any] | None] | None = None,
    after: Callable[[int, Any], Any] | None = None,
) -> dict[int, Any]:
    """Evaluate a program and return the values of all slots.

    Args:
        program: From `trace`.
        args: Its arguments.
        replace: Another way to evaluate a line, or None for the line's own.
        after: Applied to each result (slot, value) as it is made.
    """
    values = dict(program.constants)
    values.update(zip(program.arguments, args, strict=True))
    for line in program.lines:
        operands = [value_of(values, operand) for operand in line.inputs]
        outs = None if replace is None else replace(line, operands)
        if outs is None:
            outs = as_function(line.eqn)(*operands)
        for slot, out in zip(line.outputs, outs, strict=True):
            values[slot] = out if after is None else after(slot, out)
    return values


def value_of(values: dict[int, Any], operand: Operand) -> Any:
    """Return the value of an operand."""
    return operand.value if isinstance(operand, Constant) else values[operand]
