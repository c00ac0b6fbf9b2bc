r"""The paper's models as plain functions of (parameters, inputs), and maps between models.

A model is any callable `h(w) -> outputs`, the data inside, or `f(w, x) -> outputs`; nothing here is
needed to use the rest of lazyjax. `center`, `symmetrize` and `rescale` take either kind.

**Zero must be zero.** The lazy limit needs $h(w_0) = 0$, and at $\alpha = 10^7$ a rounding residue of
$10^{-8}$ in $h(w_0)$ becomes 0.1 in $\alpha h(w_0)$. So a centred or symmetrized model *declares* that it
vanishes at $w_0$ (`declares_zero`), and the flows start from exact zeros. To keep the declaration when the
inputs are fixed, use `functools.partial(f, x=x)` rather than a lambda.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from lazyjax._check import is_concrete, split_params
from lazyjax._types import Model, Params, RealScalar


class TwoLayer(eqx.Module):
    r"""$f(w, x) = \sum_{j=1}^m a_j\, \sigma(b_j \cdot x)$; made by `two_layer`."""

    activation: Callable[[Array], Array]

    def __call__(self, w: dict[str, Array], x: Float[Array, "n d"]) -> Float[Array, " n"]:
        """Outputs (n,)."""
        return self.activation(x @ w["b"].T) @ w["a"]

    def preactivations(self, w: dict[str, Array], x: Float[Array, "n d"]) -> list[Float[Array, "n m"]]:
        """The one hidden layer before its activation."""
        return [x @ w["b"].T]


def two_layer(activation: Callable[[Array], Array] = jax.nn.relu) -> TwoLayer:
    r"""Two-layer network $f(w, x) = \sum_{j=1}^m a_j\, \sigma(b_j \cdot x)$, without a factor 1/m.

    Args:
        activation: $\sigma$, elementwise.

    Returns:
        f(w, x) with w = {"a": (m,), "b": (m, d)}, x (n, d), outputs (n,).

    Source:
        Chizat, Oyallon, Bach (2019), section 3.1 (a is the output layer, b the input layer).

    Example:
        >>> w = init_two_layer(jr.key(0), 3, 4)
        >>> two_layer(jnp.tanh)(w, jnp.ones((5, 3))).shape
        (5,)
    """
    return TwoLayer(activation)


def init_two_layer(
    key: PRNGKeyArray,
    d: int,
    width: int,
    *,
    tau: RealScalar = 1.0,
    symmetric: bool = False,
    dtype: Any = None,
) -> dict[str, Array]:
    r"""Parameters $a_j, b_j \sim N(0, \tau^2)$ of a two-layer network.

    Args:
        key: Random key.
        d: Input dimension.
        width: Number m of hidden units.
        tau: Standard deviation; large tau is lazy (the poster's captions have it swapped).
        symmetric: Mirror the second half of the units, $b_{j+m/2} = b_j$, $a_{j+m/2} = -a_j$, so that the
            outputs vanish up to rounding. For an exact zero at any alpha also use `center`, or `symmetrize`.
        dtype: Floating dtype; None for JAX's default.

    Returns:
        {"a": (width,), "b": (width, d)}.

    Raises:
        ValueError: d or width not positive, tau not positive, or an odd width with `symmetric`.

    Source:
        Chizat, Oyallon, Bach (2019), section 3.1.

    Example:
        >>> w = init_two_layer(jr.key(0), 3, 4, symmetric=True)
        >>> bool(w["a"][0] == -w["a"][2])
        True
    """
    if d < 1 or width < 1:
        msg = f"d and width must be at least 1, got d={d}, width={width}."
        raise ValueError(msg)
    if is_concrete(tau) and not float(tau) > 0:
        msg = f"tau must be a positive standard deviation, got {tau}."
        raise ValueError(msg)
    if symmetric and width % 2:
        msg = f"width must be even for a mirrored (symmetric) init, got {width}; use {width + 1}."
        raise ValueError(msg)
    key_a, key_b = jr.split(key)
    units = width // 2 if symmetric else width
    dtype = jnp.result_type(float) if dtype is None else dtype
    scale = jnp.asarray(tau, dtype)
    a = scale * jr.normal(key_a, (units,), dtype)
    b = scale * jr.normal(key_b, (units, d), dtype)
    if symmetric:
        a, b = jnp.concatenate([a, -a]), jnp.concatenate([b, b])
    return {"a": a, "b": b}


class MLP(eqx.Module):
    """Fully connected network, an activation between its layers; made by `mlp`."""

    activation: Callable[[Array], Array]

    def __call__(self, w: list[dict[str, Array]], x: Float[Array, "n d"]) -> Float[Array, "n k"]:
        """Outputs (n, k)."""
        for layer in w[:-1]:
            x = self.activation(_affine(layer, x))
        return _affine(w[-1], x)

    def preactivations(self, w: list[dict[str, Array]], x: Float[Array, "n d"]) -> list[Float[Array, "n _"]]:
        """The hidden layers before their activations."""
        hidden = []
        for layer in w[:-1]:
            hidden.append(_affine(layer, x))
            x = self.activation(hidden[-1])
        return hidden


def _affine(layer: dict[str, Array], x: Array) -> Array:
    return x @ layer["weight"].T + layer["bias"][None, :]


def mlp(activation: Callable[[Array], Array] = jax.nn.relu) -> MLP:
    r"""Multilayer perceptron $x_{l+1} = \sigma(W_l x_l + c_l)$, the last layer affine.

    Args:
        activation: $\sigma$, elementwise.

    Returns:
        f(w, x) with w = [{"weight": (out, in), "bias": (out,)}, ...], x (n, d), outputs (n, k).

    Example:
        >>> w = init_mlp(jr.key(0), [3, 8, 2])
        >>> mlp(jnp.tanh)(w, jnp.ones((5, 3))).shape
        (5, 2)
    """
    return MLP(activation)


def init_mlp(
    key: PRNGKeyArray, sizes: Sequence[int], *, gain: RealScalar = 1.0, dtype: Any = None
) -> list[dict[str, Array]]:
    r"""Parameters of `mlp`: $W_l \sim N(0, g^2 \cdot 2/(n_{in} + n_{out}))$ (Xavier), zero biases.

    Args:
        key: Random key.
        sizes: Widths (d, hidden..., k), at least an input and an output.
        gain: $g$; the standard deviation of every layer is proportional to it.
        dtype: Floating dtype; None for JAX's default.

    Raises:
        ValueError: fewer than two sizes, or one that is not positive.

    Source:
        Chizat, Oyallon, Bach (2019), section 3.2 (Xavier normal weights, zero biases).

    Example:
        >>> [layer["weight"].shape for layer in init_mlp(jr.key(0), [3, 8, 2])]
        [(8, 3), (2, 8)]
    """
    if len(sizes) < 2 or min(sizes) < 1:
        msg = f"sizes must be at least two positive widths (input, ..., output), got {tuple(sizes)}."
        raise ValueError(msg)
    dtype = jnp.result_type(float) if dtype is None else dtype
    keys = jr.split(key, len(sizes) - 1)
    layers = []
    for k, n_in, n_out in zip(keys, sizes[:-1], sizes[1:], strict=True):
        std = jnp.asarray(gain, dtype) * np.sqrt(2 / (n_in + n_out)).astype(dtype)
        layers.append({"weight": std * jr.normal(k, (n_out, n_in), dtype), "bias": jnp.zeros(n_out, dtype)})
    return layers


def diagonal_linear(w: dict[str, Float[Array, " d"]], x: Float[Array, "n d"]) -> Float[Array, " n"]:
    r"""Diagonal linear network $f(w, x) = x \cdot (u^2 - v^2)$, linear in x and quadratic in w.

    Args:
        w: {"u": (d,), "v": (d,)}, as `init_diagonal_linear` makes them.
        x: Inputs (n, d).

    Source:
        Smith's report, section 4, after Woodworth et al. (2020). $u_i v_i$ is conserved by the flow.

    Example:
        >>> diagonal_linear(init_diagonal_linear(3), jnp.ones((2, 3)))
        Array([0., 0.], dtype=float...)
    """
    return x @ (w["u"] ** 2 - w["v"] ** 2)


def init_diagonal_linear(d: int, *, tau: RealScalar = 1.0, dtype: Any = None) -> dict[str, Array]:
    r"""Parameters $u_0 = v_0 = \tau 1$ of `diagonal_linear`, so that the outputs vanish.

    Raises:
        ValueError: d is not positive.

    Example:
        >>> init_diagonal_linear(2)["u"].shape
        (2,)
    """
    if d < 1:
        msg = f"d must be at least 1, got {d}."
        raise ValueError(msg)
    dtype = jnp.result_type(float) if dtype is None else dtype
    return {name: jnp.full(d, tau, dtype) for name in ("u", "v")}


class Centered(eqx.Module):
    """$w, x... -> f(w, x...) - f(w_0, x...)$; made by `center`."""

    f: Model
    w0: Params

    def __call__(self, w: Params, *args: Any, **kwargs: Any) -> Array:
        """The outputs of f less those at w0."""
        return _gap(self.f, w, self.w0, *args, **kwargs)

    def declares_zero(self, w: Params) -> bool:
        """Whether w is the w0 that the model was centred at."""
        return same_params(w, self.w0)

    def preactivations(self, w: Params, *args: Any) -> Any:
        """Those of f, where f has them."""
        return self.f.preactivations(w, *args)  # pyright: ignore[reportFunctionMemberAccess]


def center(h: Model, w0: Params) -> Centered:
    r"""The centred model $w \mapsto h(w) - h(w_0)$: zero at w0, the same Dh.

    Args:
        h: Model h(w), or f(w, x).
        w0: Where the outputs shall vanish; start the flow from this very object.

    Returns:
        A model of the same arguments, which declares that it is exactly zero at w0.

    Source:
        Chizat, Oyallon, Bach (2019), section 3.2.

    Example:
        >>> h = center(lambda w: jnp.exp(w), jnp.ones(2))
        >>> print(h(jnp.ones(2)))
        [0. 0.]
    """
    split_params(w0)
    return Centered(h, w0)


class Symmetrized(eqx.Module):
    """$((w_a, w_b), x...) -> f(w_a, x...) - f(w_b, x...)$; made by `symmetrize`."""

    f: Model

    def __call__(self, w: tuple[Params, Params], *args: Any, **kwargs: Any) -> Array:
        """The outputs of f at the first half of the parameters less those at the second."""
        first, second = w
        return _gap(self.f, first, second, *args, **kwargs)

    def declares_zero(self, w: tuple[Params, Params]) -> bool:
        """Whether the two halves of w are equal."""
        return same_params(*w)

    def preactivations(self, w: tuple[Params, Params], *args: Any) -> list[Any]:
        """Those of f at both halves, where f has them."""
        return [z for half in w for z in self.f.preactivations(half, *args)]  # pyright: ignore[reportFunctionMemberAccess]


def symmetrize(f: Model, w0: Params) -> tuple[Symmetrized, tuple[Params, Params]]:
    r"""The doubled model $f_2(w_a, w_b) = f(w_a) - f(w_b)$ and its start $(w_0, w_0)$.

    The output at the start is exactly zero, the tangent kernel twice that of f. The second-order terms of
    the two halves cancel, so $\sup\|y - \bar y\| = O(1/\alpha^2)$ instead of $O(1/\alpha)$.

    Args:
        f: Model f(w, x) or h(w).
        w0: Its parameters.

    Returns:
        (f2, w2): f2(w2, x...) of the doubled parameters w2 = (w0, w0).

    Source:
        Chizat, Oyallon, Bach (2019), section 3.1; the 1/alpha^2 is ours (E20 in our notes).

    Example:
        >>> f2, w2 = symmetrize(lambda w: jnp.exp(w), jnp.ones(2))
        >>> print(f2(w2))
        [0. 0.]
    """
    split_params(w0)
    return Symmetrized(f), (w0, w0)


class Rescaled(eqx.Module):
    """$w, x... -> c f(w, x...)$; made by `rescale`."""

    f: Model
    factor: Array

    def __call__(self, w: Params, *args: Any, **kwargs: Any) -> Array:
        """The outputs of f times the factor."""
        out = self.f(w, *args, **kwargs)
        return self.factor.astype(out.dtype) * out

    def declares_zero(self, w: Params) -> bool:
        """Whether f does."""
        return declares_zero(self.f, w)

    def preactivations(self, w: Params, *args: Any) -> Any:
        """Those of f, where f has them."""
        return self.f.preactivations(w, *args)  # pyright: ignore[reportFunctionMemberAccess]


def rescale(h: Model, factor: RealScalar) -> Rescaled:
    r"""The model $w \mapsto c\,h(w)$; zero where h is declared zero.

    To follow the flow at output scale alpha, prefer `gradient_flow(h, ..., alpha=alpha)`, which keeps every
    digit at any alpha; `rescale` is the plain product.

    Raises:
        ValueError: the factor is not a finite number.

    Example:
        >>> print(rescale(lambda w: w, 3.0)(jnp.ones(2)))
        [3. 3.]
    """
    value = jnp.asarray(factor, jnp.result_type(float))
    if value.shape != () or (is_concrete(value) and not np.isfinite(value)):
        msg = f"factor must be a finite number, got {factor}."
        raise ValueError(msg)
    return Rescaled(h, value)


class OnData(eqx.Module):
    """$w -> f(w, x)$ with the inputs as part of the model; keeps what f declares.

    Like `functools.partial(f, x=x)` for an f whose second argument has any name.
    """

    f: Model
    x: Array

    def __call__(self, w: Params) -> Array:
        """The outputs of f at the inputs."""
        return self.f(w, self.x)

    def declares_zero(self, w: Params) -> bool:
        """Whether f does."""
        return declares_zero(self.f, w)


def declares_zero(h: Model, w: Params) -> bool:
    """Whether h declares that its outputs at w are exactly zero (looking through `functools.partial`)."""
    # A positional argument would be the parameters' place: what is then left to give is something else.
    while isinstance(h, functools.partial) and not h.args:
        h = h.func
    check = getattr(h, "declares_zero", None)
    return check is not None and check(w)


def same_params(first: Params, second: Params) -> bool:
    """Whether two trees hold the same: the very same leaves, or equal ones that can be looked at."""
    if jtu.tree_structure(first) != jtu.tree_structure(second):
        return False
    return all(_same_leaf(x, y) for x, y in zip(jtu.tree_leaves(first), jtu.tree_leaves(second), strict=True))


def _same_leaf(x: Any, y: Any) -> bool:
    if x is y:
        return True
    if not (eqx.is_array(x) and eqx.is_array(y)):
        return not eqx.is_array(x) and not eqx.is_array(y) and type(x) is type(y) and bool(x == y)
    if x.shape != y.shape or x.dtype != y.dtype or not is_concrete((x, y)):
        return False
    # Random keys compare too, but are no NumPy arrays.
    return bool(np.all(np.asarray(x == y))) if jnp.issubdtype(x.dtype, jax.dtypes.extended) else np.array_equal(x, y)


def _gap(f: Model, first: Params, second: Params, *args: Any, **kwargs: Any) -> Array:
    """f(first, ...) - f(second, ...), exactly zero where the two are equal, compiled or not.

    Left alone, a compiler breaks that in two ways. It evaluates the half whose parameters are constants
    beforehand, by other code: the barriers keep it from that (but for what it folds after it has dropped them, an
    elementwise start of f). And it contracts a product that ends f with the subtraction, so that one half is
    rounded and the other is not: a selection cannot be contracted.
    """

    def half(w: Params) -> Array:
        coordinates, rest = eqx.partition(w, eqx.is_inexact_array)
        out = f(eqx.combine(jax.lax.optimization_barrier(coordinates), rest), *args, **kwargs)
        return jnp.where(jnp.isfinite(out), out, jnp.nan)

    return half(first) - half(second)
