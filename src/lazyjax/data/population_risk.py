r"""Exact population risk of two-layer ReLU nets on the sphere: no test set, no sampling noise, smooth flows.

For x uniform on the unit sphere of R^d and $\varphi$ the angle of b and c,

$$E[\max(b \cdot x, 0) \max(c \cdot x, 0)] =
  \frac{\|b\| \|c\|}{2\pi d} \bigl(\sin\varphi + (\pi - \varphi) \cos\varphi\bigr),$$

so the square of any difference of two such nets is a quadratic form of their output weights. `arccos_kernel` has the
angles to their last digits, with gradients that are finite at 0 and $\pi$, where students meet teachers.

The terms cancel: for a lazy net of size $\tau^2 m$ and a risk r, rounding is amplified by $\tau^4 m / r$. Compute in
float64, in whatever precision the nets were trained.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lazyjax.kernels.infinite_width import arccos_kernel

TwoLayerParams = dict[str, Array]
"""Parameters {"a": (m,), "b": (m, d)}, as `two_layer().init` makes them."""


def population_inner(w1: TwoLayerParams, w2: TwoLayerParams) -> Float[Array, ""]:
    r"""Return $E_x[f(w_1, x) f(w_2, x)]$ of two-layer ReLU nets of any two widths, x uniform on the unit sphere.

    Args:
        w1: {"a": (m,), "b": (m, d)}.
        w2: {"a": (m',), "b": (m', d)}.

    Raises:
        ValueError: the inputs' dimensions differ, or an output layer does not fit its units.

    Source:
        Cho and Saul (2009), kernel of order 1; Chizat, Oyallon, Bach (2019), equation (8).

    Example:
        >>> w = {"a": jnp.ones(1), "b": jnp.array([[2.0, 0.0]])}
        >>> print(population_inner(w, w))
        1.0
    """
    _check_params(w1=w1, w2=w2)
    return _inner(w1, w2)


@jax.jit
def _inner(w1: TwoLayerParams, w2: TwoLayerParams) -> Float[Array, ""]:
    # E||a||^2 = 1 of the kernel of the output layer: on the sphere each coordinate has variance 1/d.
    return w1["a"] @ arccos_kernel(w1["b"], w2["b"], layer="output", mean_sq_input=1.0) @ w2["a"]


def population_risk(w: TwoLayerParams, teacher: TwoLayerParams) -> Float[Array, ""]:
    r"""Return $\frac12 E_x (f(w, x) - f(w^*, x))^2$ of two-layer ReLU nets, x uniform on the unit sphere.

    Args:
        w: Student, {"a": (m,), "b": (m, d)}.
        teacher: $w^*$, of any width. With its "a" zero the risk is half the mean square of the student.

    Returns:
        The risk, with finite derivatives in w everywhere; 0 up to rounding if the two are one function.

    Raises:
        ValueError: the inputs' dimensions differ, or an output layer does not fit its units.

    Example:
        >>> w = {"a": jnp.ones(1), "b": jnp.array([[2.0, 0.0]])}
        >>> print(population_risk(w, {"a": jnp.ones(1), "b": jnp.array([[-2.0, 0.0]])}))
        1.0
    """
    _check_params(w=w, teacher=teacher)
    return _risk(w, teacher)


@jax.jit
def _risk(w: TwoLayerParams, teacher: TwoLayerParams) -> Float[Array, ""]:
    gap = {
        "a": jnp.concatenate([w["a"], -teacher["a"].astype(w["a"].dtype)]),
        "b": jnp.concatenate([w["b"], teacher["b"].astype(w["b"].dtype)]),
    }
    return 0.5 * _inner(gap, gap)


def tangent_population_risk(
    w0: TwoLayerParams, displacement: TwoLayerParams, teacher: TwoLayerParams
) -> Float[Array, ""]:
    r"""Return $\frac12 E_x (Df(w_0, x) v - f(w^*, x))^2$, the risk of a tangent model whose output is zero at $w_0$.

    Args:
        w0: Where the student is linearized; its output there must be zero, as that of a symmetrized one is.
        displacement: v, of w0's structure.
        teacher: $w^*$.

    Returns:
        The risk. Its terms are derivatives of `population_inner` along v: both arguments for the square, one for the
        product with the teacher.

    Raises:
        ValueError: the inputs' dimensions differ, or an output layer does not fit its units.

    Example:
        >>> w0 = {"a": jnp.array([1.0, -1.0]), "b": jnp.ones((2, 1))}
        >>> v = {"a": jnp.array([1.0, 0.0]), "b": jnp.zeros((2, 1))}
        >>> print(tangent_population_risk(w0, v, {"a": jnp.ones(1), "b": jnp.ones((1, 1))}))
        0.0
    """
    _check_params(w0=w0, displacement=displacement, teacher=teacher)
    return _tangent_risk(w0, displacement, teacher)


@jax.jit
def _tangent_risk(w0: TwoLayerParams, displacement: TwoLayerParams, teacher: TwoLayerParams) -> Float[Array, ""]:
    def along(function, w):  # the derivative at w0 in the direction v
        return jax.jvp(function, (w,), (displacement,))[1]

    square = along(lambda first: along(lambda second: _inner(first, second), w0), w0)
    product = along(lambda w: _inner(w, teacher), w0)
    return 0.5 * (square - 2 * product + _inner(teacher, teacher))


def _check_params(**nets: TwoLayerParams) -> None:
    for name, w in nets.items():
        if w["a"].shape != w["b"].shape[:1]:
            msg = f"{name} must hold one output weight per unit, got a {w['a'].shape} and b {w['b'].shape}."
            raise ValueError(msg)
    if len({w["b"].shape[1] for w in nets.values()}) > 1:
        shapes = ", ".join(f"{name} {w['b'].shape}" for name, w in nets.items())
        msg = f"{' and '.join(nets)} must have inputs of one dimension d, got b of shapes {shapes}."
        raise ValueError(msg)
