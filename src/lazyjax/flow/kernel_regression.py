r"""Regression with the tangent kernel: what the tangent model predicts at any training time, in closed form.

The tangent model's flow for the square loss is a filter of the modes of the kernel (`lazyjax.flow.closed_form`), so one
eigendecomposition gives its outputs at all times, the end included, on the training data and, through the cross Gram,
on any other inputs; and so does ridge regression with the same kernel.
"""

import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from lazyjax._core.checks import check_finite
from lazyjax._core.tables import format_table
from lazyjax._core.types import Model, Outputs, Params, RealScalar
from lazyjax.flow.closed_form import Numbers, TangentSolution, solve_tangent
from lazyjax.flow.field import make_field
from lazyjax.flow.result import in_words, is_array
from lazyjax.flow.start import as_scalar, check_start
from lazyjax.kernels.gram import gram
from lazyjax.kernels.spectrum import check_rtol, effective_rank
from lazyjax.losses.loss import Loss
from lazyjax.losses.square import SquareLoss
from lazyjax.models.maps import on_data, without_constant

PER_DECADE = 16
"""Times per decade among which the best one is looked for first. A flow's outputs change on the scale of e in time."""


class KernelRegression(eqx.Module):
    r"""The tangent model trained with the square loss, on training and test points; made by `kernel_regression`.

    Times are flow times in [0, inf], penalties numbers in [0, inf]; for a vector of them its axis comes first in the
    results. Everything can be jitted, mapped, and differentiated in times, penalties, targets and alpha (not in w0 and
    x if eigenvalues are repeated: their eigenvectors have no derivative).

    Attributes:
        solution: The flow on the training data, with all eigenvalues and eigenvectors.
    """

    solution: TangentSolution
    _transfer: Callable[[Array], Array] | None
    _test_start: Outputs | None

    def __repr__(self) -> str:
        """Return the spectrum, the loss at both ends, and the number of test points, in a few lines."""
        values, coefficients = self.solution.eigenvalues, self.solution.coefficients
        if not (is_array(values) and is_array(coefficients)) or values.ndim != 1:
            return eqx.tree_pformat(self)
        positive, squares = np.asarray(values) > 0, 0.5 * self.solution.weight * np.asarray(coefficients) ** 2
        nonzero = np.asarray(values)[positive]
        shown = f"{in_words(nonzero)}, condition {in_words(self.condition)}" if nonzero.size else "0"
        rows = [
            ("rank", f"{positive.sum()} of {positive.size}"),
            ("eigenvalues", shown),
            ("loss", f"{np.sum(squares):.4g} at t = 0, {np.sum(squares[~positive]):.4g} at t = inf"),
            ("test outputs", "none" if self._test_start is None else str(self._test_start.shape)),
        ]
        if not positive.all():
            dropped = f"{np.sum(~positive)} below rounding, condition with them {in_words(self.whole_condition)}"
            rows.insert(2, ("dropped", dropped))
        return "\n  ".join(["KernelRegression", *format_table(rows).splitlines()])

    __str__ = __repr__

    @property
    def eigenvalues(self) -> Float[Array, " m"]:
        r"""The eigenvalues of $K = Dh(w_0) Dh(w_0)^*$ in F's metric (1/flow time), all n*k, falling; exact zeros."""
        return self.solution.eigenvalues

    @property
    def condition(self) -> Float[Array, ""]:
        """The largest over the smallest eigenvalue that is kept: the relative error at t = inf in units of rounding."""
        return self.solution.condition

    @property
    def whole_condition(self) -> Float[Array, ""]:
        """The condition number with the eigenvalues that were dropped as rounding: infinite if one of them is zero."""
        return self.solution.whole_condition

    @property
    def dropped(self) -> Int[Array, ""]:
        """The number of eigenvalues taken for zero: modes that are not fitted, and that `condition` leaves out."""
        return self.eigenvalues.size - self.rank

    @property
    def rank(self) -> Int[Array, ""]:
        """The number of nonzero eigenvalues."""
        return jnp.sum(self.eigenvalues > 0)

    @property
    def effective_rank(self) -> Float[Array, ""]:
        """The `lazyjax.kernels.effective_rank` of the eigenvalues."""
        return effective_rank(self.eigenvalues)

    def outputs(self, t: Numbers) -> Float[Array, "..."]:
        r"""Return $\bar y(t) = y^* + e^{-tK}(\bar y(0) - y^*)$ on the training data, (n,) or (n, k)."""
        return self.solution.outputs(t)

    def test_outputs(self, t: Numbers) -> Float[Array, "..."]:
        r"""Return $\alpha h(w_0, x') - K(x', x) K^{-1} (1 - e^{-tK}) (\bar y(0) - y^*)$ on the test points x'."""
        return self._on_test(self.solution.cotangent(t))

    def loss(self, t: Numbers) -> Float[Array, "..."]:
        r"""Return the training loss $R(\bar y(t))$."""
        return self.solution.loss(t)

    def ridge(self, penalty: Numbers) -> Float[Array, "..."]:
        r"""Return training outputs $\bar y(0) + Dh(w_0) u$ for the u that minimizes $R + \frac{\mu}{2}|u|^2$.

        A mode of eigenvalue lambda is fitted to the share $\lambda/(\lambda + \mu)$, by the flow to
        $1 - e^{-t\lambda}$: with $\mu = 1/t$ the flow fits every mode more closely, by at most 30%, and early
        stopping and ridge regression are nearly the same. The penalty mu = 0 is t = inf.

        Source:
            Ali, Kolter, Tibshirani (2019), A continuous-time view of early stopping for least squares, AISTATS.
        """
        return self.solution.ridge(penalty)

    def test_ridge(self, penalty: Numbers) -> Float[Array, "..."]:
        """Return what `ridge` does, on the test points."""
        return self._on_test(self.solution.ridge_cotangent(penalty))

    def best_time(self, loss: Loss) -> tuple[Float[Array, ""], Float[Array, ""]]:
        r"""Return the time in [0, inf] at which the loss on the test points is smallest, and that loss.

        Found to rounding: on a logarithmic grid of 16 times per decade over all times at which outputs change, then by
        bisection of the derivative. It is inf if no earlier stop is better by more than rounding.

        Args:
            loss: The square loss of the test targets, `lazyjax.square_loss(y_test)`.

        Returns:
            (time, loss); not to be differentiated.

        Raises:
            ValueError: no test points, targets of another shape.
            TypeError: another loss than the square one.
        """
        start = self._need_test()[1]
        loss = check_square(loss)
        loss.check(start.shape)
        return _search(self, loss)

    @eqx.filter_jit
    def _on_test(self, cotangents: Array) -> Array:
        """Return test outputs for a cotangent on the training data, or for a number of them."""
        transfer, start = self._need_test()
        if cotangents.ndim == self.solution.start.ndim:
            return start + transfer(cotangents[None])[0]
        return start[None] + transfer(cotangents)

    def _need_test(self) -> tuple[Callable[[Array], Array], Outputs]:
        if self._transfer is None or self._test_start is None:
            msg = "x_test must be given to predict on test points: kernel_regression(..., x_test=...)."
            raise ValueError(msg)
        return self._transfer, self._test_start


class GramTransfer(eqx.Module):
    """The cross Gram as a map from cotangents on the training data, (number, n[, k]), to changes of test outputs."""

    cross: Float[Array, "..."]

    def __call__(self, cotangents: Array) -> Array:
        """Return the changes by one product of matrices for all cotangents."""
        axes = self.cross.ndim // 2
        return jnp.tensordot(cotangents, self.cross, ([*range(1, 1 + axes)], [*range(axes, 2 * axes)]))


def kernel_regression(
    f: Model,
    w0: Params,
    x: Shaped[Array, "n ..."],
    loss: Loss,
    *,
    x_test: Shaped[Array, "n2 ..."] | None = None,
    alpha: RealScalar = 1.0,
    rtol: float | None = None,
) -> KernelRegression:
    r"""Train the tangent model of f at w0 for any time at once: $\bar y(t) = y^* + e^{-tK}(\bar y(0) - y^*)$.

    The same as `gradient_flow(linearize(h, w0), loss, w0, ts, alpha=alpha)` with h = f(., x), at all t from one
    eigendecomposition, and with test points. The start is $\bar y(0) = \alpha h(w_0)$; `center(f, w0)` makes it zero.

    Args:
        f: Model f(w, x) with outputs (n,) or (n, k), each row of them depending on its own row of x only.
        w0: Where it is linearized.
        x: Training inputs, samples along the first axis.
        loss: `lazyjax.square_loss(target)`; its weight c sets the metric, $K = c JJ^T$.
        x_test: Test inputs.
        alpha: Output scale in (0, inf]; inf needs h(w0) = 0, as `center` and `symmetrize` declare it.
        rtol: Eigenvalues not above this share of the largest are taken for zero, and their modes are never learned;
            None for $\sqrt{nk}\,\epsilon$.

    Returns:
        `KernelRegression`. It takes the Gram, $O((nk)^3)$ for the eigendecomposition, and the cross Gram.

    Raises:
        TypeError: another loss than the square one; parameters or outputs unfit.
        ValueError: empty or non-finite inputs; f mixes samples; outputs and target of different shapes; alpha not in
            (0, inf]; alpha infinite with h(w0) not zero (`equinox.EquinoxRuntimeError` on test points and for traced
            values); rtol outside [0, 1).

    Source:
        Chizat, Oyallon, Bach (2019), sections 1.1 and 2.3; t = inf: Jacot, Gabriel, Hongler (2018), section 5.

    Example:
        >>> from lazyjax import square_loss
        >>> x, x_test = jnp.array([[1.0], [2.0]]), jnp.array([[3.0]])
        >>> found = kernel_regression(lambda w, x: x @ w, jnp.zeros(1), x, square_loss(jnp.ones(2)), x_test=x_test)
        >>> import numpy as np
        >>> print(np.asarray(found.outputs(jnp.inf)).round(4), np.asarray(found.test_outputs(jnp.inf)).round(4))
        [0.6 1.2] [1.8]
        >>> print(found.rank)
        1
    """
    loss = check_square(loss)
    check_rtol(rtol)
    _check_inputs(x, x_test)
    zero_start = check_start(on_data(f, x), loss, w0, alpha, rtol=1e-6)
    scale = as_scalar(alpha)
    start = _start(f, w0, x, loss, scale, zero_start)
    # Without the constant the derivative is the same, at half the price.
    model = without_constant(f)
    transfer = test_start = None
    if x_test is not None:
        test_start = _start(f, w0, x_test, loss, scale, zero_start)
        check_finite(test_start, "alpha f(w0, x_test)")
        transfer = GramTransfer(gram(model, w0, x_test, x))
    return KernelRegression(_solve(gram(model, w0, x), start, loss, rtol), transfer, test_start)


def check_square(loss: Any) -> SquareLoss:
    """Check that a loss is the square loss: the flows of all others have no closed form."""
    if isinstance(loss, SquareLoss):
        return loss
    msg = (
        "loss must be a square loss, whose flow has a closed form, lazyjax.square_loss(target), got "
        f"{type(loss).__name__}; for other losses follow gradient_flow(linearize(h, w0), loss, ...)."
    )
    raise TypeError(msg)


def _check_inputs(x: Array, x_test: Array | None) -> None:
    for name, inputs in (("x", x), ("x_test", x if x_test is None else x_test)):
        if inputs.ndim == 0 or inputs.size == 0:
            msg = f"{name} must hold at least one sample along its first axis, got shape {inputs.shape}."
            raise ValueError(msg)
        if inputs.shape[1:] != x.shape[1:]:
            msg = f"x_test must hold samples of the shape of those of x, {x.shape[1:]}, got {inputs.shape[1:]}."
            raise ValueError(msg)
        check_finite(inputs, name)


@eqx.filter_jit
def _start(f: Model, w0: Params, x: Array, loss: Loss, alpha: RealScalar, zero_start: bool) -> Outputs:
    return make_field(on_data(f, x), loss, w0, alpha, zero_start=zero_start).start


@eqx.filter_jit
def _solve(matrix: Array, start: Outputs, loss: SquareLoss, rtol: float | None) -> TangentSolution:
    matrix = matrix.reshape(start.size, start.size)
    return solve_tangent(matrix, start, loss.minimizer, loss.weight, rtol=rtol)


@eqx.filter_jit
def _search(regression: KernelRegression, loss: SquareLoss) -> tuple[Array, Array]:
    distance = _distance_on_test(regression, loss)
    times = _time_grid(regression.eigenvalues)
    norms = jax.vmap(lambda t: jnp.linalg.norm(distance(t)))(times)
    i, last = jnp.argmin(norms), times.size - 2  # the last finite one; from there on nothing changes
    low, high = times[jnp.clip(i - 1, 0, last)], times[jnp.clip(i + 1, 0, last)]

    def halve(_: Any, bracket: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bracket
        middle = 0.5 * (low + high)
        value, change = jax.jvp(distance, (middle,), (jnp.ones_like(middle),))
        rises = jnp.vdot(value, change) > 0
        return jnp.where(rises, low, middle), jnp.where(rises, middle, high)

    steps = jnp.finfo(times.dtype).nmant + 2
    low, high = jax.lax.fori_loop(0, steps, halve, (low, high))
    found = 0.5 * (low + high)
    refined = jnp.linalg.norm(distance(found))
    time, best = jnp.where(refined < norms[i], found, times[i]), jnp.minimum(refined, norms[i])
    # If the end is best, the last finite times are as good as inf, or better by rounding.
    rounding = 10 * jnp.finfo(times.dtype).eps * jnp.maximum(norms[0], norms[-1])
    to_infinity = norms[-1] <= best + rounding
    return jnp.where(to_infinity, jnp.inf, time), 0.5 * loss.weight * jnp.where(to_infinity, norms[-1], best) ** 2


def _time_grid(eigenvalues: Array) -> Array:
    """Return 0, all times between which outputs change, in even steps of their logarithm, and inf."""
    positive = eigenvalues > 0
    largest = jnp.where(positive[0], eigenvalues[0], 1)
    smallest = jnp.minimum(largest, jnp.min(jnp.where(positive, eigenvalues, jnp.inf)))
    digits = _digits(eigenvalues)
    # At the first of them nothing has been learned, at the last e^{-t lambda} is rounding. (With rtol = 0 there may be
    # eigenvalues smaller than rounding of the largest: then the steps are wider.)
    ends = jnp.log(1e-3 / largest), jnp.log(digits * math.log(10) / smallest)
    inner = jnp.exp(jnp.linspace(*ends, PER_DECADE * round(digits + 5)))
    return jnp.concatenate([jnp.zeros(1, inner.dtype), inner, jnp.full(1, jnp.inf, inner.dtype)])


def _digits(values: Array) -> float:
    return -math.log10(jnp.finfo(values.dtype).eps)


def _distance_on_test(regression: KernelRegression, loss: SquareLoss) -> Callable[[Array], Array]:
    r"""Return a function of t to a short vector of the norm of $y_{test}(t) - y^*_{test}$, by few products.

    The displacements u(t) of all times lie to rounding in a space of few dimensions, because exponentials e^{-t lambda}
    do. So the test outputs of a basis of it are all that is needed, and of these the triangular factor.
    """
    solution, (transfer, start) = regression.solution, regression._need_test()
    motion = solution.modes(_time_grid(solution.eigenvalues))
    # The singular values fall geometrically, and the slower the larger the condition number. Rounding is a bound for
    # both, so the number of those above it is of the order of the digits squared (53 in float32, 270 in float64).
    num = math.ceil(1.1 * _digits(motion) ** 2)
    basis = jnp.linalg.svd(motion, full_matrices=False)[2][:num]
    columns = transfer(jax.vmap(solution.from_modes)(basis)).reshape(basis.shape[0], -1)
    residual = loss.gradient(start).reshape(1, -1)
    triangle = jnp.linalg.qr(jnp.concatenate([columns, residual]).T, mode="r")
    return lambda t: triangle @ jnp.append(basis @ solution.modes(t), 1)
