"""An interrupted training goes on to the same bits; a folder that holds something else is refused and left alone."""

import functools
import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import optax
import pytest

import lazyjax as lj
from lazyjax._core.files import DamagedWarning
from lazyjax._core.lock import in_use
from problems import normal
from shared_training import key

F = lj.models.two_layer(jnp.tanh)
W0 = {"a": normal(0, 4), "b": normal(1, 4, 3)}
X = normal(2, 11, 3)
Y = np.sin(np.asarray(X)[:, 0])
RATE = lj.training.inverse_time_decay(0.1, 0.5, steps_per_epoch=2)
SGD = optax.sgd(RATE, momentum=0.9)
ALPHAS = np.array([1.0, 100.0, np.inf])
# The function `train` hides its module.
MODULE = importlib.import_module("lazyjax.training.train")
run_epoch = MODULE.run_epoch


def jitter(key, x):
    return x + 0.1 * jr.normal(key, x.shape, x.dtype)


def train(epochs, folder=None, f=F, w0=W0, x=X, y=Y, optimizer=SGD, **given):
    given = {"alpha": ALPHAS, "batch_size": 4, "test": (X[:5], Y[:5]), "augment": jitter, "chunk": 2, **given}
    options = lj.training.TrainingOptions(folder=folder, **{name: given.pop(name) for name in ("augment", "chunk")})
    given = {"key": key(2), **given}
    return lj.train(f, w0, x, y, optimizer, epochs=epochs, options=options, **given)


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A folder with two of five epochs."""
    folder = tmp_path_factory.mktemp("training") / "kept"
    train(2, folder)
    return folder


@pytest.fixture
def folder(kept, tmp_path):
    """A copy of it."""
    return shutil.copytree(kept, tmp_path / "kept")


@functools.cache
def uninterrupted(epochs):
    return train(epochs)


def same_bits(a, b):
    """Every array of two results, NaN included."""
    pairs = zip(jtu.tree_leaves(a), jtu.tree_leaves(b), strict=True)
    return all(np.array_equal(x, y, equal_nan=jnp.issubdtype(x.dtype, jnp.floating)) for x, y in pairs)


def files(folder):
    return {p.relative_to(folder): (p.stat().st_mtime_ns, p.stat().st_size) for p in sorted(folder.rglob("*"))}


class Frozen(eqx.Module):
    """Something with an array of its own, which a compiled program takes as an argument."""

    size: jax.Array
    part: str = eqx.field(static=True)

    def __call__(self, *args):
        if self.part == "f":
            w, x = args
            return self.size * F(w, x)
        if self.part == "augment":
            return self.size * args[1]
        return lj.square_loss(self.size * args[0])


def test_an_interrupted_training_goes_on_to_the_same_bits(folder):
    resumed = train(5, folder)
    assert same_bits(resumed, uninterrupted(5))
    assert resumed.loss.shape == (3, 5)
    # What is finished is read, not run again.
    before = files(folder)
    assert same_bits(train(5, folder), uninterrupted(5))
    assert files(folder) == before


@pytest.mark.end_to_end
def test_another_process_goes_on_to_the_same_bits(folder, tmp_path):
    """What is compiled anew, from the same place on: here everything."""
    command = (
        "import jax; jax.config.update('jax_enable_x64', True)\n"
        "import numpy as np, jax.tree_util as jtu, test_checkpoint\n"
        f"leaves = jtu.tree_leaves(test_checkpoint.train(5, {str(folder)!r}))\n"
        f"np.savez({str(tmp_path / 'leaves.npz')!r}, *leaves)"
    )
    paths = [Path(__file__).parent, Path(__file__).parents[1], Path(__file__).parents[2] / "src"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    subprocess.run([sys.executable, "-c", command], check=True, env=environment)
    with np.load(tmp_path / "leaves.npz") as found:
        assert same_bits([found[name] for name in found.files], jtu.tree_leaves(uninterrupted(5)))


def test_an_interruption_in_the_midst_of_an_epoch_or_a_write_loses_that_epoch_only(folder, monkeypatch):
    calls = []

    def interrupted(*args, **kwargs):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return run_epoch(*args, **kwargs)

    monkeypatch.setattr(MODULE, "run_epoch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(5, folder)
    monkeypatch.undo()
    # What a write that was broken off leaves behind.
    (folder / "3.orbax-checkpoint-tmp-0").mkdir()
    assert same_bits(train(5, folder), uninterrupted(5))


def test_lanes_go_on_in_the_groups_that_they_began_in(folder):
    """However much memory is free by then: here one lane at a time would be chosen, where there were two."""
    (folder / ".DS_Store").write_bytes(b"a file manager was here")
    assert same_bits(train(5, folder, chunk=None), uninterrupted(5))


@pytest.mark.standard_promotion  # optax.add_noise
def test_an_optimizer_with_random_keys_of_its_own_is_resumed(tmp_path):
    noisy = optax.chain(optax.add_noise(0.1, 0.5, key(3)), optax.sgd(0.1))
    options = {"optimizer": noisy, "alpha": 10.0}
    train(1, tmp_path / "kept", **options)
    assert same_bits(train(3, tmp_path / "kept", **options), train(3, **options))


def explosive(w, x):
    """NaN once the first unit has moved."""
    return jnp.where(jnp.abs(w["a"][0] - W0["a"][0]) < 0.03, 1.0, jnp.nan) * F(w, x)


def test_a_diverged_lane_stays_so_after_a_resumption(tmp_path):
    options = {"f": explosive, "throw": False, "augment": None}
    whole = train(6, **options)
    assert (whole.result == lj.RESULTS.nonfinite).tolist() == [True, False, False]
    train(3, tmp_path / "kept", **options)
    assert same_bits(train(6, tmp_path / "kept", **options), whole)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"alpha": np.array([1.0, 2.0, 3.0])}, r"alpha \[1.0, 100.0, inf\] there and \[1.0, 2.0, 3.0\] here"),
        ({"batch_size": 5}, "batch_size 4 there and 5 here"),
        ({"key": key(5)}, "key .* there and"),
        ({"x": np.asarray(X) + 1e-9}, "data .* there and"),
        ({"y": 2 * Y}, "data .* there and"),
        ({"w0": {"a": normal(5, 4), "b": normal(1, 4, 3)}}, "w0 .* there and"),
        ({"test": None}, "test .* there and None here"),
        ({"chunk": 3}, "chunk 2 there and 3 here"),
        ({"optimizer": optax.sgd(RATE, momentum=0.8)}, "program .* there and"),
        ({"optimizer": optax.adam(RATE), "alpha": np.array([1.0, 100.0, 7.0])}, "program .* there and"),
        ({"f": lj.models.two_layer(jnp.sin)}, "program .* there and"),
        ({"augment": None}, "program .* there and"),
        ({"loss": lambda y: lj.square_loss(y, mean=False)}, "loss square there and a function here"),
    ],
)
@pytest.mark.standard_promotion  # optax.adam
def test_another_training_in_the_folder_is_refused_and_left_alone(folder, options, match):
    before = files(folder)
    with pytest.raises(ValueError, match=rf"holds another training \(.*{match}.*choose another folder, or delete it"):
        train(5, folder, **options)
    assert files(folder) == before


def test_a_training_with_other_arrays_inside_its_functions_is_refused(tmp_path):
    def options(**sizes):
        parts = {name: Frozen(jnp.asarray(sizes.get(name, np.float64(1.0))), name) for name in ("f", "augment", "loss")}
        return {**parts, "alpha": 10.0, "chunk": 1, "test": None}

    train(1, tmp_path / "kept", **options())
    before = files(tmp_path / "kept")
    for name in ("f", "augment", "loss"):
        match = r"holds another training \(arrays of f, augment, optimizer or loss \w+ there and \w+ here\)"
        with pytest.raises(ValueError, match=match):
            train(2, tmp_path / "kept", **options(**{name: np.float64(1.5)}))
    assert files(tmp_path / "kept") == before


def test_fewer_epochs_than_there_are_is_refused(folder):
    before = files(folder)
    with pytest.raises(ValueError, match="epochs must be at least the 2 that the checkpoint in folder has, got 1"):
        train(1, folder)
    assert files(folder) == before


def test_a_folder_of_other_files_is_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work", encoding="utf-8")
    before = files(tmp_path)
    with pytest.raises(ValueError, match=r"folder must be empty or hold checkpoints .* holds \['thesis.tex'\]"):
        train(1, tmp_path)
    assert files(tmp_path) == before
    with pytest.raises(ValueError, match=r"folder must be a folder for checkpoints, got the file .*thesis.tex"):
        train(1, tmp_path / "thesis.tex")


def test_folders_of_photographs_by_year_are_no_checkpoints(tmp_path):
    (tmp_path / "2019").mkdir()
    (tmp_path / "2019" / "sea.jpg").write_bytes(b"a long summer")
    before = files(tmp_path)
    with pytest.raises(ValueError, match=r"folder must be empty or hold checkpoints of a training, but .*2019 is none"):
        train(1, tmp_path)
    assert files(tmp_path) == before
    (tmp_path / "2019" / "sea.jpg").unlink()
    (tmp_path / "2019").rmdir()
    (tmp_path / "2019").write_text("a file by that name", encoding="utf-8")
    with pytest.raises(ValueError, match=r"folder must be empty or hold checkpoints .* holds \['2019'\]"):
        train(1, tmp_path)


def cut_off(folder, item):
    """By a full disk, say."""
    for path in (folder / "2" / item).rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def lost(folder, item):
    shutil.rmtree(folder / "2" / item)


def replaced(folder, item):
    """By that of another training."""
    train(2, folder.parent / "other", key=key(8))
    lost(folder, item)
    shutil.copytree(folder.parent / "other" / "2" / item, folder / "2" / item)


@pytest.mark.parametrize(
    ("damage", "item", "why"),
    [
        (cut_off, "configuration", "its configuration cannot be read"),
        (cut_off, "state", "its state cannot be read"),
        (lost, "configuration", "its configuration cannot be read"),
        (lost, "state", "its state cannot be read"),
        (replaced, "state", "the checksum of its state is another one"),
    ],
)
def test_a_damaged_checkpoint_is_set_aside_and_its_epochs_are_trained_again(folder, damage, item, why):
    damage(folder, item)
    with pytest.warns(DamagedWarning, match=rf"kept/2 is damaged \({why}.*renamed to 2.damaged, and what it held"):
        again = train(5, folder)
    assert same_bits(again, uninterrupted(5))
    assert {path.name for path in folder.iterdir()} == {"2.damaged", "5"}


def test_an_earlier_checkpoint_serves_if_the_last_one_is_damaged(folder, monkeypatch):
    """Both are there if a training is killed after one is written, and before the one before it is removed."""
    shutil.copytree(folder / "2", folder.parent / "2")
    train(3, folder)
    shutil.copytree(folder.parent / "2", folder / "2")
    (folder / "3" / "state" / "_METADATA").write_bytes(b"{")
    (folder / "3" / "state" / "manifest.ocdbt").write_bytes(b"{")
    ran = []
    monkeypatch.setattr(MODULE, "run_epoch", lambda *args: ran.append(args[3]) or run_epoch(*args))
    with pytest.warns(DamagedWarning, match="kept/3 is damaged"):
        again = train(5, folder)
    assert same_bits(again, uninterrupted(5))
    assert sorted(set(ran)) == [2, 3, 4]


def test_a_folder_that_another_training_is_using_is_refused(folder):
    before = files(folder)
    with in_use(folder), pytest.raises(ValueError, match=r"is in use by process .* since .*; wait until it ends"):
        train(5, folder)
    assert files(folder) == before


KILLED = """
import os, signal, sys
import jax; jax.config.update("jax_enable_x64", True)
import test_checkpoint
names, calls = ("fsync", "replace", "rename", "rmdir", "unlink"), []
def killing(real):
    def call(*args, **kwargs):
        calls.append(real)
        if len(calls) == int(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)
    return call
for name in names:
    setattr(os, name, killing(getattr(os, name)))
test_checkpoint.train(4, sys.argv[1])
print(len(calls))
"""


@pytest.mark.end_to_end
def test_a_training_that_is_killed_at_a_write_goes_on_to_the_same_bits(folder, tmp_path):
    """At several of the calls that change files; their number varies a little, since Orbax writes in threads."""
    paths = [Path(__file__).parent, Path(__file__).parents[1], Path(__file__).parents[2] / "src"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))}

    def run(folder, call):
        command = [sys.executable, "-c", KILLED, str(folder), str(call)]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    total = int(run(shutil.copytree(folder, tmp_path / "whole"), -1).stdout)
    for call in sorted({1, total // 4, total // 2, 3 * total // 4}):
        there = shutil.copytree(folder, tmp_path / f"killed-{call}")
        assert run(there, call).returncode == -9
        assert same_bits(train(5, there), uninterrupted(5))


def test_bad_arguments_leave_no_folder(tmp_path):
    with pytest.raises(ValueError, match="batch_size must be"):
        train(1, tmp_path / "new", batch_size=100)
    assert not (tmp_path / "new").exists()
