r"""The theorems: one function each, from what was measured along a flow and its loss to the theorem's claims.

A new theorem is its bound (`lazyjax.bounds`, numbers in, numbers out), one function here, and one line in `THEOREMS`.

Constants up to each time are the running maxima of what was met on the way there: the proofs look back only. All
functions are traced; `jax.vmap` goes through.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lazyjax.laziness.kappa import KINKED
from lazyjax.losses.loss import Loss
from lazyjax.losses.square import SquareLoss
from lazyjax.theory import bounds
from lazyjax.theory.claims import Assumption, Claim, Status, decide
from lazyjax.theory.measurements import Measurements

# ---- The theorems of the paper, in its order. ----


def theorem_2_2(measurements: Measurements, loss: Loss) -> list[Claim]:
    """Claim theorem 2.2: finite horizon, any smooth loss."""
    bound = bounds.theorem_2_2(
        alpha=measurements.alpha,
        horizon=measurements.time,
        start_loss=measurements.start_loss,
        lip_h=measurements.lip_h,
        lip_dh=measurements.lip_dh,
        dh_norm=measurements.dh_norm,
        smoothness=_smoothness(loss),
    )
    assumptions = (_dh_is_lipschitz(measurements), _loss_is_smooth(measurements, loss))
    return _claims("2.2", ("displacement_norm", "output_gap", "param_gap"), assumptions, bound, measurements, loss)


def theorem_2_3(measurements: Measurements, loss: Loss) -> list[Claim]:
    """Claim theorem 2.3: finite horizon, square loss."""
    bound = bounds.theorem_2_3(
        alpha=measurements.alpha,
        horizon=measurements.time,
        residual_norm=measurements.start_residual,
        lip_h=measurements.lip_h,
        lip_dh=measurements.lip_dh,
    )
    assumptions = (_dh_is_lipschitz(measurements), _loss_is_square(measurements, loss))
    return _claims("2.3", ("displacement_norm", "output_gap", "param_gap"), assumptions, bound, measurements, loss)


def theorem_2_4(measurements: Measurements, loss: Loss) -> list[Claim]:
    """Claim theorem 2.4: all times, Dh(w0) onto."""
    bound = bounds.theorem_2_4(
        t=measurements.time,
        alpha=measurements.alpha,
        residual_norm=measurements.start_residual,
        sigma_min=measurements.sigma_min,
        dh_norm=measurements.dh_norm,
        lip_dh=measurements.lip_dh[-1],
        smoothness=_smoothness(loss),
        strong_convexity=_strong_convexity(loss),
    )
    near = Assumption(
        "D < 2 alpha C0",
        decide(bound.c0[0], bound.admissible[0]),
        (measurements.start_residual, 2 * measurements.alpha * bound.c0[0], bound.alpha_threshold[0]),
        "{:.3g} against {:.3g}: alpha must exceed {:.3g}",
    )
    assumptions = (
        _dh_is_lipschitz(measurements),
        _loss_is_smooth(measurements, loss),
        _loss_is_strongly_convex(measurements, loss),
        _dh_is_onto(measurements),
        near,
    )
    quantities = ("residual_norm", "displacement_norm", "output_gap", "param_gap")
    return _claims("2.4", quantities, assumptions, bound, measurements, loss)


def theorem_2_5(measurements: Measurements, loss: Loss) -> list[Claim]:
    """Claim theorem 2.5: all times, the rank of Dh locally constant."""
    bound = bounds.theorem_2_5(
        t=measurements.time,
        alpha=measurements.alpha,
        start_loss=measurements.start_loss,
        start_gradient=measurements.start_gradient,
        sigma_min=measurements.sigma_rank,
        dh_norm=measurements.dh_norm,
        lip_dh=jnp.maximum(measurements.lip_dh[-1], jnp.max(measurements.curvature)),
        smoothness=_smoothness(loss),
        strong_convexity=_strong_convexity(loss),
    )
    assumptions = (
        _dh_is_lipschitz(measurements),
        _loss_is_smooth(measurements, loss),
        _loss_is_strongly_convex(measurements, loss),
        _rank_is_constant(measurements),
        _exceeds_threshold("alpha > alpha0", measurements, bound),
    )
    quantities = ("displacement_norm", "output_gap", "param_gap")
    # What is left to fall until the last time is no more than what is left to fall in all.
    fallen = jnp.maximum(measurements.loss - measurements.loss[-1], 0)
    return [
        *_claims("2.5", quantities, assumptions, bound, measurements, loss),
        _claim("2.5", "excess loss", assumptions, bound.excess_loss, fallen, "loss", measurements, loss),
    ]


# ---- The lemmas of its proofs, with what they take measured along the flow. ----


def lip_sigma(measurements: Measurements, loss: Loss) -> list[Claim]:
    """Claim the Lipschitz constant of the tangent kernel, of supplement B.2."""
    bound = bounds.lip_sigma(lip_h=measurements.lip_h, lip_dh=measurements.lip_dh)
    moved = measurements.displacement_norm * measurements.gradient
    assumptions = (_dh_is_lipschitz(measurements),)
    quantity, measured = "change of Sigma grad R", measurements.perturbation
    return [_claim("Lip(Sigma)", quantity, assumptions, bound * moved, measured, "perturbation", measurements, loss)]


def lemma_b_1(measurements: Measurements, loss: Loss) -> list[Claim]:
    """Claim lemma B.1: convergence at the rate of the smallest eigenvalue met."""
    lowest, stays = _lowest_eigenvalue(measurements)
    bound = bounds.lemma_b_1(
        t=measurements.time,
        residual_norm=measurements.start_residual,
        lambda_min=lowest,
        smoothness=_smoothness(loss),
        strong_convexity=_strong_convexity(loss),
    )
    assumptions = (_loss_is_smooth(measurements, loss), _loss_is_strongly_convex(measurements, loss), stays)
    measured = measurements.residual_norm
    return [_claim("B.1", "residual_norm", assumptions, bound, measured, "output", measurements, loss)]


def lemma_b_2(measurements: Measurements, loss: Loss) -> list[Claim]:
    """Claim lemma B.2: flows of close metrics stay close."""
    bound = bounds.lemma_b_2(
        perturbation=jax.lax.cummax(measurements.perturbation, axis=0),
        sigma_norm=measurements.dh_norm**2,
        lambda_min=measurements.sigma_min**2,
        strong_convexity=_strong_convexity(loss),
    )
    assumptions = (
        _loss_is_smooth(measurements, loss),
        _loss_is_strongly_convex(measurements, loss),
        _dh_is_onto(measurements),
    )
    return [_claim("B.2", "output_gap", assumptions, bound, measurements.output_gap, "output", measurements, loss)]


def proposition_a_1(measurements: Measurements, loss: Loss) -> list[Claim]:
    """Claim proposition A.1: outputs on other inputs, one by one; nothing if there are none."""
    if measurements.test_gap is None:
        return []
    assert measurements.test_dh_norm is not None
    assert measurements.test_curvature is not None
    bound = bounds.proposition_a_1(
        alpha=measurements.alpha,
        displacement_norm=measurements.displacement_norm,
        param_gap=measurements.param_gap,
        dh_norm=measurements.test_dh_norm,
        lip_dh=measurements.test_curvature,
    )
    assumptions, measured = (_dh_is_lipschitz(measurements),), measurements.test_gap
    return [_claim("A.1", "test output gap", assumptions, bound, measured, "test", measurements, loss)]


# ---- The lecture notes, in their Euclidean metric and their time. ----


def lecture_theorem_2(measurements: Measurements, loss: Loss) -> list[Claim]:
    """Claim theorem 2 of the lecture notes: all times, square loss, Dh(w0) onto."""
    root = loss.weight**0.5
    bound = bounds.lecture_theorem_2(
        t=loss.weight * measurements.time / measurements.alpha**2,
        alpha=measurements.alpha,
        start_loss=measurements.start_loss / loss.weight,
        sigma_min=measurements.sigma_min / root,
        sigma_max=measurements.dh_norm / root,
        lip_dh=measurements.lip_dh[-1] / root,
    )
    onto = (_loss_is_square(measurements, loss), _dh_is_onto(measurements))
    reached = _exceeds_threshold("alpha >= threshold", measurements, bound)
    all_of_them = (_dh_is_lipschitz(measurements), *onto, reached)
    tangent_moved = measurements.tangent_displacement_norm
    larger_loss = jnp.maximum(measurements.loss, measurements.tangent_loss)
    moved = jnp.maximum(measurements.displacement_norm, tangent_moved)
    tangent_loss = loss.weight * bound.tangent_loss
    lines = (
        ("loss", all_of_them, loss.weight * bound.loss, larger_loss, "loss"),
        ("displacement_norm", all_of_them, bound.displacement_norm, moved, "params"),
        ("tangent loss", onto, tangent_loss, measurements.tangent_loss, "loss"),
        ("tangent displacement", onto, bound.tangent_displacement_norm, tangent_moved, "params"),
    )
    return [_claim("LN 2", *line, measurements, loss) for line in lines]


def lecture_lemma_4(measurements: Measurements, loss: Loss) -> list[Claim]:
    """Claim lemma 4 of the lecture notes: the loss decays at the rate of the smallest eigenvalue met."""
    lowest, stays = _lowest_eigenvalue(measurements)
    bound = bounds.lecture_lemma_4(t=measurements.time, start_loss=measurements.start_loss, lambda_min=lowest)
    assumptions = (_loss_is_square(measurements, loss), stays)
    return [_claim("LN 4", "loss", assumptions, bound, measurements.loss, "loss", measurements, loss)]


def lecture_lemma_5(measurements: Measurements, loss: Loss) -> list[Claim]:
    """Claim lemma 5 of the lecture notes: how far a flow goes whose kernel stays well conditioned."""
    lowest, stays = _lowest_eigenvalue(measurements)
    largest = jnp.maximum(measurements.lip_h, measurements.dh_norm) ** 2
    length = bounds.lecture_lemma_5(
        start_loss=measurements.start_loss / loss.weight,
        lambda_min=lowest / loss.weight,
        lambda_max=largest / loss.weight,
    )
    # v' = -J^T grad L at the scale alpha: its displacement is alpha times ours.
    bound, measured = length / measurements.alpha, measurements.displacement_norm
    assumptions = (_loss_is_square(measurements, loss), stays)
    return [_claim("LN 5", "displacement_norm", assumptions, bound, measured, "params", measurements, loss)]


def lecture_lemma_6(measurements: Measurements, loss: Loss) -> list[Claim]:
    """Claim lemma 6 of the lecture notes: near w0 the Jacobian stays well conditioned."""
    root = loss.weight**0.5
    ball = bounds.lecture_lemma_6(
        sigma_min=measurements.sigma_min / root,
        sigma_max=measurements.dh_norm / root,
        lip_dh=measurements.lip_dh[-1] / root,
    )
    farthest = jnp.max(measurements.displacement_norm)
    near = Assumption(
        "|w - w0| <= B", decide(ball.radius, farthest <= ball.radius), (farthest, ball.radius), "{:.3g} against {:.3g}"
    )
    assumptions = (_dh_is_lipschitz(measurements), _dh_is_onto(measurements), near)
    smallest = measurements.path_sigma_min
    inverse = 1 / jnp.where(smallest > 0, smallest, 1)
    lines = (
        ("sigma_max", root * ball.sigma_max, measurements.path_dh_norm),
        ("1 / sigma_min", 1 / (root * ball.sigma_min), inverse),
    )
    return [
        _claim("LN 6", quantity, assumptions, bound, measured, "rounding", measurements, loss)
        for quantity, bound, measured in lines
    ]


THEOREMS: tuple[Callable[[Measurements, Loss], list[Claim]], ...] = (
    theorem_2_2,
    theorem_2_3,
    theorem_2_4,
    theorem_2_5,
    lip_sigma,
    lemma_b_1,
    lemma_b_2,
    proposition_a_1,
    lecture_theorem_2,
    lecture_lemma_4,
    lecture_lemma_5,
    lecture_lemma_6,
)
"""The theorems that a certificate holds, in its order."""


def make_claims(measurements: Measurements, loss: Loss) -> list[Claim]:
    """Return the claims of all theorems for one flow."""
    return [claim for theorem in THEOREMS for claim in theorem(measurements, loss)]


# ---- What several theorems assume. ----


def _dh_is_lipschitz(measurements: Measurements) -> Assumption:
    share = measurements.kink_share
    detail = "{:.0f}% of its change over random steps is no part of D2h, as at kinks"
    return Assumption("Dh Lipschitz", decide(share, share <= KINKED), (100 * share,), detail)


def _dh_is_onto(measurements: Measurements) -> Assumption:
    sigma = measurements.sigma_min
    detail = f"sigma_min = {{:.3g}}, {measurements.num_params} parameters, {measurements.num_outputs} outputs"
    return Assumption("Dh(w0) onto", decide(sigma, sigma > 0), (sigma,), detail)


def _rank_is_constant(measurements: Measurements) -> Assumption:
    rank, path_rank = measurements.rank, measurements.path_rank
    full = (rank == measurements.num_outputs) | (rank == measurements.num_params)
    unchanged = jnp.where(jnp.all(path_rank == rank), Status.UNKNOWN, Status.FAILS)
    state = jnp.where(rank < 0, Status.UNKNOWN, jnp.where(full, Status.HOLDS, unchanged))
    last = path_rank[jnp.argmax(path_rank != rank)]
    detail = (
        f"rank {{:.0f}} at w0, {{:.0f}} on the way, of {measurements.num_outputs} outputs and "
        f"{measurements.num_params} parameters; only full rank is sure to stay"
    )
    return Assumption("rank of Dh constant near w0", state, (rank, last), detail)


def _lowest_eigenvalue(measurements: Measurements) -> tuple[Float[Array, " time"], Assumption]:
    """Return the smallest eigenvalue of Sigma met up to each time, and the assumption that all of them are positive."""
    lowest = jax.lax.cummin(measurements.path_sigma_min, axis=0) ** 2
    end = lowest[-1]
    return lowest, Assumption("Sigma >= lambda > 0", decide(end, end > 0), (end,), "lambda = {:.3g}")


def _exceeds_threshold(name: str, measurements: Measurements, bound: Any) -> Assumption:
    threshold = bound.alpha_threshold[0]
    status = decide(threshold, bound.admissible[0])
    return Assumption(name, status, (measurements.alpha, threshold), "{:.3g} against {:.3g}")


def _loss_is_square(measurements: Measurements, loss: Loss) -> Assumption:
    return _of_loss("square loss", Status.HOLDS if isinstance(loss, SquareLoss) else Status.FAILS, measurements, "")


def _loss_is_smooth(measurements: Measurements, loss: Loss) -> Assumption:
    declared = loss.smoothness
    if declared is None:
        return _of_loss("R smooth", Status.UNKNOWN, measurements, "the loss does not say")
    status = Status.HOLDS if math.isfinite(declared) else Status.FAILS
    return _of_loss("R smooth", status, measurements, f"M = {declared:.3g}")


def _loss_is_strongly_convex(measurements: Measurements, loss: Loss) -> Assumption:
    declared = loss.strong_convexity()
    if declared is None:
        return _of_loss("R strongly convex", Status.UNKNOWN, measurements, "the loss does not say")
    if declared > 0:
        return _of_loss("R strongly convex", Status.HOLDS, measurements, f"m = {declared:.3g}")
    return _of_loss("R strongly convex", Status.FAILS, measurements, "m = 0; its infimum may lie at infinity")


def _of_loss(name: str, status: Status, measurements: Measurements, detail: str) -> Assumption:
    """Return an assumption that is the same for every flow of a loss."""
    return Assumption(name, jnp.full(measurements.alpha.shape, status), (), detail)


def _smoothness(loss: Loss) -> float:
    """Return M, at least m; a placeholder if it is not known or there is none, since no bound then applies."""
    declared = loss.smoothness
    return max(declared if declared is not None and math.isfinite(declared) else 1.0, _strong_convexity(loss))


def _strong_convexity(loss: Loss) -> float:
    """Return m; a placeholder if it is not known or there is none, since no bound then applies."""
    return loss.strong_convexity() or 1.0


# ---- Claims. ----

UNITS = {"residual_norm": "output", "output_gap": "output", "displacement_norm": "params", "param_gap": "params"}
"""The units of the quantities for which bounds and measurements have the same names."""


def _claims(
    theorem: str,
    quantities: Sequence[str],
    assumptions: tuple[Assumption, ...],
    bound: Any,
    measurements: Measurements,
    loss: Loss,
) -> list[Claim]:
    """Return a claim for each field of a bound that has the name of what it bounds."""
    return [
        _claim(theorem, name, assumptions, getattr(bound, name), getattr(measurements, name), unit, measurements, loss)
        for name, unit in [(name, UNITS[name]) for name in quantities]
    ]


def _claim(
    theorem: str,
    quantity: str,
    assumptions: tuple[Assumption, ...],
    bound: Array,
    measured: Array,
    unit: str,
    measurements: Measurements,
    loss: Loss,
) -> Claim:
    """Return a claim with the resolution that the unit of what is measured has."""
    bound = jnp.broadcast_to(bound, measured.shape)
    resolution = jnp.broadcast_to(_resolution(unit, measured, measurements, loss), measured.shape)
    return Claim(theorem, quantity, assumptions, bound, measured, resolution)


def _resolution(unit: str, measured: Array, measurements: Measurements, loss: Loss) -> Array:
    """Return the numerical error to expect of a quantity, from that of the flows and rounding."""
    rounding, smoothness = 1e2 * jnp.finfo(measured.dtype).eps, _smoothness(loss)
    params = measurements.resolution
    output = measurements.path_dh_norm[0] * params + rounding * measurements.gradient[0] / smoothness
    if unit == "params":
        return params / measurements.alpha
    if unit == "output":
        return output
    if unit == "test":
        assert measurements.test_dh_norm is not None
        return measurements.test_dh_norm * params
    if unit == "loss":
        slope = jnp.sqrt(2 * smoothness * measured) + smoothness * output
        return output * slope + rounding * measurements.start_loss
    if unit == "perturbation":
        return 2 * measurements.dh_norm**2 * output / measurements.alpha + rounding * measured
    assert unit == "rounding"
    return rounding * measured
