r"""Where the sources err: what they print against the truth, and the corrected form next to it.

Full references of the sources are in `docs/sources.md`.
"""

import diffrax
import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, PRNGKeyArray

from lazyjax.flow.gradient_flow import gradient_flow
from lazyjax.laziness.compare import compare
from lazyjax.losses.square import square_loss
from lazyjax.theory import bounds
from lazyjax.theory.certify import certify
from lazyjax.theory.measurements import Measurements

CROSSING = (10.0, 30.0, 100.0)
"""Scales at which the statement of the poster is tried."""


class Counterexample(eqx.Module):
    """A printed statement next to the corrected one.

    Attributes:
        source: Where it is printed.
        statement: The statement as printed, in words.
        correction: The corrected form, in words.
        true: What was measured, one number per case.
        printed: The bound of it by the printed form.
        corrected: The bound of it by the corrected form.
    """

    source: str = eqx.field(static=True)
    statement: str = eqx.field(static=True)
    correction: str = eqx.field(static=True)
    true: Float[Array, " case"]
    printed: Float[Array, " case"]
    corrected: Float[Array, " case"]

    @property
    def refuted(self) -> float:
        """Share of the cases in which the truth is above what is printed."""
        return float(jnp.mean(self.true > self.printed * (1 + 1e-6)))

    @property
    def holds(self) -> bool:
        """Whether the corrected form holds in every case."""
        return bool(jnp.all(self.true <= self.corrected * (1 + 1e-6)))


def poster_horizons() -> list[Counterexample]:
    r"""Follow h = (w1, w1 w2) from 0 to (1, 1): the rank of Dh changes; the output gap tends to 1 at every alpha."""
    loss, w0 = square_loss(jnp.ones(2), mean=False), jnp.zeros(2)
    options = {"solver": diffrax.Kvaerno5(), "rtol": 1e-8, "atol": 1e-10}
    to_infinity, finite = [], []
    for alpha in CROSSING:
        ts = jnp.concatenate([jnp.zeros(1), jnp.geomspace(0.1, 20 * alpha**2, 60)])
        to_infinity.append(jnp.max(compare(_crossing, loss, w0, ts, alpha=alpha, **options).output_gap))
        finite.append(
            certify(_crossing, loss, w0, jnp.linspace(0, 10, 41), alpha=alpha, **options).claim("2.3", "output_gap")
        )
    true, nothing = jnp.stack(to_infinity), jnp.full(len(CROSSING), jnp.inf)
    return [
        Counterexample(
            "poster, infinite horizon",
            "the output gap over all t falls as 1/alpha, whatever the rank of Dh",
            "theorem 2.5 asks for a constant rank, which is not there: nothing follows",
            true,
            true[0] * CROSSING[0] / jnp.asarray(CROSSING),
            nothing,
        ),
        Counterexample(
            "poster, finite horizon",
            "",
            "theorem 2.3 on [0, 10], for the same model",
            jnp.stack([claim.measured[-1] for claim in finite]),
            nothing,
            jnp.stack([claim.bound[-1] for claim in finite]),
        ),
    ]


def _crossing(w: Array) -> Array:
    return jnp.stack([w[0], w[0] * w[1]])


def smith_inequality(key: PRNGKeyArray, triples: int = 2000) -> Counterexample:
    r"""Try $\bigl||A^Tf|^2 - |B^Tf|^2\bigr| \le |(A - B)^Tf|^2$ on random triples."""
    a, b, f = (
        jr.normal(k, (triples, *shape)) for k, shape in zip(jr.split(key, 3), ((3, 4), (3, 4), (3,)), strict=True)
    )
    first, second, gap = (jnp.linalg.norm(jnp.einsum("sij,si->sj", m, f), axis=1) for m in (a, b, a - b))
    # The measured right-hand side has to be at least these; as bounds from above: their reciprocals.
    return Counterexample(
        "Smith's report, theorem 2.4",
        "||A'f|^2 - |B'f|^2| <= |(A - B)'f|^2",
        "(|A'f| - |B'f|)^2 <= |(A - B)'f|^2",
        1 / gap**2,
        *(1 / bounds.smith_inequality(first, second, printed=p) for p in (True, False)),
    )


def slow_descent() -> list[Counterexample]:
    r"""Follow g(v) = 0.1 v from 0 to y = 1: it moves by 10, in the Euclidean metric, at alpha = 1."""
    flow = gradient_flow(
        lambda v: 0.1 * v,
        square_loss(jnp.ones(1), mean=False),
        jnp.zeros(1),
        jnp.array([0.0, jnp.inf]),
        save=("displacement",),
        rtol=1e-9,
        atol=1e-12,
        solver=diffrax.Tsit5(),
    )
    moved = jnp.abs(flow.displacement[-1])
    forms = [bounds.lecture_lemma_5(start_loss=0.5, lambda_min=0.01, lambda_max=0.01, printed=p) for p in (True, False)]
    numbers = {"t": jnp.inf, "alpha": 1.0, "start_loss": 0.5, "sigma_min": 0.1, "sigma_max": 0.1, "lip_dh": 0.0}
    theorem = [bounds.lecture_theorem_2(**numbers, printed=p).tangent_displacement_norm for p in (True, False)]
    return [
        Counterexample(
            "lecture notes, lemma 5",
            "|v - v(0)|^2 <= 2 lambda1 L / lambda",
            "|v - v(0)| <= sqrt(2 lambda1 L) / lambda",
            moved,
            jnp.atleast_1d(forms[0]),
            jnp.atleast_1d(forms[1]),
        ),
        Counterexample(
            "lecture notes, theorem 2",
            "|u - u(0)| <= sqrt(2 smax^2 L0) / (alpha smin), in its proof",
            "smin^2 in the denominator",
            moved,
            jnp.atleast_1d(theorem[0]),
            jnp.atleast_1d(theorem[1]),
        ),
    ]


def generalization(measurements: Measurements) -> Counterexample:
    r"""Check the second term of proposition A.1, $\alpha|f(w, x) - \bar f(w, x)|$, at the end of a family's flows."""
    assert measurements.test_linearization is not None
    assert measurements.test_curvature is not None
    bound = [
        bounds.proposition_a_1(
            alpha=measurements.alpha,
            displacement_norm=measurements.displacement_norm[..., -1],
            param_gap=measurements.param_gap[..., -1],
            dh_norm=0.0,
            lip_dh=measurements.test_curvature[..., -1],
            printed=printed,
        ).ravel()
        for printed in (True, False)
    ]
    return Counterexample(
        "supplement, proposition A.1",
        "alpha |f(w) - fbar(w)| <= alpha M2 |w - wbar|^2 / 2, in its proof",
        "alpha M2 |w - w0|^2 / 2",
        measurements.test_linearization[..., -1].ravel(),
        *bound,
    )
