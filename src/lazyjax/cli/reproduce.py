"""`lazyjax reproduce`: its options and their checks, and what it makes, as values."""

import ast
import dataclasses
import json
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from lazyjax._core.files import DamagedError, DamagedWarning, check_last_line
from lazyjax._core.records import check_configuration, read_configuration
from lazyjax._core.tables import format_table
from lazyjax.cli.output import encode_numbers
from lazyjax.cli.unfinished import CONFIGURATION, has_parts
from lazyjax.experiments.figure import FIGURES, find, settings_of
from lazyjax.plot.axes import encode

if TYPE_CHECKING:
    import xarray


@dataclasses.dataclass(frozen=True)
class Reproduce:
    """Reproduce a figure of the paper, and print its numbers next to their references.

    Writes FIGURE.png, FIGURE.svg and FIGURE.nc (all data, with settings and versions). An interrupted run continues
    where it stopped when the same command is run again.

    Attributes:
        figure: Name of the figure, for example fig1c; `lazyjax reproduce list` prints all names.
        size: Small takes between a few seconds and two minutes, default a few minutes on two cores; paper has the
            numbers of the paper, and gpu has them for deep networks, which take an accelerator.
        data: Data set for the figures of deep networks: digits, fashion-mnist or cifar10. If not given: digits at small
            size, fashion-mnist at default size, cifar10 at gpu size.
        data_dir: Folder with the files of the data set. If not given: where the Debian package dataset-fashion-mnist
            has them.
        set: Settings to change, for example --set taus=0.1,1,10 seeds=2.
        seed: The first of the random seeds.
        out: Folder for the files; those of another configuration are not overwritten.
        cache: Folder for compiled programs. If not given: a folder of lazyjax in the user's cache folder.
        no_cache: Compile everything anew and keep nothing.
    """

    figure: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="FIGURE")]
    size: Literal["small", "default", "paper", "gpu"] = "default"
    data: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    data_dir: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    set: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME=VALUE ...")] = ()
    seed: int = 0
    out: Annotated[Path, tyro.conf.arg(metavar="FOLDER")] = Path("lazyjax-figures")
    cache: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    no_cache: tyro.conf.FlagCreatePairsOff[bool] = False

    @property
    def x64(self) -> bool:
        """Always on: descents run in the dtype of their settings, the risks of lazy networks need float64."""
        return True

    @property
    def kept(self) -> Path:
        """Folder of the finished parts of an unfinished run."""
        return self.out / f".{self.figure}-partial"


def list_figures() -> str:
    """Return what `lazyjax reproduce list` prints."""
    return format_table([(name, find(name).title) for name in FIGURES])


def parse_changes(texts: Sequence[str]) -> dict[str, Any]:
    """Return NAME=VALUE texts as settings: numbers, texts, and numbers with commas between them.

    Raises:
        ValueError: not of that form.
    """
    changes = {}
    for text in texts:
        name, mark, value = text.partition("=")
        if not mark or not name or not value:
            msg = f"--set takes NAME=VALUE, for example taus=0.1,1,10, got {text!r}."
            raise ValueError(msg)
        try:
            changes[name] = ast.literal_eval(re.sub(r"\binf\b", "1e999", value))
        except (ValueError, SyntaxError, RecursionError, MemoryError):  # a text, or brackets too deep
            changes[name] = value
    return changes


def choose_settings(options: Reproduce) -> Any:
    """Return the settings that the options ask for; everything that can be wrong with them is found here.

    Raises:
        ValueError: an unknown figure or setting, a value out of its range, a file of another configuration.
    """
    settings = settings_of(options.figure, options.size, _changes(options))
    if not 0 <= options.seed < 2**31:
        msg = f"--seed must lie in 0..2^31 - 1, got {options.seed}."
        raise ValueError(msg)
    if options.out.exists() and not options.out.is_dir():
        msg = f"--out {options.out} must be a folder, but is a file; choose another folder with --out."
        raise ValueError(msg)
    check_results(options, settings)
    return settings


def check_results(options: Reproduce, settings: Any) -> None:
    """Check that what is in the folder, finished or not, is of this very figure.

    Raises:
        ValueError: a file or the parts of another configuration.
    """
    _check_file(options, settings)
    _check_kept(options, settings)


def _changes(options: Reproduce) -> dict[str, Any]:
    """Return the changes of --set, and --data as one of them; refuse the data options for a figure without data set."""
    changes = parse_changes(options.set)
    asked = [flag for flag, value in (("--data", options.data), ("--data-dir", options.data_dir)) if value is not None]
    if asked and not find(options.figure).images:
        takes = ", ".join(name for name in FIGURES if find(name).images)
        msg = (
            f"{asked[0]} is for the figures of images ({takes}), but {options.figure} draws its own data; leave it out."
        )
        raise ValueError(msg)
    return changes if options.data is None else {**changes, "data": options.data}


def describe_run(options: Reproduce, settings: Any, figure: str | None = None) -> str:
    """Return the configuration of a figure as JSON: equal ones give equal results."""
    made = {"figure": figure or options.figure, "seed": options.seed, **dataclasses.asdict(settings)}
    # Files with one name in different folders are different data.
    made |= {} if options.data_dir is None else {"data_dir": str(options.data_dir.resolve())}
    return json.dumps(encode_numbers(made), allow_nan=False)


def _check_file(options: Reproduce, settings: Any) -> None:
    import xarray

    path = options.out / f"{options.figure}.nc"
    if not path.exists():
        return
    remedy = "nothing was overwritten; choose another folder with --out"
    try:
        check_last_line(path)  # figures of earlier versions have none
        with xarray.open_dataset(path, engine="netcdf4") as data:
            there = json.loads(data.attrs.get("configuration", "{}"))
    except Exception as error:  # NetCDF, HDF5 and xarray have many for a file that they did not write
        msg = f"{path} must be a figure of lazyjax, but cannot be read ({error}); {remedy}, or delete it."
        raise ValueError(msg) from error
    _compare(options, settings, there, holder=str(path), kind="figure", remedy=remedy)


def _check_kept(options: Reproduce, settings: Any) -> None:
    """Refuse the finished parts of another interrupted run: they would be deleted at the end."""
    there = read_configuration(options.kept / CONFIGURATION)
    if there is None or not has_parts(options.kept):
        # Parts without a configuration, since it was damaged, tell by themselves what they are of.
        return
    remedy = "nothing was changed; finish that one, choose another folder with --out, or delete this one"
    _compare(options, settings, there, holder=str(options.kept), kind="interrupted run", remedy=remedy)


def _compare(options: Reproduce, settings: Any, there: Any, **words: str) -> None:
    check_configuration(json.loads(describe_run(options, settings)), there if isinstance(there, dict) else {}, **words)


def make_figure(options: Reproduce, settings: Any) -> "xarray.Dataset":
    """Run the experiment, continuing from what an interrupted run has kept."""
    figure = find(options.figure)
    data = _shared_run(options, settings, figure.same_run_as)
    if data is None:
        more = {"data_dir": options.data_dir} if figure.images else {}
        data = figure.run(settings, seed=options.seed, folder=options.kept, progress=True, **more)
    return data.assign_attrs(
        figure=options.figure,
        title=figure.title,
        size=options.size,
        configuration=describe_run(options, settings),
    )


def _shared_run(options: Reproduce, settings: Any, other: str | None) -> "xarray.Dataset | None":
    """Return what another figure of the same run and with equal settings has left in the folder.

    One that is damaged is left where it is, with a warning, and computed again for this figure.
    """
    import xarray

    path = options.out / f"{other}.nc"
    if other is None or not path.exists():
        return None
    try:
        why = None if check_last_line(path) else "has no checksum"
    except DamagedError as error:
        why = f"is damaged ({error})"
    if why is not None:
        warnings.warn(f"{path} {why}: its run is computed again.", DamagedWarning, stacklevel=2)
        return None
    data = xarray.load_dataset(path, engine="netcdf4")
    return data if data.attrs.get("configuration") == describe_run(options, settings, other) else None


def draw_files(options: Reproduce, data: "xarray.Dataset") -> dict[str, bytes]:
    """Return the files of the figure, name to content."""
    figure = find(options.figure).draw(data)
    return {f"{options.figure}.{kind}": encode(figure, kind) for kind in ("png", "svg")}


def render_numbers(options: Reproduce, data: "xarray.Dataset") -> str:
    """Return the numbers of a figure next to their references, as a table."""
    figure = find(options.figure)
    rows = [
        (label, f"{value:.4g}", "" if reference is None else f"{reference:.4g}", note)
        for label, value, reference, note in figure.numbers(data)
    ]
    return f"{options.figure}: {figure.title}\n" + format_table([("", "here", "reference", ""), *rows], "<>><")
