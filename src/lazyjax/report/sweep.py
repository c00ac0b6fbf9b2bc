r"""Many runs as one compiled program: a grid over named axes, in chunks of lanes that fit in memory, labeled."""

import contextlib
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array
from tqdm import tqdm

from lazyjax._core.checks import check_fits
from lazyjax._core.files import DamagedError, read_arrays, remove_partial, set_aside, write_arrays
from lazyjax._core.lock import in_use
from lazyjax._core.records import PLAIN, as_json, digest_of, digest_of_text, keep_configuration, versions
from lazyjax.flow.result import RESULTS, as_result, is_result

if TYPE_CHECKING:
    import xarray

MEMORY_BYTES = 2 * 2**30
"""Memory that one chunk of lanes may take, unless `sweep` is told otherwise."""

RESERVED = ("failed", "message")
"""What `sweep` itself says of each lane."""

FAILED = "_failed"
"""The end of the names of what failed lanes have computed."""

Run = Callable[..., Mapping[str, Any]]


def sweep(
    run: Run,
    *,
    over: Mapping[str, Sequence[Any] | Array],
    shared: Mapping[str, Any] | None = None,
    dims: Mapping[str, Sequence[str]] | None = None,
    coords: Mapping[str, Any] | None = None,
    chunk: int | None = None,
    memory: int = MEMORY_BYTES,
    progress: bool = False,
    folder: str | Path | None = None,
    settings: Mapping[str, Any] | None = None,
) -> "xarray.Dataset":
    r"""Evaluate `run` at every point of a grid, vmapped, and label the results.

    The points of the grid are lanes of one compiled program. If all of them at once would need more than
    `memory`, they go in equal chunks through the same program, the last one filled up with repeated lanes.

    Args:
        run: `run(alpha=..., seed=..., ...)` with one traced scalar per axis, to a dict of named arrays. An entry
            "result" (a diffrax result, as `Flow.result`) marks lanes that failed: call flows with throw=False.
        over: The axes: name to numbers (one dtype each), for example {"alpha": [1, 10, jnp.inf], "seed": [0, 1]}.
        shared: Further keyword arguments of `run`, the same in every lane (data, parameters): arrays in them are
            handed to the program instead of compiled in as constants.
        dims: Names of the axes of an output, beyond those of the grid, for example {"loss": ("time",)}; unnamed
            ones are called "<output>_0", ...
        coords: Coordinates of these axes, for example {"time": ts}.
        chunk: Lanes in a chunk; None for as many as fit `memory`. Fewer show more progress, and spare lanes that
            take few solver steps from waiting for lanes that take many.
        memory: Bytes that one chunk may take, temporaries included.
        progress: Show a progress bar with an estimate, one tick per lane.
        folder: Where to keep each finished chunk, so that the same call continues if it was interrupted. A folder of
            another sweep is refused: another program (whatever `run` computes, and with which constants), other axes,
            other values of `shared`, another version. Chunks that are damaged are set aside, with a warning, and
            computed again. The folder stays: delete it when its results are safe elsewhere.
        settings: What else decides the results of `run`, plain numbers and texts by name: what is behind callbacks
            into Python, say, which no program shows.

    Returns:
        A Dataset with the axes of `over` first, coordinates on them, and "failed" (bool) and "message" per lane.
        A lane fails by its "result" or by a value that is not finite; its numbers are NaN in the variable itself,
        so that means and plots leave them out, and stay as computed in "<name>_failed". The message is the name of
        the result with what it means, or the name of the variable that is not finite.

    Raises:
        ValueError: no axes or an empty one; a number that JAX's dtype does not hold; `chunk` below 1; `run` returns a
            reserved name or an axis name; `dims` or `coords` do not fit; `folder` holds another sweep or is in use.
        TypeError: an axis that is not numbers; `run` does not return a dict of arrays; `settings` are not plain.
        OSError: a chunk cannot be written.

    Example:
        >>> table = sweep(lambda alpha, shift: {"y": alpha + shift}, over={"alpha": [1.0, 2.0], "shift": [0.0, 0.5]})
        >>> table["y"].sel(alpha=2.0, shift=0.5).item()
        2.5
    """
    axes = {name: _axis(name, values) for name, values in over.items()}
    if not axes:
        msg = 'over must name at least one axis, for example over={"alpha": [1.0, 10.0]}.'
        raise ValueError(msg)
    _check_settings(settings or {})
    if chunk is not None and chunk < 1:
        msg = f"chunk must be at least 1 lane, got {chunk}."
        raise ValueError(msg)
    shape = tuple(len(values) for values in axes.values())
    points = list(itertools.product(*(range(size) for size in shape)))
    lanes = {name: values[np.asarray([point[i] for point in points])] for i, (name, values) in enumerate(axes.items())}
    for path, leaf in jtu.tree_leaves_with_path(dict(shared or {})):
        if eqx.is_array(leaf):
            check_fits(leaf, f"shared{jtu.keystr(path)}")
    program, size = _compile(run, lanes, dict(shared or {}), dims or {}, chunk, memory)
    _check_labels(program.outputs, axes, dims or {}, coords or {})
    with contextlib.nullcontext() if folder is None else in_use(Path(folder)):
        kept = None
        if folder is not None:
            kept = _Kept(Path(folder), _configuration(program, axes, size, shared or {}, settings or {}))
        parts = _run_chunks(program, lanes, size, kept, progress=progress)
    joined = jtu.tree_map(lambda *leaves: np.concatenate(leaves), *parts)
    return _label(joined, axes, dims or {}, coords or {})


class _Program(NamedTuple):
    """A compiled program for so many lanes at a time.

    Attributes:
        call: From (points, arrays) to outputs.
        arrays: What all lanes share.
        outputs: Shapes and dtypes of the outputs, with an axis of lanes.
        text: The program before it was compiled.
    """

    call: Callable[..., Any]
    arrays: dict[str, Any]
    outputs: dict[str, Any]
    text: Callable[[], str]


class _Kept:
    """The finished chunks of a sweep in a folder that is in use by nobody else, each with the digest of the sweep.

    Raises:
        ValueError: the folder holds another sweep.
    """

    def __init__(self, folder: Path, configuration: Mapping[str, Any]):
        self.folder, self.owner = folder, digest_of(as_json(configuration))
        remove_partial(folder)
        path = folder / "sweep.json"
        if not path.exists():  # lost: then the chunks tell whose they are, before this sweep takes the folder
            for chunk in sorted(folder.glob("lanes-*.npz")):
                self._read(chunk)
        keep_configuration(path, configuration, holder=f"folder {folder}", kind="sweep")

    def load(self, first: int, like: Any) -> Any:
        """Return the chunk that begins with this lane, with the structure of an output; None if it is not there."""
        leaves = self._read(self._path(first))
        return None if leaves is None else jtu.tree_unflatten(jtu.tree_structure(like), leaves)

    def store(self, first: int, part: Any) -> None:
        """Keep a finished chunk."""
        write_arrays(self._path(first), jtu.tree_leaves(part), self.owner)

    def _read(self, path: Path) -> list[np.ndarray] | None:
        if not path.exists():
            return None
        try:
            arrays, owner = read_arrays(path)
        except DamagedError as error:
            set_aside(path, str(error))
            return None
        if owner != self.owner:
            msg = (
                f"folder {self.folder} holds another sweep ({path.name} is of it); choose another folder, or delete it."
            )
            raise ValueError(msg)
        return arrays

    def _path(self, first: int) -> Path:
        return self.folder / f"lanes-{first:06d}.npz"


def _configuration(
    program: _Program, axes: Mapping[str, np.ndarray], size: int, shared: Mapping[str, Any], settings: Mapping[str, Any]
) -> dict[str, Any]:
    """Return what a kept chunk belongs to: the program with its constants, and all that it is given."""
    leaves = jtu.tree_leaves_with_path(dict(shared))
    return {
        **{f"setting {name}": value for name, value in settings.items()},
        **{f"axis {name}": [str(values.dtype), *map(str, values.tolist())] for name, values in axes.items()},
        # Those that a program can do without are told too: whoever changes one expects another result.
        **{f"shared{jtu.keystr(path)}": repr(leaf) for path, leaf in leaves if isinstance(leaf, PLAIN)},
        "arrays in shared": digest_of(eqx.filter(dict(shared), eqx.is_array)),
        "chunk": size,
        "program": digest_of_text(program.text(), str(jtu.tree_structure(program.outputs))),
        "versions": {**versions("lazyjax", "jax", "jaxlib"), "backend": jax.default_backend()},
    }


def _check_settings(settings: Mapping[str, Any]) -> None:
    """Check that settings can be told from others: the text of an object says little of what is in it."""
    for path, leaf in jtu.tree_leaves_with_path(dict(settings)):
        if not isinstance(leaf, PLAIN):
            msg = (
                f"settings{jtu.keystr(path)} must be a number or a text, got {type(leaf).__name__}; hand arrays and "
                "functions to run in shared."
            )
            raise TypeError(msg)


def _axis(name: str, values: Any) -> np.ndarray:
    array = np.asarray(values)
    if array.ndim != 1 or array.size == 0:
        msg = f"over[{name!r}] must be a non-empty list of numbers, got shape {array.shape}."
        raise ValueError(msg)
    check_fits(array, f"over[{name!r}]", tiny=False)
    if array.dtype.kind not in "iufb":
        msg = f"over[{name!r}] must be numbers (jax.vmap runs over them), got {array.dtype}; pass an index instead."
        raise TypeError(msg)
    return np.asarray(jnp.asarray(array))


def _compile(
    run: Run,
    lanes: dict[str, np.ndarray],
    shared: dict[str, Any],
    dims: Mapping[str, Sequence[str]],
    chunk: int | None,
    memory: int,
) -> tuple[_Program, int]:
    """Compile one program for so many lanes at a time: all, or as many as fit by what the first try needs."""
    total = len(next(iter(lanes.values())))
    arrays, static = eqx.partition(shared, eqx.is_array)
    arrays = jtu.tree_map(jnp.asarray, arrays)  # NumPy arrays are arguments too

    def batch(points: dict[str, Array], arrays: dict[str, Any]) -> dict[str, Any]:
        def lane(point: dict[str, Array]) -> dict[str, Any]:
            return _checked(run(**point, **eqx.combine(arrays, static)), lanes, dims)

        if next(iter(points.values())).shape[0] > 1:
            return jax.vmap(lane)(points)
        # A single lane keeps its branches: under a vmap both sides of a cond are computed.
        alone = lane({name: values[0] for name, values in points.items()})
        return jtu.tree_map(lambda leaf: leaf[None], alone)

    size = total if chunk is None else min(chunk, total)
    while True:
        shapes = {name: jax.ShapeDtypeStruct((size,), values.dtype) for name, values in lanes.items()}
        lowered = jax.jit(batch).lower(shapes, arrays)
        program = lowered.compile()
        need = program.memory_analysis()
        used = 0 if need is None else need.temp_size_in_bytes + need.output_size_in_bytes
        if used <= memory or size == 1:
            return _Program(program, arrays, lowered.out_info, lowered.as_text), size
        chunks = math.ceil(total / max(1, int(size * memory / used)))
        size = min(size - 1, math.ceil(total / chunks))


def _run_chunks(
    program: _Program, lanes: Mapping[str, np.ndarray], size: int, kept: _Kept | None, *, progress: bool
) -> list[Any]:
    """Return all chunks in order: those that are kept, and the others, which are kept as they are finished."""
    total = len(next(iter(lanes.values())))
    starts = range(0, total, size)
    parts = {} if kept is None else {start: kept.load(start, program.outputs) for start in starts}
    done = sum(min(size, total - start) for start in starts if parts.get(start) is not None)
    with tqdm(total=total, initial=done, unit="run", desc="sweep", disable=not progress) as bar:
        for start in starts:
            if parts.get(start) is not None:
                continue
            index = np.minimum(np.arange(start, start + size), total - 1)
            count = min(size, total - start)
            points = {name: jnp.asarray(values[index]) for name, values in lanes.items()}
            part = jax.device_get(_call(program, points))
            parts[start] = jtu.tree_map(lambda leaf, count=count: leaf[:count], part)
            if kept is not None:
                kept.store(start, parts[start])
            bar.update(count)
    return [parts[start] for start in starts]


def _call(program: _Program, points: dict[str, Array]) -> Any:
    return program.call(points, program.arrays)


def _checked(out: Any, axes: Mapping[str, Any], dims: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Check, while tracing, that what one lane returns can be labeled, and return it as arrays."""
    if not isinstance(out, Mapping):
        msg = f"run must return a dict of named arrays, got {type(out).__name__}."
        raise TypeError(msg)
    for name, value in out.items():
        if name in RESERVED:
            msg = f"run must not return {name!r}: sweep makes it; return a diffrax result as 'result'."
            raise ValueError(msg)
        if str(name).endswith(FAILED):
            msg = f"run must not return {name!r}: sweep keeps under such names what failed lanes have; take another."
            raise ValueError(msg)
        if name in axes:
            msg = f"run must not return {name!r}: it is an axis of the sweep."
            raise ValueError(msg)
        if (name == "result") != is_result(value):
            msg = (
                f"run must return a diffrax result as 'result' and only there, got {type(value).__name__} as {name!r}."
            )
            raise ValueError(msg)
        if name in dims and len(dims[name]) != jnp.ndim(value):
            msg = f"dims[{name!r}] must name {jnp.ndim(value)} axes, got {tuple(dims[name])}."
            raise ValueError(msg)
    return {name: as_result(value) if is_result(value) else jnp.asarray(value) for name, value in out.items()}


def _check_labels(
    outputs: Mapping[str, Any],
    axes: Mapping[str, np.ndarray],
    dims: Mapping[str, Sequence[str]],
    coords: Mapping[str, Any],
) -> None:
    """Check, before anything runs, that no name has two meanings or two lengths.

    Raises:
        ValueError: one has.
    """
    outputs = {name: value for name, value in outputs.items() if name != "result"}
    lengths = {name: {len(values)} for name, values in axes.items()}
    for name, value in outputs.items():
        own = _own_dims(name, len(value.shape), dims)
        taken = [dim for dim in own if dim in axes or own.count(dim) > 1]
        if taken:
            msg = f"dims[{name!r}] must name axes other than {tuple(axes)}, each once, got {own}."
            raise ValueError(msg)
        for dim, length in zip(own, value.shape[1:], strict=True):
            lengths.setdefault(dim, set()).add(length)
    for dim, found in lengths.items():
        if len(found) > 1:
            msg = f"dims must give one name to axes of one length, but {dim!r} has lengths {sorted(found)}; rename one."
            raise ValueError(msg)
    for name, values in coords.items():
        if name in axes or name in outputs or name in RESERVED or str(name).endswith(FAILED):
            msg = f"coords must name axes of outputs, but {name!r} is taken by the sweep or by what run returns."
            raise ValueError(msg)
        plain = not isinstance(values, tuple) and np.ndim(values) == 1  # else xarray's own form of them
        if plain and name in lengths and len(values) not in lengths[name]:
            msg = f"coords[{name!r}] must have a value for each of {max(lengths[name])} entries, got {len(values)}."
            raise ValueError(msg)


def _own_dims(name: str, ndim: int, dims: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    """Return the names of the axes of an output after that of the lanes."""
    return tuple(dims.get(name, [f"{name}_{i}" for i in range(ndim - 1)]))


def _label(
    out: dict[str, Any], axes: dict[str, np.ndarray], dims: Mapping[str, Sequence[str]], coords: Mapping[str, Any]
) -> "xarray.Dataset":
    import xarray

    shape = tuple(len(values) for values in axes.values())
    result = out.pop("result", None)
    failed, messages = _failures(out, result, math.prod(shape))
    data: dict[str, Any] = {}
    for name, values in out.items():
        own = _own_dims(name, values.ndim, dims)
        names = (*axes, *own)
        full = (*shape, *values.shape[1:])
        if values.dtype.kind == "f" and failed.any():
            mask = failed.reshape(-1, *([1] * (values.ndim - 1)))
            data[f"{name}{FAILED}"] = (names, np.where(mask, values, np.nan).reshape(full))
            data[name] = (names, np.where(mask, np.nan, values).reshape(full))
        else:
            data[name] = (names, values.reshape(full))
    data["failed"] = (tuple(axes), failed.reshape(shape))
    data["message"] = (tuple(axes), messages.reshape(shape))
    return xarray.Dataset(data, coords={**axes, **coords})


def _failures(out: dict[str, Any], result: Any, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return which lanes failed, and why."""
    failed = np.zeros(count, bool)
    messages = np.full(count, "", dtype=object)
    for name, values in out.items():
        if values.dtype.kind == "f":
            bad = ~np.isfinite(values.reshape(count, -1)).all(axis=1)
            messages[bad & ~failed] = f"{name} is not finite"
            failed |= bad
    if result is not None:
        for lane in range(count):
            item = as_result(jtu.tree_map(lambda leaf, lane=lane: np.asarray(leaf[lane]), result))
            if str(item) != str(RESULTS.successful):
                failed[lane] = True
                messages[lane] = str(item)
    return failed, messages.astype(str)


def replace_points(data: "xarray.Dataset", again: "xarray.Dataset", axis: str) -> "xarray.Dataset":
    """Return a sweep over an axis with some of its points replaced by those of another one."""
    import xarray

    kept = data.drop_sel({axis: again[axis].values})
    if not again["failed"].any():  # what the points that failed had computed
        kept = kept.drop_vars([name for name in kept if str(name).endswith(FAILED)])
    return xarray.concat([kept, again], axis).sortby(axis)
