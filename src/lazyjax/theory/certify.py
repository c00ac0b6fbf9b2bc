r"""A flow that certifies its own laziness: every theorem, what it assumes, what it bounds, and what was measured."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from lazyjax._core.checks import is_concrete
from lazyjax._core.keys import default_key
from lazyjax._core.show import show
from lazyjax._core.tables import format_table
from lazyjax._core.types import Model, Outputs, Params, RealScalar
from lazyjax.flow.gradient_flow import Flow
from lazyjax.laziness.compare import Comparison, compare
from lazyjax.laziness.hessian_norm import SecondDerivative
from lazyjax.laziness.kappa import measure_kinks
from lazyjax.laziness.sample_hessians import inputs_as_arguments
from lazyjax.losses.loss import Loss, as_loss
from lazyjax.models.maps import without_constant
from lazyjax.theory.claims import HEAD, Claim
from lazyjax.theory.measurements import Measurements, measure
from lazyjax.theory.theorems import make_claims


class Certificate(eqx.Module):
    r"""The claims of all theorems for one flow; made by `certify`. Print it for a table.

    Attributes:
        claims: One per theorem and quantity, in the order of the paper.
        measurements: The constants that the bounds rest on, and what was measured along the flow.
        comparison: The two flows.
    """

    claims: tuple[Claim, ...]
    measurements: Measurements
    comparison: Comparison

    @property
    def violated(self) -> tuple[Claim, ...]:
        """The claims that a measurement contradicts: an empty tuple, unless something is wrong."""
        return tuple(claim for claim in self.claims if bool(claim.violated))

    def claim(self, theorem: str, quantity: str) -> Claim:
        """Return the claim of a theorem about a quantity.

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
        """Return a row per claim: theorem, quantity, status of its assumptions, bound, measured, their least ratio."""
        return [claim.row() for claim in self.claims]

    def assumptions(self) -> list[str]:
        """Return every assumption once, with its status and numbers, and the theorems that make it."""
        theorems: dict[str, list[str]] = {}
        for claim in self.claims:
            for assumption in claim.assumptions:
                names = theorems.setdefault(str(assumption), [])
                if claim.theorem not in names:
                    names.append(claim.theorem)
        return [f"{text} [{', '.join(names)}]" for text, names in theorems.items()]

    def __str__(self) -> str:
        """Show the table, and the assumptions below it."""
        return show(self, self.measurements.alpha, 0, self._table)

    __repr__ = __str__

    def _table(self) -> str:
        alpha, end = float(self.measurements.alpha), float(self.measurements.time[-1])
        count = len(self.violated)
        verdict = f"{count} claim(s) VIOLATED" if count else "no bound is violated"
        head = f"certificate at alpha = {alpha:g}, flow time {end:.4g}: {verdict}"
        return "\n".join([head, "", format_table([HEAD, *self.rows()]), "", *self.assumptions()])


def certify(
    h: Model,
    loss: Loss | Callable[[Outputs], RealScalar],
    w0: Params,
    ts: Float[Array, " time"],
    *,
    alpha: RealScalar,
    test_model: Model | None = None,
    key: PRNGKeyArray | None = None,
    **options: Any,
) -> Certificate:
    r"""Follow a model and its tangent model, and check every theorem of `lazyjax.bounds` against what is measured.

    The bounds take Lip(h) and Lip(Dh) along the computed flow, where the proofs use them: the largest
    $\|Dh(w(t))\|$ and $\|Dh(w(t)) - Dh(w_0)\|/|w(t) - w_0|$ at the times up to t. So the times have to be dense:
    twenty, logarithmically spaced from a hundredth of $1/\|Dh\|^2$, miss little. If an assumption fails, the theorem
    says nothing about this flow, and its line says why.

    Args:
        h: Model h(w) with outputs (n,) or (n, k), the data inside.
        loss: R on outputs. What it declares is used: `smoothness` M, `strong_convexity()` m, `minimizer`.
        w0: Start.
        ts: Times (time,), increasing and finite, at which the theorems are checked.
        alpha: Output scale in (0, inf).
        test_model: The model on other inputs, `on_data(f, x_test)`, for proposition A.1. Its dense Jacobian is formed.
        key: For the random steps that look for kinks; None for a fixed one.
        **options: Options of `gradient_flow`, for both flows: `rtol`, `solver`, ... Gaps are resolved down to the
            tolerance.

    Returns:
        `Certificate`. Singular values other than the largest are computed for at most 256 outputs; beyond, what rests
        on them is "unknown". Each time costs as many Jacobian products as there are outputs (about 160 beyond 256).

    Raises:
        ValueError, TypeError: as `gradient_flow`; alpha or the last time infinite.
        equinox.EquinoxRuntimeError: a flow stopped early.

    Source:
        Chizat, Oyallon, Bach (2019), theorems 2.2 to 2.5, lemmas B.1 and B.2, proposition A.1; lecture notes on lazy
        training. See `lazyjax.bounds` for each statement.

    Example:
        >>> import jax.numpy as jnp
        >>> from lazyjax import square_loss
        >>> h, ts = lambda w: w + w**2 / 4, jnp.array([0.0, 0.1, 1.0, 4.0])
        >>> certificate = certify(h, square_loss(jnp.ones(1)), jnp.zeros(1), ts, alpha=50.0)
        >>> print(certificate.violated, f"{certificate.claim('2.4', 'output_gap').ratio:.1f}")
        () 3.9
    """
    loss = as_loss(loss)
    _check_finite(alpha, ts)
    both = compare(h, loss, w0, ts, alpha=alpha, **options)
    tolerance = (float(options.get("rtol", 1e-6)), float(options.get("atol", 1e-9)))
    return certify_flows(h, loss, w0, both, tolerance, test_model=test_model, key=key)


def certify_flows(
    h: Model,
    loss: Loss,
    w0: Params,
    both: Comparison,
    tolerance: tuple[float, float],
    *,
    test_model: Model | None = None,
    key: PRNGKeyArray | None = None,
) -> Certificate:
    """Certify as `certify` does, from two flows that were followed at a tolerance (rtol, atol)."""
    h = inputs_as_arguments(without_constant(h))
    if test_model is not None:
        test_model = inputs_as_arguments(without_constant(test_model))
    flows = (both.flow, both.tangent_flow)
    claims, measurements = _certify(h, loss, w0, flows, tolerance, test_model, default_key(key))
    return Certificate(tuple(claims), measurements, both)


@eqx.filter_jit
def _certify(
    h: Model,
    loss: Loss,
    w0: Params,
    flows: tuple[Flow, Flow],
    tolerance: tuple[float, float],
    test_model: Model | None,
    key: PRNGKeyArray,
) -> tuple[list[Claim], Measurements]:
    kink_share = measure_kinks(SecondDerivative(h, w0, float(np.sqrt(loss.weight))), key)[0]
    measurements = measure(h, loss, w0, flows, test_model, tolerance=tolerance, kink_share=kink_share)
    return make_claims(measurements, loss), measurements


def _check_finite(alpha: Any, ts: Any) -> None:
    if is_concrete(alpha) and np.ndim(alpha) == 0 and np.asarray(alpha) == np.inf:
        msg = (
            "alpha must be finite, got inf, at which a model's flow is that of its tangent: there is nothing to bound."
        )
        raise ValueError(msg)
    if is_concrete(ts) and np.ndim(ts) == 1 and np.size(ts) and np.isinf(np.asarray(ts)[-1]):
        msg = "ts must be finite, but its last is inf; give a time by which the flow has converged."
        raise ValueError(msg)
