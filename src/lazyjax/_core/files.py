"""Files that are there whole or not at all, and that show when they are damaged.

A file is written under a name of its own and renamed, so that no interruption leaves half of one, and two processes
never write to the same one. Arrays are kept with a seal: a digest of their bits, of the file's name and of the
computation that they belong to. What does not fit its seal is set aside with a warning, and never taken for a result.
"""

import contextlib
import hashlib
import io
import os
import secrets
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

PARTIAL = ".*.partial"
"""The pattern of the names of files under way."""


LAST_LINE = b"\nlazyjax sha256 "
"""How the last line of a file with a checksum begins."""


class NotWrittenError(OSError):
    """A file that could not be written: the disk is full, say, or the folder must not be written to."""


class DamagedError(ValueError):
    """A file that is not as it was written."""


class DamagedWarning(UserWarning):
    """A damaged file, which is not used."""


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Give a path to write to that becomes `path` at the end of the `with` block: whole, or not at all.

    The file is written in the same folder, which is made if it does not exist, under a name that no other writer has.
    If the block raises, this file is removed and what was at `path` before stays.

    Raises:
        NotWrittenError: the block, or the system at its end, raised an OSError.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.partial")
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield aside
            _sync(aside)
            os.replace(aside, path)
            _sync(path.parent)
    finally:
        with contextlib.suppress(OSError):  # the folder, or the disk, may be gone
            aside.unlink(missing_ok=True)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn the errors of the system in a `with` block into a `NotWrittenError` that names the file."""
    try:
        yield
    except NotWrittenError:
        raise
    except OSError as error:
        msg = f"{path} could not be written ({error.strerror or error}); free some space, or choose another folder."
        raise NotWrittenError(msg) from error


def _sync(path: Path) -> None:
    """Bring a file, or the names in a folder, from the system's memory to the disk."""
    if path.is_dir() and os.name == "nt":  # which cannot open folders
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file whole or not at all, text as UTF-8."""
    with whole_file(path) as aside:
        aside.write_bytes(content.encode() if isinstance(content, str) else content)


def remove_partial(folder: Path, pattern: str = PARTIAL) -> None:
    """Remove what writers that were killed have left; only for the one process that may write there."""
    for path in folder.glob(pattern):
        path.unlink(missing_ok=True)


def write_arrays(path: Path, arrays: Sequence[np.ndarray], owner: str) -> None:
    """Write arrays as an `.npz` file with a seal.

    Args:
        path: The file.
        arrays: What to keep, in order.
        owner: A digest of what the arrays are a part of.
    """
    seal = _seal(path.name, arrays, owner)
    with whole_file(path) as aside, aside.open("wb") as file:
        np.savez(file, *arrays, owner=np.asarray(owner), seal=np.asarray(seal))


def read_arrays(path: Path) -> tuple[list[np.ndarray], str]:
    """Return the arrays of a file and the digest of their owner.

    Raises:
        DamagedError: they are not what `write_arrays` has written into a file of this name.
    """
    content = path.read_bytes()
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as found:
            owner, seal = str(found["owner"]), str(found["seal"])
            arrays = [found[f"arr_{i}"] for i in range(len(found.files) - 2)]
    except Exception as error:  # zipfile, zlib and NumPy have many for bytes that they did not write
        msg = f"it cannot be read: {type(error).__name__}"
        raise DamagedError(msg) from error
    if seal != _seal(path.name, arrays, owner):
        msg = "its checksum is another one"
        raise DamagedError(msg)
    return arrays, owner


def _seal(name: str, arrays: Sequence[np.ndarray], owner: str) -> str:
    digest = hashlib.sha256(f"{name} {owner}".encode())
    for array in arrays:
        digest.update(f" {array.dtype} {array.shape} ".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def add_last_line(path: Path) -> None:
    """Append the checksum of a file of another format, such as NetCDF, whose readers pass over what follows it."""
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    with path.open("ab") as file:
        file.write(LAST_LINE + digest.encode() + b"\n")


def check_last_line(path: Path) -> bool:
    """Check a file by the checksum in its last line, before a reader that may crash or hang on a damaged one has it.

    Returns:
        Whether it has one.

    Raises:
        DamagedError: it is that of another content.
    """
    content, mark, digest = path.read_bytes().rpartition(LAST_LINE)
    if mark and hashlib.sha256(content).hexdigest().encode() + b"\n" != digest:
        msg = "its checksum is another one"
        raise DamagedError(msg)
    return bool(mark)


def set_aside(path: Path, why: str) -> None:
    """Rename a damaged file or folder, and warn: what it held is to be computed again.

    Args:
        path: What is damaged.
        why: What is wrong with it, for the warning.
    """
    names = (path.with_name(f"{path.name}.damaged{'' if i == 1 else f'-{i}'}") for i in range(1, 10**6))
    there = next(name for name in names if not name.exists())
    os.rename(path, there)
    msg = f"{path} is damaged ({why}): it was renamed to {there.name}, and what it held is computed again."
    warnings.warn(msg, DamagedWarning, stacklevel=2)
