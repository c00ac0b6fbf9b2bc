"""Records of what made a result: versions, digests of arrays, configurations compared, files written whole.

A result on disk stands next to its configuration, a dict of plain values. An interrupted computation continues in
a folder only if `check_configuration` finds the folder's configuration equal to its own.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import equinox as eqx
import jax.random as jr
import jax.tree_util as jtu
import numpy as np

from lazyjax._core.keys import is_key

PACKAGES = ("lazyjax", "jax", "jaxlib", "diffrax", "equinox", "optax", "numpy", "scipy")
"""The packages on which the numbers of a result depend."""


def versions(*packages: str) -> dict[str, str]:
    """Return name to installed version of the given packages, of all in `PACKAGES` if none is given."""
    return {name: version(name) for name in packages or PACKAGES}


def digest_of(tree: Any) -> str:
    """Return a name of 16 hexadecimal digits for the arrays of a tree: paths, dtypes, shapes and every bit.

    Leaves that are no arrays do not enter; random keys enter by their data. NumPy's and JAX's arrays are the same.
    """
    digest = hashlib.sha256()
    for path, leaf in jtu.tree_leaves_with_path(eqx.filter(tree, eqx.is_array)):
        array = np.ascontiguousarray(jr.key_data(leaf) if is_key(leaf) else leaf)
        digest.update(f"{jtu.keystr(path)} {array.dtype} {array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()[:16]


def as_json(configuration: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration as it comes back from a JSON file: tuples are lists, other objects their `str`."""
    return json.loads(json.dumps(dict(configuration), default=str))


def check_configuration(
    here: Mapping[str, Any],
    there: Mapping[str, Any],
    *,
    holder: str,
    kind: str,
    remedy: str = "choose another folder, or delete it",
) -> None:
    """Check that the configuration found on disk is the one asked for.

    Args:
        here: What is asked for; compared as JSON has it. An entry that is missing counts as None.
        there: What was found.
        holder: Where, to begin the message with, such as "folder /tmp/run".
        kind: What the configuration is of: "training", "sweep", ...
        remedy: What to do, to end the message with.

    Raises:
        ValueError: they differ; the message names every entry that does.

    Example:
        >>> check_configuration({"step": 0.1}, {"step": 0.2}, holder="folder run", kind="sweep")
        Traceback (most recent call last):
        ...
        ValueError: folder run holds another sweep (step 0.2 there and 0.1 here); choose another folder, or delete it.
    """
    ours, theirs = as_json(here), as_json(there)
    # Compared as text, in which NaN equals NaN.
    differ = [n for n in {**ours, **theirs} if json.dumps(ours.get(n)) != json.dumps(theirs.get(n))]
    if differ:
        changes = ", ".join(f"{name} {theirs.get(name)} there and {ours.get(name)} here" for name in differ)
        msg = f"{holder} holds another {kind} ({changes}); {remedy}."
        raise ValueError(msg)


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Give a path to write to that becomes `path` at the end of the `with` block: whole, or not at all.

    The file is written as `.NAME.partial` in the same folder, which is made if it does not exist. If the block
    raises, this file is removed and what was at `path` before stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.partial")
    try:
        yield aside
        with aside.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file whole or not at all, text as UTF-8."""
    with whole_file(path) as aside:
        aside.write_bytes(content.encode() if isinstance(content, str) else content)
