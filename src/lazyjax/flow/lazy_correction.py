r"""The first-order lazy correction: what a model's flow adds to its tangent's, to first order in 1/alpha.

With $\varepsilon = 1/\alpha$, $u = \alpha(w - w_0)$ and $h(w_0) = 0$, the flow

    y = [h(w0 + eps u) - h(w0)] / eps        u' = -Dh(w0 + eps u)^T grad R(y)

is smooth in eps where h is, and at eps = 0 it is the tangent flow. Its derivative by eps there, v = du/deps and
z = dy/deps, follows a linear equation along the tangent flow, with all derivatives of h at w0:

    z = Dh v + 1/2 D^2h(ubar, ubar)        v' = -D^2h(ubar, .)^T grad R(ybar) - Dh^T D^2R(ybar) z

So alpha (y_alpha - ybar) -> z and alpha^2 (w_alpha - wbar) = alpha (u_alpha - ubar) -> v. Nothing divides by eps.

The linear part of the pair (ubar, v) is that of the tangent flow, twice: what is stiff in ubar is stiff in v, and one
eigendecomposition serves both.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.scipy.linalg as jsl
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Float

from lazyjax._core.checks import check_times, is_concrete
from lazyjax._core.forward import jvp
from lazyjax._core.tables import format_table
from lazyjax._core.trees import tree_norm
from lazyjax._core.types import Model, Outputs, Params, RealScalar
from lazyjax.difference.finite_jvp import finite_jvp
from lazyjax.flow.choose_solver import choose_solver
from lazyjax.flow.exponential import TangentExponential
from lazyjax.flow.field import ScaledObjective, TangentField, make_field
from lazyjax.flow.gradient_flow import Flow, Options, check_options, ends_at_infinity, integrate, nonfinite_unless
from lazyjax.flow.linear_part import KrylovPart, LinearizationPoint, SpectralPart
from lazyjax.flow.result import check_successful, in_words, is_array
from lazyjax.flow.start import as_scalar, check_start, values_of
from lazyjax.losses.hessian_root import HessianRoot
from lazyjax.losses.loss import Loss, as_loss
from lazyjax.losses.square import SquareLoss
from lazyjax.models.maps import without_constant
from lazyjax.models.tangent import linearize


class Correction(eqx.Module):
    r"""The first-order lazy correction; made by `lazy_correction`.

    Attributes:
        ts: The times (time,), flow time.
        outputs: $z(t) = \lim \alpha(\alpha h(w_\alpha(t)) - \alpha\bar h(\bar w_\alpha(t)))$, (time, n) or
            (time, n, k).
        displacement: $v(t) = \lim \alpha^2(w_\alpha(t) - \bar w_\alpha(t))$, a tree of w0's coordinates with a leading
            time axis.
        output_gap: $\|z(t)\|_F$ in the loss's metric, (time,): `compare(...).output_gap` is this over alpha, up
            to a share O(1/alpha) of it.
        param_gap: $\|v(t)\|$, (time,): `compare(...).param_gap` is this over alpha^2, likewise.
        tangent_flow: The tangent flow along which it was computed, with `outputs` and `displacement`; its `result`
            and `stats` are those of the one solve of both.
    """

    ts: Float[Array, " time"]
    outputs: Any
    displacement: Params
    output_gap: Float[Array, " time"]
    param_gap: Float[Array, " time"]
    tangent_flow: Flow

    def __repr__(self) -> str:
        """Return the two gaps at the end, the shapes, and the flow along which they were found, in a few lines."""
        if not all(map(is_array, (self.ts, self.output_gap, self.param_gap))):
            return eqx.tree_pformat(self)
        rows = [
            ("output_gap", f"{in_words(np.asarray(self.output_gap)[..., -1])} / alpha at the end"),
            ("param_gap", f"{in_words(np.asarray(self.param_gap)[..., -1])} / alpha^2 at the end"),
            ("outputs", str(self.outputs.shape)),
            ("displacement", ", ".join(str(leaf.shape) for leaf in jtu.tree_leaves(self.displacement))),
        ]
        table, flow = format_table(rows).splitlines(), f"along a {self.tangent_flow}".splitlines()
        return "\n  ".join(["Correction to first order in 1/alpha", *table, *flow])

    __str__ = __repr__


def lazy_correction(
    h: Model,
    loss: Loss | Callable[[Outputs], RealScalar],
    w0: Params,
    ts: Float[Array, " time"],
    *,
    solver: diffrax.AbstractSolver | None = None,
    rtol: float = 1e-6,
    atol: float = 1e-9,
    max_steps: int = 4096,
    throw: bool = True,
) -> Correction:
    r"""Return the limits of $\alpha(y_\alpha - \bar y)$ and $\alpha^2(w_\alpha - \bar w_\alpha)$ at $\alpha = \infty$.

    These are the constants in the rates of lazy training, from one solve at $\alpha = \infty$ and without a fit: at a
    fixed time the output gap is output_gap/alpha, the distance of the parameters param_gap/alpha^2, both up to a share
    O(1/alpha). If the limit of the outputs is zero, as for a symmetrized model, their gap falls as 1/alpha^2 or faster.

    A ReLU model is smooth near w0 unless a unit sits on its kink there: its limits are right too, and describe the
    flows at those alpha that are large enough for no unit to cross its kink.

    Args:
        h: Model h(w) with outputs (n,) or (n, k), the data inside; zero at w0 (see `center`, `symmetrize`) and twice
            differentiable there.
        loss: R on outputs, twice differentiable.
        w0: Start; any pytree, its floating arrays are the coordinates.
        ts: Times to save at, strictly increasing; the first is the start, the last may be inf: run until the tangent
            flow and the correction both stand still. (If Dh(w0) does not reach the target, the correction may grow
            without bound.) A vector-field evaluation costs a small multiple of a gradient.
        solver: Any diffrax solver. None: as `gradient_flow` at alpha = inf, `TangentExponential` or Tsit5 by predicted
            cost (`tangent_flow.stats["solver"]` says which).
        rtol: Relative tolerance of the tangent displacement and of the correction, as in `gradient_flow`.
        atol: Absolute tolerance.
        max_steps: Steps after which to stop with a `result`.
        throw: Raise if the solve stopped early; False leaves that to `tangent_flow.result`.

    Returns:
        `Correction`.

    Raises:
        ValueError, TypeError: as `gradient_flow` at alpha = inf; w0 lies on a kink of h, or D^2h is not finite there
            (as seen along the first step of the flow, outside of a trace).
        equinox.EquinoxRuntimeError: `throw` and the solve stopped early.

    Source:
        Chizat, Oyallon, Bach (2019), theorem 2.2 has the rates; the limits are ours. That those of the outputs vanish
        for symmetrized models, which the paper does not say, is their antisymmetry: h(Sw) = -h(w).

    Example:
        >>> from lazyjax import square_loss
        >>> ts = jnp.array([0.0, 1.0])
        >>> limit = lazy_correction(lambda w: w + w**2 / 2, square_loss(jnp.ones(1)), jnp.zeros(1), ts)
        >>> print(f"{limit.outputs[-1, 0]:.4f}", f"{2 * jnp.exp(-2.0):.4f}")
        0.2707 0.2707
    """
    loss = as_loss(loss)
    check_times(ts)
    check_options(("outputs", "displacement"), rtol, atol, max_steps)
    zero_start = check_start(h, loss, w0, jnp.inf, rtol)
    _check_smooth(h, loss, w0)
    if solver is None:
        solver = choose_solver(ScaledObjective.of(h, loss, w0, jnp.inf, zero_start), ts)
        if isinstance(solver, TangentExponential) and isinstance(loss, SquareLoss):
            # The linear part at the start is that of all times.
            solver = dataclasses.replace(solver, relinearize=False)
    save, inside = ("outputs", "displacement"), throw and not zero_start
    options = Options(solver, False, None, None, as_scalar(rtol), as_scalar(atol), save, max_steps, False, inside)
    out = _lazy_correction(h, loss, w0, jnp.asarray(ts), options, zero_start, ends_at_infinity(ts))
    return check_successful(out.tangent_flow.result, out) if throw else out


class PairField(TangentField):
    r"""The vector field of $(\bar u, v)$: the tangent field, with its derivative by eps.

    `coordinates` and `rest` are pairs; `start` and `outputs` hold those of $\bar y$ and z, one below the other.
    """

    def _anchor(self) -> tuple[Callable[[Params], Outputs], Params]:
        """Return the model as a function of the coordinates, and those of w0."""
        coordinates, rest = eqx.partition(self.tangent.w0, eqx.is_inexact_array)
        return lambda w: self.tangent.h(eqx.combine(w, rest)), coordinates

    def outputs(self, u: Params) -> Outputs:
        r"""Return $\bar y = Dh\,\bar u$ and $z = Dh\,v + \frac12 D^2h(\bar u, \bar u)$, (2n,) or (2n, k).

        `finite_jvp` would give z as its derivative by eps, but not through a `jax.custom_jvp`, whose value at eps = 0
        it takes for itself.
        """
        displacement, v = u
        model, w0 = self._anchor()
        slope, curvature = jvp(lambda w: jvp(model, (w,), (displacement,))[1], (w0,), (displacement,))
        return self.start + jnp.concatenate([slope, self.tangent.jvp(v) + 0.5 * curvature])

    def linearization_point(self, u: Params | None = None) -> LinearizationPoint:
        """Return the model at w0, twice; the loss where u has taken the outputs of the tangent model."""
        outputs = self.start if u is None else self.outputs(u)
        root = self.loss.root(jnp.split(outputs, 2)[0])
        return LinearizationPoint(_Twice(self.tangent.h), self.rest, self.coordinates, _TwiceRoot(root))

    def __call__(self, u: Params) -> Params:
        r"""Return $(\bar u', v')$."""
        model, w0 = self._anchor()
        y, z = jnp.split(self.outputs(u), 2)
        cotangents = jvp(self.loss.cotangent, (y,), (z,))

        def pull(w: Params, r: Outputs) -> Params:
            return jax.vjp(model, w)[1](r)[0]

        # Dh(w0 + eps u)^T grad R, and its derivative by eps.
        pulled = jvp(pull, (w0, cotangents[0]), (u[0], cotangents[1]))
        return jtu.tree_map(jnp.negative, pulled)


class _Twice(eqx.Module):
    """The model of two sets of parameters that returns the outputs of both."""

    h: Model

    def __call__(self, w: Params) -> Outputs:
        return jnp.concatenate([self.h(w[0]), self.h(w[1])])


class _TwiceRoot(HessianRoot):
    """The root of a loss on each half of the outputs of `_Twice`."""

    root: HessianRoot

    def apply(self, v: Outputs) -> Outputs:
        """Return S v of each half."""
        return jax.vmap(self.root.apply)(v.reshape(2, -1, *v.shape[1:])).reshape(v.shape)

    def transpose(self, v: Outputs) -> Outputs:
        """Return S^T v of each half."""
        return jax.vmap(self.root.transpose)(v.reshape(2, -1, *v.shape[1:])).reshape(v.shape)


def _attach(solver: TangentExponential, single: TangentField, pair: PairField, horizon: Array) -> TangentExponential:
    """Return the solver with the linear part of the pair: that of the tangent flow, found once, for both."""
    if solver.relinearize:  # it finds new ones by itself
        rank = None if solver.rank is None else 2 * solver.rank
        return dataclasses.replace(solver, rank=rank).attach(pair, horizon)
    solver = solver.attach(single, horizon)
    part, point = solver.linear, jax.lax.stop_gradient(pair.linearization_point())
    if isinstance(part, SpectralPart):
        vectors = jsl.block_diag(part.vectors, part.vectors)
        twice = SpectralPart(point, part.top, jnp.tile(part.values, 2), vectors)
    else:
        assert isinstance(part, KrylovPart)
        twice = KrylovPart(point, part.top, part.num_lanczos, 2 * part.size, part.dtype)
    return eqx.tree_at(lambda s: s.linear, solver, twice)


@eqx.filter_jit
def _lazy_correction(
    h: Model, loss: Loss, w0: Params, ts: Array, options: Options, zero_start: bool, to_infinity: bool
) -> Correction:
    tangent = linearize(without_constant(h) if zero_start else h, w0)
    single = make_field(tangent, loss, w0, jnp.inf, zero_start=zero_start, throw=options.throw)
    assert isinstance(single, TangentField)
    start = jnp.concatenate([single.start, jnp.zeros_like(single.start)])
    coordinates, rest = ((part, part) for part in (single.coordinates, single.rest))
    pair = PairField(tangent, coordinates, rest, loss, single.eps, start)
    ts, solver = ts.astype(start.dtype), options.solver
    if isinstance(solver, TangentExponential):
        solver = _attach(solver, single, pair, ts[-1] - ts[0])
    assert isinstance(solver, diffrax.AbstractSolver)
    saved, result, stats = integrate(pair, solver, ts, options, to_infinity=to_infinity)
    outputs, limit = jnp.split(saved["outputs"], 2, axis=1)
    displacement, v = saved["displacement"]
    result = nonfinite_unless(jnp.all(jnp.isfinite(saved["outputs"])), result)
    alpha = jnp.asarray(jnp.inf, start.dtype)
    flow = Flow(ts, outputs, displacement, None, jax.vmap(loss)(outputs), alpha, result, stats)
    return Correction(ts, limit, v, jax.vmap(loss.norm)(limit), jax.vmap(tree_norm)(v), flow)


def _check_smooth(h: Model, loss: Loss, w0: Params) -> None:
    """Check that w0 is not on a kink and has a second derivative, as far as the first step can tell."""
    if not is_concrete((eqx.filter((h, loss), eqx.is_array), w0)):
        return
    curvature, forward, backward = values_of(_probe, h, loss, w0)
    bad = int(np.sum(~np.isfinite(curvature)))
    if bad:
        msg = (
            f"h must be twice differentiable at w0, but {bad} of {curvature.size} entries of D^2h(w0)(d, d), d the "
            "first step of the flow, are NaN or infinite; move w0 off the singular point."
        )
        raise ValueError(msg)
    size, gap = np.max(np.abs(forward)), np.max(np.abs(forward - backward))
    if gap > np.sqrt(np.finfo(forward.dtype).eps) * size:
        msg = (
            "h must be twice differentiable at w0, but its derivatives on the two sides of w0 along the first step of "
            f"the flow are {gap:.1e} apart (the larger is {size:.1e}): w0 lies on a kink. Move it off (biases that are "
            "not zero, where a unit sees nothing else), or take a smooth activation."
        )
        raise ValueError(msg)


@eqx.filter_jit
def _probe(h: Model, loss: Loss, w0: Params) -> tuple[Outputs, Outputs, Outputs]:
    """Return D^2h(d, d) for the first step d, and the difference quotients over one unit of rounding on either side."""
    coordinates, rest = eqx.partition(w0, eqx.is_inexact_array)

    def model(w: Params) -> Outputs:
        return h(eqx.combine(w, rest))

    initial, vjp = jax.vjp(model, coordinates)
    (d,) = vjp(loss.cotangent(jnp.zeros_like(initial)))
    curvature = jvp(lambda w: jvp(model, (w,), (d,))[1], (coordinates,), (d,))[1]

    def largest(tree: Params) -> Array:
        sizes = [jnp.max(jnp.abs(leaf), initial=0).astype(initial.dtype) for leaf in jtu.tree_leaves(tree)]
        size = functools.reduce(jnp.maximum, sizes)
        return jnp.where(size > 0, size, 1)

    # What is a kink up to rounding is one: no alpha of use is on this side of it.
    eps = jnp.finfo(initial.dtype).eps * largest(coordinates) / largest(d)
    return curvature, finite_jvp(model, coordinates, d, eps), finite_jvp(model, coordinates, d, -eps)
