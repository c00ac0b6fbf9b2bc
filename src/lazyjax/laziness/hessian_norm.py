r"""The second derivative $B = D^2h(w_0)$ of a model as a symmetric bilinear map, and its norm from below.

$\|B\| = \sup_{|u|=1} \|B(u, u)\|_F = \sup_{\|z\|=1} \|H_z\|$ with $H_z$ the Hessian of $\langle z, h\rangle_F$; the
supremum over pairs (u, v) is no larger, B being symmetric. Parameters are flat vectors here, outputs too, in an
orthonormal basis of F: $\sqrt c$ times the plain ones, c the weight of the loss.
"""

from collections.abc import Callable
from dataclasses import dataclass

import equinox as eqx
import jax
import jax.flatten_util as jfu
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from lazyjax._core.cost import count_flops
from lazyjax._core.forward import hessian, jvp, linearize
from lazyjax._core.lanczos import krylov
from lazyjax._core.types import Model, Params

BUDGET = 6e11
"""Multiply-adds of a search: about 10 s."""

BATCH = 40_000_000
"""Numbers held at a time by starts that are searched together."""


class SecondDerivative(eqx.Module):
    """The bilinear map B of a model, by derivatives of its program; nothing of it is formed."""

    h: Model
    w0: Params
    root: float = eqx.field(static=True)

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of the flat vector of coordinates."""
        return jnp.result_type(*jtu.tree_leaves(eqx.filter(self.w0, eqx.is_inexact_array)))

    def point(self) -> Float[Array, " p"]:
        """Return the coordinates of w0."""
        return jfu.ravel_pytree(eqx.filter(self.w0, eqx.is_inexact_array))[0]

    def model(self, v: Float[Array, " p"]) -> Float[Array, " q"]:
        """Return h at the coordinates v, in F's orthonormal basis."""
        coordinates, rest = eqx.partition(self.w0, eqx.is_inexact_array)
        unravel = jfu.ravel_pytree(coordinates)[1]
        # In the precision of the parameters, whatever that of the outputs.
        return jnp.asarray(self.root, v.dtype) * self.h(eqx.combine(unravel(v), rest)).ravel().astype(v.dtype)

    def second(self, u: Float[Array, " p"]) -> Float[Array, " q"]:
        """Return B(u, u), forward over forward."""
        return second_directional_derivative(self.model, self.point(), u)

    def hessian(self, z: Float[Array, " q"]) -> Callable[[Array], Array]:
        """Return the product with H_z as a function, forward over reverse."""
        return linearize(jax.grad(lambda v: jnp.sum(z * self.model(v))), self.point())[1]

    def dense(self) -> Float[Array, "q p p"]:
        """Return all numbers of B."""
        return hessian(self.model, self.point())

    def cost(self, outputs: int) -> float:
        """Return the multiply-adds of a product with H_z."""
        point = self.point()
        return count_flops(lambda z, u: self.hessian(z)(u), jnp.ones(outputs, point.dtype), point)


def second_directional_derivative(model: Callable[[Params], Array], point: Params, u: Params) -> Array:
    """Return $D^2h(u, u)$ of a model at a point, flat vectors or trees."""
    return jvp(lambda v: jvp(model, (v,), (u,))[1], (point,), (u,))[1]


def check_starts(starts: int) -> None:
    """Check that a search has a start."""
    if starts < 1:
        msg = f"starts must be at least 1, got {starts}."
        raise ValueError(msg)


@dataclass(frozen=True)
class Search:
    """A plan of a search for the maximum.

    Attributes:
        starts: Random starts.
        rounds: Alternations per start, at most.
        polish: Further alternations from the best start, at most.
        steps: Lanczos steps per alternation.
        batch: Starts searched at a time.
    """

    starts: int
    rounds: int
    polish: int
    steps: int
    batch: int


def plan_search(cost: float, size: int, starts: int) -> Search:
    """Plan as many alternations as the budget has room for, given the cost of a Hessian-vector product."""
    affordable = BUDGET / cost
    # All batches have one size, so that one program is compiled.
    batch = max(b for b in range(1, starts + 1) if starts % b == 0 and (b == 1 or b * 40 * size <= BATCH))
    if affordable >= starts * 20 * 40:
        return Search(starts, 40, 0, min(size, 20), batch)
    steps = min(size, 8)
    rounds = int(np.clip(0.6 * affordable / (starts * steps), 2, 10))
    polish = int(np.clip(0.4 * affordable / steps, 6, 40))
    return Search(starts, rounds, polish, steps, batch)


@eqx.filter_jit
def norm_lower(
    form: SecondDerivative, outputs: int, key: PRNGKeyArray, starts: int, *, calls: int = 1
) -> Float[Array, ""]:
    r"""Return $\max \|B(u, u)\|$ over the unit vectors u met: a lower bound of $\|B\|$, whatever the search.

    Alternates $z = B(u, u)/\|\cdot\|$ with u the eigenvector of $H_z$ of largest absolute eigenvalue, by Lanczos: plain
    power iteration fails, as the Hessians of two-layer nets have +- pairs of eigenvalues. The starts are random z: for
    random u in high dimension B(u, u) is nearly always the same, the direction of the trace. One start alone often
    misses the maximum. `calls` such searches share the budget.
    """
    point = form.point()
    search = plan_search(calls * form.cost(outputs), point.size, starts)
    first, second = jr.split(key)

    def ascend(k: PRNGKeyArray) -> tuple[Array, ...]:
        first, second = jr.split(k)
        z = jr.normal(first, (outputs,), point.dtype)
        carry = (jnp.zeros_like(point), z / jnp.linalg.norm(z), jnp.zeros((), point.dtype), jnp.ones((), point.dtype))
        return _alternate(form, carry, second, search.rounds, search.steps)

    # No batches of one, whose products would be batched and slow.
    batch = search.batch if search.batch > 1 else None
    found = jax.lax.map(ascend, jr.split(first, search.starts), batch_size=batch)
    best = jnp.argmax(found[2])
    if not search.polish:
        return found[2][best]
    chosen = (*(leaf[best] for leaf in found), jnp.zeros((), point.dtype))
    return _alternate(form, chosen, second, search.polish, search.steps)[2]


def _alternate(
    form: SecondDerivative, start: tuple[Array, ...], key: PRNGKeyArray, rounds: int, steps: int
) -> tuple[Array, ...]:
    """Improve (u, z, norm of B(u, u)) until nothing is gained, or for so many rounds; `start` ends with a share.

    A direction that has no part in u has none in its Krylov space; but only from u alone the value never falls. So
    the share of a random direction added to u is 1 until that gains no more, then 0.
    """
    point = form.point()
    gain = _least_gain(point.dtype)
    other = jr.normal(key, point.shape, point.dtype)
    other = other / jnp.linalg.norm(other)

    def improve(carry: tuple[Array, ...]) -> tuple[Array, ...]:
        u, z, value, share, i = carry
        space = krylov(form.hessian(z), u + share * other, steps, jr.fold_in(key, i))
        theta, vectors = jnp.linalg.eigh(space.projected)
        v = vectors[:, jnp.argmax(jnp.abs(theta))] @ space.basis
        v = v / jnp.linalg.norm(v)
        image = form.second(v)
        norm = jnp.linalg.norm(image)
        better = norm > value
        share = jnp.where(norm > gain * value, share, share - 1)
        z = jnp.where(better, image / jnp.where(better, norm, 1), z)
        return jnp.where(better, v, u), z, jnp.maximum(norm, value), share, i + 1

    carry = (*start, jnp.asarray(0))
    return jax.lax.while_loop(lambda c: (c[3] >= 0) & (c[4] < rounds), improve, carry)[:3]


def _least_gain(dtype: jnp.dtype) -> float:
    """Return the least factor that counts as a gain of a search."""
    return 1 + float(jnp.finfo(dtype).eps) ** 0.75


def dense_norm_lower(
    hessian: Callable[[Array], Array],
    second: Callable[[Array], Array],
    outputs: tuple[int, jnp.dtype],
    key: PRNGKeyArray,
    starts: int,
) -> Float[Array, ""]:
    """Search as `norm_lower` does, given z -> H_z and u -> B(u, u) in full, until the best start gains no more."""
    gain = _least_gain(outputs[1])

    def improve(carry: tuple[Array, ...]) -> tuple[Array, ...]:
        z, value, _, i = carry
        theta, vectors = jnp.linalg.eigh(jax.vmap(hessian)(z))
        best = jnp.argmax(jnp.abs(theta), axis=1)
        image = jax.vmap(second)(jnp.take_along_axis(vectors, best[:, None, None], axis=2)[..., 0])
        norm = jnp.linalg.norm(image, axis=1)
        z = image / jnp.where(norm > 0, norm, 1)[:, None]
        # A start that ten more such gains would not bring to the top is dropped.
        promising = norm + 10 * (norm - value) >= jnp.max(norm)
        return z, norm, jnp.any(promising & (norm > gain * value)), i + 1

    z = jr.normal(key, (starts, outputs[0]), outputs[1])
    z = z / jnp.linalg.norm(z, axis=1, keepdims=True)
    carry = (z, jnp.zeros(starts, outputs[1]), jnp.asarray(True), jnp.asarray(0))
    # Gains may become slow: what is attained is a bound all the same.
    return jnp.max(jax.lax.while_loop(lambda c: c[2] & (c[3] < 200), improve, carry)[1])
