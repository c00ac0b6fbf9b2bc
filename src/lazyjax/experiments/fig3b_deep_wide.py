r"""Figure 3(b) and the poster's table: wide deep networks, linearized (alpha = 1e7) against standard (alpha = 1).

Cross-entropy over alpha^2 without augmentation, each kind of training with its own rate, as the paper has them.
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
from lazyjax.training.train import train

if TYPE_CHECKING:
    import xarray

REGIMES = ("standard", "linearized")
REFERENCE = {
    ("vgg11", "standard"): (99.9, 89.7),
    ("vgg11", "linearized"): (61.0, 61.7),
    ("resnet18", "standard"): (99.4, 91.0),
    ("resnet18", "linearized"): (55.0, 56.7),
}
"""The poster's table: training and test accuracy in per cent, CIFAR-10, of nets 8 (VGG) and 7 times (ResNet) wider."""
LINEAR_METHODS = {"prior features": 82.3, "random features": 84.2}
"""Test accuracies in per cent that the poster has beside them (Oyallon et al.; Recht et al.)."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the figure is computed from.

    Attributes:
        data: "digits", "fashion-mnist" or "cifar10".
        networks: "vgg11", "resnet18" or both.
        widths: Times their channels.
        gains: Times their Xavier weights.
        train: Training images; 0 for all.
        test: Test images; 0 for all.
        lazy_alpha: Of the linearized networks.
        seeds: Starts and orders of batches.
        epochs: How often to go through the data.
        batch: Images in a batch.
        step: Rate of the standard networks, on the mean cross-entropy as in the paper.
        lazy_step: Rate of the linearized ones.
        decay: beta in the rate eta0/(1 + beta t) of epoch t.
        momentum: Of SGD.

    Raises:
        ValueError: one of them out of its range, or an unknown data set or network.
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
                msg = f"{name} must be positive finite numbers, one a network, got {getattr(self, name)}."
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
    "gpu": Settings(
        data="cifar10", widths=(8.0, 7.0), train=0, test=0, epochs=70, batch=8, step=0.01, lazy_step=1.0
    ),
}  # fmt: skip


def run_network(
    settings: Settings, data: deep.Images, place: int, optimizers: dict[str, Any], seed: int, folder: Path | None,
    *, progress: bool,
) -> dict[str, np.ndarray]:  # fmt: skip
    """One network from one start in both regimes."""
    network, width, gain = settings.networks[place], settings.widths[place], settings.gains[place]
    f, w0 = deep.start(network, seed, data, width=width, gain=gain)
    parts = []
    for regime, alpha in zip(REGIMES, (1.0, settings.lazy_alpha), strict=True):
        training = train(
            f, w0, data.x, data.y, optimizers[regime], loss="softmax", alpha=jnp.asarray(alpha, deep.DTYPE),
            epochs=settings.epochs, batch_size=settings.batch, key=deep.order_key(seed), test=data.test,
            folder=None if folder is None else folder / f"{network}-{regime}-{seed}", progress=progress, throw=False,
        )  # fmt: skip
        lanes = jax.tree.map(lambda leaf: leaf[None], training.params)
        part = {
            name: getattr(training, name) for name in ("train_loss", "test_loss", "train_accuracy", "test_accuracy")
        }
        part["failed"] = training.result != RESULTS.successful
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
    """Figure 3(b): both networks, standard and linearized.

    Args:
        settings: None for those of the default size.
        seed: The first of the seeds.
        folder: Where a checkpoint of each training's last epoch is kept, for a run that is interrupted to go on.
        progress: Show progress bars.
        data_dir: Where the data's files are, see `lazyjax.images.load_images`.

    Returns:
        A dataset over network, seed, regime ("standard", "linearized") and epoch: "train_loss", "train_accuracy" (over
        the batches of the epoch, before their steps), "test_loss", "test_accuracy"; without epoch: "stability" (of
        activations on the test images), "failed" (it diverged: what was measured is NaN).

    Raises:
        ValueError, FileNotFoundError: no such data, see `lazyjax.images.load_images`.

    Source:
        Chizat, Oyallon, Bach (2019), section 3.2, Figure 3(b); their poster's table.
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
    """The poster's table where the data is its own, else nothing."""
    return REFERENCE if data.attrs["setting_data"] == "cifar10" else {}


def numbers(data: "xarray.Dataset") -> list[Number]:
    """The poster's table; its own numbers where the data is its own."""
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
            Number(f"best linearized: test accuracy %, beside {name}", best, there, "of a linear method, CIFAR-10")
            for name, there in LINEAR_METHODS.items()
        ]
    return [*rows, Number("trainings that diverged", float(data["failed"].sum()))]


FIGURE = Figure("wide deep networks, linearized against standard", PRESETS, run, numbers, images=True)
