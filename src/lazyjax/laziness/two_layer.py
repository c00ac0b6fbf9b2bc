r"""Two-layer nets neuron by neuron: $D^2h$ is block diagonal, one block $D^2\phi(\theta_j)$ per neuron.

With $\phi(a, b) = (a\,\sigma(b \cdot x_i))_i$ and $u = (u_a, u_b)$,

$$D^2\phi(u, u)_i = 2u_a\sigma'(b \cdot x_i)\,x_i \cdot u_b + a\,\sigma''(b \cdot x_i)(x_i \cdot u_b)^2,$$

and $\|D^2h\| = \max_j \|D^2\phi(\theta_j)\|$: $\|\sum_j B_j(u_j, u_j)\| \le \sum_j \|B_j\||u_j|^2$, with equality for
u in the block of the largest norm. A block is never formed: its products are weighted products of the inputs.
"""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from lazyjax._core.cost import eigh_cost
from lazyjax._core.forward import jvp
from lazyjax._core.keys import default_key
from lazyjax._core.show import show
from lazyjax._core.types import Model, Params
from lazyjax.laziness.hessian_norm import check_starts, dense_norm_lower
from lazyjax.laziness.sample_hessians import as_samples, halves, unwrapped
from lazyjax.laziness.second_derivative import OPERATORS, Bracket, filled, largest_eigenvalue
from lazyjax.models.maps import Rescaled, without_constant
from lazyjax.models.shallow import TwoLayer

MAX_SAMPLES = 2048
"""Samples up to which the inner products of a neuron's Hessians, one per sample, are diagonalized."""

BUDGET = 5e11
"""Multiply-adds for the bounds from above, and again for the search from below: about 10 s each on two cores."""

REFINED_SAMPLES = 512
"""Samples up to which each neuron has a bound from above of its own: beyond, jax 0.10.1 on a CPU sooner or later
stalls for good in a loop over eigenproblems of that size."""

SEARCHED = 16
"""Neurons, those with the largest upper bounds, that are searched at most for the norm of the whole net."""

ROUNDS = 15
"""Alternations that a search is planned to take."""


class Neuron(eqx.Module):
    """The bilinear map B of one neuron, the output weight first, in F's orthonormal basis.

    Attributes:
        first: sigma' at each sample.
        second: a sigma'' at each sample.
        x: Inputs.
    """

    first: Float[Array, " n"]
    second: Float[Array, " n"]
    x: Float[Array, "n d"]

    def matvec(self, u: Float[Array, " p"]) -> Float[Array, " n"]:
        """Return B(u, u)."""
        along = self.x @ u[1:]
        return (2 * u[0] * self.first + self.second * along) * along

    def hessian(self, z: Float[Array, " n"]) -> Float[Array, "p p"]:
        """Return H_z."""
        side = (z * self.first) @ self.x
        lower = jnp.concatenate([side[:, None], self.inner(z)], axis=1)
        return jnp.concatenate([jnp.concatenate([jnp.zeros_like(side[:1]), side])[None], lower])

    def inner(self, z: Float[Array, " n"]) -> Float[Array, "d d"]:
        """Return the block of H_z that belongs to b."""
        return self.x.T @ ((z * self.second)[:, None] * self.x)

    def inner_upper(self) -> Float[Array, ""]:
        r"""Bound the norm of the block (b, b), $v \mapsto (a\sigma''(x_i \cdot v)^2)_i$, by the lesser unfolding."""
        rows = (self.second * jnp.linalg.norm(self.x, axis=1))[:, None] * self.x
        square = largest_eigenvalue(rows.T @ rows)
        if self.x.shape[0] <= MAX_SAMPLES:
            square = jnp.minimum(square, filled(self._inner_products(), self.inner))
        return jnp.sqrt(square)

    def upper(self) -> Float[Array, ""]:
        """Return the lesser of the blocks' bound and the unfolding of outputs."""
        rows = self.first[:, None] * self.x
        blocks = join_blocks(jnp.sqrt(largest_eigenvalue(rows.T @ rows)), self.inner_upper())
        if self.x.shape[0] > MAX_SAMPLES:
            return blocks
        # A Hessian holds its side twice.
        products = 2 * rows @ rows.T + self._inner_products()
        return jnp.minimum(blocks, jnp.sqrt(filled(products, self.hessian)))

    def _inner_products(self) -> Float[Array, "n n"]:
        rows = self.x * jnp.sqrt(jnp.abs(self.second))[:, None]
        signs = jnp.sign(self.second)
        return jnp.outer(signs, signs) * (rows @ rows.T) ** 2


def join_blocks(side: Float[Array, "..."], inner: Float[Array, "..."]) -> Float[Array, "..."]:
    """Return the largest eigenvalue of [[0, side], [side, inner]]."""
    return 0.5 * (inner + jnp.sqrt(inner**2 + 4 * side**2))


class Neurons(eqx.Module):
    """The neurons of a two-layer net on data; made by `find_neurons`.

    Attributes:
        activation: Activation of all neurons.
        a: Output weights.
        b: Input weights.
        x: Inputs.
        factor: Factor of the outputs.
    """

    activation: Callable[[Array], Array]
    a: Float[Array, " m"]
    b: Float[Array, "m d"]
    x: Float[Array, "n d"]
    factor: Float[Array, ""]

    @property
    def upper_cost(self) -> float:
        """Multiply-adds of the bound from above of one neuron."""
        n, d = self.x.shape
        if n > MAX_SAMPLES:
            return 2.0 * n * d**2
        return 2 * (eigh_cost(n) + OPERATORS * (n * d**2 + eigh_cost(d + 1)) + n**2 * d)

    def search_cost(self, starts: int) -> float:
        """Return the multiply-adds of the search for the norm of one neuron."""
        n, d = self.x.shape
        return ROUNDS * starts * (n * d**2 + eigh_cost(d + 1))

    def neuron(self, a: Float[Array, ""], b: Float[Array, " d"], root: Float[Array, ""]) -> Neuron:
        """Return one neuron; `root` is that of F's weight."""
        ones = jnp.ones(self.x.shape[0], self.x.dtype)

        def slope(s: Array) -> Array:
            return jvp(self.activation, (s,), (ones,))[1]

        first, second = jvp(slope, (self.x @ b,), (ones,))
        root = root * self.factor
        return Neuron(root * first, root * a * second, self.x)


def find_neurons(h: Model, w0: Params) -> Neurons | None:
    """Return the neurons of a model that shows it is a `two_layer` on data, perhaps centered or the like."""
    found = as_samples(h)
    return None if found is None else neurons_of(unwrapped(found[0]), w0, found[1])


def neurons_of(f: Model, w0: Params, x: Array) -> Neurons | None:
    """Return the neurons of f(w, x); None if f is no two-layer net."""
    factor = jnp.ones(())
    while isinstance(f, Rescaled):
        f, factor = unwrapped(f.f), factor * f.factor.astype(factor.dtype)
    f, parts = halves(f, w0)
    f = unwrapped(f)
    if not isinstance(f, TwoLayer):
        return None
    a, b = (jnp.concatenate([part[name] for part in parts]) for name in ("a", "b"))
    return Neurons(f.activation, a, b, x.astype(b.dtype), factor.astype(b.dtype))


def rough_bounds(neurons: Neurons, root: Float[Array, ""]) -> Float[Array, " m"]:
    """Bound each neuron from above as if its largest |sigma'| and |a sigma''| were those of all samples."""

    def extremes(neuron: tuple[Array, Array]) -> tuple[Array, Array]:
        one = neurons.neuron(*neuron, root)
        return jnp.max(jnp.abs(one.first)), jnp.max(jnp.abs(one.second))

    first, second = jax.lax.map(extremes, (neurons.a, neurons.b))
    ones = jnp.ones(neurons.x.shape[0], neurons.x.dtype)
    side = jnp.sqrt(largest_eigenvalue(neurons.x.T @ neurons.x))
    return join_blocks(first * side, second * Neuron(ones, ones, neurons.x).inner_upper())


def _search(one: Neuron, key: PRNGKeyArray, starts: int) -> Array:
    return dense_norm_lower(one.hessian, one.matvec, (one.x.shape[0], one.x.dtype), key, starts)


@eqx.filter_jit
def neuron_bounds(
    neurons: Neurons, weight: float, key: PRNGKeyArray, starts: int
) -> tuple[Float[Array, " m"], Float[Array, " m"]]:
    """Return bounds of every neuron's norm, from below and from above."""
    root = jnp.asarray(weight**0.5, neurons.x.dtype)

    def both(item: tuple[Array, Array, PRNGKeyArray]) -> tuple[Array, Array]:
        one = neurons.neuron(item[0], item[1], root)
        return _search(one, item[2], starts), one.upper()

    # One at a time: XLA can hang on a CPU if thousands of small eigenproblems and products run together.
    lower, upper = jax.lax.map(both, (neurons.a, neurons.b, jr.split(key, neurons.a.size)))
    return lower, jnp.maximum(lower, jnp.minimum(upper, rough_bounds(neurons, root)))


@eqx.filter_jit
def _largest_neuron(
    neurons: Neurons, weight: float, key: PRNGKeyArray, starts: int, refined: int, searched: int
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Return bounds of the largest norm: neurons in the order of their rough bounds, none that cannot be the largest.

    `refined` and `searched` say how many at most; neurons that are not refined keep their rough bound.
    """
    root = jnp.asarray(weight**0.5, neurons.x.dtype)
    rough = rough_bounds(neurons, root)
    order = jnp.argsort(-rough)

    def look(carry: tuple[Array, ...], item: tuple[Array, ...]) -> tuple[tuple[Array, ...], None]:
        j, k = item
        one = neurons.neuron(neurons.a[j], neurons.b[j], root)
        lower, upper, left = carry
        above = rough[j]
        if refined:
            above = jax.lax.cond(above > lower, lambda: jnp.minimum(rough[j], one.upper()), lambda: rough[j])
        seek = (above > lower) & (left > 0)
        found = jax.lax.cond(seek, lambda: _search(one, k, starts), lambda: jnp.zeros_like(lower))
        return (jnp.maximum(lower, found), jnp.maximum(upper, above), left - seek.astype(left.dtype)), None

    zero = jnp.zeros((), neurons.x.dtype)
    looked = order[: refined or searched]
    (lower, upper, _), _ = jax.lax.scan(look, (zero, zero, jnp.asarray(searched)), (looked, jr.split(key, looked.size)))
    return lower, jnp.maximum(jnp.maximum(lower, upper), jnp.max(rough[order[looked.size :]], initial=0))


def neuron_bracket(neurons: Neurons, weight: float, key: PRNGKeyArray, starts: int) -> Bracket | None:
    """Return the bracket of the whole net; None if even one neuron costs too much."""
    refined, searched = BUDGET / neurons.upper_cost, BUDGET / neurons.search_cost(starts)
    if min(refined, searched) < 1:
        return None
    refined = refined if neurons.x.shape[0] <= REFINED_SAMPLES else 0
    counts = min(neurons.a.size, int(refined)), int(min(searched, SEARCHED))
    lower, upper = _largest_neuron(neurons, weight, key, starts, *counts)
    return Bracket(lower, upper, 0.0, "neuron by neuron")


class NeuronCurvature(eqx.Module):
    r"""The norms of $D^2\phi(\theta_j)$, one per neuron; made by `two_layer_curvature`.

    Attributes:
        lower: Bounds from below, (m,).
        upper: Bounds from above, (m,), no chance involved.
    """

    lower: Float[Array, " m"]
    upper: Float[Array, " m"]

    def __str__(self) -> str:
        """Show the bounds of the neuron with the largest norm, and how many neurons there are."""
        return show(
            self,
            self.upper,
            1,
            lambda: (
                f"||D2 phi|| of {self.upper.size} neurons, the largest in "
                f"[{np.max(self.lower):.4g}, {np.max(self.upper):.4g}]"
            ),
        )

    __repr__ = __str__


def two_layer_curvature(
    f: Model,
    w0: Params,
    x: Float[Array, "n d"],
    *,
    mean: bool = True,
    starts: int = 10,
    key: PRNGKeyArray | None = None,
) -> NeuronCurvature:
    r"""Bound $\|D^2\phi(\theta_j)\|$ of each neuron of a two-layer net; $\|D^2h(w_0)\|$ is the largest of them.

    Each neuron is a problem in d + 1 numbers, the whole net one in m(d + 1). `kappa` does this by itself if h shows f
    and x.

    Args:
        f: `two_layer(activation)`, perhaps centered, symmetrized or rescaled; smooth (kinks are not seen).
        w0: Its parameters.
        x: Inputs.
        mean: Whether F's metric has the factor 1/n.
        starts: Random starts per neuron.
        key: For the random starts; None for a fixed one.

    Returns:
        `NeuronCurvature`; for a symmetrized model those of both halves, 2m.

    Raises:
        TypeError: f is not such a net.
        ValueError: `starts` below 1; too many samples, inputs and neurons for all of them.

    Source:
        Chizat, Oyallon, Bach (2019), supplement A.2 (where it bounds the norm).

    Example:
        >>> from lazyjax.models import two_layer
        >>> w = {"a": jnp.array([0.0, 0.0]), "b": jnp.zeros((2, 1))}
        >>> found = two_layer_curvature(two_layer(jnp.tanh), w, jnp.array([[1.0], [2.0]]), mean=False)
        >>> print(f"{found.upper[0]:.3f}")
        2.236
    """
    check_starts(starts)
    neurons = neurons_of(without_constant(f), w0, x)
    if neurons is None:
        msg = (
            "f must be a two_layer net, perhaps centered, symmetrized or rescaled, got "
            f"{type(f).__name__}; use kappa for others."
        )
        raise TypeError(msg)
    cost = neurons.a.size * (neurons.upper_cost + neurons.search_cost(starts))
    if cost > 20 * BUDGET:
        msg = (
            f"x and w0 must be small enough to bound each neuron, {neurons.a.size} neurons, {x.shape[0]} samples of "
            f"{x.shape[1]} numbers and {starts} starts take {cost:.0e} operations, more than {20 * BUDGET:.0e}; use "
            "kappa, which bounds the largest norm only."
        )
        raise ValueError(msg)
    weight = 1 / x.shape[0] if mean else 1.0
    key = default_key(key)
    return NeuronCurvature(*neuron_bounds(neurons, weight, key, starts))
