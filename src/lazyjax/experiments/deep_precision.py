r"""The precision of a lazy network in float32: the plain difference $\alpha(h(w) - h(w_0))$ against `finite_jvp`.

The paper trains at alpha up to 1e7, where w and w0 differ by less than a rounding of w. Here a network is trained in
$u = \alpha (w - w_0)$ with `finite_jvp`, and after every epoch both differences are compared with float64. The plain
difference then trains the same network from the same start.
"""

import dataclasses
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from tqdm import trange

from lazyjax._core.types import Model, Params
from lazyjax.difference.finite_jvp import finite_jvp
from lazyjax.experiments import deep
from lazyjax.experiments.figure import Figure, Number, check_counts, check_positive, record
from lazyjax.experiments.student import check_double
from lazyjax.models.maps import on_data
from lazyjax.plot.axes import BLUE, FONT, ORANGE, AlphaAxis, draw_legend, make_axes
from lazyjax.training.arguments import TrainingOptions
from lazyjax.training.train import Training, train

if TYPE_CHECKING:
    import matplotlib.figure
    import xarray

DIFFERENCES = {"exact": "finite_jvp", "plain": "plain difference"}
"""What the two differences of the outputs are called in the figure."""


@dataclasses.dataclass(frozen=True)
class Settings:
    r"""The settings of the figure.

    Attributes:
        data: "digits", "fashion-mnist" or "cifar10".
        network: "vgg11" or "resnet18".
        width: Factor of its channels.
        gain: Factor of its Xavier weights.
        train: Training images; 0 for all.
        test: Test images; 0 for all.
        probe: Number of test images at which outputs are compared.
        alphas: Output scales, increasing and finite; the curves show the last one.
        epochs: Number of passes through the data.
        batch: Images in a batch.
        step: As in Figure 3(a).
        decay: $\beta$ in the rate $\eta_0/(1 + \beta t)$ of epoch t.
        momentum: Momentum of SGD.

    Raises:
        ValueError: One of them is out of its range, or there is no such data set or network.
    """

    data: str = "fashion-mnist"
    network: str = "vgg11"
    width: float = 1 / 16
    gain: float = 1.0
    train: int = 2000
    test: int = 1000
    probe: int = 64
    alphas: tuple[float, ...] = (1e3, 1e5, 1e7)
    epochs: int = 6
    batch: int = 32
    step: float = 0.1
    decay: float = 1 / 3
    momentum: float = 0.9

    def __post_init__(self):
        check_counts(self, train=0, test=0, probe=1, epochs=1, batch=1)
        check_positive(self, "width", "gain", "step", "alphas")
        deep.check_images(self, self.network)
        deep.check_momentum(self)
        deep.check_alphas(self)


PRESETS = {
    "small": Settings(data="digits", train=600, test=0, probe=16, alphas=(1e3, 1e7), epochs=6),
    "default": Settings(),
    "gpu": Settings(data="cifar10", width=1.0, train=0, test=0, alphas=(1.0, 1e3, 1e5, 1e7), epochs=30, batch=128),
}


def output_errors(f: Model, w0: Params, u: Params, alphas: Array, x: Array) -> dict[str, Float[Array, " lanes"]]:
    r"""Return $\|y - y_{64}\|/\|y_{64}\|$ by difference and lane: y in float32, $y_{64}$ by `finite_jvp` in float64."""
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), (w0, u, x))

    def outputs(alpha: Array, w0: Params, u: Params, x: Array, difference: str) -> Array:
        return finite_jvp(on_data(f, x), w0, u, 1 / alpha, difference="exact" if difference == "exact" else "plain")

    def lane(part: tuple[Array, Params, Params]) -> dict[str, Array]:
        alpha, u, wide_u = part
        truth = outputs(alpha.astype(jnp.float64), wide[0], wide_u, wide[2], "exact")
        found = {name: outputs(alpha, w0, u, x, name).astype(jnp.float64) for name in DIFFERENCES}
        return {name: jnp.linalg.norm(y - truth) / jnp.linalg.norm(truth) for name, y in found.items()}

    return jax.lax.map(lane, (alphas, u, wide[1]))


def run(
    settings: Settings | None = None,
    *,
    seed: int = 0,
    folder: Path | None = None,
    progress: bool = False,
    data_dir: Path | None = None,
) -> "xarray.Dataset":
    """Measure the errors of the outputs along training, and how training with either difference ends.

    Args:
        settings: None for those of the default size.
        seed: The seed of the start and the batches.
        folder: Where a checkpoint of the plain training is kept, so that an interrupted run can continue; the exact
            one, whose outputs are measured after every epoch, starts anew.
        progress: Show progress bars.
        data_dir: The folder with the files of the data set, see `lazyjax.data.load_images`.

    Returns:
        A dataset over difference ("exact", "plain"), alpha and epoch: "output_error" (relative; both at the
        displacements of the exact training), "test_accuracy", "train_accuracy", "test_loss", "train_loss" (of training
        with this difference).

    Raises:
        ValueError, FileNotFoundError: There is no such data; JAX's default dtype is not float64, which the outputs are
            compared with.

    Source:
        Chizat, Oyallon, Bach (2019), section 3.2 (alpha up to 1e7); the comparison is ours.
    """
    import xarray

    check_double()
    settings = Settings() if settings is None else settings
    data = deep.load(settings, data_dir)
    with tempfile.TemporaryDirectory() as aside:
        parts = _run_both(settings, data, seed, Path(aside), folder, progress=progress)
    dims = ("difference", "alpha", "epoch")
    coords = {"difference": list(DIFFERENCES), "alpha": list(settings.alphas)}
    found = xarray.Dataset(
        {name: (dims, np.stack([parts[difference][name] for difference in DIFFERENCES])) for name in parts["exact"]},
        coords={**coords, "epoch": np.arange(1, settings.epochs + 1)},
    )
    return record(found, settings, seed, dtype="float32")


def _run_both(
    settings: Settings, data: deep.Images, seed: int, aside: Path, folder: Path | None, *, progress: bool
) -> dict[str, dict[str, np.ndarray]]:
    """Train with either difference; measure both after every epoch of the exact one."""
    f, w0 = deep.start(settings.network, seed, data, width=settings.width, gain=settings.gain)
    optimizer = deep.sgd(settings, settings.step, data.x.shape[0])
    alphas, x = jnp.asarray(settings.alphas, deep.DTYPE), data.x_test[: settings.probe]

    def fit(difference: str, epochs: int, folder: Path | None, *, progress: bool) -> Training:
        return train(
            f,
            w0,
            data.x,
            data.y,
            optimizer,
            alpha=alphas,
            epochs=epochs,
            batch_size=settings.batch,
            key=deep.order_key(seed),
            test=data.test,
            throw=False,
            options=TrainingOptions(difference=difference, folder=folder, progress=progress),
        )

    measure = jax.jit(lambda w0, u: output_errors(f, w0, u, alphas, x))
    parts: dict[str, dict[str, np.ndarray]] = {}
    # Accelerators may round products of float32 to fewer digits, which is not what is measured here.
    with jax.default_matmul_precision("highest"):
        errors = []
        for epochs in trange(1, settings.epochs + 1, desc="finite_jvp", unit="epoch", disable=not progress):
            training = fit("exact", epochs, aside, progress=False)
            errors.append(jax.device_get(measure(w0, training.displacement)))
            parts["exact"] = jax.device_get(deep.measures(training))
        kept = None if folder is None else folder / "plain"
        parts["plain"] = jax.device_get(deep.measures(fit("plain", settings.epochs, kept, progress=progress)))
    for difference in DIFFERENCES:
        parts[difference]["output_error"] = np.stack([error[difference] for error in errors], axis=1)
    return parts


def numbers(data: "xarray.Dataset") -> list[Number]:
    """List errors and accuracies at the end, by alpha."""
    rows, last = [], data.isel(epoch=-1)
    for alpha in data["alpha"].values:
        for difference, name in DIFFERENCES.items():
            one = last.sel(alpha=alpha, difference=difference)
            label = f"{name}, alpha = {alpha:g}"
            rows.append(Number(f"relative error of the outputs: {label}", float(one["output_error"])))
            rows.append(Number(f"test accuracy %: {label}", 100 * float(one["test_accuracy"])))
    return rows


def draw(data: "xarray.Dataset") -> "matplotlib.figure.Figure":
    """Draw the errors of the outputs along training at the largest alpha, and test accuracies at the end by alpha."""
    figure, (top, bottom) = make_axes(2, share=False)
    alphas = np.asarray(data["alpha"], np.float64)
    axis = AlphaAxis(alphas)
    for (difference, label), color, marker in zip(DIFFERENCES.items(), (BLUE, ORANGE), "os", strict=True):
        one = data.sel(difference=difference)
        errors = one["output_error"].isel(alpha=-1)
        top.plot(data["epoch"], errors, color=color, marker=marker, markersize=3.5, linewidth=1.2, label=label)
        last = 100 * np.asarray(one["test_accuracy"].isel(epoch=-1), np.float64)
        axis.plot(bottom, last, color=color, marker=marker, label=label)
    top.set_yscale("log")
    top.set_xlabel("epoch", fontsize=FONT + 1)
    top.set_ylabel(rf"relative error of $y$," "\n" rf"$\alpha=10^{{{np.log10(alphas[-1]):g}}}$", fontsize=FONT + 1)
    bottom.set_ylabel("test accuracy (%)", fontsize=FONT + 1)
    axis.finish(bottom)
    bottom.xaxis.label.set_fontsize(FONT + 1)
    draw_legend(top)
    return figure


FIGURE = Figure(
    title="float32 at large alpha: the plain difference against finite_jvp",
    presets=PRESETS,
    run=run,
    numbers=numbers,
    draw=draw,
    images=True,
)
