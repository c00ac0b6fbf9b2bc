"""What a user gives to the command line: a model from a file, scales as text; and the network if none is given."""

import contextlib
import importlib.util
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray

from lazyjax._core.checks import check_alpha, split_params
from lazyjax._core.types import Model, Params
from lazyjax.data.datasets import DataSet
from lazyjax.models.shallow import MLP, mlp

HIDDEN = (64, 64)
"""Hidden layers of the network that is trained if the user gives none."""

GAIN = 0.5
"""The factor on the Xavier weights of that network: at alpha = 1 it is small enough to learn features of the digits."""


def parse_alphas(texts: Sequence[str]) -> list[float]:
    """Return the scales of the command line as numbers.

    Raises:
        ValueError: none at all, not a number, or not in (0, inf].
    """
    if not texts:
        msg = "--alphas must name at least one output scale, got none; for example --alphas 1 10 100 inf."
        raise ValueError(msg)
    alphas = []
    for text in texts:
        try:
            alphas.append(float(text))
        except ValueError:
            msg = f"--alphas must be numbers in (0, inf], got {text!r}; for example --alphas 1 10 100 inf."
            raise ValueError(msg) from None
        check_alpha(alphas[-1])
    return alphas


class Network(eqx.Module):
    """A multilayer perceptron on samples of any shape, with outputs (n, k), or (n,) for a single real target."""

    net: MLP
    scalar: bool = eqx.field(static=True)

    def __call__(self, w: Params, x: Array) -> Array:
        """Return the outputs of the network."""
        out = self.net(w, x.reshape(x.shape[0], -1))
        return out[:, 0] if self.scalar else out

    def preactivations(self, w: Params, x: Array) -> list[Array]:
        """Return the hidden layers before their activation."""
        return self.net.preactivations(w, x.reshape(x.shape[0], -1))


def default_model(key: PRNGKeyArray, data: DataSet, loss: str) -> tuple[Model, Params]:
    """Make a small tanh network of the size of the data: one output per class, or one per real target.

    Raises:
        ValueError: integer targets with more values than samples.
    """
    outputs = _count_outputs(data, loss)
    sizes = (int(np.prod(data.x.shape[1:])), *HIDDEN, max(outputs, 1))
    return Network(mlp(jnp.tanh), outputs == 0), mlp().init(key, sizes, gain=GAIN)


def _count_outputs(data: DataSet, loss: str) -> int:
    """Return the number of outputs per sample; 0 stands for one number without an axis of its own."""
    y = np.asarray(data.y)
    if y.ndim > 1:
        return y.shape[1]
    if loss == "logistic" or not np.issubdtype(y.dtype, np.integer) or y.min() < 0:
        return 0
    largest = int(max(y.max(), 0 if data.y_test is None else np.max(np.asarray(data.y_test))))
    if largest >= y.size:
        msg = (
            f"integer y are taken as classes 0, 1, ..., but go up to {largest} for {y.size} samples; "
            "save them as floats for a regression."
        )
        raise ValueError(msg)
    return largest + 1 if largest > 0 else 0


def load_model(spec: str, key: PRNGKeyArray) -> tuple[Model, Params]:
    """Run `build(key) -> (f, params)` from a user's file.

    Args:
        spec: "path/to/my_net.py:build".
        key: Handed to the function.

    Raises:
        ValueError: the path has no function part, does not exist, or fails to import; the function is missing or
            fails, or what it returns does not unpack into a model and its parameters.
    """
    path, name = split_spec(spec)
    with _beside(path):
        module = _import(path)
        build = getattr(module, name, None)
        if not callable(build):
            functions = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
            msg = f"--model {spec}: {path} has no function {name!r} (it has: {', '.join(functions) or 'none'})."
            raise ValueError(msg)  # noqa: TRY004 - it is the command line's value that is wrong
        try:
            built: Any = build(key)
        except (Exception, SystemExit) as error:
            msg = f"--model {spec}: {name}(key) failed with {_describe(error, path)}"
            raise ValueError(msg) from error
    if not isinstance(built, tuple | list) or len(built) != 2 or not callable(built[0]):
        msg = (
            f"--model {spec}: {name}(key) must return (f, params) with f(params, x) -> outputs, got "
            f"{type(built).__name__}" + (f" of length {len(built)}." if isinstance(built, tuple | list) else ".")
        )
        raise ValueError(msg)
    return built[0], built[1]


def split_spec(spec: str) -> tuple[Path, str]:
    """Return the file and the function of "path/to/my_net.py:build".

    Raises:
        ValueError: not of this form, or no such file.
    """
    file, colon, name = spec.rpartition(":")
    if not colon or not file or not name.isidentifier():
        msg = f"--model must be FILE:FUNCTION, such as my_net.py:build, got {spec!r}."
        raise ValueError(msg)
    path = Path(file)
    if not path.is_file():
        msg = f"--model {spec}: the file {file} does not exist (looked in {Path.cwd()})."
        raise ValueError(msg)
    return path, name


@contextlib.contextmanager
def _beside(path: Path) -> Iterator[None]:
    """Let a user's file import its neighbors, as `python my_net.py` would."""
    folder = str(path.resolve().parent)
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)


def _import(path: Path) -> ModuleType:
    name = f"lazyjax_user_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        msg = f"--model: {path} is not a Python file; give a file that ends in .py."
        raise ValueError(msg)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look their module up here
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        msg = f"--model: importing {path} failed with {_describe(error, path)}"
        raise ValueError(msg) from error
    return module


def check_model(f: Model, w0: Params, data: DataSet, spec: str) -> None:
    """Run the shapes through a user's model, so that an error of its own names it.

    Raises:
        ValueError: f(params, x) fails; parameters that are not finite.
        TypeError: no real floating parameters.
    """
    path, _ = split_spec(spec)
    split_params(w0, "params")
    for name, x in (("x", data.x), ("x_test", data.x_test)):
        if x is None:
            continue
        try:
            eqx.filter_eval_shape(f, w0, x)
        except (Exception, SystemExit) as error:
            msg = f"--model {spec}: f(params, {name}) failed on {name} of shape {x.shape} with {_describe(error, path)}"
            raise ValueError(msg) from error


def _describe(error: BaseException, path: Path) -> str:
    """Return kind and message of an error, and the line of the user's file."""
    frames = traceback.extract_tb(error.__traceback__)
    if isinstance(error, SyntaxError):
        line = error.lineno
    else:
        lines = [
            frame.lineno for frame in frames if Path(frame.filename) == path or frame.filename == str(path.resolve())
        ]
        line = lines[-1] if lines else None
    where = "" if line is None else f" (line {line} of {path.name})"
    return f"{type(error).__name__}: {error}{where}"


def split_key(seed: int) -> tuple[PRNGKeyArray, PRNGKeyArray]:
    """Return one key for the initial weights, and one for the probes of the report."""
    init, probe = jax.random.split(jax.random.key(seed))
    return init, probe
