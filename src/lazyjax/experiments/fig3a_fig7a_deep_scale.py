r"""Figures 3(a) and 7(a): a deep network on images at every output scale, from standard to lazy training.

Momentum on $R(\alpha h)/\alpha^2$ with h the centered network, from one start and one order of batches for all alpha;
alpha = inf is the tangent model itself. Both figures show the same run: 3(a) accuracies and stability of activations,
7(a) losses.
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
from lazyjax.plot.axes import BLACK, BLUE, FONT, ORANGE, AlphaAxis, choose_scale, draw_legend, make_axes, mark_failed
from lazyjax.training.arguments import TrainingOptions
from lazyjax.training.train import train

if TYPE_CHECKING:
    import matplotlib.figure
    import xarray

PARTS = (("train", "training", BLUE, "o"), ("test", "test", ORANGE, "s"))
"""Both sets of images: name, label, color and marker."""

POWERS = (1.0, 10.0, 100.0, 1e3, 1e4, 1e5, 1e6, 1e7, float("inf"))


@dataclasses.dataclass(frozen=True)
class Settings:
    r"""The settings of both figures.

    Attributes:
        data: "digits", "fashion-mnist" or "cifar10".
        network: "vgg11" or "resnet18".
        width: Factor of its channels.
        gain: Factor of its Xavier weights.
        train: Training images; 0 for all.
        test: Test images; 0 for all.
        alphas: Output scales, increasing; inf is the tangent model.
        seeds: Number of starts and orders of batches.
        epochs: Number of passes through the data.
        batch: Images in a batch.
        step: $\eta_0$ on $R = \frac{1}{2n}\sum |y - y^*|^2$. The paper's 1 is for the mean over the ten outputs too,
            without the half: 0.2 here. At 0.2 a narrow network with small batches diverges from some starts.
        decay: $\beta$ in the rate $\eta_0/(1 + \beta t)$ of epoch t.
        momentum: Momentum of SGD.
        augment: Whether images are cropped and flipped at random.

    Raises:
        ValueError: One of them is out of its range, or there is no such data set or network.
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
    "small": Settings(data="digits", train=600, test=0, alphas=(1.0, 10.0, 1e3, 1e7, float("inf")), seeds=1, epochs=10),
    "default": Settings(),
    "gpu": Settings(data="cifar10", width=1.0, train=0, test=0, seeds=1, epochs=70, batch=128, step=0.2, augment=True),
}


def run_seed(
    settings: Settings, data: deep.Images, optimizer: Any, seed: int, folder: Path | None, *, progress: bool
) -> dict[str, np.ndarray]:
    """Train at all scales from one start."""
    f, w0 = deep.start(settings.network, seed, data, width=settings.width, gain=settings.gain)
    training = train(
        f,
        w0,
        data.x,
        data.y,
        optimizer,
        alpha=jnp.asarray(settings.alphas, deep.DTYPE),
        epochs=settings.epochs,
        batch_size=settings.batch,
        key=deep.order_key(seed),
        test=data.test,
        throw=False,
        options=TrainingOptions(
            augment=deep.augment_as(settings.data) if settings.augment else None, folder=folder, progress=progress
        ),
    )
    failed = jax.vmap(lambda result: result != RESULTS.successful)(training.result)
    stability = jnp.where(failed, jnp.nan, deep.stability(f, w0, training.params, data.x_test))
    measures = deep.measures(training) | {"stability": stability, "failed": failed}
    return {name: np.asarray(values) for name, values in measures.items()}


def run(
    settings: Settings | None = None,
    *,
    seed: int = 0,
    folder: Path | None = None,
    progress: bool = False,
    data_dir: Path | None = None,
) -> "xarray.Dataset":
    """Compute Figures 3(a) and 7(a), for every seed and alpha.

    Args:
        settings: None for those of the default size: about ten minutes on two cores.
        seed: The first of the seeds.
        folder: Where a checkpoint of each seed's last epoch is kept, so that an interrupted run can continue.
        progress: Show progress bars.
        data_dir: The folder with the files of the data set, see `lazyjax.data.load_images`.

    Returns:
        A dataset over seed, alpha and epoch: "train_loss" and "train_accuracy" (over the batches of the epoch, before
        their steps), "test_loss", "test_accuracy"; over seed and alpha: "stability" (of activations on the test
        images, from the start to the end of training), "failed" (training diverged; its measures are NaN).

    Raises:
        ValueError, FileNotFoundError: There is no such data, see `lazyjax.data.load_images`.

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
    """Return a measure at the end of training, over seed and alpha."""
    return data[name].isel(epoch=-1) if "epoch" in data[name].dims else data[name]


def plateau_from(data: "xarray.Dataset") -> float:
    """Return the smallest alpha from which on test accuracy equals that of the largest alpha from the same start.

    Equal means a mean difference over seeds of at most two standard errors, or one percent. NaN if no other alpha is.
    """
    last = final(data, "test_accuracy")
    gap = last - last.isel(alpha=-1, drop=True)
    error = 2 * gap.std("seed") / np.sqrt(max(1, gap.sizes["seed"] - 1))
    near = (abs(gap.mean("seed")) <= np.maximum(error, 0.01)).values
    first = near.size - int(np.argmin(near[::-1])) if not near.all() else 0
    return float(last["alpha"][first]) if first < near.size - 1 else float("nan")


def accuracy_numbers(data: "xarray.Dataset") -> list[Number]:
    """List the numbers of Figure 3(a): accuracies and stability by alpha."""
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
    """List the numbers of Figure 7(a): losses by alpha."""
    rows = [
        _row(f"{label} loss, alpha = {alpha:g}", final(data, name).sel(alpha=alpha))
        for alpha in data["alpha"].values
        for name, label in (("train_loss", "training"), ("test_loss", "test"))
    ]
    return [*rows, Number("trainings that diverged", float(data["failed"].sum()))]


def _row(label: str, values: "xarray.DataArray") -> Number:
    note = f"over seeds +- {float(values.std('seed', ddof=1)):.3g}" if values.sizes["seed"] > 1 else ""
    return Number(label, float(values.mean("seed")), note=note)


def draw_accuracies(data: "xarray.Dataset") -> "matplotlib.figure.Figure":
    """Draw Figure 3(a): accuracies and stability of activations, mean and standard deviation over seeds."""
    figure, (top, bottom) = make_axes(2, share=False)
    axis = AlphaAxis(data["alpha"])
    last = data.isel(epoch=-1)
    for part, label, color, marker in PARTS:
        _draw_seeds(top, axis, 100 * last[f"{part}_accuracy"], color=color, marker=marker, label=label)
    _draw_seeds(bottom, axis, 100 * data["stability"], color=BLACK, marker="^", label="activations that stay")
    top.set_ylabel("accuracy (%)", fontsize=FONT + 1)
    bottom.set_ylabel("stability (%)", fontsize=FONT + 1)
    bottom.set_ylim(top=101)
    _finish([top, bottom], axis, data)
    return figure


def draw_losses(data: "xarray.Dataset") -> "matplotlib.figure.Figure":
    """Draw Figure 7(a): training and test loss at the end."""
    figure, (ax,) = make_axes(1)
    axis = AlphaAxis(data["alpha"])
    last = data.isel(epoch=-1)
    for part, label, color, marker in PARTS:
        _draw_seeds(ax, axis, last[f"{part}_loss"], color=color, marker=marker, label=label)
    choose_scale(ax, [float(v) for name in ("train_loss", "test_loss") for v in last[name].values.ravel()])
    ax.set_ylabel("loss R at the end", fontsize=FONT + 1)
    _finish([ax], axis, data)
    return figure


def _draw_seeds(ax: Any, axis: AlphaAxis, values: Any, *, color: str, marker: str, label: str) -> None:
    """Draw the mean over the seeds that did not diverge, and a bar of one standard deviation."""
    mean = np.asarray(values.mean("seed", skipna=True), np.float64)
    axis.plot(ax, mean, color=color, marker=marker, label=label)
    if values.sizes["seed"] > 1:
        spread = np.asarray(values.std("seed", skipna=True), np.float64)
        ax.errorbar(axis.positions, mean, spread, linestyle="none", ecolor=color, elinewidth=1, capsize=2)


def _finish(axes: list[Any], axis: AlphaAxis, data: "xarray.Dataset") -> None:
    """Mark the alphas whose trainings all diverged, and draw legends and the alpha axis."""
    for ax in axes:
        mark_failed(ax, axis, data["failed"].all("seed"))
        draw_legend(ax)
        axis.finish(ax)
        ax.xaxis.label.set_fontsize(FONT + 1)
    for ax in axes[:-1]:
        ax.set_xlabel("")


FIGURE_3A = Figure(
    title="accuracy of a deep network, and stability of its activations, against alpha",
    presets=PRESETS,
    run=run,
    numbers=accuracy_numbers,
    draw=draw_accuracies,
    images=True,
    same_run_as="fig7a",
)
FIGURE_7A = Figure(
    title="training and test loss of a deep network against alpha",
    presets=PRESETS,
    run=run,
    numbers=loss_numbers,
    draw=draw_losses,
    images=True,
    same_run_as="fig3a",
)
