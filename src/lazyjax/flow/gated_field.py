r"""The right-hand side of a flow inside an activation pattern, and on the surfaces along which it slides.

Inside a pattern every gate is off or on (see `lazyjax.difference.gated`), and the field f is smooth. Where it points
to a surface g_s(w) = 0 from both sides, the flow slides along it (Filippov): the gate values $\lambda_s$ of the gates
that slide lie in (0, 1), so that $\dot g_s = 0$. The objective is smooth along the surfaces, and its gradient there is
the projection of f, taken with whatever gate values:

    u' = f - J^T mu        J J^T mu = J f        J: the rows grad g_s of the gates that slide

The $\mu$ tell how far the gate values are from those of f: $\mu_s = c_s (\lambda_s - \lambda_s^f)$, where the field
jumps by $-c_s \nabla g_s$ across the surface. So the flow leaves a surface when $\lambda_s$ arrives at 0 or 1.

Source: Filippov (1988), Differential equations with discontinuous right-hand sides; Dieci, Lopez (2012), A survey of
numerical methods for IVPs of ODEs with discontinuous right-hand side, J. Comput. Appl. Math. 236.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, Int

from lazyjax._core.trees import tree_norm
from lazyjax._core.types import Outputs, Params
from lazyjax.difference.gates import Kink, evaluate, gated
from lazyjax.flow.field import ModelField

OFF, ON, SLIDING = 0, 1, 2
"""The modes of a gate."""

SLOTS = 64
"""The number of gates that slide of which rows are kept to precondition with; others are solved for without."""

MOST_NUMBERS = 2**25
"""The most numbers that the rows may hold: fewer of them are kept of a large model."""

NUM_DIRECTIONS = 4
"""Random directions along which the norms of the gradients of switching values are estimated."""

SOLVE_STEPS = 60
"""Steps of conjugate gradients for the multipliers; preconditioned they take one to four."""

HELD = 0.01
"""Share of a surface's gradient that may be left outside the span of others that hold the flow on it."""

ALONE = 0.01
"""Most by which a number that comes back from the span of the surfaces may have changed where they are independent."""


class Pattern(eqx.Module):
    """The mode of every gate of a model.

    Attributes:
        modes: OFF, ON or SLIDING.
        gates: The gate values: 0 and 1 in the first two modes, but at a tie what JAX takes there.
    """

    modes: Int[Array, " s"]
    gates: Float[Array, " s"]

    @property
    def sliding(self) -> Array:
        """Return which gates slide, (s,) booleans."""
        return self.modes == SLIDING

    def with_modes(self, chosen: Array, modes: Array) -> "Pattern":
        """Return the pattern with new modes for the chosen gates; one that begins to slide is taken half open."""
        modes = jnp.where(chosen, modes.astype(self.modes.dtype), self.modes)
        settled = jnp.where(modes == SLIDING, 0.5, modes.astype(self.gates.dtype))
        return Pattern(modes, jnp.where(chosen, settled, self.gates))


class Surfaces(eqx.Module):
    """The rows grad g_s of gates that slide, to precondition JJ^T with; a row may be that of an earlier point.

    Attributes:
        slots: Which gate each row belongs to; s, the number of gates, if it is empty.
        rows: The rows.
        products: rows rows^T.
        factor: The Cholesky factor of it, the identity in empty slots.
        alone: Which rows are no combinations of the others.
    """

    slots: Int[Array, " k"]
    rows: Float[Array, "k p"]
    products: Float[Array, "k k"]
    factor: Float[Array, "k k"]
    alone: Bool[Array, " k"]

    @classmethod
    def empty(cls, num_gates: int, num_params: int, dtype: Any) -> "Surfaces":
        """Return empty slots."""
        k = max(1, min(SLOTS, num_gates, MOST_NUMBERS // num_params))
        zeros = jnp.zeros((k, k), dtype)
        slots, rows, one = jnp.full(k, num_gates, jnp.int32), jnp.zeros((k, num_params), dtype), jnp.eye(k, dtype=dtype)
        return cls(slots, rows, zeros, one, jnp.zeros(k, bool))

    def solve(self, r: Float[Array, " s"]) -> Float[Array, " s"]:
        """Return about (JJ^T)^-1 r for an r that is zero off the gates that slide."""
        mine = r.at[self.slots].get(mode="fill", fill_value=0)
        return r.at[self.slots].set(jax.scipy.linalg.cho_solve((self.factor, True), mine), mode="drop")

    def newton(self, g: Float[Array, " s"]) -> Float[Array, " s"]:
        """Return about (JJ^T)^-1 g, for the gates with a slot only: it is a step back onto their surfaces."""
        mine = g.at[self.slots].get(mode="fill", fill_value=0)
        solved = jax.scipy.linalg.cho_solve((self.factor, True), mine)
        return jnp.zeros_like(g).at[self.slots].set(solved, mode="drop")

    def squares(self, num_gates: int) -> Float[Array, " s"]:
        """Return |grad g_s|^2 of the gates with a slot, 1 for the others."""
        return jnp.ones(num_gates, self.rows.dtype).at[self.slots].set(jnp.diag(self.products), mode="drop")

    def with_row(self, index: Array, row: Float[Array, " p"], sliding: Array) -> "Surfaces":
        """Return the surfaces of the gates that slide, with a new row for one of them; without the other gates."""
        num_gates, k = sliding.size, self.slots.size
        slots = jnp.where(sliding.at[self.slots].get(mode="fill", fill_value=False), self.slots, num_gates)
        mine, free = slots == index, slots == num_gates
        slot = jnp.where(jnp.any(mine), jnp.argmax(mine), jnp.where(jnp.any(free), jnp.argmax(free), k))
        slot = jnp.where(sliding[index], slot, k)  # k is out of range: nothing is written
        slots = slots.at[slot].set(index.astype(slots.dtype), mode="drop")
        taken = slots < num_gates
        rows = jnp.where(taken[:, None], self.rows, 0).at[slot].set(row, mode="drop")
        products = jnp.where(taken[:, None] & taken[None, :], self.products, 0)
        products = products.at[slot].set(rows @ row, mode="drop").at[:, slot].set(rows @ row, mode="drop")
        # Rows may depend on each other: two samples on one line hold a unit at the same point.
        diagonal, root = jnp.diag(products), jnp.sqrt(jnp.finfo(rows.dtype).eps)
        shift = jnp.where(diagonal > 0, root * jnp.max(diagonal), 1)
        factor = jnp.linalg.cholesky(products + jnp.diag(shift))
        # What no combination of rows to zero takes part in comes back unchanged.
        probe = jnp.linspace(1, 2, k, dtype=rows.dtype)
        returned = jax.scipy.linalg.cho_solve((factor, True), products @ probe)
        return Surfaces(slots, rows, products, factor, jnp.abs(returned - probe) < ALONE)

    def stand_alone(self, num_gates: int) -> Bool[Array, " s"]:
        """Return which gates slide along surfaces that the others do not hold the flow on."""
        return jnp.zeros(num_gates, bool).at[self.slots].set(self.alone, mode="drop")


class GatedField(eqx.Module):
    """The field of a model with its gates given.

    Attributes:
        field: The field of the flow, with the gates as they are.
        directions: Random directions of the parameters, stacked: drawn once, since that takes as long as a look.
        kinks: The model's kinks; none if it is smooth.
    """

    field: ModelField
    directions: Params
    kinks: tuple[Kink, ...] = eqx.field(static=True)

    @classmethod
    def of(cls, field: ModelField) -> "GatedField":
        """Return the gated field of a flow.

        Raises:
            NoGatesError: the model switches by a primitive of which no gates can be made.
        """
        kinks = tuple(gated(field.h, eqx.combine(field.coordinates, field.rest)).kinks)
        several = jtu.tree_map(lambda a: jnp.broadcast_to(a, (NUM_DIRECTIONS, *a.shape)), field.coordinates)
        return cls(field, optax.tree.random_like(jr.key(0), several), kinks)

    def _run(self, w: Params, pattern: Pattern | None = None) -> tuple[Outputs, Float[Array, " s"]]:
        """Return outputs and switching values at the coordinates w; without a pattern with the gates as they are."""
        full = eqx.combine(w, self.field.rest)
        given: list[list[Array]] = []
        if pattern is not None:
            mixed = pattern.sliding | ((pattern.gates > 0) & (pattern.gates < 1))
            ends = np.cumsum([math.prod(kink.shape) for kink in self.kinks])[:-1]
            for flat in (pattern.gates, mixed):
                parts = jnp.split(flat, ends)
                given.append([part.reshape(kink.shape) for part, kink in zip(parts, self.kinks, strict=True)])
        outputs, here = evaluate(self.field.h, full, *given)
        return outputs, jnp.concatenate([v.ravel().astype(self.field.start.dtype) for v in here.values])

    def start(self, u: Params) -> tuple[Float[Array, " s"], Pattern]:
        """Return switching values and pattern at the start; at a tie a gate has the value that JAX's derivative has."""
        g = self._run(self.field.moved(u))[1]
        ties = np.concatenate([np.full(math.prod(kink.shape), kink.tie) for kink in self.kinks])
        modes = jnp.where(g > 0, ON, OFF).astype(jnp.int8)
        return g, Pattern(modes, jnp.where(g == 0, jnp.asarray(ties, g.dtype), modes.astype(g.dtype)))

    def free(self, u: Params) -> tuple[Params, Float[Array, " s"]]:
        """Return u' with every gate as its switching value has it, and the switching values."""
        (outputs, g), pull = jax.vjp(self._run, self.field.moved(u))
        cotangent = self.field.loss.cotangent(self.field.scaled(outputs, u))
        return jtu.tree_map(jnp.negative, pull((cotangent, jnp.zeros_like(g)))[0]), g

    def velocity(self, u: Params, pattern: Pattern, surfaces: Surfaces) -> Params:
        """Return u'."""
        return _velocity(self, u, pattern, surfaces)

    def motion(self, u: Params, pattern: Pattern, surfaces: Surfaces) -> "Motion":
        """Return u' and what it took."""
        w = self.field.moved(u)
        (outputs, g), push, pull = _linearize(lambda w: self._run(w, pattern), w)
        cotangent = self.field.loss.cotangent(self.field.scaled(outputs, u))
        f = jtu.tree_map(jnp.negative, pull((cotangent, jnp.zeros_like(g))))
        inside = pattern.sliding

        def along(v: Params) -> Array:
            return push(v)[1]

        def normal(mu: Array) -> Params:
            return pull((jnp.zeros_like(outputs), jnp.where(inside, mu, 0)))

        velocity, mu = jax.lax.cond(
            jnp.any(inside), lambda: _along_surfaces(f, inside, surfaces, along, normal), lambda: (f, jnp.zeros_like(g))
        )
        return Motion(velocity, mu, cotangent, g, along, normal)

    def gate_values(
        self, u: Params, pattern: Pattern, motion: "Motion"
    ) -> tuple[Float[Array, " s"], Float[Array, " s"]]:
        """Return the gate values that keep the gates on their surfaces, and the jumps c_s; of use where they slide.

        What a gate lets through is lambda g, so that the derivative of the loss along any direction v, once more
        by lambda, is c times that of g along v: at g = 0 the rest vanishes.
        """
        w, v = self.field.moved(u), jtu.tree_map(lambda a: a[0], self.directions)

        def slope(gates: Array) -> tuple[Array, Array]:
            along = jax.jvp(lambda w: self._run(w, Pattern(pattern.modes, gates)), (w,), (v,))[1]
            return jnp.sum(along[0] * motion.cotangent), along[1]

        by_gate, speeds = jax.grad(slope, has_aux=True)(pattern.gates)
        inside = pattern.sliding & (speeds != 0)
        jumps = jnp.where(inside, by_gate / jnp.where(inside, speeds, 1), 0)
        mu = motion.multipliers
        bent = inside & (jumps != 0)
        change = jnp.where(bent, mu / jnp.where(bent, jumps, 1), jnp.where(mu == 0, 0, jnp.sign(mu) * jnp.inf))
        return jnp.where(pattern.sliding, pattern.gates + change, pattern.gates), jumps

    def holds(self, u: Params, pattern: Pattern, surfaces: Surfaces, gates: Bool[Array, " s"]) -> Bool[Array, ""]:
        """Return whether sliding as it does keeps the flow on the surfaces of these gates too, on which it is."""
        _, push, pull = _linearize(lambda w: self._run(w, pattern)[1], self.field.moved(u))
        inside = pattern.sliding
        # The gradient of a combination of theirs that is special in nothing.
        weights = jnp.linspace(1, 2, gates.size, dtype=surfaces.rows.dtype)
        gradient = pull(jnp.where(gates, weights, 0))

        def normal(mu: Array) -> Params:
            return pull(jnp.where(inside, mu, 0))

        left, _ = _along_surfaces(gradient, inside, surfaces, push, normal)
        return tree_norm(left) <= HELD * tree_norm(gradient)

    def norms(self, u: Params, pattern: Pattern) -> Float[Array, " s"]:
        """Return about |grad g_s| of every gate: the root mean square along a few random directions."""
        w = self.field.moved(u)

        def along(v: Params) -> Array:
            return jax.jvp(lambda w: self._run(w, pattern)[1], (w,), (v,))[1]

        return jnp.sqrt(jnp.mean(jax.vmap(along)(self.directions) ** 2, axis=0))

    def row(self, u: Params, pattern: Pattern, index: Array) -> Float[Array, " p"]:
        """Return grad g_s of one gate."""
        g, pull = jax.vjp(lambda w: self._run(w, pattern)[1], self.field.moved(u))
        return ravel_pytree(pull(jnp.zeros_like(g).at[index].set(1))[0])[0].astype(g.dtype)


class Motion(NamedTuple):
    """The field at a point, and what it took.

    Attributes:
        velocity: u'.
        multipliers: The mu of the gates that slide, 0 for the others.
        cotangent: The derivative of the loss by the outputs.
        values: The switching values g.
        along: v to the derivatives of the switching values along v, by w.
        normal: mu to J^T mu.
    """

    velocity: Params
    multipliers: Float[Array, " s"]
    cotangent: Outputs
    values: Float[Array, " s"]
    along: Callable[[Params], Array]
    normal: Callable[[Array], Params]


def _along_surfaces(
    v: Params,
    inside: Bool[Array, " s"],
    surfaces: Surfaces,
    along: Callable[[Params], Array],
    normal: Callable[[Array], Params],
) -> tuple[Params, Float[Array, " s"]]:
    """Return what is left of v along the surfaces of the gates inside, v - J^T mu, and mu."""
    # JJ^T is singular where surfaces depend on each other; J v is in its range, up to rounding.
    eps = jnp.finfo(surfaces.rows.dtype).eps
    rounding = 16 * eps * jnp.sqrt(jnp.max(jnp.diag(surfaces.products))) * tree_norm(v)
    options = {"tol": eps**0.75, "atol": rounding, "maxiter": SOLVE_STEPS, "M": surfaces.solve}

    def rows(v: Params) -> Array:
        return jnp.where(inside, along(v), 0)

    mu, _ = jax.scipy.sparse.linalg.cg(lambda mu: rows(normal(mu)), rows(v), **options)
    return jtu.tree_map(jnp.subtract, v, normal(mu)), mu


def _linearize(
    function: Callable[[Params], Any], w: Params
) -> tuple[Any, Callable[[Params], Any], Callable[[Any], Params]]:
    """Return a function's value, and the products with its Jacobian and its transpose."""
    value, push = jax.linearize(function, w)
    pull = jax.linear_transpose(push, w)
    return value, push, lambda r: pull(r)[0]


@eqx.filter_jit  # the stages of a step share one trace
def _velocity(field: GatedField, u: Params, pattern: Pattern, surfaces: Surfaces) -> Params:
    return field.motion(u, pattern, surfaces).velocity
