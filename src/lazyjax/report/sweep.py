r"""Many runs as one compiled program: a grid over named axes, in chunks of lanes that fit in memory, labeled."""

import functools
import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array
from tqdm import tqdm

from lazyjax._core.records import as_json, check_configuration, digest_of, versions, whole_file, write_whole
from lazyjax.flow.result import RESULTS, as_result, is_result

if TYPE_CHECKING:
    import xarray

MEMORY_BYTES = 2 * 2**30
"""Memory that one chunk of lanes may take, unless `sweep` is told otherwise."""

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
        folder: Where to keep each finished chunk, so that the same call continues after the last one if it was
            interrupted. The folder stays: delete it when its results are safe elsewhere.
        settings: What else decides the results of `run`, plain numbers and texts by name: with it, the axes, the
            arrays of `shared` and the versions of lazyjax and JAX a folder is recognized.

    Returns:
        A Dataset with the axes of `over` first, coordinates on them, and "failed" (bool) and "message" per lane.
        A lane fails by its "result" or by a value that is not finite; its numbers are NaN in the variable itself,
        so that means and plots leave them out, and stay as computed in "<name>_failed". The message is the name of
        the result with what it means, or the name of the variable that is not finite.

    Raises:
        ValueError: no axes or an empty one; `chunk` below 1; `run` returns a reserved name or an axis name; `dims`
            do not fit; `folder` holds another sweep.
        TypeError: an axis that is not numbers; `run` does not return a dict of arrays.

    Example:
        >>> table = sweep(lambda alpha, shift: {"y": alpha + shift}, over={"alpha": [1.0, 2.0], "shift": [0.0, 0.5]})
        >>> table["y"].sel(alpha=2.0, shift=0.5).item()
        2.5
    """
    axes = {name: _axis(name, values) for name, values in over.items()}
    if not axes:
        msg = 'over must name at least one axis, for example over={"alpha": [1.0, 10.0]}.'
        raise ValueError(msg)
    if chunk is not None and chunk < 1:
        msg = f"chunk must be at least 1 lane, got {chunk}."
        raise ValueError(msg)
    shape = tuple(len(values) for values in axes.values())
    points = list(itertools.product(*(range(size) for size in shape)))
    lanes = {name: values[np.asarray([point[i] for point in points])] for i, (name, values) in enumerate(axes.items())}
    program, size, structure = _compile(run, lanes, dict(shared or {}), dims or {}, chunk, memory)
    kept = None if folder is None else _Kept(Path(folder), structure)
    if kept is not None:
        kept.check(_configuration(axes, size, shared or {}, settings or {}))
    parts = _run_chunks(program, lanes, size, kept, progress=progress)
    joined = jtu.tree_map(lambda *leaves: np.concatenate(leaves), *parts)
    return _label(joined, axes, dims or {}, coords or {})


class _Kept:
    """The finished chunks of a sweep in a folder, each written whole or not at all."""

    def __init__(self, folder: Path, structure: Any):
        self.folder, self.structure = folder, structure

    def check(self, configuration: Mapping[str, Any]) -> None:
        """Take the folder for this configuration.

        Raises:
            ValueError: it holds another sweep.
        """
        path = self.folder / "sweep.json"
        if path.exists():
            there = json.loads(path.read_text(encoding="utf-8"))
            check_configuration(configuration, there, holder=f"folder {self.folder}", kind="sweep")
        else:
            write_whole(path, json.dumps(as_json(configuration), indent=1))

    def load(self, first: int) -> Any:
        """Return the chunk that begins with this lane, None if it is not finished."""
        path = self._path(first)
        if not path.exists():
            return None
        with np.load(path, allow_pickle=False) as arrays:
            return jtu.tree_unflatten(self.structure, [arrays[f"arr_{i}"] for i in range(len(arrays.files))])

    def store(self, first: int, part: Any) -> None:
        """Keep a finished chunk."""
        with whole_file(self._path(first)) as path, path.open("wb") as file:
            np.savez(file, *jtu.tree_leaves(part))

    def _path(self, first: int) -> Path:
        return self.folder / f"lanes-{first:06d}.npz"


def _configuration(
    axes: Mapping[str, np.ndarray], size: int, shared: Mapping[str, Any], settings: Mapping[str, Any]
) -> dict[str, Any]:
    """Return what a kept chunk belongs to."""
    return {
        **settings,
        **{f"axis {name}": [str(values.dtype), *map(str, values.tolist())] for name, values in axes.items()},
        "chunk": size,
        "shared": digest_of(dict(shared)),
        "versions": versions("lazyjax", "jax"),
    }


def _axis(name: str, values: Any) -> np.ndarray:
    array = np.asarray(values)
    if array.ndim != 1 or array.size == 0:
        msg = f"over[{name!r}] must be a non-empty list of numbers, got shape {array.shape}."
        raise ValueError(msg)
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
) -> tuple[Callable[[dict[str, Array]], Any], int, Any]:
    """Compile one program for `size` lanes at a time: all, or as many as fit by what the first try needs.

    Returns:
        (program, size, structure of the program's output).
    """
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
            return functools.partial(_call, program, arrays), size, jtu.tree_structure(lowered.out_info)
        chunks = math.ceil(total / max(1, int(size * memory / used)))
        size = min(size - 1, math.ceil(total / chunks))


def _run_chunks(
    program: Callable[[dict[str, Array]], Any],
    lanes: Mapping[str, np.ndarray],
    size: int,
    kept: _Kept | None,
    *,
    progress: bool,
) -> list[Any]:
    """Return all chunks in order: first the kept ones, then the others, which are kept as they are finished."""
    total = len(next(iter(lanes.values())))
    parts, first = [], 0
    while kept is not None and first < total and (part := kept.load(first)) is not None:
        parts.append(part)
        first += size
    with tqdm(total=total, initial=min(first, total), unit="run", desc="sweep", disable=not progress) as bar:
        for start in range(first, total, size):
            index = np.minimum(np.arange(start, start + size), total - 1)
            count = min(size, total - start)
            part = jax.device_get(program({name: jnp.asarray(values[index]) for name, values in lanes.items()}))
            parts.append(jtu.tree_map(lambda leaf, count=count: leaf[:count], part))
            if kept is not None:
                kept.store(start, parts[-1])
            bar.update(count)
    return parts


def _call(program: Callable[..., Any], arrays: dict[str, Any], points: dict[str, Array]) -> Any:
    return program(points, arrays)


def _checked(out: Any, axes: Mapping[str, Any], dims: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Check, while tracing, that what one lane returns can be labeled, and return it as arrays."""
    if not isinstance(out, Mapping):
        msg = f"run must return a dict of named arrays, got {type(out).__name__}."
        raise TypeError(msg)
    for name, value in out.items():
        if name in ("failed", "message"):
            msg = f"run must not return {name!r}: sweep makes it; return a diffrax result as 'result'."
            raise ValueError(msg)
        if name in axes:
            msg = f"run must not return {name!r}: it is an axis of the sweep."
            raise ValueError(msg)
        if name in dims and len(dims[name]) != jnp.ndim(value):
            msg = f"dims[{name!r}] must name {jnp.ndim(value)} axes, got {tuple(dims[name])}."
            raise ValueError(msg)
    return {name: as_result(value) if is_result(value) else jnp.asarray(value) for name, value in out.items()}


def _label(
    out: dict[str, Any], axes: dict[str, np.ndarray], dims: Mapping[str, Sequence[str]], coords: Mapping[str, Any]
) -> "xarray.Dataset":
    import xarray

    shape = tuple(len(values) for values in axes.values())
    result = out.pop("result", None)
    failed, messages = _failures(out, result, math.prod(shape))
    data: dict[str, Any] = {}
    for name, values in out.items():
        own = tuple(dims.get(name, [f"{name}_{i}" for i in range(values.ndim - 1)]))
        names = (*axes, *own)
        full = (*shape, *values.shape[1:])
        if values.dtype.kind == "f" and failed.any():
            mask = failed.reshape(-1, *([1] * (values.ndim - 1)))
            data[f"{name}_failed"] = (names, np.where(mask, values, np.nan).reshape(full))
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
        kept = kept.drop_vars([name for name in kept if str(name).endswith("_failed")])
    return xarray.concat([kept, again], axis).sortby(axis)
