r"""Losses R on outputs that know their geometry in the output space F.

**The metric of F.** With `mean=True` (the paper's) $\langle f, g\rangle_F = \frac1n \sum_i f_i \cdot g_i$, with
`mean=False` it is Euclidean (the lecture notes'). In both, the square loss is exactly
$\frac12\|y - y^*\|_F^2$. `weight` is the factor in front of the sum, 1/n or 1. Gradients and Hessians here are
those of F (Riesz), so they do not carry the weight: `jax.grad(loss)(y) == loss.weight * loss.gradient(y)`.

Source: Chizat, Oyallon, Bach (2019), section 2.1 and theorem 2.3, section 3.2 (cross-entropy in Figure 3b).
"""

import abc

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lazyjax._core.checks import check_finite, is_concrete
from lazyjax._core.types import Outputs
from lazyjax.losses.hessian_root import DiagonalRoot, HessianRoot, SoftmaxRoot


class Loss(eqx.Module):
    """R: outputs (n,) or (n, k) to a number; subclasses give the sample's loss and its derivatives."""

    weight: eqx.AbstractVar[float]

    @abc.abstractmethod
    def __call__(self, y: Outputs) -> Float[Array, ""]:
        """R(y)."""

    @abc.abstractmethod
    def gradient(self, y: Outputs) -> Outputs:
        """The F-gradient of R at y, of y's shape."""

    @abc.abstractmethod
    def hvp(self, y: Outputs, v: Outputs) -> Outputs:
        """The F-Hessian of R at y, applied to v."""

    @abc.abstractmethod
    def root(self, y: Outputs) -> HessianRoot:
        r"""S with $\nabla^2 R(y) = SS^T$ the plain Hessian, `weight` times that of F."""

    def cotangent(self, y: Outputs) -> Outputs:
        """The plain derivative of R at y, `weight * gradient(y)`: what a vjp of the model takes."""
        return jnp.asarray(self.weight, y.dtype) * self.gradient(y)

    def norm(self, y: Outputs) -> Float[Array, ""]:
        """The norm of F, NaN where an output is; its derivative at zero is taken to be zero."""
        s = jnp.sum(y**2)
        return jnp.sqrt(jnp.asarray(self.weight, y.dtype)) * jnp.where(s == 0, 0, jnp.sqrt(jnp.where(s == 0, 1, s)))

    @abc.abstractmethod
    def check(self, shape: tuple[int, ...]) -> None:
        """Refuse outputs of a shape that the targets do not fit."""


def _check_shape(shape: tuple[int, ...], expected: tuple[int, ...], what: str) -> None:
    if shape != expected:
        msg = (
            f"outputs and {what} must have the same shape, got outputs {shape} and {what} {expected}; "
            "reshape one of them (one-hot vectors for classes, no trailing axis of length 1 for scalars)."
        )
        raise ValueError(msg)


class SquareLoss(Loss):
    """Made by `square_loss`; its target is the `minimizer`, M = m = 1."""

    minimizer: Outputs
    weight: float = eqx.field(static=True)
    smoothness: float = eqx.field(static=True, default=1.0)

    def __call__(self, y: Outputs) -> Float[Array, ""]:
        r"""$\frac12\|y - y^*\|_F^2$."""
        return 0.5 * jnp.asarray(self.weight, y.dtype) * jnp.sum(self.gradient(y) ** 2)

    def gradient(self, y: Outputs) -> Outputs:
        """$y - y^*$."""
        self.check(y.shape)
        return y - self.minimizer.astype(y.dtype)

    def hvp(self, y: Outputs, v: Outputs) -> Outputs:
        """v itself: the Hessian is the identity of F."""
        del y
        return v

    def root(self, y: Outputs) -> HessianRoot:
        r"""$\sqrt{c}\, I$, c the weight."""
        return DiagonalRoot(jnp.asarray(self.weight**0.5, y.dtype))

    def strong_convexity(self, radius: float = float("inf")) -> float:
        """m = 1 everywhere, whatever the radius."""
        del radius
        return 1.0

    def check(self, shape: tuple[int, ...]) -> None:
        """Outputs must have the target's shape."""
        _check_shape(shape, self.minimizer.shape, "target")


def square_loss(target: Outputs, *, mean: bool = True) -> SquareLoss:
    r"""$R(y) = \frac{1}{2n} \sum_i |y_i - y^*_i|^2 = \frac12\|y - y^*\|_F^2$.

    Args:
        target: $y^*$, (n,) or (n, k), of the outputs' shape.
        mean: With the factor 1/n (the paper); False: without (the lecture notes).

    Returns:
        A loss with `gradient`, `hvp`, `smoothness` M = 1, `strong_convexity()` m = 1, `minimizer`, `weight`.

    Raises:
        ValueError: empty or non-finite targets, or not of shape (n,) or (n, k).
        TypeError: complex targets.

    Example:
        >>> print(square_loss(jnp.zeros(2))(jnp.array([1.0, 1.0])))
        0.5
    """
    target = jnp.asarray(target)
    if jnp.iscomplexobj(target):
        msg = f"target must be real, got {target.dtype}; give real and imaginary parts as two columns."
        raise TypeError(msg)
    if not jnp.issubdtype(target.dtype, jnp.floating):
        target = target.astype(jnp.result_type(float))
    _check_data(target, "target")
    return SquareLoss(minimizer=target, weight=1 / target.shape[0] if mean else 1.0)


class LogisticLoss(Loss):
    """Made by `logistic_loss`; M = 1/4, no minimizer (it lies at infinity)."""

    signs: Float[Array, " n"]
    weight: float = eqx.field(static=True)
    smoothness: float = eqx.field(static=True, default=0.25)

    def __call__(self, y: Float[Array, " n"]) -> Float[Array, ""]:
        r"""$\frac1n \sum_i \log(1 + e^{-s_i y_i})$."""
        self.check(y.shape)
        return jnp.asarray(self.weight, y.dtype) * jnp.sum(jax.nn.softplus(-self.signs.astype(y.dtype) * y))

    def gradient(self, y: Float[Array, " n"]) -> Float[Array, " n"]:
        r"""$-s_i \sigma(-s_i y_i)$."""
        self.check(y.shape)
        signs = self.signs.astype(y.dtype)
        return -signs * jax.nn.sigmoid(-signs * y)

    def hvp(self, y: Float[Array, " n"], v: Float[Array, " n"]) -> Float[Array, " n"]:
        r"""$\sigma(y_i) \sigma(-y_i) v_i$."""
        return jax.nn.sigmoid(y) * jax.nn.sigmoid(-y) * v

    def root(self, y: Float[Array, " n"]) -> HessianRoot:
        r"""$\sqrt{c\, \sigma(y_i) \sigma(-y_i)}$ on the diagonal."""
        # The root of each factor: their product underflows where the root is still a number.
        return DiagonalRoot(self.weight**0.5 * jnp.exp(0.5 * (jax.nn.log_sigmoid(y) + jax.nn.log_sigmoid(-y))))

    def strong_convexity(self, radius: float = float("inf")) -> float:
        r"""$m = \sigma(r)\sigma(-r)$ on outputs $|y_i| \le r$; 0 without a bound on them."""
        return float(np.exp(-radius) / (1 + np.exp(-radius)) ** 2)

    def check(self, shape: tuple[int, ...]) -> None:
        """Outputs must have the labels' shape (n,)."""
        _check_shape(shape, self.signs.shape, "labels")


def logistic_loss(labels: Int[Array, " n"] | Float[Array, " n"], *, mean: bool = True) -> LogisticLoss:
    r"""$R(y) = \frac1n \sum_i \log(1 + e^{-s_i y_i})$ for two classes, outputs (n,).

    Args:
        labels: Classes as -1 and 1, or as 0 and 1, (n,).
        mean: With the factor 1/n.

    Returns:
        A loss with `gradient`, `hvp`, `smoothness` M = 1/4, `strong_convexity(radius)`, `weight`.

    Raises:
        ValueError: labels empty, not a vector, or other than these values.

    Example:
        >>> print(f"{logistic_loss(jnp.array([-1, 1]))(jnp.zeros(2)):.4f}")
        0.6931
    """
    labels = jnp.asarray(labels)
    _check_data(labels, "labels", ndims=(1,))
    values = {float(v) for v in np.unique(np.asarray(labels))} if is_concrete(labels) else set()
    if not (values <= {-1.0, 1.0} or values <= {0.0, 1.0}):
        msg = f"labels must be -1 and 1, or 0 and 1, got values {sorted(values)[:8]}; map your two classes to them."
        raise ValueError(msg)
    return LogisticLoss(signs=jnp.where(labels > 0, 1.0, -1.0), weight=1 / labels.size if mean else 1.0)


class SoftmaxCrossEntropy(Loss):
    """Made by `softmax_cross_entropy`; M = 1/2, no minimizer (it lies at infinity)."""

    labels: Int[Array, " n"]
    weight: float = eqx.field(static=True)
    smoothness: float = eqx.field(static=True, default=0.5)

    def __call__(self, y: Float[Array, "n k"]) -> Float[Array, ""]:
        r"""$\frac1n \sum_i (\log \sum_c e^{y_{ic}} - y_{i, label_i})$."""
        self.check(y.shape)
        chosen = jnp.take_along_axis(y, self.labels[:, None], axis=1)[:, 0]
        return jnp.asarray(self.weight, y.dtype) * jnp.sum(jax.nn.logsumexp(y, axis=1) - chosen)

    def gradient(self, y: Float[Array, "n k"]) -> Float[Array, "n k"]:
        """Class probabilities less the one-hot labels."""
        self.check(y.shape)
        return jax.nn.softmax(y, axis=1) - jax.nn.one_hot(self.labels, y.shape[1], dtype=y.dtype)

    def hvp(self, y: Float[Array, "n k"], v: Float[Array, "n k"]) -> Float[Array, "n k"]:
        r"""$(\mathrm{diag}(p_i) - p_i p_i^T) v_i$."""
        p = jax.nn.softmax(y, axis=1)
        return p * (v - jnp.sum(p * v, axis=1, keepdims=True))

    def root(self, y: Float[Array, "n k"]) -> HessianRoot:
        r"""$\mathrm{diag}(\sqrt{p_i})(I - \sqrt{p_i}\sqrt{p_i}^T)$, sample by sample."""
        return SoftmaxRoot(jnp.exp(0.5 * jax.nn.log_softmax(y, axis=1)), jnp.asarray(self.weight**0.5, y.dtype))

    def strong_convexity(self, radius: float = float("inf"), *, classes: int) -> float:
        r"""$m = 1/(1 + (k-1)e^{2r})$ on zero-sum outputs with $|y_{ic}| \le r$; 0 without a bound on them.

        Adding a constant to the outputs of a sample does not change R, so m is 0 on all of F.
        """
        ratio = np.exp(-2 * radius)  # of the smallest to the largest possible weight; it cannot overflow
        return float(ratio / (ratio + classes - 1))

    def check(self, shape: tuple[int, ...]) -> None:
        """Outputs must be (n, k), one row a label, and every label below k."""
        n = self.labels.shape[0]
        if len(shape) != 2 or shape[0] != n:
            msg = f"outputs must be of shape ({n}, k) for {n} labels, got {shape}."
            raise ValueError(msg)
        if is_concrete(self.labels):
            low, high = int(np.min(np.asarray(self.labels))), int(np.max(np.asarray(self.labels)))
            if low < 0 or high >= shape[1]:
                msg = f"labels must lie in 0..{shape[1] - 1} for {shape[1]} outputs a sample, got {low}..{high}."
                raise ValueError(msg)


def softmax_cross_entropy(labels: Int[Array, " n"], *, mean: bool = True) -> SoftmaxCrossEntropy:
    r"""$R(y) = \frac1n \sum_i (\log \sum_c e^{y_{ic}} - y_{i, label_i})$, outputs (n, k).

    Args:
        labels: Classes 0..k-1, integers (n,).
        mean: With the factor 1/n.

    Returns:
        A loss with `gradient`, `hvp`, `smoothness` M = 1/2, `strong_convexity(radius, classes=k)`, `weight`.

    Raises:
        ValueError: labels empty, not a vector, negative, or (when used) not below k.
        TypeError: labels not integers.

    Example:
        >>> print(f"{softmax_cross_entropy(jnp.array([0, 1]))(jnp.zeros((2, 4))):.4f}")
        1.3863
    """
    labels = jnp.asarray(labels)
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        msg = f"labels must be integer classes, got {labels.dtype}; for one-hot rows use labels.argmax(axis=1)."
        raise TypeError(msg)
    _check_data(labels, "labels", ndims=(1,))
    # NumPy's minimum: inside a jit, JAX's would be traced even of labels that are not.
    if is_concrete(labels) and (low := int(np.min(np.asarray(labels)))) < 0:
        msg = f"labels must be classes 0, 1, ..., got {low}."
        raise ValueError(msg)
    return SoftmaxCrossEntropy(labels=labels, weight=1 / labels.size if mean else 1.0)


def _check_data(data: Array, name: str, ndims: tuple[int, ...] = (1, 2)) -> None:
    if data.ndim not in ndims or data.size == 0:
        shapes = " or ".join({1: "(n,)", 2: "(n, k)"}[ndim] for ndim in ndims)
        msg = f"{name} must be a non-empty array of shape {shapes}, got shape {data.shape}."
        raise ValueError(msg)
    check_finite(data, name)
