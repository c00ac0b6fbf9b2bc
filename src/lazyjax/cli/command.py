"""The command `lazyjax`: the only place that prints, writes files, or changes JAX's configuration."""

import contextlib
import dataclasses
import difflib
import json
import os
import shlex
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Union

import equinox as eqx
import jax
import jax.numpy as jnp
import tyro
from tqdm import tqdm

from lazyjax._core.files import (
    PARTIAL,
    DamagedWarning,
    NotWrittenError,
    add_last_line,
    remove_partial,
    whole_file,
    writing,
)
from lazyjax._core.lock import in_use
from lazyjax.cli.output import REPORT, all_versions, check_folder, describe
from lazyjax.cli.quiet import without_cache_noise
from lazyjax.cli.report import Report, check_options, choose_model, load_data, render_files
from lazyjax.cli.reproduce import (
    Reproduce,
    check_results,
    choose_settings,
    describe_run,
    draw_files,
    list_figures,
    make_figure,
    render_numbers,
)
from lazyjax.cli.signals import Interrupted
from lazyjax.cli.unfinished import keeping
from lazyjax.cli.user_model import parse_alphas, split_key
from lazyjax.plot.axes import encode
from lazyjax.plot.report import report_figures
from lazyjax.report.diagnose import diagnose
from lazyjax.theory.verify import verify


@dataclasses.dataclass(frozen=True)
class Verify:
    """Check every theorem on random networks, losses, data and scales.

    Prints how often each bound was violated, how sharp it was, the rates in alpha, and where the published statements
    fail and the corrected ones hold. Computes in float64. Exits with code 1 if anything is violated.

    Attributes:
        instances: How many problems of each of ten families; each is followed at seven scales.
        seed: Random seed of the problems.
    """

    instances: int = 15
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Info:
    """Print versions, devices, precision and the cache folder."""


COMMANDS = {"report": Report, "verify": Verify, "reproduce": Reproduce, "info": Info}
"""The commands by name; the options of each are the fields of a class."""

Command = Union[*(Annotated[options, tyro.conf.subcommand(name)] for name, options in COMMANDS.items())]


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line.

    Args:
        argv: Arguments; None for those of the process.

    Raises:
        SystemExit: with one line on stderr: code 2 for bad input, 1 for a flow that failed or a file that could not be
            written, 130 for Ctrl-C, 143 if it was terminated.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["--version"]:
        print(f"lazyjax {version('lazyjax')}")
        return
    _check_command(arguments)
    options = tyro.cli(
        Command,  # pyright: ignore[reportArgumentType] - a union of annotated types is one at run time
        args=arguments,
        prog="lazyjax",
        description="How lazily does a differentiable model train? (lazyjax --version tells the version.)",
    )
    try:
        with without_cache_noise(), _telling_warnings():
            run(options, shlex.join(["lazyjax", *arguments]))
    except NotWrittenError as error:
        text = " ".join(str(error).split()).rstrip(".")
        print(f"lazyjax: error: {text}; {_describe_kept(options)}.", file=sys.stderr)
        raise SystemExit(1) from None
    except (ValueError, TypeError, OSError) as error:
        print(f"lazyjax: error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None
    except eqx.EquinoxRuntimeError as error:
        # The last line before Equinox's advice to programmers is the reason, above it is the stack.
        reason = str(error).split("-------------------")[0].strip().splitlines()[-1]
        print(f"lazyjax: error: {reason.removeprefix('equinox.EquinoxRuntimeError: ')}", file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt as error:
        line, code = (error.line, error.code) if isinstance(error, Interrupted) else ("interrupted", 130)
        print(f"lazyjax: {line}, {_describe_kept(options)}", file=sys.stderr)
        raise SystemExit(code) from None


def _check_command(arguments: Sequence[str]) -> None:
    """Refuse what the parser would take in silence, or refuse without a hint.

    Raises:
        SystemExit: the first word is no command; the nearest one is told. Or --set is there twice: all but the last
            would be forgotten.
    """
    if sum(argument.partition("=")[0] == "--set" for argument in arguments) > 1:
        print("lazyjax: error: --set must be there once, with all changes after it, got it twice.", file=sys.stderr)
        raise SystemExit(2)
    if arguments and not arguments[0].startswith("-") and arguments[0] not in COMMANDS:
        near = difflib.get_close_matches(arguments[0].lower(), COMMANDS, 1, 0.5)
        hint = f"did you mean {near[0]}?" if near else "choose one of these."
        print(
            f"lazyjax: error: there is no command {arguments[0]!r} among {', '.join(COMMANDS)}; {hint}", file=sys.stderr
        )
        raise SystemExit(2)


def run(options: Any, command: str) -> None:
    """Run the command that the options are of; `command` is its text."""
    if isinstance(options, Info):
        print("\n".join(f"{name:10} {value}" for name, value in describe_machine().items()))
    elif isinstance(options, Verify):
        run_verify(options)
    elif isinstance(options, Reproduce):
        run_reproduce(options)
    else:
        run_report(options, command)


def _describe_kept(options: Any) -> str:
    """Return what a command that did not end well has left."""
    kept = isinstance(options, Report | Reproduce) and options.kept.exists()
    return "the same command continues where it stopped" if kept else "nothing written"


@contextlib.contextmanager
def _telling_warnings() -> Iterator[None]:
    """Tell a warning in a line of the command's own, instead of two with a place in the library."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", DamagedWarning)
        warnings.showwarning = lambda message, *_, **__: tqdm.write(f"lazyjax: warning: {message}", file=sys.stderr)
        yield


def describe_machine() -> dict[str, str]:
    """Return what `lazyjax info` prints: versions, devices, precision, cache folder."""
    devices = ", ".join(str(device) for device in jax.devices())
    x64 = "on" if jnp.result_type(float) == jnp.float64 else "off; lazyjax report --x64 turns it on"
    return {
        **all_versions(),
        "backend": jax.default_backend(),
        "devices": devices,
        "precision": f"{jnp.result_type(float)} (x64 {x64})",
        "cache": str(default_cache()),
    }


def default_cache() -> Path:
    """Return where compiled programs are kept: a folder of lazyjax in the platform's place for caches."""
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
    """A clock that says on stderr what is being done, and keeps how long each stage took."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, name: str, text: str) -> Iterator[None]:
        """Print the line of a stage when it begins, keep its time when it ends."""
        _say(text)
        started = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - started


def run_verify(options: Verify) -> None:
    """Run `lazyjax verify`."""
    jax.config.update("jax_enable_x64", True)
    found = verify(instances=options.instances, seed=options.seed, report=_say)
    print(found)
    if found.violations:
        raise SystemExit(1)


def run_report(options: Report, command: str) -> None:
    """Run `lazyjax report`: everything that can be wrong with the input is found before the long work."""
    alphas = parse_alphas(options.alphas)
    check_options(options)
    _configure(options)
    stages = Stages()
    with stages("input", "reading the data and building the model"):
        data = load_data(options)
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
        check_folder(options.out, options.kept, configuration)
        key, probe_key = split_key(options.seed)
        f, w0 = choose_model(options, key, data)
    with in_use(options.out):
        check_folder(options.out, options.kept, configuration)  # somebody else may just have finished
        remove_partial(options.out, f"**/{PARTIAL}")
        with keeping(options.kept, configuration, holder=f"--out {options.out}", kind="report"):
            with stages("diagnose", "the model and its tangent model"):
                report = diagnose(
                    f,
                    w0,
                    data.x,
                    data.y,
                    loss=options.loss,
                    test=data.test,
                    alphas=alphas,
                    time=options.time,
                    key=probe_key,
                    progress=True,
                    folder=options.kept,
                )
            print(report, flush=True)  # before anything can go wrong with files
            with stages("figures", "drawing the figures"):
                images = {
                    (name, kind): encode(figure, kind)
                    for name, figure in report_figures(report).items()
                    for kind in ("svg", "png")
                }
            files = render_files(report, images, configuration, command, stages.seconds)
            _write(options.out, {"sweep.nc": report.dataset}, files)
    print(f"\nwrote {options.out / 'report.html'} (next to it: {REPORT}, sweep.nc, figures/)")


def run_reproduce(options: Reproduce) -> None:
    """Run `lazyjax reproduce`: settings are checked before the long work, results moved into place at its end."""
    if options.figure == "list":
        print(list_figures())
        return
    settings = choose_settings(options)
    _configure(options)
    stages = Stages()
    with in_use(options.out, f".{options.figure}.lock"):
        check_results(options, settings)  # somebody else may just have finished
        remove_partial(options.out, f".{options.figure}.*.partial")
        configuration = json.loads(describe_run(options, settings))
        with keeping(options.kept, configuration, holder=str(options.kept), kind="interrupted run"):
            with stages("run", f"{options.figure}, {options.size} size"):
                data = make_figure(options, settings)
            print(render_numbers(options, data), flush=True)
            with stages("draw", "drawing the figure"):
                files = draw_files(options, data)
            _write(options.out, {f"{options.figure}.nc": data}, files)
    print(f"\nwrote {options.out / options.figure}.png (next to it: .svg, .nc); {stages.seconds['run']:.0f} s")


def _configure(options: Report | Reproduce) -> None:
    """Set precision and compilation cache, before JAX computes anything."""
    if options.x64:
        jax.config.update("jax_enable_x64", True)
    if not options.no_cache:
        folder = options.cache or default_cache()
        if folder.exists() and not folder.is_dir():
            msg = f"--cache {folder} must be a folder, but is a file; choose another one, or leave it out."
            raise ValueError(msg)
        folder.mkdir(parents=True, exist_ok=True)
        jax.config.update("jax_compilation_cache_dir", str(folder))
        # Small programs too: each costs little to compile, but all of them seconds.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


def _write(out: Path, datasets: Mapping[str, Any], files: Mapping[str, bytes]) -> None:
    """Write all files under other names, then move them into place in order: none is ever there half-written."""
    with contextlib.ExitStack() as stack:
        # The stack closes what it has entered last first.
        paths = {name: stack.enter_context(whole_file(out / name)) for name in reversed([*datasets, *files])}
        for name, dataset in datasets.items():
            with writing(out / name):
                _write_dataset(paths[name], dataset)
        for name, content in files.items():
            with writing(out / name):
                paths[name].write_bytes(content)


def _write_dataset(path: Path, dataset: Any) -> None:
    try:
        dataset.to_netcdf(path, engine="netcdf4")
    except RuntimeError as error:  # what the library of NetCDF says of a full disk
        raise OSError(str(error)) from error
    add_last_line(path)
