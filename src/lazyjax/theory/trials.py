r"""The theorems on random instances: one compiled program a family, vmapped over starts, data and scales."""

import functools
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Bool, Float, Key, PRNGKeyArray

from lazyjax.flow.gradient_flow import gradient_flow
from lazyjax.flow.result import RESULTS
from lazyjax.models.tangent import linearize, singular_values
from lazyjax.theory.claims import Claim
from lazyjax.theory.measurements import Measurements, measure_facts
from lazyjax.theory.random_problems import Family
from lazyjax.theory.theorems import make_claims

ALPHAS = (1.0, 4.0, 16.0, 64.0, 256.0, 1024.0, 4096.0)

TIMES = tuple(np.geomspace(0.02, 100, 22))
"""Over the kernel's largest eigenvalue."""

TOLERANCE = (1e-10, 1e-13)

STEPS = 30_000

LANES = 128
"""Flows at a time."""

RATES = ("output_gap", "param_gap", "displacement_norm")


class Trials(eqx.Module):
    """All lanes of a family (or one of them); the axes are instance, alpha (and time).

    Attributes:
        claims: Of each lane.
        facts: Of each lane.
        followed: Whether both flows of a lane got to their end.
    """

    claims: list[Claim]
    facts: Measurements
    followed: Bool[Array, "..."]


def run_family(family: Family, key: PRNGKeyArray, instances: int) -> Trials:
    """Random instances at all of `ALPHAS`."""
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
        gradient_flow, loss=loss, w0=w0, ts=ts, alpha=alpha, solver=diffrax.Tsit5(), rtol=TOLERANCE[0],
        atol=TOLERANCE[1], save=("outputs", "displacement"), max_steps=STEPS, throw=False,
    )  # fmt: skip
    flows = follow(h), follow(linearize(h, w0))
    facts = measure_facts(h, loss, w0, flows, test, tolerance=TOLERANCE)
    num_params = sum(leaf.size for leaf in jtu.tree_leaves(eqx.filter(w0, eqx.is_inexact_array)))
    # The families are smooth.
    claims = make_claims(facts, loss, num_params, flows[0].outputs[0].size, jnp.zeros_like(alpha))
    followed = (flows[0].result == RESULTS.successful) & (flows[1].result == RESULTS.successful)
    return Trials(claims, facts, followed)


def fit_rates(trials: Trials, last: int = 4) -> dict[str, tuple[float, float]]:
    """The exponents of alpha, the smallest and largest over instances, of what theorem 2.2 has rates for."""
    alphas = np.log(np.asarray(ALPHAS[-last:]))
    slopes = {}
    for name in RATES:
        sizes = np.max(np.asarray(getattr(trials.facts, name)), axis=-1)[:, -last:]
        fits = [float(np.polyfit(alphas, np.log(row), 1)[0]) for row in sizes]
        slopes[name] = (min(fits), max(fits))
    return slopes
