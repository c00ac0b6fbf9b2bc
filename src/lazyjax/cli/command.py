"""The command `lazyjax`: the only place that prints, writes files, or changes JAX's configuration."""

import contextlib
import dataclasses
import os
import shlex
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import equinox as eqx
import jax
import jax.numpy as jnp
import tyro

from lazyjax._core.files import whole_file, write_whole
from lazyjax.cli.output import REPORT, all_versions, check_folder, describe
from lazyjax.cli.quiet import without_cache_noise
from lazyjax.cli.report import Report, check_options, choose_model, load_data, render_files
from lazyjax.cli.reproduce import (
    CONFIGURATION,
    Reproduce,
    choose_settings,
    describe_run,
    draw_files,
    list_figures,
    make_figure,
    render_numbers,
)
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


Command = (
    Annotated[Report, tyro.conf.subcommand("report")]
    | Annotated[Verify, tyro.conf.subcommand("verify")]
    | Annotated[Reproduce, tyro.conf.subcommand("reproduce")]
    | Annotated[Info, tyro.conf.subcommand("info")]
)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line.

    Args:
        argv: Arguments; None for those of the process.

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
        left = "the same command continues where it stopped" if kept else "nothing written"
        print(f"lazyjax: interrupted, {left}", file=sys.stderr)
        raise SystemExit(130) from None


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
    with stages("input", "reading the data and building the model"), without_cache_noise():
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
        check_folder(options.out, configuration)
        key, probe_key = split_key(options.seed)
        f, w0 = choose_model(options, key, data)
    with stages("diagnose", "the model and its tangent model"), without_cache_noise():
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
        )
    with stages("figures", "drawing the figures"):
        images = {
            (name, kind): encode(figure, kind)
            for name, figure in report_figures(report).items()
            for kind in ("svg", "png")
        }
    print(report)
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
    with stages("run", f"{options.figure}, {options.size} size"), _keeping(options, settings), without_cache_noise():
        data = make_figure(options, settings)
    with stages("draw", "drawing the figure"):
        files = draw_files(options, data)
    print(render_numbers(options, data))
    _write(options.out, {f"{options.figure}.nc": data}, files)
    shutil.rmtree(options.kept, ignore_errors=True)
    print(f"\nwrote {options.out / options.figure}.png (next to it: .svg, .nc); {stages.seconds['run']:.0f} s")


@contextlib.contextmanager
def _keeping(options: Reproduce, settings: Any) -> Iterator[None]:
    """Keep the configuration of a run next to its finished parts; a run that ends before it has any leaves nothing."""
    name, there = options.kept / CONFIGURATION, options.out.exists()
    write_whole(name, describe_run(options, settings))
    try:
        yield
    except BaseException:
        if list(options.kept.iterdir()) == [name]:
            shutil.rmtree(options.kept)
            if not there and not any(options.out.iterdir()):
                options.out.rmdir()
        raise


def _configure(options: Report | Reproduce) -> None:
    """Set precision and compilation cache, before JAX computes anything."""
    if options.x64:
        jax.config.update("jax_enable_x64", True)
    if not options.no_cache:
        folder = options.cache or default_cache()
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
            dataset.to_netcdf(paths[name], engine="netcdf4")
        for name, content in files.items():
            paths[name].write_bytes(content)
