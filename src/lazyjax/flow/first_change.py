"""What happens first in a step with the gates held: that it reaches its end, or that a gate leaves its mode.

A few looks at the field decide, all in one loop, so that its program is compiled once.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Bool, Float, Int

from lazyjax._core.trees import tree_norm
from lazyjax._core.types import Params
from lazyjax.flow.gated_field import OFF, ON, SLIDING, Pattern

LATE = 0.05
"""Share of the tolerance by which gates that are not turned where they cross may be wrong at the end of a step."""

PASSED_ERROR = 0.3
"""Share of the tolerance by which gates that are passed, their jumps lasting from where they cross, may be wrong."""

BEFORE = 0.02
"""How far before a gate that the flow cannot pass a step ends that passes others."""

MOST_SHORTENING = 0.25
"""The least share of a part of a step that is tried next."""

DIP_POINTS = 7
"""Points inside a step at which the margins of gates are interpolated."""

MOST_LOOKS = 40
"""Most looks in one step."""


class Look(NamedTuple):
    """The view from a point, with a pattern.

    Attributes:
        margins: How far every gate is from leaving its mode, in units of what counts as zero: below -1 it has left.
        slopes: Their slopes by time; zero for gates that slide.
        gates: The gate values.
        values: The switching values.
        velocity: u'.
        correction: What leads back onto the surfaces of the gates that slide.
    """

    margins: Float[Array, " s"]
    slopes: Float[Array, " s"]
    gates: Float[Array, " s"]
    values: Float[Array, " s"]
    velocity: Params
    correction: Params


END, PROBE, LATER, PARTS, HALF, HALF_PARTS, PASSED, SEARCH, TURN, LAST, AIM, DONE = range(12)
"""What the next look of a step is at: its end; a point inside it where a gate seems to have left its mode; its end with
the gates turned that it has crossed; there with each turned in part, by the part of the step after it; half way with
them held; half way with them turned in part; where that leads, with them turned; where the first gate leaves its mode;
there with that gate turned; there with it sliding; where `_aim` will say; nothing more."""


class Search(NamedTuple):
    """The search for what happens first in a step.

    Attributes:
        phase: What the next look is at.
        share: Of the step, where.
        pattern: With what pattern.
        low: A share up to which no gate leaves its mode.
        high: A share at which one has.
        at_low: Margins and slopes there.
        at_high: What is seen there.
        level: The margins at which gates count as leaving: 0, but -1 for those on their surface, and less for those
            farther out that are on their way back.
        gone: The gates that have left their modes at the end of the step, or of the part of it that is looked at.
        roots: At what share of that each of them has, by the cubics through its ends; 1 for the others.
        end: The velocity there.
        turned: The velocity there with those gates turned.
        jump: By how much they change the velocity, each for its part of the step.
        half: The velocity half way, the gates held.
        error: An estimate of the error of the step that passing them adds.
        shift: By how much they change where the step ends.
        look: What was seen last.
        looks: How many there were.
    """

    phase: Int[Array, ""]
    share: Array
    pattern: Pattern
    low: Array
    high: Array
    at_low: tuple[Array, Array]
    at_high: Look
    level: Float[Array, " s"]
    gone: Bool[Array, " s"]
    roots: Float[Array, " s"]
    end: Params
    turned: Params
    jump: Params
    half: Params
    error: Array
    shift: Params
    look: Look
    looks: Int[Array, ""]


@dataclasses.dataclass(frozen=True)
class FirstChange:
    """A step, and how it is looked at.

    Attributes:
        look: What is seen at a point with a pattern.
        at: Where the step is at a share of it.
        end: Where it ends.
        before: The pattern with which it was taken.
        seen: What was seen at its start.
        length: Its length.
        tolerance: The tolerance of its end, a norm.
        sharpness: The share of it to which a change is located.
    """

    look: Callable[[Params, Pattern], Look]
    at: Callable[[Array], Params]
    end: Params
    before: Pattern
    seen: Look
    length: Array
    tolerance: Array
    sharpness: Array

    def find(self, wanted: Bool[Array, ""]) -> Search:
        """Return at what share the step ends, the pattern from there on, and what is seen there, if that is wanted."""
        one = jnp.ones_like(self.length)
        margins, slopes = self.seen.margins, self.seen.slopes
        on_surface = jnp.where(slopes > 0, jnp.minimum(margins - 1, -1), -one)
        start = Search(
            phase=jnp.where(wanted, END, DONE),
            share=one,
            pattern=self.before,
            low=0 * one,
            high=one,
            at_low=(margins, slopes),
            at_high=self.seen,
            level=jnp.where(margins > 0, 0, on_surface),
            gone=jnp.zeros_like(self.before.sliding),
            roots=jnp.ones_like(margins),
            end=self.seen.velocity,
            turned=self.seen.velocity,
            jump=self.seen.velocity,
            half=self.seen.velocity,
            error=0 * one,
            shift=jtu.tree_map(jnp.zeros_like, self.end),
            look=self.seen,
            looks=jnp.asarray(0),
        )
        return jax.lax.while_loop(lambda c: c.phase < DONE, self._turn, start)

    def _turn(self, c: Search) -> Search:
        """Look once, and say where to look next."""
        u = jtu.tree_map(lambda a, b: jnp.where(c.share >= 1, a, b), self.end, self.at(c.share))
        u = jtu.tree_map(jnp.add, u, c.shift)
        c = c._replace(look=self.look(u, c.pattern), looks=c.looks + 1)
        following = (
            self._after_end,
            self._after_probe,
            self._after_late,
            self._after_parts,
            self._after_half,
            self._after_half_parts,
            self._after_passed,
            self._after_search,
            self._after_turn,
            self._after_last,
        )
        c = jax.lax.switch(c.phase, following, c)
        return jax.lax.cond(c.phase == AIM, self._aim, lambda c: c, c)

    def _after_end(self, c: Search) -> Search:
        """Look inside if the cubics through both ends say that a gate leaves its mode there and comes back."""
        c = c._replace(end=c.look.velocity, high=c.share, at_high=c.look, gone=self._gone(c.look, c))
        shares = jnp.linspace(0, 1, DIP_POINTS + 2, dtype=c.share.dtype)[1:-1]
        limit = jnp.minimum(-1, c.level)
        a, slope_a = c.at_low
        b, slope_b = c.look.margins, c.look.slopes
        slopes = c.share * self.length * slope_a, c.share * self.length * slope_b
        dips = jax.vmap(lambda x: (cubic(x, a, b, *slopes) < limit) & ~c.pattern.sliding & ~c.gone)(shares)
        share = jnp.min(jnp.where(jnp.any(dips, axis=1), shares, 1))
        return _choose(share < 1, c._replace(phase=jnp.asarray(PROBE), share=share * c.share), self._judge_end(c))

    def _after_probe(self, c: Search) -> Search:
        """Search before this point, if a gate has left its mode there; else go on as after the end."""
        gone = self._gone(c.look, c)
        found = _aim(c._replace(high=c.share, at_high=c.look, gone=gone))
        at_end = c._replace(look=c.at_high, share=c.high)
        return _choose(jnp.any(gone), found, self._judge_end(at_end))

    def _gone(self, look: Look, c: Search) -> Array:
        return look.margins < jnp.minimum(-1, c.level)

    def _judge_end(self, c: Search) -> Search:
        """A step that no gate leaves its mode in stands; else the gates that it has crossed are turned at its end."""
        broken = c.gone
        let_go = broken & c.pattern.sliding
        c = c._replace(roots=jax.lax.cond(jnp.any(broken), self._roots, lambda c: c.roots, c))
        late = c._replace(phase=jnp.asarray(LATER), pattern=c.pattern.with_modes(broken, _other(c.pattern)))
        return _choose(jnp.any(broken), _choose(jnp.any(let_go), self._shorter(c, let_go, 1.0), late), _done(c))

    def _after_late(self, c: Search) -> Search:
        """The step stands if turning gates at its end changes little, and the field takes them the way they went.

        Where it changes more, they are passed: each one's jump of the field lasts from where it crosses.
        """
        change = jtu.tree_map(jnp.subtract, c.look.velocity, c.end)
        small = c.share * self.length * tree_norm(change) <= LATE * self.tolerance
        held = c.gone & (c.look.slopes < 0)
        passing = c._replace(phase=jnp.asarray(PARTS), turned=c.look.velocity, pattern=self._parts(c))
        return _choose(jnp.any(held), self._shorter(c, held, 1.0), _choose(small, _done(c), passing))

    def _shorter(self, c: Search, held: Array, ratio: Array | float) -> Search:
        """Look at the end of a shorter part of the step, before the first gate that is held, if several cross there.

        Else search for the first one.
        """
        back = c._replace(pattern=self.before, shift=jtu.tree_map(jnp.zeros_like, c.shift))
        # At the end of a shorter part fewer may be held.
        before = jnp.maximum((1 - BEFORE) * jnp.min(jnp.where(held, c.roots, jnp.inf)), MOST_SHORTENING)
        ratio = jnp.minimum(ratio, before)
        several = jnp.sum(c.gone & ~back.pattern.sliding & (c.roots < ratio)) > 1
        again = several & (c.looks < MOST_LOOKS // 2)
        return _choose(again, back._replace(phase=jnp.asarray(END), share=ratio * c.share), _aim(back))

    def _roots(self, c: Search) -> Array:
        """Return the shares of the bracket at which gates leave their modes; 1 for those that do not.

        For gates that are off or on of the cubic through values and slopes at both ends; for those that slide, of the
        secant: to leave a surface late costs an error of second order only.
        """
        width = (c.high - c.low) * self.length
        a, b = jnp.maximum(c.at_low[0] - c.level, 0), c.at_high.margins - c.level
        slopes = [jnp.where(c.pattern.sliding, b - a, width * s) for s in (c.at_low[1], c.at_high.slopes)]
        return jnp.where(c.gone & (b < 0), cubic_root(a, b, *slopes), 1)

    def _after_parts(self, c: Search) -> Search:
        """Keep the jumps of the field at the end, and look half way."""
        jump = jtu.tree_map(jnp.subtract, c.look.velocity, c.end)
        return c._replace(phase=jnp.asarray(HALF), jump=jump, share=0.5 * c.share, pattern=self.before)

    def _after_half(self, c: Search) -> Search:
        """Look there once more, with the gates turned in part."""
        return c._replace(phase=jnp.asarray(HALF_PARTS), half=c.look.velocity, pattern=self._parts(c))

    def _after_half_parts(self, c: Search) -> Search:
        """Shift the end of the step by the jumps of the field, each times how long it lasts.

        Jumps change along the step: what they are at its end and half way tells by how much.
        """
        length = c.high * self.length
        jump = jtu.tree_map(jnp.subtract, c.look.velocity, c.half)
        shift = jtu.tree_map(lambda a, b: (0.5 * length * (a + b)).astype(a.dtype), jump, c.jump)
        error = 0.5 * length * tree_norm(jtu.tree_map(jnp.subtract, jump, c.jump))
        turned = self.before.with_modes(c.gone, _other(self.before))
        return c._replace(phase=jnp.asarray(PASSED), share=c.high, pattern=turned, shift=shift, error=error)

    def _parts(self, c: Search) -> Pattern:
        """Return the pattern with the gates that the step crosses turned in part."""
        modes = jnp.where(c.gone, _other(self.before), self.before.modes)
        part = jnp.where(modes == ON, 1 - c.roots, c.roots)
        return Pattern(modes, jnp.where(c.gone, part, self.before.gates))

    def _after_passed(self, c: Search) -> Search:
        """The step stands if what is left, of second order in its length, is little; else a shorter part is tried."""
        left = jtu.tree_map(jnp.subtract, c.look.velocity, c.turned)
        error = c.error + 0.5 * c.share * self.length * tree_norm(left)
        held = c.gone & (c.look.slopes < 0)
        strays = jnp.any(self._gone(c.look, c) & ~c.pattern.sliding)
        stands = ~jnp.any(held) & ~strays & (error <= PASSED_ERROR * self.tolerance)
        ratio = 0.9 * jnp.sqrt(PASSED_ERROR * self.tolerance / jnp.where(error > 0, error, 1))
        return _choose(stands, _done(c), self._shorter(c, held, jnp.clip(ratio, MOST_SHORTENING, 0.8)))

    def _after_search(self, c: Search) -> Search:
        """The bracket comes in from one side."""
        left = jnp.any(c.gone & (c.look.margins < c.level))
        after = c._replace(high=c.share, at_high=c.look)
        before = c._replace(low=c.share, at_low=(c.look.margins, c.look.slopes))
        return _aim(_choose(left, after, before))

    def _aim(self, c: Search) -> Search:
        """Look at the first root of what is known; or turn the gate whose root it is, where that has been found."""
        sliding = c.pattern.sliding
        roots = jnp.where(c.gone & (c.at_high.margins < c.level), self._roots(c), 2)
        first = jnp.argmin(roots)
        root = c.low + (c.high - c.low) * roots[first]
        sharp = jnp.where(sliding[first], jnp.sqrt(self.sharpness), self.sharpness)
        found = (c.high - root <= sharp) | (c.looks >= MOST_LOOKS)
        # Halves now and then, so that both ends come in whatever the slopes say.
        halve = c.looks % jnp.where(sliding[first], 3, 6) == 0
        middle = 0.5 * (c.low + c.high)
        share = jnp.where(halve, middle, jnp.minimum(root + 0.5 * sharp, 0.5 * (root + c.high)))
        # One gate at a time: which of several leaves may depend on what the first one does.
        leaving = jnp.arange(sliding.size) == first
        ends = jnp.where(sliding, jnp.where(c.at_high.gates > 0.5, ON, OFF), _other(c.pattern))
        settled = Pattern(c.pattern.modes, jnp.where(sliding, jnp.clip(c.at_high.gates, 0, 1), c.pattern.gates))
        turn = c._replace(phase=jnp.asarray(TURN), share=c.high, pattern=settled.with_modes(leaving, ends))
        return _choose(found, turn, c._replace(phase=jnp.asarray(SEARCH), share=share))

    def _after_turn(self, c: Search) -> Search:
        """A gate that the field leads back from where it went slides."""
        turned = (c.pattern.modes != self.before.modes) & ~self.before.sliding
        back = turned & (c.look.slopes < 0)
        slid = c.pattern.with_modes(back, jnp.full_like(c.pattern.modes, SLIDING))
        return _choose(jnp.any(back), c._replace(phase=jnp.asarray(LAST), pattern=slid), _done(c))

    def _after_last(self, c: Search) -> Search:
        """A gate that cannot be held, because both sides lead it the same way, goes there."""
        new = c.pattern.sliding & ~self.before.sliding
        over, under = new & (c.look.gates > 1), new & (c.look.gates < 0)
        lost = (over | under) & (c.looks < MOST_LOOKS)
        pattern = c.pattern.with_modes(lost, jnp.where(over, ON, OFF))
        return _choose(jnp.any(lost), c._replace(pattern=pattern), _done(c))


def _other(pattern: Pattern) -> Array:
    return jnp.where(pattern.modes == ON, OFF, ON)


def _aim(c: Search) -> Search:
    return c._replace(phase=jnp.asarray(AIM))


def _done(c: Search) -> Search:
    return c._replace(phase=jnp.asarray(DONE))


def _choose(pred: Array, one: Any, other: Any) -> Any:
    return jtu.tree_map(lambda a, b: jnp.where(pred, a, b), one, other)


def cubic(x: Array, a: Array, b: Array, slope_a: Array, slope_b: Array) -> Array:
    """Return the cubic with these values and slopes at 0 and 1."""
    c2 = 3 * (b - a) - 2 * slope_a - slope_b
    c3 = slope_a + slope_b - 2 * (b - a)
    return a + x * (slope_a + x * (c2 + x * c3))


def cubic_root(a: Array, b: Array, slope_a: Array, slope_b: Array) -> Array:
    """Return where the cubic with these values and slopes at 0 and 1 is zero, for a >= 0 > b; entry by entry."""
    a, slope_a, slope_b = (jnp.where(jnp.isfinite(x), x, 0) for x in (a, slope_a, slope_b))
    b = jnp.where(jnp.isfinite(b), b, -1)

    def turn(_: Any, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = ends
        middle = 0.5 * (low + high)
        positive = cubic(middle, a, b, slope_a, slope_b) > 0
        return jnp.where(positive, middle, low), jnp.where(positive, high, middle)

    low, high = jax.lax.fori_loop(0, 10, turn, (jnp.zeros_like(a), jnp.ones_like(a)))
    # From here Newton's method, kept inside.
    x = 0.5 * (low + high)
    for _ in range(4):
        value, slope = jax.jvp(lambda x: cubic(x, a, b, slope_a, slope_b), (x,), (jnp.ones_like(x),))
        x = jnp.clip(x - jnp.where(slope < 0, value / jnp.where(slope < 0, slope, 1), 0), low, high)
    return x
