"""A folder has one writer at a time; one that was killed is in nobody's way."""

import os
import subprocess
import sys

import pytest

from lazyjax._core.files import NotWrittenError
from lazyjax._core.lock import in_use

HOLDER = """
import sys
from pathlib import Path
from lazyjax._core.lock import in_use
with in_use(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def hold(folder):
    command = [sys.executable, "-c", HOLDER, str(folder)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    return process


def enter(folder, name=".lock"):
    with in_use(folder, name):
        return (folder / name).read_text()


@pytest.mark.parametrize("end", [subprocess.Popen.kill, lambda process: process.stdin.close()])
def test_another_process_is_told_who_is_there_until_it_ends(tmp_path, end):
    with hold(tmp_path) as process:
        match = rf"folder .* is in use by process {process.pid} on \S* since 20\d\d-\d\d-\d\d .*; wait until it ends"
        with pytest.raises(ValueError, match=match):
            enter(tmp_path)
        assert f"process {os.getpid()} " in enter(tmp_path, ".other")  # another work in the folder
        end(process)
    assert f"process {os.getpid()} " in enter(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_one_process_has_a_folder_once(tmp_path):
    with in_use(tmp_path), pytest.raises(ValueError, match=f"in use by process {os.getpid()} "):
        enter(tmp_path)
    enter(tmp_path)


def test_a_folder_that_stays_empty_goes_again(tmp_path):
    folder = tmp_path / "deep" / "new"
    enter(folder)
    assert not folder.parent.exists()
    with in_use(folder):
        (folder / "part").write_text("done")
    assert [path.name for path in folder.iterdir()] == ["part"]
    folder = tmp_path / "old"
    folder.mkdir()
    enter(folder)
    assert folder.exists()


def test_where_nothing_can_be_written_is_one_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NotWrittenError, match=r"folder .*file cannot be written to \(File exists\); choose another"):
        enter(tmp_path / "file")
