"""The cross-entropy of a softmax over the outputs, for k classes."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from lazyjax._core.checks import check_fits, is_concrete
from lazyjax._core.types import Outputs
from lazyjax.losses.hessian_root import HessianRoot
from lazyjax.losses.loss import Loss, check_data


class SoftmaxCrossEntropy(Loss):
    """The softmax cross-entropy: M = 1/2, no minimizer (it lies at infinity); made by `softmax_cross_entropy`."""

    labels: Int[Array, " n"]
    weight: float = eqx.field(static=True)
    smoothness: float | None = eqx.field(static=True, default=0.5)
    minimizer: None = None
    hessian_fades: bool = eqx.field(static=True, default=True)

    def __call__(self, y: Float[Array, "n k"]) -> Float[Array, ""]:
        r"""Return $\frac1n \sum_i (\log \sum_c e^{y_{ic}} - y_{i, label_i})$."""
        self.check(y.shape)
        chosen = jnp.take_along_axis(y, self.labels[:, None], axis=1)
        # log(1 + sum over the other classes of exp(y_c - y_label)): of a confident sample the sum is all there is.
        others = jax.nn.logsumexp(jnp.where(self._is_label(y), -jnp.inf, y - chosen), axis=1)
        return jnp.asarray(self.weight, y.dtype) * jnp.sum(jax.nn.softplus(others))

    def gradient(self, y: Float[Array, "n k"]) -> Float[Array, "n k"]:
        """Return the class probabilities minus the one-hot labels."""
        self.check(y.shape)
        label = self._is_label(y)
        others = jnp.where(label, 0, jax.nn.softmax(y, axis=1))
        # The probability of the label minus 1 is minus that of all others, which keeps its digits where they are small.
        return jnp.where(label, -jnp.sum(others, axis=1, keepdims=True), others)

    def _is_label(self, y: Float[Array, "n k"]) -> Bool[Array, "n k"]:
        return self.labels[:, None] == jnp.arange(y.shape[1], dtype=self.labels.dtype)[None]

    def hvp(self, y: Float[Array, "n k"], v: Float[Array, "n k"]) -> Float[Array, "n k"]:
        r"""Return $(\mathrm{diag}(p_i) - p_i p_i^T) v_i$."""
        p = jax.nn.softmax(y, axis=1)
        # Relative to the likeliest class, whose own term would cancel all but rounding: constants do not matter.
        v = v - jnp.take_along_axis(v, jnp.argmax(p, axis=1, keepdims=True), axis=1)
        return p * (v - jnp.sum(p * v, axis=1, keepdims=True))

    def root(self, y: Float[Array, "n k"]) -> HessianRoot:
        r"""Return $\mathrm{diag}(\sqrt{p_i})(I - \sqrt{p_i}\sqrt{p_i}^T)$, sample by sample."""
        return SoftmaxRoot(jnp.exp(0.5 * jax.nn.log_softmax(y, axis=1)), jnp.asarray(self.weight**0.5, y.dtype))

    def strong_convexity(self, radius: float = math.inf) -> float:
        """Return m = 0: adding a constant to all outputs of a sample does not change R."""
        del radius
        return 0.0

    def zero_sum_convexity(self, radius: float = math.inf, *, classes: int) -> float:
        r"""Return $m = 1/(1 + (k-1)e^{2r})$ for k classes, on the outputs of zero sum with $|y_{ic}| \le r$.

        It is 0 without a bound on the outputs.
        """
        ratio = np.exp(-2 * radius)  # of the smallest to the largest possible weight; it cannot overflow
        return float(ratio / (ratio + classes - 1))

    def check(self, shape: tuple[int, ...]) -> None:
        """Check that outputs are (n, k), one row per label, with every label below k."""
        n = self.labels.shape[0]
        if len(shape) != 2 or shape[0] != n:
            msg = f"outputs must be of shape ({n}, k) for {n} labels, got {shape}."
            raise ValueError(msg)
        if is_concrete(self.labels):
            low, high = int(np.min(np.asarray(self.labels))), int(np.max(np.asarray(self.labels)))
            if low < 0 or high >= shape[1]:
                msg = f"labels must lie in 0..{shape[1] - 1} for {shape[1]} outputs per sample, got {low}..{high}."
                raise ValueError(msg)


class SoftmaxRoot(HessianRoot):
    r"""The root $S = \mathrm{diag}(\sqrt p)(I - \sqrt p \sqrt p^T)$ of $\mathrm{diag}(p) - pp^T$, one row per sample.

    Attributes:
        root: $\sqrt p$, the roots of the class probabilities.
        scale: The root of the loss's weight.
    """

    root: Float[Array, "n k"]
    scale: Float[Array, ""]

    def _project(self, v: Outputs) -> Outputs:
        """Return v - r r^T v; of the likeliest class without its own terms, v (1 - r^2), which would cancel."""
        likeliest = jnp.argmax(self.root, axis=1, keepdims=True) == jnp.arange(self.root.shape[1])[None]
        others = jnp.where(likeliest, 0, self.root)
        rest, sum_of_others = (jnp.sum(others * z, axis=1, keepdims=True) for z in (others, v))
        whole = jnp.sum(self.root * v, axis=1, keepdims=True)
        return jnp.where(likeliest, rest * v - self.root * sum_of_others, v - self.root * whole)

    def apply(self, v: Outputs) -> Outputs:
        """Return S v."""
        return self.scale * self.root * self._project(v)

    def transpose(self, v: Outputs) -> Outputs:
        """Return S^T v."""
        return self.scale * self._project(self.root * v)


def softmax_cross_entropy(labels: Int[Array, " n"], *, mean: bool = True) -> SoftmaxCrossEntropy:
    r"""Return the loss $R(y) = \frac1n \sum_i (\log \sum_c e^{y_{ic}} - y_{i, label_i})$, of outputs (n, k).

    Args:
        labels: Classes 0..k-1, integers (n,).
        mean: With the factor 1/n.

    Returns:
        A loss with M = 1/2; it is strongly convex only on bounded outputs of zero sum, see `zero_sum_convexity`.

    Raises:
        ValueError: labels empty, not a vector, negative, or (when used) not below k.
        TypeError: labels not integers.

    Example:
        >>> print(f"{softmax_cross_entropy(jnp.array([0, 1]))(jnp.zeros((2, 4))):.4f}")
        1.3863
    """
    check_fits(labels, "labels")
    labels = jnp.asarray(labels)
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        msg = f"labels must be integer classes, got {labels.dtype}; for one-hot rows use labels.argmax(axis=1)."
        raise TypeError(msg)
    check_data(labels, "labels", ndims=(1,))
    # NumPy's minimum: inside a jit, JAX's would be traced even of labels that are not.
    if is_concrete(labels) and (low := int(np.min(np.asarray(labels)))) < 0:
        msg = f"labels must be classes 0, 1, ..., got {low}."
        raise ValueError(msg)
    return SoftmaxCrossEntropy(labels=labels, weight=1 / labels.size if mean else 1.0)
