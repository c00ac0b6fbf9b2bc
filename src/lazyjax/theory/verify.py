r"""The whole theory on random instances: how often a bound is violated (never), how sharp the sharpest case is.

Each family of problems is one compiled program, vmapped over starts, data and scales.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Bool, Float, Key, PRNGKeyArray

from lazyjax._core.tables import format_table
from lazyjax.flow.gradient_flow import gradient_flow
from lazyjax.flow.result import RESULTS
from lazyjax.models.tangent import linearize, singular_values
from lazyjax.theory.claims import Claim
from lazyjax.theory.errata import Counterexample, generalization, poster_horizons, slow_descent, smith_inequality
from lazyjax.theory.measurements import Measurements, measure
from lazyjax.theory.random_problems import FAMILIES, Family
from lazyjax.theory.theorems import make_claims

ALPHAS = (1.0, 4.0, 16.0, 64.0, 256.0, 1024.0, 4096.0)
"""Scales at which each random instance is followed."""

TIMES = tuple(np.geomspace(0.02, 100, 22))
"""Times at which flows are looked at, in units of one over the kernel's largest eigenvalue."""

TOLERANCE = (1e-10, 1e-13)
"""Relative and absolute tolerance of the flows."""

MAX_STEPS = 30_000
"""Steps after which a flow counts as stopped."""

LANES = 128
"""Flows that are followed at a time."""

EXPECTED = {"output_gap": -1.0, "param_gap": -2.0, "displacement_norm": -1.0}
"""Exponents of alpha by theorem 2.2; that of the output gap depends on the family."""


class Rates(eqx.Module):
    """The fitted exponents of alpha of one family.

    Attributes:
        family: Name of the family.
        fitted: Smallest and largest exponent over the instances, by quantity.
        expected: The exponents that they tend to.
    """

    family: str = eqx.field(static=True)
    fitted: dict[str, tuple[float, float]]
    expected: dict[str, float]


class Score(eqx.Module):
    """The record of one bound over all instances.

    Attributes:
        theorem, quantity: Name of the bound.
        instances: Flows to which the theorem applies.
        violations: How many of these flows contradict it.
        tightest: The least bound over measured.
        median: The median, over flows, of the least bound over measured.
    """

    theorem: str = eqx.field(static=True)
    quantity: str = eqx.field(static=True)
    instances: int
    violations: int
    tightest: float
    median: float


class Verification(eqx.Module):
    """The outcome of checking the theory on random instances; made by `verify`. Print it.

    Attributes:
        scores: One per bound.
        rates: One per family for which theorem 2.2 has rates.
        counterexamples: Published statements that are false, next to the corrected ones.
        flows: How many pairs of flows were followed to the last time.
        stopped: How many more stopped before it.
    """

    scores: tuple[Score, ...]
    rates: tuple[Rates, ...]
    counterexamples: tuple[Counterexample, ...]
    flows: int
    stopped: int

    @property
    def violations(self) -> int:
        """The number of corrected statements that were violated, in all."""
        return sum(score.violations for score in self.scores) + sum(not c.holds for c in self.counterexamples)

    def __str__(self) -> str:
        """Show three tables: the bounds, the exponents of alpha, and the published statements."""
        head = f"{self.flows} random flows next to their tangents', alpha from {ALPHAS[0]:g} to {ALPHAS[-1]:g}: "
        head += f"{self.violations} violation(s)" + (f"; {self.stopped} more stopped early" if self.stopped else "")
        scores = [("theorem", "quantity", "applies to", "violations", "tightest", "median")]
        scores += [
            (s.theorem, s.quantity, str(s.instances), str(s.violations), f"{s.tightest:.3g}", f"{s.median:.3g}")
            for s in self.scores
        ]
        rates = [("exponents of alpha", *EXPECTED)]
        rates += [
            (r.family, *(f"{r.fitted[n][0]:.3f} to {r.fitted[n][1]:.3f} ({r.expected[n]:g})" for n in EXPECTED))
            for r in self.rates
        ]
        errors = [("as printed", "source", "fails in", "corrected", "holds")]
        errors += [
            (
                c.statement,
                c.source,
                f"{100 * c.refuted:.0f}% of {c.true.size}",
                c.correction,
                "yes" if c.holds else "NO",
            )
            for c in self.counterexamples
        ]
        return "\n\n".join([head, *(format_table(table) for table in (scores, rates, errors))])

    __repr__ = __str__


def verify(
    *,
    instances: int = 15,
    families: Sequence[Family] = FAMILIES,
    seed: int = 0,
    report: Callable[[str], Any] | None = None,
) -> Verification:
    r"""Check every theorem on random nets, losses, data and scales, in float64.

    Each family of problems (`FAMILIES`: shallow and deep nets, a diagonal one, a random quadratic model; square,
    logistic, cross-entropy and another strongly convex loss; with more parameters than outputs and with fewer) is drawn
    `instances` times and followed, next to its tangent model, at seven scales over a hundred times $1/\|Dh\|^2$.
    The bounds take the constants met along the flow.

    Args:
        instances: Instances of each family; 15 of ten families at seven scales are 1050 pairs of flows.
        families: The families to check; the first is also the case of proposition A.1.
        seed: For everything random.
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
    say("statements as published")
    counterexamples = (
        *poster_horizons(),
        smith_inequality(keys[-1]),
        *slow_descent(),
        generalization(trials[0].measurements),
    )
    rates = tuple(
        Rates(family.name, fit_rates(trial), EXPECTED | {"output_gap": family.output_slope})
        for family, trial in zip(families, trials, strict=True)
        if family.output_slope is not None
    )
    followed = np.concatenate([np.ravel(trial.followed) for trial in trials])
    return Verification(_scores(trials), rates, counterexamples, int(followed.sum()), int((~followed).sum()))


class Trials(eqx.Module):
    """The flows of a family; the axes are instance, alpha (and time).

    Attributes:
        claims: The claims, each with these axes.
        measurements: What was measured, with these axes.
        followed: Whether both flows got to their end.
    """

    claims: list[Claim]
    measurements: Measurements
    followed: Bool[Array, "..."]


def run_family(family: Family, key: PRNGKeyArray, instances: int) -> Trials:
    """Follow random instances of a family at all of `ALPHAS`, in one compiled program."""
    keys = jr.split(key, instances)
    lanes = [(k, a) for k in range(instances) for a in ALPHAS]
    chosen = keys[np.array([k for k, _ in lanes])]
    out = _run(family.build, chosen, jnp.asarray([a for _, a in lanes], float))
    return jtu.tree_map(lambda leaf: leaf.reshape(instances, len(ALPHAS), *leaf.shape[1:]), out)


@eqx.filter_jit
def _run(build: Any, keys: Key[Array, " lanes"], alphas: Float[Array, " lanes"]) -> Trials:
    return jax.lax.map(lambda lane: _lane(build, *lane), (keys, alphas), batch_size=LANES)


def _lane(build: Any, key: PRNGKeyArray, alpha: Array) -> Trials:
    h, loss, w0, test = build(key)
    largest = singular_values(linearize(h, w0), loss).largest ** 2
    ts = jnp.concatenate([jnp.zeros(1), jnp.asarray(TIMES) / largest])
    follow = functools.partial(
        gradient_flow,
        loss=loss,
        w0=w0,
        ts=ts,
        alpha=alpha,
        solver=diffrax.Tsit5(),
        rtol=TOLERANCE[0],
        atol=TOLERANCE[1],
        save=("outputs", "displacement"),
        max_steps=MAX_STEPS,
        throw=False,
    )
    flows = follow(h), follow(linearize(h, w0))
    # The families are smooth.
    measurements = measure(h, loss, w0, flows, test, tolerance=TOLERANCE, kink_share=jnp.zeros_like(alpha))
    followed = (flows[0].result == RESULTS.successful) & (flows[1].result == RESULTS.successful)
    return Trials(make_claims(measurements, loss), measurements, followed)


def fit_rates(trials: Trials, last: int = 4) -> dict[str, tuple[float, float]]:
    """Return the exponents of alpha of what theorem 2.2 has rates for, the smallest and largest over instances."""
    alphas = np.log(np.asarray(ALPHAS[-last:]))
    slopes = {}
    for name in EXPECTED:
        sizes = np.max(np.asarray(getattr(trials.measurements, name)), axis=-1)[:, -last:]
        fits = [float(np.polyfit(alphas, np.log(row), 1)[0]) for row in sizes]
        slopes[name] = (min(fits), max(fits))
    return slopes


def _scores(trials: Sequence[Trials]) -> tuple[Score, ...]:
    """Return the scores over all families together."""
    scores = []
    for claims in zip(*(trial.claims for trial in trials), strict=True):
        use = [np.asarray(claim.applies & trial.followed) for claim, trial in zip(claims, trials, strict=True)]
        ratios = np.concatenate([np.asarray(claim.ratio)[u] for claim, u in zip(claims, use, strict=True)])
        violated = sum(int(np.sum(np.asarray(claim.violated)[u])) for claim, u in zip(claims, use, strict=True))
        seen = ratios[~np.isnan(ratios)]
        tightest, median = (float(np.min(seen)), float(np.median(seen))) if seen.size else (float("nan"),) * 2
        scores.append(Score(claims[0].theorem, claims[0].quantity, ratios.size, violated, tightest, median))
    return tuple(scores)
