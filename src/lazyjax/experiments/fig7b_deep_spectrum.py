r"""Figure 7(b): the spectrum of a deep network's tangent kernel at its start, on images and on noise.

There are few large eigenvalues, a gap, then a slow decay: the tangent model is ill-conditioned for any inputs, and so
does not fit its training data in the time that the network itself needs.
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
from lazyjax.kernels.spectrum import condition_number, effective_rank, normalized_spectrum, spectrum
from lazyjax.plot.axes import FONT, GRAY, draw_legend, make_axes
from lazyjax.plot.spectrum import draw_spectra

if TYPE_CHECKING:
    import matplotlib.figure
    import xarray

PAPER = "the paper, in words, of CIFAR-10 at width 1 and n = 500"
"""What a reference is for."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings of the figure.

    Attributes:
        data: "digits", "fashion-mnist" or "cifar10".
        network: "vgg11" or "resnet18".
        width: Factor of its channels.
        gain: Factor of its Xavier weights. The paper has that of Figure 3(a), 1; the default of its code is 2.
        train: Number of images, n of each kind.

    Raises:
        ValueError: One of them is out of its range, or there is no such data set or network.
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
        """The number of test images: one, which is not used."""
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
    """Compute Figure 7(b): all eigenvalues of the two kernels.

    Args:
        settings: None for those of the default size.
        seed: The seed of the network's start and of the noise.
        folder: Not used: there is nothing to continue from.
        progress: Not used.
        data_dir: The folder with the files of the data set, see `lazyjax.data.load_images`.

    Returns:
        A dataset over inputs ("images", "noise") and index: "eigenvalue" of the plain Gram, decreasing; "fraction" and
        "value" as `lazyjax.kernels.normalized_spectrum` has them.

    Raises:
        ValueError, FileNotFoundError: There is no such data, see `lazyjax.data.load_images`.

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
    """Return the fitted power of the index in the eigenvalues from 2k + 1 to half of all, with k outputs; or NaN."""
    values = data["value"].sel(inputs=inputs).values.astype(np.float64)
    index = data["index"].values.astype(np.float64)
    use = (index > 2 * data.attrs["outputs"]) & (index <= index.size / 2) & (values > 0)
    return float(np.polyfit(np.log(index[use]), np.log(values[use]), 1)[0]) if use.sum() > 1 else float("nan")


def numbers(data: "xarray.Dataset") -> list[Number]:
    """List the gap, the slope of the tail and the conditioning on both kinds of inputs."""
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


def draw(data: "xarray.Dataset") -> "matplotlib.figure.Figure":
    """Draw normalized eigenvalues on images and on noise, and where the first k end."""
    figure, (ax,) = make_axes(1)
    names = {"images": str(data.attrs["setting_data"]), "noise": "uniform noise"}
    draw_spectra(ax, {names[str(i)]: (data["fraction"], data["value"].sel(inputs=i)) for i in data["inputs"].values})
    k, size = int(data.attrs["outputs"]), data.sizes["index"]
    ax.axvline(k / size, color=GRAY, linestyle=":", linewidth=1, label=f"the first k = {k}")
    fraction = np.asarray(data["fraction"], np.float64)[2 * k :]
    if fraction.size:
        level = float(data["value"].isel(inputs=0, index=2 * k))
        ax.plot(fraction, level * fraction[0] / fraction, color=GRAY, linewidth=1, label="$1/i$")
    ax.xaxis.label.set_fontsize(FONT + 1)
    ax.yaxis.label.set_fontsize(FONT + 1)
    draw_legend(ax)
    return figure


FIGURE = Figure(
    title="spectrum of a deep network's tangent kernel on images and on noise",
    presets=PRESETS,
    run=run,
    numbers=numbers,
    draw=draw,
    images=True,
)
