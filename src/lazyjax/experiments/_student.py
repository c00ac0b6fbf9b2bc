"""Students beside a teacher on the sphere: how an experiment is drawn, and its exact risk."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
from jaxtyping import Array, Float

from lazyjax._types import Params
from lazyjax.data import draw_teacher, sphere
from lazyjax.model import init_two_layer, two_layer
from lazyjax.population import population_risk


class Problem(NamedTuple):
    """One experiment: inputs, targets, the teacher behind them, and a start of standard deviation 1."""

    x: Array
    y: Array
    teacher: dict[str, Array]
    start: dict[str, Array]


def draw(
    seed: Any, n: int, d: int, width: int, *, symmetric: bool = True, scale: float = 1.0, dtype: Any = None
) -> Problem:
    """The experiment of a seed, drawn in JAX's default dtype; what the student sees is then rounded to its own.

    Args:
        seed: A whole number.
        n: Training samples.
        d: Dimension of the inputs.
        width: Units of the student.
        symmetric: Mirror the second half of the start.
        scale: Of the teacher.
        dtype: Of inputs, targets and start.
    """
    key_teacher, key_x, key_start = jr.split(jr.key(seed), 3)
    teacher, x = draw_teacher(key_teacher, d, scale=scale), sphere(key_x, n, d)
    start = init_two_layer(key_start, d, width, symmetric=symmetric)
    dtype = x.dtype if dtype is None else dtype
    x, start = jtu.tree_map(lambda leaf: leaf.astype(dtype), (x, start))
    y = two_layer()(teacher, x.astype(teacher["b"].dtype))
    return Problem(x, y.astype(dtype), teacher, start)


def risk_at(w0: Params, displacement: Params, teacher: Params, alpha: Any = 1.0) -> Float[Array, ""]:
    """The population risk of alpha f at w0 + v, in the teacher's dtype: in a net's own it would be lost."""
    dtype = teacher["b"].dtype
    w = jtu.tree_map(lambda a, b: a.astype(dtype) + b.astype(dtype), w0, displacement)
    return population_risk(w | {"a": jnp.asarray(alpha, dtype) * w["a"]}, teacher)


def check_double() -> None:
    """Refuse to measure risks in float32, where those of lazy nets cancel to nothing."""
    if jnp.result_type(float) != jnp.float64:
        msg = 'risks of lazy nets cancel, so they need float64: jax.config.update("jax_enable_x64", True) first.'
        raise ValueError(msg)
