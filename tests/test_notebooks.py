"""The notebooks as they are committed, and the script that runs them and stores their outputs."""

import json
import re
from pathlib import Path

import pytest

GUARD = """\
import importlib.util

if importlib.util.find_spec("lazyjax") is None:
    %pip install --quiet lazyjax"""
# Two parts at least, so that neither a quotient nor the end of an HTML tag is taken for a path.
ABSOLUTE_PATH = re.compile(r"(?:(?<![^\s\"'`(=:,\[>])|(?<=file://))/[\w.-]+/[\w.-]+|\b[A-Z]:\\+Users\b")

NOTEBOOKS = sorted(Path(__file__).parents[1].glob("notebooks/*.ipynb"))
each_notebook = pytest.mark.parametrize("path", [pytest.param(path, id=path.stem) for path in NOTEBOOKS])


def read(path):
    """Return a notebook as plain JSON, the lines of each text joined."""

    def join(value):
        if isinstance(value, dict):
            return {name: join(each) for name, each in value.items()}
        if isinstance(value, list):
            return "".join(value) if all(isinstance(each, str) for each in value) else [join(each) for each in value]
        return value

    return join(json.loads(path.read_text(encoding="utf-8")))


def texts(nb):
    """Return all that a notebook says but for its images."""
    outputs = [output for cell in nb["cells"] for output in cell.get("outputs", [])]
    data = [str(value) for out in outputs for kind, value in out.get("data", {}).items() if kind.startswith("text/")]
    return [cell["source"] for cell in nb["cells"]] + [output.get("text", "") for output in outputs] + data


@each_notebook
def test_notebook_is_numbered(path):
    assert re.fullmatch(r"\d\d_\w+", path.stem)


@each_notebook
def test_notebook_runs_on_the_kernel_that_every_host_has(path):
    assert read(path)["metadata"]["kernelspec"]["name"] == "python3"


@each_notebook
def test_notebook_first_installs_lazyjax_where_it_is_missing(path):
    first = next(cell for cell in read(path)["cells"] if cell["cell_type"] == "code")
    assert first["source"] == GUARD


@each_notebook
def test_notebook_shows_no_path_of_the_machine_that_ran_it(path):
    assert [match.group() for text in texts(read(path)) for match in ABSOLUTE_PATH.finditer(text)] == []


@pytest.mark.parametrize(
    "text",
    ["/tmp/a.py:3: UserWarning", 'open("/data/x")', "see file:///home/me/x", "in C:\\Users\\me", "=/usr/bin/env"],
)
def test_a_path_is_seen(text):
    assert ABSOLUTE_PATH.search(text)


@pytest.mark.parametrize(
    "text", ["https://a.org/b/c", "dw/dt/alpha", "docs/figures/a.png", "<b>x</b>/2", "1 / 2", "../a/b"]
)
def test_what_is_no_path_is_not(text):
    assert not ABSOLUTE_PATH.search(text)


# The rest needs the dev extra, which the default run does without.


@pytest.fixture(scope="module")
def nbformat():
    return pytest.importorskip("nbformat")


@pytest.fixture(scope="module")
def run_notebooks():
    return pytest.importorskip("run_notebooks")


@pytest.mark.end_to_end
@each_notebook
def test_notebook_is_valid(path, nbformat):
    nbformat.validate(json.loads(path.read_text(encoding="utf-8")))


@pytest.mark.end_to_end
@pytest.mark.long
@each_notebook
def test_notebook_holds_the_outputs_of_a_run_and_runs_from_top_to_bottom(path, run_notebooks):
    run_notebooks.run(path)


@pytest.fixture
def notebook(tmp_path, nbformat):
    """Write a notebook of code cells as an editor would leave it: not executed, with metadata of its own."""

    def write(*sources):
        nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources])
        nb.cells[0].metadata = {"tags": ["first"], "collapsed": True, "executionInfo": {"elapsed": 3}}
        path = tmp_path / "00_tiny.ipynb"
        nbformat.write(nb, path)
        return path

    return write


@pytest.mark.end_to_end
def test_outputs_are_stored_alike_every_time_and_then_left_alone(notebook, nbformat, run_notebooks):
    path = notebook("print(1)", "import matplotlib.pyplot as plt\nplt.plot([1]);")
    run_notebooks.run(path, write=True)
    stored = path.read_bytes()
    nb = read(path)
    cells = json.loads(stored)["cells"]
    nbformat.validate(json.loads(stored))
    assert [cell["id"] for cell in cells] == ["cell-00", "cell-01"]
    assert [cell["metadata"] for cell in cells] == [{"tags": ["first"]}, {}]
    assert nb["metadata"]["kernelspec"]["name"] == "python3"
    assert [text for text in texts(nb) if ABSOLUTE_PATH.search(text)] == []
    assert nb["cells"][0]["outputs"][0]["text"] == "1\n"
    assert "image/png" in nb["cells"][1]["outputs"][0]["data"]  # though conftest.py sets MPLBACKEND to Agg
    run_notebooks.run(path)
    assert path.read_bytes() == stored
    run_notebooks.run(path, write=True)
    assert path.read_bytes() == stored


@pytest.mark.end_to_end
def test_a_notebook_without_outputs_is_refused(notebook, run_notebooks):
    with pytest.raises(SystemExit, match=r"must hold the outputs of a run without errors.*--write"):
        run_notebooks.run(notebook("1 + 1"))


@pytest.mark.end_to_end
def test_an_error_tells_the_cell_and_the_traceback_and_stores_nothing(notebook, run_notebooks):
    path = notebook("good = 1", 'raise ValueError(f"not {good}")')
    before = path.read_bytes()
    with pytest.raises(SystemExit, match=r'(?s)tiny\.ipynb: .*raise ValueError\(f"not .*Traceback.*ValueError: not 1'):
        run_notebooks.run(path, write=True)
    assert path.read_bytes() == before


@pytest.mark.end_to_end
def test_a_cell_that_takes_too_long_is_told(notebook, run_notebooks):
    with pytest.raises(SystemExit, match=r"(?s)timed out.*after 1 seconds.*sleep\(60\)"):
        run_notebooks.run(notebook("import time\ntime.sleep(60)"), timeout=1, write=True)
