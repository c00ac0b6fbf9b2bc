r"""The difference of any primitive with a derivative: the one of two ways that is measured to be better.

Factorizations and special functions have no identity that keeps digits. Along the step $z(s) = z + s\epsilon\delta$

    near = mean over s of DF(z(s)) delta        Gauss-Legendre nodes: exact to rounding where the step is small
    far  = [F(z(1)) - F(z)] / epsilon           exact to rounding where the step is large

The rounding of the second is known: that of F, and what the rounding of z makes of it, both divided by epsilon. Within
it the two agree wherever the mean over the nodes is right, and there the mean is taken, else the plain difference.
Where they are compared is one entry of an elementwise function, one matrix of a factorization, or a whole array.

Eigenvectors and orthogonal factors are determined up to signs (phases, if complex) only: those at the end of the step
and at the nodes are aligned with those at its start, since the sign that a library picks may change at any step.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from lazyjax._core.forward import jvp
from lazyjax._core.program import as_function
from lazyjax.difference.pair import Moved, Step, Switched, Value, is_floating, old_of, unit_roundoff

ELEMENTWISE = (
    *("polygamma", "igamma", "igammac", "regularized_incomplete_beta", "random_gamma_grad"),
    *("acos", "acosh", "asin", "asinh", "atan", "atanh", "log", "log1p", "pow", "rsqrt", "sign", "sqrt"),
)
"""Primitives that act entry by entry."""

PROBABILITIES = ("igamma", "igammac", "regularized_incomplete_beta")
"""Primitives that are computed as one minus another number, with its rounding, also where they are small."""

FACTORIZATIONS = ("cholesky", "eig", "eigh", "lu", "qr", "schur", "svd", "tridiagonal_solve")
"""Primitives that act matrix by matrix, on the last two axes of their last operand."""

AGREE, AGREE_ELEMENTWISE = 16.0, 64.0
"""How many roundings of the plain difference the two ways may differ by; special functions are good to tens of them."""

NODES, NODES_ELEMENTWISE = 4, 6
"""Nodes of the mean: a factorization costs far more than an elementwise function."""


def measured(step: Step, eqn: core.JaxprEqn, values: Sequence[Value]) -> list[Value]:
    """Difference one equation by the better of two ways.

    Raises:
        ValueError: the primitive has no derivative.
    """
    settled = [v.new if isinstance(v, Switched) else v for v in values]
    moving = [i for i, v in enumerate(settled) if isinstance(v, Moved)]
    olds = [jnp.asarray(old_of(v)) for v in settled]
    floating = [is_floating(v.aval) for v in eqn.outvars]
    function = as_function(eqn)

    def run(args: Sequence[Any]) -> list[Any]:
        full = list(olds)
        for i, arg in zip(moving, args, strict=True):
            full[i] = arg
        return function(*full)

    def slopes(args: Sequence[Any], directions: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        """Return all outputs, and the derivatives of those that are floating."""
        outs, tangents = jvp(lambda *z: [o for o, f in zip(run(z), floating, strict=True) if f], args, directions)
        full = iter(zip(outs, tangents, strict=True))
        pairs = [next(full) if f else (None, None) for f in floating]
        return [p[0] for p in pairs], [p[1] for p in pairs]

    starts = [olds[i] for i in moving]
    deltas = [values[i].delta for i in moving]
    steps = [step.scaled(d) for d in deltas]
    _check_derivative(eqn, lambda: jax.eval_shape(slopes, starts, deltas))
    start, end = run(starts), run([z + e for z, e in zip(starts, steps, strict=True)])
    start, end = _aligned(eqn, start, start, start), _aligned(eqn, start, end, end)
    same = [jnp.all(a == b) for a, b, f in zip(start, end, floating, strict=True) if not f]

    elementwise = eqn.primitive.name in ELEMENTWISE
    nodes = np.polynomial.legendre.leggauss(NODES_ELEMENTWISE if elementwise else NODES)
    places, weights = (nodes[0] + 1) / 2, nodes[1] / 2

    def along(place: Any, noisy: Any) -> list[Any]:
        """Return the derivatives along the step at a place in it; if noisy, along what rounding does to its start."""
        points = [z + place.astype(e.dtype) * e for z, e in zip(starts, steps, strict=True)]
        directions = [jnp.where(noisy, _shaken(z), d) for z, d in zip(starts, deltas, strict=True)]
        here, tangents = slopes(points, directions)
        return _aligned(eqn, start, here, tangents)

    # All points in one program, the one that measures the rounding last.
    points = jnp.asarray([*places, 0.0]), jnp.asarray([*(False for _ in places), True])
    batched = eqn.primitive.name in (*ELEMENTWISE, *FACTORIZATIONS)
    found = jax.vmap(along)(*points) if batched else jax.lax.map(lambda point: along(*point), points)
    near = [t if t is None else jnp.tensordot(jnp.asarray(weights, t.dtype), t[:-1], 1) for t in found]
    shaken = [t if t is None else t[-1] for t in found]

    switched = any(isinstance(v, Switched) for v in values)
    first = function(*[jnp.asarray(old_of(v)) for v in values]) if switched else start
    outs: list[Value] = []
    for out, a, b, mean, noise in zip(first, start, end, near, shaken, strict=True):
        if not is_floating(a):
            outs.append(Switched(out, b))
            continue
        delta = _better(step, eqn, olds, mean, (a, b), noise, same)
        outs.append(Moved(out, delta + step.jump(a, out) if switched else delta))
    return outs


def _better(
    step: Step,
    eqn: core.JaxprEqn,
    operands: Sequence[Any],
    near: Any,
    ends: tuple[Any, Any],
    shaken: Any,
    same: Sequence[Any],
) -> Any:
    """Return the mean of the derivatives where it agrees with the plain difference to rounding, else the latter."""
    name, unit = eqn.primitive.name, unit_roundoff(near.dtype)
    far = step.quotient(ends[1] - ends[0])
    noise = [_sizes(eqn, operands, unit * step.quotient(z)) for z in (*ends, shaken)]
    bound = (AGREE_ELEMENTWISE if name in ELEMENTWISE else AGREE) * sum(noise)
    if name in PROBABILITIES:
        bound = bound + jnp.abs(step.quotient(jnp.full_like(bound, 2 * unit)))
    agree = _sizes(eqn, operands, near - far) <= bound
    for equal in same:  # other pivots make other factors
        agree = agree & equal
    if not step.never_zero:
        agree = agree | step.is_zero(far.dtype)
    return jnp.where(agree, near, far)


def _shaken(z: Any) -> Any:
    """Return what rounding may do to an operand, in units of rounding: its entries with mixed signs."""
    signs = jnp.where(jnp.cos(1 + 7 * jnp.arange(z.size)) > 0, 1, -1).reshape(z.shape)
    return z * signs.astype(z.dtype)


def _sizes(eqn: core.JaxprEqn, operands: Sequence[Any], z: Any) -> Any:
    """Return the sizes of the parts of an output for which one way is chosen, in a shape that broadcasts with it."""
    name = eqn.primitive.name
    if name in ELEMENTWISE:
        return jnp.abs(z)
    batch = operands[-1].ndim - 2 if name in FACTORIZATIONS else 0
    return jnp.sqrt(jnp.sum(jnp.abs(z) ** 2, axis=tuple(range(batch, z.ndim)), keepdims=True))


def _check_derivative(eqn: core.JaxprEqn, trace: Any) -> None:
    try:
        trace()
    except (NotImplementedError, TypeError, ValueError) as error:
        msg = (
            f"h applies the primitive {eqn.primitive.name!r} to values that depend on the parameters, and JAX has no "
            f"derivative of it ({error}); keep it away from the parameters by jax.lax.stop_gradient on its operands "
            "or write h without it."
        )
        raise ValueError(msg) from error


def _phase(first: Any, second: Any) -> Any:
    """Return the sign (phase) by which the columns of the second array come closest to those of the first."""
    overlap = jnp.sum(first * jnp.conj(second), axis=-2, keepdims=True)
    size = jnp.abs(overlap)
    unit = overlap / jnp.where(size == 0, 1, size).astype(overlap.dtype)
    return jnp.where(size == 0, jnp.ones_like(unit), unit)


def _aligned(eqn: core.JaxprEqn, start: Sequence[Any], here: Sequence[Any], values: Sequence[Any]) -> list[Any]:
    """Return outputs (or derivatives) at some point of the step with the signs of the outputs at its start."""
    values = list(values)
    name = eqn.primitive.name
    if name == "cholesky":
        values[0] = jnp.tril(values[0])  # nothing is said of the other half
    elif name == "eigh":
        values[0] = values[0] * _phase(start[0], here[0])
    elif name == "qr":
        phase = _phase(start[0], here[0])
        rows = jnp.conj(jnp.swapaxes(phase, -1, -2))
        values[0], values[1] = values[0] * phase, values[1] * rows[..., : values[1].shape[-2], :]
    elif name == "svd" and len(values) == 3:
        count = start[0].shape[-1]
        phase = _phase(start[1][..., :count], here[1][..., :count])
        left = jnp.concatenate([phase, jnp.ones_like(here[1][..., :1, count:])], axis=-1)
        right = jnp.concatenate([phase, jnp.ones_like(jnp.swapaxes(here[2], -1, -2)[..., :1, count:])], axis=-1)
        values[1] = values[1] * left
        values[2] = values[2] * jnp.conj(jnp.swapaxes(right, -1, -2))
    return values
