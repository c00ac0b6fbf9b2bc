"""A claim: one bound of one theorem for one flow, what it assumes, what it bounds, and what was measured.

Claims are made from `Measurements` by pure functions (`theorems.py`), for one flow or under `jax.vmap` for thousands.
"""

import enum
from functools import reduce

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Real

from lazyjax._core.show import show


class Status(enum.IntEnum):
    """The status of an assumption; as arrays hold it, a whole number.

    They are ordered: several assumptions together have the least status among them.
    """

    FAILS = 0
    UNKNOWN = 1
    HOLDS = 2

    def __str__(self) -> str:
        """Return the status as a word."""
        return self.name.lower()


def decide(number: Array, holds: Array) -> Int[Array, "..."]:
    """Return the status of an assumption that rests on a number: unknown if the number is NaN."""
    return jnp.where(jnp.isnan(number), Status.UNKNOWN, jnp.where(holds, Status.HOLDS, Status.FAILS))


class Assumption(eqx.Module):
    """A condition of a theorem, and whether it holds.

    Attributes:
        name: The condition, in words.
        state: Its status, a number of `Status` per flow.
        numbers: The numbers that the status rests on.
        detail: A format string with a place for each number.
    """

    name: str = eqx.field(static=True)
    state: Int[Array, "..."]
    numbers: tuple[Real[Array, "..."], ...]
    detail: str = eqx.field(static=True)

    @property
    def status(self) -> Status:
        """The status, for a single flow."""
        return Status(int(self.state))

    def __str__(self) -> str:
        """Show name, status and numbers."""
        return show(self, self.state, 0, self._line)

    __repr__ = __str__

    def _line(self) -> str:
        detail = self.detail.format(*(float(number) for number in self.numbers))
        return f"{self.name}: {self.status}" + (f" ({detail})" if detail else "")


class Claim(eqx.Module):
    """One bound of one theorem, next to what was measured.

    Attributes:
        theorem: Its name.
        quantity: What is bounded.
        assumptions: All have to hold. If one fails, the theorem says nothing; if one is unknown, nothing for sure.
        bound: The bound at every time.
        measured: The quantity at every time.
        resolution: The numerical error to expect of `measured`: nothing smaller is seen.
    """

    theorem: str = eqx.field(static=True)
    quantity: str = eqx.field(static=True)
    assumptions: tuple[Assumption, ...]
    bound: Float[Array, "... time"]
    measured: Float[Array, "... time"]
    resolution: Float[Array, "... time"]

    @property
    def state(self) -> Int[Array, "..."]:
        """The status of all assumptions together, a number of `Status` per flow."""
        return reduce(jnp.minimum, [assumption.state for assumption in self.assumptions])

    @property
    def status(self) -> Status:
        """The status of all assumptions together, for a single flow."""
        return Status(int(self.state))

    @property
    def applies(self) -> Bool[Array, "..."]:
        """Whether all assumptions hold."""
        return self.state == Status.HOLDS

    @property
    def violated(self) -> Bool[Array, "..."]:
        """Whether all assumptions hold, and something above the bound was measured that is no numerical error."""
        above = self.measured > self.bound * (1 + 1e3 * jnp.finfo(self.bound.dtype).eps) + self.resolution
        return self.applies & jnp.any(above, axis=-1)

    @property
    def ratios(self) -> Float[Array, "... time"]:
        """Bound over measured; NaN at the start and wherever nothing above the resolution was measured."""
        seen = (self.measured > 10 * self.resolution).at[..., 0].set(False)
        return jnp.where(seen, self.bound / jnp.where(seen, self.measured, 1), jnp.nan)

    @property
    def ratio(self) -> Float[Array, "..."]:
        """The least of the ratios: 1 is sharp, less is a violation; NaN if nothing was seen."""
        least = jnp.min(jnp.where(jnp.isnan(self.ratios), jnp.inf, self.ratios), axis=-1)
        return jnp.where(jnp.all(jnp.isnan(self.ratios), axis=-1), jnp.nan, least)

    def row(self) -> tuple[str, ...]:
        """Return theorem, quantity, status of the assumptions, bound, measured and their ratio, at its least."""
        bound, measured = np.asarray(self.bound), np.asarray(self.measured)
        doubtful = [a for a in self.assumptions if a.status is self.status and self.status is not Status.HOLDS]
        status = f"{self.status}: {doubtful[0].name}" if doubtful else "hold"
        vacuous = self.status is Status.UNKNOWN and not np.all(np.isfinite(bound))
        if self.status is Status.FAILS or vacuous:
            return (self.theorem, self.quantity, status, "-", f"{measured.max():.3g}", "-")
        ratios = np.asarray(self.ratios)
        if np.any(np.isfinite(ratios)):
            i = int(np.argmin(np.where(np.isnan(ratios), np.inf, ratios)))
            ratio = f"{ratios[i]:.3g}"
        else:
            i = int(np.argmax(measured))
            ratio = "vacuous" if np.any(np.isinf(ratios)) else "below resolution"
        mark = " VIOLATED" if bool(self.violated) else ""
        return (self.theorem, self.quantity, status, f"{bound[i]:.3g}", f"{measured[i]:.3g}", ratio + mark)

    def __str__(self) -> str:
        """Show the row of the claim and its assumptions."""
        return show(self, self.bound, 1, self._lines)

    __repr__ = __str__

    def _lines(self) -> str:
        theorem, quantity, _, bound, measured, ratio = self.row()
        head = f"theorem {theorem}, {quantity}: bound {bound}, measured {measured}, ratio {ratio}"
        return "\n".join([head, *(f"  {assumption}" for assumption in self.assumptions)])


HEAD = ("theorem", "quantity", "assumptions", "bound", "measured", "bound/measured")
"""The heads of the columns of `Claim.row`."""
