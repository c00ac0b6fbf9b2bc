r"""How lazy a training is, from within any training loop: a function of the current parameters."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Float

from lazyjax._core.checks import check_inputs, split_params
from lazyjax._core.forward import jvp
from lazyjax._core.show import show
from lazyjax._core.trees import safe_ratio, tree_norm
from lazyjax._core.types import Model, Params
from lazyjax.difference.finite_jvp import finite_value_and_jvp
from lazyjax.kernels.gram import gram
from lazyjax.laziness.compare import activation_stability


class Laziness(eqx.Module):
    r"""A measurement of how far parameters w are from lazy training that started at w0; made by a `Tracker`.

    Norms of outputs are $\|y\|_F = (\frac1n \sum_i |y_i|^2)^{1/2}$ over the probe, those of parameters Euclidean.

    Attributes:
        displacement_norm: $\|w - w_0\|$.
        relative_displacement: $\|w - w_0\| / \|w_0\|$.
        output_change: $\|f(w) - f(w_0)\|_F$.
        linearization_error: $\|f(w) - f(w_0) - Df(w_0)(w - w_0)\|_F$; for the outputs $\alpha h$ multiply by alpha.
        relative_error: `linearization_error` over `output_change`; 0 if nothing has changed.
        kernel_drift: $\|K(w) - K(w_0)\|_{Frob} / \|K(w_0)\|_{Frob}$, K the tangent kernel's Gram on the probe; None
            if the tracker was told not to measure the kernel.
        kernel_alignment: $\langle K(w), K(w_0)\rangle / (\|K(w)\| \|K(w_0)\|)$ in the Frobenius inner product, at
            most 1 up to rounding; None like the drift.
        stability: Share of hidden units and samples whose pre-activation has kept its sign; None for models that do
            not expose their pre-activations.
    """

    displacement_norm: Float[Array, ""]
    relative_displacement: Float[Array, ""]
    output_change: Float[Array, ""]
    linearization_error: Float[Array, ""]
    relative_error: Float[Array, ""]
    kernel_drift: Float[Array, ""] | None
    kernel_alignment: Float[Array, ""] | None
    stability: Float[Array, ""] | None

    def __str__(self) -> str:
        """Show every measure, a line per subject."""
        return show(self, self.displacement_norm, 0, self._lines)

    __repr__ = __str__

    def _lines(self) -> str:
        lines = [
            f"moved by {self.displacement_norm:.3g}, {100 * self.relative_displacement:.3g}% of |w0|",
            f"outputs changed by {self.output_change:.3g}, of which the tangent model misses "
            f"{100 * self.relative_error:.3g}%",
        ]
        if self.kernel_drift is not None:
            alignment = f"alignment {self.kernel_alignment:.6g}"
            lines.append(f"tangent kernel changed by {100 * self.kernel_drift:.3g}% ({alignment})")
        if self.stability is not None:
            lines.append(f"activations with the same sign: {100 * self.stability:.4g}%")
        return "\n".join(lines)


class Tracker(eqx.Module):
    """A function of parameters that returns their `Laziness`, compiled once; made by `track`."""

    f: Model
    w0: Params
    x: Array
    kernel: bool = eqx.field(static=True)
    difference: str = eqx.field(static=True)

    def __call__(self, w: Params) -> Laziness:
        """Return what is measured at w, a tree like w0."""
        coordinates = eqx.filter(self.w0, eqx.is_inexact_array)
        now = eqx.filter(w, eqx.is_inexact_array)
        _check_alike(now, coordinates)
        return _measure(self, w)


def track(f: Model, w0: Params, x: Any, *, kernel: bool = True, difference: str = "exact") -> Tracker:
    r"""Measure how lazy a training is, in any training loop: a jitted function of the current parameters.

    The loop may be in plain optax, Flax, Equinox or another library: all that is needed is the batch function f and
    the current parameters. The tracker is compiled at its first call, and may be called inside jit and scan too.

    Args:
        f: Model f(w, x) with outputs (n,) or (n, k). If it has `preactivations(w, x)`, a list of arrays (n, width),
            the stability of its activations is measured too.
        w0: The parameters that training starts from, any pytree. They are kept: a loop that donates its buffers
            (`donate_argnums`) needs its own copy.
        x: Inputs to probe with, samples first; a few dozen are enough.
        kernel: Measure the tangent kernel's drift and alignment, at the price of about three Grams of the probe.
        difference: "exact": changes smaller than rounding keep their digits (`finite_jvp`). "plain": values at w
            less values at w0, for models with a primitive that `finite_jvp` has no rule for; changes are resolved
            down to rounding, and the kernel costs two Grams.

    Returns:
        `Tracker`, a jitted function of the parameters that returns `Laziness`.

    Raises:
        ValueError, TypeError: arguments or parameters unfit; a primitive without a rule (with "exact").

    Source:
        Chizat, Oyallon, Bach (2019), sections 1.1 and 3.2, supplement C.2 (stability of activations).

    Example:
        >>> import jax
        >>> import jax.random as jr
        >>> from lazyjax.models import two_layer
        >>> w0, x = two_layer().init(jr.key(0), d=3, width=8), jr.normal(jr.key(1), (5, 3))
        >>> tracker = track(two_layer(jnp.tanh), w0, x)
        >>> w = jax.tree.map(lambda leaf: 1.001 * leaf, w0)  # a step of anyone's optimizer
        >>> now = tracker(w)
        >>> print(f"moved {now.relative_displacement:.1e}, stability {now.stability:.2f}")
        moved 1.0e-03, stability 1.00
        >>> bool(now.relative_error < 1e-3), bool(now.kernel_drift < 1e-2), bool(now.kernel_alignment > 0.9999)
        (True, True, True)
    """
    if difference not in ("exact", "plain"):
        msg = f'difference must be "exact" or "plain", got {difference!r}.'
        raise ValueError(msg)
    split_params(w0)
    x, _ = check_inputs(f, w0, x, "x")
    tracker = Tracker(f, jtu.tree_map(_as_array, w0), x, bool(kernel), difference)
    # A primitive without a rule is seen here, not in the midst of a training.
    eqx.filter_eval_shape(_measure, tracker, tracker.w0)
    return tracker


def _as_array(leaf: Any) -> Any:
    return jnp.asarray(leaf) if isinstance(leaf, np.ndarray) else leaf


def _check_alike(now: Params, start: Params) -> None:
    got, expected = ([jtu.tree_structure(t), [leaf.shape for leaf in jtu.tree_leaves(t)]] for t in (now, start))
    if got != expected:
        msg = (
            f"w must have the structure and shapes of w0, expected {expected[0]} with shapes {expected[1]}, got "
            f"{got[0]} with shapes {got[1]}; give the trained parameters alone, without the optimizer's state."
        )
        raise ValueError(msg)


@eqx.filter_jit
def _measure(tracker: Tracker, w: Params) -> Laziness:
    start, rest = eqx.partition(tracker.w0, eqx.is_inexact_array)
    step = jtu.tree_map(lambda a, b: a.astype(b.dtype) - b, eqx.filter(w, eqx.is_inexact_array), start)

    def outputs(c: Params) -> Array:
        return tracker.f(eqx.combine(c, rest), tracker.x)

    change = _change(tracker, outputs, start, step)[1]
    gap = change - jvp(outputs, (start,), (step,))[1]
    scale = jnp.asarray(change.shape[0] ** -0.5, change.dtype)
    moved, error = scale * tree_norm(change), scale * tree_norm(gap)
    has_units = hasattr(tracker.f, "preactivations")
    drift = alignment = None
    if tracker.kernel:
        drift, alignment = _kernel(tracker, start, rest, step)
    return Laziness(
        displacement_norm=tree_norm(step),
        relative_displacement=safe_ratio(tree_norm(step), tree_norm(start)),
        output_change=moved,
        linearization_error=error,
        relative_error=safe_ratio(error, moved),
        kernel_drift=drift,
        kernel_alignment=alignment,
        stability=activation_stability(tracker.f, tracker.w0, w, tracker.x) if has_units else None,
    )


def _change(tracker: Tracker, function: Any, start: Params, step: Params) -> tuple[Array, Array]:
    """Return a function at w0, and its change from there to w."""
    if tracker.difference == "exact":
        return finite_value_and_jvp(function, start, step, 1.0)
    before = function(start)
    return before, function(jtu.tree_map(jnp.add, start, step)) - before


def _kernel(tracker: Tracker, start: Params, rest: Params, step: Params) -> tuple[Array, Array]:
    """Return drift and alignment of the Gram."""

    def kernel(c: Params) -> Array:
        return gram(lambda v, x: tracker.f(eqx.combine(v, rest), x), c, tracker.x)

    before, change = _change(tracker, kernel, start, step)
    first, moved, now = tree_norm(before), tree_norm(change), tree_norm(before + change)
    return safe_ratio(moved, first), safe_ratio(jnp.sum(before * (before + change)), first * now)
