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
the method of order 3 with D_5 = N(u_1) - N(u) for D_4, whose f(u_1) is that of the next step, and by the bend of N
inside the step (`bend`).

Source: Krogstad, J. Comput. Phys. 203 (2005), equation (48); Hochbruck, Ostermann, Acta Numerica 19 (2010).
"""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from diffrax import RESULTS
from jaxtyping import Array

from lazyjax._core.checks import check_alpha
from lazyjax._core.cost import dense_cost, method_cost
from lazyjax._core.trees import tree_norm
from lazyjax._core.types import Model, Outputs, Params, RealScalar
from lazyjax.flow.field import ModelField, TangentField, Velocity, check_start, make_field
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
from lazyjax.losses.losses import Loss
from lazyjax.losses.user_loss import as_loss


def last_line(theta: Any, start: Expansion, second: Expansion, third: Expansion, fourth: Expansion) -> list[Piece]:
    """u(theta h) - u: N replaced by the parabola through its values at 0, h/2 (twice) and h."""
    square, cube = theta**2, theta**3
    middle = {2: 2 * square, 3: -4 * cube}
    return [
        (start, theta, {1: theta}),
        (second, theta, middle),
        (third, theta, middle),
        (fourth, theta, {2: -square, 3: 4 * cube}),
    ]


class PhiInterpolation(diffrax.AbstractLocalInterpolation):
    r"""The solution inside a step: the last line of the scheme with $\theta h$ for h, of order 3 uniformly.

    Exact where N is a parabola in time, whatever the stiffness; a polynomial through the stages would be wrong there.
    """

    t0: Any
    t1: Any
    u: Params
    h: Array
    start: Expansion
    second: Expansion
    third: Expansion
    fourth: Expansion
    linear: LinearPart

    def evaluate(self, t0: Any, t1: Any = None, left: bool = True) -> Params:
        """u at t0, or the change from t0 to t1."""
        del left
        if t1 is not None:
            return jtu.tree_map(jnp.subtract, self.evaluate(t1), self.evaluate(t0))
        span = self.t1 - self.t0
        # diffrax may ask for the end of an empty step.
        theta = jnp.where(span == 0, 0, (t0 - self.t0) / jnp.where(span == 0, 1, span)).astype(self.h.dtype)
        pieces = last_line(theta, self.start, self.second, self.third, self.fourth)
        delta, _ = self.linear.combine(self.linear.anchored.products(), self.h, pieces)
        return jtu.tree_map(jnp.add, self.u, delta)


def stiff_error_term(
    linear: LinearPart, b: Products, h: Array, second: Expansion, third: Expansion, fourth: Expansion
) -> list[Piece]:
    r"""An estimate of what the parabola misses where N bends inside the step, which D_4 and D_5 at its end cannot see.

    Stiff modes that decay inside it: for N = -\delta r in a mode of eigenvalue $\lambda$ the scheme leaves
    $\delta r/(\lambda^2 h)$ of what should vanish, though D_2 = ... = D_5. Kinks: N is a broken line.
    The difference to the method of order 2, which has $h \varphi_2 D_4$ for the last two terms, is
    $2e = h (2\varphi_2 - 4\varphi_3)(D_2 + D_3 - D_4)$, twice that residue. By itself e would ask for the steps of an
    order 2 where N is smooth and nothing is stiff. There its weights $\varphi_2 - 2\varphi_3$ give way to
    $2\varphi_2 - \varphi_1/2 - 3\varphi_3$, which vanish like $h\lambda$ and have the same limit at infinity, as far as
    e is small against what D_4 alone makes, which is O(h). So the estimate keeps its order, and e counts whole where
    N has nothing but bends.
    """
    weights = {2: 1.0, 3: -2.0}
    # Only the images are used: no product is taken for them.
    _, bent = linear.combine(b, h, _difference(second, third, fourth, weights))
    _, whole = linear.combine(b, h, [(fourth, 1.0, weights)])
    # No derivative: the choice of steps has none, and that of a norm at 0 would be NaN.
    size, other = (jnp.linalg.norm(jax.lax.stop_gradient(image)) for image in (bent, whole))
    share = jnp.where(size > 0, size / jnp.where(size > 0, size + other, 1), 0)
    return _difference(second, third, fourth, {1: 0.5 * share - 0.5, 2: 2 - share, 3: share - 3})


def contraction(
    linear: LinearPart,
    b: Products,
    h: Array,
    start: Expansion,
    second: Expansion,
    third: Expansion,
    moved: Params,
) -> Array:
    r"""By how much the stages contract: $|h \varphi_2(hL/2)(D_3 - D_2)| / |U_3 - U_2|$.

    U_3 is U_2 moved by $h \varphi_2(hL/2) D_2$, so that this is what N' makes of it in a step: h |L_1 - L| / 2 at most,
    for the linear part L_1 of the present point. 0 where D_2 is no more than the rounding of f.
    """
    change, _ = linear.combine(b, h, [(third, 0.5, {2: 1.0}), (second, 0.5, {2: -1.0})])
    size, whole, f = (tree_norm(jax.lax.stop_gradient(tree)) for tree in (change, moved, start.direct))
    real = whole > 32 * jnp.finfo(whole.dtype).eps * h * f
    return jnp.where(real, size / jnp.where(real, whole, 1), 0)


def _difference(second: Expansion, third: Expansion, fourth: Expansion, weights: Mapping[int, Any]) -> list[Piece]:
    """The pieces of D_2 + D_3 - D_4."""
    minus = {k: -weight for k, weight in weights.items()}
    return [(second, 1.0, weights), (third, 1.0, weights), (fourth, 1.0, minus)]


MOVED = 0.03
"""Contraction of the stages (`contraction`) from which on a linear part that lags behind is said to cost steps.

It is near 1 at the stability bound, but the order of the method falls to 2 long before. (A flow at alpha = 1 and rtol
1e-6: 0.1 takes four times the steps and makes six times the error, 0.01 the same as this.)
"""


class State(eqx.Module):
    """Between steps: f(u) in coordinates; where the method re-linearizes, also its linear part and its age."""

    start: Expansion
    linear: LinearPart | None = None
    age: "RelinearizationCost | None" = None


class RelinearizationCost(eqx.Module):
    """Of a linear part: the steps that its lag has cost, and those that a new one is worth.

    `begin` is when the flow began, `former` how fast the stages contracted just before it was new, until that is
    compared; infinite from then on.
    """

    begin: Any
    lost: Array
    price: Array
    former: Array

    def after(self, rho: Array, h: Array, least: float) -> "RelinearizationCost":
        """A step of length h on, in which the stages contracted by rho; a new linear part is worth `least` or more."""
        # Where a new one changed little, curvature holds the steps, or stiffness that a low rank leaves out.
        judged = jnp.where(rho > 0.5 * h * self.former, 2 * self.price, least)
        price = jnp.where(jnp.isinf(self.former), self.price, judged)
        return RelinearizationCost(
            self.begin, self.lost + 1 - MOVED / jnp.maximum(rho, MOVED), price, jnp.full_like(rho, jnp.inf)
        )


class TangentExponential(diffrax.AbstractAdaptiveSolver[State]):
    r"""Exponential Runge-Kutta method of order 4 about the tangent model, for gradient flows.

    A diffrax solver: any step-size controller, event, progress meter and `SaveAt(ts=..., dense=True)` work. Give it
    to `gradient_flow`, or call `prepare` and give what it returns to `diffrax.diffeqsolve`.

    Order 4 where nothing is stiff; 2 where the eigenvalue of a stiff mode itself moves, with an error that falls like
    1/alpha^2 (both measured).

    Attributes:
        method: "dense" diagonalizes the Gram of all nk outputs once, (nk)^2 numbers; "lanczos" takes functions of it
            on every vector by Lanczos, nothing larger than `num_lanczos` times nk; "auto" by predicted cost.
        num_lanczos: Krylov dimension; reaches steps of about (num_lanczos / 2)^2 / lambda_max. Its truncation is part
            of the error estimate.
        relinearize: Move the linear part to the present parameters once the steps that it has cost, by the measured
            nonlinearity, are worth a new one. Not under `jax.vmap`, where every lane would pay at every step. Take it
            where the linear part does not last (alpha = 1 over long times, cross-entropies, whose Hessian fades): what
            is stiff in L alone damps the error estimate, and the error can exceed rtol by two orders of magnitude.
        rank: Of the dense method: keep only so many of the leading eigenvectors, by subspace iteration and without
            the Gram; what is left out is not stiff, or holds the steps to 3 over its largest eigenvalue. None: all.

    Source:
        Krogstad, J. Comput. Phys. 203 (2005); Hochbruck, Ostermann, Acta Numerica 19 (2010).
    """

    method: Literal["auto", "dense", "lanczos"] = eqx.field(static=True, default="auto")
    num_lanczos: int = eqx.field(static=True, default=64)
    relinearize: bool = eqx.field(static=True, default=False)
    rank: int | None = eqx.field(static=True, default=None)
    linear: LinearPart | None = None
    field: ModelField | TangentField | None = None
    horizon: RealScalar = float("inf")
    refresh_price: float = eqx.field(static=True, default=0.0)

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

    term_structure: ClassVar[Any] = diffrax.AbstractTerm
    interpolation_cls: ClassVar[Callable[..., PhiInterpolation]] = PhiInterpolation

    def order(self, terms: Any) -> int:
        """4; 3 for the embedded method."""
        del terms
        return 4

    def func(self, terms: Any, t0: Any, y0: Params, args: Any) -> Params:
        """f(u)."""
        return terms.vf(t0, y0, args)

    def init(self, terms: Any, t0: Any, t1: Any, y0: Params, args: Any) -> State:
        """f(u) at the start."""
        del t1
        if self.linear is None:
            msg = (
                "TangentExponential needs its linear part: give it to lazyjax.gradient_flow(solver=...), or use "
                "`term, solver, u0 = TangentExponential().prepare(h, loss, w0, alpha=...)`."
            )
            raise ValueError(msg)
        linear = self.linear
        start = linear.expand(linear.anchored.products(), terms.vf(t0, y0, args), linear.origin())
        return State(start, linear, self._age(t0, linear)) if self.relinearize else State(start)

    def step(
        self, terms: Any, t0: Any, t1: Any, y0: Params, args: Any, solver_state: State, made_jump: Any
    ) -> tuple[Params, Params, dict[str, Any], State, RESULTS]:
        """One step of the scheme above."""
        del made_jump  # f is that of a flow: autonomous and continuous
        linear = solver_state.linear if self.relinearize else self.linear
        assert linear is not None
        b = linear.anchored.products()
        h = jnp.asarray(terms.contr(t0, t1), linear.origin().dtype)
        middle, start = t0 + 0.5 * (t1 - t0), solver_state.start

        def stage(t: Any, pieces: list[Piece]) -> tuple[Expansion, Params]:
            delta, image = linear.combine(b, h, pieces)
            f = terms.vf(t, jtu.tree_map(jnp.add, y0, delta), args)
            return linear.expand(b, jtu.tree_map(jnp.subtract, f, start.direct), image), delta

        second, to_second = stage(middle, [(start, 0.5, {1: 0.5})])
        third, to_third = stage(middle, [(start, 0.5, {1: 0.5}), (second, 0.5, {2: 1.0})])
        fourth, _ = stage(t1, [(start, 1.0, {1: 1.0}), (third, 1.0, {2: 2.0})])
        pieces = last_line(1.0, start, second, third, fourth)
        delta, image = linear.combine(b, h, pieces)
        y1 = jtu.tree_map(jnp.add, y0, delta)
        f1 = terms.vf(t1, y1, args)
        after = linear.expand(b, f1, linear.origin())
        defect = linear.subtract(b, after, [start, fourth], image)
        error, _ = linear.combine(
            b, h, [(defect, 1.0, {2: -1.0, 3: 4.0}), *stiff_error_term(linear, b, h, second, third, fourth)]
        )
        error = linear.truncated(b, h, pieces, error)
        info = {"u": y0, "h": h, "start": start, "second": second, "third": third, "fourth": fourth, "linear": linear}
        state = State(after)
        if self.relinearize:
            assert solver_state.age is not None
            moved = jtu.tree_map(jnp.subtract, to_third, to_second)
            rho = contraction(linear, b, h, start, second, third, moved).astype(h.dtype)
            age = solver_state.age.after(rho, h, self.refresh_price)
            left = (self.horizon - (t1 - age.begin)) / (t1 - t0)
            state = self._refresh(State(after, linear, age), y1, rho / h, left)
        return y1, error, info, state, RESULTS.successful

    def _age(self, begin: Any, linear: LinearPart) -> RelinearizationCost:
        number = jnp.ones_like(linear.top)
        return RelinearizationCost(begin, 0 * number, self.refresh_price * number, jnp.inf * number)

    def _refresh(self, state: State, u: Params, rate: Array, left: Array) -> State:
        """Linearize anew at u, once the steps lost are worth it, if those left at this pace are.

        Like renting skis until the rent has paid for a pair: about twice the cost of knowing the flow ahead at most.
        (A step that is rejected afterwards has paid in vain: the solver is not told.)
        """
        age = state.age
        assert age is not None

        def move() -> State:
            moved = self._build(u, state.linear)
            start = moved.expand(moved.anchored.products(), state.start.direct, moved.origin())
            return State(start, moved, RelinearizationCost(age.begin, jnp.zeros_like(rate), age.price, rate))

        return jax.lax.cond((age.lost > age.price) & (left > age.price), move, lambda: state)

    def _build(self, u: Params | None = None, former: LinearPart | None = None) -> LinearPart:
        assert self.field is not None
        anchored = self.field.anchored(u)
        if self.method == "lanczos":
            return krylov_part(anchored, self.num_lanczos)
        if self.rank is None:
            return spectral_part(anchored)
        return ritz_part(anchored, self.rank, former.vectors if isinstance(former, SpectralPart) else None)

    def attach(self, field: ModelField | TangentField, horizon: RealScalar = float("inf")) -> "TangentExponential":
        """This solver with the linear part of a field at u = 0, for a flow of this length; call it inside the jit."""
        size = field.start.size
        flops = field.anchored().flops()
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
        r"""What `diffrax.diffeqsolve` needs to follow a gradient flow in displacement coordinates.

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
        check_alpha(alpha)
        zero_start = check_start(h, loss, w0, alpha, 1e-6)
        field, solver = _prepare(self, h, loss, w0, jnp.asarray(alpha, float), zero_start)
        return diffrax.ODETerm(Velocity(field)), solver, jtu.tree_map(jnp.zeros_like, field.coordinates)


@eqx.filter_jit
def _prepare(
    solver: TangentExponential, h: Model, loss: Loss, w0: Params, alpha: Array, zero_start: bool
) -> tuple[ModelField | TangentField, TangentExponential]:
    field = make_field(h, loss, w0, alpha, zero_start=zero_start)
    return field, solver.attach(field)
