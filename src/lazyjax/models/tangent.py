r"""The tangent model $\bar h(w) = h(w_0) + Dh(w_0)(w - w_0)$, and the extreme singular values of $Dh(w_0)$.

With J the plain (nk, p) Jacobian and $c$ the weight of F's metric (1/n for a mean, see `lazyjax.losses`), the
singular values of $Dh(w_0)$: R^p -> F are $\sqrt{c}$ times those of J. They come from Lanczos on $JJ^T$ with full
re-orthogonalization, one jvp and one vjp for each product, so that no Jacobian is ever formed.
"""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Float, PRNGKeyArray

from lazyjax._core.checks import check_outputs, is_concrete, split_params
from lazyjax._core.forward import Products, products, warn_if_apart
from lazyjax._core.lanczos import lanczos
from lazyjax._core.show import show
from lazyjax._core.types import Model, Outputs, Params
from lazyjax.losses.loss import Loss
from lazyjax.models.maps import IdentityHashed, declares_zero, same_params


class Tangent(IdentityHashed):
    """A model linearized at w0; made by `linearize`.

    Attributes:
        h: The model.
        w0: Where it is linearized.
        outputs: h(w0), (n,) or (n, k).
    """

    h: Model
    w0: Params
    outputs: Outputs
    _derivative: Products

    def __call__(self, w: Params) -> Outputs:
        r"""Return $\bar h(w) = h(w_0) + Dh(w_0)(w - w_0)$."""
        first, start = (eqx.filter(tree, eqx.is_inexact_array) for tree in (w, self.w0))
        return self.outputs + self.jvp(jtu.tree_map(jnp.subtract, first, start))

    def jvp(self, u: Params) -> Outputs:
        """Return $Dh(w_0) u$ for a direction u of w0's structure."""
        return self._derivative.push(_match(u, self.w0))

    def vjp(self, r: Outputs) -> Params:
        """Return the plain $J^T r$, a tree of w0's coordinates; $Dh(w_0)^* r$ in F's metric is `weight` times it."""
        coordinates = eqx.filter(self.w0, eqx.is_inexact_array)
        return self._derivative.transpose(match_outputs(r, self.outputs), coordinates)

    def declares_zero(self, w: Params) -> bool:
        """Return whether w is w0 and h is declared zero there."""
        return same_params(w, self.w0) and declares_zero(self.h, self.w0)


def linearize(h: Model, w0: Params) -> Tangent:
    r"""Return the tangent model $\bar h(w) = h(w_0) + Dh(w_0)(w - w_0)$: a model of the same arguments.

    It is made by `jax.linearize`: h is evaluated once, and every product shares that evaluation (a model with a
    `jax.custom_vjp` rule once more: its forward products are those of the program that it runs). If its products
    belong to a jitted function, call `linearize` in that function too, so that its residuals are not compiled in as
    constants.

    Args:
        h: Model h(w) with outputs (n,) or (n, k).
        w0: Any pytree; its floating arrays are the coordinates.

    Returns:
        `Tangent`: call it on w; `.jvp(u)` and `.vjp(r)` are the products with Dh(w0) and its transpose.

    Raises:
        TypeError, ValueError: parameters or outputs that do not fit (no floating leaf, NaN, wrong shape).

    Warns:
        UserWarning: h has a `jax.custom_vjp` rule that is not the derivative of its program.

    Source:
        Chizat, Oyallon, Bach (2019), section 1.1.

    Example:
        >>> tangent = linearize(lambda w: w**2, jnp.array([1.0, 2.0]))
        >>> print(tangent(jnp.array([2.0, 2.0])))
        [3. 4.]
    """
    coordinates, rest = split_params(w0)
    check_outputs(h, w0)
    outputs, derivative, gap = _linearize(h, coordinates, rest, declares_zero(h, w0))
    if gap is not None and is_concrete(gap):
        warn_if_apart(gap, stacklevel=3)
    return Tangent(h, w0, outputs, derivative)


@eqx.filter_jit
def _linearize(h: Model, coordinates: Params, rest: Params, zero: bool) -> tuple[Outputs, Products, Array | None]:
    """Return h(w0), exactly zero if that is declared, the products with Dh(w0), and their gap; one program."""
    outputs, derivative = products(lambda w: h(eqx.combine(w, rest)), coordinates)
    return jnp.zeros_like(outputs) if zero else outputs, derivative, derivative.gap(outputs, coordinates)


def _match(u: Params, w0: Params) -> Params:
    """Return the coordinates of u in the dtypes of w0's."""
    u, start = (eqx.filter(tree, eqx.is_inexact_array) for tree in (u, w0))
    got, expected = ([jtu.tree_structure(t), [leaf.shape for leaf in jtu.tree_leaves(t)]] for t in (u, start))
    if got != expected:
        msg = (
            "u must have a floating array of the same shape for each coordinate of w0, "
            f"expected {expected[0]} with shapes {expected[1]}, got {got[0]} with shapes {got[1]}; "
            "build it with jax.tree.map over w0."
        )
        raise ValueError(msg)
    return jtu.tree_map(lambda a, b: jnp.asarray(a, b.dtype), u, start)


def match_outputs(r: Outputs, outputs: Any) -> Outputs:
    """Return a cotangent in the outputs' dtype, after a check of its shape."""
    if jnp.shape(r) != outputs.shape:
        msg = f"r must have the shape of the outputs, {outputs.shape}, got {jnp.shape(r)}."
        raise ValueError(msg)
    return jnp.asarray(r, outputs.dtype)


class SingularValues(eqx.Module):
    r"""The extreme singular values of $Dh(w_0)$ in F's metric, from Lanczos; made by `singular_values`.

    Attributes:
        largest: $\|Dh(w_0)\|$, from below.
        smallest: $\sigma_{min}$ over all nk output directions, from above; exactly 0 if p < nk.
        largest_error, smallest_error: An eigenvalue of $Dh Dh^*$ lies within this of the value's square
            (Lanczos residual and rounding).
    """

    largest: Float[Array, ""]
    smallest: Float[Array, ""]
    largest_error: Float[Array, ""]
    smallest_error: Float[Array, ""]

    def __str__(self) -> str:
        """Show both values and the errors of their squares."""
        return show(self, self.largest, 0, self._lines)

    __repr__ = __str__

    def _lines(self) -> str:
        return (
            f"singular values of Dh(w0): {self.largest:.5g} down to {self.smallest:.5g}\n"
            f"  their squares are right to {self.largest_error:.1e} and {self.smallest_error:.1e}"
        )


def singular_values(
    tangent: Tangent, loss: Loss | None = None, *, num_matvecs: int = 100, key: PRNGKeyArray | None = None
) -> SingularValues:
    r"""Return the largest and smallest singular value of $Dh(w_0)$: R^p -> F, matrix-free.

    Args:
        tangent: From `linearize`.
        loss: Loss whose metric F has; None for the paper's, (1/n) sum.
        num_matvecs: Lanczos steps (each one jvp, one vjp), at most n*k, for which the result is exact. The largest
            value converges in tens of steps; the smallest needs up to n*k: read its error.
        key: Random key of the start vector; None for a fixed one.

    Returns:
        `SingularValues`.

    Raises:
        ValueError: `num_matvecs` is below 1.

    Source:
        Chizat, Oyallon, Bach (2019), theorem 2.4 ($\sigma_{min}$), section 1.2 ($\|Dh\|$).

    Example:
        >>> values = singular_values(linearize(lambda w: jnp.array([3.0, 1.0]) * w, jnp.ones(2)), num_matvecs=2)
        >>> print(f"{values.largest:.3f} {values.smallest:.3f}")
        2.121 0.707
    """
    outputs = tangent.outputs
    weight = jnp.asarray(1 / outputs.shape[0] if loss is None else loss.weight, outputs.dtype)
    theta, residuals, _ = lanczos(
        lambda r: weight * tangent.jvp(tangent.vjp(r.reshape(outputs.shape))).ravel(),
        outputs.size,
        num_matvecs,
        dtype=outputs.dtype,
        key=key,
    )
    # Lanczos drops couplings of this size as rounding; that of the products is of the same order.
    rounding = 10 * outputs.size**0.5 * jnp.finfo(outputs.dtype).eps * theta[-1]
    num_params = sum(leaf.size for leaf in jtu.tree_leaves(eqx.filter(tangent.w0, eqx.is_inexact_array)))
    deficient = num_params < outputs.size
    return SingularValues(
        largest=jnp.sqrt(jnp.maximum(theta[-1], 0)),
        smallest=jnp.where(deficient, 0, jnp.sqrt(jnp.maximum(theta[0], 0))),
        largest_error=residuals[-1] + rounding,
        smallest_error=jnp.where(deficient, 0, residuals[0] + rounding),
    )
