"""`lazyjax reproduce`: its options, what they may get wrong, and what it makes, as values; `cli` prints and writes."""

import ast
import dataclasses
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from lazyjax.cli.output import encode_numbers
from lazyjax.experiments.figure import FIGURES, Number, find, settings_of
from lazyjax.plot.axes import encode

if TYPE_CHECKING:
    import xarray

CONFIGURATION = "configuration.json"
"""What the parts beside it belong to."""


@dataclasses.dataclass(frozen=True)
class Reproduce:
    """Make a figure of the paper anew, and print its numbers beside their references.

    Writes FIGURE.png, FIGURE.svg and FIGURE.nc (all data, with settings and versions). An interrupted run goes on where
    it stopped when it is called again.

    Attributes:
        figure: Which one, for example fig1c; `lazyjax reproduce list` names all.
        size: Small takes seconds to two minutes, default minutes on two cores, paper has the paper's own numbers; gpu
            has them for deep networks, which take an accelerator.
        data: Of the figures of deep networks: digits, fashion-mnist or cifar10. Without it: digits at small size,
            fashion-mnist at default size, cifar10 at gpu size.
        data_dir: Folder of its files. Without it: where Debian's package dataset-fashion-mnist has them.
        set: Settings to change, for example --set taus=0.1,1,10 seeds=2.
        seed: The first of the random seeds.
        out: Folder for the files; those of another configuration are not overwritten.
        cache: Folder for compiled programs. Without it: lazyjax's folder in the user's cache folder.
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
        """Always: descents run in the dtype of their settings, the risks of lazy nets need float64."""
        return True

    @property
    def kept(self) -> Path:
        """Where parts of an unfinished run are kept."""
        return self.out / f".{self.figure}-partial"


def list_figures() -> str:
    """What `lazyjax reproduce list` prints."""
    return "\n".join(f"{name:12} {find(name).title}" for name in FIGURES)


def parse_changes(texts: Sequence[str]) -> dict[str, Any]:
    """NAME=VALUE texts as settings: numbers, texts, and numbers with commas between them.

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
        except (ValueError, SyntaxError):
            changes[name] = value
    return changes


def choose_settings(options: Reproduce) -> Any:
    """The settings that the options ask for; everything that they can get wrong is found here.

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
    _check_file(options, settings)
    _check_kept(options, settings)
    return settings


def _changes(options: Reproduce) -> dict[str, Any]:
    """--set, and --data as one of them; both options of data are refused where there is none."""
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
    """The configuration of a figure: equal ones give equal results."""
    made = {"figure": figure or options.figure, "seed": options.seed, **dataclasses.asdict(settings)}
    # Files of one name in different folders are different data.
    made |= {} if options.data_dir is None else {"data_dir": str(options.data_dir.resolve())}
    return json.dumps(encode_numbers(made), allow_nan=False)


def _check_file(options: Reproduce, settings: Any) -> None:
    import xarray

    path = options.out / f"{options.figure}.nc"
    if not path.exists():
        return
    try:
        with xarray.open_dataset(path, engine="netcdf4") as data:
            there = data.attrs.get("configuration")
    except (OSError, ValueError):
        there = None
    if there != describe_run(options, settings):
        msg = f"{path} is of another configuration, nothing was overwritten; choose another folder with --out."
        raise ValueError(msg)


def _check_kept(options: Reproduce, settings: Any) -> None:
    """Refuse the finished parts of an interrupted run of another configuration: they would be deleted at the end."""
    path = options.kept / CONFIGURATION
    parts = options.kept.is_dir() and any(entry != path for entry in options.kept.iterdir())
    if parts and (not path.exists() or path.read_text(encoding="utf-8") != describe_run(options, settings)):
        msg = (
            f"{options.kept} holds the parts of an interrupted run of another configuration, nothing was changed; "
            "finish that one, choose another folder with --out, or delete this one."
        )
        raise ValueError(msg)


def make_figure(options: Reproduce, settings: Any) -> "xarray.Dataset":
    """Run the experiment, going on from what an interrupted run has kept."""
    figure = find(options.figure)
    data = _of_twin(options, settings, figure.twin)
    if data is None:
        more = {"data_dir": options.data_dir} if figure.images else {}
        data = figure.run(settings, seed=options.seed, folder=options.kept, progress=True, **more)
    return data.assign_attrs(
        figure=options.figure, title=figure.title, size=options.size, configuration=describe_run(options, settings)
    )


def _of_twin(options: Reproduce, settings: Any, twin: str | None) -> "xarray.Dataset | None":
    """What another figure of the same run, and of equal settings, has left in the folder."""
    import xarray

    path = options.out / f"{twin}.nc"
    if twin is None or not path.exists():
        return None
    try:
        data = xarray.load_dataset(path, engine="netcdf4")
    except (OSError, ValueError):
        return None
    return data if data.attrs.get("configuration") == describe_run(options, settings, twin) else None


def draw_files(options: Reproduce, data: "xarray.Dataset") -> dict[str, bytes]:
    """The figure as files: name to content."""
    figure = find(options.figure).draw(data)
    return {f"{options.figure}.{kind}": encode(figure, kind) for kind in ("png", "svg")}


def render_numbers(options: Reproduce, data: "xarray.Dataset") -> str:
    """The numbers of a figure beside their references, as a table."""
    figure = find(options.figure)
    found = figure.numbers(data)
    width = max(len(number.label) for number in found)
    head = f"{options.figure}: {figure.title}\n{'':{width}}  {'here':>10}  {'reference':>10}"
    return "\n".join([head, *(_row(number, width) for number in found)])


def _row(number: Number, width: int) -> str:
    reference = "" if number.reference is None else f"{number.reference:.4g}"
    return f"{number.label:{width}}  {number.value:>10.4g}  {reference:>10}  {number.note}".rstrip()
