r"""Random instances of training problems for `verify`: one compiled program per family."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, PRNGKeyArray

from lazyjax._core.types import Model, Outputs, Params
from lazyjax.losses.cross_entropy import softmax_cross_entropy
from lazyjax.losses.hessian_root import DiagonalRoot, HessianRoot
from lazyjax.losses.logistic import logistic_loss
from lazyjax.losses.loss import Loss
from lazyjax.losses.square import square_loss
from lazyjax.models.maps import center, on_data, symmetrize
from lazyjax.models.shallow import diagonal_linear, mlp, two_layer


class Instance(NamedTuple):
    """A model on data, its loss and start, and the same model on other inputs."""

    h: Model
    loss: Loss
    w0: Params
    test: Model


class Family(NamedTuple):
    """A kind of instance.

    Attributes:
        name: A name, in words.
        build: Makes an instance from a random key.
        output_slope: The exponent in alpha that the output gap should have; None if theorem 2.2 has no rates, since
            h(w0) is not zero.
    """

    name: str
    build: Callable[[PRNGKeyArray], Instance]
    output_slope: float | None = -1.0


class CurvedLoss(Loss):
    r"""The loss $\sum_i [\frac12 r_i^2 + \sqrt{1 + r_i^2} - 1]$ over n, $r = y - y^*$: m = 1, M = 2, not quadratic."""

    minimizer: Outputs
    weight: float
    smoothness: float | None = 2.0
    hessian_fades: bool = False

    def __call__(self, y: Outputs) -> Float[Array, ""]:
        """Return R(y)."""
        r = y - self.minimizer
        return self.weight * jnp.sum(0.5 * r**2 + r**2 / (jnp.sqrt(1 + r**2) + 1))

    def gradient(self, y: Outputs) -> Outputs:
        r"""Return $r + r/\sqrt{1 + r^2}$."""
        r = y - self.minimizer
        return r + r / jnp.sqrt(1 + r**2)

    def _curvature(self, y: Outputs) -> Outputs:
        return 1 + (1 + (y - self.minimizer) ** 2) ** -1.5

    def hvp(self, y: Outputs, v: Outputs) -> Outputs:
        """Return the diagonal Hessian times v."""
        return self._curvature(y) * v

    def root(self, y: Outputs) -> HessianRoot:
        """Return the root of the diagonal Hessian."""
        return DiagonalRoot(jnp.sqrt(self.weight * self._curvature(y)))

    def strong_convexity(self, radius: float = float("inf")) -> float:
        """Return m = 1."""
        del radius
        return 1.0

    def check(self, shape: tuple[int, ...]) -> None:
        """Check that outputs have the target's shape."""
        if shape != self.minimizer.shape:
            msg = f"outputs must have the target's shape {self.minimizer.shape}, got {shape}."
            raise ValueError(msg)


def _of_net(
    f: Model, w0: Params, key: PRNGKeyArray, sizes: tuple[int, int], loss: Callable[[PRNGKeyArray, int], Loss], how: str
) -> Instance:
    """Return a net on n normal inputs in R^d, centered, symmetrized or as it is."""
    n, d = sizes
    first, second, third = jr.split(key, 3)
    if how == "centered":
        f = center(f, w0)
    elif how == "symmetrized":
        f, w0 = symmetrize(f, w0)
    return Instance(on_data(f, jr.normal(first, (n, d))), loss(second, n), w0, on_data(f, jr.normal(third, (3, d))))


def _squares(key: PRNGKeyArray, n: int) -> Loss:
    return square_loss(jr.normal(key, (n,)))


def _rows(key: PRNGKeyArray, n: int) -> Loss:
    return square_loss(jr.normal(key, (n, 2)), mean=False)


def _curved(key: PRNGKeyArray, n: int) -> Loss:
    return CurvedLoss(minimizer=jr.normal(key, (n,)), weight=1 / n)


def _two_classes(key: PRNGKeyArray, n: int) -> Loss:
    return logistic_loss(jr.bernoulli(key, shape=(n,)).astype(int))


def _classes(key: PRNGKeyArray, n: int) -> Loss:
    return softmax_cross_entropy(jr.randint(key, (n,), 0, 3))


def _shallow(
    activation: Callable[[Array], Array],
    width: int,
    sizes: tuple[int, int],
    loss: Callable[[PRNGKeyArray, int], Loss],
    how: str = "centered",
) -> Callable[[PRNGKeyArray], Instance]:
    def build(key: PRNGKeyArray) -> Instance:
        start, data = jr.split(key)
        return _of_net(two_layer(activation), two_layer().init(start, d=sizes[1], width=width), data, sizes, loss, how)

    return build


def _deep(
    activation: Callable[[Array], Array],
    layers: tuple[int, ...],
    n: int,
    loss: Callable[[PRNGKeyArray, int], Loss],
) -> Callable[[PRNGKeyArray], Instance]:
    def build(key: PRNGKeyArray) -> Instance:
        start, data = jr.split(key)
        return _of_net(mlp(activation), mlp().init(start, layers), data, (n, layers[0]), loss, "centered")

    return build


def _diagonal(key: PRNGKeyArray) -> Instance:
    """Return $u^2 - v^2$ with more coordinates than equations."""
    return _of_net(diagonal_linear(), diagonal_linear().init(d=8), key, (4, 8), _squares, "as it is")


def _quadratic(key: PRNGKeyArray) -> Instance:
    r"""Return $h_i(w) = a_i \cdot w + \frac12 w^TB_iw$, from w0 = 0."""
    first, second, third = jr.split(key, 3)

    def model(w: Array, coefficients: tuple[Array, Array]) -> Array:
        slope, curvature = coefficients
        return slope @ w + 0.5 * jnp.einsum("ipq,p,q->i", curvature, w, w)

    def maps(k: PRNGKeyArray) -> tuple[Array, Array]:
        a, b = jr.split(k)
        return jr.normal(a, (3, 9)), 0.3 * jr.normal(b, (3, 9, 9))

    w0 = jnp.zeros(9)
    f = center(model, w0)
    return Instance(on_data(f, maps(first)), square_loss(jr.normal(second, (3,))), w0, on_data(f, maps(third)))  # pyright: ignore[reportArgumentType]


FAMILIES = (
    Family("two-layer tanh, centered, square loss", _shallow(jnp.tanh, 12, (4, 3), _squares)),
    Family("two-layer tanh, symmetrized, square loss", _shallow(jnp.tanh, 10, (4, 3), _squares, "symmetrized"), -2.0),
    Family("two-layer sin, h(w0) not zero, square loss", _shallow(jnp.sin, 12, (4, 3), _squares, "as it is"), None),
    Family("two-layer tanh, 1 neuron for 8 outputs, square loss", _shallow(jnp.tanh, 1, (8, 3), _squares)),
    Family("two-layer erf, centered, curved loss", _shallow(jax.scipy.special.erf, 12, (4, 3), _curved)),
    Family("two-layer softplus, centered, logistic loss", _shallow(jax.nn.softplus, 12, (5, 3), _two_classes)),
    Family("three layers, tanh, 2 outputs, square loss", _deep(jnp.tanh, (3, 6, 6, 2), 3, _rows)),
    Family("three layers, softplus, cross-entropy", _deep(jax.nn.softplus, (3, 6, 6, 3), 4, _classes)),
    Family("diagonal linear net", _diagonal, -2.0),
    Family("random quadratic model", _quadratic),
)
