r"""Forward products of functions that have only a reverse rule, as `jax.custom_vjp` gives them.

JAX refuses to push a tangent through a `custom_vjp` function. Here such a function is differentiated forward as the
program that it runs, and backward by its own rule: `jvp` and `linearize` below are JAX's, with every `custom_vjp` call
replaced by its program. Where a rule is the derivative of its program, as in `jax.experimental.ode.odeint` or diffrax's
adjoints, the two products are each other's transpose; where it is not (a gradient that is clipped or passed straight
through), no linear map has both, which `warn_if_apart` tells.
"""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jax.extend import core

from lazyjax._core.program import as_function, literal_value

CUSTOM_VJP = ("custom_vjp_call", "custom_vjp_call_jaxpr")
"""Primitives that run a program and have a reverse rule only."""

_CALLS = ("jit", "pjit", "closed_call", "core_call", "core_closed_call")

APART = 0.02
"""Relative difference of <r, Jv> and <J^T r, v> above which two products belong to different maps. Adjoints that solve
an equation of their own agree with the forward product to the tolerance of that solve only."""


def as_closed(body: Any) -> core.ClosedJaxpr:
    """Return the program of a parameter of an equation with its constants."""
    return body if isinstance(body, core.ClosedJaxpr) else core.ClosedJaxpr(body, [])


def _programs(eqn: core.JaxprEqn) -> list[Any]:
    """Return the programs among the parameters of an equation."""
    values = [v for value in eqn.params.values() for v in (value if isinstance(value, tuple | list) else [value])]
    return [v for v in values if isinstance(v, core.ClosedJaxpr | core.Jaxpr)]


def _holds_custom_vjp(body: Any) -> bool:
    """Return whether a program calls a `custom_vjp` function where a tangent would meet it."""
    return any(_meets_custom_vjp(eqn) for eqn in as_closed(body).jaxpr.eqns)


def _meets_custom_vjp(eqn: core.JaxprEqn) -> bool:
    if eqn.primitive.name == "custom_jvp_call":
        return False  # its own rule takes the tangents
    return eqn.primitive.name in CUSTOM_VJP or any(map(_holds_custom_vjp, _programs(eqn)))


def _entered(body: Any) -> core.ClosedJaxpr:
    """Return a program in which the programs of `custom_vjp` functions stand in place of their calls."""
    closed = as_closed(body)
    avals = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype, weak_type=v.aval.weak_type) for v in closed.jaxpr.invars]
    return jax.make_jaxpr(lambda *args: _run(closed, args))(*avals)


def _replaced(value: Any) -> Any:
    """Return a parameter of an equation with its programs entered."""
    if isinstance(value, core.ClosedJaxpr):
        return _entered(value) if _holds_custom_vjp(value) else value
    if isinstance(value, core.Jaxpr):
        return _entered(value).jaxpr if _holds_custom_vjp(value) else value
    if type(value) in (tuple, list):
        return type(value)(map(_replaced, value))
    return value


def _run(closed: core.ClosedJaxpr, args: Sequence[Any]) -> list[Any]:
    """Evaluate a program, entering `custom_vjp` functions."""
    env: dict[Any, Any] = dict(zip(closed.jaxpr.constvars, closed.consts, strict=True))
    env.update(zip(closed.jaxpr.invars, args, strict=True))

    def read(atom: Any) -> Any:
        return literal_value(atom) if isinstance(atom, core.Literal) else env[atom]

    for eqn in closed.jaxpr.eqns:
        values = [read(atom) for atom in eqn.invars]
        if not _meets_custom_vjp(eqn):
            outs = as_function(eqn)(*values)
        elif eqn.primitive.name in (*CUSTOM_VJP, *_CALLS):
            (inner,) = _programs(eqn)
            outs = _run(as_closed(inner), values)
        else:
            outs = as_function(eqn.replace(params={k: _replaced(v) for k, v in eqn.params.items()}))(*values)
        env.update(zip(eqn.outvars, outs, strict=True))
    return [read(atom) for atom in closed.jaxpr.outvars]


def program_of(function: Callable[..., Any], *args: Any) -> tuple[core.ClosedJaxpr, Any, bool]:
    """Return the program of a function of arrays, the tree of its outputs, and whether it has a reverse rule only."""
    closed, shapes = jax.make_jaxpr(function, return_shape=True)(*args)
    return closed, jtu.tree_structure(shapes), _holds_custom_vjp(closed)


def forward(function: Callable[..., Any], *args: Any) -> Callable[..., Any]:
    """Return a function, traced at these arguments, through which tangents can be pushed."""
    closed, structure, custom = program_of(function, *args)
    entered = core.jaxpr_as_fun(_entered(closed) if custom else closed)
    return lambda *given: structure.unflatten(entered(*jtu.tree_leaves(given)))


def jvp(function: Callable[..., Any], primals: Sequence[Any], tangents: Sequence[Any]) -> tuple[Any, Any]:
    """Return `jax.jvp(function, primals, tangents)`, of a `custom_vjp` function by the program that it runs."""
    return jax.jvp(forward(function, *primals), tuple(primals), tuple(tangents))


def linearize(function: Callable[..., Any], *primals: Any) -> tuple[Any, Callable[..., Any]]:
    """Return `jax.linearize(function, *primals)`, of a `custom_vjp` function by the program that it runs."""
    return jax.linearize(forward(function, *primals), *primals)


def hessian(function: Callable[[jax.Array], Any], primal: jax.Array) -> Any:
    """Return `jax.hessian(function)(primal)`, of a `custom_vjp` function by the program of its reverse rule."""
    return jax.jacfwd(forward(jax.jacrev(function), primal))(primal)


class Products(eqx.Module):
    r"""The products with the derivative D of a function at a point, which may leave the program that made them.

    Attributes:
        push: $v \mapsto Dv$.
        pull: $r \mapsto D^T r$ by the function's own reverse rule; None if it has none, and `push` can be transposed.
    """

    push: Callable[..., Any]
    pull: Callable[..., Any] | None

    def transpose(self, r: Any, like: Any) -> Any:
        r"""Return $D^T r$, a tree like the point."""
        pull = jax.linear_transpose(self.push, like) if self.pull is None else self.pull
        return pull(r)[0]

    def gap(self, value: Any, like: Any) -> Any:
        """Return by how much the two products differ, in two directions without symmetry; None if they cannot."""
        if self.pull is None:
            return None
        r, v = (
            jtu.tree_map(lambda z: jnp.cos(1 + jnp.arange(z.size)).astype(z.dtype).reshape(z.shape), tree)
            for tree in (value, like)
        )
        return gap_of_products(r, self.push(v), self.transpose(r, like), v)


def products(function: Callable[[Any], Any], primal: Any) -> tuple[Any, Products]:
    """Return the value of a function, and the products with its derivative.

    They share one evaluation, but for a function with a reverse rule of its own, which is evaluated for each.
    """
    closed, structure, custom = program_of(function, primal)

    def replay(body: core.ClosedJaxpr) -> Callable[[Any], Any]:
        run = core.jaxpr_as_fun(body)
        return lambda w: structure.unflatten(run(*jtu.tree_leaves(w)))

    value, push = jax.linearize(replay(_entered(closed) if custom else closed), primal)
    return value, Products(push, jax.vjp(replay(closed), primal)[1] if custom else None)


def gap_of_products(r: Any, pushed: Any, pulled: Any, v: Any) -> jax.Array:
    r"""Return $|\langle r, Jv\rangle - \langle J^T r, v\rangle|$ in proportion to the sizes of their terms."""
    terms = [
        [a.astype(jnp.result_type(float)) * b.astype(jnp.result_type(float)) for a, b in zip(*pair, strict=True)]
        for pair in ((jtu.tree_leaves(r), jtu.tree_leaves(pushed)), (jtu.tree_leaves(pulled), jtu.tree_leaves(v)))
    ]
    sums = [sum((jnp.sum(t) for t in side), start=jnp.zeros(())) for side in terms]
    # What rounding makes of the sums is in proportion to the roots of their sums of squares.
    sizes = [jnp.sqrt(sum((jnp.sum(t**2) for t in side), start=jnp.zeros(()))) for side in terms]
    size = jnp.maximum(*sizes)
    return jnp.where(size > 0, jnp.abs(sums[0] - sums[1]) / jnp.where(size > 0, size, 1), 0)


def warn_if_apart(gap: Any, stacklevel: int) -> None:
    """Warn that the reverse rule of a model is not the derivative of its program, from `gap_of_products`."""
    if float(np.asarray(gap)) > APART:
        warnings.warn(
            "h has a jax.custom_vjp rule that is not the derivative of the program that it runs: "
            f"<r, Dh v> and <Dh^T r, v> differ by {float(np.asarray(gap)):.1e} of their size at w0. "
            "Gradients use the rule, forward products and finite differences the program; write the model with "
            "jax.custom_jvp or jax.lax.stop_gradient if they are to agree.",
            stacklevel=stacklevel,
        )
