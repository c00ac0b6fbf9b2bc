r"""Figures 3(a) and 7(a): a deep network on images at every output scale, from standard to lazy training.

Momentum on $R(\alpha h)/\alpha^2$ with h the centered network, from one start and one order of batches for all alpha;
alpha = inf is the tangent model itself. Both figures show one run: accuracies and stability of activations, and losses.
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

POWERS = (1.0, 10.0, 100.0, 1e3, 1e4, 1e5, 1e6, 1e7, float("inf"))


@dataclasses.dataclass(frozen=True)
class Settings:
    r"""What the figures are computed from.

    Attributes:
        data: "digits", "fashion-mnist" or "cifar10".
        network: "vgg11" or "resnet18".
        width: Times its channels.
        gain: Times its Xavier weights.
        train: Training images; 0 for all.
        test: Test images; 0 for all.
        alphas: Output scales, rising; inf is the tangent model.
        seeds: Starts and orders of batches.
        epochs: How often to go through the data.
        batch: Images in a batch.
        step: $\eta_0$ on $R = \frac{1}{2n}\sum |y - y^*|^2$. The paper's 1 is on the mean over the ten outputs too,
            without the half: 0.2 here. A narrow network with small batches dies at 0.2 from some starts.
        decay: $\beta$ in the rate $\eta_0/(1 + \beta t)$ of epoch t.
        momentum: Of SGD.
        augment: Random crops and flips.

    Raises:
        ValueError: one of them out of its range, or an unknown data set or network.
    """

    data: str = "fashion-mnist"
    network: str = "vgg11"
    width: float = 1 / 16
    gain: float = 1.0
    train: int = 4000
    test: int = 1000
    alphas: tuple[float, ...] = POWERS
    seeds: int = 3
    epochs: int = 12
    batch: int = 32
    step: float = 0.1
    decay: float = 1 / 3
    momentum: float = 0.9
    augment: bool = False

    def __post_init__(self):
        check_counts(self, train=0, test=0, seeds=1, epochs=1, batch=1)
        check_positive(self, "width", "gain", "step")
        deep.check_images(self, self.network)
        deep.check_momentum(self)
        deep.check_alphas(self)


PRESETS = {
    "small": Settings(
        data="digits", train=0, test=0, alphas=(1.0, 10.0, 1e3, 1e7, float("inf")), seeds=1, epochs=10
    ),
    "default": Settings(),
    "gpu": Settings(
        data="cifar10", width=1.0, train=0, test=0, seeds=1, epochs=70, batch=128, step=0.2, augment=True
    ),
}  # fmt: skip


def run_seed(
    settings: Settings, data: deep.Images, optimizer: Any, seed: int, folder: Path | None, *, progress: bool
) -> dict[str, np.ndarray]:
    """All scales from one start."""
    f, w0 = deep.start(settings.network, seed, data, width=settings.width, gain=settings.gain)
    training = train(
        f, w0, data.x, data.y, optimizer, alpha=jnp.asarray(settings.alphas, deep.DTYPE), epochs=settings.epochs,
        batch_size=settings.batch, key=deep.order_key(seed), test=data.test, progress=progress, throw=False,
        augment=deep.augment_as(settings.data) if settings.augment else None, folder=folder,
    )  # fmt: skip
    names = ("train_loss", "test_loss", "train_accuracy", "test_accuracy")
    failed = jax.vmap(lambda result: result != RESULTS.successful)(training.result)
    stability = jnp.where(failed, jnp.nan, deep.stability(f, w0, training.params, data.x_test))
    measures = {name: getattr(training, name) for name in names} | {"stability": stability, "failed": failed}
    return {name: np.asarray(values) for name, values in measures.items()}


def run(
    settings: Settings | None = None,
    *,
    seed: int = 0,
    folder: Path | None = None,
    progress: bool = False,
    data_dir: Path | None = None,
) -> "xarray.Dataset":
    """Figures 3(a) and 7(a), for every seed and alpha.

    Args:
        settings: None for those of the default size: about ten minutes on two cores.
        seed: The first of the seeds.
        folder: Where a checkpoint of each seed's last epoch is kept, for a run that is interrupted to go on.
        progress: Show progress bars.
        data_dir: Where the data's files are, see `lazyjax.images.load_images`.

    Returns:
        A dataset over seed, alpha and epoch: "train_loss" and "train_accuracy" (over the batches of the epoch, before
        their steps), "test_loss", "test_accuracy"; over seed and alpha: "stability" (of activations on the test
        images, from the start to the end of training), "failed" (it diverged: what was measured is NaN).

    Raises:
        ValueError, FileNotFoundError: no such data, see `lazyjax.images.load_images`.

    Source:
        Chizat, Oyallon, Bach (2019), section 3.2, supplement C.2, C.3; Figures 3(a) and 7(a); details of their code.
    """
    import xarray

    settings = Settings() if settings is None else settings
    data = deep.load(settings, data_dir)
    seeds = list(range(seed, seed + settings.seeds))
    # One optimizer for all seeds, which share its compiled program.
    optimizer = deep.sgd(settings, settings.step, data.x.shape[0])
    parts = [
        run_seed(settings, data, optimizer, s, None if folder is None else folder / f"seed-{s}", progress=progress)
        for s in seeds
    ]
    dims = {name: ("seed", "alpha", "epoch")[: 1 + values.ndim] for name, values in parts[0].items()}
    found = xarray.Dataset(
        {name: (dims[name], np.stack([part[name] for part in parts])) for name in dims},
        coords={"seed": seeds, "alpha": list(settings.alphas), "epoch": np.arange(1, settings.epochs + 1)},
    )
    return record(found, settings, seed, variant="the paper's model and optimizer; five poolings, not its code's six")


def final(data: "xarray.Dataset", name: str) -> "xarray.DataArray":
    """At the end of training, over seed and alpha."""
    return data[name].isel(epoch=-1) if "epoch" in data[name].dims else data[name]


def plateau_from(data: "xarray.Dataset") -> float:
    """The smallest alpha from which on test accuracy is that of the largest alpha from the same start.

    The same: a mean difference over seeds of at most two standard errors, or one percent; NaN if only the largest is.
    """
    last = final(data, "test_accuracy")
    gap = last - last.isel(alpha=-1, drop=True)
    error = 2 * gap.std("seed") / np.sqrt(max(1, gap.sizes["seed"] - 1))
    near = (abs(gap.mean("seed")) <= np.maximum(error, 0.01)).values
    first = near.size - int(np.argmin(near[::-1])) if not near.all() else 0
    return float(last["alpha"][first]) if first < near.size - 1 else float("nan")


def accuracy_numbers(data: "xarray.Dataset") -> list[Number]:
    """Figure 3(a): accuracies and stability by alpha."""
    rows = []
    for alpha in data["alpha"].values:
        for name, label in (("train_accuracy", "training"), ("test_accuracy", "test")):
            rows.append(_row(f"{label} accuracy %, alpha = {alpha:g}", 100 * final(data, name).sel(alpha=alpha)))
        rows.append(_row(f"stability of activations %, alpha = {alpha:g}", 100 * data["stability"].sel(alpha=alpha)))
    last = 100 * final(data, "test_accuracy").mean("seed")
    rows.append(Number("test accuracy lost from the smallest to the largest alpha", float(last[0] - last[-1])))
    rows.append(Number("plateau of test accuracy from alpha =", plateau_from(data)))
    return [*rows, Number("trainings that diverged", float(data["failed"].sum()))]


def loss_numbers(data: "xarray.Dataset") -> list[Number]:
    """Figure 7(a): losses by alpha."""
    rows = [
        _row(f"{label} loss, alpha = {alpha:g}", final(data, name).sel(alpha=alpha))
        for alpha in data["alpha"].values
        for name, label in (("train_loss", "training"), ("test_loss", "test"))
    ]
    return [*rows, Number("trainings that diverged", float(data["failed"].sum()))]


def _row(label: str, values: "xarray.DataArray") -> Number:
    note = f"over seeds +- {float(values.std('seed', ddof=1)):.3g}" if values.sizes["seed"] > 1 else ""
    return Number(label, float(values.mean("seed")), note=note)


FIGURE_3A = Figure(
    "accuracy of a deep network, and stability of its activations, against alpha", PRESETS, run, accuracy_numbers,
    images=True, twin="fig7a",
)  # fmt: skip
FIGURE_7A = Figure(
    "training and test loss of a deep network against alpha", PRESETS, run, loss_numbers, images=True, twin="fig3a"
)
