r"""A flow that certifies its own laziness: every theorem, what it assumes, what it bounds, and what was measured."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from lazyjax._core.checks import check_outputs, is_concrete
from lazyjax._core.keys import default_key
from lazyjax._core.types import Model, Outputs, Params, RealScalar
from lazyjax.laziness.compare import Comparison, compare
from lazyjax.laziness.hessian_norm import SecondDerivative
from lazyjax.laziness.kappa import measure_kinks
from lazyjax.losses.loss import Loss, as_loss
from lazyjax.models.maps import without_constant
from lazyjax.theory.claims import FAILS, Claim
from lazyjax.theory.measurements import Measurements, measure_facts
from lazyjax.theory.theorems import make_claims


class Certificate(eqx.Module):
    r"""All theorems for one flow; made by `certify`. Print it for a table.

    Attributes:
        claims: One a theorem and quantity, in the order of the paper.
        facts: The constants that the bounds rest on, and the measurements.
        comparison: The two flows.
    """

    claims: tuple[Claim, ...]
    facts: Measurements
    comparison: Comparison

    @property
    def violated(self) -> tuple[Claim, ...]:
        """The claims that a measurement contradicts: an empty tuple, unless something is wrong."""
        return tuple(claim for claim in self.claims if bool(claim.violated))

    def claim(self, theorem: str, quantity: str) -> Claim:
        """The claim of that name.

        Raises:
            KeyError: there is none.
        """
        for claim in self.claims:
            if (claim.theorem, claim.quantity) == (theorem, quantity):
                return claim
        names = ", ".join(f"({claim.theorem!r}, {claim.quantity!r})" for claim in self.claims)
        msg = f"no claim ({theorem!r}, {quantity!r}); there are {names}."
        raise KeyError(msg)

    def rows(self) -> list[tuple[str, ...]]:
        """Theorem, quantity, status of its assumptions, bound, measured, and their ratio, where that is least."""
        return [_row(claim) for claim in self.claims]

    def assumptions(self) -> list[str]:
        """Every assumption once, with its status and numbers."""
        texts: dict[str, list[str]] = {}
        for claim in self.claims:
            for assumption in claim.assumptions:
                names = texts.setdefault(str(assumption), [])
                if claim.theorem not in names:
                    names.append(claim.theorem)
        return [f"{text} [{', '.join(names)}]" for text, names in texts.items()]

    def __str__(self) -> str:
        """The table, and the assumptions below it."""
        rows = [HEAD, *self.rows()]
        widths = [max(len(row[i]) for row in rows) for i in range(len(HEAD))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        head = f"certificate at alpha = {float(self.facts.alpha):g}, flow time {float(self.facts.time[-1]):.4g}"
        count = len(self.violated)
        verdict = f"{count} claim(s) VIOLATED" if count else "no bound is violated"
        return "\n".join([f"{head}: {verdict}", "", *lines, "", *self.assumptions()])


HEAD = ("theorem", "quantity", "assumptions", "bound", "measured", "bound/measured")


def _row(claim: Claim) -> tuple[str, ...]:
    failing = [a for a in claim.assumptions if int(a.state) == FAILS]
    unknown = [a for a in claim.assumptions if a.status == "unknown"]
    status = "hold"
    if failing:
        status = f"fails: {failing[0].name}"
    elif unknown:
        status = f"unknown: {unknown[0].name}"
    largest = f"{float(jnp.max(claim.measured)):.3g}"
    if failing or (unknown and not bool(jnp.all(jnp.isfinite(claim.bound)))):
        return (claim.theorem, claim.quantity, status, "-", largest, "-")
    ratios = np.asarray(claim.ratios)
    if np.any(np.isfinite(ratios)):
        i = int(np.argmin(np.where(np.isnan(ratios), np.inf, ratios)))
        ratio = f"{ratios[i]:.3g}"
    else:
        i = int(np.argmax(np.asarray(claim.measured)))
        ratio = "vacuous" if np.any(np.isinf(ratios)) else "below resolution"
    measured = f"{float(claim.measured[i]):.3g}"
    mark = " VIOLATED" if bool(claim.violated) else ""
    return (claim.theorem, claim.quantity, status, f"{float(claim.bound[i]):.3g}", measured, ratio + mark)


def certify(
    h: Model,
    loss: Loss | Callable[[Outputs], RealScalar],
    w0: Params,
    ts: Float[Array, " time"],
    alpha: RealScalar,
    *,
    test: Model | None = None,
    key: PRNGKeyArray | None = None,
    **options: Any,
) -> Certificate:
    r"""Follow a model and its tangent model, and hold every theorem of `lazyjax.bounds` against what is measured.

    The bounds take Lip(h) and Lip(Dh) along the computed flow, where the proofs use them: the largest
    $\|Dh(w(t))\|$ and $\|Dh(w(t)) - Dh(w_0)\|/|w(t) - w_0|$ at the times up to t. So a bound is as good as the times
    are dense: twenty, logarithmically spaced from a hundredth of $1/\|Dh\|^2$, miss little. Where an assumption fails
    the theorem says nothing of this flow, and its line says why.

    Args:
        h: Model h(w) with outputs (n,) or (n, k), the data inside.
        loss: R on outputs. What it tells of itself is used: `smoothness` M, `strong_convexity()` m, `minimizer`.
        w0: Start.
        ts: Times (time,), increasing and finite; what is claimed, is claimed at these.
        alpha: Output scale in (0, inf).
        test: The model on other inputs, `lambda w: f(w, x_test)`, for proposition A.1. Its dense Jacobian is formed.
        key: For the random steps that look for kinks; None for a fixed one.
        **options: Of `gradient_flow`, for both flows: `rtol`, `solver`, ... Gaps are resolved down to the tolerance.

    Returns:
        `Certificate`. Singular values other than the largest are computed for at most 256 outputs: beyond, what rests
        on them is "unknown". A time costs as many Jacobian products as there are outputs (some 160 beyond 256).

    Raises:
        ValueError, TypeError: as `gradient_flow`; alpha or the last time infinite.
        equinox.EquinoxRuntimeError: a flow stopped early.

    Source:
        Chizat, Oyallon, Bach (2019), theorems 2.2 to 2.5, lemmas B.1 and B.2, proposition A.1; lecture notes on lazy
        training. See `lazyjax.bounds` for each statement.

    Example:
        >>> from lazyjax import square_loss
        >>> h, ts = lambda w: w + w**2 / 4, jnp.array([0.0, 0.1, 1.0, 4.0])
        >>> certificate = certify(h, square_loss(jnp.ones(1)), jnp.zeros(1), ts, 50.0)
        >>> print(certificate.violated, f"{certificate.claim('2.4', 'output_gap').ratio:.1f}")
        () 3.9
    """
    loss = as_loss(loss)
    _check_finite(alpha, ts)
    both = compare(h, loss, w0, ts, alpha=alpha, **options)
    tolerance = (float(options.get("rtol", 1e-6)), float(options.get("atol", 1e-9)))
    return certify_flows(h, loss, w0, both, tolerance, test=test, key=key)


def certify_flows(
    h: Model,
    loss: Loss,
    w0: Params,
    both: Comparison,
    tolerance: tuple[float, float],
    *,
    test: Model | None = None,
    key: PRNGKeyArray | None = None,
) -> Certificate:
    """As `certify`, for two flows that are there already, followed at a tolerance (rtol, atol)."""
    facts = _measure(h, loss, w0, (both.flow, both.tangent_flow), test, tolerance=tolerance)
    form = SecondDerivative(without_constant(h), w0, float(np.sqrt(loss.weight)))
    kink_share = measure_kinks(form, default_key(key))[0]
    num_params = sum(leaf.size for leaf in jtu.tree_leaves(eqx.filter(w0, eqx.is_inexact_array)))
    claims = _claims(facts, loss, num_params, check_outputs(h, w0).size, kink_share)
    return Certificate(tuple(claims), facts, both)


_measure = eqx.filter_jit(measure_facts)
_claims = eqx.filter_jit(make_claims)


def _check_finite(alpha: Any, ts: Any) -> None:
    if is_concrete(alpha) and np.ndim(alpha) == 0 and np.asarray(alpha) == np.inf:
        msg = (
            "alpha must be finite, got inf, where a model's flow is that of its tangent and there is nothing to bound."
        )
        raise ValueError(msg)
    if is_concrete(ts) and np.ndim(ts) == 1 and np.size(ts) and np.isinf(np.asarray(ts)[-1]):
        msg = "ts must be finite, but its last is inf; give a time by which the flow has converged."
        raise ValueError(msg)
