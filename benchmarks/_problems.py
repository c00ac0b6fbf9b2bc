"""The flows that `flows.py` times: two-layer nets that learn a teacher, and a small net on digits; who runs what.

Every model is centered at its start, every array float64, the key of every case fixed.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu

import lazyjax as lj
from lazyjax.data.datasets import digits
from lazyjax.models.maps import OnData, on_data

TAU = 2.0
"""Initial scale of W1, W2, W3: with it Tsit5 takes the 8 to 9 thousand steps of the design to T = 1e4 at alpha = 1 on
W1 (894 steps to T = 1e3; with tau = 1 only 576)."""

FEATURES = 0.1
"""Initial scale of feature learning, W6."""


RACES = {
    "W1": ("ours", "flow", "auto"),
    "W2": ("ours", "flow", "auto"),
    "W3": ("ours", "flow", "auto"),
    "W4": ("auto",),
    "W4b": ("auto", "flow_Tsit5"),
    "W6": ("auto", "flow_Tsit5"),
    "explicit_wins": ("ours", "auto"),
}
"""What of ours runs against the peers: the prepared solve, `gradient_flow` as a user calls it (all counted) with the
solver named or chosen, and, where the choice should fall on an explicit method, that method on the library's field."""
TARGETS = {
    "W1": {"solve": (200, 500, 500), "counted": 100},
    "W2": {"solve": (30, 300), "counted": 20},
    "W3": {"solve": (100, 250, 400), "counted": 20},
    "W4": {"auto": 20},
    "W4b": {"auto": 1},
    "W5": {"solve": 300},
    "W6": {"auto": 0.8},
}
"""Ratios wanted, by output scale where there are several."""


class Problem(eqx.Module):
    """A network f(w, x), its start, inputs and loss; the model that is followed is f centered at the start."""

    f: Callable[..., jax.Array]
    w0: Any
    x: jax.Array
    loss: Any
    smooth: bool = eqx.field(static=True, default=True)

    @property
    def h(self) -> OnData:
        """The centered model as a function of the parameters alone."""
        return on_data(lj.center(self.f, self.w0), self.x)

    @property
    def num_params(self) -> int:
        """Number of coordinates of the flow."""
        return sum(leaf.size for leaf in jtu.tree_leaves(self.w0))


class Case(NamedTuple):
    """One flow to time: y(horizon) of a problem at one output scale."""

    label: str
    problem: Problem
    alpha: float | jax.Array
    horizon: float


class Size(NamedTuple):
    """How large the problems are."""

    few: int
    many: int
    d: int
    width: int
    digits: int
    hidden: tuple[int, ...]
    rank: int
    wide: tuple[int, int]
    longest: float
    alphas: int | None


SIZES = {
    "full": Size(200, 1000, 100, 50, 256, (64, 64), 256, (2000, 963), float("inf"), None),
    "smoke": Size(8, 12, 4, 6, 20, (4,), 64, (20, 6), 20.0, 1),
}


def two_layer(
    activation: Callable[[jax.Array], jax.Array], n: int, d: int, width: int, *, tau: float, seed: int = 0
) -> Problem:
    """Draw inputs uniform on the unit sphere, targets of three neurons with |a_j b_j| = 1, start N(0, tau^2).

    The seed is that of the start; inputs and teacher are always the same.
    """
    key_x, key_teacher = jr.split(jr.key(0))
    x, b = unit_rows(key_x, n, d), unit_rows(key_teacher, 3, d)
    f = lj.models.two_layer(activation)
    loss = lj.square_loss(f({"a": jnp.array([1.0, -1.0, 1.0]), "b": b}, x))
    w0 = lj.models.two_layer().init(jr.key(seed + 1), d=d, width=width, tau=tau)
    return Problem(f, w0, x, loss, smooth=activation is not jax.nn.relu)


def unit_rows(key: jax.Array, n: int, d: int) -> jax.Array:
    x = jr.normal(key, (n, d))
    return x / jnp.linalg.norm(x, axis=1, keepdims=True)


def digits_net(n: int, hidden: tuple[int, ...], *, classify: bool) -> Problem:
    """Return the network that `lazyjax report` trains by default, on digits: cross-entropy, or squares of labels."""
    data = digits(n)
    loss = lj.softmax_cross_entropy(data.y) if classify else lj.square_loss(jnp.eye(10)[data.y])
    return Problem(lj.models.mlp(jnp.tanh), lj.models.mlp().init(jr.key(0), (64, *hidden, 10), gain=0.5), data.x, loss)


def wide_net(n: int, width: int) -> Problem:
    """Make two hidden layers on random inputs with ten outputs: too many outputs for a matrix of them squared."""
    key_w, key_x, key_y = jr.split(jr.key(0), 3)
    w0 = lj.models.mlp().init(key_w, (64, width, width, 10), gain=0.5)
    return Problem(lj.models.mlp(jnp.tanh), w0, jr.normal(key_x, (n, 64)), lj.square_loss(jr.normal(key_y, (n, 10))))


def cases(work: str, size: Size) -> list[Case]:
    """Return the flows of a work, its first few output scales only where the size says so."""
    make = {
        "W1": lambda: _by_alpha(_tanh(size, size.few, TAU), {1.0: 1e4, 100.0: 1e4, 1e6: 1e4}),
        "W2": lambda: _by_alpha(_relu(size, size.many, TAU), {1.0: 1e3, 100.0: 1e3}),
        "W3": lambda: _by_alpha(_tanh(size, size.many, TAU), {1.0: 1e4, 100.0: 1e4, 1e6: 1e4}),
        "W4": lambda: _by_alpha(digits_net(size.digits, size.hidden, classify=False), {1.0: 1e4, 100.0: 1e4}),
        # Times by which Tsit5 (rtol 1e-4) has brought the loss down to 1e-3.
        "W4b": lambda: _by_alpha(digits_net(size.digits, size.hidden, classify=True), {1.0: 560.0, 100.0: 3.3e4}),
        "W6": lambda: [
            Case("tanh", _tanh(size, size.few, FEATURES), 1.0, 1e4),
            Case("relu", _relu(size, size.many, FEATURES), 1.0, 1e3),
        ],
        "explicit_wins": lambda: [
            Case(f"T={t:g}", _tanh(size, size.few, TAU), 1.0, t) for t in (1.0, 10.0, 100.0, 1000.0)
        ],
    }
    return [case._replace(horizon=min(case.horizon, size.longest)) for case in make[work]()[: size.alphas]]


def _by_alpha(problem: Problem, horizons: dict[float, float]) -> list[Case]:
    return [Case(f"alpha={alpha:g}", problem, alpha, horizon) for alpha, horizon in horizons.items()]


def _tanh(size: Size, n: int, tau: float) -> Problem:
    return two_layer(jnp.tanh, n, size.d, size.width, tau=tau)


def _relu(size: Size, n: int, tau: float) -> Problem:
    return two_layer(jax.nn.relu, n, size.d, size.width, tau=tau)
