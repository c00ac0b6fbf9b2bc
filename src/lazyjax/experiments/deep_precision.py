r"""What float32 leaves of a lazy network: $\alpha(h(w) - h(w_0))$ subtracted plainly against `finite_jvp`.

The paper trains at alpha up to 1e7, where w and w0 differ by less than a rounding of w. Here a network is trained in u
= alpha (w - w0) with `finite_jvp`, after every epoch both ways of computing its outputs are compared with float64, and
the plain difference trains the same network from the same start.
"""

import dataclasses
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
from lazyjax.training.train import Training, train

if TYPE_CHECKING:
    import xarray

WAYS = ("exact", "plain")


@dataclasses.dataclass(frozen=True)
class Settings:
    r"""What the figure is computed from.

    Attributes:
        data: "digits", "fashion-mnist" or "cifar10".
        network: "vgg11" or "resnet18".
        width: Times its channels.
        gain: Times its Xavier weights.
        train: Training images; 0 for all.
        test: Test images; 0 for all.
        probe: Of them, so many are where outputs are compared.
        alphas: Output scales, rising and finite; the last one is that of the curves.
        epochs: How often to go through the data.
        batch: Images in a batch.
        step: As in Figure 3(a).
        decay: $\beta$ in the rate $\eta_0/(1 + \beta t)$ of epoch t.
        momentum: Of SGD.

    Raises:
        ValueError: one of them out of its range, or an unknown data set or network.
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
    r"""$\|y - y_{64}\|/\|y_{64}\|$ by lane and way: y in float32, $y_{64}$ by `finite_jvp` in float64."""
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), (w0, u, x))

    def outputs(alpha: Array, w0: Params, u: Params, x: Array, way: str) -> Array:
        return finite_jvp(lambda w: f(w, x), w0, u, 1 / alpha, difference="exact" if way == "exact" else "plain")

    def lane(pair: tuple[Array, Params, Params]) -> dict[str, Array]:
        alpha, u, wide_u = pair
        truth = outputs(alpha.astype(jnp.float64), wide[0], wide_u, wide[2], "exact")
        size = jnp.linalg.norm(truth)
        return {way: jnp.linalg.norm(outputs(alpha, w0, u, x, way).astype(jnp.float64) - truth) / size for way in WAYS}

    return jax.lax.map(lane, (alphas, u, wide[1]))


def _train(
    settings: Settings, data: deep.Images, f: Model, w0: Params, seed: int, optimizer: Any, *, way: str, epochs: int,
    folder: Path | None, progress: bool,
) -> Training:  # fmt: skip
    return train(
        f, w0, data.x, data.y, optimizer, alpha=jnp.asarray(settings.alphas, deep.DTYPE), epochs=epochs,
        batch_size=settings.batch, key=deep.order_key(seed), test=data.test, difference=way, folder=folder,
        progress=progress, throw=False,
    )  # fmt: skip


def run(
    settings: Settings | None = None,
    *,
    seed: int = 0,
    folder: Path | None = None,
    progress: bool = False,
    data_dir: Path | None = None,
) -> "xarray.Dataset":
    """Errors of the outputs along training, and what both ways of training end with.

    Args:
        settings: None for those of the default size.
        seed: Of the start and the batches.
        folder: Where a checkpoint of the plain training is kept, for a run that is interrupted to go on; the finite
            one, whose outputs are measured after every epoch, begins anew.
        progress: Show progress bars.
        data_dir: Where the data's files are, see `lazyjax.images.load_images`.

    Returns:
        A dataset over way ("exact", "plain"), alpha and epoch: "output_error" (relative, both ways at the
        displacements that the finite one trained), "test_accuracy", "train_accuracy", "test_loss", "train_loss" (each
        way's own training).

    Raises:
        ValueError, FileNotFoundError: no such data; JAX's default dtype is not float64, in which the truth is taken.

    Source:
        Chizat, Oyallon, Bach (2019), section 3.2 (alpha up to 1e7); the comparison is ours.
    """
    import xarray

    check_double()
    settings = Settings() if settings is None else settings
    data = deep.load(settings, data_dir)
    with tempfile.TemporaryDirectory() as aside:
        parts = _run_ways(settings, data, seed, Path(aside), folder, progress=progress)
    dims = ("way", "alpha", "epoch")
    found = xarray.Dataset(
        {name: (dims, np.stack([parts[way][name] for way in WAYS])) for name in parts[WAYS[0]]},
        coords={"way": list(WAYS), "alpha": list(settings.alphas), "epoch": np.arange(1, settings.epochs + 1)},
    )
    return record(found, settings, seed, dtype="float32")


def _run_ways(
    settings: Settings, data: deep.Images, seed: int, aside: Path, folder: Path | None, *, progress: bool
) -> dict[str, dict[str, np.ndarray]]:
    f, w0 = deep.start(settings.network, seed, data, width=settings.width, gain=settings.gain)
    optimizer = deep.sgd(settings, settings.step, data.x.shape[0])
    alphas, x = jnp.asarray(settings.alphas, deep.DTYPE), data.x_test[: settings.probe]
    measure = jax.jit(lambda w0, u: output_errors(f, w0, u, alphas, x))
    parts: dict[str, dict[str, np.ndarray]] = {}
    # Accelerators may round products of float32 to fewer digits, which is not what is measured here.
    with jax.default_matmul_precision("highest"):
        errors = []
        for epochs in trange(1, settings.epochs + 1, desc="finite_jvp", unit="epoch", disable=not progress):
            options = {"epochs": epochs, "folder": aside, "progress": False}
            training = _train(settings, data, f, w0, seed, optimizer, way="exact", **options)
            errors.append(jax.device_get(measure(w0, training.displacement)))
            parts["exact"] = _measures(training)
        kept = None if folder is None else folder / "plain"
        options = {"epochs": settings.epochs, "folder": kept, "progress": progress}
        parts["plain"] = _measures(_train(settings, data, f, w0, seed, optimizer, way="plain", **options))
    for way in WAYS:
        parts[way]["output_error"] = np.stack([error[way] for error in errors], axis=1)
    return parts


def _measures(training: Training) -> dict[str, np.ndarray]:
    names = ("train_loss", "test_loss", "train_accuracy", "test_accuracy")
    return {name: np.asarray(getattr(training, name)) for name in names}


def numbers(data: "xarray.Dataset") -> list[Number]:
    """Errors and accuracies at the end, by alpha."""
    rows, last = [], data.isel(epoch=-1)
    for alpha in data["alpha"].values:
        for way in data["way"].values:
            one = last.sel(alpha=alpha, way=way)
            label = f"{'finite_jvp' if way == 'finite' else 'plain difference'}, alpha = {alpha:g}"
            rows.append(Number(f"relative error of the outputs: {label}", float(one["output_error"])))
            rows.append(Number(f"test accuracy %: {label}", 100 * float(one["test_accuracy"])))
    return rows


FIGURE = Figure("float32 at large alpha: the plain difference against finite_jvp", PRESETS, run, numbers, images=True)
