r"""Finite differences of a model without cancellation.

$[h(w_0 + \epsilon u) - h(w_0)]/\epsilon$ is what a model at scale $\alpha = 1/\epsilon$ adds to its
start. Subtracting two nearly equal outputs loses every digit once $\epsilon$ is small: in float32
the relative error of the plain difference is of order 1 at $\alpha = 10^7$. Here the
program of h is instead walked once, every value carried with its divided difference (see
`pair`), and each primitive has a rule that maps the differences of its inputs to that
of its output without subtracting close numbers. At $\epsilon = 0$ the same walk is `jax.jvp`, so
$\alpha = \infty$ is an ordinary value, also inside `vmap`, `jit` and `grad`.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.extend import core
from jax.typing import ArrayLike

from lazyjax._core.checks import split_params
from lazyjax._core.forward import jvp
from lazyjax._core.program import as_function, literal_value
from lazyjax._core.types import Params
from lazyjax.difference.control_flow import CONTROL_RULES, is_known
from lazyjax.difference.measured import measured
from lazyjax.difference.pair import (
    Moved,
    Step,
    Switched,
    Value,
    bind,
    delta_or_zeros,
    is_floating,
    is_pair,
    old_of,
)
from lazyjax.difference.piecewise import COMPARISONS, at_both_ends, compare
from lazyjax.difference.rules import COMPLEX_RULES, RULES


def finite_jvp(
    h: Callable[[Any], Any],
    w0: Params,
    u: Params,
    eps: ArrayLike,
    *,
    difference: str = "exact",
) -> Any:
    r"""Evaluate $[h(w_0 + \epsilon u) - h(w_0)]/\epsilon$ to rounding, whatever $\epsilon$ is.

    At $\epsilon = 0$ it is $Dh(w_0)u$, `jax.jvp`'s value with its conventions at kinks. It costs a
    small multiple of `jax.jvp`, and passes through `jit`, `vmap` (also over `eps`, zeros included)
    and `grad` with respect to `w0`, `u` and `eps`.

    Linear algebra and special functions are differenced by the better of two ways (see `measured`); eigenvectors and
    orthogonal factors keep their signs along the step. A loop that takes another number of turns at the end of the
    step makes h jump, and so its difference.

    Rounding is relative to the values of h and to how far they move. Maxima, comparisons and branches
    are followed where the step crosses a kink; what remains there is the rounding of the crossing value
    itself, divided by $\epsilon$. A `jax.lax.stop_gradient`
    only stops the limit $\epsilon = 0$, a `jax.custom_jvp` rule is used there and its function is
    differenced elsewhere; a `jax.custom_vjp` function is always differenced itself: at
    $\epsilon = 0$ the derivative is that of the program it runs.

    Args:
        h: Model, parameters to a pytree of floating arrays, the data inside.
        w0: Base point; any pytree. Its real floating array leaves are the coordinates, everything
            else passes through untouched. Arithmetic is in their dtypes.
        u: Direction, of the structure of `w0`; leaves that are no coordinates are ignored and
            may be None.
        eps: Step size, a real scalar of either sign; 0 gives the derivative. A size below the
            smallest normal number of the dtype counts as 0.
        difference: "exact" walks the program of h; "plain" subtracts two evaluations of h, which
            loses about $\log_{10}(1/\epsilon)$ digits: in float64 with a moderate `eps`.

    Returns:
        The divided difference, of the structure, shapes and dtypes of h's output.

    Raises:
        TypeError: `w0` has no floating array, or a complex one.
        ValueError: `w0` is not finite, `u` does not match it, `eps` is no finite real scalar, h returns
            something other than real floating arrays or applies a primitive without a derivative.

    Source:
        Chizat, Oyallon, Bach (2019), equation (2), in the coordinates $u = \alpha(w - w_0)$.

    Example:
        >>> w0, u = jnp.array([1.0, 2.0], jnp.float32), jnp.array([1.0, 1.0], jnp.float32)
        >>> print(f"{finite_jvp(lambda w: w[0] * w[1] ** 2, w0, u, 1e-12):.5f}")
        8.00000
        >>> print(f"{finite_jvp(lambda w: w[0] * w[1] ** 2, w0, u, 0.5):.5f}")
        10.75000
    """
    return finite_value_and_jvp(h, w0, u, eps, difference=difference)[1]


def finite_value_and_jvp(
    h: Callable[[Any], Any],
    w0: Params,
    u: Params,
    eps: ArrayLike,
    *,
    difference: str = "exact",
) -> tuple[Any, Any]:
    r"""Evaluate $h(w_0)$ and `finite_jvp(h, w0, u, eps)` together, at the cost of the latter.

    Args:
        h: Model, parameters to a pytree of floating arrays.
        w0: Base point.
        u: Direction.
        eps: Step size, a real scalar.
        difference: See `finite_jvp`.

    Returns:
        $h(w_0)$ and the divided difference, two pytrees of one structure.

    Raises:
        TypeError: As for `finite_jvp`.
        ValueError: As for `finite_jvp`.

    Example:
        >>> value, slope = finite_value_and_jvp(jnp.square, jnp.float32(3.0), jnp.float32(1.0), 0.5)
        >>> print(value, slope)
        9.0 6.5
    """
    if difference not in ("exact", "plain"):
        msg = f"difference must be 'exact' or 'plain', got {difference!r}."
        raise ValueError(msg)
    leaves, rebuild = coordinates_of(w0)
    directions = _directions(w0, u, leaves)
    # A step is measured in the widest dtype; values of narrower ones round it.
    dtype = max((leaf.dtype for leaf in leaves), key=lambda d: jnp.finfo(d).bits)
    size, known = _step_size(eps, dtype)

    def program(*coordinates: Any) -> Any:
        return h(rebuild(coordinates))

    closed, shapes = jax.make_jaxpr(program, return_shape=True)(*leaves)
    _check_outputs(closed.out_avals)
    step = Step.of_size(size, never_zero=known is not None and known != 0)
    if known == 0:
        old, delta = jvp(core.jaxpr_as_fun(closed), leaves, directions)
    elif difference == "plain":
        old, delta = _plain(core.jaxpr_as_fun(closed), leaves, directions, step)
    else:
        pairs = [Moved(z, d) for z, d in zip(leaves, directions, strict=True)]
        outs = _walk(step, closed.jaxpr, closed.consts, pairs)
        old = [jnp.asarray(old_of(out)) for out in outs]
        delta = [delta_or_zeros(out) for out in outs]
    structure = jax.tree.structure(shapes)
    return jax.tree.unflatten(structure, old), jax.tree.unflatten(structure, delta)


def check_difference(h: Callable[[Any], Any], w0: Params) -> None:
    """Check that h can be differenced, by tracing alone; nothing is traced but h if all its primitives have rules.

    Raises:
        ValueError: as for `finite_jvp`.
    """
    leaves, rebuild = coordinates_of(w0)
    shapes = [jax.ShapeDtypeStruct(z.shape, z.dtype) for z in leaves]
    closed = jax.make_jaxpr(lambda *coordinates: h(rebuild(coordinates)))(*shapes)
    if not is_known(closed.jaxpr):
        eps = jax.ShapeDtypeStruct((), leaves[0].dtype)
        jax.eval_shape(lambda eps, *z: finite_jvp(lambda w: h(rebuild(w)), z, z, eps), eps, *shapes)


def coordinates_of(w0: Params) -> tuple[list[Any], Callable[[Sequence[Any]], Any]]:
    """Return the floating leaves of a pytree, and the function that puts them back."""
    params, rest = split_params(w0)
    leaves, structure = jax.tree.flatten(params)

    def rebuild(coordinates: Sequence[Any]) -> Any:
        return eqx.combine(jax.tree.unflatten(structure, coordinates), rest)

    return [jnp.asarray(leaf) for leaf in leaves], rebuild


def _directions(w0: Params, u: Params, leaves: Sequence[Any]) -> list[Any]:
    """Return the leaves of u that belong to coordinates of w0, checked, in their dtypes."""
    at_w0, structure = jax.tree.flatten(w0, is_leaf=lambda x: x is None)
    at_u, other = jax.tree.flatten(u, is_leaf=lambda x: x is None)
    if structure != other:
        msg = (
            f"u must have the structure of w0, {structure}, got {other}; "
            "build it with jax.tree.map over w0 or equinox.filter(w0, equinox.is_inexact_array)."
        )
        raise ValueError(msg)
    chosen = [d for z, d in zip(at_w0, at_u, strict=True) if eqx.is_inexact_array(z)]
    for leaf, direction in zip(leaves, chosen, strict=True):
        if not eqx.is_inexact_array(direction) or direction.shape != leaf.shape or jnp.iscomplexobj(direction):
            got = f"{direction.shape} {direction.dtype}" if eqx.is_array(direction) else repr(direction)
            msg = (
                "u must have a real floating array of the same shape for each coordinate of w0, "
                f"expected shape {leaf.shape} and a dtype like {leaf.dtype}, got {got}; "
                "build it with jax.tree.map over w0."
            )
            raise ValueError(msg)
    return [jnp.asarray(d).astype(z.dtype) for z, d in zip(leaves, chosen, strict=True)]


def _step_size(eps: ArrayLike, dtype: Any) -> tuple[Any, float | None]:
    """Return eps in a dtype, and its value as a number if it is known while tracing."""
    if jnp.shape(eps) != () or jnp.issubdtype(jnp.result_type(eps), jnp.complexfloating):
        msg = (
            f"eps must be a real scalar, got shape {jnp.shape(eps)} and dtype "
            f"{jnp.result_type(eps)}; use jax.vmap for several step sizes."
        )
        raise ValueError(msg)
    size = jnp.asarray(eps).astype(dtype)
    try:
        known = float(size)
    except jax.errors.ConcretizationTypeError:
        return size, None
    if not math.isfinite(known):
        msg = f"eps must be finite, got {known}; eps = 0 gives the derivative."
        raise ValueError(msg)
    return size, known if abs(known) >= float(jnp.finfo(dtype).tiny) else 0.0


def _check_outputs(avals: Sequence[Any]) -> None:
    for aval in avals:
        if not jnp.issubdtype(aval.dtype, jnp.floating):
            msg = (
                f"h must return real floating arrays, got dtype {aval.dtype} of shape "
                f"{aval.shape}; return scores or logits instead of classes."
            )
            raise ValueError(msg)


def _plain(
    program: Callable[..., list[Any]], leaves: list[Any], directions: list[Any], step: Step
) -> tuple[list[Any], list[Any]]:
    """Return h(w0) and the difference of two evaluations, the derivative at eps = 0."""
    pairs = [Moved(z, d) for z, d in zip(leaves, directions, strict=True)]
    new = program(*[step.new_of(pair) for pair in pairs])
    if step.never_zero:
        old = program(*leaves)
        return old, [step.quotient(b - a) for a, b in zip(old, new, strict=True)]
    old, tangents = jvp(program, leaves, directions)
    return old, [
        jnp.where(step.is_zero(a.dtype), t, step.quotient(b - a)) for a, b, t in zip(old, new, tangents, strict=True)
    ]


def _walk(step: Step, jaxpr: core.Jaxpr, consts: Sequence[Any], values: Sequence[Value]) -> list[Value]:
    """Evaluate a jaxpr on values and pairs."""
    env: dict[core.Var, Value] = dict(zip(jaxpr.constvars, consts, strict=True))
    env.update(zip(jaxpr.invars, values, strict=True))

    def read(atom: Any) -> Value:
        return literal_value(atom) if isinstance(atom, core.Literal) else env[atom]

    for eqn in jaxpr.eqns:
        outs = _apply(step, eqn, [read(atom) for atom in eqn.invars])
        env.update(zip(eqn.outvars, outs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _apply(step: Step, eqn: core.JaxprEqn, values: list[Value]) -> list[Value]:
    """Evaluate one equation on values and pairs."""
    name = eqn.primitive.name
    olds = [old_of(v) for v in values]
    if not any(is_pair(v) for v in values) or not eqn.outvars:
        return as_function(eqn)(*olds)
    if name in CONTROL_RULES:
        return CONTROL_RULES[name](_walk, step, eqn, values)
    moves = any(isinstance(v, Moved) for v in values)
    if name == "bitcast_convert_type" and is_floating(eqn.outvars[0].aval):
        msg = (
            "h makes numbers of bits that depend on the parameters, by the primitive 'bitcast_convert_type', and no "
            "difference keeps their digits; compute with the numbers instead."
        )
        raise ValueError(msg)
    if name in COMPARISONS and moves:
        return compare(step, eqn, values)
    if not moves or not any(is_floating(v.aval) for v in eqn.outvars):
        return at_both_ends(step, eqn, values)
    has_rule = name in RULES and (name in COMPLEX_RULES or not any(jnp.iscomplexobj(old) for old in olds))
    return _ruled(step, eqn, values) if has_rule else measured(step, eqn, values)


def _ruled(step: Step, eqn: core.JaxprEqn, values: list[Value]) -> list[Value]:
    """Apply the rule of a floating primitive, and add a jump where discrete operands switch from i0 to i1.

    f(z + eps d, i1) - f(z, i0) = [f(z + eps d, i1) - f(z, i1)] + [f(z, i1) - f(z, i0)].
    """
    settled = [v.new if isinstance(v, Switched) else v for v in values]
    outs = bind(eqn, [old_of(v) for v in settled])
    rule = RULES[eqn.primitive.name]
    deltas = [
        delta if delta.shape == out.shape else jnp.broadcast_to(delta, out.shape)
        for delta, out in zip(rule(step, eqn, outs, settled), outs, strict=True)
    ]
    if any(isinstance(v, Switched) for v in values):
        before = bind(eqn, [old_of(v) for v in values])
        deltas = [d + step.jump(b, a) for d, b, a in zip(deltas, outs, before, strict=True)]
        outs = before
    return [Moved(out, delta) for out, delta in zip(outs, deltas, strict=True)]
