r"""The paper's shallow networks: each factory returns a `net` with `net.init(key, ...)` and `net(w, x)`.

A model is any callable `h(w) -> outputs`, the data inside, or `f(w, x) -> outputs`; nothing here is
needed to use the rest of lazyjax. Maps from model to model are in `lazyjax.models.maps`. A start is drawn by one
compiled program for each network and its sizes; the key and the scales are its arguments.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from lazyjax._core.checks import is_concrete
from lazyjax._core.types import RealScalar


class TwoLayer(eqx.Module):
    r"""A two-layer network $f(w, x) = \sum_{j=1}^m a_j\, \sigma(b_j \cdot x)$; made by `two_layer`."""

    activation: Callable[[Array], Array]

    def __call__(self, w: dict[str, Array], x: Float[Array, "n d"]) -> Float[Array, " n"]:
        """Return the outputs (n,) at parameters {"a": (m,), "b": (m, d)}."""
        return self.activation(x @ w["b"].T) @ w["a"]

    def preactivations(self, w: dict[str, Array], x: Float[Array, "n d"]) -> list[Float[Array, "n m"]]:
        """Return the one hidden layer before its activation."""
        return [x @ w["b"].T]

    def init(
        self,
        key: PRNGKeyArray,
        *,
        d: int,
        width: int,
        tau: RealScalar = 1.0,
        symmetric: bool = False,
        dtype: Any = None,
    ) -> dict[str, Array]:
        r"""Draw parameters $a_j, b_j \sim N(0, \tau^2)$.

        Args:
            key: Random key.
            d: Input dimension.
            width: Number m of hidden units.
            tau: Standard deviation; a large one is lazy.
            symmetric: Give the second half of the units the first half's input weights and the negatives of its
                output weights, $b_{j+m/2} = b_j$, $a_{j+m/2} = -a_j$, so that the outputs vanish up to rounding. For
                an exact zero at any alpha also use `center`, or `symmetrize`.
            dtype: Floating dtype; None for JAX's default.

        Returns:
            {"a": (width,), "b": (width, d)}.

        Raises:
            ValueError: d, width or tau is not positive, or the width is odd with `symmetric`.

        Source:
            Chizat, Oyallon, Bach (2019), section 3.1.

        Example:
            >>> w = two_layer().init(jr.key(0), d=3, width=4, symmetric=True)
            >>> bool(w["a"][0] == -w["a"][2])
            True
        """
        if d < 1 or width < 1:
            msg = f"d and width must be at least 1, got d={d}, width={width}."
            raise ValueError(msg)
        check_positive(tau, "tau", "standard deviation")
        if symmetric and width % 2:
            msg = f"width must be even for a symmetric start, got {width}; use {width + 1}."
            raise ValueError(msg)
        dtype = jnp.dtype(jnp.result_type(float) if dtype is None else dtype)
        units = width // 2 if symmetric else width
        return _draw_two_layer(key, jnp.asarray(tau, dtype), shape=(int(units), int(d)), symmetric=symmetric)


def draw_normal(key: PRNGKeyArray, shape: tuple[int, ...], dtype: Any) -> Array:
    """Return normal numbers that have the same bits in any program: no constant of theirs moves into their scale."""
    return jax.lax.optimization_barrier(jr.normal(key, shape, dtype))


@functools.partial(jax.jit, static_argnames=("shape", "symmetric"))
def _draw_two_layer(
    key: PRNGKeyArray, scale: Float[Array, ""], *, shape: tuple[int, int], symmetric: bool
) -> dict[str, Array]:
    key_a, key_b = jr.split(key)
    a, b = scale * draw_normal(key_a, shape[:1], scale.dtype), scale * draw_normal(key_b, shape, scale.dtype)
    if symmetric:
        a, b = jnp.concatenate([a, -a]), jnp.concatenate([b, b])
    return {"a": a, "b": b}


def two_layer(activation: Callable[[Array], Array] = jax.nn.relu) -> TwoLayer:
    r"""Make a two-layer network $f(w, x) = \sum_{j=1}^m a_j\, \sigma(b_j \cdot x)$, without a factor 1/m.

    Args:
        activation: $\sigma$, elementwise.

    Returns:
        `net` with `net(w, x)` for w = {"a": (m,), "b": (m, d)}, x (n, d), outputs (n,); `net.init`; and
        `net.preactivations`.

    Source:
        Chizat, Oyallon, Bach (2019), section 3.1 (a is the output layer, b the input layer).

    Example:
        >>> net = two_layer(jnp.tanh)
        >>> w = net.init(jr.key(0), d=3, width=4)
        >>> net(w, jnp.ones((5, 3))).shape
        (5,)
    """
    return TwoLayer(activation)


def check_positive(value: RealScalar, name: str, what: str) -> None:
    """Refuse a known number that is not positive."""
    if is_concrete(value) and not float(value) > 0:
        msg = f"{name} must be a positive {what}, got {value}."
        raise ValueError(msg)


class MLP(eqx.Module):
    """A fully connected network, an activation between its layers; made by `mlp`."""

    activation: Callable[[Array], Array]

    def __call__(self, w: list[dict[str, Array]], x: Float[Array, "n d"]) -> Float[Array, "n k"]:
        """Return the outputs (n, k)."""
        for layer in w[:-1]:
            x = self.activation(_affine(layer, x))
        return _affine(w[-1], x)

    def preactivations(self, w: list[dict[str, Array]], x: Float[Array, "n d"]) -> list[Float[Array, "n _"]]:
        """Return the hidden layers before their activations."""
        hidden = []
        for layer in w[:-1]:
            hidden.append(_affine(layer, x))
            x = self.activation(hidden[-1])
        return hidden

    def init(
        self, key: PRNGKeyArray, sizes: Sequence[int], *, gain: RealScalar = 1.0, dtype: Any = None
    ) -> list[dict[str, Array]]:
        r"""Draw weights $W_l \sim N(0, g^2 \cdot 2/(n_{in} + n_{out}))$ (Xavier); biases are zero.

        Args:
            key: Random key.
            sizes: Widths (d, hidden..., k), at least an input and an output.
            gain: $g$; the standard deviation of every layer is proportional to it.
            dtype: Floating dtype; None for JAX's default.

        Returns:
            [{"weight": (out, in), "bias": (out,)}, ...].

        Raises:
            ValueError: fewer than two sizes, or a size or the gain is not positive.

        Source:
            Chizat, Oyallon, Bach (2019), section 3.2 (Xavier normal weights, zero biases).

        Example:
            >>> [layer["weight"].shape for layer in mlp().init(jr.key(0), [3, 8, 2])]
            [(8, 3), (2, 8)]
        """
        if len(sizes) < 2 or min(sizes) < 1:
            msg = f"sizes must be at least two positive widths (input, ..., output), got {tuple(sizes)}."
            raise ValueError(msg)
        check_positive(gain, "gain", "factor")
        dtype = jnp.dtype(jnp.result_type(float) if dtype is None else dtype)
        return _draw_mlp(key, jnp.asarray(gain, dtype), sizes=tuple(int(size) for size in sizes))


@functools.partial(jax.jit, static_argnames="sizes")
def _draw_mlp(key: PRNGKeyArray, gain: Float[Array, ""], *, sizes: tuple[int, ...]) -> list[dict[str, Array]]:
    layers = []
    for k, n_in, n_out in zip(jr.split(key, len(sizes) - 1), sizes[:-1], sizes[1:], strict=True):
        std = gain * np.sqrt(2 / (n_in + n_out)).astype(gain.dtype)
        layers.append({"weight": std * draw_normal(k, (n_out, n_in), gain.dtype), "bias": jnp.zeros(n_out, gain.dtype)})
    return layers


def _affine(layer: dict[str, Array], x: Array) -> Array:
    return x @ layer["weight"].T + layer["bias"][None, :]


def mlp(activation: Callable[[Array], Array] = jax.nn.relu) -> MLP:
    r"""Make a fully connected network $x_{l+1} = \sigma(W_l x_l + c_l)$, the last layer affine.

    Args:
        activation: $\sigma$, elementwise.

    Returns:
        `net` with `net(w, x)` for w = [{"weight": (out, in), "bias": (out,)}, ...], x (n, d), outputs (n, k);
        `net.init`; and `net.preactivations`.

    Example:
        >>> net = mlp(jnp.tanh)
        >>> net(net.init(jr.key(0), [3, 8, 2]), jnp.ones((5, 3))).shape
        (5, 2)
    """
    return MLP(activation)


class DiagonalLinear(eqx.Module):
    r"""A diagonal linear network $f(w, x) = x \cdot (u^2 - v^2)$; made by `diagonal_linear`."""

    def __call__(self, w: dict[str, Float[Array, " d"]], x: Float[Array, "n d"]) -> Float[Array, " n"]:
        """Return the outputs (n,) at parameters {"u": (d,), "v": (d,)}."""
        return x @ (w["u"] ** 2 - w["v"] ** 2)

    def init(
        self, key: PRNGKeyArray | None = None, *, d: int, tau: RealScalar = 1.0, dtype: Any = None
    ) -> dict[str, Array]:
        r"""Return the parameters $u_0 = v_0 = \tau 1$, at which the outputs vanish.

        Args:
            key: Not used, since this start is not random; every network's `init` takes one.
            d: Input dimension.
            tau: Scale of the start.
            dtype: Floating dtype; None for JAX's default.

        Returns:
            {"u": (d,), "v": (d,)}.

        Raises:
            ValueError: d or tau is not positive.

        Example:
            >>> diagonal_linear().init(d=2)["u"].shape
            (2,)
        """
        del key
        if d < 1:
            msg = f"d must be at least 1, got {d}."
            raise ValueError(msg)
        check_positive(tau, "tau", "scale")
        dtype = jnp.dtype(jnp.result_type(float) if dtype is None else dtype)
        # NumPy compiles nothing.
        full = np.full if is_concrete(tau) else jnp.full
        return {name: jnp.asarray(full(d, tau, dtype)) for name in ("u", "v")}


def diagonal_linear() -> DiagonalLinear:
    r"""Make a diagonal linear network $f(w, x) = x \cdot (u^2 - v^2)$, linear in x and quadratic in w.

    Returns:
        `net` with `net(w, x)` for w = {"u": (d,), "v": (d,)}, x (n, d), outputs (n,), and `net.init`. The flow
        conserves $u_i v_i$.

    Source:
        Woodworth et al. (2020), Kernel and rich regimes in overparametrized models, section 4.

    Example:
        >>> net = diagonal_linear()
        >>> net(net.init(d=3), jnp.ones((2, 3)))
        Array([0., 0.], dtype=float...)
    """
    return DiagonalLinear()
