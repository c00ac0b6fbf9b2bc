r"""Figure 3(b) and the poster's table: wide deep networks, linearized (alpha = 1e7) against standard (alpha = 1).

The loss is cross-entropy over alpha^2 without augmentation, and each regime has its own rate, as in the paper.
"""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from lazyjax.experiments import deep
from lazyjax.experiments.figure import Figure, Number, check_counts, check_positive, record
from lazyjax.flow.result import RESULTS
from lazyjax.plot.axes import BLACK, BLUE, FONT, ORANGE, draw_legend, make_axes
from lazyjax.training.arguments import TrainingOptions
from lazyjax.training.train import train

if TYPE_CHECKING:
    import matplotlib.figure
    import xarray

REGIMES = ("standard", "linearized")
PARTS = (("train", "training", BLUE), ("test", "test", ORANGE))
"""Both sets of images: name, label and color."""

REFERENCE = {
    ("vgg11", "standard"): (99.9, 89.7),
    ("vgg11", "linearized"): (61.0, 61.7),
    ("resnet18", "standard"): (99.4, 91.0),
    ("resnet18", "linearized"): (55.0, 56.7),
}
"""The poster's table (see docs/sources.md): training and test accuracy in percent on CIFAR-10, of nets 8 (VGG) and 7
times (ResNet) wider."""

LINEAR_METHODS = {"prior features": 82.3, "random features": 84.2}
"""Test accuracies in percent of linear methods, as the poster gives them (Oyallon et al.; Recht et al.)."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings of the figure.

    Attributes:
        data: "digits", "fashion-mnist" or "cifar10".
        networks: "vgg11", "resnet18" or both.
        widths: Factors of their channels.
        gains: Factors of their Xavier weights.
        train: Training images; 0 for all.
        test: Test images; 0 for all.
        lazy_alpha: Output scale of the linearized networks.
        seeds: Number of starts and orders of batches.
        epochs: Number of passes through the data.
        batch: Images in a batch.
        step: Rate of the standard networks, on the mean cross-entropy as in the paper.
        lazy_step: Rate of the linearized ones.
        decay: beta in the rate eta0/(1 + beta t) of epoch t.
        momentum: Momentum of SGD.

    Raises:
        ValueError: One of them is out of its range, or there is no such data set or network.
    """

    data: str = "fashion-mnist"
    networks: tuple[str, ...] = ("vgg11", "resnet18")
    widths: tuple[float, ...] = (1 / 8, 1 / 16)
    gains: tuple[float, ...] = (1.3, 1.2)
    train: int = 2000
    test: int = 1000
    lazy_alpha: float = 1e7
    seeds: int = 1
    epochs: int = 12
    batch: int = 32
    step: float = 0.01
    lazy_step: float = 0.01
    decay: float = 1 / 3
    momentum: float = 0.9

    def __post_init__(self):
        check_counts(self, train=0, test=0, seeds=1, epochs=1, batch=1)
        check_positive(self, "step", "lazy_step")
        deep.check_images(self, *self.networks)
        deep.check_momentum(self)
        if not self.lazy_alpha > 0:
            msg = f"lazy_alpha must be a scale in (0, inf], got {self.lazy_alpha!r}."
            raise ValueError(msg)
        for name in ("widths", "gains"):
            if any(not 0 < value < np.inf for value in getattr(self, name)):
                msg = f"{name} must be positive finite numbers, one per network, got {getattr(self, name)}."
                raise ValueError(msg)
        if not 1 <= len(set(self.networks)) == len(self.networks) == len(self.widths) == len(self.gains):
            msg = (
                f"networks must be different names with one of widths and gains each, got {self.networks}, "
                f"{self.widths} and {self.gains}."
            )
            raise ValueError(msg)


PRESETS = {
    "small": Settings(data="digits", networks=("vgg11",), widths=(1 / 16,), gains=(1.3,), train=600, test=0, epochs=8),
    "default": Settings(),
    "gpu": Settings(data="cifar10", widths=(8.0, 7.0), train=0, test=0, epochs=70, batch=8, step=0.01, lazy_step=1.0),
}


def run_network(
    settings: Settings,
    data: deep.Images,
    place: int,
    optimizers: dict[str, Any],
    seed: int,
    folder: Path | None,
    *,
    progress: bool,
) -> dict[str, np.ndarray]:
    """Train one network from one start in both regimes."""
    network, width, gain = settings.networks[place], settings.widths[place], settings.gains[place]
    f, w0 = deep.start(network, seed, data, width=width, gain=gain)
    parts = []
    for regime, alpha in zip(REGIMES, (1.0, settings.lazy_alpha), strict=True):
        training = train(
            f,
            w0,
            data.x,
            data.y,
            optimizers[regime],
            loss="softmax",
            alpha=jnp.asarray(alpha, deep.DTYPE),
            epochs=settings.epochs,
            batch_size=settings.batch,
            key=deep.order_key(seed),
            test=data.test,
            throw=False,
            options=TrainingOptions(folder=folder and folder / f"{network}-{regime}-{seed}", progress=progress),
        )
        lanes = jax.tree.map(lambda leaf: leaf[None], training.params)
        part = deep.measures(training) | {"failed": training.result != RESULTS.successful}
        part["stability"] = jnp.where(part["failed"], jnp.nan, deep.stability(f, w0, lanes, data.x_test)[0])
        parts.append(jax.tree.map(np.asarray, part))
    return {name: np.stack([part[name] for part in parts]) for name in parts[0]}


def run(
    settings: Settings | None = None,
    *,
    seed: int = 0,
    folder: Path | None = None,
    progress: bool = False,
    data_dir: Path | None = None,
) -> "xarray.Dataset":
    """Compute Figure 3(b): both networks, standard and linearized.

    Args:
        settings: None for those of the default size.
        seed: The first of the seeds.
        folder: Where a checkpoint of each training's last epoch is kept, so that an interrupted run can continue.
        progress: Show progress bars.
        data_dir: The folder with the files of the data set, see `lazyjax.data.load_images`.

    Returns:
        A dataset over network, seed, regime ("standard", "linearized") and epoch: "train_loss", "train_accuracy" (over
        the batches of the epoch, before their steps), "test_loss", "test_accuracy"; without epoch: "stability" (of
        activations on the test images), "failed" (training diverged; its measures are NaN).

    Raises:
        ValueError, FileNotFoundError: There is no such data, see `lazyjax.data.load_images`.

    Source:
        Chizat, Oyallon, Bach (2019), section 3.2, Figure 3(b); the table of their poster, see docs/sources.md.
    """
    import xarray

    settings = Settings() if settings is None else settings
    data = deep.load(settings, data_dir)
    steps = {"standard": settings.step, "linearized": settings.lazy_step}
    optimizers = {regime: deep.sgd(settings, steps[regime], data.x.shape[0]) for regime in REGIMES}
    seeds = list(range(seed, seed + settings.seeds))
    found = [
        [run_network(settings, data, place, optimizers, s, folder, progress=progress) for s in seeds]
        for place in range(len(settings.networks))
    ]
    dims = {name: ("network", "seed", "regime", "epoch")[: 2 + values.ndim] for name, values in found[0][0].items()}
    table = xarray.Dataset(
        {name: (dims[name], np.stack([[part[name] for part in row] for row in found])) for name in dims},
        coords={
            "network": list(settings.networks),
            "seed": seeds,
            "regime": list(REGIMES),
            "epoch": np.arange(1, settings.epochs + 1),
        },
    )
    return record(table, settings, seed, variant="momentum as in the paper; the networks' biases are trained")


def reference_of(data: "xarray.Dataset") -> dict[tuple[str, str], tuple[float, float]]:
    """Return the poster's table if the data is CIFAR-10, otherwise an empty one."""
    return REFERENCE if data.attrs["setting_data"] == "cifar10" else {}


def numbers(data: "xarray.Dataset") -> list[Number]:
    """List the accuracies and stability by network and regime, next to the poster's table if the data is CIFAR-10."""
    rows, known = [], reference_of(data)
    for network in data["network"].values:
        for regime in data["regime"].values:
            one = data.sel(network=network, regime=regime).mean("seed")
            there = known.get((str(network), str(regime)))
            for place, part in enumerate(("train", "test")):
                value = 100 * float(one[f"{part}_accuracy"].isel(epoch=-1))
                note = "of a network 7 or 8 times wider, CIFAR-10" if there else ""
                rows.append(
                    Number(f"{network} {regime}: {part} accuracy %", value, there[place] if there else None, note)
                )
            rows.append(Number(f"{network} {regime}: stability of activations %", 100 * float(one["stability"])))
    if known:
        last = data["test_accuracy"].sel(regime="linearized").isel(epoch=-1).mean("seed")
        best = 100 * float(last.max())
        rows += [
            Number(
                f"best linearized: test accuracy %, compared with {name}", best, there, "of a linear method, CIFAR-10"
            )
            for name, there in LINEAR_METHODS.items()
        ]
    return [*rows, Number("trainings that diverged", float(data["failed"].sum()))]


def draw(data: "xarray.Dataset") -> "matplotlib.figure.Figure":
    """Draw a pair of bars per network and regime, and the poster's numbers as crosses."""
    figure, (ax,) = make_axes(1)
    reference = reference_of(data)
    pairs = [(str(n), str(r)) for r in data["regime"].values for n in data["network"].values]
    places = np.arange(len(pairs))
    last = 100 * data.isel(epoch=-1).mean("seed", skipna=True)
    for place, (part, label, color) in enumerate(PARTS):
        shifted = places + (-0.19, 0.19)[place]
        values = [float(last[f"{part}_accuracy"].sel(network=n, regime=r)) for n, r in pairs]
        ax.bar(shifted, values, 0.36, color=color, label=label)
        known = [(p, reference[pair][place]) for p, pair in zip(shifted, pairs, strict=True) if pair in reference]
        if known:
            name = None if place else "the poster"
            ax.plot(*zip(*known, strict=True), "x", color=BLACK, markersize=5, label=name)
    ax.set_xticks(places, [f"{n}\n{r}" for n, r in pairs])
    ax.set_ylabel("accuracy (%)", fontsize=FONT + 1)
    ax.set_ylim(0, 100)
    draw_legend(ax, columns=3)
    return figure


FIGURE = Figure(
    title="wide deep networks, linearized against standard",
    presets=PRESETS,
    run=run,
    numbers=numbers,
    draw=draw,
    images=True,
)
