"""A reader of pickles that gives what `pickle` gives for plain values, and refuses all else without running it."""

import dataclasses
import os
import pickle

import numpy as np
import pytest

from lazyjax.data.plain_pickle import PlainArray, load_plain

PLAIN = {"a": [1, -2, 300, 70000, 2**40], "b": ("x", "ä", None, True, False, 0.5, b"\xff"), "c": {"d": [], "e": ()}}


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_plain_values_come_back(protocol):
    value = {**PLAIN, "twice": [PLAIN["a"], PLAIN["a"]]}
    if protocol == 2:
        value["b"] = value["b"][:-1]  # Python 2 has no bytes apart from texts
    found = load_plain(pickle.dumps(value, protocol))
    assert found == value
    assert found["twice"][0] is found["twice"][1]


@pytest.mark.parametrize("protocol", [2, 3, 4])
@pytest.mark.parametrize("order", ["C", "F"])
def test_arrays_are_told_by_dtype_shape_order_and_bytes(protocol, order):
    array = np.asarray(np.arange(6, dtype=np.uint8).reshape(2, 3), order=order)
    found = load_plain(pickle.dumps([array, np.ones(2)], protocol))
    assert found[0] == PlainArray("u1", (2, 3), order == "F", array.tobytes("A"))
    assert dataclasses.astuple(found[1])[:2] == ("f8", (2,))


def test_a_pickle_of_python_2_is_read_as_it_is_published():
    content = bytes(range(6))
    raw = (
        b"\x80\x02}q\x01(U\x04dataq\x02cnumpy.core.multiarray\n_reconstruct\nq\x03cnumpy\nndarray\nq\x04K\x00\x85U\x01b"
        b"\x87Rq\x05(K\x01K\x02K\x03\x86cnumpy\ndtype\nq\x06U\x02u1K\x00K\x01\x87Rq\x07(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff"
        b"\xff\xffK\x00tbI00\nT\x06\x00\x00\x00"
        + content
        + b"tbU\x06labelsq\x08]q\t(K\x01K\x02eU\x0bbatch_labelq\nU\x01au."
    )
    expected = {b"data": PlainArray("u1", (2, 3), False, content), b"labels": [1, 2], b"batch_label": b"a"}
    assert load_plain(raw) == expected


ARRAY = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85C\x01b\x87R"
DTYPE = b"cnumpy\ndtype\nU\x02O8K\x00K\x01\x87R"


@pytest.mark.parametrize(
    ("raw", "match"),
    [
        (b"", "."),
        (b"\x80\x02", "."),
        (b"\x80\x02K\x01", "."),
        (b"garbage", "."),
        (b"\x80\x02.", "IndexError"),
        (b"\x80\x02h\x07.", "KeyError"),
        (b"\x80\x02cos\nsystem\n.", r"it asks for os.system, which was not run"),
        (b"\x80\x04\x8c\x02os\x8c\x06system\x93.", r"it asks for os.system, which was not run"),
        (b"\x80\x02cnumpy\ndtype\n)\x81.", "it has the opcode NEWOBJ"),
        (b"\x80\x02(i__main__\nf\n.", "it has the opcode INST"),
        (b"\x80\x02\x82\x01.", "it has the opcode EXT1"),
        (b"\x80\x02K\x01K\x02\x85R.", "it calls what is no function"),
        (b"\x80\x02cnumpy\nndarray\nK\x00\x85R.", "it calls what is no function"),
        (b"\x80\x02K\x01K\x02b.", "it gives a state to what is no array"),
        (b"\x80\x02" + ARRAY + b"(K\x01K\x02K\x03K\x04C\x00tb.", "an array without shape or dtype"),
        (b"\x80\x02" + ARRAY + b"K\x01b.", "TypeError"),
        (b"\x80\x02K\x01K\x02a.", "it appends to what is no list"),
        (b"\x80\x02]K\x01K\x02s.", "it sets items of what is no dictionary"),
        (b"\x80\x02}(K\x01u.", "it sets items of what is no dictionary"),
        (b"\x80\x02}K\x01K\x02s.", "a dictionary with other keys than texts"),
        (b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00aX\x03\x00\x00\x00hex\x86R.", "it asks for the encoding 'hex'"),
        (b"\x80\x02c_codecs\nencode\nK\x01X\x06\x00\x00\x00latin1\x86R.", "it encodes what is no text"),
        (b"\x80\x02r\xff\xff\xff\xff.", "IndexError"),
    ],
)
def test_all_else_is_refused(raw, match):
    with pytest.raises(ValueError, match=match):
        load_plain(raw)


def test_the_state_of_a_dtype_is_not_believed():
    """With these flags NumPy took the bytes of an array for pointers to objects, and the process crashed."""
    state = b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x3ftb"
    content = bytes(range(64))
    raw = b"\x80\x02" + ARRAY + b"(K\x01K\x08\x85" + DTYPE + state + b"I00\nC\x40" + content + b"tb."
    assert load_plain(raw) == PlainArray("O8", (8,), False, content)


def test_nothing_grows_beyond_the_file():
    text = b"X\xe8\x03\x00\x00" + b"a" * 1000
    encode = b"c_codecs\nencode\nh\x00X\x06\x00\x00\x00latin1\x86R"
    with pytest.raises(ValueError, match="more bytes than it has"):
        load_plain(b"\x80\x02" + text + b"q\x00" + encode * 50 + b".")
    # A place in memory that Python's own reader would make room for.
    assert load_plain(b"\x80\x02K\x01r\xff\xff\xff\xffj\xff\xff\xff\xff.") == 1


def test_depth_is_no_danger():
    deep = b"\x85" * 10**5
    found = load_plain(b"\x80\x02)" + deep + b".")
    assert isinstance(found, tuple)
    with pytest.raises(ValueError, match=r"other keys than texts"):
        load_plain(b"\x80\x02})" + deep + b"Ns.")


def test_nothing_is_run(tmp_path):
    class Program:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "made"),)

    with pytest.raises(ValueError, match="which was not run"):
        load_plain(pickle.dumps(Program()))
    assert not (tmp_path / "made").exists()
