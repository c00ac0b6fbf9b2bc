"""`lazyjax reproduce`: the files of a figure, continuing after an interruption, and every bad request."""

import importlib
import re
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest
import xarray

from lazyjax._core.files import DamagedWarning
from lazyjax._core.lock import in_use
from lazyjax.cli import command as cli
from lazyjax.cli import reproduce
from lazyjax.cli.reproduce import describe_run
from lazyjax.experiments.figure import FIGURES, Number, settings_of

ROOT = Path(__file__).parents[2]

TINY = ["n=10", "d=5", "width=4", "taus=0.2,2", "seeds=3", "steps=20", "frames=3", "lazy_from=100"]
ARGUMENTS = ["reproduce", "fig1c", "--size", "small", "--no-cache", "--set", *TINY]


@pytest.mark.end_to_end
@pytest.mark.standard_promotion  # as the command line runs
class TestFigure:
    def test_an_interrupted_figure_continues_and_writes_its_files(self, tmp_path, monkeypatch, capsys):
        folder, swept = tmp_path / "out", importlib.import_module("lazyjax.report.sweep")
        program, calls = swept._call, []

        def killed(*arguments):
            if len(calls) == 2:
                raise KeyboardInterrupt
            calls.append(None)
            return program(*arguments)

        monkeypatch.setattr(swept, "_call", killed)
        with pytest.raises(SystemExit) as stopped:
            cli.main([*ARGUMENTS, "--out", str(folder)])
        assert stopped.value.code == 130
        assert "interrupted, the same command continues where it stopped" in capsys.readouterr().err
        assert not (folder / "fig1c.nc").exists()
        with pytest.raises(SystemExit):
            cli.main([*ARGUMENTS, "seeds=2", "--out", str(folder)])
        message = capsys.readouterr().err
        assert ".fig1c-partial holds another interrupted run (seeds 3 there and 2 here); nothing was changed" in message
        calls.clear()
        monkeypatch.setattr(swept, "_call", lambda *arguments: calls.append(None) or program(*arguments))
        cli.main([*ARGUMENTS, "--out", str(folder)])
        assert len(calls) == 1  # the third seed
        assert {path.name for path in folder.iterdir()} == {"fig1c.png", "fig1c.svg", "fig1c.nc"}
        printed = capsys.readouterr()
        assert "final loss x 1000, tangent model" in printed.out
        assert "reference" in printed.out
        assert "3/3" in printed.err
        with xarray.open_dataset(folder / "fig1c.nc") as data:
            assert data.attrs["size"] == "small"
            assert data.attrs["figure"] == "fig1c"
            assert data.attrs["setting_width"] == 4
            assert data.sizes["seed"] == 3
        before = (folder / "fig1c.nc").read_bytes()
        with pytest.raises(SystemExit):
            cli.main([*ARGUMENTS, "seeds=2", "--out", str(folder)])
        assert (
            "fig1c.nc holds another figure (seeds 3 there and 2 here); nothing was overwritten"
            in capsys.readouterr().err
        )
        assert (folder / "fig1c.nc").read_bytes() == before


def test_list_names_every_figure(capsys):
    cli.main(["reproduce", "list"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(FIGURES)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fig1"], "there is no figure 'fig1' among fig1a"),
        (["woodwort"], "did you mean woodworth?"),
        (["fig1c", "--set", "taus=0,1"], "taus must be different positive finite numbers, got (0.0, 1.0)"),
        (["fig1c", "--set", "width=3"], "width must be even for a symmetrized init"),
        (["fig1a", "--set", "tau=-1"], "tau must be a positive finite number, got -1.0"),
        (["fig1c", "--set", "taus"], "--set takes NAME=VALUE"),
        (["fig1c", "--set", f"taus={'-' * 9999}1"], "taus must be of type float"),
        (["fig1c", "--set", "seeds=2", "--set", "width=4"], "--set must be there once, with all changes after it"),
        (["fig1c", "--set", "color=red"], "fig1c has no setting 'color'"),
        (["fig1c", "--seed", "-1"], "--seed must lie in 0..2^31 - 1, got -1"),
    ],
)
def test_bad_requests_get_one_line_and_nothing_is_written(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["reproduce", *arguments, "--out", str(tmp_path / "out")])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_figures_of_data_in_different_folders_are_different(tmp_path):
    settings = settings_of("fig3a")
    here, there, without = (
        describe_run(cli.Reproduce("fig7a", data_dir=folder), settings, "fig3a")
        for folder in (tmp_path / "a", tmp_path / "b", None)
    )
    assert here != there
    assert without not in (here, there)
    assert here == describe_run(cli.Reproduce("fig3a", data_dir=tmp_path / "b" / ".." / "a"), settings)


def test_a_file_where_the_folder_should_be_is_refused(tmp_path, capsys):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(SystemExit):
        cli.main(["reproduce", "fig1c", "--out", str(tmp_path / "out")])
    assert "must be a folder, but is a file" in capsys.readouterr().err


def test_a_file_that_is_no_dataset_is_not_overwritten(tmp_path, capsys):
    (tmp_path / "fig1c.nc").write_text("mine")
    with pytest.raises(SystemExit):
        cli.main(["reproduce", "fig1c", "--out", str(tmp_path)])
    assert "fig1c.nc must be a figure of lazyjax, but cannot be read ([Errno" in capsys.readouterr().err
    assert jax.config.jax_enable_x64


@pytest.mark.end_to_end
def test_an_attempt_that_fails_before_it_has_a_part_leaves_nothing(tmp_path, capsys):
    too_long = ["reproduce", "fig1a", "--size", "small", "--no-cache", "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit):
        cli.main([*too_long, "--set", "steps=40", "step=50.0", "flow_steps=16"])
    assert "gradient descent diverged" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_only_finished_parts_bind_the_next_run(tmp_path):
    options = cli.Reproduce("fig1a", size="small", out=tmp_path / "out", set=("steps=41",))
    options.kept.mkdir(parents=True)
    (options.kept / "configuration.json").write_text(describe_run(options, settings_of("fig1a", "small")))
    assert cli.choose_settings(options).steps == 41
    (options.kept / "lanes-000000.npz").write_text("a part")
    with pytest.raises(ValueError, match=r"holds another interrupted run \(steps .* there and 41 here\)"):
        cli.choose_settings(options)


def test_a_configuration_that_was_cut_off_keeps_the_parts(tmp_path):
    """They tell by themselves what they are of."""
    options = cli.Reproduce("fig1a", size="small", out=tmp_path / "out")
    (options.kept / "flow").mkdir(parents=True)
    (options.kept / "configuration.json").write_text('{"figure": "fig')
    (options.kept / "flow" / "lanes-000000.npz").write_text("a part")
    with pytest.warns(DamagedWarning, match="configuration.json is damaged"):
        cli.choose_settings(options)
    assert (options.kept / "flow" / "lanes-000000.npz").exists()


def test_a_figure_that_another_process_is_making_is_refused(tmp_path, capsys):
    with in_use(tmp_path, ".fig1c.lock"), pytest.raises(SystemExit) as stopped:
        cli.main([*ARGUMENTS, "--out", str(tmp_path)])
    assert stopped.value.code == 2
    assert "is in use by process" in capsys.readouterr().err


def test_the_run_of_another_figure_is_shared_only_if_it_is_as_it_was_written(tmp_path):
    settings = settings_of("fig1a", "small")
    options = cli.Reproduce("fig6b", size="small", out=tmp_path)
    data = xarray.Dataset({"loss": ("step", [1.0, float("nan"), float("inf")]), "failed": ("step", [True] * 3)})
    data = data.assign_attrs(configuration=describe_run(options, settings, "fig1a"))
    path = tmp_path / "fig1a.nc"
    assert reproduce._shared_run(options, settings, "fig1a") is None
    cli._write(tmp_path, {"fig1a.nc": data}, {})
    xarray.testing.assert_identical(reproduce._shared_run(options, settings, "fig1a"), data)
    assert reproduce._shared_run(options, settings_of("fig1a", "small", {"steps": 7}), "fig1a") is None
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"\xf0\x3f", b"\xe0\x3f"))
    with pytest.warns(DamagedWarning, match=r"fig1a.nc is damaged \(its checksum .*\): its run is computed again"):
        assert reproduce._shared_run(options, settings, "fig1a") is None
    path.write_bytes(whole[:500])
    with pytest.warns(DamagedWarning, match=r"fig1a.nc has no checksum: its run is computed again"):
        assert reproduce._shared_run(options, settings, "fig1a") is None


def test_a_damaged_figure_is_not_overwritten(tmp_path):
    settings = settings_of("fig1a", "small")
    options = cli.Reproduce("fig1a", size="small", out=tmp_path)
    data = xarray.Dataset({"loss": ("step", [1.0, 2.0])}).assign_attrs(configuration=describe_run(options, settings))
    cli._write(tmp_path, {"fig1a.nc": data}, {})
    cli.choose_settings(options)
    raw = (tmp_path / "fig1a.nc").read_bytes()
    (tmp_path / "fig1a.nc").write_bytes(raw[:50] + b"?" + raw[51:])
    with pytest.raises(ValueError, match=r"fig1a.nc must be a figure .* cannot be read \(its checksum is another one"):
        cli.choose_settings(options)


def test_the_numbers_of_a_figure_stand_next_to_their_references(monkeypatch):
    numbers = [Number("slope of the gap", -1.0, -1.0), Number("loss", 0.25, None, "no reference")]
    figure = SimpleNamespace(title="a figure", numbers=lambda data: numbers)
    monkeypatch.setattr(reproduce, "find", lambda name: figure)
    assert reproduce.render_numbers(cli.Reproduce("fig1c"), xarray.Dataset()).splitlines() == [
        "fig1c: a figure",
        "                  here  reference",
        "slope of the gap    -1         -1",
        "loss              0.25             no reference",
    ]


@pytest.mark.parametrize("path", sorted(ROOT.glob("docs/figures/*.nc")), ids=lambda path: path.stem)
def test_committed_figures_are_what_their_command_makes_today(path):
    """`scripts/readme_figures.sh` has the default sizes."""
    options = cli.Reproduce(path.stem)
    with xarray.open_dataset(path) as data:
        assert data.attrs["configuration"] == describe_run(options, settings_of(path.stem))


def test_the_accuracies_of_the_readme_are_those_of_its_figure():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    with xarray.open_dataset(ROOT / "docs/figures/fig3a.nc") as data:
        last = 100 * data["test_accuracy"].isel(epoch=-1)
        mean, spread = last.mean("seed"), last.std("seed", ddof=1)
        for alpha, name in ((1.0, "1"), (float("inf"), "∞")):
            one = f"{float(mean.sel(alpha=alpha)):.1f} ± {float(spread.sel(alpha=alpha)):.1f} % at α = {name}"
            assert one in text


def test_the_notebooks_show_every_figure():
    shown = {
        name
        for path in sorted(ROOT.glob("notebooks/0[45]*.ipynb"))
        for name in re.findall(r'(?:show|find)\(\\"([\w-]+)\\"', path.read_text(encoding="utf-8"))
    }
    assert shown == set(FIGURES)
