"""The logistic loss, for two classes."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lazyjax._core.checks import check_fits, is_concrete
from lazyjax.losses.hessian_root import DiagonalRoot, HessianRoot
from lazyjax.losses.loss import Loss, check_data, check_shape


class LogisticLoss(Loss):
    """The logistic loss: M = 1/4, no minimizer (it lies at infinity); made by `logistic_loss`."""

    signs: Float[Array, " n"]
    weight: float = eqx.field(static=True)
    smoothness: float | None = eqx.field(static=True, default=0.25)
    minimizer: None = None
    hessian_fades: bool = eqx.field(static=True, default=True)

    def __call__(self, y: Float[Array, " n"]) -> Float[Array, ""]:
        r"""Return $\frac1n \sum_i \log(1 + e^{-s_i y_i})$."""
        self.check(y.shape)
        return jnp.asarray(self.weight, y.dtype) * jnp.sum(jax.nn.softplus(-self.signs.astype(y.dtype) * y))

    def gradient(self, y: Float[Array, " n"]) -> Float[Array, " n"]:
        r"""Return $-s_i \sigma(-s_i y_i)$."""
        self.check(y.shape)
        signs = self.signs.astype(y.dtype)
        return -signs * jax.nn.sigmoid(-signs * y)

    def hvp(self, y: Float[Array, " n"], v: Float[Array, " n"]) -> Float[Array, " n"]:
        r"""Return $\sigma(y_i) \sigma(-y_i) v_i$."""
        return jax.nn.sigmoid(y) * jax.nn.sigmoid(-y) * v

    def root(self, y: Float[Array, " n"]) -> HessianRoot:
        r"""Return $\sqrt{c\, \sigma(y_i) \sigma(-y_i)}$ on the diagonal."""
        # The root of each factor: their product underflows where the root is still a number.
        return DiagonalRoot(self.weight**0.5 * jnp.exp(0.5 * (jax.nn.log_sigmoid(y) + jax.nn.log_sigmoid(-y))))

    def strong_convexity(self, radius: float = math.inf) -> float:
        r"""Return $m = \sigma(r)\sigma(-r)$ on outputs $|y_i| \le r$; 0 without a bound on them."""
        return float(np.exp(-radius) / (1 + np.exp(-radius)) ** 2)

    def check(self, shape: tuple[int, ...]) -> None:
        """Check that outputs have the labels' shape (n,)."""
        check_shape(shape, self.signs.shape, "labels")


def logistic_loss(labels: Int[Array, " n"] | Float[Array, " n"], *, mean: bool = True) -> LogisticLoss:
    r"""Return the loss $R(y) = \frac1n \sum_i \log(1 + e^{-s_i y_i})$ of outputs (n,), for two classes.

    Args:
        labels: Classes as -1 and 1, or as 0 and 1, (n,).
        mean: With the factor 1/n.

    Returns:
        A loss with M = 1/4; it is strongly convex only on bounded outputs, see its `strong_convexity(radius)`.

    Raises:
        ValueError: labels empty, not a vector, or other than these values.

    Example:
        >>> print(f"{logistic_loss(jnp.array([-1, 1]))(jnp.zeros(2)):.4f}")
        0.6931
    """
    check_fits(labels, "labels")
    labels = jnp.asarray(labels)
    check_data(labels, "labels", ndims=(1,))
    values = {float(v) for v in np.unique(np.asarray(labels))} if is_concrete(labels) else set()
    if not (values <= {-1.0, 1.0} or values <= {0.0, 1.0}):
        msg = f"labels must be -1 and 1, or 0 and 1, got values {sorted(values)[:8]}; map your two classes to them."
        raise ValueError(msg)
    return LogisticLoss(signs=jnp.where(labels > 0, 1.0, -1.0), weight=1 / labels.size if mean else 1.0)
