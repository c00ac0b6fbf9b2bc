"""The benchmark harness: what it times, what it writes; and every benchmark at toy size."""

import dataclasses
import json
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import _gram_ours
import _gram_worker
import _gram_works as works
import fig1c
import gpu_gram
import gpu_train
import gram
import harness
import helpers
import kappa
import lazyjax as lj
import readme_numbers
import train_step
from lazyjax.models.deep import NETWORKS


def test_measure_keeps_compile_and_run_apart():
    result = harness.measure(lambda x: jnp.sin(x) @ x, jnp.ones(8), repeats=3, min_time=0.0)
    assert result["compile_s"] > result["run_s"] > 0
    assert len(result["runs"]) == 3
    assert result["run_s"] == sorted(result["runs"])[1]


def test_measure_without_jit_times_any_function():
    result = harness.measure(lambda x: time.sleep(0.01) or x, np.ones(2), repeats=3, min_time=0.0, jit=False)
    assert result["run_s"] >= 0.01
    assert result["compile_s"] < 0.1


def test_measure_repeats_a_quick_function_for_a_while():
    result = harness.measure(lambda x: x + 1, jnp.ones(2), repeats=1, min_time=0.01)
    assert sum(result["runs"]) >= 0.01
    assert len(result["runs"]) > 1


def test_compare_gives_ratios_and_errors():
    def slow(x):
        time.sleep(0.02)
        return np.asarray(x) * 2.5

    result = harness.compare(
        {"quick": lambda x: 2 * x, "slow": slow},
        jnp.ones(3),
        repeats=3,
        min_time=0.0,
        jit={"quick": True, "slow": False},
        reference=2 * np.ones(3),
    )
    assert result["ratios"]["quick"] == 1
    assert result["ratios"]["slow"] > 1
    assert result["quick"]["error"] == 0
    assert result["slow"]["error"] == pytest.approx(0.25)


def test_write_records_the_results_with_versions_and_machine(tmp_path):
    path = harness.write(
        "toy", {"ours": {"run_s": jnp.asarray(0.5), "sizes": np.arange(2)}}, directory=tmp_path / "new"
    )
    record = json.loads(path.read_text(encoding="utf-8"))
    assert path.name == "toy.json"
    assert record["results"] == {"ours": {"run_s": 0.5, "sizes": [0, 1]}}
    assert set(record["versions"]) == {"python", *harness.PACKAGES}
    assert record["machine"]["cores"] >= 1
    assert not any(Path(word).is_absolute() for word in record["command"].split()[:2])


def test_index_names_every_benchmark():
    folder = Path(harness.__file__).parent
    index = (folder / "README.md").read_text(encoding="utf-8")
    for path in folder.glob("*.py"):
        assert path.name == "harness.py" or f"`{path.name}`" in index


def test_the_numbers_of_the_readme_are_those_of_the_records():
    text = (harness.ROOT / "README.md").read_text(encoding="utf-8")
    assert text.count("<!-- numbers: ") == 7
    assert readme_numbers.rewritten(text) == text
    altered = text.replace(" s on the first run", "0 s on the first run")
    assert altered != text
    assert readme_numbers.rewritten(altered) == text


@pytest.mark.end_to_end
def test_contenders_of_figure_1c_take_the_same_steps():
    found = fig1c.measure(taus=3, steps=2, repeats=1)
    assert {"ours", "numpy"} <= set(found["rows"])
    # Weights in float32 lose what a lazy net moves in two steps, their displacement keeps it.
    assert found["rows"]["ours"]["error"] < 1e-3 < 1e-2 < found["rows"]["numpy"]["error"] < 1
    assert found["ratios"]["ours"] == 1
    minutes = found["paper_size_minutes"]["ours"]
    assert minutes == pytest.approx(found["rows"]["ours"]["run_s"] * 33 * 10 * 10_000 / 6 / 60)


@pytest.fixture
def in_process(monkeypatch):
    """Let the workers of `gram.py` run in this process; the peer is one that contracts Jacobians by hand."""

    class Worker:
        def __init__(self, kind, name, dtype, settings):
            peer = _gram_worker.Contender(lambda f: lambda w, x: _contracted(f, w, x), axes=(0, 2, 1, 3))
            contender = peer if kind in gram.PEERS else _gram_ours.prepare(kind)
            self.worker = _gram_worker.Worker(name, dtype, settings.size, contender)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def ask(self, do, **arguments):
            return json.loads(_gram_worker.answer(self.worker, json.dumps({"do": do, **arguments})))

    monkeypatch.setattr(gram, "Worker", Worker)
    monkeypatch.setattr(gram, "PEERS", ("AUTO",))


def _contracted(f, w, x):
    """The Gram with the axes (n, n, k, k)."""
    leaves = [leaf.reshape(*leaf.shape[:2], -1) for leaf in jax.tree.leaves(jax.jacrev(lambda v: f(v, x))(w))]
    return sum(jnp.einsum("ikp,jlp->ijkl", leaf, leaf) for leaf in leaves)


@pytest.mark.end_to_end
@pytest.mark.parametrize("name", works.WORKS)
def test_the_gram_of_every_work_is_the_reference(name):
    work = works.make(name, "float64", "smoke", 4)
    assert work.f(work.w, work.x).shape == (4, work.k)
    w, x = jax.tree.map(jnp.asarray, (work.w, work.x))
    found = lj.gram(work.f, w, x).reshape(4 * work.k, 4 * work.k)
    assert helpers.tree_allclose(np.asarray(found), _gram_worker.jacobian_rows(work, np.arange(4)))


def test_works_are_the_same_network_at_every_size_of_the_sample():
    few, many = works.make("c", "float32", "smoke", 3), works.make("c", "float32", "smoke")
    assert helpers.tree_allclose(few.w, many.w, rtol=0, atol=0)
    assert np.array_equal(few.x, many.x[:3])


def test_full_works_have_the_sizes_that_are_named():
    counts = {name: works.make(name, "float32", "full", 1).num_params for name in works.WORKS}
    assert counts["a"] == 101_000
    assert counts["b"] == 932_362
    assert 1e5 < counts["c"] < counts["d"] < 5e5
    vgg = works.make_vgg(works.Random(np.random.default_rng(0), "float32"), 1, 32, works.WIDE_VGG, 10)
    assert vgg.num_params == pytest.approx(9.2e6, rel=0.01)


def test_a_slow_contender_is_predicted_from_two_runs():
    assert gram.predicted({2: 2 * 3.0 + 4 * 5.0, 4: 4 * 3.0 + 16 * 5.0}, 10) == pytest.approx(10 * 3.0 + 100 * 5.0)
    assert gram.predicted({2: 6.0, 4: 6.0}, 10) == pytest.approx(15.0)  # no faster than linear
    assert gram.predicted({2: 1.0, 4: 8.0}, 8) == pytest.approx(32.0)  # no slower than square


@pytest.mark.end_to_end
def test_race_times_checks_and_ranks_and_its_record_fills_the_table(in_process, tmp_path, capsys):
    settings = gram.Settings("smoke", Path(), ours=True, limit_s=30.0)
    record = gram.work("b", ["float64"], settings)
    case = record["cases"]["float64"]
    assert set(case["rows"]) == {*gram.OURS, *gram.PEERS}
    assert all(row["right"] and row["error"] < 1e-12 for row in case["rows"].values())
    assert case["best_peer"] == "AUTO"
    assert case["ratios"]["peer"] == case["rows"]["AUTO"]["run_s"] / case["rows"]["ours"]["run_s"]
    assert case["products"]["flops"] == 2 * 24 * 25 * 6
    assert "best" in capsys.readouterr().out
    path = harness.write("gram_b", record, directory=tmp_path)
    table = readme_numbers.gram({"b": json.loads(path.read_text(encoding="utf-8"))})
    assert f"| {readme_numbers.GRAMS['b']} | float64 |" in table


@pytest.mark.end_to_end
def test_only_the_best_of_slow_contenders_is_run_at_full_size(in_process):
    record = gram.work("a", ["float64"], gram.Settings("smoke", Path(), ours=True, limit_s=0.0))["cases"]["float64"]
    assert record["rows"]["jacobian"]["extrapolated"]
    assert not record["rows"]["ours"]["extrapolated"]
    assert not record["rows"][record["best_peer"]]["extrapolated"]


def test_worker_says_what_failed():
    worker = _gram_worker.Worker("a", "float64", "smoke", _gram_ours.prepare("ours"))
    reply = json.loads(_gram_worker.answer(worker, '{"do": "check", "file": "none.npy"}'))
    assert "FileNotFoundError" in reply["failed"]


@pytest.mark.end_to_end
def test_worker_in_its_own_process_answers():
    with gram.Worker("eager", "a", "float32", gram.Settings("smoke", None, ours=True, limit_s=1.0)) as worker:
        built = worker.ask("build", n=2)
        assert (built["n"], built["k"], built["num_params"]) == (2, 1, 16)
        assert worker.ask("run")["seconds"] < built["first_s"]
        worker.process.kill()
        assert "status -9" in worker.ask("run")["failed"]


@pytest.mark.end_to_end
def test_gpu_gram_at_toy_size():
    found = gpu_gram.question(gpu_gram.SIZES["smoke"], 1)
    assert found["error"] < 1e-5
    assert found["run_s"]["both"] < found["first_s"]["both"]
    assert found["eigenvalues"]["smallest"] > -1e-5 * found["eigenvalues"]["largest"]


@pytest.mark.parametrize("script", [gpu_gram, gpu_train])
def test_without_a_gpu_its_benchmarks_say_so(script, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["script.py"])
    script.main()
    assert capsys.readouterr().out.startswith("No GPU here")


@pytest.mark.end_to_end
@pytest.mark.parametrize("name", ["mlp", "two_layer", "mlp_closure"])
def test_kappa_at_toy_size(name):
    found = kappa.question(*kappa.cases(toy=True)[name], repeats=1)
    assert found["lower"] <= found["value"] <= found["upper"]
    assert 1 <= found["ratio"] < 2
    assert found["run_s"] < found["first_s"]


def test_gpu_gram_counts_the_cheaper_way_of_every_convolution():
    # One image position: cotangents and patches contracted, 2 + 27 / 4 + 1; on 64 positions: weight gradients, 27 * 2.
    for image, each in ((1, 2 + 27 / 4 + 1), (8, 54)):
        assert gpu_gram.needed(gpu_gram.Size(3, image, (2,), 2, 8)) == 6 * 7 * each


@pytest.mark.end_to_end
def test_a_training_step_at_toy_size():
    found = train_step.question(**train_step.SIZES["toy"], repeats=1)
    assert set(found["ratios"]) == {"plain", "finite", "tangent", "subtracted"}
    assert found["ratios"]["plain"] == found["memory_ratios"]["plain"] == 1
    assert 1 < found["memory_ratios"]["finite"] < train_step.TARGET["memory"]


class TwoLayers:
    """A network of flat images, with four hidden units."""

    def __call__(self, w, x):
        return jax.nn.relu(self.preactivations(w, x)[0]) @ w["a"]

    def preactivations(self, w, x):
        return [x.reshape(x.shape[0], -1) @ w["b"]]

    def init(self, key, *, width, shape, gain, dtype):
        return {"a": jr.normal(key, (4, 10), dtype), "b": 0.01 * jr.normal(key, (np.prod(shape), 4), dtype)}


@pytest.mark.end_to_end
def test_gpu_training_with_a_toy_network(monkeypatch):
    monkeypatch.setitem(NETWORKS, "two_layers", TwoLayers)
    settings = dataclasses.replace(gpu_train.SIZES["smoke"], network="two_layers")
    found, data = gpu_train.question(settings, None, 64)
    # Two products, and one comparison a hidden unit.
    assert gpu_train.forward_flops(settings, gpu_train.deep.load(settings, None)) == 2 * (1024 * 4 + 4 * 10) + 4
    assert found["accuracy"]["test_accuracy"]["inf"] == data["test_accuracy"].sel(alpha=np.inf).item()
    assert found["images"] == {"train": 32, "test": 8}
    assert found["wall_s"] > 0
