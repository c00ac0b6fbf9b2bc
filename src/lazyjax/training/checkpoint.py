"""The checkpoint format: the state of a training in a folder, by orbax.

On disk there is the latest finished epoch alone, in a folder named by its number:

    FOLDER/12/configuration/    what the training is, as JSON (`configuration` below)
    FOLDER/12/state/            its arrays, by their number in the tree of (states, history, failed)

`states` has for each chunk of lanes the displacements u (w itself for the plain difference) and the state of the
optimizer; `history` has every measure so far, (epochs, lanes); `failed` tells which lanes have diverged, (lanes,).
Random keys are kept as their data. Nothing else of a training is on disk: model, data and optimizer come from the call
that continues it, which is refused if its configuration is another one. orbax writes a folder aside and renames it, so
that an interruption loses the epoch under way and no more; what it leaves of one has a longer name and is passed over.
"""

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu

from lazyjax._core.keys import is_key
from lazyjax._core.records import as_json, check_configuration, digest_of, versions
from lazyjax.training.lanes import Lanes, program_digest
from lazyjax.training.step import State, TrainingSetup


def configuration(setup: TrainingSetup, lanes: Lanes, chunk: Lanes, state: State, loss: Any) -> dict[str, Any]:
    """Return what a checkpoint belongs to, by name: every argument that decides the bits of a training.

    Args:
        setup: What all lanes share.
        lanes: All lanes.
        chunk: The first chunk of them.
        state: Its state.
        loss: As `train` was given it.
    """
    return {
        "alpha": [float(a) for a in lanes.alpha],
        "batch_size": setup.batch_size,
        "chunk": chunk.count,
        "difference": "plain" if setup.plain else "exact",
        "loss": loss if isinstance(loss, str) else "a function",
        "w0": digest_of((lanes.parts.w0, setup.rest)),
        "key": digest_of(lanes.parts.key),
        "data": digest_of((setup.x, setup.task.targets)),
        "arrays of f, augment, optimizer or loss": digest_of((setup.f, setup.augment, setup.optimizer, setup.task)),
        "test": None if setup.test is None else digest_of((setup.test.x, setup.test.task.targets)),
        "program": program_digest(setup, chunk, state),
        "versions": {**versions("lazyjax", "jax", "jaxlib", "optax"), "backend": jax.default_backend()},
    }


class Checkpoints:
    """A folder with the latest checkpoint of one training; use it in a `with` block, and `claim` it first.

    Args:
        folder: Made if it does not exist.

    Raises:
        ValueError: the folder holds other files, or a checkpoint that cannot be read; it is left as it is.
    """

    def __init__(self, folder: str | Path) -> None:
        import orbax.checkpoint as ocp

        self.folder = Path(folder).absolute()
        self.configuration: dict[str, Any] = {}
        _check_folder(self.folder)
        self._ocp = ocp
        self._options = ocp.CheckpointManagerOptions(max_to_keep=1, enable_async_checkpointing=False, create=False)
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
        """Return the epoch of the checkpoint, or None if there is none."""
        return None if self._manager is None else self._manager.latest_step()

    def found(self) -> dict[str, Any]:
        """Return the configuration of the checkpoint; it is empty if there is none."""
        epoch = self.latest()
        return {} if epoch is None else dict(self._restore(epoch, "configuration", self._ocp.args.JsonRestore()))

    def claim(self, configuration: Mapping[str, Any]) -> None:
        """Say what the training is, by name.

        Raises:
            ValueError: the folder holds another training; it is left as it is.
        """
        self.configuration = as_json(configuration)
        if self.latest() is not None:
            check_configuration(self.configuration, self.found(), holder=f"folder {self.folder}", kind="training")

    def load(self, epoch: int, like: Any) -> Any:
        """Return the state at this epoch, with the structure, shapes and dtypes of another state."""
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
    """Check that a folder holds one folder per epoch, named by its number (and what an interruption left of one)."""
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
    """Return the leaves by number, random keys as their data."""
    return {f"{i:05d}": jr.key_data(leaf) if is_key(leaf) else leaf for i, leaf in enumerate(jtu.tree_leaves(tree))}


def _as_tree(arrays: Mapping[str, Any], like: Any) -> Any:
    leaves, structure = jtu.tree_flatten(like)
    found = [arrays[f"{i:05d}"] for i in range(len(leaves))]
    return structure.unflatten(
        [
            jr.wrap_key_data(jnp.asarray(a), impl=jr.key_impl(b)) if is_key(b) else a
            for a, b in zip(found, leaves, strict=True)
        ]
    )
