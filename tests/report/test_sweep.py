"""Sweeps: labels, chunks, one program, failed lanes, refusals."""

import importlib

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


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"over": {"a": [1.0, 2.0]}}, "axis a .* there and .* here"),
        ({"chunk": 3}, "chunk 2 there and 3 here"),
        ({"settings": {"width": 7}}, "width 5 there and 7 here"),
        ({"shared": {"b": jnp.zeros(2)}}, "shared"),
    ],
)
def test_a_folder_of_another_sweep_is_refused(tmp_path, change, match):
    options = {"over": AXIS, "chunk": 2, "settings": {"width": 5}, "shared": {"b": jnp.ones(2)}, "folder": tmp_path}
    lj.sweep(lambda a, b: {"y": a + b}, **options)
    with pytest.raises(ValueError, match=f"holds another sweep .*{match}.*choose another folder"):
        lj.sweep(lambda a, b: {"y": a + b}, **options | change)


@pytest.mark.parametrize(
    ("over", "error", "match"),
    [
        ({}, ValueError, "at least one axis"),
        ({"a": []}, ValueError, r"over\['a'\] must be a non-empty list"),
        ({"a": [[1.0]]}, ValueError, r"over\['a'\] must be a non-empty list"),
        ({"a": ["x"]}, TypeError, r"over\['a'\] must be numbers"),
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
        (lambda a: {"y": jnp.stack([a, a])}, {"y": ("one", "two")}, ValueError, r"dims\['y'\] must name 1 axes"),
    ],
)
def test_bad_outputs_are_refused(out, dims, error, match):
    with pytest.raises(error, match=match):
        lj.sweep(out, over={"a": [1.0]}, dims=dims)


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
