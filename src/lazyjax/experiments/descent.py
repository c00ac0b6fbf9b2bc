r"""The paper's own method: gradient descent by optax in one program, measured after chosen steps.

`lazyjax.gradient_descent` follows one model at any alpha to its end; here many small nets are followed, plainly, and
measured on the way. In both, the state is the displacement $v = w - w_0$: in float32 a step of a lazy net is smaller
than a rounding of its weights, and would be lost.
"""

import functools
import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import optax
from jaxtyping import Array, Int

from lazyjax._core.types import Params

if TYPE_CHECKING:
    import xarray


def descend(
    gradient: Callable[[Params, Array], Params],
    w0: Params,
    optimizer: optax.GradientTransformation,
    frames: Int[np.ndarray, " frames"],
    measure: Callable[[Params], Any],
) -> tuple[Params, Any]:
    r"""Follow an optimizer from w0, and measure the displacement after some of its steps.

    Args:
        gradient: $(w, i) \mapsto$ the gradient that step i uses at w; i counts from 0 and may choose a batch.
        w0: Start, a tree of floating arrays.
        optimizer: Any optax optimizer; its learning rate may be traced, so that lanes of a `vmap` have their own.
        frames: Numbers of steps after which to measure, increasing; the descent ends after the last.
        measure: Function of the displacement that returns any tree of arrays.

    Returns:
        (displacement, measures): the last v, and the measures with a leading axis of frames.

    Raises:
        ValueError: frames do not increase, or are negative.

    Source:
        Chizat, Oyallon, Bach (2019), section 3.1 (experiments by gradient descent).

    Example:
        >>> gradient = lambda w, i: w  # of w^2/2
        >>> v, seen = descend(gradient, jnp.ones(1), optax.sgd(0.5), np.array([0, 1, 3]), lambda v: v[0])
        >>> print(seen)
        [ 0.    -0.5   -0.875]
    """
    if frames.ndim != 1 or frames.size == 0 or frames[0] < 0 or (np.diff(frames) <= 0).any():
        msg = f"frames must be increasing numbers of steps, at least 0, got {frames}."
        raise ValueError(msg)

    def step(i: Array, carry: tuple[Params, Any]) -> tuple[Params, Any]:
        v, state = carry
        w = jtu.tree_map(jnp.add, w0, v)
        updates, state = optimizer.update(gradient(w, i), state, w)
        return jtu.tree_map(lambda a, b: a + b.astype(a.dtype), v, updates), state

    def until(carry: tuple[Params, Any], ends: tuple[Array, Array]) -> tuple[Any, Any]:
        carry = jax.lax.fori_loop(*ends, step, carry)
        return carry, measure(carry[0])

    ends = (jnp.asarray(np.concatenate([[0], frames[:-1]])), jnp.asarray(frames))
    (v, _), measures = jax.lax.scan(until, (jtu.tree_map(jnp.zeros_like, w0), optimizer.init(w0)), ends)
    return v, measures


def even_frames(steps: int, frames: int) -> Int[np.ndarray, " frames"]:
    """Return about `frames` equally spaced numbers of steps from 0 to `steps`, both included."""
    return np.unique(np.round(np.linspace(0, steps, min(frames, steps + 1))).astype(int))


def log_frames(steps: int, frames: int) -> Int[np.ndarray, " frames"]:
    """Return 0 and at most `frames` more numbers of steps, equally spaced on a logarithmic scale up to `steps`."""
    return np.unique(np.concatenate([[0], np.round(np.geomspace(1, steps, frames)).astype(int)]))


def mark_lanes(found: "xarray.Dataset", axis: str) -> "xarray.Dataset":
    """Mark the descents of a sweep that diverged one by one, if a lane of the sweep is a column along an axis.

    The sweep marks the whole column if a number in it is not finite. Here "descent_failed" says which of its descents
    diverged; their numbers are NaN, those of the others are as computed.
    """
    kept = found.drop_vars([name for name in found if f"{name}_failed" in found] + ["failed", "message"])
    kept = kept.rename({name: str(name).removesuffix("_failed") for name in kept if str(name).endswith("_failed")})
    whole = {name: values.fillna(found[name]) if name in found else values for name, values in kept.items()}
    own = {*found["failed"].dims, axis}
    columns = [name for name, values in whole.items() if axis in values.dims and values.dtype.kind == "f"]
    failed = functools.reduce(operator.or_, (_broken(whole[name], own) for name in columns))
    return kept.assign({name: whole[name].where(~failed) if name in columns else whole[name] for name in whole}).assign(
        descent_failed=failed
    )


def _broken(values: "xarray.DataArray", own: set[Any]) -> "xarray.DataArray":
    # Both NaN and infinity times 0 are NaN.
    return (values * 0).sum([dim for dim in values.dims if dim not in own], skipna=False).isnull()
