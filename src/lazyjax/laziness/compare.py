r"""How lazy: the model's flow next to its tangent's, the drift of its kernel, its switched activations.

Norms in F are in the metric of the loss (see `lazyjax.losses`), norms of parameters are Euclidean.
"""

import functools
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Float

from lazyjax._core.show import show
from lazyjax._core.tables import format_table
from lazyjax._core.trees import tree_norm
from lazyjax._core.types import Model, Outputs, Params, RealScalar
from lazyjax.difference.finite_jvp import finite_jvp
from lazyjax.flow.gradient_flow import Flow, gradient_flow
from lazyjax.losses.loss import Loss, as_loss
from lazyjax.models.tangent import linearize

SHOWN_TIMES = 6
"""Rows of a printed comparison."""


class Comparison(eqx.Module):
    r"""A flow next to its tangent's; made by `compare`.

    Attributes:
        flow: The flow of the model, with `outputs` and `displacement` saved.
        tangent_flow: The flow of the tangent model, at the same times.
        output_gap: $\|\alpha h(w_\alpha(t)) - \alpha \bar h(\bar w_\alpha(t))\|_F$, (time,).
        param_gap: $\|w_\alpha(t) - \bar w_\alpha(t)\|$, (time,).
        displacement_norm: $\|w_\alpha(t) - w_0\|$, (time,).
        kernel_drift: $\|K(w_\alpha(t)) - K(w_0)\|_{Frob} / \|K(w_0)\|_{Frob}$, (time,); None unless asked for.
    """

    flow: Flow
    tangent_flow: Flow
    output_gap: Float[Array, " time"]
    param_gap: Float[Array, " time"]
    displacement_norm: Float[Array, " time"]
    kernel_drift: Float[Array, " time"] | None

    def __str__(self) -> str:
        """Show the losses and the gaps at a few times, the last one included."""
        return show(self, self.output_gap, 1, self._table)

    __repr__ = __str__

    def _table(self) -> str:
        columns = {
            "time": self.flow.ts,
            "loss": self.flow.loss,
            "tangent loss": self.tangent_flow.loss,
            "output_gap": self.output_gap,
            "param_gap": self.param_gap,
            "displacement_norm": self.displacement_norm,
        }
        if self.kernel_drift is not None:
            columns["kernel_drift"] = self.kernel_drift
        values = [np.asarray(column) for column in columns.values()]
        times = values[0].size
        chosen = np.unique(np.linspace(0, times - 1, min(times, SHOWN_TIMES)).round().astype(int))
        rows = [tuple(columns), *(tuple(f"{column[i]:.3g}" for column in values) for i in chosen)]
        head = f"comparison with the tangent model at alpha = {float(self.flow.alpha):g}"
        return f"{head}\n{format_table(rows, '>')}"


def compare(
    h: Model,
    loss: Loss | Callable[[Outputs], RealScalar],
    w0: Params,
    ts: Float[Array, " time"],
    *,
    alpha: RealScalar,
    kernel_drift: bool = False,
    **options: Any,
) -> Comparison:
    r"""Follow a model and its tangent model from w0, and measure how far apart they get.

    Args:
        h: Model h(w), the data inside.
        loss: R on outputs.
        w0: Start.
        ts: Times to save at.
        alpha: Output scale in (0, inf].
        kernel_drift: Also measure the change of the tangent kernel at every time (two dense Jacobians each).
        **options: Options of `gradient_flow`, for both flows: `solver`, `rtol`, `atol`, `max_steps`, ...

    Returns:
        `Comparison`. Gaps are resolved down to the tolerance of the flows and, if the tangent flow is the closed
        form, to rounding times the stiffness (in float32 at a stiffness of 1000 give `solver=diffrax.Tsit5()`). As
        alpha grows the true ones fall as 1/alpha (outputs, centered model), 1/alpha^2 (outputs of a symmetrized model;
        parameters).

    Raises:
        ValueError, TypeError, equinox.EquinoxRuntimeError: as `gradient_flow`.

    Source:
        Chizat, Oyallon, Bach (2019), theorem 2.2 and section 1.1.

    Example:
        >>> from lazyjax import square_loss
        >>> ts = jnp.array([0.0, 1.0])
        >>> both = compare(lambda w: jnp.sin(w), square_loss(jnp.ones(2)), jnp.zeros(2), ts, alpha=100.0)
        >>> bool(both.output_gap[-1] < 1e-4)
        True
    """
    loss = as_loss(loss)
    save = ("outputs", "displacement")
    flow = gradient_flow(h, loss, w0, ts, alpha=alpha, save=save, **options)
    tangent_flow = gradient_flow(linearize(h, w0), loss, w0, ts, alpha=alpha, save=save, **options)
    drift = _drifts(h, w0, flow.displacement, flow.alpha) if kernel_drift else None
    return compare_flows(flow, tangent_flow, loss, drift)


@eqx.filter_jit
def compare_flows(flow: Flow, tangent_flow: Flow, loss: Loss, drift: Array | None = None) -> Comparison:
    """Compare two flows from one start, with their outputs and displacements at the same times."""
    eps = 1 / flow.alpha
    gap = jtu.tree_map(jnp.subtract, flow.displacement, tangent_flow.displacement)
    return Comparison(
        flow=flow,
        tangent_flow=tangent_flow,
        output_gap=jax.vmap(loss.norm)(flow.outputs - tangent_flow.outputs),
        param_gap=eps * jax.vmap(tree_norm)(gap),
        displacement_norm=eps * jax.vmap(tree_norm)(flow.displacement),
        kernel_drift=drift,
    )


@eqx.filter_jit
def _drifts(h: Model, w0: Params, displacements: Params, alpha: Array) -> Array:
    return jax.lax.map(lambda u: _kernel_drift(h, w0, u, 1 / alpha), displacements)


def measure_kernel_drift(h: Model, w0: Params, u: Params, eps: RealScalar) -> Float[Array, ""]:
    r"""Return $\|K(w_0 + \varepsilon u) - K(w_0)\|_{Frob} / \|K(w_0)\|_{Frob}$, K the Gram of h over all its outputs.

    The difference is taken by `finite_jvp` through the Jacobian's own program, so that it keeps its digits
    when it is far below rounding.

    Args:
        h: Model h(w).
        w0: Where K is compared with.
        u: Displacement, a tree of w0's coordinates.
        eps: $\varepsilon = 1/\alpha$; 0 gives 0.

    Returns:
        The relative change, a number. Cost and memory: two dense Jacobians (nk, p).

    Raises:
        ValueError: the derivative of h uses a primitive that `finite_jvp` has no rule for.

    Source:
        Chizat, Oyallon, Bach (2019), section 1.1 (lazy training keeps the differential).

    Example:
        >>> drift = measure_kernel_drift(lambda w: w**2, jnp.ones(1), jnp.ones(1), 1e-3)
        >>> print(f"{drift:.6f}")
        0.002001
    """
    return _measure_drift(h, w0, u, jnp.asarray(eps, float))


def _kernel_drift(h: Model, w0: Params, u: Params, eps: RealScalar) -> Array:
    coordinates, rest = eqx.partition(w0, eqx.is_inexact_array)

    def kernel(c: Params) -> Array:
        jacobian = jax.jacrev(lambda v: h(eqx.combine(v, rest)).ravel())(c)
        rows = [leaf.reshape(leaf.shape[0], -1) for leaf in jtu.tree_leaves(jacobian)]
        return functools.reduce(jnp.add, [row @ row.T for row in rows])

    change = finite_jvp(kernel, coordinates, eqx.filter(u, eqx.is_inexact_array), eps)
    return jnp.asarray(eps, change.dtype) * jnp.linalg.norm(change) / jnp.linalg.norm(kernel(coordinates))


_measure_drift = eqx.filter_jit(_kernel_drift)


def activation_stability(f: Any, w0: Params, w: Params, x: Array) -> Float[Array, ""]:
    r"""Return the share of hidden units and samples whose pre-activation has the same sign at w as at w0.

    Args:
        f: A model that exposes its pre-activations: `f.preactivations(w, x)`, a list of arrays (n, width_l), as
            `two_layer` and `mlp` do.
        w0: Parameters at initialization.
        w: Parameters after training.
        x: Inputs.

    Returns:
        The mean over layers of the layer's share, in [0, 1]; 1 means that no activation has switched. NaN if a
        pre-activation is.

    Raises:
        TypeError: f has no `preactivations`.

    Source:
        Chizat, Oyallon, Bach (2019), supplement C.2 and section 3.2.

    Example:
        >>> from lazyjax.models import two_layer
        >>> w0, w = ({"a": jnp.ones(2), "b": jnp.array([[1.0], [s]])} for s in (1.0, -1.0))
        >>> print(activation_stability(two_layer(jnp.tanh), w0, w, jnp.ones((3, 1))))
        0.5
    """
    if not hasattr(f, "preactivations"):
        msg = (
            "f must expose its pre-activations as f.preactivations(w, x), a list of arrays, one per layer; "
            f"{type(f).__name__} does not."
        )
        raise TypeError(msg)
    return _stability(f, w0, w, x)


@eqx.filter_jit
def _stability(f: Any, w0: Params, w: Params, x: Array) -> Array:
    first, last = f.preactivations(w0, x), f.preactivations(w, x)
    # Counted in whole numbers: jax 0.10.1 on a CPU loses terms of a mean of comparisons under jit and vmap.
    same = [jnp.sum((a > 0) == (b > 0), dtype=jnp.int32) / a.size for a, b in zip(first, last, strict=True)]
    # No comparison with NaN is true: a diverged network would keep the activations that were off.
    broken = jnp.any(jnp.stack([jnp.any(jnp.isnan(a)) for a in [*first, *last]]))
    return jnp.where(broken, jnp.nan, jnp.mean(jnp.stack(same)))
