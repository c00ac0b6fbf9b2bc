"""The command `lazyjax`: the only place that prints, writes files, or changes JAX's configuration."""

import base64
import contextlib
import dataclasses
import math
import os
import shlex
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import tyro

from lazyjax._html import render_html
from lazyjax._output import REPORT, STAGE, check_folder, describe, report_json, versions
from lazyjax._quiet import without_cache_noise
from lazyjax._reproduce import Reproduce, choose_settings, draw_files, list_figures, make_figure, render_numbers
from lazyjax._types import Model, Params
from lazyjax._user import check_model, default_model, load_model, parse_alphas, split_key, split_spec
from lazyjax.data import DataSet, digits, load_arrays
from lazyjax.plot import encode, report_figures
from lazyjax.report import LazinessReport, diagnose
from lazyjax.verify import verify

ALPHAS = ("1", "3", "10", "30", "100", "1000", "1e4", "1e5", "1e6", "1e7", "inf")
NUM_DIGITS = 256


@dataclasses.dataclass(frozen=True)
class Report:
    """Tell how lazily a model trains.

    Trains it and its tangent model at many output scales alpha, prints what it finds, and writes one folder:
    report.html to read, report.json, sweep.nc with every curve, and the figures. Without arguments: a small
    network on handwritten digits.

    Attributes:
        model: Your network: a file and a function in it, build(key) -> (f, params), with f(params, x) -> outputs
            for a batch x. Without it: a small tanh network of the size of the data.
        data: Your data: a .npz file with arrays x and y, and optionally x_test and y_test. Integer y are classes.
            Without it: scikit-learn's handwritten digits.
        alphas: Output scales in (0, inf]; inf, the numerical floor, is added.
        loss: Square (classes become one-hot rows), softmax (cross-entropy), or logistic (two classes).
        time: Flow time to train for, learning rate times steps. Without it: until the tangent model has learnt.
        seed: Of the network's init, and of the split of the digits.
        train: How many digits to train on, the others are for testing; 256 without it.
        x64: Compute in float64.
        out: Folder for the results; a folder with another configuration's results is refused.
        cache: Folder for compiled programs, which make the next run start sooner. Without it: lazyjax's folder in
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


@dataclasses.dataclass(frozen=True)
class Verify:
    """Try every theorem on random nets, losses, data and scales.

    Prints how often each bound was violated, how sharp it was, the rates in alpha, and where the sources err. In
    float64. Ends with code 1 if anything is violated.

    Attributes:
        instances: Of each of ten families of problems; each is followed at seven scales.
        seed: Of everything random.
    """

    instances: int = 15
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Info:
    """Print versions, devices, precision and the cache folder."""


Command = (
    Annotated[Report, tyro.conf.subcommand("report")]
    | Annotated[Verify, tyro.conf.subcommand("verify")]
    | Annotated[Reproduce, tyro.conf.subcommand("reproduce")]
    | Annotated[Info, tyro.conf.subcommand("info")]
)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line.

    Args:
        argv: Arguments; None for the process's own.

    Raises:
        SystemExit: with one line on stderr: code 2 for bad input, 1 for a flow that failed, 130 for Ctrl-C.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    options = tyro.cli(
        Command,  # pyright: ignore[reportArgumentType] - a union of annotated types is one at run time
        args=arguments,
        prog="lazyjax",
        description="How lazily does a differentiable model train?",
    )
    try:
        if isinstance(options, Info):
            print("\n".join(f"{name:10} {value}" for name, value in describe_machine().items()))
        elif isinstance(options, Verify):
            run_verify(options)
        elif isinstance(options, Reproduce):
            run_reproduce(options)
        else:
            run_report(options, shlex.join(["lazyjax", *arguments]))
    except (ValueError, TypeError, OSError) as error:
        print(f"lazyjax: error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None
    except eqx.EquinoxRuntimeError as error:
        # The last line before Equinox's advice to programmers is the reason, above it is the stack.
        reason = str(error).split("-------------------")[0].strip().splitlines()[-1]
        print(f"lazyjax: error: {reason.removeprefix('equinox.EquinoxRuntimeError: ')}", file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        kept = isinstance(options, Reproduce) and options.kept.exists()
        left = "the same command goes on where it stopped" if kept else "nothing written"
        print(f"lazyjax: interrupted, {left}", file=sys.stderr)
        raise SystemExit(130) from None


def describe_machine() -> dict[str, str]:
    """What `lazyjax info` prints: versions, devices, precision, cache folder."""
    devices = ", ".join(str(device) for device in jax.devices())
    x64 = "on" if jnp.result_type(float) == jnp.float64 else "off; lazyjax report --x64 turns it on"
    return {
        **versions(),
        "backend": jax.default_backend(),
        "devices": devices,
        "precision": f"{jnp.result_type(float)} (x64 {x64})",
        "cache": str(default_cache()),
    }


def default_cache() -> Path:
    """Where compiled programs are kept: lazyjax's folder in the platform's place for caches."""
    home = Path.home()
    if "XDG_CACHE_HOME" in os.environ:
        base = Path(os.environ["XDG_CACHE_HOME"])
    elif sys.platform == "darwin":
        base = home / "Library" / "Caches"
    elif sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA", home / "AppData" / "Local"))
    else:
        base = home / ".cache"
    return base / "lazyjax"


def _say(text: str) -> None:
    print(f"lazyjax: {text}", file=sys.stderr, flush=True)


class Stages:
    """Says on stderr what is being done, and keeps how long each stage took."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, name: str, text: str) -> Iterator[None]:
        """One stage: its line when it begins, its time when it ends."""
        _say(text)
        started = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - started


def run_verify(options: Verify) -> None:
    """`lazyjax verify`."""
    jax.config.update("jax_enable_x64", True)
    found = verify(instances=options.instances, seed=options.seed, report=_say)
    print(found)
    if found.violations:
        raise SystemExit(1)


def run_report(options: Report, command: str) -> None:
    """`lazyjax report`: everything that can be wrong with the input is found before the long work."""
    alphas = parse_alphas(options.alphas)
    _check_options(options)
    _configure(options)
    stages = Stages()
    with stages("input", "reading the data and building the model"), without_cache_noise():
        data = _load_data(options)
        train = None if options.data is not None else data.x.shape[0]
        configuration = describe(
            data,
            model=options.model,
            alphas=alphas,
            loss=options.loss,
            time=options.time,
            seed=options.seed,
            train=train,
        )
        check_folder(options.out, configuration)
        key, probe_key = split_key(options.seed)
        f, w0 = _load_model(options, key, data)
    with stages("diagnose", "the model beside its tangent model"), without_cache_noise():
        report = diagnose(
            f, w0, data.x, data.y, loss=options.loss, test=data.test, alphas=alphas, time=options.time,
            key=probe_key, progress=True,
        )  # fmt: skip
    with stages("figures", "drawing the figures"):
        images = {
            (name, kind): encode(figure, kind)
            for name, figure in report_figures(report).items()
            for kind in ("svg", "png")
        }
    print(report)
    files = _render(report, images, configuration, command, stages.seconds)
    _write(options.out, {"sweep.nc": report.dataset}, files)
    print(f"\nwrote {options.out / 'report.html'} (beside it: {REPORT}, sweep.nc, figures/)")


def run_reproduce(options: Reproduce) -> None:
    """`lazyjax reproduce`: settings are checked before the long work, results moved into place at its end."""
    if options.figure == "list":
        print(list_figures())
        return
    settings = choose_settings(options)
    _configure(options)
    stages = Stages()
    with stages("run", f"{options.figure}, {options.size} size"), without_cache_noise():
        data = make_figure(options, settings)
    with stages("draw", "drawing the figure"):
        files = draw_files(options, data)
    print(render_numbers(options, data))
    _write(options.out, {f"{options.figure}.nc": data}, files)
    shutil.rmtree(options.kept, ignore_errors=True)
    print(f"\nwrote {options.out / options.figure}.png (beside it: .svg, .nc); {stages.seconds['run']:.0f} s")


def _check_options(options: Report) -> None:
    """What the options themselves can get wrong."""
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


def _configure(options: Report | Reproduce) -> None:
    """Precision and compilation cache, before JAX computes anything."""
    if options.x64:
        jax.config.update("jax_enable_x64", True)
    if not options.no_cache:
        folder = options.cache or default_cache()
        folder.mkdir(parents=True, exist_ok=True)
        jax.config.update("jax_compilation_cache_dir", str(folder))
        # Of a hundred small programs each costs little to compile, and all of them seconds.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


def _load_data(options: Report) -> DataSet:
    if options.data is not None:
        return load_arrays(options.data)
    return digits(NUM_DIGITS if options.train is None else options.train, seed=options.seed)


def _load_model(options: Report, key: jax.Array, data: DataSet) -> tuple[Model, Params]:
    if options.model is None:
        return default_model(key, data, options.loss)
    f, w0 = load_model(options.model, key)
    check_model(f, w0, data, options.model)
    return f, w0


def _render(
    report: LazinessReport,
    images: Mapping[tuple[str, str], bytes],
    configuration: Mapping[str, Any],
    command: str,
    seconds: Mapping[str, float],
) -> dict[str, bytes]:
    """All files but the dataset: name in the folder to content, the report's JSON last."""
    sources = {
        name: "data:image/svg+xml;base64," + base64.b64encode(content).decode("ascii")
        for (name, kind), content in images.items()
        if kind == "svg"
    }
    made = {"command": command, **configuration, "seconds": dict(seconds), "versions": versions()}
    files = {f"figures/{name}.{kind}": content for (name, kind), content in images.items()}
    files["report.html"] = render_html(report, sources, made).encode()
    files[REPORT] = report_json(report, configuration, command, seconds).encode()
    return files


def _write(out: Path, datasets: Mapping[str, Any], files: Mapping[str, bytes]) -> None:
    """Write everything aside, then move it into place, the last file last: no half-written file is ever there."""
    stage = out / STAGE
    shutil.rmtree(stage, ignore_errors=True)
    for name in (*datasets, *files):
        for folder in (stage, out):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
    for name, dataset in datasets.items():
        dataset.to_netcdf(stage / name, engine="netcdf4")
    for name, content in files.items():
        (stage / name).write_bytes(content)
    for name in (*datasets, *files):
        with (stage / name).open("rb") as file:
            os.fsync(file.fileno())
        os.replace(stage / name, out / name)
    shutil.rmtree(stage)
