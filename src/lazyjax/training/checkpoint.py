"""The checkpoint format: the state of a training in a folder, by orbax.

On disk there is the latest finished epoch alone, in a folder named by its number:

    FOLDER/12/configuration/    as JSON what the training is (`configuration` below), and the digest of its arrays
    FOLDER/12/state/            its arrays, by their number in the tree of (states, history, failed)

`states` has for each chunk of lanes the displacements u (w itself for the plain difference) and the state of the
optimizer; `history` has every measure so far, (epochs, lanes); `failed` tells which lanes have diverged, (lanes,).
Random keys are kept as their data. Nothing else of a training is on disk: model, data and optimizer come from the call
that continues it, which is refused if its configuration is another one. orbax writes a folder aside and renames it, so
that an interruption loses the epoch under way and no more; what it leaves of one has a longer name and is passed over.
A checkpoint that is not as it was written is renamed, with a warning, and its epochs are trained again.
"""

import contextlib
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu

from lazyjax._core.files import DamagedError, NotWrittenError, set_aside
from lazyjax._core.keys import is_key
from lazyjax._core.lock import in_use
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
        ValueError: the folder holds other files, or is in use by another process; it is left as it is.
    """

    def __init__(self, folder: str | Path) -> None:
        import orbax.checkpoint as ocp

        self.folder = Path(folder).absolute()
        self.configuration: dict[str, Any] = {}
        self._ocp = ocp
        self._manager: Any = None
        self._held = contextlib.ExitStack()

    def __enter__(self) -> "Checkpoints":
        _check_folder(self.folder)
        with contextlib.ExitStack() as held:
            held.enter_context(in_use(self.folder))
            held.callback(self._close)
            self._open()
            self._held = held.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._held.close()

    def _open(self) -> None:
        options = self._ocp.CheckpointManagerOptions(max_to_keep=1, enable_async_checkpointing=False, create=False)
        self._manager = self._ocp.CheckpointManager(self.folder, options=options, item_names=("configuration", "state"))

    def _close(self) -> None:
        if self._manager is not None:
            self._manager.close()

    def latest(self) -> int | None:
        """Return the epoch of the checkpoint, or None if there is none."""
        return self._manager.latest_step()

    def found(self) -> dict[str, Any]:
        """Return the configuration of the checkpoint; it is empty if there is none."""
        return self._found()[0]

    def _found(self) -> tuple[dict[str, Any], str]:
        """Return the configuration of the checkpoint and the digest of its arrays."""
        while (epoch := self.latest()) is not None:
            try:
                found = self._restore(epoch, "configuration", self._ocp.args.JsonRestore())
                return dict(found.get("training", {})), str(found.get("arrays"))
            except DamagedError as error:
                self._set_aside(epoch, str(error))
        return {}, ""

    def claim(self, configuration: Mapping[str, Any]) -> None:
        """Say what the training is, by name.

        Raises:
            ValueError: the folder holds another training; it is left as it is.
        """
        self.configuration = as_json(configuration)
        there = self.found()
        if self.latest() is not None:
            check_configuration(self.configuration, there, holder=f"folder {self.folder}", kind="training")

    def load(self, epoch: int, like: Any) -> Any:
        """Return the state at this epoch, with the structure, shapes and dtypes of another state.

        It is None if the checkpoint is damaged: it has been renamed then, and an earlier one may be there.
        """
        _, digest = self._found()
        try:
            arrays = self._restore(epoch, "state", self._ocp.args.StandardRestore(_as_arrays(like)))
            why = None if digest_of(arrays) == digest else "the checksum of its state is another one"
        except DamagedError as error:
            arrays, why = {}, str(error)
        if why is not None:
            self._set_aside(epoch, why)
            self.claim(self.configuration)
            return None
        return _as_tree(arrays, like)

    def _restore(self, epoch: int, name: str, item: Any) -> Any:
        """Return a part of a checkpoint.

        Raises:
            DamagedError: it is not what was written.
            ValueError: it is no checkpoint at all.
        """
        try:
            return self._manager.restore(epoch, args=self._ocp.args.Composite(**{name: item}))[name]
        except Exception as error:  # orbax and its parts have many for a damaged or foreign folder
            folder = self.folder / str(epoch)
            if any((folder / part).exists() for part in ("_CHECKPOINT_METADATA", "configuration", "state")):
                msg = f"its {name} cannot be read: {type(error).__name__}"
                raise DamagedError(msg) from error
            msg = (
                f"folder must be empty or hold checkpoints of a training, but {folder} is none "
                f"({type(error).__name__}); choose another folder."
            )
            raise ValueError(msg) from error

    def _set_aside(self, epoch: int, why: str) -> None:
        self._manager.close()
        set_aside(self.folder / str(epoch), why)
        self._open()

    def store(self, epoch: int, state: Any) -> None:
        """Keep a state, and forget the one before it.

        Raises:
            NotWrittenError: it cannot be written; the one before it stays.
        """
        arrays = _as_arrays(state)
        args = self._ocp.args.Composite(
            configuration=self._ocp.args.JsonSave({"training": self.configuration, "arrays": digest_of(arrays)}),
            state=self._ocp.args.StandardSave(arrays),
        )
        manager: Any = self._manager
        try:
            manager.save(epoch, args=args)
        except Exception as error:  # orbax and its parts have many for a full disk
            msg = (
                f"the checkpoint of epoch {epoch} could not be written in {self.folder} ({type(error).__name__}: "
                f"{error}); free some space, and call again to go on after the last one that was."
            )
            raise NotWrittenError(msg) from error


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
