"""The command line: what it writes of a report made by hand, one report end to end, and every refusal."""

import contextlib
import gc
import io
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
import xarray

import lazyjax as lj
from lazyjax import LazinessReport
from lazyjax._core.lock import in_use
from lazyjax.cli import SELDOM
from lazyjax.cli import command as cli
from lazyjax.cli import main as entry
from lazyjax.cli.output import encode_numbers, report_table
from lazyjax.cli.quiet import without_cache_noise
from lazyjax.cli.user_model import Network, default_model, load_model
from lazyjax.data.datasets import DataSet, digits
from lazyjax.report.html import render_html
from reports import make_report

FIGURES = ("scores", "gaps", "drift", "eigenvalues", "curves")
EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The Equinox example on ten images from a file: folder, arguments, output, and the report itself."""
    home = tmp_path_factory.mktemp("cli")
    data = digits(10)
    np.savez(home / "my.npz", x=data.x, y=data.y, x_test=data.x_test[:10], y_test=data.y_test[:10])
    argv = ["report", "--model", f"{EXAMPLES / 'equinox_cnn.py'}:build", "--data", str(home / "my.npz")]
    argv += ["--alphas", "1", "1e4", "--time", "0.1", "--no-cache", "--out", str(home / "deep" / "out")]
    reports, diagnose = [], cli.diagnose
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(cli, "diagnose", lambda *args, **kwargs: reports.append(diagnose(*args, **kwargs)) or reports[0])
        cli.main(argv)
    folder = home / "deep" / "out"
    return SimpleNamespace(folder=folder, argv=argv, out=out.getvalue(), err=err.getvalue(), report=reports[0])


def strict(text):
    """JSON as the standard has it: no NaN, no Infinity."""

    def refuse(name):
        raise ValueError(name)

    return json.loads(text, parse_constant=refuse)


@pytest.mark.end_to_end
@pytest.mark.long  # and at the start no worker takes some of them from another, to make the report once more
class TestReport:
    def test_writes_one_folder_and_nothing_else(self, made):
        names = {str(path.relative_to(made.folder)) for path in made.folder.rglob("*") if path.is_file()}
        figures = {f"figures/{name}.{kind}" for name in FIGURES for kind in ("png", "svg")}
        assert names == {"report.html", "report.json", "sweep.nc", *figures}
        assert (made.folder / "figures" / "gaps.png").read_bytes().startswith(b"\x89PNG")
        assert b"<svg" in (made.folder / "figures" / "gaps.svg").read_bytes()

    def test_prints_the_report_and_where_it_is(self, made):
        assert str(made.report) in made.out
        assert f"wrote {made.folder / 'report.html'}" in made.out

    def test_says_what_it_is_doing(self, made):
        for stage in ("reading the data", "tangent kernel", "scales alpha", "drawing the figures"):
            assert stage in made.err
        assert "3/3" in made.err

    def test_json_is_strict_and_complete(self, made):
        content = strict((made.folder / "report.json").read_text())
        assert content["verdict"] == made.report.verdict
        assert content["slopes"]["output_gap"]["theory"] == -1
        assert content["configuration"]["alphas"] == [1, 1e4, "inf"]
        assert content["configuration"]["time"] == 0.1
        assert set(content["versions"]) >= {"python", "lazyjax", "jax"}
        assert set(content["timings_s"]) == {"input", "diagnose", "figures"}
        assert content["command"].startswith("lazyjax report --model")
        assert content["settings"]["num_train"] == 10

    def test_json_table_has_a_row_a_scale_and_the_tangent_model(self, made):
        table = strict((made.folder / "report.json").read_text())["table"]
        assert [row["alpha"] for row in table] == [1, 1e4, "inf", "tangent"]
        data = made.report.dataset
        assert table[0]["output_gap"] == pytest.approx(float(data["output_gap"][0].max()))
        assert table[1]["test_loss"] == pytest.approx(float(data["test_loss"][1, -1]))
        assert table[0]["failed"] is False
        assert table[-1]["train_loss"] == pytest.approx(float(data["tangent_train_loss"][-1]))

    def test_netcdf_gives_the_dataset_back(self, made):
        with xarray.open_dataset(made.folder / "sweep.nc") as stored:
            stored.load()
        xarray.testing.assert_identical(stored, made.report.dataset)
        assert math.isinf(stored["alpha"][-1])
        assert stored["failed"].dtype == bool
        assert stored["message"].dtype.kind in "UOT"

    def test_html_is_self_contained(self, made):
        page = (made.folder / "report.html").read_text()
        assert "http" not in page
        assert page.count('<img src="data:image/svg+xml;base64,') == len(FIGURES)
        assert page.count("src=") == len(FIGURES)
        assert "<script" not in page
        assert "<link" not in page

    def test_html_tells_what_was_found_and_how(self, made):
        page = (made.folder / "report.html").read_text()
        for text in (
            "How lazily does this model train?",
            "Its tangent kernel changes",
            "What the kernel alone predicts",
            "condition number",
            "equinox_cnn.py:build",
            "lazyjax report",
        ):
            assert text in page
        assert page.count("<tr>") > 10

    def test_json_and_html_have_the_certificate(self, made):
        certificate = made.report.certificate
        there = strict((made.folder / "report.json").read_text())["certificate"]
        assert there["alpha"] == float(certificate.measurements.alpha)
        assert [row["theorem"] for row in there["claims"]] == [claim.theorem for claim in certificate.claims]
        assert {row["assumptions"] for row in there["claims"]} <= {"holds", "unknown", "fails"}
        first, claim = there["claims"][0], certificate.claim("2.2", "displacement_norm")
        assert first["measured"] == np.asarray(claim.measured).tolist()
        assert first["bound"] == np.asarray(claim.bound).tolist()
        assert not any(row["violated"] for row in there["claims"])
        page = (made.folder / "report.html").read_text()
        assert "<h2>The theorems</h2>" in page
        assert page.count("<td>2.3</td>") == 3
        assert "Dh Lipschitz" in page.split("What they assume")[1]

    def test_the_law_of_the_gap_is_seen(self, made):
        first, lazy, *_ = strict((made.folder / "report.json").read_text())["table"]
        # Theorem 2.2: ten thousand times the scale, ten thousandth of the gap.
        assert lazy["output_gap"] < 1e-3 * first["output_gap"]
        assert made.report.notes == ()


def test_without_arguments_it_is_a_small_network_on_digits(monkeypatch, tmp_path):
    called = {}

    def diagnose(f, w0, x, y, **options):
        called.update(options, w0=w0, outputs=eqx.filter_eval_shape(f, w0, x), x=x, y=y)
        raise ValueError("enough")  # noqa: EM101

    monkeypatch.setattr(cli, "diagnose", diagnose)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        cli.main(["report", "--no-cache"])
    assert [layer["weight"].shape for layer in called["w0"]] == [(64, 64), (64, 64), (10, 64)]
    assert called["x"].shape == (256, 64)
    assert called["outputs"].shape == (256, 10)
    assert called["test"][0].shape == (1541, 64)
    assert (called["alphas"][0], called["alphas"][-1], called["loss"]) == (1, math.inf, "square")
    assert called["time"] is None
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def written(tmp_path, monkeypatch):
    """The command line with a report made by hand and no figures: folder and arguments of a first run."""
    data = digits(10)
    np.savez(tmp_path / "my.npz", x=data.x, y=data.y)
    monkeypatch.setattr(cli, "diagnose", lambda *args, **kwargs: make_report())
    monkeypatch.setattr(cli, "report_figures", lambda report: {})
    folder = tmp_path / "deep" / "out"
    argv = ["report", "--data", str(tmp_path / "my.npz"), "--alphas", "1", "1e4", "--time", "0.1"]
    argv += ["--no-cache", "--out", str(folder)]
    cli.main(argv)
    return SimpleNamespace(folder=folder, argv=argv)


def unfinished(written, configuration):
    """Leave what a report that was killed leaves: a part, and what it is of."""
    kept = written.folder / ".report-partial"
    (kept / "scales").mkdir(parents=True)
    (kept / "scales" / "lanes-000000.npz").write_bytes(b"a part")
    (kept / "configuration.json").write_text(json.dumps(configuration))


class TestFolder:
    def test_holds_the_report_as_page_json_and_netcdf(self, written, capsys):
        assert {path.name for path in written.folder.rglob("*")} == {"report.html", "report.json", "sweep.nc"}
        content = strict((written.folder / "report.json").read_text())
        assert content["verdict"] == make_report().verdict
        assert content["slopes"]["output_gap"] == {"value": -1, "first": 1, "last": 100, "points": 3, "theory": -1}
        assert content["configuration"]["alphas"] == [1, 1e4, "inf"]
        assert content["command"].startswith("lazyjax report --data")
        assert set(content["versions"]) >= {"python", "lazyjax", "jax"}
        with xarray.open_dataset(written.folder / "sweep.nc") as stored:
            xarray.testing.assert_identical(stored.load(), make_report().dataset)
        assert math.isinf(stored["alpha"][-1])
        assert stored["failed"].dtype == bool

    def test_of_the_same_configuration_is_accepted_again(self, written):
        before = (written.folder / "sweep.nc").stat().st_mtime_ns
        cli.main(written.argv)
        assert (written.folder / "sweep.nc").stat().st_mtime_ns > before

    @pytest.mark.parametrize("there", [(), ("sweep.nc",), ("sweep.nc", "report.html")])
    def test_of_a_run_that_was_killed_while_it_wrote_is_finished(self, written, there):
        names = {"report.html", "report.json", "sweep.nc"}
        configuration = strict((written.folder / "report.json").read_text())["configuration"]
        unfinished(written, configuration)
        for name in names - set(there):
            (written.folder / name).rename(written.folder / f".{name}.123-abc.partial")
        cli.main(written.argv)
        assert {path.name for path in written.folder.iterdir()} == names

    def test_of_a_killed_run_of_another_configuration_is_refused(self, written, fails):
        configuration = strict((written.folder / "report.json").read_text())["configuration"]
        unfinished(written, configuration | {"seed": 7})
        (written.folder / "report.json").unlink()
        fails(written.argv, r"holds another report \(seed 7 there and 0 here\); nothing was overwritten")

    def test_whose_parts_have_lost_their_configuration_is_finished(self, written, capsys):
        unfinished(written, {})
        (written.folder / ".report-partial" / "configuration.json").write_text('{"seed')
        cli.main(written.argv)
        assert "lazyjax: warning: " in capsys.readouterr().err
        assert not (written.folder / ".report-partial").exists()

    def test_goes_on_with_the_scales_that_are_finished(self, written, monkeypatch):
        """And keeps what is finished whatever happens: here the drawing fails."""
        folders = []
        monkeypatch.setattr(cli, "report_figures", lambda report: 1 / 0)

        def diagnose(*args, folder, **options):
            folders.append(folder)
            (folder / "scales").mkdir(exist_ok=True)
            (folder / "scales" / "lanes-000000.npz").write_bytes(b"finished")
            return make_report()

        monkeypatch.setattr(cli, "diagnose", diagnose)
        with pytest.raises(ZeroDivisionError):
            cli.main(written.argv)
        assert (written.folder / ".report-partial" / "scales" / "lanes-000000.npz").exists()
        monkeypatch.setattr(cli, "report_figures", lambda report: {})
        cli.main(written.argv)
        assert folders == [written.folder / ".report-partial"] * 2
        assert not folders[0].exists()

    def test_that_another_report_is_using_is_refused(self, written, fails):
        with in_use(written.folder):
            fails(written.argv, "is in use by process .* since .*; wait until it ends")

    @pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("NetCDF: HDF error")])
    def test_is_left_as_it_was_if_a_file_cannot_be_written(self, written, monkeypatch, capsys, error):
        def fail(*args, **kwargs):
            raise error

        before = {path.name: path.read_bytes() for path in written.folder.iterdir()}
        monkeypatch.setattr(xarray.Dataset, "to_netcdf", fail)
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            cli.main(written.argv)
        assert end.value.code == 1
        printed = capsys.readouterr()
        assert make_report().verdict[:40] in printed.out  # the results are shown all the same
        line = printed.err.splitlines()[-1]
        what = error.strerror if isinstance(error, OSError) else error
        assert line.startswith(
            f"lazyjax: error: {written.folder / 'sweep.nc'} could not be written ({what}); free some"
        )
        assert {path.name: path.read_bytes() for path in written.folder.iterdir()} == before

    def test_of_another_configuration_is_refused(self, written, fails):
        before = (written.folder / "report.json").read_bytes()
        for options, change in (
            (["--seed", "1"], r"seed 0 there and 1 here\)"),
            (["--alphas", "1"], r"alphas \[1.0, 10000.0, 'inf'\] there and \[1.0, 'inf'\] here"),
            (["--loss", "softmax"], "loss square there and softmax here"),
            (["--time", "2"], "time 0.1 there and 2.0 here"),
        ):
            fails([*written.argv, *options], f"holds another report .*{change}.*nothing was overwritten")
        assert (written.folder / "report.json").read_bytes() == before

    def test_of_other_data_is_refused(self, written, fails, tmp_path):
        np.savez(tmp_path / "my.npz", x=np.ones((10, 64)), y=np.arange(10))
        fails(written.argv, "data own arrays, digest .* here")

    @pytest.mark.parametrize("name", ["notes.txt", "report.json"])
    def test_with_files_of_somebody_else_is_refused(self, fails, tmp_path, name):
        (tmp_path / name).write_text("[1]")
        argv = ["report", "--out", str(tmp_path)]
        fails(argv, "files that are not a lazyjax report, nothing was overwritten")
        assert [path.name for path in tmp_path.iterdir()] == [name]

    def test_that_is_a_file_is_refused(self, fails, tmp_path):
        (tmp_path / "out").write_text("mine")
        fails(["report", "--out", str(tmp_path / "out")], "must be a folder, but is a file")
        fails(["report", "--out", str(tmp_path / "out" / "deeper")], "cannot be written")


def test_the_table_of_the_json_has_a_row_per_scale_and_the_tangent_model():
    report = make_report(failed=0)
    table = report_table(report)
    assert [row["alpha"] for row in table] == [*report.dataset["alpha"].values, "tangent"]
    assert table[1]["output_gap"] == pytest.approx(0.05)
    assert table[1]["test_loss"] == pytest.approx(float(report.dataset["test_loss"][1, -1]))
    assert (table[0]["failed"], table[1]["failed"]) == (True, False)
    assert table[-1]["train_loss"] == pytest.approx(float(report.dataset["tangent_train_loss"][-1]))


def test_the_page_needs_nothing_from_elsewhere():
    page = render_html(make_report(), {"gaps": "data:image/svg+xml;base64,AA=="}, {"command": "lazyjax report"})
    assert "http" not in page
    assert page.count("src=") == 1
    assert "<script" not in page
    assert "<link" not in page
    for text in ("How lazily does this model train?", "Its tangent kernel changes", "lazyjax report", "a note"):
        assert text in page
    assert "$" not in page


@pytest.fixture
def fails(monkeypatch, capsys):
    """Check that a command line ends with code 2 and one line on stderr, before any long work."""

    def check(argv, match, *, early=True):
        if early:
            monkeypatch.setattr(cli, "diagnose", lambda *args, **kwargs: pytest.fail("the long work has begun"))
        with pytest.raises(SystemExit) as exit_info:
            cli.main(argv if "--no-cache" in argv else [*argv, "--no-cache"])
        assert exit_info.value.code == 2
        captured = capsys.readouterr()
        last = captured.err.rstrip("\n").rsplit("\n", 1)[-1]
        assert last.startswith("lazyjax: error: ")
        assert "Traceback" not in captured.err
        with pytest.raises(AssertionError, match=match):
            raise AssertionError(last)

    return check


class TestBadOptions:
    @pytest.mark.parametrize(
        ("options", "match"),
        [
            (["--alphas", "0"], r"alpha must be a scale in \(0, inf\], got 0"),
            (["--alphas", "1", "-3"], r"alpha must be a scale in \(0, inf\], got -3"),
            (["--alphas", "nan"], r"alpha must be a scale in \(0, inf\], got nan"),
            (["--alphas", "1", "ten"], "--alphas must be numbers .* got 'ten'"),
            (["--alphas"], "--alphas must name at least one output scale, got none"),
            (["--time", "0"], "--time must be a finite positive flow time, got 0"),
            (["--time", "inf"], "--time must be a finite positive flow time, got inf"),
            (["--seed", "-1"], "--seed must lie in .* got -1"),
            (["--train", "5"], r"num_train must lie in 10\.\.1787.* got 5"),
            (["--train", "20", "--data", "my.npz"], "with --data all samples of x are used"),
            (["--data", "no.npz"], r"data file no\.npz does not exist"),
            (["--model", "my_net.py"], "--model must be FILE:FUNCTION, .* got 'my_net.py'"),
            (["--model", "my_net.py:"], "--model must be FILE:FUNCTION"),
            (["--model", "my_net.py:build"], r"the file my_net\.py does not exist"),
        ],
    )
    def test_is_refused_in_one_line(self, fails, options, match):
        fails(["report", *options], match)

    def test_an_unreadable_npz_is_refused(self, fails, tmp_path):
        (tmp_path / "my.npz").write_text("x, y")
        fails(["report", "--data", str(tmp_path / "my.npz")], r"must be a \.npz file of plain numeric arrays")

    def test_a_file_for_the_cache_is_refused(self, tmp_path, capsys):
        (tmp_path / "file").write_text("mine")
        with pytest.raises(SystemExit) as end:
            cli.main(["report", "--cache", str(tmp_path / "file"), "--out", str(tmp_path / "out")])
        assert end.value.code == 2
        assert "must be a folder, but is a file" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("word", "hint"),
        [
            ("reprot", "did you mean report?"),
            ("Verify", "did you mean verify?"),
            ("reproduces", "did you mean reproduce?"),
            ("nonsense", "choose one of these."),
        ],
    )
    def test_a_word_that_is_no_command_is_answered_with_the_nearest_one(self, word, hint, capsys):
        with pytest.raises(SystemExit) as end:
            cli.main([word, "--seed", "0"])
        assert end.value.code == 2
        line = f"lazyjax: error: there is no command '{word}' among report, verify, reproduce, info; {hint}\n"
        assert capsys.readouterr().err == line

    @pytest.mark.parametrize("argv", [["report", "--loss", "hinge"], ["report", "--no-such"], ["nonsense"], []])
    def test_what_the_parser_refuses_also_ends_with_code_2(self, argv, capsys):
        with pytest.raises(SystemExit) as exit_info:
            cli.main(argv)
        assert exit_info.value.code == 2
        assert capsys.readouterr().err


class TestModelFile:
    @pytest.fixture
    def write(self, tmp_path):
        def write(code, name="my_net.py"):
            (tmp_path / name).write_text(code)
            return str(tmp_path / name)

        return write

    @pytest.mark.parametrize(
        ("code", "match"),
        [
            ("def build(key:", r"importing .* failed with SyntaxError.*line 1 of my_net\.py"),
            ("x = 1\nimport no_such_module", r"ModuleNotFoundError: No module .*\(line 2 of my_net\.py\)"),
            ("raise SystemExit(3)", "failed with SystemExit: 3"),
            ("def make(key): ...", r"no function 'build' \(it has: make\)"),
            ("def build(key):\n    raise SystemExit(3)", r"build\(key\) failed with SystemExit: 3 \(line 2 of my_net"),
            ("build = 3", r"no function 'build' \(it has: none\)"),
            ("def build(key):\n    return 1 / 0", r"build\(key\) failed with ZeroDivisionError: .*\(line 2 of my_net"),
            ("def build(): ...", r"build\(key\) failed with TypeError"),
            ("def build(key): ...", r"must return \(f, params\) .* got NoneType\."),
            ("def build(key): return (1, 2, 3)", "got tuple of length 3"),
            ("def build(key): return (1, 2)", "got tuple of length 2"),
            (
                "import jax.numpy as jnp\ndef build(key):\n    return lambda w, x: x @ w, jnp.ones((3, 10))",
                r"f\(params, x\) failed on x of shape \(256, 64\) with TypeError.*\(line 3 of my_net\.py\)",
            ),
        ],
    )
    def test_that_does_not_work_is_refused(self, fails, write, code, match):
        fails(["report", "--model", write(code) + ":build"], match)

    def test_that_is_not_python_is_refused(self, fails, write):
        fails(["report", "--model", write("", "my_net.txt") + ":build"], "is not a Python file")

    @pytest.mark.parametrize(
        ("code", "match"),
        [
            (
                "return lambda w, x: x @ w, jnp.zeros((64, 10), int)",
                "params must hold at least one real floating array",
            ),
            ("return lambda w, x: (x @ w).real, jnp.zeros((64, 10), complex)", "params must have real floating leaves"),
            ("return lambda w, x: x @ w, jnp.full((64, 10), jnp.nan)", "params must be finite, but 640 of its 640"),
            ("return lambda w, x: x @ w, jnp.zeros((64, 4))", r"labels must lie in 0\.\.3 .* got 0\.\.9"),
            (
                "return lambda w, x: (x @ w)[:5], jnp.zeros((64, 10))",
                "one row of outputs per sample, got 5 rows for 10",
            ),
            ("return lambda w, x: x @ jnp.sqrt(w), jnp.zeros((64, 10))", "(NaN|finite)"),
        ],
    )
    def test_whose_model_is_no_model_is_refused_by_the_library(self, fails, write, tmp_path, code, match):
        path = write(f"import jax.numpy as jnp\ndef build(key):\n    {code}")
        argv = ["report", "--train", "10", "--out", str(tmp_path / "out"), "--model", path + ":build"]
        fails(argv, match, early=False)
        assert not (tmp_path / "out").exists()

    def test_may_import_its_neighbors(self, write):
        write("SIZE = 7", "lazyjax_test_neighbor.py")
        path = write("import lazyjax_test_neighbor as n\ndef build(key): return (lambda w, x: x), n.SIZE")
        before = list(sys.path)
        assert load_model(path + ":build", jr.key(0))[1] == 7
        assert sys.path == before


class TestDefaultModel:
    @pytest.mark.parametrize(
        ("y", "y_test", "loss", "shape"),
        [
            (np.array([0, 2, 1]), None, "square", (3, 3)),
            (np.array([0, 2, 1]), np.array([2, 0, 0]), "softmax", (3, 3)),
            (np.array([0, 1, 1]), None, "logistic", (3,)),
            (np.array([-1, 1, 1]), None, "square", (3,)),
            (np.array([0, 0, 0]), None, "square", (3,)),
            (np.array([0.5, 1.0, 2.0]), None, "square", (3,)),
            (np.ones((3, 2)), None, "square", (3, 2)),
        ],
    )
    def test_has_an_output_a_class_or_target(self, y, y_test, loss, shape):
        x = jnp.asarray(np.ones((3, 2, 2)))
        data = DataSet(
            x, jnp.asarray(y), None if y_test is None else x, None if y_test is None else jnp.asarray(y_test)
        )
        f, w0 = default_model(jr.key(0), data, loss)
        assert eqx.filter_eval_shape(f, w0, data.x).shape == shape
        assert isinstance(f, Network)
        hidden = eqx.filter_eval_shape(f.preactivations, w0, data.x)
        assert [z.shape for z in hidden] == [(3, 64), (3, 64)]

    def test_refuses_counts_as_classes(self):
        with pytest.raises(ValueError, match="go up to 900 for 3 samples; save them as floats"):
            default_model(jr.key(0), DataSet(jnp.asarray(np.ones((3, 2))), jnp.asarray([1, 900, 3])), "square")


class TestMachine:
    def test_info_prints_versions_devices_and_precision(self, capsys):
        cli.main(["info"])
        printed = capsys.readouterr().out
        for text in ("lazyjax    0.", f"jax        {jax.__version__}", "cpu", "float64 (x64 on)", "cache"):
            assert text in printed

    def test_garbage_is_looked_for_seldom_while_the_command_runs(self, monkeypatch):
        before, during = gc.get_threshold(), []
        monkeypatch.setenv("EQX_ON_ERROR", "nan")
        monkeypatch.setattr(cli, "main", lambda argv: during.append((argv, gc.get_threshold())))
        gc.set_threshold(700, 10, 10)
        try:
            entry(["info"])
            assert gc.get_threshold() == (700, 10, 10)
        finally:
            gc.set_threshold(*before)
        assert during == [(["info"], SELDOM)]

    def test_the_version_is_told(self, capsys):
        cli.main(["--version"])
        assert capsys.readouterr().out == f"lazyjax {lj.__version__}\n"

    def test_help_explains_the_options(self, capsys):
        with pytest.raises(SystemExit) as exit_info:
            cli.main(["report", "--help"])
        assert exit_info.value.code == 0
        printed = capsys.readouterr().out
        for option in ("--model", "--data", "--alphas", "--loss", "--time", "--seed", "--x64", "--out", "--cache"):
            assert option in printed

    def test_x64_and_cache_are_set_in_jax(self, monkeypatch, tmp_path):
        settings = {}
        monkeypatch.setattr(cli.jax, "config", SimpleNamespace(update=settings.__setitem__))
        cli._configure(cli.Report(x64=True, cache=tmp_path / "new"))
        assert settings["jax_enable_x64"] is True
        assert settings["jax_compilation_cache_dir"] == str(tmp_path / "new")
        assert (tmp_path / "new").is_dir()

    def test_without_them_jax_is_left_alone(self, monkeypatch):
        monkeypatch.setattr(cli.jax, "config", SimpleNamespace(update=lambda *_: pytest.fail("changed")))
        cli._configure(cli.Report(no_cache=True))

    @pytest.mark.parametrize(
        ("platform", "variable", "expected"),
        [
            ("linux", "XDG_CACHE_HOME", "/somewhere/lazyjax"),
            ("linux", None, ".cache/lazyjax"),
            ("darwin", None, "Library/Caches/lazyjax"),
            ("win32", "LOCALAPPDATA", "/somewhere/lazyjax"),
        ],
    )
    def test_the_cache_lies_where_the_platform_has_caches(self, monkeypatch, platform, variable, expected):
        monkeypatch.setattr(sys, "platform", platform)
        for name in ("XDG_CACHE_HOME", "LOCALAPPDATA"):
            monkeypatch.delenv(name, raising=False)
        if variable:
            monkeypatch.setenv(variable, "/somewhere")
        assert cli.default_cache().as_posix().endswith(expected)


def test_only_the_false_alarms_of_the_cache_are_dropped(monkeypatch, capfd):
    with open(2, "w", closefd=False) as stderr:
        monkeypatch.setattr(sys, "stderr", stderr)
        with without_cache_noise():
            os.write(2, b"E1123 cpu_aot_loader.cc:195] Loading XLA:CPU AOT result. +prefer-no-gather\nkeep this\n")
            print("and this", file=sys.stderr)
        assert sys.stderr is stderr
        os.write(2, b"and what follows\n")
    err = capfd.readouterr().err
    assert "cpu_aot_loader" not in err
    for text in ("keep this", "and this", "and what follows"):
        assert text in err


NOISY = """
import os, sys
import lazyjax.cli
from lazyjax.cli import command
def noisy(options, text):
    for _ in range(100):
        os.write(2, b"E1123 cpu_aot_loader.cc:195] could lead to SIGILL\\n")
    os.write(2, b"E1123 another.cc:1] a real error\\n")
    print("lazyjax: our own", file=sys.stderr)
command.run = noisy
sys.argv[1:] = [sys.argv[1]]
lazyjax.cli.run()
"""


@pytest.mark.parametrize("name", ["info", "verify"])
def test_the_false_alarms_of_the_cache_are_dropped_in_every_command_from_begin_to_end(name):
    command = [sys.executable, "-c", NOISY, name]
    ended = subprocess.run(command, capture_output=True, text=True, check=True)
    assert sorted(ended.stderr.splitlines()) == ["E1123 another.cc:1] a real error", "lazyjax: our own"]


def test_html_escapes_everything():
    hand = make_report()
    report = LazinessReport(hand.dataset, hand.slopes, "<b>1 & 2</b>", ("<script>",))
    page = render_html(report, {"mine": 'x" onerror="y'}, {"command": ["a<b", 0.123456, {"k": "<i>"}, None]})
    assert "&lt;b&gt;1 &amp; 2&lt;/b&gt;" in page
    assert "<script>" not in page
    assert 'x&quot; onerror=&quot;y"' in page
    assert "a&lt;b, 0.1235, k &lt;i&gt;, not given" in page


def test_json_values_are_plain():
    value = {"a": [np.float32(1.5), np.nan, -math.inf], 2: (np.int64(3), np.bool_(True), None, "x")}
    assert encode_numbers(value) == {"a": [1.5, "nan", "-inf"], "2": [3, True, None, "x"]}


def raise_as_a_flow_does():
    eqx.filter_jit(lambda x: eqx.error_if(x, x > 0, "too few steps"))(jnp.ones(()))


def interrupt():
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("stop", "code", "line"),
    [
        (raise_as_a_flow_does, 1, "lazyjax: error: too few steps"),
        (interrupt, 130, "lazyjax: interrupted, nothing written"),
    ],
)
def test_a_failed_flow_and_an_interrupt_are_one_line(stop, code, line, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(cli, "diagnose", lambda *args, **kwargs: stop())
    with pytest.raises(SystemExit) as exit_info:
        cli.main(["report", "--train", "20", "--out", str(tmp_path / "out"), "--no-cache"])
    assert exit_info.value.code == code
    assert capsys.readouterr().err.strip().splitlines()[-1] == line
    assert not (tmp_path / "out" / "report.json").exists()
