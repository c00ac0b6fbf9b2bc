"""The certificate of a report: every theorem at one scale of its sweep, and how that is told."""

from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np
from diffrax import AbstractSolver
from equinox import EquinoxRuntimeError
from jaxtyping import Array, PRNGKeyArray

from lazyjax._claims import FAILS, HOLDS, UNKNOWN
from lazyjax._lanes import SOLVE, Setting
from lazyjax._summary import LAZY, format_table, relative_gap
from lazyjax.certificate import HEAD, Certificate, certify
from lazyjax.maps import OnData, center

if TYPE_CHECKING:
    import xarray

EVERY = 4
"""The bounds are held against the flow at every fourth time of the report."""

TOLERANCE = {"rtol": 1e-6, "atol": 1e-9}
"""Tighter than the sweep's: what theorems speak of at a large scale is small."""


def certify_scale(
    setting: Setting, data: "xarray.Dataset", ts: Array, solver: AbstractSolver, key: PRNGKeyArray | None
) -> tuple[Certificate | None, list[str]]:
    """The certificate at the scale from which on the model is lazy, or the reason why there is none."""
    alpha = choose_scale(data)
    if alpha is None:
        return None, ["no certificate: no flow at a finite alpha has reached the end"]
    if setting.probe is None:
        return None, ["no certificate: the change of Dh cannot be followed through this model, as for the drift"]
    h = OnData(center(setting.f, setting.w0), setting.x)
    options: dict[str, Any] = {"solver": solver, "max_steps": SOLVE["max_steps"], **TOLERANCE}
    try:
        return certify(h, setting.loss, setting.w0, ts[::EVERY], alpha, key=key, **options), []
    except EquinoxRuntimeError:
        return None, [f"no certificate: at the tighter tolerance the flow at alpha = {alpha:g} has stopped early"]


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
