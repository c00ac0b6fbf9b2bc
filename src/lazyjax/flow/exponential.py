r"""`TangentExponential`: gradient flows at any stiffness, by solving their linear part exactly.

In displacement coordinates u' = f(u) = Lu + N(u), with $L = -Dh(w_0)^T \nabla^2 R\, Dh(w_0)$, the Gauss-Newton part
at the start. Lazy training is N of order 1/alpha: the flow is a small perturbation of a linear one, and a method that
takes e^{hL} for granted needs a handful of steps where an explicit one needs lambda_max(L) T / 3.

The scheme is Krogstad's (2005) fourth-order exponential Runge-Kutta method in increments D_i = N(U_i) - N(u),

    U_2 = u + h/2 phi_1(hL/2) f
    U_3 = u + h/2 phi_1(hL/2) f + h phi_2(hL/2) D_2
    U_4 = u + h phi_1(hL) f + 2h phi_2(hL) D_3
    u_1 = u + h phi_1(hL) f + h (2 phi_2 - 4 phi_3)(hL) (D_2 + D_3) + h (4 phi_3 - phi_2)(hL) D_4

which no choice of L can make inconsistent: a point with f = 0 stays, whatever L is. The error is estimated against
the method of order 3 with D_5 = N(u_1) - N(u) for D_4, whose f(u_1) is that of the next step, and by the curvature of
N inside the step (`stiff_error_term`).

From top to bottom: the tableau, the dense output, what the scheme misses, when to linearize anew, and the solver.

Source: Krogstad (2005), Generalized integrating factor methods for stiff PDEs, J. Comput. Phys. 203, equation (48);
Hochbruck, Ostermann (2010), Exponential integrators, Acta Numerica 19.
"""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from diffrax import RESULTS
from jaxtyping import Array, Float

from lazyjax._core.cost import dense_cost, method_cost
from lazyjax._core.trees import tree_norm
from lazyjax._core.types import Model, Outputs, Params, RealScalar
from lazyjax.flow.field import ModelField, ScaledObjective, TangentField
from lazyjax.flow.linear_part import (
    Expansion,
    LinearPart,
    Piece,
    Products,
    SpectralPart,
    krylov_part,
    ritz_part,
    spectral_part,
)
from lazyjax.flow.start import check_start
from lazyjax.losses.loss import Loss, as_loss

# ---- the tableau: each row a list of pieces h b phi_k(c h L) D, written (D, c, {k: b}) ----


def stage_2(f: Expansion) -> list[Piece]:
    """Return U_2 - u."""
    return [(f, 0.5, {1: 0.5})]


def stage_3(f: Expansion, d2: Expansion) -> list[Piece]:
    """Return U_3 - u."""
    return [(f, 0.5, {1: 0.5}), (d2, 0.5, {2: 1.0})]


def stage_4(f: Expansion, d3: Expansion) -> list[Piece]:
    """Return U_4 - u."""
    return [(f, 1.0, {1: 1.0}), (d3, 1.0, {2: 2.0})]


def solution(f: Expansion, d2: Expansion, d3: Expansion, d4: Expansion, theta: Any = 1.0) -> list[Piece]:
    r"""Return $u(\theta h) - u$, with N replaced by the parabola through its values at 0, h/2 (twice) and h."""
    square, cube = theta**2, theta**3
    middle = {2: 2 * square, 3: -4 * cube}
    return [(f, theta, {1: theta}), (d2, theta, middle), (d3, theta, middle), (d4, theta, {2: -square, 3: 4 * cube})]


def embedded_error(defect: Expansion) -> list[Piece]:
    """Return what replacing D_4 by D_5 changes of u_1; the defect is D_5 - D_4."""
    return [(defect, 1.0, {2: -1.0, 3: 4.0})]


class PhiInterpolation(diffrax.AbstractLocalInterpolation):
    r"""The solution inside a step: the last row of the tableau at $\theta h$, of order 3 uniformly.

    Exact if N is a parabola in time, whatever the stiffness; a polynomial through the stages would be wrong there.
    """

    t0: Any
    t1: Any
    u: Params
    h: Array
    f: Expansion
    d2: Expansion
    d3: Expansion
    d4: Expansion
    linear: LinearPart

    def evaluate(self, t0: Any, t1: Any = None, left: bool = True) -> Params:
        """Return u at t0, or the change from t0 to t1."""
        del left
        if t1 is not None:
            return jtu.tree_map(jnp.subtract, self.evaluate(t1), self.evaluate(t0))
        span = self.t1 - self.t0
        # diffrax may ask for the end of an empty step.
        theta = jnp.where(span == 0, 0, (t0 - self.t0) / jnp.where(span == 0, 1, span)).astype(self.h.dtype)
        pieces = solution(self.f, self.d2, self.d3, self.d4, theta)
        delta, _ = self.linear.combine(self.linear.point.products(), self.h, pieces)
        return jtu.tree_map(jnp.add, self.u, delta)


# ---- what the scheme misses inside a step ----


def stiff_error_term(
    linear: LinearPart, b: Products, h: Array, d2: Expansion, d3: Expansion, d4: Expansion
) -> list[Piece]:
    r"""Return an estimate of what the parabola misses if N curves inside the step, which D_4 and D_5 cannot see.

    Stiff modes that decay inside it: for N = -\delta r in a mode of eigenvalue $\lambda$ the scheme leaves
    $\delta r/(\lambda^2 h)$ of what should vanish, though D_2 = ... = D_5. Kinks: N is a broken line.
    The difference to the method of order 2, which has $h \varphi_2 D_4$ for the last two terms, is
    $2e = h (2\varphi_2 - 4\varphi_3)(D_2 + D_3 - D_4)$, twice that residue. By itself e would ask for the steps of an
    order 2 where N is smooth and nothing is stiff. There its weights $\varphi_2 - 2\varphi_3$ give way to
    $2\varphi_2 - \varphi_1/2 - 3\varphi_3$, which vanish like $h\lambda$ and have the same limit at infinity, as far as
    e is small compared with what D_4 alone makes, which is O(h). So the estimate keeps its order, and e counts in full
    where N is all curvature.
    """
    weights = {2: 1.0, 3: -2.0}
    # Only B times the sums is used: no product is taken for them.
    _, bent = linear.combine(b, h, _curvature(d2, d3, d4, weights))
    _, whole = linear.combine(b, h, [(d4, 1.0, weights)])
    # No derivative: the choice of steps has none, and that of a norm at 0 would be NaN.
    size, other = (jnp.linalg.norm(jax.lax.stop_gradient(product)) for product in (bent, whole))
    share = jnp.where(size > 0, size / jnp.where(size > 0, size + other, 1), 0)
    return _curvature(d2, d3, d4, {1: 0.5 * share - 0.5, 2: 2 - share, 3: share - 3})


def _curvature(d2: Expansion, d3: Expansion, d4: Expansion, weights: Mapping[int, Any]) -> list[Piece]:
    """Return the pieces of D_2 + D_3 - D_4: zero if N is a line in time."""
    minus = {k: -weight for k, weight in weights.items()}
    return [(d2, 1.0, weights), (d3, 1.0, weights), (d4, 1.0, minus)]


def contraction(
    linear: LinearPart, b: Products, h: Array, f: Expansion, d2: Expansion, d3: Expansion, moved: Params
) -> Float[Array, ""]:
    r"""Return by how much the stages contract: $|h \varphi_2(hL/2)(D_3 - D_2)| / |U_3 - U_2|$.

    U_3 is U_2 moved by $h \varphi_2(hL/2) D_2$, so that this is what N' makes of it in a step: h |L_1 - L| / 2 at most,
    for the linear part L_1 of the present point. 0 if D_2 is no more than the rounding of f.
    """
    change, _ = linear.combine(b, h, [(d3, 0.5, {2: 1.0}), (d2, 0.5, {2: -1.0})])
    size, whole, slope = (tree_norm(jax.lax.stop_gradient(tree)) for tree in (change, moved, f.direct))
    real = whole > 32 * jnp.finfo(whole.dtype).eps * h * slope
    return jnp.where(real, size / jnp.where(real, whole, 1), 0)


# ---- when a new linear part is worth its price ----

LAG_CONTRACTION = 0.03
"""Contraction of the stages above which a linear part that lags behind the flow is taken to cost steps.

It is near 1 at the stability bound, but the order of the method falls to 2 long before. (A flow at alpha = 1 and rtol
1e-6: 0.1 takes four times the steps and makes six times the error, 0.01 the same as this.)
"""


class RelinearizationCost(eqx.Module):
    r"""The steps lost by keeping the present linear part, next to the price of a new one, also in steps.

    A step in which the stages contract by $\rho$ loses the share $1 - \rho_0/\rho$, with $\rho_0$ the
    `LAG_CONTRACTION`: about $\rho/\rho_0$ times as many are taken as with a linear part that is up to date.

    Attributes:
        flow_start: Time at which the flow began.
        steps_lost: Steps lost to the lag of the linear part since it was taken.
        price: Steps that must be lost before a new one is worth it; doubled if the last one changed little.
        rate_before: Contraction rate rho/h just before the linear part was taken, until the first step after it is
            compared with it; infinite from then on.
    """

    flow_start: Any
    steps_lost: Float[Array, ""]
    price: Float[Array, ""]
    rate_before: Float[Array, ""]

    @classmethod
    def at_start(cls, flow_start: Any, price: float, like: Array) -> "RelinearizationCost":
        """Return the cost at the start of a flow: nothing is lost, there is no rate to compare with."""
        return cls(flow_start, jnp.zeros_like(like), jnp.full_like(like, price), jnp.full_like(like, jnp.inf))

    def add_step(self, rho: Array, h: Array, least_price: float) -> "RelinearizationCost":
        """Return the cost after a step of length h in which the stages contracted by rho."""
        # If the new linear part changed little, the curvature of N holds the steps, or stiffness that a low rank
        # leaves out, and the next one will change little too.
        changed_little = rho > 0.5 * h * self.rate_before
        judged = jnp.where(changed_little, 2 * self.price, least_price)
        price = jnp.where(jnp.isinf(self.rate_before), self.price, judged)
        lost = 1 - LAG_CONTRACTION / jnp.maximum(rho, LAG_CONTRACTION)
        return RelinearizationCost(self.flow_start, self.steps_lost + lost, price, jnp.full_like(rho, jnp.inf))

    def is_due(self, steps_left: Array) -> Array:
        """Return whether a new linear part is worth it: its price is lost already, and that many steps are left.

        Renewing when the loss has reached the price costs at most about twice what knowing the flow ahead would.
        """
        return (self.steps_lost > self.price) & (steps_left > self.price)

    def renewed(self, rate: Array) -> "RelinearizationCost":
        """Return the cost with a new linear part, taken at this contraction rate."""
        return RelinearizationCost(self.flow_start, jnp.zeros_like(rate), self.price, rate)


# ---- the solver ----


class Velocity(eqx.Module):
    """A field as the vector field of a `diffrax.ODETerm`."""

    field: ModelField | TangentField

    def __call__(self, t: Any, u: Params, args: Any) -> Params:
        """Return $u'$, whatever t and args."""
        del t, args
        return _velocity(self.field, u)


@eqx.filter_jit  # the stages of a step share one trace
def _velocity(field: ModelField | TangentField, u: Params) -> Params:
    return field(u)


class State(eqx.Module):
    """The state between steps: f(u) in coordinates; for a method that re-linearizes, its linear part and cost."""

    f: Expansion
    linear: LinearPart | None = None
    cost: RelinearizationCost | None = None


class TangentExponential(diffrax.AbstractAdaptiveSolver[State]):
    r"""An exponential Runge-Kutta method of order 4 about the tangent model, for gradient flows.

    A diffrax solver: any step-size controller, event, progress meter and `SaveAt(ts=..., dense=True)` work. Give it
    to `gradient_flow`, or call `prepare` and give what it returns to `diffrax.diffeqsolve`.

    Order 4 if nothing is stiff; 2 if the eigenvalue of a stiff mode itself moves, with an error that falls like
    1/alpha^2 (both measured).

    Attributes:
        method: "dense" diagonalizes the Gram of all nk outputs once, (nk)^2 numbers; "lanczos" takes functions of it
            on every vector by Lanczos, nothing larger than `num_lanczos` times nk; "auto" by predicted cost.
        num_lanczos: Krylov dimension; reaches steps of about (num_lanczos / 2)^2 / lambda_max. Its truncation is part
            of the error estimate.
        relinearize: Move the linear part to the present parameters once the steps that it has cost, by the measured
            nonlinearity, are worth a new one. Not under `jax.vmap`, where every lane would pay at every step. Take it
            if the linear part does not last (alpha = 1 over long times, cross-entropies, whose Hessian fades): what
            is stiff in L alone damps the error estimate, and the error can exceed rtol by two orders of magnitude.
        rank: For the dense method: keep only so many of the leading eigenvectors, by subspace iteration and without
            the Gram; what is left out is not stiff, or holds the steps to 3 over its largest eigenvalue. None: all.

    Source:
        Krogstad (2005), J. Comput. Phys. 203; Hochbruck, Ostermann (2010), Acta Numerica 19.
    """

    method: Literal["auto", "dense", "lanczos"] = eqx.field(static=True, default="auto")
    num_lanczos: int = eqx.field(static=True, default=64)
    relinearize: bool = eqx.field(static=True, default=False)
    rank: int | None = eqx.field(static=True, default=None)
    linear: LinearPart | None = None
    field: ModelField | TangentField | None = None
    horizon: RealScalar = float("inf")
    refresh_price: float = eqx.field(static=True, default=0.0)

    term_structure: ClassVar[Any] = diffrax.AbstractTerm
    interpolation_cls: ClassVar[Callable[..., PhiInterpolation]] = PhiInterpolation

    def __check_init__(self) -> None:
        if self.method not in ("auto", "dense", "lanczos"):
            msg = f'method must be "auto", "dense" or "lanczos", got {self.method!r}.'
            raise ValueError(msg)
        if self.rank is not None and (self.rank < 1 or self.method == "lanczos"):
            msg = (
                'rank must be at least 1, or None for all, and is for method "dense" or "auto" only; '
                f'got rank={self.rank} with method="{self.method}".'
            )
            raise ValueError(msg)
        if self.num_lanczos < 2:
            msg = f"num_lanczos must be at least 2, got {self.num_lanczos}."
            raise ValueError(msg)

    def order(self, terms: Any) -> int:
        """Return 4; the embedded method has order 3."""
        del terms
        return 4

    def func(self, terms: Any, t0: Any, y0: Params, args: Any) -> Params:
        """Return f(u)."""
        return terms.vf(t0, y0, args)

    def init(self, terms: Any, t0: Any, t1: Any, y0: Params, args: Any) -> State:
        """Return f(u) at the start, with the linear part and its cost if they are to move."""
        del t1
        if self.linear is None:
            msg = (
                "TangentExponential needs its linear part: give it to lazyjax.gradient_flow(solver=...), or use "
                "`term, solver, u0 = TangentExponential().prepare(h, loss, w0, alpha=...)`."
            )
            raise ValueError(msg)
        linear = self.linear
        f = linear.expand(linear.point.products(), terms.vf(t0, y0, args), linear.origin())
        if not self.relinearize:
            return State(f)
        return State(f, linear, RelinearizationCost.at_start(t0, self.refresh_price, linear.top))

    def restart(self, terms: Any, t0: Any, y0: Params, args: Any, solver_state: State) -> State:
        """Return the state with f(u) taken anew, after a change of the field."""
        linear = solver_state.linear if self.relinearize else self.linear
        assert linear is not None
        f = linear.expand(linear.point.products(), terms.vf(t0, y0, args), linear.origin())
        return State(f, solver_state.linear, solver_state.cost)

    def step(
        self, terms: Any, t0: Any, t1: Any, y0: Params, args: Any, solver_state: State, made_jump: Any
    ) -> tuple[Params, Params, dict[str, Any], State, RESULTS]:
        """Take one step of the scheme above."""
        del made_jump  # f is that of a flow: autonomous and continuous
        linear = solver_state.linear if self.relinearize else self.linear
        assert linear is not None
        b = linear.point.products()
        h = jnp.asarray(terms.contr(t0, t1), linear.origin().dtype)
        middle, f = t0 + 0.5 * (t1 - t0), solver_state.f

        def increment(t: Any, row: list[Piece]) -> tuple[Expansion, Params]:
            """Return D_i = N(U_i) - N(u) = f(U_i) - f(u) - L(U_i - u), and U_i - u, for a row of the tableau."""
            delta, b_delta = linear.combine(b, h, row)
            f_i = terms.vf(t, jtu.tree_map(jnp.add, y0, delta), args)
            return linear.expand(b, jtu.tree_map(jnp.subtract, f_i, f.direct), b_delta), delta

        d2, to_u2 = increment(middle, stage_2(f))
        d3, to_u3 = increment(middle, stage_3(f, d2))
        d4, _ = increment(t1, stage_4(f, d3))
        row = solution(f, d2, d3, d4)
        delta, b_delta = linear.combine(b, h, row)
        y1 = jtu.tree_map(jnp.add, y0, delta)
        f1 = linear.expand(b, terms.vf(t1, y1, args), linear.origin())

        defect = linear.subtract(b, f1, [f, d4], b_delta)  # D_5 - D_4
        error, _ = linear.combine(b, h, [*embedded_error(defect), *stiff_error_term(linear, b, h, d2, d3, d4)])
        error = linear.truncated(b, h, row, error)
        info = {"u": y0, "h": h, "f": f, "d2": d2, "d3": d3, "d4": d4, "linear": linear}
        if not self.relinearize:
            return y1, error, info, State(f1), RESULTS.successful
        assert solver_state.cost is not None
        rho = contraction(linear, b, h, f, d2, d3, jtu.tree_map(jnp.subtract, to_u3, to_u2)).astype(h.dtype)
        cost = solver_state.cost.add_step(rho, h, self.refresh_price)
        steps_left = (self.horizon - (t1 - cost.flow_start)) / (t1 - t0)
        state = self._refresh(State(f1, linear, cost), cost, y1, rho / h, steps_left)
        return y1, error, info, state, RESULTS.successful

    def _refresh(self, state: State, cost: RelinearizationCost, u: Params, rate: Array, steps_left: Array) -> State:
        """Linearize anew at u if that is due.

        If the step is rejected afterwards, the new linear part goes unused: the solver is not told.
        """

        def move() -> State:
            moved = self._build(u, state.linear)
            f = moved.expand(moved.point.products(), state.f.direct, moved.origin())
            return State(f, moved, cost.renewed(rate))

        return jax.lax.cond(cost.is_due(steps_left), move, lambda: state)

    def _build(self, u: Params | None = None, former: LinearPart | None = None) -> LinearPart:
        assert self.field is not None
        point = self.field.linearization_point(u)
        if self.method == "lanczos":
            return krylov_part(point, self.num_lanczos)
        if self.rank is None:
            return spectral_part(point)
        return ritz_part(point, self.rank, former.vectors if isinstance(former, SpectralPart) else None)

    def attach(self, field: ModelField | TangentField, horizon: RealScalar = float("inf")) -> "TangentExponential":
        """Return this solver with the linear part of a field at u = 0, for a flow of this length; call it under jit."""
        size = field.start.size
        flops = field.linearization_point().flops()
        method, rank = self.method, self.rank if self.rank is not None and self.rank < size else None
        if method == "auto":
            method = method_cost(flops, size, self.num_lanczos)[0] if rank is None else "dense"
        setup, step = dense_cost(flops, size, rank, powers=1)  # a new part begins with the former one's vectors
        price = setup / step if method == "dense" else 0.0
        solver = TangentExponential(method, self.num_lanczos, self.relinearize, rank, None, field, horizon, price)
        return eqx.tree_at(lambda s: s.linear, solver, solver._build(), is_leaf=lambda x: x is None)

    def prepare(
        self, h: Model, loss: Loss | Callable[[Outputs], RealScalar], w0: Params, *, alpha: RealScalar = 1.0
    ) -> tuple[diffrax.ODETerm, "TangentExponential", Params]:
        r"""Return what `diffrax.diffeqsolve` needs to follow a gradient flow in displacement coordinates.

        Args:
            h: Model h(w), or a `Tangent`.
            loss: R on outputs.
            w0: Start.
            alpha: Output scale in (0, inf].

        Returns:
            (term, solver, u0): the term $u' = -Dh(w_0 + u/\alpha)^T \nabla R$ (its `vector_field.field` also gives
            `outputs(u)` and `moved(u)`), this solver with its linear part at w0, the start u = 0.

        Raises:
            ValueError, TypeError: as `gradient_flow`.

        Example:
            >>> from lazyjax import square_loss
            >>> term, solver, u0 = TangentExponential().prepare(lambda w: w, square_loss(jnp.ones(1)), jnp.zeros(1))
            >>> u = diffrax.diffeqsolve(term, solver, 0.0, 1.0, 1.0, u0).ys
            >>> print(f"{u[0, 0]:.3f}")
            0.632
        """
        loss = as_loss(loss)
        zero_start = check_start(h, loss, w0, alpha, 1e-6)
        field, solver, u0 = _prepare(self, ScaledObjective.of(h, loss, w0, alpha, zero_start))
        return diffrax.ODETerm(Velocity(field)), solver, u0


@eqx.filter_jit
def _prepare(
    solver: TangentExponential, objective: ScaledObjective
) -> tuple[ModelField | TangentField, TangentExponential, Params]:
    field = objective.field()
    return field, solver.attach(field), jtu.tree_map(jnp.zeros_like, field.coordinates)
