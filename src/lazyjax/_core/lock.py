"""One writer per folder: a lock that ends with its process, however that ends."""

import contextlib
import datetime as dt
import os
import platform
import sys
from collections.abc import Iterator
from pathlib import Path

from lazyjax._core.files import NotWrittenError

NAME = ".lock"
"""The file in a folder that is locked while the folder is in use."""


@contextlib.contextmanager
def in_use(folder: Path, name: str = NAME) -> Iterator[None]:
    """Keep a folder to oneself during the `with` block.

    The system forgets a lock when its process ends, so that one that was killed is in nobody's way. The file is
    removed at the end, and so are the folders that were made here and are empty.

    Args:
        folder: Made if it does not exist.
        name: The file that is locked: one per work in the folder that is to be done by one process at a time.

    Raises:
        ValueError: the folder is in use; the message tells by whom and since when.
        NotWrittenError: nothing can be written there.
    """
    made, path = [here for here in (folder, *folder.parents) if not here.exists()], folder / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = _open(path)
    except OSError as error:
        msg = f"folder {folder} cannot be written to ({error.strerror or error}); choose another folder."
        raise NotWrittenError(msg) from error
    if descriptor is None:
        holder = _read(path) or "another process"
        msg = f"folder {folder} is in use by {holder}; wait until it ends, or choose another folder."
        raise ValueError(msg)
    try:
        now = dt.datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
        os.truncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {platform.node()} since {now}\n".encode())
        yield
    finally:
        with contextlib.suppress(OSError):  # the folder may be gone
            path.unlink(missing_ok=True)
            for here in made:
                if any(here.iterdir()):
                    break
                here.rmdir()
        os.close(descriptor)


def _open(path: Path) -> int | None:
    """Return an open file that is locked, None if another process has locked it."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        if not _lock(descriptor):
            os.close(descriptor)
            return None
        # The one before may have removed the file between the two lines above: then the lock is on no name.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(path.stat(), os.fstat(descriptor)):
                return descriptor
        os.close(descriptor)


def _read(path: Path) -> str:
    """Return what the holder has written, or nothing if it has not yet, or has just ended."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except FileNotFoundError:
        return ""


if sys.platform == "win32":
    import msvcrt

    def _lock(descriptor: int) -> bool:
        try:
            os.lseek(descriptor, 2**20, os.SEEK_SET)  # past the text, which others read
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
            os.lseek(descriptor, 0, os.SEEK_SET)
        except OSError:
            return False
        return True
else:
    import fcntl

    def _lock(descriptor: int) -> bool:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True
