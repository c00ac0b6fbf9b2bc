"""Versions, digests, and configurations that are kept and compared."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from lazyjax._core.files import DamagedWarning
from lazyjax._core.keys import default_key, is_key
from lazyjax._core.records import (
    check_configuration,
    digest_of,
    digest_of_text,
    keep_configuration,
    read_configuration,
    versions,
)

ARRAYS = {"a": np.arange(6.0).reshape(2, 3), "b": [np.arange(3), None, "text"]}


def test_versions_are_those_installed():
    assert versions("jax") == {"jax": jax.__version__}
    assert {"lazyjax", "jax", "numpy"} <= set(versions())


def test_a_digest_knows_arrays_by_their_place_shape_dtype_and_bits():
    digest = digest_of(ARRAYS)
    assert len(digest) == 16
    assert (
        digest_of(jax.tree.map(lambda leaf: jnp.asarray(leaf) if isinstance(leaf, np.ndarray) else leaf, ARRAYS))
        == digest
    )
    # Not by their memory layout, nor by functions.
    assert digest_of(ARRAYS | {"a": np.asfortranarray(ARRAYS["a"]), "f": np.sin}) == digest
    others = [
        ARRAYS | {"a": ARRAYS["a"].T.reshape(2, 3)},
        ARRAYS | {"a": ARRAYS["a"].reshape(3, 2)},
        ARRAYS | {"a": ARRAYS["a"].astype(np.float32)},
        ARRAYS | {"a": np.nextafter(ARRAYS["a"], 9.0)},
        {"c": ARRAYS["a"], "b": ARRAYS["b"]},
        ARRAYS | {"c": "text"},
        ARRAYS | {"c": 2},
        ARRAYS | {"c": 2.0},
        ARRAYS | {"c": True},
    ]
    assert len({digest, *map(digest_of, others)}) == 1 + len(others)


def test_a_digest_of_texts_knows_where_one_ends():
    assert len({digest_of_text("ab", "c"), digest_of_text("a", "bc"), digest_of_text("abc")}) == 3


def test_random_keys_enter_a_digest_by_their_data():
    keys = [jr.key(0), jr.key(1), jr.split(jr.key(0), 2)]
    assert all(map(is_key, keys))
    assert not is_key(jr.key_data(keys[0]))
    assert len(set(map(digest_of, keys))) == 3
    assert digest_of(default_key(None)) == digest_of(default_key(None))
    assert default_key(keys[1]) is keys[1]


def test_equal_configurations_pass_however_they_were_written():
    there = {"alphas": [1.0, float("inf")], "gap": float("nan"), "seed": 0}
    check_configuration(
        {"alphas": (1.0, float("inf")), "gap": float("nan"), "seed": 0, "test": None}, there, holder="", kind=""
    )


@pytest.mark.parametrize(
    ("here", "match"),
    [
        ({"rate": 0.5, "seed": 1}, r"folder run holds another sweep \(rate 0.1 there and 0.5 here\); choose another"),
        ({"rate": 0.5, "seed": 2}, r"\(rate 0.1 there and 0.5 here, seed 1 there and 2 here\)"),
        ({"rate": 0.1}, r"\(seed 1 there and None here\)"),
        ({"rate": 0.1, "seed": 1, "path": ("x",)}, r"\(path None there and \['x'\] here\)"),
    ],
)
def test_the_error_names_every_entry_that_differs(here, match):
    with pytest.raises(ValueError, match=match):
        check_configuration(here, {"rate": 0.1, "seed": 1}, holder="folder run", kind="sweep")


def test_a_configuration_is_written_once_and_compared_from_then_on(tmp_path):
    path, words = tmp_path / "new" / "run.json", {"holder": "folder run", "kind": "sweep"}
    assert not keep_configuration(path, {"rate": (0.1, float("inf"))}, **words)
    written = path.stat()
    assert keep_configuration(path, {"rate": (0.1, float("inf"))}, **words)
    assert path.stat() == written
    with pytest.raises(ValueError, match=r"folder run holds another sweep \(rate .* there and 0.2 here\)"):
        keep_configuration(path, {"rate": 0.2}, **words)
    assert path.stat() == written


@pytest.mark.parametrize(
    ("content", "why"), [(b'{"rate": 0.', "it is no JSON"), (b"\xff", "it is no JSON"), (b"[1]", "no configuration")]
)
def test_a_damaged_configuration_is_set_aside_and_written_anew(tmp_path, content, why):
    path = tmp_path / "run.json"
    path.write_bytes(content)
    with pytest.warns(DamagedWarning, match=rf"run.json is damaged \(.*{why}.*renamed to run.json.damaged"):
        assert not keep_configuration(path, {"rate": 0.1}, holder="", kind="")
    assert read_configuration(path) == {"rate": 0.1}
    assert (tmp_path / "run.json.damaged").read_bytes() == content
    assert read_configuration(tmp_path / "none.json") is None
