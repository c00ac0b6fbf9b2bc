"""Records of what made a result: versions, digests, configurations that are kept and compared.

A result on disk stands next to its configuration, a dict of plain values. An interrupted computation continues in
a folder only if `keep_configuration` finds the folder's configuration equal to its own.
"""

import hashlib
import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import equinox as eqx
import jax.random as jr
import jax.tree_util as jtu
import numpy as np

from lazyjax._core.files import set_aside, write_whole
from lazyjax._core.keys import is_key

PACKAGES = ("lazyjax", "jax", "jaxlib", "diffrax", "equinox", "optax", "numpy", "scipy")
"""The packages on which the numbers of a result depend."""


PLAIN = (bool, int, float, complex, str, bytes)
"""Values without a shape that a digest knows."""


def versions(*packages: str) -> dict[str, str]:
    """Return name to installed version of the given packages, of all in `PACKAGES` if none is given."""
    return {name: version(name) for name in packages or PACKAGES}


def digest_of(tree: Any) -> str:
    """Return a name of 16 hexadecimal digits for the arrays, numbers and texts of a tree: paths, types and every bit.

    Functions and other objects do not enter; random keys enter by their data. NumPy's and JAX's arrays are the same.
    """
    digest = hashlib.sha256()
    for path, leaf in jtu.tree_leaves_with_path(tree):
        if eqx.is_array(leaf):
            array = np.ascontiguousarray(jr.key_data(leaf) if is_key(leaf) else leaf)
            digest.update(f"{jtu.keystr(path)} {array.dtype} {array.shape}".encode())
            digest.update(array.tobytes())
        elif isinstance(leaf, PLAIN):
            digest.update(f"{jtu.keystr(path)} {type(leaf).__name__} {leaf!r}".encode())
    return digest.hexdigest()[:16]


def digest_of_text(*texts: str) -> str:
    """Return a name of 16 hexadecimal digits for texts, such as the text of a program."""
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]


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


def keep_configuration(path: Path, here: Mapping[str, Any], **words: str) -> bool:
    """Check the configuration that a file holds, or write it if there is none.

    A file that cannot be read is set aside, with a warning, and written anew.

    Args:
        path: The file.
        here: What is asked for.
        **words: `holder`, `kind` and `remedy` of `check_configuration`.

    Returns:
        Whether it was there.

    Raises:
        ValueError: the file holds another configuration.
    """
    there = read_configuration(path)
    if there is None:
        write_whole(path, json.dumps(as_json(here), indent=1))
        return False
    check_configuration(here, there, **words)
    return True


def read_configuration(path: Path) -> dict[str, Any] | None:
    """Return the configuration that a file holds, None if there is none; a damaged file is set aside with a warning."""
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as error:
        set_aside(path, f"it is no JSON: {error}")
        return None
    if not isinstance(found, dict):
        set_aside(path, "it holds no configuration")
        return None
    return found
