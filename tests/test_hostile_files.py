"""Files that were changed at random places, processes that are killed at their writes, and a full disk."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

FULL = """
import resource, sys
from pathlib import Path
from lazyjax.cli import command
from reports import make_report
def diagnose(*_, folder, **__):
    (folder / "scales").mkdir()
    (folder / "scales" / "lanes-000000.npz").write_bytes(b"finished")
    resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))
    return make_report()
command.diagnose, command.report_figures = diagnose, lambda report: {}
command.main(["report", "--train", "10", "--no-cache", "--out", sys.argv[1]])
"""


def run(*arguments, **options):
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


@pytest.mark.end_to_end
@pytest.mark.parametrize("name", ["sweep", "train", "report"])
def test_nothing_is_lost_by_a_kill(name):
    """Not at some of the writes, nor at some random times; the script has more of them."""
    ended = run(ROOT / "scripts" / "kill_writers.py", "--only", name, "--number", 3)
    assert ended.returncode == 0, ended.stdout + ended.stderr


@pytest.mark.end_to_end
def test_changed_files_are_refused_and_crash_nothing():
    ended = run(ROOT / "scripts" / "fuzz_readers.py", "--number", 20)
    assert ended.returncode == 0, ended.stdout + ended.stderr


@pytest.mark.end_to_end
def test_a_full_disk_is_one_line_and_what_is_finished_stays(tmp_path):
    """Files of at most 9000 bytes are what the system allows here."""
    paths = f"{ROOT / 'src'}:{ROOT / 'tests'}"
    ended = run("-c", FULL, tmp_path / "out", env={"PYTHONPATH": paths, "PATH": ""})
    assert ended.returncode == 1
    what = "sweep.nc could not be written (NetCDF: HDF error); free some space, or choose another folder"
    assert ended.stderr.splitlines()[-1].endswith(f"{what}; the same command continues where it stopped.")
    assert "At alpha = 1 this model does not train lazily" in ended.stdout
    names = {path.name for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert names == {"configuration.json", "lanes-000000.npz"}
