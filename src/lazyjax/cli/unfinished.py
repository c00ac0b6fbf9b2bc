"""The folder of the finished parts of a command that is not finished: kept until its results are written."""

import contextlib
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lazyjax._core.files import remove_partial
from lazyjax._core.records import keep_configuration

CONFIGURATION = "configuration.json"
"""The file in the folder that says what its parts belong to."""

DESCRIPTIONS = (CONFIGURATION, "sweep.json")
"""The files that say what parts belong to, and are no parts themselves."""


def has_parts(folder: Path) -> bool:
    """Return whether a folder holds anything that took time to compute."""
    found = [path.name for path in folder.rglob("*") if path.is_file()]
    return any(name not in DESCRIPTIONS and not name.startswith(".") for name in found)


@contextlib.contextmanager
def keeping(folder: Path, configuration: Mapping[str, Any], **words: str) -> Iterator[None]:
    """Keep the parts of a command during the `with` block; whoever ends it before there is one leaves nothing.

    Args:
        folder: Where the parts are; nobody else may write there.
        configuration: What they belong to: written once.
        **words: `holder`, `kind` and `remedy` of `check_configuration`, for the parts of another one.
    """
    remove_partial(folder)
    keep_configuration(folder / CONFIGURATION, configuration, **words)
    try:
        yield
    except BaseException:
        if not has_parts(folder):
            shutil.rmtree(folder)
        raise
    shutil.rmtree(folder)
