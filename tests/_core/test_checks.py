"""What a user hands in is refused with one clear error, or let through untouched."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lazyjax._core import checks as _check


def test_parameters_split_into_coordinates_and_the_rest_and_combine_again():
    w = {"a": jnp.arange(3.0), "n": jnp.arange(2), "flag": True, "name": "relu", "half": jnp.ones(1, jnp.float32)}
    coordinates, rest = _check.split_params(w)
    assert [leaf.dtype for leaf in jax.tree.leaves(coordinates)] == [jnp.float64, jnp.float32]
    assert rest["name"] == "relu"
    assert rest["flag"] is True
    assert rest["n"] is w["n"]
    assert eqx.combine(coordinates, rest) == w


@pytest.mark.parametrize(
    ("w", "error", "match"),
    [
        ({"n": jnp.arange(3)}, TypeError, r"at least one real floating array.*\['int64'\].*astype"),
        ({"n": jnp.ones(3, bool), "x": 2.0}, TypeError, r"\['bool', 'float'\]"),
        ({}, TypeError, r"none \(an empty tree\)"),
        ({"a": jnp.ones(2), "z": jnp.ones(2, complex)}, TypeError, "complex.*real and imaginary parts"),
        ({"a": jnp.zeros((0, 3))}, ValueError, "at least one number.*empty"),
    ],
)
def test_parameters_without_a_real_coordinate_are_refused(w, error, match):
    with pytest.raises(error, match=match):
        _check.split_params(w)


def test_the_error_of_non_finite_parameters_says_how_many_where_and_in_which_leaf():
    bad = np.ones((2, 3))
    bad[1, 0], bad[1, 2] = np.nan, -np.inf
    match = r"start\['layers'\]\[1\] must be finite, but 2 of its 6 entries .*first at index \(1, 0\)"
    with pytest.raises(ValueError, match=match):
        _check.split_params({"layers": [jnp.ones(2), jnp.asarray(bad)]}, "start")


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float64])
def test_the_largest_finite_numbers_pass_and_the_next_does_not(dtype):
    largest = jnp.full(2, jnp.finfo(dtype).max, dtype)
    _check.check_finite({"x": largest, "labels": jnp.arange(3), "key": jax.random.key(0)}, "w")
    with pytest.raises(ValueError, match=r"w\['x'\].*2 of its 2"):
        _check.check_finite({"x": largest * jnp.asarray(2, dtype)}, "w")


def test_values_are_not_looked_at_inside_a_trace_but_structure_is():
    def inside(x):
        _check.check_finite(x, "x")
        _check.check_alpha(x[0])
        _check.check_times(x)
        with pytest.raises(ValueError, match="vector of at least two times"):
            _check.check_times(x[0])
        assert not _check.is_concrete({"x": x, "y": 1.0})
        return x

    jax.jit(inside)(jnp.array([jnp.nan, -1.0]))
    assert _check.is_concrete({"x": jnp.ones(2), "y": 1.0, "z": None})


@pytest.mark.parametrize("alpha", [1, 1e-300, jnp.float32(3), jnp.inf, np.float64(2)])
def test_every_scale_above_zero_is_accepted(alpha):
    _check.check_alpha(alpha)


@pytest.mark.parametrize("alpha", [0, -1.0, jnp.nan, -jnp.inf])
def test_scales_outside_zero_to_infinity_are_refused(alpha):
    with pytest.raises(ValueError, match=r"alpha must be a scale in \(0, inf\]"):
        _check.check_alpha(alpha)


def test_a_vector_of_scales_is_refused_with_what_to_do_instead():
    with pytest.raises(ValueError, match=r"shape \(2,\); use jax.vmap"):
        _check.check_alpha(jnp.array([1.0, 2.0]))


@pytest.mark.parametrize("ts", [jnp.array([0.0, 1.0]), jnp.array([-1.0, 3.0, jnp.inf]), jnp.arange(3)])
def test_increasing_times_are_accepted_and_the_last_may_be_infinite(ts):
    _check.check_times(ts)


@pytest.mark.parametrize(
    ("ts", "match"),
    [
        ([1.0], r"at least two times .*got shape \(1,\)"),
        (3.0, r"got shape \(\)"),
        ([[0.0, 1.0]], r"got shape \(1, 2\)"),
        ([0.0, 2.0, 2.0], r"strictly increasing, got ts\[1\] = 2.0 and ts\[2\] = 2.0"),
        ([1.0, 0.0, 2.0], r"strictly increasing, got ts\[0\]"),
        ([0.0, jnp.nan], "must be finite"),
        ([0.0, jnp.inf, jnp.inf], "the last may be inf"),
        ([-jnp.inf, 0.0], "must be finite"),
    ],
)
def test_other_times_are_refused(ts, match):
    with pytest.raises(ValueError, match=match):
        _check.check_times(jnp.asarray(ts))


def test_outputs_are_described_without_running_the_model():
    def h(w, n):
        return jnp.outer(w, w)[:n].astype(jnp.float32)

    out = _check.check_outputs(h, jnp.ones(3), 2)
    assert (out.shape, out.dtype) == ((2, 3), jnp.float32)


@pytest.mark.parametrize(
    ("h", "error", "match"),
    [
        (lambda w: jnp.sum(w), ValueError, r"g must return one array of shape \(n,\) or \(n, k\), got shape \(\)"),
        (lambda w: w[:, None, None], ValueError, r"got shape \(3, 1, 1\)"),
        (lambda w: (w, w), ValueError, "one array of shape"),
        (lambda w: jnp.argsort(w), TypeError, "real floating outputs, got int64"),
        (lambda w: w.astype(complex), TypeError, "got complex128"),
        (lambda w: w[:0], ValueError, "at least one output.*is the data empty"),
        (lambda w: jnp.zeros((3, 0)), ValueError, "at least one output"),
    ],
)
def test_models_with_other_outputs_are_refused(h, error, match):
    with pytest.raises(error, match=match):
        _check.check_outputs(h, jnp.ones(3), name="g")


class TestNumbersThatADtypeHolds:
    @pytest.mark.parametrize(
        "values",
        [
            [0, 2**31 - 1, -(2**31)],
            [3.4e38, np.inf, np.nan, 1e-300],
            [True, False],
            ["a"],
            [None],
            np.float64(1.0) + 1e-12,
            np.zeros((0, 2)),
        ],
    )
    def test_pass(self, values):
        with jax.enable_x64(False):
            _check.check_fits(values, "x")

    @pytest.mark.parametrize(
        ("values", "match"),
        [
            (2**31, "x must be a number that int32 holds, got 2147483648; rescale it, or compute in 64 bits"),
            ([[0], [-(2**31) - 1]], r"x\[1, 0\] must be a number that int32 holds, got -2147483649"),
            (np.array([2**32], np.uint64), r"x\[0\] must be a number that uint32 holds, got 4294967296"),
            ([1.0, -1e300], r"x\[1\] must be a number that float32 holds, got -1e\+300"),
            ([1j * 1e300], r"x\[0\] must be a number that complex64 holds"),
            ([1, 2**70], r"x\[1\] must be a number that int64 holds, got 1180591620717411303424"),
        ],
    )
    def test_are_told_from_others_by_value_and_place(self, values, match):
        with jax.enable_x64(False), pytest.raises(ValueError, match=match):
            _check.check_fits(values, "x")

    def test_may_be_those_of_a_dtype_that_is_asked_for(self):
        _check.check_fits([1e5], "x")
        with pytest.raises(ValueError, match=r"x\[0\] must be a number that float16 holds, got 100000.0"):
            _check.check_fits([1e5], "x", np.float16)
        with pytest.raises(ValueError, match=r"x\[0\] must be a number that float16 holds, got 1e-10"):
            _check.check_fits([1e-10], "x", np.float16, tiny=False)
        _check.check_fits(jnp.asarray([1e5]), "x", np.float16)
