r"""Figure 7(b): the spectrum of a deep network's tangent kernel at its start, on images and on noise.

Few large eigenvalues, a gap, then a slow decay: the tangent model is ill-conditioned whatever the inputs, and so does
not fit its training data in the time that the network itself needs.
"""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

from lazyjax.data.images import noise_images
from lazyjax.experiments import deep
from lazyjax.experiments.figure import Figure, Number, check_counts, check_positive, record
from lazyjax.kernels.gram import spectrum
from lazyjax.kernels.spectrum import condition_number, effective_rank, normalized_spectrum

if TYPE_CHECKING:
    import xarray

PAPER = "the paper, in words, of CIFAR-10 at width 1 and n = 500"


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the figure is computed from.

    Attributes:
        data: "digits", "fashion-mnist" or "cifar10".
        network: "vgg11" or "resnet18".
        width: Times its channels.
        gain: Times its Xavier weights. The paper has that of Figure 3(a), 1; its code's default is 2.
        train: Images, n of each kind.

    Raises:
        ValueError: one of them out of its range, or an unknown data set or network.
    """

    data: str = "fashion-mnist"
    network: str = "vgg11"
    width: float = 1 / 4
    gain: float = 1.0
    train: int = 100

    def __post_init__(self):
        check_counts(self, train=5)
        check_positive(self, "width", "gain")
        deep.check_images(self, self.network)

    @property
    def test(self) -> int:
        """One test image, which is left alone."""
        return 1


PRESETS = {
    "small": Settings(data="digits", width=1 / 16, train=30),
    "default": Settings(),
    "gpu": Settings(data="cifar10", width=1.0, train=500),
}


def run(
    settings: Settings | None = None,
    *,
    seed: int = 0,
    folder: Path | None = None,
    progress: bool = False,
    data_dir: Path | None = None,
) -> "xarray.Dataset":
    """Figure 7(b): all eigenvalues of the two kernels.

    Args:
        settings: None for those of the default size.
        seed: Of the network's start and of the noise.
        folder: Unused: there is nothing to go on from.
        progress: Unused.
        data_dir: Where the data's files are, see `lazyjax.images.load_images`.

    Returns:
        A dataset over inputs ("images", "noise") and index: "eigenvalue" of the plain Gram, falling; "fraction" and
        "value" as `lazyjax.normalized_spectrum` has them.

    Raises:
        ValueError, FileNotFoundError: no such data, see `lazyjax.images.load_images`.

    Source:
        Chizat, Oyallon, Bach (2019), supplement C.3, Figure 7(b).
    """
    import xarray

    del folder, progress
    settings = Settings() if settings is None else settings
    data = deep.load(settings, data_dir)
    f, w0 = deep.start(settings.network, seed, data, width=settings.width, gain=settings.gain)
    noise = noise_images(jr.fold_in(jr.key(seed), 2), data.x.shape[0], settings.data, dtype=deep.DTYPE)
    values = [spectrum(f, w0, x) for x in (data.x, noise)]
    curves = [jax.device_get(normalized_spectrum(value)) for value in values]
    index = np.arange(1, values[0].size + 1)
    found = xarray.Dataset(
        {
            "eigenvalue": (("inputs", "index"), np.stack([np.asarray(value) for value in values])),
            "fraction": (("index",), np.asarray(curves[0][0], np.float64)),
            "value": (("inputs", "index"), np.stack([curve[1] for curve in curves])),
        },
        coords={"inputs": ["images", "noise"], "index": index},
    )
    return record(found, settings, seed, outputs=index.size // data.x.shape[0])


def tail_slope(data: "xarray.Dataset", inputs: str) -> float:
    """The fitted power of the index in the eigenvalues from the second k to half of them, k outputs; NaN for none."""
    values = data["value"].sel(inputs=inputs).values.astype(np.float64)
    index = data["index"].values.astype(np.float64)
    use = (index > 2 * data.attrs["outputs"]) & (index <= index.size / 2) & (values > 0)
    return float(np.polyfit(np.log(index[use]), np.log(values[use]), 1)[0]) if use.sum() > 1 else float("nan")


def numbers(data: "xarray.Dataset") -> list[Number]:
    """Gap, slope of the tail and conditioning on both kinds of inputs."""
    rows, k = [], data.attrs["outputs"]
    for inputs in data["inputs"].values:
        values = data["eigenvalue"].sel(inputs=inputs).values.astype(np.float64)
        rows += [
            Number(f"drop from eigenvalue k = {k} to k + 1, {inputs}", float(values[k - 1] / values[k]), 10.0, PAPER),
            Number(f"power of the index in the tail, {inputs}", tail_slope(data, str(inputs)), -1.0, PAPER),
            Number(f"eigenvalue 1 over eigenvalue k + 1, {inputs}", float(values[0] / values[k])),
            Number(f"effective rank, {inputs}", float(effective_rank(jnp.asarray(values)))),
            Number(
                f"condition number, {inputs}", float(condition_number(data["eigenvalue"].sel(inputs=inputs).values))
            ),
        ]
    return rows


FIGURE = Figure(
    "spectrum of a deep network's tangent kernel on images and on noise", PRESETS, run, numbers, images=True
)
