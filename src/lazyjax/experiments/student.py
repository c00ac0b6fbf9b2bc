"""What the figures of a teacher and a student share: how a problem is drawn at random, and its exact risk."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
from jaxtyping import Array, Float, PRNGKeyArray

from lazyjax._core.types import Params
from lazyjax.data.datasets import draw_teacher, sphere
from lazyjax.data.population_risk import population_risk
from lazyjax.models.shallow import two_layer


class Problem(NamedTuple):
    """One problem: inputs, targets, the teacher behind them, and a start of standard deviation 1."""

    x: Array
    y: Array
    teacher: dict[str, Array]
    start: dict[str, Array]


def sample_problem(
    seed: Any,
    n: int,
    d: int,
    width: int,
    *,
    symmetric: bool = True,
    scale: float = 1.0,
    unit: bool = False,
    dtype: Any = None,
) -> Problem:
    """Draw the problem of a seed in JAX's default dtype, and round what the student sees to its own.

    Args:
        seed: A whole number.
        n: Training samples.
        d: Dimension of the inputs.
        width: Units of the student.
        symmetric: Symmetrize the start.
        scale: Scale of the teacher's outputs.
        unit: Start with output weights uniform in [0, 1] (negated in the second half of a symmetrized start) and input
            weights on the unit sphere, as the paper's code does for Figures 1(a), 1(b) and 6; otherwise both are
            Gaussian.
        dtype: The dtype of inputs, targets and start.
    """
    key_teacher, key_x, key_start = jr.split(jr.key(seed), 3)
    teacher, x = draw_teacher(key_teacher, d, scale=scale), sphere(key_x, n, d)
    start = two_layer().init(key_start, d=d, width=width, symmetric=symmetric)
    if unit:
        start = _on_the_sphere(key_start, start, symmetric=symmetric)
    dtype = x.dtype if dtype is None else dtype
    x, start = jtu.tree_map(lambda leaf: leaf.astype(dtype), (x, start))
    y = two_layer()(teacher, x.astype(teacher["b"].dtype))
    return Problem(x, y.astype(dtype), teacher, start)


def _on_the_sphere(key: PRNGKeyArray, start: dict[str, Array], *, symmetric: bool) -> dict[str, Array]:
    b = start["b"]
    # Not folded with 0 or 1: those are the keys that `TwoLayer.init` splits off, and a would follow b.
    a = jr.uniform(jr.fold_in(key, 2), (b.shape[0] // 2 if symmetric else b.shape[0],), b.dtype)
    b = b / jnp.linalg.norm(b, axis=1, keepdims=True)
    return {"a": jnp.concatenate([a, -a]) if symmetric else a, "b": b}


def risk_at(w0: Params, displacement: Params, teacher: Params, alpha: Any = 1.0) -> Float[Array, ""]:
    """Return the population risk of alpha f at w0 + v in the teacher's dtype: a lazy net's own would lose it."""
    dtype = teacher["b"].dtype
    w = jtu.tree_map(lambda a, b: a.astype(dtype) + b.astype(dtype), w0, displacement)
    return population_risk(w | {"a": jnp.asarray(alpha, dtype) * w["a"]}, teacher)


def check_double() -> None:
    """Check that JAX's default dtype is float64: in float32 the risks of lazy nets cancel to nothing."""
    if jnp.result_type(float) != jnp.float64:
        msg = 'risks of lazy nets cancel, so they need float64: jax.config.update("jax_enable_x64", True) first.'
        raise ValueError(msg)
