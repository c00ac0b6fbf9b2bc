r"""The theorems as functions from what was measured to their claims, in the order of the paper.

Constants up to each time are the running maxima of what was met on the way there: the proofs look back only.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from lazyjax.losses.loss import Loss
from lazyjax.theory import bounds
from lazyjax.theory.claims import Assumption, Claim, Evidence, decided
from lazyjax.theory.measurements import Measurements


def theorem_2_2(g: Evidence) -> list[Claim]:
    """Finite horizon, any smooth loss."""
    f = g.facts
    bound = bounds.theorem_2_2(
        alpha=f.alpha, horizon=f.time, start_loss=f.start_loss, lip_h=g.lip_h, lip_dh=g.lip_dh, dh_norm=f.dh_norm,
        smoothness=g.smoothness,
    )  # fmt: skip
    return _claims(g, "2.2", (g.smooth, g.smooth_loss), bound, ("displacement_norm", "output_gap", "param_gap"))


def theorem_2_3(g: Evidence) -> list[Claim]:
    """Finite horizon, square loss."""
    f = g.facts
    bound = bounds.theorem_2_3(
        alpha=f.alpha, horizon=f.time, residual_norm=f.start_residual, lip_h=g.lip_h, lip_dh=g.lip_dh
    )
    return _claims(g, "2.3", (g.smooth, g.square_loss), bound, ("displacement_norm", "output_gap", "param_gap"))


def theorem_2_4(g: Evidence) -> list[Claim]:
    """All times, Dh(w0) onto."""
    f, lip_dh = g.facts, g.lip_dh[-1]
    bound = bounds.theorem_2_4(
        t=f.time, alpha=f.alpha, residual_norm=f.start_residual, sigma_min=f.sigma_min, dh_norm=f.dh_norm,
        lip_dh=lip_dh, smoothness=g.smoothness, strong_convexity=g.convexity,
    )  # fmt: skip
    near = Assumption(
        "D < 2 alpha C0",
        decided(bound.c0[0], bound.admissible[0]),
        (f.start_residual, 2 * f.alpha * bound.c0[0], bound.alpha_threshold[0]),
        "{:.3g} against {:.3g}: alpha must exceed {:.3g}",
    )
    assumptions = (g.smooth, g.smooth_loss, g.convex, g.onto, near)
    names = ("residual_norm", "displacement_norm", "output_gap", "param_gap")
    return _claims(g, "2.4", assumptions, bound, names)


def theorem_2_5(g: Evidence) -> list[Claim]:
    """All times, the rank of Dh locally constant."""
    f = g.facts
    lip_dh = jnp.maximum(g.lip_dh[-1], jnp.max(f.curvature))
    bound = bounds.theorem_2_5(
        t=f.time, alpha=f.alpha, start_loss=f.start_loss, start_gradient=f.start_gradient, sigma_min=f.sigma_rank,
        dh_norm=f.dh_norm, lip_dh=lip_dh, smoothness=g.smoothness, strong_convexity=g.convexity,
    )  # fmt: skip
    near = Assumption(
        "alpha > alpha0",
        decided(bound.alpha_threshold[0], bound.admissible[0]),
        (f.alpha, bound.alpha_threshold[0]),
        "{:.3g} against {:.3g}",
    )
    assumptions = (g.smooth, g.smooth_loss, g.convex, _constant_rank(g), near)
    claims = _claims(g, "2.5", assumptions, bound, ("displacement_norm", "output_gap", "param_gap"))
    # What is left to fall until the last time is no more than what is left to fall in all.
    fallen = jnp.maximum(f.loss - f.loss[-1], 0)
    return [*claims, g.claim("2.5", "excess loss", assumptions, bound.excess_loss, fallen, "loss")]


def _constant_rank(g: Evidence) -> Assumption:
    f = g.facts
    full = (f.rank == g.num_outputs) | (f.rank == g.num_params)
    state = jnp.where(full, 2, jnp.where(jnp.all(f.path_rank == f.rank), 1, 0))
    state = jnp.where(f.rank < 0, 1, state)
    last = f.path_rank[jnp.argmax(f.path_rank != f.rank)]
    return Assumption(
        "rank of Dh constant near w0", state, (f.rank, last),
        f"rank {{:.0f}} at w0, {{:.0f}} on the way, of {g.num_outputs} outputs and {g.num_params} parameters; only "
        "full rank is sure to stay",
    )  # fmt: skip


def lemmas_b(g: Evidence) -> list[Claim]:
    """Of the proofs: Lip(Sigma), lemma B.1 and lemma B.2, with what they take measured along the flow."""
    f = g.facts
    moved = f.displacement_norm * f.gradient
    kernel = g.claim(
        "Lip(Sigma)", "change of Sigma grad R", (g.smooth,), bounds.lip_sigma(lip_h=g.lip_h, lip_dh=g.lip_dh) * moved,
        f.perturbation, "perturbation",
    )  # fmt: skip
    lowest = jax.lax.cummin(f.path_sigma_min, axis=0) ** 2
    stays = Assumption("Sigma >= lambda > 0", decided(lowest[-1], lowest[-1] > 0), (lowest[-1],), "lambda = {:.3g}")
    residual = bounds.lemma_b_1(
        t=f.time,
        residual_norm=f.start_residual,
        lambda_min=lowest,
        smoothness=g.smoothness,
        strong_convexity=g.convexity,
    )
    gap = bounds.lemma_b_2(
        perturbation=jax.lax.cummax(f.perturbation, axis=0), sigma_norm=f.dh_norm**2, lambda_min=f.sigma_min**2,
        strong_convexity=g.convexity,
    )  # fmt: skip
    convex = (g.smooth_loss, g.convex)
    return [
        kernel,
        g.claim("B.1", "residual_norm", (*convex, stays), residual, f.residual_norm, "output"),
        g.claim("B.2", "output_gap", (*convex, g.onto), gap, f.output_gap, "output"),
    ]


def lecture_notes(g: Evidence) -> list[Claim]:
    """Theorem 2 and lemmas 4 to 6 of the lecture notes, in their Euclidean metric and time."""
    f, root = g.facts, g.weight**0.5
    lip_dh, start_loss = g.lip_dh[-1] / root, f.start_loss / g.weight
    bound = bounds.lecture_theorem_2(
        t=g.weight * f.time / f.alpha**2, alpha=f.alpha, start_loss=start_loss, sigma_min=f.sigma_min / root,
        sigma_max=f.dh_norm / root, lip_dh=lip_dh,
    )  # fmt: skip
    onto = (g.square_loss, g.onto)
    reached = Assumption(
        "alpha >= threshold",
        decided(bound.alpha_threshold[0], bound.admissible[0]),
        (f.alpha, bound.alpha_threshold[0]),
        "{:.3g} against {:.3g}",
    )
    both = (jnp.maximum(f.loss, f.tangent_loss), jnp.maximum(f.displacement_norm, f.tangent_displacement_norm))
    theorem = [
        g.claim("LN 2", "loss", (g.smooth, *onto, reached), g.weight * bound.loss, both[0], "loss"),
        g.claim("LN 2", "displacement_norm", (g.smooth, *onto, reached), bound.displacement_norm, both[1], "params"),
        g.claim("LN 2", "tangent loss", onto, g.weight * bound.tangent_loss, f.tangent_loss, "loss"),
        g.claim(
            "LN 2", "tangent displacement", onto, bound.tangent_displacement_norm, f.tangent_displacement_norm, "params"
        ),
    ]
    return theorem + _lecture_lemmas(g, start_loss, lip_dh)


def _lecture_lemmas(g: Evidence, start_loss: Array, lip_dh: Array) -> list[Claim]:
    f, root = g.facts, g.weight**0.5
    lowest = jax.lax.cummin(f.path_sigma_min, axis=0) ** 2
    largest = jnp.maximum(g.lip_h, f.dh_norm) ** 2
    stays = Assumption("Sigma >= lambda > 0", decided(lowest[-1], lowest[-1] > 0), (lowest[-1],), "lambda = {:.3g}")
    length = bounds.lecture_lemma_5(start_loss=start_loss, lambda_min=lowest / g.weight, lambda_max=largest / g.weight)
    ball = bounds.lecture_lemma_6(sigma_min=f.sigma_min / root, sigma_max=f.dh_norm / root, lip_dh=lip_dh)
    farthest = jnp.max(f.displacement_norm)
    near = Assumption(
        "|w - w0| <= B", decided(ball.radius, farthest <= ball.radius), (farthest, ball.radius), "{:.3g} against {:.3g}"
    )
    decay = bounds.lecture_lemma_4(t=f.time, start_loss=f.start_loss, lambda_min=lowest)
    inverse = 1 / jnp.where(f.path_sigma_min > 0, f.path_sigma_min, 1)
    inside = (g.smooth, g.onto, near)
    return [
        g.claim("LN 4", "loss", (g.square_loss, stays), decay, f.loss, "loss"),
        # v' = -J^T grad L at the scale alpha: its displacement is alpha times ours.
        g.claim("LN 5", "displacement_norm", (g.square_loss, stays), length / f.alpha, f.displacement_norm, "params"),
        g.claim("LN 6", "sigma_max", inside, root * ball.sigma_max, f.path_dh_norm, "rounding"),
        g.claim("LN 6", "1 / sigma_min", inside, 1 / (root * ball.sigma_min), inverse, "rounding"),
    ]


def proposition_a_1(g: Evidence) -> list[Claim]:
    """Outputs on other inputs, one by one."""
    f = g.facts
    if f.test_gap is None:
        return []
    assert f.test_dh_norm is not None
    assert f.test_curvature is not None
    bound = bounds.proposition_a_1(
        alpha=f.alpha, displacement_norm=f.displacement_norm, param_gap=f.param_gap, dh_norm=f.test_dh_norm,
        lip_dh=f.test_curvature,
    )  # fmt: skip
    return [g.claim("A.1", "test output gap", (g.smooth,), bound, f.test_gap, "test")]


def _claims(
    g: Evidence, theorem: str, assumptions: tuple[Assumption, ...], bound: Any, names: tuple[str, ...]
) -> list[Claim]:
    """Those of the fields of a bound that are named as what they bound."""
    units = {"residual_norm": "output", "output_gap": "output", "displacement_norm": "params", "param_gap": "params"}
    return [
        g.claim(theorem, name, assumptions, getattr(bound, name), getattr(g.facts, name), units[name]) for name in names
    ]


THEOREMS = (theorem_2_2, theorem_2_3, theorem_2_4, theorem_2_5, lemmas_b, proposition_a_1, lecture_notes)


def make_claims(facts: Measurements, loss: Loss, num_params: int, num_outputs: int, kink_share: Array) -> list[Claim]:
    """All of them."""
    ground = Evidence(facts, loss, num_params, num_outputs, kink_share)
    return [claim for theorem in THEOREMS for claim in theorem(ground)]
