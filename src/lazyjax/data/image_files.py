"""Files of images: IDX as MNIST has them, and both published formats of CIFAR-10. Read only, never downloaded.

Pickles can run programs when they are read; those of CIFAR-10 are read by a machine that cannot (`plain_pickle`).
"""

import gzip
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from lazyjax.data.plain_pickle import PlainArray, load_plain

BATCHES = tuple(f"data_batch_{i}" for i in range(1, 6))
SIDE, CHANNELS, CLASSES = 32, 3, 10
"""The images of CIFAR-10: pixels of a side, colors, classes."""
RECORD = 1 + SIDE * SIDE * CHANNELS
"""Bytes of an image in its binary format: the label, then one plane per color."""
Arrays = tuple[np.ndarray, np.ndarray]
"""Images as bytes (n, height, width, channels), labels (n,)."""


def read_idx(folder: Path, name: str, dims: int, remedy: str) -> np.ndarray:
    """Read an IDX file of bytes, packed by gzip or not.

    Raises:
        FileNotFoundError: it is not in the folder.
        ValueError: it is something else, or cut off.
    """
    path = next((p for p in (folder / f"{name}.gz", folder / name) if p.is_file()), None)
    if path is None:
        msg = f"{folder / name}.gz does not exist (nor does it without .gz); {remedy}"
        raise FileNotFoundError(msg)
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        _refuse(path, "a whole gzip file", str(error), remedy)
    start = 4 + 4 * dims
    what = f"an IDX file of bytes with {dims} dimension(s)"
    if len(raw) < start or raw[:4] != bytes([0, 0, 8, dims]):
        _refuse(path, what, f"it begins with {raw[:4].hex(' ') or 'nothing'}", remedy)
    shape = tuple(int(size) for size in np.frombuffer(raw, ">u4", dims, 4))
    if len(raw) - start != int(np.prod(shape, dtype=object)):
        _refuse(path, what, f"its {len(raw) - start} bytes of data do not fill the shape {shape} it gives", remedy)
    return np.frombuffer(raw, np.uint8, offset=start).reshape(shape)


def read_cifar(folder: Path, remedy: str) -> tuple[Arrays, Arrays]:
    """Read the training and test images of CIFAR-10 from its binary files or its pickles.

    Raises:
        FileNotFoundError: files of neither format are there, or not all of one.
        ValueError: one is something else, or cut off.
    """
    places = [folder, folder / "cifar-10-batches-bin", folder / "cifar-10-batches-py"]
    formats = ((".bin", _read_binary), ("", _read_pickle))
    for suffix, read in formats:
        for place in places:
            if (place / f"{BATCHES[0]}{suffix}").is_file():
                parts = [read(_there(place / f"{name}{suffix}", remedy), remedy) for name in BATCHES]
                images, labels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
                return (images, labels), read(_there(place / f"test_batch{suffix}", remedy), remedy)
    msg = f"{folder} holds neither {BATCHES[0]}.bin nor {BATCHES[0]} of CIFAR-10; {remedy}"
    raise FileNotFoundError(msg)


def _there(path: Path, remedy: str) -> Path:
    if not path.is_file():
        msg = f"{path} does not exist next to the other files of CIFAR-10; {remedy}"
        raise FileNotFoundError(msg)
    return path


def _read_binary(path: Path, remedy: str) -> Arrays:
    raw = np.frombuffer(path.read_bytes(), np.uint8)
    if not raw.size or raw.size % RECORD:
        _refuse(path, f"records of {RECORD} bytes, a label and an image", f"it has {raw.size} bytes", remedy)
    records = raw.reshape(-1, RECORD)
    check_labels(path, records[:, 0], CLASSES, remedy)
    return _as_images(records[:, 1:]), records[:, 0]


def _read_pickle(path: Path, remedy: str) -> Arrays:
    try:
        found = load_plain(path.read_bytes())
    except ValueError as error:
        _refuse(path, "a pickle of plain containers and arrays", f"reading it failed ({error})", remedy)
    # Python 2 wrote them: its strings are bytes.
    entries = found.items() if isinstance(found, dict) else ()
    named: dict[str, Any] = {name.decode("latin1") if isinstance(name, bytes) else name: item for name, item in entries}
    data, labels, size = named.get("data"), named.get("labels"), SIDE * SIDE * CHANNELS
    if not isinstance(data, PlainArray) or (data.dtype, *data.shape[1:]) != ("u1", size):
        got = f"{data.dtype} {data.shape}" if isinstance(data, PlainArray) else type(data).__name__
        _refuse(path, f"a dictionary whose 'data' are bytes (n, {size})", f"they are {got}", remedy)
    count = data.shape[0]
    if len(data.content) != count * size:
        _refuse(path, f"{count} images of {size} bytes", f"their data have {len(data.content)} bytes", remedy)
    if not isinstance(labels, list) or len(labels) != count or count == 0 or {type(one) for one in labels} != {int}:
        _refuse(path, f"a dictionary with a list of {count} 'labels'", "it has none such", remedy)
    check_labels(path, labels, CLASSES, remedy)
    planes = np.frombuffer(data.content, np.uint8).reshape(data.shape, order="F" if data.fortran else "C")
    return _as_images(planes), np.asarray(labels)


def _as_images(planes: np.ndarray) -> np.ndarray:
    return planes.reshape(-1, CHANNELS, SIDE, SIDE).transpose(0, 2, 3, 1)


def check_labels(path: Path, labels: np.ndarray | Sequence[int], classes: int, remedy: str) -> None:
    """Check that labels are classes."""
    low, high = min(labels), max(labels)
    if low < 0 or high >= classes:
        _refuse(path, f"labels in 0..{classes - 1}", f"they are in {low}..{high}", remedy)


def _refuse(path: Path, rule: str, got: str, remedy: str) -> NoReturn:
    msg = f"{path} must hold {rule}, but {got}; {remedy}"
    raise ValueError(msg)
