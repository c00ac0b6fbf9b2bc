r"""The last line of Krogstad's scheme: as dense output inside a step, and what it misses there.

See `lazyjax.exponential` for the scheme, of which D_2, D_3 (both at h/2) and D_4 (at h) are the increments of N.
"""

from collections.abc import Mapping
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array

from lazyjax._core.trees import tree_norm
from lazyjax._core.types import Params
from lazyjax.flow.linear_part import Expansion, LinearPart, Piece, Products


def last_line(theta: Any, start: Expansion, second: Expansion, third: Expansion, fourth: Expansion) -> list[Piece]:
    """u(theta h) - u: N replaced by the parabola through its values at 0, h/2 (twice) and h."""
    square, cube = theta**2, theta**3
    middle = {2: 2 * square, 3: -4 * cube}
    return [
        (start, theta, {1: theta}),
        (second, theta, middle),
        (third, theta, middle),
        (fourth, theta, {2: -square, 3: 4 * cube}),
    ]


class PhiInterpolation(diffrax.AbstractLocalInterpolation):
    r"""The solution inside a step: the last line of the scheme with $\theta h$ for h, of order 3 uniformly.

    Exact where N is a parabola in time, whatever the stiffness; a polynomial through the stages would be wrong there.
    """

    t0: Any
    t1: Any
    u: Params
    h: Array
    start: Expansion
    second: Expansion
    third: Expansion
    fourth: Expansion
    linear: LinearPart

    def evaluate(self, t0: Any, t1: Any = None, left: bool = True) -> Params:
        """u at t0, or the change from t0 to t1."""
        del left
        if t1 is not None:
            return jtu.tree_map(jnp.subtract, self.evaluate(t1), self.evaluate(t0))
        span = self.t1 - self.t0
        # diffrax may ask for the end of an empty step.
        theta = jnp.where(span == 0, 0, (t0 - self.t0) / jnp.where(span == 0, 1, span)).astype(self.h.dtype)
        pieces = last_line(theta, self.start, self.second, self.third, self.fourth)
        delta, _ = self.linear.combine(self.linear.anchored.products(), self.h, pieces)
        return jtu.tree_map(jnp.add, self.u, delta)


def stiff_error_term(
    linear: LinearPart, b: Products, h: Array, second: Expansion, third: Expansion, fourth: Expansion
) -> list[Piece]:
    r"""An estimate of what the parabola misses where N bends inside the step, which D_4 and D_5 at its end cannot see.

    Stiff modes that decay inside it: for N = -\delta r in a mode of eigenvalue $\lambda$ the scheme leaves
    $\delta r/(\lambda^2 h)$ of what should vanish, though D_2 = ... = D_5. Kinks: N is a broken line.
    The difference to the method of order 2, which has $h \varphi_2 D_4$ for the last two terms, is
    $2e = h (2\varphi_2 - 4\varphi_3)(D_2 + D_3 - D_4)$, twice that residue. By itself e would ask for the steps of an
    order 2 where N is smooth and nothing is stiff. There its weights $\varphi_2 - 2\varphi_3$ give way to
    $2\varphi_2 - \varphi_1/2 - 3\varphi_3$, which vanish like $h\lambda$ and have the same limit at infinity, as far as
    e is small against what D_4 alone makes, which is O(h). So the estimate keeps its order, and e counts whole where
    N has nothing but bends.
    """
    weights = {2: 1.0, 3: -2.0}
    # Only the images are used: no product is taken for them.
    _, bent = linear.combine(b, h, _difference(second, third, fourth, weights))
    _, whole = linear.combine(b, h, [(fourth, 1.0, weights)])
    # No derivative: the choice of steps has none, and that of a norm at 0 would be NaN.
    size, other = (jnp.linalg.norm(jax.lax.stop_gradient(image)) for image in (bent, whole))
    share = jnp.where(size > 0, size / jnp.where(size > 0, size + other, 1), 0)
    return _difference(second, third, fourth, {1: 0.5 * share - 0.5, 2: 2 - share, 3: share - 3})


def contraction(
    linear: LinearPart,
    b: Products,
    h: Array,
    start: Expansion,
    second: Expansion,
    third: Expansion,
    moved: Params,
) -> Array:
    r"""By how much the stages contract: $|h \varphi_2(hL/2)(D_3 - D_2)| / |U_3 - U_2|$.

    U_3 is U_2 moved by $h \varphi_2(hL/2) D_2$, so that this is what N' makes of it in a step: h |L_1 - L| / 2 at most,
    for the linear part L_1 of the present point. 0 where D_2 is no more than the rounding of f.
    """
    change, _ = linear.combine(b, h, [(third, 0.5, {2: 1.0}), (second, 0.5, {2: -1.0})])
    size, whole, f = (tree_norm(jax.lax.stop_gradient(tree)) for tree in (change, moved, start.direct))
    real = whole > 32 * jnp.finfo(whole.dtype).eps * h * f
    return jnp.where(real, size / jnp.where(real, whole, 1), 0)


def _difference(second: Expansion, third: Expansion, fourth: Expansion, weights: Mapping[int, Any]) -> list[Piece]:
    """The pieces of D_2 + D_3 - D_4."""
    minus = {k: -weight for k, weight in weights.items()}
    return [(second, 1.0, weights), (third, 1.0, weights), (fourth, 1.0, minus)]
