"""All figures: the list, their settings of every size, and every bad request."""

import ast
import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest
import xarray

from lazyjax.experiments import (
    deep_precision,
    fig1ab_fig6_trajectories,
    fig1c_student_scale,
    fig2a_student_width,
    fig2b_population_descent,
    fig3a_fig7a_deep_scale,
    fig3b_deep_wide,
    fig4_limit_kernel,
    fig7b_deep_spectrum,
    figure,
    kappa_width,
    lazy_rates,
    sparse_regression,
)
from lazyjax.experiments.figure import FIGURES, Figure, find, plain, record, same_settings, settings_of

INF = float("inf")


def test_every_figure_of_a_file_is_in_the_list():
    made = set()
    for path in Path(figure.__file__).parent.glob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            targets = node.targets if isinstance(node, ast.Assign) else []
            names = [t.id for t in targets if isinstance(t, ast.Name)]
            made |= {f"{path.stem}.{name}" for name in names if name.startswith("FIGURE")}
    assert made == set(FIGURES.values())


def test_every_figure_has_settings_of_each_size():
    for name in FIGURES:
        one = find(name)
        assert isinstance(one, Figure)
        assert list(one.presets) == ["small", "default", "gpu" if one.images else "paper"]
        for size, preset in one.presets.items():
            assert settings_of(name, size) == preset
        if one.same_run_as is not None:
            assert find(one.same_run_as).same_run_as == name
            assert find(one.same_run_as).run is one.run


def test_gpu_sizes_are_the_papers():
    fig3a, fig3b, fig7b = (settings_of(name, "gpu") for name in ("fig3a", "fig3b", "fig7b"))
    assert (fig3a.data, fig3a.width, fig3a.train, fig3a.epochs, fig3a.batch) == ("cifar10", 1.0, 0, 70, 128)
    assert fig3a.alphas == (*(10.0**k for k in range(8)), INF)
    assert (fig3b.widths, fig3b.gains, fig3b.batch, fig3b.lazy_alpha) == ((8.0, 7.0), (1.3, 1.2), 8, 1e7)
    assert 10 * fig7b.train == 5000
    assert settings_of("fig3a", "default").train == 4000


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (("fig1",), "no figure 'fig1' among fig1a, .*did you mean fig1"),
        (("Figure2b",), "did you mean fig2b"),
        (("nothing",), "choose one of these"),
        (("fig1c", "huge"), "size must be one of small, default, paper for fig1c, got 'huge'"),
        (("fig1c", "small", {"tau": 1.0}), "fig1c has no setting 'tau'; it has d, n, width, taus"),
        (("fig2b", "small", {"factor": 2.0}), "fig2b has no setting 'factor'"),
        (("fig1c", "small", {"steps": "many"}), "steps must be of type int as 400 is, got 'many'"),
    ],
)
def test_bad_requests_are_refused(arguments, match):
    with pytest.raises(ValueError, match=match):
        settings_of(*arguments)


def test_changes_take_the_type_of_the_setting():
    settings = settings_of("fig1c", "small", {"taus": [1, 2], "step": 1, "seeds": 5})
    assert (settings.taus, settings.step, settings.seeds) == ((1.0, 2.0), 1.0, 5)
    assert isinstance(settings.step, float)


def test_a_dataset_has_all_settings_and_versions():
    @dataclasses.dataclass(frozen=True)
    class Settings:
        widths: tuple = (1, 2)
        shown: tuple = ()
        flag: bool = True
        name: str = "x"

    data = record(xarray.Dataset(), Settings(), 5, variant="ours", missing=None)
    assert data.attrs["setting_widths"] == [1, 2]
    assert (data.attrs["setting_shown"], data.attrs["setting_flag"], data.attrs["missing"]) == ("()", 1, "None")
    assert data.attrs["seed"] == 5
    assert {"version_jax", "version_lazyjax", "variant"} <= set(data.attrs)
    assert same_settings(data, Settings())
    assert not same_settings(data, Settings(name="y"))
    assert same_settings(data, Settings(name="y", widths=(3,)), "name", "widths")
    assert plain(2.0) == 2.0


STUDENT, WIDTH, POPULATION = fig1c_student_scale, fig2a_student_width, fig2b_population_descent
DEEP, WIDE = fig3a_fig7a_deep_scale, fig3b_deep_wide


@pytest.mark.parametrize(
    ("file", "change", "match"),
    [
        (STUDENT, {"taus": (0.0, 1.0)}, r"taus must be different positive finite numbers, got \(0.0"),
        (STUDENT, {"taus": ()}, "taus must be different positive finite numbers"),
        (STUDENT, {"width": 7}, "width must be even for a symmetrized init.*got 7; use 8"),
        (STUDENT, {"steps": 0}, "steps must be a whole number of at least 1, got 0"),
        (STUDENT, {"dtype": "float16"}, 'dtype must be "float32" or "float64"'),
        (fig1ab_fig6_trajectories, {"tau": -1.0}, "tau must be a positive finite number, got -1.0"),
        (fig1ab_fig6_trajectories, {"width": 3}, "width must be even"),
        (fig1ab_fig6_trajectories, {"variant": "mine"}, 'variant must be "paper" or "code", got .mine'),
        (WIDTH, {"widths": (0, 2)}, r"widths must be whole numbers of at least 1, got \(0, 2\)"),
        (WIDTH, {"widths": (2, 2)}, "widths must be different positive finite numbers"),
        (WIDTH, {"dtype": "float16"}, 'dtype must be "float32" or "float64"'),
        (POPULATION, {"dtype": "float16"}, 'dtype must be "float32" or "float64"'),
        (POPULATION, {"taus": (1.0, 0.5)}, r"taus must increase, got \(1.0, 0.5\)"),
        (POPULATION, {"width": 5}, "width must be even"),
        (POPULATION, {"layer_factor": -1.0}, "layer_factor must be a finite number >= 0"),
        (kappa_width, {"widths": (0, 300)}, "widths must be whole numbers of at least 1"),
        (kappa_width, {"fit_from": 1001}, "at least two from fit_from"),
        (lazy_rates, {"alphas": (300.0, 100.0)}, "alphas must increase"),
        (lazy_rates, {"fit_from": 1e4}, "at least two from fit_from"),
        (sparse_regression, {"n": 100}, "n must be below d"),
        (sparse_regression, {"alphas": (2.0, 1.0)}, "alphas must increase"),
        (fig4_limit_kernel, {"d": 1}, "d must be at least 2, .* got 1"),
        (
            fig4_limit_kernel,
            {"widths": (10,)},
            r"widths must be at least two positive numbers, for a rate, got \(10,\)",
        ),
        (fig4_limit_kernel, {"widths": (0, 10)}, r"widths must be at least two positive numbers"),
        (fig4_limit_kernel, {"shown": (11,)}, r"shown must be some of widths .*, got \(11,\)"),
        (fig4_limit_kernel, {"num_angles": 1}, r"num_angles must be at least 2 .*, got 1"),
        (fig4_limit_kernel, {"num_shown": 201}, r"num_shown must lie in 1..num_seeds, got 201 of 200"),
        (fig4_limit_kernel, {"num_shown": 0}, r"num_shown must lie in 1..num_seeds, got 0 of 200"),
        (DEEP, {"data": "mnist"}, "no data set 'mnist' among digits, fashion-mnist, cifar10; did you mean"),
        (DEEP, {"network": "vgg"}, "no network 'vgg' among vgg11, resnet18.*; did you mean vgg11"),
        (DEEP, {"alphas": (10.0, 1.0)}, r"alphas must be increasing numbers in \(0, inf\], got \(10"),
        (DEEP, {"alphas": ()}, "alphas must be increasing"),
        (DEEP, {"alphas": (0.0, 1.0)}, "alphas must be increasing"),
        (DEEP, {"momentum": 1.0}, r"momentum must lie in \[0, 1\), got 1\.0"),
        (DEEP, {"decay": -1.0}, "decay must be a finite number >= 0 per epoch, got -1"),
        (DEEP, {"width": 0.0}, "width must be a positive finite number, got 0"),
        (DEEP, {"epochs": 0}, "epochs must be a whole number of at least 1, got 0"),
        (fig7b_deep_spectrum, {"train": 2}, "train must be a whole number of at least 5, got 2"),
        (WIDE, {"gains": (1.0,)}, "networks must be different names with one of widths and gains each"),
        (WIDE, {"networks": ("vgg11", "vgg11")}, "networks must be different names"),
        (WIDE, {"networks": ()}, "networks must be different names"),
        (WIDE, {"widths": (1.0, -1.0)}, r"widths must be positive finite numbers, one per network, got \(1"),
        (WIDE, {"lazy_alpha": 0.0}, r"lazy_alpha must be a scale in \(0, inf\], got 0"),
        (deep_precision, {"alphas": (1.0, INF)}, "alphas must be different positive finite numbers"),
    ],
)
def test_settings_out_of_range_are_refused(file, change, match):
    with pytest.raises(ValueError, match=match):
        file.Settings(**change)


@pytest.mark.parametrize("name", ["fig1a", "fig1c", "fig2a", "fig2b", "precision", "woodworth", "kappa-width", "rates"])
def test_what_needs_float64_is_not_run_in_float32(name):
    with jax.enable_x64(False), pytest.raises(ValueError, match="they need float64"):
        find(name).run(settings_of(name, "small"))


def test_numbers_of_arrays_are_kept_by_netcdf(tmp_path):
    data = record(xarray.Dataset({"a": ("x", np.arange(3.0))}), settings_of("fig4", "small"), 0)
    data.to_netcdf(tmp_path / "a.nc", engine="netcdf4")
    with xarray.open_dataset(tmp_path / "a.nc") as stored:
        assert same_settings(stored, settings_of("fig4", "small"))
        assert not same_settings(stored, settings_of("fig4", "default"))
