"""The state of a training in a folder, by orbax: the latest epoch whole, recognized by what it belongs to."""

import hashlib
import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np


class Checkpoints:
    """A folder with the latest checkpoint of one training; use it in a `with` block, and `claim` it first.

    Args:
        folder: Made where it does not exist.

    Raises:
        ValueError: the folder holds other files, or a checkpoint that cannot be read; it is left as it is.
    """

    def __init__(self, folder: str | Path) -> None:
        import orbax.checkpoint as ocp

        self.folder = Path(folder).absolute()
        self.configuration: dict[str, Any] = {}
        _check_folder(self.folder)
        self._ocp = ocp
        options = ocp.CheckpointManagerOptions(max_to_keep=1, enable_async_checkpointing=False, create=False)
        self._options = options
        self._manager: Any = None
        if self.folder.exists():
            self._open()

    def _open(self) -> None:
        self._manager = self._ocp.CheckpointManager(
            self.folder, options=self._options, item_names=("configuration", "state")
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._manager is not None:
            self._manager.close()

    def latest(self) -> int | None:
        """The epoch of the checkpoint; None where there is none."""
        return None if self._manager is None else self._manager.latest_step()

    def there(self) -> dict[str, Any]:
        """The configuration of the checkpoint; empty where there is none."""
        epoch = self.latest()
        return {} if epoch is None else dict(self._restore(epoch, "configuration", self._ocp.args.JsonRestore()))

    def claim(self, configuration: Mapping[str, Any]) -> None:
        """Say what the training is, by name.

        Raises:
            ValueError: the folder holds another training; it is left as it is.
        """
        self.configuration = here = json.loads(json.dumps(configuration))
        if self.latest() is None:
            return
        there = self.there()
        differ = [name for name in {**here, **there} if here.get(name) != there.get(name)]
        if differ:
            changes = ", ".join(f"{name} {there.get(name)} there and {here.get(name)} here" for name in differ)
            msg = f"folder {self.folder} holds another training ({changes}); choose another folder, or delete it."
            raise ValueError(msg)

    def load(self, epoch: int, like: Any) -> Any:
        """The state at this epoch, of the shapes and dtypes of another state."""
        return _as_tree(self._restore(epoch, "state", self._ocp.args.StandardRestore(_as_arrays(like))), like)

    def _restore(self, epoch: int, name: str, item: Any) -> Any:
        try:
            return self._manager.restore(epoch, args=self._ocp.args.Composite(**{name: item}))[name]
        except Exception as error:  # orbax and its parts have many for a damaged or foreign folder
            msg = (
                f"folder must hold whole checkpoints of this training, but the {name} in {self.folder / str(epoch)} "
                f"cannot be read ({type(error).__name__}); choose another folder, or delete it."
            )
            raise ValueError(msg) from error

    def store(self, epoch: int, state: Any) -> None:
        """Keep a state, and forget the one before it."""
        if self._manager is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._open()
        args = self._ocp.args.Composite(
            configuration=self._ocp.args.JsonSave(self.configuration),
            state=self._ocp.args.StandardSave(_as_arrays(state)),
        )
        manager: Any = self._manager
        manager.save(epoch, args=args)


def _check_folder(folder: Path) -> None:
    """A folder of checkpoints has one folder an epoch, named by its number (and what an interruption left of one)."""
    if not folder.exists():
        return
    if not folder.is_dir():
        msg = f"folder must be a folder for checkpoints, got the file {folder}."
        raise ValueError(msg)
    # Hidden files are the file manager's.
    seen = [p for p in folder.iterdir() if not p.name.startswith(".")]
    strange = sorted(p.name for p in seen if not (p.name.split(".", 1)[0].isdigit() and p.is_dir()))
    if strange:
        msg = f"folder must be empty or hold checkpoints of this training, but {folder} holds {strange[:3]}."
        raise ValueError(msg)


def _as_arrays(tree: Any) -> dict[str, Any]:
    """The leaves by number; random keys as their data."""
    return {f"{i:05d}": jr.key_data(leaf) if _is_key(leaf) else leaf for i, leaf in enumerate(jtu.tree_leaves(tree))}


def _as_tree(arrays: Mapping[str, Any], like: Any) -> Any:
    leaves, structure = jtu.tree_flatten(like)
    found = [arrays[f"{i:05d}"] for i in range(len(leaves))]
    return structure.unflatten(
        [
            jr.wrap_key_data(jnp.asarray(a), impl=jr.key_impl(b)) if _is_key(b) else a
            for a, b in zip(found, leaves, strict=True)
        ]
    )


def _is_key(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def digest_of(tree: Any) -> str:
    """A short name of the arrays of a tree."""
    digest = hashlib.sha256()
    for path, leaf in jtu.tree_leaves_with_path(eqx.filter(tree, eqx.is_array)):
        array = np.ascontiguousarray(jr.key_data(leaf) if _is_key(leaf) else leaf)
        digest.update(f"{jtu.keystr(path)} {array.dtype} {array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()[:16]


def versions() -> dict[str, str]:
    """What computes the bits."""
    return {name: version(name) for name in ("lazyjax", "jax", "jaxlib", "optax")}
