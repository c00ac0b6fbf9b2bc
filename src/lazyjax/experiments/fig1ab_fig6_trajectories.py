r"""Figures 1(a), 1(b) and 6: the units $|a_j| b_j$ of a two-layer ReLU student in the plane while it is trained.

The paper uses gradient descent with a fixed step. The exact flow is computed as well, as far as it goes: in the plane
it slides along kinks, where $b_j$ stays orthogonal to a sample, and an adaptive method stops there; the figure then
says so.
"""

import dataclasses
import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import optax
from jaxtyping import Array

from lazyjax._core.types import Params
from lazyjax.experiments.descent import descend, log_frames
from lazyjax.experiments.figure import (
    Figure,
    Number,
    check_counts,
    check_even,
    check_positive,
    check_variant,
    record,
    same_settings,
)
from lazyjax.experiments.student import check_double, risk_at, sample_problem
from lazyjax.flow.gradient_flow import gradient_flow
from lazyjax.flow.result import RESULTS
from lazyjax.losses.square import square_loss
from lazyjax.models.maps import on_data
from lazyjax.models.shallow import two_layer
from lazyjax.plot.axes import BLACK, BLUE, FONT, ORANGE, add_note, make_axes

if TYPE_CHECKING:
    import matplotlib.figure
    import xarray


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings of a figure of trajectories.

    Attributes:
        tau: Standard deviation of the start; a small one learns features, a large one is lazy.
        n: Training samples.
        width: m, units of the student.
        symmetric: Whether the start is symmetrized; m is then even.
        steps: Steps of gradient descent.
        step: eta.
        frames: Number of steps after which the units are recorded, equally spaced on a logarithmic scale.
        flow_steps: Solver steps after which the exact flow is given up.
        variant: "paper": Gaussian weights; "code": input weights of norm tau, output weights uniform in [0, tau]
            (there with tau = 0.2, width = 16, step = 0.005, steps = 100000).

    Raises:
        ValueError: One of them is out of its range.
    """

    tau: float = 0.1
    n: int = 15
    width: int = 20
    symmetric: bool = True
    steps: int = 40_000
    step: float = 0.02
    frames: int = 100
    flow_steps: int = 4096
    variant: str = "paper"

    def __post_init__(self):
        check_counts(self, n=1, width=1, steps=1, frames=2, flow_steps=1)
        check_positive(self, "tau", "step")
        check_variant(self)
        if self.symmetric:
            check_even(self, "width")


@eqx.filter_jit
def follow(settings: Settings, seed: Array) -> dict[str, Any]:
    """Follow gradient descent from the start, and the exact flow at the same times."""
    options = {"symmetric": settings.symmetric, "unit": settings.variant == "code"}
    x, y, teacher, start = sample_problem(seed, settings.n, 2, settings.width, **options)
    h, loss = on_data(two_layer(), x), square_loss(y)
    w0 = jtu.tree_map(lambda leaf: settings.tau * leaf, start)
    frames = log_frames(settings.steps, settings.frames)

    def measure(v: Params) -> dict[str, Array]:
        w = jtu.tree_map(jnp.add, w0, v)
        moved = optax.tree.norm(v) / optax.tree.norm(w0)
        units = {"unit": jnp.abs(w["a"])[:, None] * w["b"], "sign": jnp.sign(w["a"])}
        return {**units, "train_loss": loss(h(w)), "risk": risk_at(w0, v, teacher), "moved": moved}

    gradient = jax.grad(lambda w: loss(h(w)))
    _, seen = descend(lambda w, _: gradient(w), w0, optax.sgd(settings.step), frames, measure)
    times = settings.step * jnp.asarray(frames, y.dtype)
    options = {"save": ("displacement",), "max_steps": settings.flow_steps, "throw": False}
    flow = gradient_flow(h, loss, w0, times, **options)
    flow_seen = jax.vmap(measure)(flow.displacement)
    return {
        **seen,
        **{f"flow_{name}": flow_seen[name] for name in ("unit", "train_loss", "risk", "moved")},
        "initial_output": jnp.sqrt(jnp.mean(h(w0) ** 2)),
        "teacher": jnp.concatenate([jnp.abs(teacher["a"])[:, None] * teacher["b"], teacher["a"][:, None]], axis=1),
        "result": flow.result,
    }


def run(
    settings: Settings | None = None, *, seed: int = 0, folder: Path | None = None, progress: bool = False
) -> "xarray.Dataset":
    """Compute the trajectories of one student, by gradient descent and, as far as it goes, by the exact flow.

    Args:
        settings: None for those of Figure 1(a).
        seed: The seed of the teacher, the inputs and the start.
        folder: Not used: a run takes seconds.
        progress: Not used.

    Returns:
        A dataset over step: "unit" (|a_j| b_j, over j and coordinate), "sign" (of a_j), "train_loss", "risk", "moved";
        the same for the flow as "flow_...", infinite or NaN after it has stopped; "teacher" (|a*| b* and a*, over
        teacher_unit and part), "initial_output" (root mean square over samples). The attribute "flow_message" says why
        the flow stopped; it is empty if it did not.

    Raises:
        ValueError: JAX's default dtype is not float64; gradient descent diverged.

    Source:
        Chizat, Oyallon, Bach (2019), Figures 1(a), 1(b) and 6. The captions of 1(a) and 1(b) are swapped in the
        poster, see docs/sources.md.
    """
    import xarray

    del folder, progress
    check_double()
    settings = Settings() if settings is None else settings
    found = jax.device_get(follow(settings, jnp.asarray(seed)))
    result = found.pop("result")
    if not np.isfinite(found["risk"][-1]):
        msg = f"gradient descent diverged: step={settings.step} is too long at tau={settings.tau}; take a shorter one."
        raise ValueError(msg)
    dims = {"unit": ("step", "j", "coordinate"), "sign": ("step", "j"), "teacher": ("teacher_unit", "part")}
    dims |= {"flow_unit": dims["unit"], "initial_output": ()}
    data = {name: (dims.get(name, ("step",)), values) for name, values in found.items()}
    coords = {
        "step": log_frames(settings.steps, settings.frames),
        "coordinate": ["first", "second"],
        "part": ["first", "second", "a"],
    }
    message = "" if bool(result == RESULTS.successful) else str(RESULTS[result])
    variant = f"start of the {settings.variant}"
    return record(xarray.Dataset(data, coords), settings, seed, flow_message=message, variant=variant)


def numbers(data: "xarray.Dataset", settings: Settings, reference: dict[str, float]) -> list[Number]:
    """List where training ends, next to a reference for these settings and another random draw.

    Args:
        data: From `run`; if it has other settings, there is no reference.
        settings: The settings of the reference.
        reference: Name of a number to its value in the reference.
    """
    last = data.isel(step=-1)
    reference = reference if same_settings(data, settings, "frames", "flow_steps") else {}
    values = {
        "moved": ("|w - w0| / |w0|", float(last["moved"])),
        "risk": ("population loss", float(last["risk"])),
        "train_loss": ("training loss", float(last["train_loss"])),
        "initial_output": ("root mean square output at the start", float(data["initial_output"])),
    }
    rows = [
        Number(label, value, reference.get(name), "one other draw" if name in reference else "")
        for name, (label, value) in values.items()
    ]
    if data.attrs["flow_message"]:
        reached = int(np.isfinite(data["flow_train_loss"]).sum())
        label = f"frames of {data.sizes['step']} that the exact flow reached before it stopped"
        why = data.attrs["flow_message"].split(":")[0].lower()
        return [*rows, Number(label, float(reached), None, f"descent is drawn; the flow: {why}")]
    gap = float(abs(data["flow_unit"] - data["unit"]).max() / abs(data["unit"]).max())
    return [*rows, Number("largest distance of units, descent to flow, relative", gap)]


def draw(data: "xarray.Dataset") -> "matplotlib.figure.Figure":
    """Draw the paths $|a_j(t)| b_j(t)$ and their ends, colored by the sign of $a_j$, and the teacher."""
    figure, (ax,) = make_axes(1)
    figure.set_size_inches(3.5, 4.2)  # a square panel
    units, signs = np.asarray(data["unit"]), np.asarray(data["sign"])
    for sign, color, marker, label in ((1, BLUE, "o", "$a_j>0$"), (-1, ORANGE, "s", "$a_j<0$")):
        chosen = signs[-1] == sign
        ax.plot(units[:, chosen, 0], units[:, chosen, 1], color=color, linewidth=0.8, alpha=0.7)
        style = {"color": color, "markersize": 3.5, "linestyle": "none", "marker": marker}
        ax.plot(units[-1, chosen, 0], units[-1, chosen, 1], label=f"student, {label}", **style)
    turn = np.linspace(0, 2 * np.pi, 200)
    ax.plot(np.cos(turn), np.sin(turn), color=BLACK, linewidth=0.8, linestyle=":", label="unit circle")
    _draw_teacher(ax, np.asarray(data["teacher"]))
    reach = 1.1 * max(1.0, float(np.abs(units).max()))
    ax.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal")
    ax.set_xlabel("first coordinate", fontsize=FONT + 1)
    ax.set_ylabel("second coordinate", fontsize=FONT + 1)
    ax.legend(
        loc="lower center",
        bbox_to_anchor=(0.5, 1.0),
        ncols=2,
        fontsize=FONT,
        frameon=False,
        handlelength=1.5,
        columnspacing=1.2,
        borderaxespad=0.2,
    )
    message = data.attrs["flow_message"]
    if message:
        why = "slides along kinks and stops" if "collapsed" in message else "stopped early"
        add_note(ax, f"gradient descent; the exact flow {why}")
    return figure


def _draw_teacher(ax: Any, teacher: np.ndarray) -> None:
    """Draw arrows to $|a^*_j| b^*_j$, dashed if $a^*_j < 0$; a row holds both coordinates and $a^*_j$."""
    for x, y, sign in teacher:
        style = {"arrowstyle": "-|>", "color": BLACK, "linewidth": 1.4, "linestyle": "-" if sign > 0 else "--"}
        ax.annotate("", (x, y), (0, 0), arrowprops=style, zorder=4)
    for sign, dashes in ((1, "-"), (-1, "--")):
        if (teacher[:, 2] == sign).any():
            name = "$a^*_j>0$" if sign > 0 else "$a^*_j<0$"
            ax.plot([], [], color=BLACK, linewidth=1.4, linestyle=dashes, label=f"teacher, {name}")


def _figure(title: str, settings: Settings, **reference: float) -> Figure:
    """Return the figure of some settings: small with fewer units and steps, or with the steps of the paper's code."""
    small = dataclasses.replace(
        settings, n=min(settings.n, 60), width=min(settings.width, 60), steps=2000, frames=40, flow_steps=512
    )
    presets = {"small": small, "default": settings, "paper": dataclasses.replace(settings, steps=100_000)}
    rows = functools.partial(numbers, settings=settings, reference=reference)
    return Figure(title=title, presets=presets, run=run, numbers=rows, draw=draw)


FEATURES, LAZY = Settings(), Settings(tau=2.0, step=0.002)
FIGURE_1A = _figure("units of a student with tau = 0.1, not lazy", FEATURES, moved=1.99)
FIGURE_1B = _figure("units of a student with tau = 2, lazy", LAZY, moved=0.014)
FIGURE_6A = _figure(
    "200 units, tau = 0.1, not lazy", dataclasses.replace(FEATURES, n=200, width=200), moved=0.590, risk=2.6e-5
)
FIGURE_6B = _figure(
    "200 units, tau = 2, start not symmetrized",
    dataclasses.replace(LAZY, n=200, width=200, symmetric=False),
    moved=0.117,
    risk=1.3e-3,
    initial_output=82.0,
)
FIGURE_6C = _figure(
    "200 units, tau = 2, start symmetrized: lazy",
    dataclasses.replace(LAZY, n=200, width=200),
    moved=0.00214,
    risk=4.6e-5,
)
