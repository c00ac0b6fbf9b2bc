r"""Figures 1(a), 1(b) and 6: the units $|a_j| b_j$ of a two-layer ReLU student in the plane, while it is trained.

The paper's engine is gradient descent with a fixed step. The exact flow is tried beside it: in the plane it slides
along kinks, b_j orthogonal to a sample for a while, where an adaptive method stops; the figure then says so.
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
from lazyjax.experiments.student import check_double, draw, risk_at
from lazyjax.flow.gradient_flow import gradient_flow
from lazyjax.flow.result import RESULTS
from lazyjax.losses.losses import square_loss
from lazyjax.models.shallow import two_layer

if TYPE_CHECKING:
    import xarray


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a figure of trajectories is computed from.

    Attributes:
        tau: Standard deviation of the start; small learns features, large is lazy.
        n: Training samples.
        width: m, units of the student.
        symmetric: Whether the second half of the start mirrors the first; m is then even.
        steps: Steps of gradient descent.
        step: eta.
        frames: Steps at which units are looked at, equally spaced on a logarithmic scale.
        flow_steps: Solver steps after which the exact flow is given up.
        variant: "paper": Gaussian weights; "code": input weights of norm tau, output weights uniform in [0, tau]
            (there with tau = 0.2, width = 16, step = 0.005, steps = 100000).

    Raises:
        ValueError: one of them out of its range.
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


def presets(reference: Settings) -> dict[str, Settings]:
    """A figure's settings by size: fewer steps of fewer units, or as many steps as the paper's code takes."""
    small = dataclasses.replace(
        reference, n=min(reference.n, 60), width=min(reference.width, 60), steps=2000, frames=40, flow_steps=512
    )
    return {"small": small, "default": reference, "paper": dataclasses.replace(reference, steps=100_000)}


@eqx.filter_jit
def follow(settings: Settings, seed: Array) -> dict[str, Any]:
    """Gradient descent from the start, and the exact flow at the same times."""
    options = {"symmetric": settings.symmetric, "unit": settings.variant == "code"}
    x, y, teacher, start = draw(seed, settings.n, 2, settings.width, **options)
    f, loss = two_layer(), square_loss(y)
    w0 = jtu.tree_map(lambda leaf: settings.tau * leaf, start)
    frames = log_frames(settings.steps, settings.frames)

    def measure(v: Params) -> dict[str, Array]:
        w = jtu.tree_map(jnp.add, w0, v)
        moved = optax.tree.norm(v) / optax.tree.norm(w0)
        units = {"unit": jnp.abs(w["a"])[:, None] * w["b"], "sign": jnp.sign(w["a"])}
        return {**units, "train_loss": loss(f(w, x)), "risk": risk_at(w0, v, teacher), "moved": moved}

    gradient = jax.grad(lambda w: loss(f(w, x)))
    _, seen = descend(lambda w, _: gradient(w), w0, optax.sgd(settings.step), frames, measure)
    times = settings.step * jnp.asarray(frames, y.dtype)
    options = {"save": ("displacement",), "max_steps": settings.flow_steps, "throw": False}
    flow = gradient_flow(functools.partial(f, x=x), loss, w0, times, **options)
    beside = jax.vmap(measure)(flow.displacement)
    return {
        **seen,
        **{f"flow_{name}": beside[name] for name in ("unit", "train_loss", "risk", "moved")},
        "initial_output": jnp.sqrt(jnp.mean(f(w0, x) ** 2)),
        "teacher": jnp.concatenate([jnp.abs(teacher["a"])[:, None] * teacher["b"], teacher["a"][:, None]], axis=1),
        "result": flow.result,
    }


def run(
    settings: Settings | None = None, *, seed: int = 0, folder: Path | None = None, progress: bool = False
) -> "xarray.Dataset":
    """Trajectories of one student, by gradient descent and, as far as it goes, by the exact flow.

    Args:
        settings: None for those of Figure 1(a).
        seed: Of the teacher, the inputs and the start.
        folder: Not used: a run takes seconds.
        progress: Not used.

    Returns:
        A dataset over step: "unit" (|a_j| b_j, over unit and coordinate), "sign" (of a_j), "train_loss", "risk",
        "moved"; the same of the flow as "flow_...", infinite or NaN once it has stopped; "teacher" (|a*| b* and a*,
        over teacher_unit and part), "initial_output" (root mean square over samples). In the attributes
        "flow_message": why the flow stopped, empty where it did not.

    Raises:
        ValueError: JAX's default dtype is not float64; gradient descent diverged.

    Source:
        Chizat, Oyallon, Bach (2019), Figures 1(a), 1(b) and 6, whose captions in the poster are swapped.
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
    return record(
        xarray.Dataset(data, coords), settings, seed, flow_message=message, variant=f"start of the {settings.variant}"
    )


def numbers(data: "xarray.Dataset", of: Settings, reference: dict[str, float]) -> list[Number]:
    """Where training ends, beside a reference of the settings `of` but other random draws, if these are the run's."""
    last = data.isel(step=-1)
    reference = reference if same_settings(data, of, "frames", "flow_steps") else {}
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
        rows.append(
            Number(
                label,
                float(reached),
                None,
                f"descent is drawn; the flow: {data.attrs['flow_message'].split(':')[0].lower()}",
            )
        )
    else:
        gap = float(abs(data["flow_unit"] - data["unit"]).max() / abs(data["unit"]).max())
        rows.append(Number("largest distance of units, descent to flow, relative", gap))
    return rows


def _figure(title: str, settings: Settings, **reference: float) -> Figure:
    return Figure(title, presets(settings), run, functools.partial(numbers, of=settings, reference=reference))


LAZY = Settings(tau=2.0, step=0.002)
FIGURE_1A = _figure("units of a student with tau = 0.1, not lazy", Settings(), moved=1.99)
FIGURE_1B = _figure("units of a student with tau = 2, lazy", LAZY, moved=0.014)
FIGURE_6A = _figure("200 units, tau = 0.1, not lazy", Settings(n=200, width=200), moved=0.590, risk=2.6e-5)
FIGURE_6B = _figure(
    "200 units, tau = 2, start not symmetrized",
    dataclasses.replace(LAZY, n=200, width=200, symmetric=False),
    moved=0.117, risk=1.3e-3, initial_output=82.0,
)  # fmt: skip
FIGURE_6C = _figure(
    "200 units, tau = 2, start symmetrized: lazy",
    dataclasses.replace(LAZY, n=200, width=200),
    moved=0.00214, risk=4.6e-5,
)  # fmt: skip
