"""Sweeps: labels, chunks, one program, failed lanes, refusals."""

import importlib
import math
import shutil

import diffrax
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
import xarray
from diffrax import RESULTS

import lazyjax as lj
import problems
from helpers import relative_error
from lazyjax._core.files import DamagedWarning
from lazyjax._core.lock import in_use

sweep_module = importlib.import_module("lazyjax.report.sweep")  # the package's attribute of that name is the function

OVER = {"alpha": [1.0, 2.0, 4.0], "seed": [0, 1]}


def run(alpha, seed, offset=0.0):
    draw = jr.normal(jr.key(seed), (5,))
    return {"value": alpha * draw + offset, "seed_twice": 2 * seed}


def test_a_sweep_is_the_loop_over_its_points():
    table = lj.sweep(run, over=OVER, dims={"value": ("entry",)}, coords={"entry": np.arange(5) / 10})
    assert table["value"].dims == ("alpha", "seed", "entry")
    for alpha in OVER["alpha"]:
        for seed in OVER["seed"]:
            np.testing.assert_allclose(table["value"].sel(alpha=alpha, seed=seed), run(alpha, seed)["value"])
    assert table["seed_twice"].sel(alpha=1.0, seed=1).item() == 2
    assert not table["failed"].any()
    np.testing.assert_allclose(table["entry"], np.arange(5) / 10)


def test_chunks_that_fit_memory_are_one_program_and_change_nothing():
    traces = []

    def heavy(alpha, seed):
        traces.append(None)
        big = alpha * jr.normal(jr.key(seed), (400, 400))
        return {"top": jnp.linalg.norm(big @ big, axis=0)}

    whole = lj.sweep(heavy, over=OVER)
    assert len(traces) == 1
    lane = 400 * 400 * 8
    traces.clear()
    # Room for about two lanes: one try with all six, then one program for every chunk.
    parts = lj.sweep(heavy, over=OVER, memory=7 * lane)
    assert len(traces) == 2
    np.testing.assert_allclose(parts["top"], whole["top"], rtol=1e-12)


def test_the_last_chunk_is_filled_up_and_cut_off_again():
    whole = lj.sweep(lambda a: {"y": a**2}, over={"a": [1.0, 2.0, 3.0, 4.0, 5.0]}, memory=1)
    np.testing.assert_allclose(whole["y"], [1.0, 4.0, 9.0, 16.0, 25.0])


def test_shared_arrays_are_arguments_not_constants():
    kinds = []

    def one(a, data, name):
        kinds.append([isinstance(leaf, jax.core.Tracer) for leaf in data])
        return {"y": a * (jnp.sum(data[0]) + jnp.sum(data[1])) + len(name)}

    table = lj.sweep(one, over={"a": [1.0, 2.0]}, shared={"data": [jnp.ones(3), np.ones(2)], "name": "x"})
    np.testing.assert_allclose(table["y"], [6.0, 11.0])
    assert kinds == [[True, True]]


def test_flows_over_alpha_and_targets_are_single_flows():
    problem, ts = problems.centered(), jnp.asarray([0.0, 1.0])
    targets = jnp.asarray(np.stack([problem.target, -np.asarray(problem.target)]))
    solver = diffrax.Tsit5()

    def one(alpha, task):
        loss = lj.square_loss(targets[task])
        flow = lj.gradient_flow(problem.h, loss, problem.w0, ts, alpha=alpha, solver=solver, throw=False)
        return {"outputs": flow.outputs, "result": flow.result}

    table = lj.sweep(one, over={"alpha": [1.0, 1e5, jnp.inf], "task": [0, 1]}, dims={"outputs": ("time", "sample")})
    single = lj.gradient_flow(problem.h, lj.square_loss(targets[1]), problem.w0, ts, alpha=1e5, solver=solver)
    assert relative_error(table["outputs"].sel(alpha=1e5, task=1), single.outputs) < 1e-12
    assert "result" not in table


def test_failed_lanes_are_marked_and_kept_apart():
    def one(a):
        bad = jnp.where(a == 2.0, jnp.nan, a)
        stopped = RESULTS.where(a == 3.0, RESULTS.max_steps_reached, RESULTS.successful)
        return {"y": jnp.stack([a, bad]), "count": jnp.asarray(7), "result": stopped}

    table = lj.sweep(one, over={"a": [1.0, 2.0, 3.0]}, dims={"y": ("part",)})
    np.testing.assert_array_equal(table["failed"], [False, True, True])
    np.testing.assert_array_equal(table["y"], [[1.0, 1.0], [np.nan, np.nan], [np.nan, np.nan]])
    np.testing.assert_array_equal(table["y_failed"], [[np.nan, np.nan], [2.0, np.nan], [3.0, 3.0]])
    messages = [str(m) for m in table["message"].values]
    assert messages[0] == ""
    assert messages[1] == "y is not finite"
    assert "maximum number of solver steps" in messages[2]
    np.testing.assert_array_equal(table["count"], 7)


def test_progress_counts_the_lanes(capfd):
    lj.sweep(lambda a: {"y": a}, over={"a": [1.0, 2.0, 3.0]}, progress=True)
    assert "3/3" in capfd.readouterr().err


def test_a_chunk_of_a_given_size_is_one_program():
    traces = []

    def one(a):
        traces.append(None)
        return {"y": a**2}

    table = lj.sweep(one, over={"a": [1.0, 2.0, 3.0]}, chunk=2)
    np.testing.assert_allclose(table["y"], [1.0, 4.0, 9.0])
    assert len(traces) == 1
    with pytest.raises(ValueError, match="chunk must be at least 1 lane, got 0"):
        lj.sweep(one, over={"a": [1.0]}, chunk=0)


def counted(ran):
    """A run that tells the host of each lane, one of which fails."""

    def one(a):
        jax.debug.callback(lambda a: ran.append(float(a)), a)
        result = RESULTS.where(a == 3.0, RESULTS.max_steps_reached, RESULTS.successful)
        return {"y": jnp.stack([a, a**2]), "result": result}

    return one


AXIS = {"a": [1.0, 2.0, 3.0, 4.0, 5.0]}


def test_an_interrupted_sweep_goes_on_where_it_stopped(tmp_path, monkeypatch):
    whole = lj.sweep(counted([]), over=AXIS)
    folder = tmp_path / "deep" / "kept"
    ran, program = [], sweep_module._call

    def killed(*arguments):
        if len(ran) == 2:
            raise KeyboardInterrupt
        ran.append(None)
        return program(*arguments)

    monkeypatch.setattr(sweep_module, "_call", killed)
    with pytest.raises(KeyboardInterrupt):
        lj.sweep(counted([]), over=AXIS, chunk=2, folder=folder)
    monkeypatch.undo()
    # Half-written, as by a full disk: it does not count.
    (folder / ".lanes-000004.npz.partial").write_bytes(b"PK")
    lanes = []
    again = lj.sweep(counted(lanes), over=AXIS, chunk=2, folder=folder)
    jax.effects_barrier()
    assert lanes == [5.0, 5.0]  # the last chunk, filled up
    xarray.testing.assert_identical(again, whole)
    assert again["message"].values[2] != ""
    lanes.clear()
    xarray.testing.assert_identical(lj.sweep(counted(lanes), over=AXIS, chunk=2, folder=folder), whole)
    assert lanes == []


def plus(a, b=0.0, c=0.0, way=jnp.add):
    return {"y": way(a, jnp.sum(b) + c)}


def minus(a, b=0.0, c=0.0, way=jnp.add):
    return {"y": way(a, jnp.sum(b) - c)}


def renamed(a, b=0.0, c=0.0, way=jnp.add):
    return {"z": way(a, jnp.sum(b) + c)}


SHARED = {"b": np.ones(2), "c": 2.0, "way": jnp.add}
GIVEN = {"run": plus, "over": AXIS, "chunk": 2, "settings": {"width": 5}, "shared": SHARED}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with all chunks of a sweep."""
    folder = tmp_path_factory.mktemp("sweep") / "kept"
    lj.sweep(**GIVEN, folder=folder)
    return folder


@pytest.fixture
def kept(finished, tmp_path):
    """A copy of it."""
    return shutil.copytree(finished, tmp_path / "kept")


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"over": {"a": [1.0, 2.0]}}, "axis a .* there and .* here"),
        ({"over": {"a": [1.0, 2.0, 3.0, 4.0, np.nextafter(5.0, 6.0)]}}, "axis a .* there and .* here"),
        ({"chunk": 3}, "chunk 2 there and 3 here"),
        ({"settings": {"width": 7}}, "setting width 5 there and 7 here"),
        ({"shared": SHARED | {"b": np.zeros(2)}}, "arrays in shared .* there and"),
        ({"shared": SHARED | {"c": 3.0}}, r"shared\['c'\] 2.0 there and 3.0 here"),
        ({"shared": SHARED | {"c": math.nextafter(2.0, 3.0)}}, r"shared\['c'\] 2.0 there and"),
        ({"shared": SHARED | {"way": jnp.subtract}}, "program .* there and"),
        ({"run": minus}, "program .* there and"),
        ({"run": renamed}, "program .* there and"),
        ({"run": lambda a, b, c, way: {"y": way(a, jnp.sum(b) + c) + np.arange(3.0)}}, "program .* there and"),
    ],
)
@pytest.mark.parametrize("lost", [False, True])
def test_a_folder_of_another_sweep_is_refused_and_left_alone(kept, change, match, lost):
    """However it differs, and also if nothing but the chunks is left to tell."""
    if lost:
        (kept / "sweep.json").unlink()
        match = r"lanes-000000.npz is of it"
    before = contents(kept)
    with pytest.raises(ValueError, match=rf"holds another sweep \(.*{match}.*\); choose another folder, or delete it"):
        lj.sweep(**GIVEN | change, folder=kept)
    assert contents(kept) == before


def test_keys_and_arrays_inside_functions_are_told_apart(tmp_path):
    def given(seed=0, size=1.0):
        inside = np.full(3, size)
        return {
            "run": lambda a, key: {"y": a + jr.normal(key, ()) + jnp.sum(inside)},
            "over": AXIS,
            "shared": {"key": jr.key(seed)},
            "folder": tmp_path,
        }

    lj.sweep(**given())
    lj.sweep(**given())
    with pytest.raises(ValueError, match=r"arrays in shared .* there and"):
        lj.sweep(**given(seed=1))
    with pytest.raises(ValueError, match=r"holds another sweep \(program .* there and"):
        lj.sweep(**given(size=2.0))


def spoiled(path):
    with np.load(path) as found:
        content = dict(found)
    np.savez(path, **content | {"arr_0": content["arr_0"] + 1})


@pytest.mark.parametrize(
    "damage",
    [
        spoiled,
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[:-9]),
        lambda path: path.write_bytes(path.with_name("lanes-000000.npz").read_bytes()),
    ],
)
def test_a_damaged_chunk_is_set_aside_and_computed_again(kept, damage):
    """And no other one."""
    whole, before = lj.sweep(**GIVEN), contents(kept)
    damage(kept / "lanes-000002.npz")
    with pytest.warns(DamagedWarning, match=r"lanes-000002.npz is damaged .* renamed to lanes-000002.npz.damaged"):
        again = lj.sweep(**GIVEN, folder=kept)
    xarray.testing.assert_identical(again, whole)
    assert set(contents(kept)) == {*before, "lanes-000002.npz.damaged"}
    times = {path.name: path.stat().st_mtime_ns for path in kept.iterdir()}
    xarray.testing.assert_identical(lj.sweep(**GIVEN, folder=kept), whole)
    assert {path.name: path.stat().st_mtime_ns for path in kept.iterdir()} == times


def test_a_damaged_description_is_written_anew_and_the_chunks_are_kept(kept):
    before = contents(kept)
    (kept / "sweep.json").write_bytes(before["sweep.json"][:40])
    with pytest.warns(DamagedWarning, match=r"sweep.json is damaged .* renamed to sweep.json.damaged"):
        lj.sweep(**GIVEN, folder=kept)
    assert contents(kept) == before | {"sweep.json.damaged": before["sweep.json"][:40]}


def test_a_folder_that_another_sweep_is_using_is_refused(kept):
    with in_use(kept), pytest.raises(ValueError, match=r"is in use by process .* since .*; wait until it ends"):
        lj.sweep(**GIVEN, folder=kept)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"f": np.sin}, r"settings\['f'\] must be a number or a text, got ufunc"),
        ({"x": np.ones(2)}, r"settings\['x'\] must be a number or a text, got ndarray"),
    ],
)
def test_settings_that_are_not_plain_are_refused(settings, match):
    with pytest.raises(TypeError, match=match):
        lj.sweep(**GIVEN | {"settings": settings})


@pytest.mark.parametrize(
    ("over", "error", "match"),
    [
        ({}, ValueError, "at least one axis"),
        ({"a": []}, ValueError, r"over\['a'\] must be a non-empty list"),
        ({"a": [[1.0]]}, ValueError, r"over\['a'\] must be a non-empty list"),
        ({"a": ["x"]}, TypeError, r"over\['a'\] must be numbers"),
        (
            {"a": [0, 2**64]},
            ValueError,
            r"over\['a'\]\[1\] must be a number that int64 holds, got 18446744073709551616",
        ),
    ],
)
def test_bad_axes_are_refused(over, error, match):
    with pytest.raises(error, match=match):
        lj.sweep(lambda a: {"y": a}, over=over)


@pytest.mark.parametrize(
    ("out", "dims", "error", "match"),
    [
        (lambda a: a, None, TypeError, "dict of named arrays"),
        (lambda a: {"failed": a}, None, ValueError, "must not return 'failed'"),
        (lambda a: {"a": a}, None, ValueError, "is an axis of the sweep"),
        (
            lambda a: {"y": a, "y_failed": a},
            None,
            ValueError,
            "must not return 'y_failed': sweep keeps under such names",
        ),
        (
            lambda a: {"y": RESULTS.successful},
            None,
            ValueError,
            "a diffrax result as 'result' and only there, got .* 'y'",
        ),
        (lambda a: {"result": a}, None, ValueError, "a diffrax result as 'result' and only there, got .* as 'result'"),
        (lambda a: {"y": a * np.ones(2)}, {"y": ("a",)}, ValueError, r"dims\['y'\] must name axes other than \('a',\)"),
        (lambda a: {"y": a * np.ones((2, 2))}, {"y": ("b", "b")}, ValueError, r"each once, got \('b', 'b'\)"),
        (
            lambda a: {"y": a * np.ones(2), "z": a * np.ones(3)},
            {"y": ("b",), "z": ("b",)},
            ValueError,
            r"'b' has lengths \[2, 3\]",
        ),
        (lambda a: {"y": jnp.stack([a, a])}, {"y": ("one", "two")}, ValueError, r"dims\['y'\] must name 1 axes"),
    ],
)
def test_bad_outputs_are_refused(out, dims, error, match):
    with pytest.raises(error, match=match):
        lj.sweep(out, over={"a": [1.0]}, dims=dims)


@pytest.mark.parametrize(
    ("coords", "match"),
    [
        ({"a": [7.0]}, "coords must name axes of outputs, but 'a' is taken"),
        ({"y": [1.0]}, "but 'y' is taken"),
        ({"failed": [1.0]}, "but 'failed' is taken"),
        ({"y_failed": [1.0]}, "but 'y_failed' is taken"),
        ({"part": [1.0, 2.0, 3.0]}, r"coords\['part'\] must have a value for each of 2 entries, got 3"),
    ],
)
def test_coordinates_that_would_overwrite_or_not_fit_are_refused(coords, match):
    with pytest.raises(ValueError, match=match):
        lj.sweep(lambda a: {"y": a * np.ones(2)}, over={"a": [1.0]}, dims={"y": ("part",)}, coords=coords)


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"over": {"a": [0, 2**32]}}, r"over\['a'\]\[1\] must be a number that int32 holds, got 4294967296; .*64 bits"),
        ({"over": {"a": [1.0, 1e39]}}, r"over\['a'\]\[1\] must be a number that float32 holds, got 1e\+39"),
        ({"over": {"a": [1e-300]}}, r"over\['a'\]\[0\] must be a number that float32 holds, got 1e-300"),
        (
            {"shared": {"b": np.array([[0, -(10**12)]])}},
            r"shared\['b'\]\[0, 1\] must be .* int32 holds, got -1000000000000",
        ),
    ],
)
def test_numbers_that_32_bits_do_not_hold_are_refused(given, match):
    with jax.enable_x64(False), pytest.raises(ValueError, match=match):
        lj.sweep(**{"run": plus, "over": {"a": [1.0]}} | given)


def test_bad_outputs_are_refused_before_anything_runs():
    """A name that clashes is seen while tracing, not after the last chunk."""
    ran = []

    def out(a):
        jax.debug.callback(lambda _: ran.append(1), a)
        return {"a": a}

    with pytest.raises(ValueError, match="is an axis of the sweep"):
        lj.sweep(out, over={"a": [1.0]})
    jax.effects_barrier()
    assert not ran
