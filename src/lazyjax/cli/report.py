"""`lazyjax report`: its options and their checks, and what it makes, as values."""

import base64
import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import tyro

from lazyjax._core.types import Model, Params
from lazyjax.cli.output import REPORT, all_versions, report_json
from lazyjax.cli.user_model import check_model, default_model, load_model, split_spec
from lazyjax.data.datasets import DataSet, digits, load_arrays
from lazyjax.report.diagnose import LazinessReport
from lazyjax.report.html import render_html

ALPHAS = ("1", "3", "10", "30", "100", "1000", "1e4", "1e5", "1e6", "1e7", "inf")
NUM_DIGITS = 256


@dataclasses.dataclass(frozen=True)
class Report:
    """Tell how lazily a model trains.

    Trains the model and its tangent model at many output scales alpha, prints the results, and writes one folder:
    report.html to read, report.json, sweep.nc with every curve, and the figures. Without arguments it takes a small
    network on handwritten digits.

    Attributes:
        model: Your network: a file and a function in it, build(key) -> (f, params), with f(params, x) -> outputs
            for a batch x. If not given: a small tanh network of the size of the data.
        data: Your data: a .npz file with arrays x and y, and optionally x_test and y_test. Integer y are classes.
            If not given: the handwritten digits of scikit-learn.
        alphas: Output scales in (0, inf]; inf, the numerical floor, is added.
        loss: Square (classes become one-hot rows), softmax (cross-entropy), or logistic (two classes).
        time: Flow time to train for, learning rate times steps. If not given: until the tangent model has learned.
        seed: Random seed of the initial weights of the network, and of the split of the digits.
        train: Number of digits to train on, the others are for testing. If not given: 256.
        x64: Compute in float64.
        out: Folder for the results; a folder with the results of another configuration is refused.
        cache: Folder for compiled programs, which make the next run start sooner. If not given: a folder of lazyjax in
            the user's cache folder, see `lazyjax info`.
        no_cache: Compile everything anew and keep nothing.
    """

    model: Annotated[str | None, tyro.conf.arg(metavar="FILE.py:FUNCTION")] = None
    data: Annotated[Path | None, tyro.conf.arg(metavar="FILE.npz")] = None
    alphas: Annotated[tuple[str, ...], tyro.conf.arg(metavar="ALPHA ...")] = ALPHAS
    loss: Literal["square", "softmax", "logistic"] = "square"
    time: Annotated[float | None, tyro.conf.arg(metavar="TIME")] = None
    seed: int = 0
    train: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    x64: tyro.conf.FlagCreatePairsOff[bool] = False
    out: Annotated[Path, tyro.conf.arg(metavar="FOLDER")] = Path("lazyjax-report")
    cache: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    no_cache: tyro.conf.FlagCreatePairsOff[bool] = False

    @property
    def kept(self) -> Path:
        """Folder of the finished parts of an unfinished report."""
        return self.out / ".report-partial"


def check_options(options: Report) -> None:
    """Check the options by themselves.

    Raises:
        ValueError: one is out of its range, or does not go with another.
    """
    if options.model is not None:
        split_spec(options.model)
    if options.time is not None and not 0 < options.time < math.inf:
        msg = f"--time must be a finite positive flow time, got {options.time}."
        raise ValueError(msg)
    if not 0 <= options.seed < 2**32:
        msg = f"--seed must lie in 0..2^32 - 1, got {options.seed}."
        raise ValueError(msg)
    if options.train is not None and options.data is not None:
        msg = "--train chooses how many digits to train on; with --data all samples of x are used, leave it out."
        raise ValueError(msg)


def load_data(options: Report) -> DataSet:
    """Return the user's data, or the digits."""
    if options.data is not None:
        return load_arrays(options.data)
    return digits(NUM_DIGITS if options.train is None else options.train, seed=options.seed)


def choose_model(options: Report, key: jax.Array, data: DataSet) -> tuple[Model, Params]:
    """Return the user's model and its parameters, or the default network."""
    if options.model is None:
        return default_model(key, data, options.loss)
    f, w0 = load_model(options.model, key)
    check_model(f, w0, data, options.model)
    return f, w0


def render_files(
    report: LazinessReport,
    images: Mapping[tuple[str, str], bytes],
    configuration: Mapping[str, Any],
    command: str,
    seconds: Mapping[str, float],
) -> dict[str, bytes]:
    """Return all files except the dataset, name in the folder to content, report.json last."""
    sources = {
        name: "data:image/svg+xml;base64," + base64.b64encode(content).decode("ascii")
        for (name, kind), content in images.items()
        if kind == "svg"
    }
    made = {"command": command, **configuration, "seconds": dict(seconds), "versions": all_versions()}
    files = {f"figures/{name}.{kind}": content for (name, kind), content in images.items()}
    files["report.html"] = render_html(report, sources, made).encode()
    files[REPORT] = report_json(report, configuration, command, seconds).encode()
    return files
