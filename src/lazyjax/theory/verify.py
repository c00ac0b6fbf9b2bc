r"""The whole theory on random instances: how often a bound is violated (never), how sharp the sharpest case is."""

from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

from lazyjax.theory.errata import Counterexample, generalization, poster_horizons, slow_descent, smith_inequality
from lazyjax.theory.random_problems import FAMILIES, Family
from lazyjax.theory.trials import ALPHAS, RATES, Trials, fit_rates, run_family

EXPECTED = {"output_gap": -1.0, "param_gap": -2.0, "displacement_norm": -1.0}


class Rates(eqx.Module):
    """Fitted exponents of alpha of one family.

    Attributes:
        family: Its name.
        fitted: Smallest and largest over the instances, by quantity.
        expected: What they tend to.
    """

    family: str = eqx.field(static=True)
    fitted: dict[str, tuple[float, float]]
    expected: dict[str, float]


class Score(eqx.Module):
    """What became of one bound over all instances.

    Attributes:
        theorem, quantity: Its name.
        instances: Flows to which the theorem applies.
        violations: Of these, how many contradict it.
        tightest: The least bound over measured.
        median: Of the least of each flow.
    """

    theorem: str = eqx.field(static=True)
    quantity: str = eqx.field(static=True)
    instances: int
    violations: int
    tightest: float
    median: float


class Verification(eqx.Module):
    """The theory tried; made by `verify`. Print it.

    Attributes:
        scores: One a bound.
        rates: One a family for which theorem 2.2 has rates.
        counterexamples: Printed statements that are false, beside the corrected ones.
        flows: How many pairs of flows were followed.
        stopped: How many more were not, up to the last time.
    """

    scores: tuple[Score, ...]
    rates: tuple[Rates, ...]
    counterexamples: tuple[Counterexample, ...]
    flows: int
    stopped: int

    @property
    def violations(self) -> int:
        """Of corrected statements, in all."""
        return sum(score.violations for score in self.scores) + sum(not c.holds for c in self.counterexamples)

    def __str__(self) -> str:
        """Three tables."""
        head = f"{self.flows} random flows beside their tangents', alpha from {ALPHAS[0]:g} to {ALPHAS[-1]:g}: "
        head += f"{self.violations} violation(s)" + (f"; {self.stopped} more stopped early" if self.stopped else "")
        scores = [("theorem", "quantity", "applies to", "violations", "tightest", "median")]
        scores += [
            (s.theorem, s.quantity, str(s.instances), str(s.violations), f"{s.tightest:.3g}", f"{s.median:.3g}")
            for s in self.scores
        ]
        rates = [("exponents of alpha", *RATES)]
        rates += [
            (r.family, *(f"{r.fitted[n][0]:.3f} to {r.fitted[n][1]:.3f} ({r.expected[n]:g})" for n in RATES))
            for r in self.rates
        ]
        errors = [("as printed", "source", "fails in", "corrected", "holds")]
        errors += [
            (
                c.statement,
                c.source,
                f"{100 * c.refuted:.0f} % of {c.true.size}",
                c.correction,
                "yes" if c.holds else "NO",
            )
            for c in self.counterexamples
        ]
        return "\n\n".join([head, *(_format(table) for table in (scores, rates, errors))])


def _format(rows: Sequence[tuple[str, ...]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def verify(
    *,
    instances: int = 15,
    families: Sequence[Family] = FAMILIES,
    seed: int = 0,
    report: Callable[[str], Any] | None = None,
) -> Verification:
    r"""Try every theorem on random nets, losses, data and scales, in float64.

    Each family of problems (`FAMILIES`: shallow and deep nets, a diagonal one, a random quadratic model; square,
    logistic, cross-entropy and another strongly convex loss; with more parameters than outputs and with fewer) is drawn
    `instances` times and followed, beside its tangent model, at seven scales over a hundred times $1/\|Dh\|^2$.
    The bounds take the constants met along the flow.

    Args:
        instances: Of each family; 15 of ten families at seven scales are 1050 pairs of flows.
        families: Which; the first is also the case of proposition A.1.
        seed: Of everything random.
        report: Called with a line of text before each family, to show progress.

    Returns:
        `Verification`.

    Raises:
        ValueError: float64 is off; `instances` below 1; no family.

    Source:
        See `lazyjax.bounds`.
    """
    if jnp.result_type(float) != jnp.float64:
        msg = 'verify needs float64, got float32; call jax.config.update("jax_enable_x64", True) first.'
        raise ValueError(msg)
    if instances < 1 or not families:
        msg = f"instances and the number of families must be at least 1, got {instances} and {len(families)}."
        raise ValueError(msg)
    say = report or (lambda _: None)
    keys = jr.split(jr.key(seed), len(families) + 1)
    trials: list[Trials] = []
    for i, family in enumerate(families):
        say(f"{i + 1}/{len(families)}: {family.name}, {instances * len(ALPHAS)} flows")
        trials.append(jax.block_until_ready(run_family(family, keys[i], instances)))
    say("the sources' slips")
    counterexamples = (
        *poster_horizons(), smith_inequality(keys[-1]), *slow_descent(), generalization(trials[0].facts)
    )  # fmt: skip
    rates = tuple(
        Rates(family.name, fit_rates(trial), EXPECTED | {"output_gap": family.output_slope})
        for family, trial in zip(families, trials, strict=True)
        if family.output_slope is not None
    )
    followed = np.concatenate([np.ravel(trial.followed) for trial in trials])
    return Verification(_scores(trials), rates, counterexamples, int(followed.sum()), int((~followed).sum()))


def _scores(trials: Sequence[Trials]) -> tuple[Score, ...]:
    """Over all families together."""
    scores = []
    for claims in zip(*(trial.claims for trial in trials), strict=True):
        use = [np.asarray(claim.applies & trial.followed) for claim, trial in zip(claims, trials, strict=True)]
        ratios = np.concatenate([np.asarray(claim.ratio)[u] for claim, u in zip(claims, use, strict=True)])
        violated = sum(int(np.sum(np.asarray(claim.violated)[u])) for claim, u in zip(claims, use, strict=True))
        seen = ratios[~np.isnan(ratios)]
        tightest, median = (float(np.min(seen)), float(np.median(seen))) if seen.size else (float("nan"),) * 2
        scores.append(Score(claims[0].theorem, claims[0].quantity, ratios.size, violated, tightest, median))
    return tuple(scores)
