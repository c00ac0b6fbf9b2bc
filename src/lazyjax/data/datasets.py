"""Data to train on: a teacher on the sphere, scikit-learn's digits, or arrays of your own from a `.npz` file."""

import functools
import io
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from lazyjax._core.checks import check_finite, check_fits
from lazyjax._core.types import RealScalar

NUM_DIGITS = 1797
"""Images that scikit-learn bundles."""


class DataSet(NamedTuple):
    """A data set: training and test samples; `x_test` and `y_test` are None without test data."""

    x: Array
    y: Array
    x_test: Array | None = None
    y_test: Array | None = None

    @property
    def test(self) -> tuple[Array, Array] | None:
        """The pair (x_test, y_test) that `lazyjax.diagnose` and `lazyjax.train` take, or None."""
        return None if self.x_test is None or self.y_test is None else (self.x_test, self.y_test)


def sphere(key: PRNGKeyArray, n: int, d: int, *, dtype: Any = None) -> Float[Array, "n d"]:
    """Draw independent points, uniform on the unit sphere of R^d.

    Args:
        key: Random key.
        n: Number of points.
        d: Dimension.
        dtype: Floating dtype; None for JAX's default.

    Raises:
        ValueError: n or d below 1.

    Source:
        Chizat, Oyallon, Bach (2019), section 3.1 (the inputs).

    Example:
        >>> print(jnp.linalg.norm(sphere(jr.key(0), 2, 3), axis=1).round(6))
        [1. 1.]
    """
    if n < 1 or d < 1:
        msg = f"n and d must be at least 1, got n={n}, d={d}."
        raise ValueError(msg)
    return _sphere(key, n, d, jnp.dtype(jnp.result_type(float) if dtype is None else dtype))


@functools.partial(jax.jit, static_argnames=("n", "d", "dtype"))
def _sphere(key: PRNGKeyArray, n: int, d: int, dtype: Any) -> Float[Array, "n d"]:
    points = jr.normal(key, (n, d), dtype)
    return points / jnp.linalg.norm(points, axis=1, keepdims=True)


def draw_teacher(
    key: PRNGKeyArray, d: int, *, units: int = 3, scale: RealScalar = 1.0, dtype: Any = None
) -> dict[str, Array]:
    r"""Draw a two-layer ReLU teacher $\sum_j a^*_j \max(b^*_j \cdot x, 0)$ with $|a^*_j b^*_j| = c$.

    The paper draws Gaussian weights and normalizes each unit so that $|a^*_j b^*_j| = 1$, its code draws unit $b^*_j$
    and signs $a^*_j$: the same distribution of functions, since a positive factor passes through ReLU. Here it is done
    as in the code: $b^*_j$ uniform on the sphere and $a^*_j = \pm c$. The paper's code trains toward another multiple
    of the teacher in places (100 for Figure 2a, 1/200 for Figure 2b): that is `scale`.

    Args:
        key: Random key.
        d: Dimension of the inputs.
        units: Hidden units, three in the paper.
        scale: c.
        dtype: Floating dtype; None for JAX's default.

    Returns:
        {"a": (units,), "b": (units, d)}, parameters of `two_layer()`.

    Raises:
        ValueError: d or units below 1.

    Source:
        Chizat, Oyallon, Bach (2019), section 3.1.

    Example:
        >>> print(jnp.abs(draw_teacher(jr.key(0), 5)["a"]))
        [1. 1. 1.]
    """
    key_a, key_b = jr.split(key)
    b = sphere(key_b, units, d, dtype=dtype)
    return {"a": jnp.asarray(scale, b.dtype) * jr.rademacher(key_a, (units,), b.dtype), "b": b}


def digits(num_train: int = 256, *, seed: int = 0, dtype: Any = None) -> DataSet:
    """Load scikit-learn's 1,797 handwritten digits of 8 x 8 pixels, shuffled and split with equal shares of classes.

    Pixels are shifted and scaled by two numbers, the same for all, to mean 0 and variance 1 over all images.

    Args:
        num_train: Training images; the rest is for testing. From 10 to 1787, so that every class is in both.
        seed: Seed of the shuffle.
        dtype: Floating dtype of the images; None for JAX's default.

    Returns:
        `DataSet`: x (num_train, 64), labels y (num_train,) in 0..9 as int32, x_test, y_test.

    Raises:
        ValueError: num_train out of its range.

    Source:
        Alpaydin and Kaynak (1998), Optical Recognition of Handwritten Digits, UCI; bundled with scikit-learn.

    Example:
        >>> x, y, x_test, y_test = digits(100)
        >>> x.shape, y.shape, x_test.shape
        ((100, 64), (100,), (1697, 64))
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    if not 10 <= num_train <= NUM_DIGITS - 10:
        msg = (
            f"num_train must lie in 10..{NUM_DIGITS - 10}, so that each of the ten classes is in both parts of the "
            f"{NUM_DIGITS} digits, got {num_train}."
        )
        raise ValueError(msg)
    images, labels = load_digits(return_X_y=True)
    images = (images - images.mean()) / images.std()
    x, x_test, y, y_test = train_test_split(images, labels, train_size=num_train, stratify=labels, random_state=seed)
    dtype = jnp.result_type(float) if dtype is None else dtype
    return DataSet(
        jnp.asarray(x, dtype), jnp.asarray(y, jnp.int32), jnp.asarray(x_test, dtype), jnp.asarray(y_test, jnp.int32)
    )


def load_arrays(path: str | Path) -> DataSet:
    """Read your own data from a `.npz` file, as `numpy.savez("my.npz", x=x, y=y)` writes it.

    Args:
        path: The file, with arrays `x` (samples first) and `y`, and optionally `x_test` and `y_test`.

    Returns:
        `DataSet`: inputs and real targets in JAX's default floating dtype, integer and boolean targets as integers.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not a readable `.npz`; an array is missing, empty, of objects, or not finite; sizes differ.
        TypeError: an array that does not hold real numbers.

    Example:
        >>> import tempfile, os
        >>> path = os.path.join(tempfile.mkdtemp(), "my.npz")
        >>> np.savez(path, x=np.ones((4, 3)), y=np.array([0, 1, 1, 0]))
        >>> load_arrays(path).y
        Array([0, 1, 1, 0], dtype=int...)
    """
    path = Path(path)
    raw = _read(path)
    missing = [name for name in ("x", "y") if name not in raw]
    if missing:
        there = ", ".join(sorted(raw)) or "none"
        msg = f"{path} must hold arrays x and y, but {missing[0]} is missing (there: {there}); save it by name."
        raise ValueError(msg)
    if ("x_test" in raw) != ("y_test" in raw):
        have, lack = ("x_test", "y_test") if "x_test" in raw else ("y_test", "x_test")
        msg = f"{path} must hold x_test and y_test both or neither, but {lack} is missing next to {have}."
        raise ValueError(msg)
    arrays = {name: _as_array(raw[name], name, path) for name in ("x", "y", "x_test", "y_test") if name in raw}
    for suffix in ("", "_test"):
        if f"x{suffix}" in arrays:
            _check_sizes(arrays[f"x{suffix}"], arrays[f"y{suffix}"], suffix, path)
    if "x_test" in arrays and arrays["x_test"].shape[1:] != arrays["x"].shape[1:]:
        msg = (
            f"x_test must have samples of the shape of x's, {arrays['x'].shape[1:]}, "
            f"got {arrays['x_test'].shape[1:]} in {path}."
        )
        raise ValueError(msg)
    return DataSet(**arrays)


def _read(path: Path) -> dict[str, np.ndarray]:
    if path.is_dir():
        msg = f"{path} must be a .npz file with arrays x and y, but is a folder; give the path of the file in it."
        raise ValueError(msg)
    if not path.is_file():
        msg = f"data file {path} does not exist; give the path of a .npz file with arrays x and y."
        raise FileNotFoundError(msg)
    content = path.read_bytes()
    try:
        loaded = np.load(io.BytesIO(content), allow_pickle=False)
        if isinstance(loaded, np.lib.npyio.NpzFile):
            return {name: loaded[name] for name in loaded.files}
        error: Exception = ValueError("it holds one bare array")
    except Exception as caught:  # zipfile, zlib and NumPy have many for bytes that they did not write
        error = caught
    msg = (
        f"{path} must be a .npz file of plain numeric arrays, but reading it failed ({error}); write it with "
        f"numpy.savez({path.with_suffix('.npz').name!r}, x=x, y=y)."
    )
    raise ValueError(msg) from error


def _as_array(raw: Any, name: str, path: Path) -> Array:
    """Return a NumPy array as one of JAX: labels stay integers, all else takes JAX's default float."""
    kind = getattr(getattr(raw, "dtype", None), "kind", "?")
    if kind not in "iufb":
        got = getattr(raw, "dtype", type(raw).__name__)
        msg = f"{name} in {path} must hold real numbers, got {got}; convert it before saving."
        raise TypeError(msg)
    if raw.ndim == 0 or raw.size == 0:
        msg = f"{name} in {path} must hold at least one sample, got shape {raw.shape}."
        raise ValueError(msg)
    keep = name.startswith("y") and kind != "f"
    dtype = jnp.result_type(int) if keep else jnp.result_type(float)
    check_fits(raw, f"{name} in {path}", dtype)
    array = jnp.asarray(raw.astype(dtype))
    check_finite(array, name)
    return array


def _check_sizes(x: Array, y: Array, suffix: str, path: Path) -> None:
    if x.shape[0] != y.shape[0]:
        msg = f"x{suffix} and y{suffix} must have equally many samples, got {x.shape[0]} and {y.shape[0]} in {path}."
        raise ValueError(msg)
