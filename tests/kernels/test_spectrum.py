"""Numbers from eigenvalues: known spectra, invariances, and the cut below which one is zero."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import lazyjax as lj
from lazyjax.kernels.spectrum import condition_number, effective_rank, normalized_spectrum


def test_equal_modes_are_counted_and_a_scale_or_zeros_change_nothing():
    for m in (1, 2, 17):
        for scale in (1e-30, 1.0, 1e30):
            values = jnp.concatenate([jnp.full(m, scale), jnp.zeros(5)])
            np.testing.assert_allclose(effective_rank(values), m, rtol=1e-12)
            np.testing.assert_allclose(condition_number(values), 1, rtol=1e-12)


def test_the_effective_rank_is_the_exponential_of_the_entropy(getkey):
    values = jr.exponential(getkey(), (12,))
    share = np.asarray(values) / np.sum(values)
    np.testing.assert_allclose(effective_rank(values), np.exp(-np.sum(share * np.log(share))), rtol=1e-12)
    # Independent spectra multiply: the Kronecker product of two matrices has the product of their ranks.
    other = jr.exponential(getkey(), (5,))
    both = effective_rank(jnp.outer(values, other).ravel())
    np.testing.assert_allclose(both, effective_rank(values) * effective_rank(other), rtol=1e-12)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_it_lies_above_the_participation_ratio_and_that_above_trace_over_norm(seed):
    values = np.asarray(jr.exponential(jr.key(seed), (30,))) ** 3
    participation = np.sum(values) ** 2 / np.sum(values**2)
    assert np.sum(values) / np.max(values) < participation < float(effective_rank(jnp.asarray(values))) < 30


def test_a_zero_spectrum_has_rank_zero_and_numbers():
    zero = jnp.zeros(3)
    np.testing.assert_array_equal([effective_rank(zero), condition_number(zero)], [0, 0])
    fraction, value = normalized_spectrum(zero)
    np.testing.assert_allclose(fraction, [1 / 3, 2 / 3, 1])
    np.testing.assert_array_equal(value, 0)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_rounding_of_a_zero_eigenvalue_does_not_count(dtype, getkey):
    rows = np.asarray(jr.normal(getkey(), (6, 40)), dtype)
    rows = np.concatenate([rows, rows])
    values = np.linalg.eigvalsh(rows @ rows.T)
    exact = np.linalg.svd(rows[:6].astype(np.float64), compute_uv=False) ** 2
    np.testing.assert_allclose(condition_number(values), exact[0] / exact[-1], rtol=1e3 * np.finfo(dtype).eps)
    assert condition_number(values).dtype == dtype
    _, curve = normalized_spectrum(values)
    np.testing.assert_array_equal(np.asarray(curve) > 0, np.arange(12) < 6)
    np.testing.assert_allclose(effective_rank(values), effective_rank(exact), rtol=1e2 * np.finfo(dtype).eps)


def test_the_cut_of_the_condition_number_is_the_callers():
    values = jnp.array([1e-6, 1.0, 1e-2])
    for rtol, expected in ((None, 1e6), (1e-6, 1e2), (0.5e-6, 1e6), (0.1, 1.0), (0.0, 1e6)):
        np.testing.assert_allclose(condition_number(values, rtol=rtol), expected, rtol=1e-12)


def test_the_curve_is_sorted_and_relative_and_knows_what_is_left_out():
    values = jnp.array([1.0, 8.0, 2.0])
    fraction, value = normalized_spectrum(values)
    np.testing.assert_allclose(fraction, [1 / 3, 2 / 3, 1])
    np.testing.assert_array_equal(value, [1, 0.25, 0.125])
    leading, top = normalized_spectrum(values, size=300)
    np.testing.assert_allclose(leading, [1 / 300, 2 / 300, 3 / 300])
    np.testing.assert_array_equal(top, value)


def test_twice_the_data_have_the_curve_of_once_the_data():
    """What the axis i/(nk) is for: copies of the inputs change the eigenvalues and their number, but not the curve."""
    rng = np.random.default_rng(0)
    f, w = (
        lj.models.two_layer(jnp.tanh),
        {"a": jnp.asarray(rng.normal(size=20)), "b": jnp.asarray(rng.normal(size=(20, 3)))},
    )
    x = jnp.asarray(rng.normal(size=(10, 3)))
    once, twice = (normalized_spectrum(lj.spectrum(f, w, inputs)) for inputs in (x, jnp.concatenate([x, x])))
    np.testing.assert_allclose(twice[1][:10], once[1], rtol=1e-6)
    np.testing.assert_allclose(twice[0][:10], once[0] / 2)


def test_compiled_mapped_and_differentiated():
    values = jnp.array([[4.0, 2.0, 0.0], [1.0, 1.0, 1.0]])
    for function in (effective_rank, condition_number, lambda v: normalized_spectrum(v)[1]):
        each = jnp.stack([function(v) for v in values])
        np.testing.assert_allclose(jax.vmap(function)(values), each, rtol=1e-14)
        np.testing.assert_allclose(jax.jit(function)(values[0]), each[0], rtol=1e-14)
    slope = jax.grad(effective_rank)(values[0])
    assert np.all(np.isfinite(slope))
    step = jnp.array([1e-5, 0.0, 0.0])
    central = (effective_rank(values[0] + step) - effective_rank(values[0] - step)) / 2e-5
    np.testing.assert_allclose(slope[0], central, rtol=1e-8)
    np.testing.assert_allclose(jax.grad(condition_number)(values[0]), [0.5, -1.0, 0.0])
    # What nobody can check while it is traced stays NaN, it is no rank of zero.
    assert np.isnan(jax.jit(effective_rank)(values[0].at[1].set(jnp.nan)))


@pytest.mark.parametrize("function", [effective_rank, condition_number, normalized_spectrum])
@pytest.mark.parametrize(
    ("values", "error", "match"),
    [
        (jnp.ones((2, 2)), ValueError, r"eigenvalues must be a vector of at least one number, got shape \(2, 2\)"),
        (jnp.zeros(0), ValueError, "at least one number"),
        (jnp.array([1.0, jnp.nan]), ValueError, r"eigenvalues must be finite, .* index \(1,\)"),
        (jnp.ones(2, complex), TypeError, "eigenvalues must be real, got complex128.*eigvalsh"),
    ],
)
def test_what_is_no_spectrum_is_refused(function, values, error, match):
    with pytest.raises(error, match=match):
        # The shape annotations that tests check would speak first; users do not have them.
        getattr(function, "__wrapped__", function)(values)


def test_bad_options_are_refused():
    with pytest.raises(ValueError, match=r"rtol must be a share .* in \[0, 1\), .* got 2"):
        condition_number(jnp.ones(2), rtol=2.0)
    with pytest.raises(ValueError, match=r"size must be the number of all eigenvalues, at least the 2 .* got 1"):
        normalized_spectrum(jnp.ones(2), size=1)
