r"""The limit kernels of wide nets in closed form: two layers by equation (8), deep ReLU and erf nets by recursion.

A Gaussian weight sees a pair of inputs through two lengths and an angle, and the angle of near vectors is lost in their
inner product. So it comes from the chords $|u - v|$ and $|u + v|$ of the unit vectors, and the recursion keeps, next to
variances and covariance, the squared area $q_1 q_2 - c^2$ of the parallelogram, a sum of terms that are not negative.
"""

import functools
from typing import Any, Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lazyjax._core.checks import check_finite, check_fits, is_concrete
from lazyjax._core.show import show
from lazyjax._core.types import RealScalar


def arccos_kernel(
    x1: Float[Array, "..."],
    x2: Float[Array, "..."],
    *,
    layer: Literal["input", "output", "both"],
    mean_sq_output: RealScalar = 1.0,
    mean_sq_input: RealScalar | None = None,
) -> Float[Array, "..."]:
    r"""Return the limit tangent kernel of two-layer ReLU nets of infinite width.

    The nets are $f = m^{-1/2} \sum_j b_j \max(a_j \cdot x, 0)$, and $m \to \infty$.

    With $\varphi$ the angle of x and x', the input layer's part and the output layer's part are

    $$K^{(a)} = (x \cdot x') \frac{E(b^2)}{2\pi} (\pi - \varphi), \qquad
      K^{(b)} = |x| |x'| \frac{E\|a\|^2}{2\pi d} \bigl((\pi - \varphi) \cos\varphi + \sin\varphi\bigr),$$

    and "both" is their sum. It holds for independent a and b, a of a rotation-invariant law. `two_layer` names
    the layers the other way round; it is the limit of `gram(rescale(two_layer(), width**-0.5), w, x1, x2)`.

    Values and gradients are finite everywhere. At a kink of the kernel (at x = 0, and for the input layer's part at
    $\varphi = 0$ and $\pi$) the gradient is the mean of the two one-sided slopes, what a central difference gives.

    Args:
        x1: Inputs (..., d), vectors along the last axis.
        x2: Other inputs (..., d).
        layer: The layer whose part is returned: "input", "output", or "both".
        mean_sq_output: $E(b^2)$ of an output weight.
        mean_sq_input: $E\|a\|^2$ of a unit's d input weights; None for d, the value of N(0, 1) weights.

    Returns:
        K for all pairs, the axes of x1 before those of x2: (n1, n2) for (n1, d) and (n2, d), a number for two vectors.
        The work grows as n1 n2 d, the memory as n1 n2.

    Raises:
        ValueError: an unknown layer; inputs that are empty, not finite, or of two dimensions d; a moment that is
            negative or not finite.
        TypeError: inputs that are not real floating.

    Source:
        Chizat, Oyallon, Bach (2019), supplement A.2, equation (8); Cho, Saul (2009). The supplement leaves unsaid that
        a and b are independent.

    Example:
        >>> x = jnp.array([[1.0, 0.0], [0.0, 1.0]])
        >>> print(np.asarray(arccos_kernel(x, x, layer="both")).round(3))
        [[1.    0.159]
         [0.159 1.   ]]
    """
    if layer not in ("input", "output", "both"):
        msg = f'layer must be "input", "output" or "both", got {layer!r}.'
        raise ValueError(msg)
    x1, x2 = _as_inputs(x1, x2)
    output = _as_moment(mean_sq_output, "mean_sq_output", x1.dtype)
    input_sq = _as_moment(x1.shape[-1] if mean_sq_input is None else mean_sq_input, "mean_sq_input", x1.dtype)
    shares = np.asarray([layer != "output", layer != "input"], x1.dtype)
    return _arccos(x1, x2, output, input_sq, shares)


class DeepKernel(eqx.Module):
    r"""The limit kernels of a deep net, made by `deep_kernel`; the axes of x1 before those of x2.

    Attributes:
        tangent: $\Theta$, the tangent kernel of one output with all layers trained.
        covariance: $\Sigma$, the covariance of one output at two inputs over the random start (the NNGP kernel).
    """

    tangent: Float[Array, "..."]
    covariance: Float[Array, "..."]

    def __str__(self) -> str:
        """Show the shape and the range of both kernels."""
        return show(self, self.tangent, self.tangent.ndim, self._lines)

    __repr__ = __str__

    def _lines(self) -> str:
        parts = (("tangent kernel", self.tangent), ("covariance", self.covariance))
        return "\n".join(f"{name} {k.shape}, from {np.min(k):.4g} to {np.max(k):.4g}" for name, k in parts)


def deep_kernel(
    x1: Float[Array, "..."],
    x2: Float[Array, "..."],
    *,
    depth: int,
    activation: Literal["relu", "erf"] = "relu",
    weight_variance: RealScalar = 1.0,
    bias_variance: RealScalar = 0.0,
) -> DeepKernel:
    r"""Return the limit kernels of fully connected nets with `depth` hidden layers whose widths go to infinity.

    The net is in the NTK parametrization: $z_1 = \sigma_w d^{-1/2} W_1 x + \sigma_b b_1$ and
    $z_{l+1} = \sigma_w n_l^{-1/2} W_{l+1} \sigma(z_l) + \sigma_b b_{l+1}$ with all W, b drawn from N(0, 1) and
    trained, L the depth, $z_{L+1}$ the output. Then

    $$\Theta_1 = \Sigma_1 = \sigma_w^2 \frac{x \cdot x'}{d} + \sigma_b^2, \quad
      \Sigma_{l+1} = \sigma_w^2 E[\sigma(u)\sigma(v)] + \sigma_b^2, \quad
      \Theta_{l+1} = \Sigma_{l+1} + \sigma_w^2 E[\sigma'(u)\sigma'(v)]\, \Theta_l$$

    for $(u, v) \sim N(0, \Sigma_l)$ at the two inputs. `mlp` becomes such a net when called with weights times
    $\sigma_w / \sqrt{n_{in}}$ and biases times $\sigma_b$. One hidden ReLU layer without biases is
    `rescale(two_layer(), weight_variance / (d * width) ** 0.5)`, and $\Theta$ is then $\sigma_w^4 / d$ times
    `arccos_kernel(layer="both")`.

    In the standard parametrization, $W \sim N(0, \sigma_w^2/n_{in})$ itself trained, the covariance is the same, but a
    layer's part of the tangent kernel is $n_{in}/\sigma_w^2$ times as large: there is no limit. `MLP.init` moreover has
    other variances in the first and last layers; with ReLU and hidden widths m, the covariance of its outputs is
    asymptotically $4dm / ((d + m)(m + k))$ times $\Sigma$ at $\sigma_w^2 = g^2$, $\sigma_b = 0$.

    Args:
        x1: Inputs (..., d), vectors along the last axis.
        x2: Other inputs (..., d).
        depth: Number L of hidden layers, at least 1.
        activation: "relu" or "erf". For equal directions "erf" is exact to some $\sigma_w^2$ roundings: with a
            $\sigma_w^2$ above 10 use float64.
        weight_variance: $\sigma_w^2$; 2 keeps the variance of ReLU nets from layer to layer.
        bias_variance: $\sigma_b^2$.

    Returns:
        `DeepKernel`: `tangent` and `covariance` for all pairs, (n1, n2) for (n1, d) and (n2, d). Their gradients are
        finite, at kinks of ReLU as in `arccos_kernel`; from depth 2 on none exists at x = 0 without biases.

    Raises:
        ValueError: a depth below 1, an unknown activation, a variance that is negative or not finite; inputs as for
            `arccos_kernel`.
        TypeError: inputs that are not real floating.

    Source:
        Jacot, Gabriel, Hongler (2018); the means from Cho, Saul (2009) and Williams (1997); their areas are ours.

    Example:
        >>> kernel = deep_kernel(jnp.ones(2), jnp.array([1.0, -1.0]), depth=2, weight_variance=2.0)
        >>> print(np.asarray(kernel.tangent).round(3))
        1.371
    """
    if isinstance(depth, bool) or not isinstance(depth, (int, np.integer)) or depth < 1:
        msg = f"depth must be a number of hidden layers, at least 1, got {depth!r}."
        raise ValueError(msg)
    if activation not in _MOMENTS:
        msg = f'activation must be "relu" or "erf", got {activation!r}; for others take `gram` of a wide net.'
        raise ValueError(msg)
    x1, x2 = _as_inputs(x1, x2)
    weight = _as_moment(weight_variance, "weight_variance", x1.dtype)
    bias = _as_moment(bias_variance, "bias_variance", x1.dtype)
    return DeepKernel(*_deep(x1, x2, weight, bias, int(depth), activation))


def _as_inputs(x1: Any, x2: Any) -> tuple[Array, Array]:
    check_fits(x1, "x1")
    check_fits(x2, "x2")
    x1, x2 = jnp.asarray(x1), jnp.asarray(x2)
    for name, x in (("x1", x1), ("x2", x2)):
        if x.ndim == 0 or x.size == 0:
            msg = f"{name} must hold at least one vector along its last axis, (..., d), got shape {x.shape}."
            raise ValueError(msg)
        if not jnp.issubdtype(x.dtype, jnp.floating):
            msg = f"{name} must be real floating, got {x.dtype}; convert it with `.astype(jnp.float32)`."
            raise TypeError(msg)
        check_finite(x, name)
    if x1.shape[-1] != x2.shape[-1]:
        msg = f"x1 and x2 must hold vectors of one dimension d, shapes (..., d), got {x1.shape} and {x2.shape}."
        raise ValueError(msg)
    dtype = jnp.promote_types(x1.dtype, x2.dtype)
    return x1.astype(dtype), x2.astype(dtype)


def _as_moment(value: RealScalar, name: str, dtype: Any) -> Array:
    if np.shape(value) != () or (is_concrete(value) and not 0 <= float(value) < np.inf):
        msg = f"{name} must be a finite number >= 0 (it is a mean of squares), got {value}."
        raise ValueError(msg)
    return jnp.asarray(value, dtype)


@jax.jit
def _arccos(x1: Array, x2: Array, output: Array, input_sq: Array, shares: Array | np.ndarray) -> Array:
    """Return the kernel; the layers are numbers `shares`, 0 or 1, so that one program serves all."""
    r1, r2, inner, (supplement, sine) = _plane(x1, x2)
    output, share = shares[0] * output, shares[1] * input_sq / x1.shape[-1]
    # By the inner product, so that the slope at x = 0 is the one that a central difference sees.
    linear = supplement * inner
    total = output * linear + share * (linear + r1 * r2 * sine)
    return (total / (2 * jnp.pi)).reshape(x1.shape[:-1] + x2.shape[:-1])


def _plane(x1: Array, x2: Array) -> tuple[Array, Array, Array, tuple[Array, Array]]:
    """Return lengths (n1, 1) and (1, n2), inner products and the `_angles` of the unit vectors, (n1, n2)."""
    x1, x2 = (x.reshape(-1, x.shape[-1]) for x in (x1, x2))
    (r1, u1), (r2, u2) = _polar(x1), _polar(x2)
    return r1, r2.T, _inner(x1, x2), _angles(u1, u2)


def _polar(x: Array) -> tuple[Array, Array]:
    """Return lengths (n, 1), of slope zero at zero rows, and unit vectors (n, d) or zero rows; no square overflows."""
    largest = jnp.max(jnp.abs(jax.lax.stop_gradient(x)), axis=1, keepdims=True)
    zero = largest == 0
    scale = jnp.where(zero, 1, largest)
    x = x / scale
    length = jnp.sqrt(jnp.where(zero, 1, jnp.sum(x**2, axis=1, keepdims=True)))
    return jnp.where(zero, 0, scale * length), x / length


def _inner(x1: Array, x2: Array) -> Array:
    # Accelerators would round the factors to fewer digits by default.
    return jnp.matmul(x1, x2.T, precision=jax.lax.Precision.HIGHEST)


@jax.custom_jvp
def _angles(u1: Array, u2: Array) -> tuple[Array, Array]:
    r"""Return $\pi - \varphi$ (at a zero row $\pi/2$) and $\sin\varphi$ of unit vectors, each to its last digits."""

    def add(sums: tuple[Array, Array], coordinate: tuple[Array, Array]) -> tuple[tuple[Array, Array], None]:
        a, b = coordinate
        return (sums[0] + (a - b) ** 2, sums[1] + (a + b) ** 2), None

    # One coordinate after the other: a plain sum would hold all n1 n2 d differences.
    zeros = jnp.zeros((u1.shape[0], u2.shape[0]), u1.dtype)
    sums, _ = jax.lax.scan(add, (zeros, zeros), (u1.T[:, :, None], u2.T[:, None]), unroll=16)
    apart, together = (jnp.sqrt(square) for square in sums)
    return 2 * jnp.arctan2(together, apart), apart * together / 2


@_angles.defjvp
def _angles_jvp(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Any, Any]:
    (u1, u2), (du1, du2) = primals, tangents
    supplement, sine = _angles(u1, u2)
    # Below this the direction of u1 - u2 is all rounding. The angle has a kink there, and its mean slope is 0.
    parallel = sine <= 16 * jnp.finfo(sine.dtype).eps
    change = jnp.where(parallel, 0, (_inner(du1, u2) + _inner(u1, du2)) / jnp.where(parallel, 1, sine))
    return (supplement, sine), (change, jnp.cos(supplement) * change)


class _Pair(NamedTuple):
    """Centered Gaussians at the inputs: variances (n1, 1) and (1, n2), covariances c, and q1 q2 - c^2, (n1, n2)."""

    first: Array
    second: Array
    covariance: Array
    area_sq: Array


@functools.partial(jax.jit, static_argnames=("depth", "activation"))
def _deep(x1: Array, x2: Array, weight: Array, bias: Array, depth: int, activation: str) -> tuple[Array, Array]:
    r1, r2, inner, (_, sine) = _plane(x1, x2)
    start = _affine(_Pair(r1**2, r2**2, inner, (r1 * r2 * sine) ** 2), weight / x1.shape[-1], bias)

    def layer(_: Any, carry: tuple[_Pair, Array]) -> tuple[_Pair, Array]:
        pair, tangent = carry
        moments, slopes = _MOMENTS[activation](pair)
        pair = _affine(moments, weight, bias)
        return pair, pair.covariance + weight * slopes * tangent

    pair, tangent = jax.lax.fori_loop(0, depth, layer, (start, start.covariance))
    return tuple(k.reshape(x1.shape[:-1] + x2.shape[:-1]) for k in (tangent, pair.covariance))


def _affine(pair: _Pair, weight: Array, bias: Array) -> _Pair:
    """Return the pair times the weights' standard deviation, plus a shared Gaussian of variance `bias`."""
    distance_sq = (_root(pair.first) - _root(pair.second)) ** 2 + 2 * _shortfall(pair)
    first, second, c = (weight * q + bias for q in pair[:3])
    return _Pair(first, second, c, weight**2 * pair.area_sq + weight * bias * distance_sq)


def _shortfall(pair: _Pair) -> Array:
    r"""Return $\sqrt{q_1 q_2} - c$, without cancellation if the two are near."""
    c, length = pair.covariance, _root(pair.first) * _root(pair.second)
    return jnp.where(c > 0, pair.area_sq / jnp.where(c > 0, length + c, 1), length - c)


def _root(x: Array) -> Array:
    """Return the square root with slope zero at zero; NaN stays NaN."""
    return jnp.where(x <= 0, 0, jnp.sqrt(jnp.where(x <= 0, 1, x)))


def _relu_moments(pair: _Pair) -> tuple[_Pair, Array]:
    """Return the pair after ReLU, uncentered, and the mean product of slopes."""
    c, area = pair.covariance, _root(pair.area_sq)
    size = jnp.maximum(*jax.lax.stop_gradient((area, jnp.abs(c))))
    zero = size == 0  # a zero input; its angle is taken as a right one, as in `_angles`
    size = jnp.where(zero, 1, size)
    angle = jnp.arctan2(jnp.where(zero, 1, area / size), c / size)
    slopes = (jnp.pi - angle) / (2 * jnp.pi)
    moment = slopes * c + area / (2 * jnp.pi)
    half = _root(pair.first) * _root(pair.second) / 2
    # half - moment, of second order in the angle: its rounding must be of first order, or small angles are lost.
    missing = jnp.maximum(jnp.pi * _shortfall(pair) + (angle * c - area), 0) / (2 * jnp.pi)
    return _Pair(pair.first / 2, pair.second / 2, moment, missing * (half + moment)), slopes


def _erf_moments(pair: _Pair) -> tuple[_Pair, Array]:
    """Return the pair after erf, uncentered, and the mean product of slopes."""
    width = jnp.sqrt(1 + 2 * pair.first + 2 * pair.second + 4 * pair.area_sq)  # of (1 + 2 q1)(1 + 2 q2) - 4 c^2
    first, second = (2 / jnp.pi * jnp.arctan2(2 * q, jnp.sqrt(1 + 4 * q)) for q in pair[:2])
    moment = 2 / jnp.pi * jnp.arctan2(2 * pair.covariance, width)
    # Variances are below 1 from here on: next to the next width, this difference's rounding is of order weight * eps.
    return _Pair(first, second, moment, first * second - moment**2), 4 / (jnp.pi * width)


_MOMENTS = {"relu": _relu_moments, "erf": _erf_moments}
