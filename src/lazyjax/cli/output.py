"""What `lazyjax report` writes, as values: the configuration, strict JSON, and the check of the folder."""

import dataclasses
import hashlib
import json
import math
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lazyjax._core.files import PARTIAL
from lazyjax._core.lock import NAME as LOCK
from lazyjax._core.records import check_configuration, digest_of, read_configuration, versions
from lazyjax.cli.unfinished import CONFIGURATION
from lazyjax.cli.user_model import GAIN, HIDDEN, split_spec
from lazyjax.data.datasets import DataSet
from lazyjax.report.certificate import certificate_table
from lazyjax.report.diagnose import LazinessReport

REPORT = "report.json"
"""The last file to be written: a folder that holds it is complete."""

ABOUT = (
    "Made by `lazyjax report`. Numbers that are not finite are the strings 'inf', '-inf' and 'nan'. In 'table', gaps "
    "are the largest over time, everything else is at the end of training; 'tangent' is the tangent model. Every curve "
    "is in sweep.nc (xarray.open_dataset)."
)


def all_versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that the numbers depend on."""
    return {"python": platform.python_version(), **versions()}


def describe(
    data: DataSet,
    *,
    model: str | None,
    alphas: list[float],
    loss: str,
    time: float | None,
    seed: int,
    train: int | None,
) -> dict[str, Any]:
    """Return the configuration of a report: equal ones give equal results.

    Args:
        data: What is trained on; the digest of its arrays enters.
        model: FILE:FUNCTION, of which the name and the digest of the file enter; None for the default network.
        alphas: Scales.
        loss: Name of the loss.
        time: Flow time, None to have it chosen.
        seed: Random seed of the initial weights, and of the split of the digits.
        train: How many digits, None for a user's own data.
    """
    if model is None:
        source = f"tanh network, hidden layers {HIDDEN}, gain {GAIN}"
    else:
        path, name = split_spec(model)
        source = f"{path.name}:{name}, sha256 {hashlib.sha256(path.read_bytes()).hexdigest()}"
    return {
        "model": source,
        "data": f"{'own arrays' if train is None else f'{train} digits'}, digest {digest_of(data._asdict())}",
        "alphas": encode_numbers(sorted({*alphas, math.inf})),
        "loss": loss,
        "time": time,
        "seed": seed,
        "dtype": str(data.x.dtype),
    }


def check_folder(out: Path, kept: Path, configuration: Mapping[str, Any]) -> None:
    """Check that a folder may be written to: it is empty, or holds the results of this very configuration.

    Args:
        out: The folder.
        kept: The folder in it for the parts of an unfinished report.
        configuration: What is to be written.

    Raises:
        ValueError: not a folder, no permission to write, other files, or another configuration.
    """
    remedy = "choose another folder with --out, or delete this one"
    if out.exists() and not out.is_dir():
        msg = f"--out {out} must be a folder, but is a file; {remedy}."
        raise ValueError(msg)
    above = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.exists())
    if not (above.is_dir() and os.access(above, os.W_OK)):
        msg = f"--out {out} cannot be written (no permission to write in {above}); choose another folder with --out."
        raise ValueError(msg)
    # A report that was killed, even while it wrote its results, is known by the configuration of its parts.
    found = [_read_configuration(out / REPORT), read_configuration(kept / CONFIGURATION)]
    there = [path for path in out.rglob("*") if path.is_file() and not path.is_relative_to(kept)]
    strange = [path for path in there if path.name != LOCK and not path.match(PARTIAL)]
    if strange and found == [None, None]:
        msg = f"--out {out} holds files that are not a lazyjax report, nothing was overwritten; {remedy}."
        raise ValueError(msg)
    words = {"holder": f"--out {out}", "kind": "report", "remedy": f"nothing was overwritten; {remedy}"}
    for one in found:
        if one is not None:
            check_configuration(configuration, one, **words)


def _read_configuration(path: Path) -> dict[str, Any] | None:
    """Return the configuration in a `report.json` of ours, None for any other file."""
    try:
        found = json.loads(path.read_text(encoding="utf-8")).get("configuration")
    except (OSError, ValueError, AttributeError):
        return None
    return found if isinstance(found, dict) else None


def report_json(
    report: LazinessReport, configuration: Mapping[str, Any], command: str, seconds: Mapping[str, float]
) -> str:
    """Return the report without its curves as strict JSON; `ABOUT` says how to read it."""
    slopes = {name: dataclasses.asdict(slope) for name, slope in report.slopes.items()}
    content = {
        "about": ABOUT,
        "verdict": report.verdict,
        "slopes": slopes,
        "notes": list(report.notes),
        "table": report_table(report),
        "certificate": None if report.certificate is None else certificate_table(report.certificate),
        "settings": dict(report.dataset.attrs),
        "configuration": dict(configuration),
        "command": command,
        "versions": all_versions(),
        "timings_s": {name: round(value, 3) for name, value in seconds.items()},
    }
    return json.dumps(encode_numbers(content), indent=1, allow_nan=False) + "\n"


def report_table(report: LazinessReport) -> list[dict[str, Any]]:
    """Return one row of plain numbers per scale, the tangent model last."""
    data = report.dataset
    rows: list[dict[str, Any]] = [{"alpha": alpha} for alpha in np.asarray(data["alpha"], np.float64).tolist()]
    for name in (str(name) for name in data.data_vars if not str(name).endswith("_failed")):
        values = data[name]
        if values.dims == ("alpha", "time"):
            values = values.max("time") if "gap" in name else values.isel(time=-1)
        if values.dims == ("alpha",):
            for row, value in zip(rows, values.values.tolist(), strict=True):
                row[name] = value
    tangent = {
        str(name).removeprefix("tangent_"): float(data[name][-1])
        for name in data.data_vars
        if str(name).startswith("tangent_")
    }
    return [*rows, {"alpha": "tangent", **tangent}]


def encode_numbers(value: Any) -> Any:
    """Return plain JSON values: Python scalars instead of NumPy's, strings for numbers that are not finite."""
    if isinstance(value, Mapping):
        return {str(name): encode_numbers(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [encode_numbers(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
