"""The certificate of a report: every theorem at one scale of its sweep, and how it is shown."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, PRNGKeyArray

from lazyjax._core.tables import format_table
from lazyjax.flow.gradient_flow import gradient_flow
from lazyjax.laziness.compare import Comparison, compare_flows
from lazyjax.report.lane import SOLVE, Reference, Solver
from lazyjax.report.problem import Problem
from lazyjax.report.verdict import LAZY, relative_gap
from lazyjax.theory.certify import Certificate, certify_flows
from lazyjax.theory.claims import HEAD

if TYPE_CHECKING:
    import xarray

EVERY = 4
"""The bounds are checked against the flow at every fourth time of the report."""


def certify_scale(
    problem: Problem,
    data: "xarray.Dataset",
    reference: Reference,
    solvers: Mapping[float, Solver],
    key: PRNGKeyArray | None,
) -> tuple[Certificate | None, list[str]]:
    """Return the certificate at the scale from which on the model is lazy, or the reason why there is none.

    It takes the flow of the solver that the report took at this scale.
    """
    alpha = choose_scale(data)
    if alpha is None:
        return None, ["no certificate: no flow at a finite alpha has reached the end"]
    if problem.probe_model is None:
        return None, ["no certificate: the change of Dh cannot be followed through this model, as for the drift"]
    ts = jnp.asarray(np.asarray(data["time"])[::EVERY])
    both = _follow(problem, jnp.asarray(alpha, ts.dtype), ts, solvers[alpha], reference)
    tolerance = (SOLVE["rtol"], SOLVE["atol"])
    return certify_flows(problem.model, problem.loss, problem.w0, both, tolerance, key=key), []


@eqx.filter_jit
def _follow(problem: Problem, alpha: Array, ts: Array, solver: Solver, reference: Reference) -> Comparison:
    """Follow the model at some of the times, and compare it with the tangent model there.

    The displacement of the tangent model is the same at every alpha, and was followed at the same tolerance.
    """
    flow = gradient_flow(problem.model, problem.loss, problem.w0, ts, alpha=alpha, solver=solver, **SOLVE)
    outputs = reference.outputs[::EVERY]
    displacement = jtu.tree_map(lambda leaf: leaf[::EVERY], reference.displacement)
    tangent_flow = eqx.tree_at(
        lambda found: (found.outputs, found.displacement, found.loss),
        flow,
        (outputs, displacement, jax.vmap(problem.loss)(outputs)),
    )
    return compare_flows(flow, tangent_flow, problem.loss)


def choose_scale(data: "xarray.Dataset") -> float | None:
    """Return the smallest finite alpha whose gap is below the threshold of laziness.

    The largest finite one if none is; None if every flow at a finite alpha failed.
    """
    alphas = np.asarray(data["alpha"], float)
    usable = np.isfinite(alphas) & ~np.asarray(data["failed"], bool)
    if not usable.any():
        return None
    lazy = usable & (relative_gap(data) < LAZY)
    return float(alphas[lazy].min() if lazy.any() else alphas[usable].max())


def format_certificate(certificate: Certificate) -> str:
    """Return a few lines for the screen: the theorems that apply as a table, and the names of the others."""
    shown = [i for i, name in enumerate(HEAD) if name != "assumptions"]
    rows = [row for row, claim in zip(certificate.rows(), certificate.claims, strict=True) if bool(claim.applies)]
    lines = [headline(certificate), ""]
    if rows:
        lines.append(format_table([[row[i] for i in shown] for row in (HEAD, *rows)], ">"))
    else:
        lines.append("no theorem applies")
    silent = dict.fromkeys(claim.theorem for claim in certificate.claims if not bool(claim.applies))
    if silent:
        lines.append(f"nothing follows from {', '.join(silent)}, whose assumptions fail or are not known")
    return "\n".join(lines)


def headline(certificate: Certificate) -> str:
    """Tell how many bounds were checked against the flow, and whether any was violated."""
    applying = [claim for claim in certificate.claims if bool(claim.applies)]
    verdict = f"{len(certificate.violated)} VIOLATED" if certificate.violated else "none violated"
    return (
        f"certificate at alpha = {float(certificate.measurements.alpha):g}: {len(applying)} of "
        f"{len(certificate.claims)} bounds apply, "
        f"{verdict}"
    )


def certificate_table(certificate: Certificate) -> dict[str, Any]:
    """Return every claim at all its times as plain values for JSON."""
    claims = [
        {
            "theorem": claim.theorem,
            "quantity": claim.quantity,
            "assumptions": str(claim.status),
            "bound": np.asarray(claim.bound, float).tolist(),
            "measured": np.asarray(claim.measured, float).tolist(),
            "ratio": float(claim.ratio),
            "violated": bool(claim.violated),
        }
        for claim in certificate.claims
    ]
    times = np.asarray(jnp.asarray(certificate.measurements.time), float).tolist()
    assumptions = certificate.assumptions()
    return {"alpha": float(certificate.measurements.alpha), "time": times, "claims": claims, "assumptions": assumptions}
