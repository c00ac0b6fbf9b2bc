"""Images to classify, 32 x 32 as the paper's networks take them: scikit-learn's digits, Fashion-MNIST, CIFAR-10.

Nothing is downloaded. Digits come with scikit-learn, the others are read from files that you have.
"""

import difflib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from lazyjax.data.datasets import DataSet
from lazyjax.data.image_files import CLASSES, Arrays, check_labels, read_cifar, read_idx

SIDE = 32
FASHION_FOLDER = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package dataset-fashion-mnist puts its files."""
FASHION_REMEDY = (
    "install Debian's package dataset-fashion-mnist, or name a folder (--data-dir) with train-images-idx3-ubyte, "
    "train-labels-idx1-ubyte, t10k-images-idx3-ubyte and t10k-labels-idx1-ubyte, packed (.gz) or not."
)
CIFAR_REMEDY = (
    "name the folder (--data-dir) of CIFAR-10's binary version (data_batch_1.bin to data_batch_5.bin, test_batch.bin) "
    "or of its Python version (data_batch_1 to data_batch_5, test_batch)."
)


class Source(NamedTuple):
    """A data set of images on disk or in a package.

    Attributes:
        read: Training and test images as bytes and labels, from a folder.
        channels: Channels of an image.
        top: The value of a white pixel.
        mean, std: Numbers by which the pixels of each channel are shifted and scaled, as shares of white.
    """

    read: Callable[[Path | None], tuple[Arrays, Arrays]]
    channels: int
    top: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


def _read_fashion(folder: Path | None) -> tuple[Arrays, Arrays]:
    folder = FASHION_FOLDER if folder is None else folder
    parts = []
    for part in ("train", "t10k"):
        images = read_idx(folder, f"{part}-images-idx3-ubyte", 3, FASHION_REMEDY)
        labels = read_idx(folder, f"{part}-labels-idx1-ubyte", 1, FASHION_REMEDY)
        path = folder / f"{part}-labels-idx1-ubyte"
        if len(images) != len(labels) or not len(images):
            msg = f"{path} must hold one label per image, got {len(labels)} for {len(images)} images; {FASHION_REMEDY}"
            raise ValueError(msg)
        if images.shape[1:] != (28, 28):
            msg = f"{folder} must hold images of 28 x 28 pixels, got {images.shape[1:]}; {FASHION_REMEDY}"
            raise ValueError(msg)
        check_labels(path, labels, CLASSES, FASHION_REMEDY)
        parts.append((np.pad(images, ((0, 0), (2, 2), (2, 2)))[..., None], labels))
    return parts[0], parts[1]


def _read_cifar(folder: Path | None) -> tuple[Arrays, Arrays]:
    if folder is None:
        msg = f"cifar10 needs its files, which no package has; {CIFAR_REMEDY}"
        raise ValueError(msg)
    return read_cifar(folder, CIFAR_REMEDY)


def _read_digits(folder: Path | None) -> tuple[Arrays, Arrays]:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import StratifiedShuffleSplit

    if folder is not None:
        msg = f"digits come with scikit-learn and have no folder, got {folder}; leave it out, or choose other data."
        raise ValueError(msg)
    images, labels = map(np.asarray, load_digits(return_X_y=True))
    # Every pixel becomes one of 4 x 4 equal ones: 8 x 8 to 32 x 32.
    large = np.kron(images.reshape(-1, 8, 8), np.ones((1, 4, 4))).astype(np.uint8)[..., None]
    split = StratifiedShuffleSplit(1, train_size=DIGITS_TRAIN, random_state=0).split(images, labels)
    train, test = next(iter(split))
    return (large[train], labels[train]), (large[test], labels[test])


DIGITS_TRAIN = 1400
"""Digits in the training part; 397 are left for testing."""

SOURCES = {
    "digits": Source(_read_digits, 1, 16, (0.3053,), (0.3760,)),
    "fashion-mnist": Source(_read_fashion, 1, 255, (0.2860,), (0.3530,)),
    "cifar10": Source(_read_cifar, 3, 255, (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
}


def find_source(name: str) -> Source:
    """Return a data set by its name.

    Raises:
        ValueError: there is no such data set; the message has the nearest name.

    Example:
        >>> find_source("cifar10").channels
        3
    """
    if name not in SOURCES:
        near = difflib.get_close_matches(name.lower().replace("_", "-"), SOURCES, 1, 0.4)
        hint = f"did you mean {near[0]}?" if near else "choose one of these."
        msg = f"there is no data set {name!r} among {', '.join(SOURCES)}; {hint}"
        raise ValueError(msg)
    return SOURCES[name]


def load_images(
    name: str = "digits",
    folder: str | Path | None = None,
    *,
    num_train: int | None = None,
    num_test: int | None = None,
    dtype: Any = None,
) -> DataSet:
    r"""Load images of 32 x 32 pixels with their classes, for `vgg11`, `resnet18` or a network of your own.

    Each channel is shifted and scaled by two numbers. For CIFAR-10 they are those of the paper's code, close to the
    mean and the standard deviation of all its pixels; the others are treated alike.

    Args:
        name: "digits": scikit-learn's 1,797 digits of 8 x 8 pixels, each of which becomes 4 x 4 equal ones; 1,400 for
            training. "fashion-mnist": 60,000 and 10,000 images of 28 x 28, two black pixels added on every side.
            "cifar10": 50,000 and 10,000 images in color.
        folder: Where the files are. Fashion-MNIST: the four IDX files; None for where Debian's package
            dataset-fashion-mnist has them. CIFAR-10: its binary or its Python version. Digits need none.
        num_train: Number of training images, the first ones (the files are in random order); None for all.
        num_test: Number of test images, the first ones; None for all.
        dtype: Floating dtype of the images; None for JAX's default.

    Returns:
        `DataSet`: x (n, 32, 32, channels), y (n,) in 0..9 as int32, x_test, y_test.

    Raises:
        FileNotFoundError: a file is missing; the message has the package, or the files that are needed.
        ValueError: an unknown name, a file that is broken or something else, more images asked for than there are.

    Source:
        Xiao, Rasul, Vollgraf (2017), Fashion-MNIST; Krizhevsky (2009), CIFAR-10; means and deviations of the code of
        Chizat, Oyallon, Bach (2019).

    Example:
        >>> data = load_images(num_train=100)
        >>> data.x.shape, data.y.shape, data.x_test.shape
        ((100, 32, 32, 1), (100,), (397, 32, 32, 1))
    """
    source = find_source(name)
    parts = source.read(None if folder is None else Path(folder))
    arrays = []
    for (images, labels), count, what in zip(parts, (num_train, num_test), ("num_train", "num_test"), strict=True):
        if count is not None and not 1 <= count <= len(images):
            msg = f"{what} must lie in 1..{len(images)}, the images that {name} has for it, got {count}."
            raise ValueError(msg)
        x = _normalize(source, images[:count] / np.float32(source.top), dtype)
        arrays += [x, jnp.asarray(labels[:count], jnp.int32)]
    return DataSet(*arrays)


def noise_images(
    key: PRNGKeyArray, n: int, name: str = "digits", *, dtype: Any = None
) -> Float[Array, "n 32 32 channels"]:
    r"""Draw images of independent uniform pixels, shifted and scaled as those of a data set.

    Args:
        key: Random key.
        n: Number of images.
        name: Name of the data set whose channels, means and deviations they have.
        dtype: Floating dtype; None for JAX's default.

    Raises:
        ValueError: an unknown name, or n below 1.

    Source:
        Chizat, Oyallon, Bach (2019), supplement C.3 (the second data set of Figure 7(b)).

    Example:
        >>> noise_images(jr.key(0), 2, "cifar10").shape
        (2, 32, 32, 3)
    """
    source = find_source(name)
    if n < 1:
        msg = f"n must be at least 1, got {n}."
        raise ValueError(msg)
    return _normalize(source, np.asarray(jr.uniform(key, (n, SIDE, SIDE, source.channels), jnp.float32)), dtype)


def _normalize(source: Source, images: np.ndarray, dtype: Any) -> Array:
    mean, std = (np.asarray(numbers, np.float32) for numbers in (source.mean, source.std))
    return jnp.asarray((images - mean) / std, jnp.result_type(float) if dtype is None else dtype)
