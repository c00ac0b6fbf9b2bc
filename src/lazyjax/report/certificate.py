"""The certificate of a report: every theorem at one scale of its sweep, and how that is told."""

from typing import TYPE_CHECKING, Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from diffrax import AbstractSolver
from jaxtyping import PRNGKeyArray

from lazyjax.flow.gradient_flow import gradient_flow
from lazyjax.laziness.compare import compare_flows
from lazyjax.models.maps import center, on_data
from lazyjax.report.lane import SOLVE, Problem, Reference
from lazyjax.report.verdict import LAZY, format_table, relative_gap
from lazyjax.theory.certify import HEAD, Certificate, certify_flows
from lazyjax.theory.claims import FAILS, HOLDS, UNKNOWN

if TYPE_CHECKING:
    import xarray

EVERY = 4
"""The bounds are held against the flow at every fourth time of the report."""


def certify_scale(
    setting: Problem, data: "xarray.Dataset", reference: Reference, solver: AbstractSolver, key: PRNGKeyArray | None
) -> tuple[Certificate | None, list[str]]:
    """The certificate at the scale from which on the model is lazy, or the reason why there is none."""
    alpha = choose_scale(data)
    if alpha is None:
        return None, ["no certificate: no flow at a finite alpha has reached the end"]
    if setting.probe is None:
        return None, ["no certificate: the change of Dh cannot be followed through this model, as for the drift"]
    h, ts = on_data(center(setting.f, setting.w0), setting.x), jnp.asarray(np.asarray(data["time"]))[::EVERY]
    flow = gradient_flow(h, setting.loss, setting.w0, ts, alpha=alpha, solver=solver, **SOLVE)
    # The tangent's displacement is the same at every alpha, and followed at the same tolerance.
    outputs = reference.outputs[::EVERY]
    displacement = jtu.tree_map(lambda leaf: leaf[::EVERY], reference.displacement)
    tangent_flow = eqx.tree_at(
        lambda found: (found.outputs, found.displacement, found.loss),
        flow,
        (outputs, displacement, jax.vmap(setting.loss)(outputs)),
    )
    both = compare_flows(flow, tangent_flow, setting.loss)
    return certify_flows(h, setting.loss, setting.w0, both, (SOLVE["rtol"], SOLVE["atol"]), key=key), []


def choose_scale(data: "xarray.Dataset") -> float | None:
    """The smallest finite alpha whose gap is below the threshold of laziness; the largest finite one if none is."""
    alphas = np.asarray(data["alpha"], float)
    usable = np.isfinite(alphas) & ~np.asarray(data["failed"], bool)
    if not usable.any():
        return None
    lazy = usable & (relative_gap(data) < LAZY)
    return float(alphas[lazy].min() if lazy.any() else alphas[usable].max())


def format_certificate(certificate: Certificate) -> str:
    """A few lines for the screen: the theorems that apply as a table, and the names of the others."""
    rows = [row for row, claim in zip(certificate.rows(), certificate.claims, strict=True) if bool(claim.applies)]
    lines = [headline(certificate), "", *_table(rows)]
    silent = dict.fromkeys(claim.theorem for claim in certificate.claims if not bool(claim.applies))
    if silent:
        lines.append(f"nothing follows from {', '.join(silent)}, whose assumptions fail or are not known")
    return "\n".join(lines)


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    shown = [(name, [row[i] for row in rows]) for i, name in enumerate(HEAD) if name != "assumptions"]
    return [format_table(shown)] if rows else ["no theorem applies"]


def headline(certificate: Certificate) -> str:
    """How many bounds were held against the flow, and whether any was violated."""
    facts, applying = certificate.facts, [claim for claim in certificate.claims if bool(claim.applies)]
    verdict = f"{len(certificate.violated)} VIOLATED" if certificate.violated else "none violated"
    return (
        f"certificate at alpha = {float(facts.alpha):g}: {len(applying)} of {len(certificate.claims)} bounds apply, "
        f"{verdict}"
    )


def certificate_table(certificate: Certificate) -> dict[str, Any]:
    """As plain values for JSON: every claim at all its times."""
    states = {HOLDS: "holds", UNKNOWN: "unknown", FAILS: "fails"}
    claims = [
        {
            "theorem": claim.theorem,
            "quantity": claim.quantity,
            "assumptions": states[int(claim.state)],
            "bound": np.asarray(claim.bound, float).tolist(),
            "measured": np.asarray(claim.measured, float).tolist(),
            "ratio": float(claim.ratio),
            "violated": bool(claim.violated),
        }
        for claim in certificate.claims
    ]
    times = np.asarray(jnp.asarray(certificate.facts.time), float).tolist()
    assumptions = certificate.assumptions()
    return {"alpha": float(certificate.facts.alpha), "time": times, "claims": claims, "assumptions": assumptions}
