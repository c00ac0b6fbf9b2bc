"""A claim: one bound of one theorem for one flow, what it assumes, what it bounds, what was measured.

Made from `Measurements` by pure functions, for one flow or under `jax.vmap` for thousands.
"""

from functools import reduce

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Real

from lazyjax.losses.loss import Loss
from lazyjax.losses.square import SquareLoss
from lazyjax.theory.measurements import Measurements

HOLDS, UNKNOWN, FAILS = 2, 1, 0
STATUS = {HOLDS: "holds", UNKNOWN: "unknown", FAILS: "fails"}

KINKED = 0.05
"""A larger share of the change of Dh without a second derivative is a model with kinks."""


class Assumption(eqx.Module):
    """What a theorem asks for.

    Attributes:
        name: In words.
        state: `HOLDS`, `UNKNOWN` or `FAILS`; the least of several is that of all.
        numbers: What it rests on, to be put into `detail`.
        detail: With a place for each number.
    """

    name: str = eqx.field(static=True)
    state: Int[Array, "..."]
    numbers: tuple[Real[Array, "..."], ...]
    detail: str = eqx.field(static=True)

    @property
    def status(self) -> str:
        """In a word, "holds", "fails" or "unknown", of a single flow."""
        return STATUS[int(self.state)]

    def __str__(self) -> str:
        """Name, status, numbers."""
        detail = self.detail.format(*(float(number) for number in self.numbers))
        return f"{self.name}: {self.status}" + (f" ({detail})" if detail else "")


class Claim(eqx.Module):
    """One bound of one theorem, beside what was measured.

    Attributes:
        theorem: Its name.
        quantity: What is bounded.
        assumptions: All have to hold; where one fails the theorem says nothing, where one is unknown, nothing sure.
        bound: At every time.
        measured: At every time.
        resolution: The numerical error to expect of what was measured: below it nothing is seen.
    """

    theorem: str = eqx.field(static=True)
    quantity: str = eqx.field(static=True)
    assumptions: tuple[Assumption, ...]
    bound: Float[Array, "... time"]
    measured: Float[Array, "... time"]
    resolution: Float[Array, "... time"]

    @property
    def state(self) -> Int[Array, "..."]:
        """Of all assumptions together."""
        return reduce(jnp.minimum, [a.state for a in self.assumptions])

    @property
    def applies(self) -> Bool[Array, "..."]:
        """Whether all assumptions hold."""
        return self.state == HOLDS

    @property
    def violated(self) -> Bool[Array, "..."]:
        """Whether they hold and something was measured above the bound, and is no numerical error."""
        above = self.measured > self.bound * (1 + 1e3 * jnp.finfo(self.bound.dtype).eps) + self.resolution
        return self.applies & jnp.any(above, axis=-1)

    @property
    def ratios(self) -> Float[Array, "... time"]:
        """Bound over measured; NaN at the start, and where nothing above the resolution was measured."""
        seen = (self.measured > 10 * self.resolution).at[..., 0].set(False)
        return jnp.where(seen, self.bound / jnp.where(seen, self.measured, 1), jnp.nan)

    @property
    def ratio(self) -> Float[Array, "..."]:
        """The least of them: 1 is sharp, below it is a violation; NaN if nothing was seen."""
        least = jnp.min(jnp.where(jnp.isnan(self.ratios), jnp.inf, self.ratios), axis=-1)
        return jnp.where(jnp.all(jnp.isnan(self.ratios), axis=-1), jnp.nan, least)


def decided(number: Array, holds: Array) -> Int[Array, "..."]:
    """The state of an assumption that rests on a number; unknown where that is."""
    return jnp.where(jnp.isnan(number), UNKNOWN, jnp.where(holds, HOLDS, FAILS))


class Evidence:
    r"""What the theorems share: the facts, what is known of the loss, the assumptions that several of them make.

    Attributes:
        facts: Of one flow.
        num_params, num_outputs: p and nk.
        weight: Of F's metric.
        smoothness, convexity: M and m; 1 where they are not known, or there is none: no bound then applies.
        lip_h, lip_dh: The largest $\\|Dh(w)\\|$ and $\\|Dh(w) - Dh(w_0)\\|/|w - w_0|$ met up to each time.
    """

    def __init__(self, facts: Measurements, loss: Loss, num_params: int, num_outputs: int, kink_share: Array) -> None:
        self.facts, self.num_params, self.num_outputs = facts, num_params, num_outputs
        self.weight = loss.weight
        self.lip_h, self.lip_dh = (jax.lax.cummax(v, axis=0) for v in (facts.path_dh_norm, facts.quotient))
        smoothness, convexity = loss.smoothness, loss.strong_convexity()
        self.convexity = convexity or 1.0
        self.smoothness = max(smoothness or 1.0, self.convexity)
        self.smooth = Assumption(
            "Dh Lipschitz", decided(kink_share, kink_share <= KINKED), (100 * kink_share,),
            "{:.0f} % of its change over random steps is no part of D2h, as at kinks",
        )  # fmt: skip
        self.square_loss = _of_loss("square loss", facts, 1.0 if isinstance(loss, SquareLoss) else 0.0, "")
        self.smooth_loss = _of_loss("R smooth", facts, smoothness, "M = {:.3g}")
        self.convex = _of_loss(
            "R strongly convex", facts, convexity, "m = {:.3g}; with 0 it has its infimum at infinity"
        )
        self.onto = Assumption(
            "Dh(w0) onto", decided(facts.sigma_min, facts.sigma_min > 0), (facts.sigma_min,),
            f"sigma_min = {{:.3g}}, {num_params} parameters, {num_outputs} outputs",
        )  # fmt: skip

    def claim(
        self, theorem: str, quantity: str, assumptions: tuple[Assumption, ...], bound: Array, measured: Array, unit: str
    ) -> Claim:
        """With the resolution that the unit of what is measured has."""
        f, rounding = self.facts, 1e2 * jnp.finfo(measured.dtype).eps
        outputs = f.path_dh_norm[0] * f.resolution + rounding * f.gradient[0] / self.smoothness
        floor = {
            "params": f.resolution / f.alpha,
            "output": outputs,
            "test": outputs if f.test_dh_norm is None else f.test_dh_norm * f.resolution,
            "loss": outputs * (jnp.sqrt(2 * self.smoothness * measured) + self.smoothness * outputs)
            + rounding * f.start_loss,
            "perturbation": 2 * f.dh_norm**2 * outputs / f.alpha + rounding * measured,
            "rounding": rounding * measured,
        }[unit]
        shape = measured.shape
        return Claim(
            theorem, quantity, assumptions, jnp.broadcast_to(bound, shape), measured, jnp.broadcast_to(floor, shape)
        )


def _of_loss(name: str, facts: Measurements, value: float | None, detail: str) -> Assumption:
    """What a loss says of itself; 0 is that it fails."""
    like = jnp.zeros_like(facts.alpha)
    if value is None:
        return Assumption(name, jnp.full(like.shape, UNKNOWN), (), "the loss does not say")
    return Assumption(name, jnp.full(like.shape, HOLDS if value > 0 else FAILS), (like + value,), detail)
