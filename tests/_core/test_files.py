"""Files are whole or not there; arrays that are not as they were written are found out."""

import errno
import os
import subprocess
import sys

import numpy as np
import pytest

from lazyjax._core.files import (
    DamagedError,
    DamagedWarning,
    NotWrittenError,
    add_last_line,
    check_last_line,
    read_arrays,
    remove_partial,
    set_aside,
    whole_file,
    write_arrays,
    write_whole,
)

ARRAYS = [np.arange(6.0).reshape(2, 3), np.array(True), np.zeros((0, 2), np.int32)]


def test_a_file_is_written_whole_or_stays_as_it_was(tmp_path):
    path = tmp_path / "new" / "text"
    write_whole(path, "grün")
    assert path.read_text(encoding="utf-8") == "grün"

    def stop_half_way():
        with whole_file(path) as aside:
            aside.write_bytes(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stop_half_way()
    assert path.read_text(encoding="utf-8") == "grün"
    assert list(path.parent.iterdir()) == [path]


def test_two_writers_of_one_file_are_in_nobodys_way(tmp_path):
    path = tmp_path / "text"
    with whole_file(path) as one, whole_file(path) as other:
        assert one != other
        one.write_bytes(b"one")
        other.write_bytes(b"other")
    assert path.read_bytes() == b"one"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_one_error_and_what_was_there_stays(tmp_path, monkeypatch):
    path = tmp_path / "text"
    write_whole(path, "before")

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        NotWrittenError, match=r"text could not be written \(No space left on device\); free some space"
    ):
        write_whole(path, "after")
    monkeypatch.undo()
    assert path.read_text() == "before"
    with pytest.raises(NotWrittenError, match="could not be written"):
        write_whole(path / "below a file", "text")
    assert list(tmp_path.iterdir()) == [path]


KILLED = """
import os, signal, sys
from pathlib import Path
from lazyjax._core.files import write_whole
calls, real = [], {name: getattr(os, name) for name in ("fsync", "replace")}
def killing(name):
    def call(*args):
        if len(calls) == int(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGKILL)
        calls.append(name)
        return real[name](*args)
    return call
for name in real:
    setattr(os, name, killing(name))
write_whole(Path(sys.argv[1]), "after" * 1000)
"""


@pytest.mark.parametrize("call", range(3))
def test_a_writer_that_is_killed_leaves_the_old_file_or_the_new_one(tmp_path, call):
    path = tmp_path / "text"
    write_whole(path, "before")
    ended = subprocess.run([sys.executable, "-c", KILLED, str(path), str(call)], check=False)
    assert ended.returncode == -9
    # Killed before the bytes are on the disk, before the name is changed, and after that.
    assert path.read_text() == ("before" if call < 2 else "after" * 1000)
    assert len(list(tmp_path.iterdir())) == (2 if call < 2 else 1)
    remove_partial(tmp_path)
    assert list(tmp_path.iterdir()) == [path]


def test_arrays_come_back_with_their_owner(tmp_path):
    path = tmp_path / "part.npz"
    write_arrays(path, ARRAYS, "me")
    arrays, owner = read_arrays(path)
    assert owner == "me"
    for there, here in zip(arrays, ARRAYS, strict=True):
        assert there.dtype == here.dtype
        np.testing.assert_array_equal(there, here)


def swapped(path):
    write_arrays(path.with_name("other.npz"), ARRAYS, "me")
    path.write_bytes(path.with_name("other.npz").read_bytes())


def changed(path):
    with np.load(path) as found:
        content = dict(found)
    np.savez(path, **content | {"arr_0": content["arr_0"] + 1})


def owned(path):
    with np.load(path) as found:
        content = dict(found)
    np.savez(path, **content | {"owner": np.asarray("you")})


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (changed, "checksum"),
        (owned, "checksum"),
        (swapped, "checksum"),
        (lambda path: np.savez(path, np.ones(3)), "cannot be read: KeyError"),
        (lambda path: path.write_bytes(b""), "cannot be read"),
        (lambda path: path.write_bytes(b"\x80\x04]."), "cannot be read"),
        (lambda path: path.write_bytes(path.read_bytes()[:-100]), "cannot be read: BadZipFile"),
        (lambda path: path.write_bytes(path.read_bytes().replace(np.float64(5).tobytes(), b"\0" * 8)), "cannot be re"),
    ],
)
def test_arrays_that_are_not_as_they_were_written_are_found_out(tmp_path, damage, why):
    path = tmp_path / "part.npz"
    write_arrays(path, ARRAYS, "me")
    damage(path)
    with pytest.raises(DamagedError, match=why):
        read_arrays(path)


def test_a_last_line_tells_whether_a_file_is_as_it_was_written(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"content")
    assert not check_last_line(path)
    add_last_line(path)
    assert path.read_bytes().startswith(b"content\nlazyjax sha256 ")
    assert check_last_line(path)
    whole = path.read_bytes()
    for other in (b"C" + whole[1:], whole[:-1], whole + b"\n", whole[:-2] + b"?\n"):
        path.write_bytes(other)
        with pytest.raises(DamagedError, match="its checksum is another one"):
            check_last_line(path)


def test_what_is_set_aside_has_a_name_of_its_own_and_is_told(tmp_path):
    for i in range(2):
        (tmp_path / "part").write_text(str(i))
        with pytest.warns(DamagedWarning, match=r"part is damaged \(no number\): it was renamed to part.damaged"):
            set_aside(tmp_path / "part", "no number")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"part.damaged": "0", "part.damaged-2": "1"}
