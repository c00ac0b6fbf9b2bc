"""phi functions against their definition in 160 decimal digits: values and two derivatives, both precisions."""

import decimal
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lazyjax._core.phi import phi


@functools.cache
def exact(z, k):
    """phi_k(z) = (e^z - sum_{j<k} z^j/j!)/z^k, with digits to spare for its cancellation."""
    with decimal.localcontext(prec=160):
        z = decimal.Decimal(z)
        if z == 0:
            return decimal.Decimal(1) / math.factorial(k)
        return (z.exp() - sum((z**j / math.factorial(j) for j in range(k)), decimal.Decimal(0))) / z**k


def exact_derivative(z, k, times):
    """By phi_k' = phi_k - k phi_{k+1}, which the integral gives; phi_0 is its own derivative."""
    with decimal.localcontext(prec=160):
        if times == 0:
            return exact(z, k)
        return exact_derivative(z, k, times - 1) - k * exact_derivative(z, k + 1, times - 1)


def arguments(dtype, *ks):
    """From -1e8 to 60; close to 0, and on both sides of |z| = k, where phi_k changes its formula."""
    borders = np.concatenate([k * (1 + np.linspace(-1e-2, 1e-2, 11)) for k in ks])
    z = np.concatenate([-np.logspace(8, -12, 41), [0.0, -0.0], np.logspace(-12, math.log10(60), 21), -borders, borders])
    return np.unique(z.astype(dtype))


@functools.cache
def table(dtype):
    """Arguments, -inf and NaN last; phi_k and two derivatives there for k = 0, ..., 5, by one program."""
    z = np.concatenate([arguments(dtype, *range(6)), np.array([-np.inf, np.nan], dtype)])

    @jax.jit
    def evaluate(z):
        phis = [functools.partial(phi, k=k) for k in range(6)]
        return [[jax.vmap(g)(z) for g in (f, jax.grad(f), jax.grad(jax.grad(f)))] for f in phis]

    return z, jax.tree.map(np.asarray, evaluate(z))


# Largest errors, in rounding units, all of them next to |z| = k: 2.0, 8.0 and 18; for negative z 1.2, 3.7 and 11.
BOUNDS = (3, 10, 25)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_values_and_derivatives_are_right_to_a_few_rounding_units(dtype):
    z, rows = table(dtype)
    eps, tiny = float(np.finfo(dtype).eps), float(np.finfo(dtype).tiny)
    for k, row in enumerate(rows):
        own = np.isin(z, arguments(dtype, k))
        for times, (got, bound) in enumerate(zip(row, BOUNDS, strict=True)):
            assert got.dtype == dtype
            for value, at in zip(got[own].tolist(), z[own].tolist(), strict=True):
                expected = exact_derivative(at, k, times)
                # e^z may underflow to zero, or be flushed to it.
                error = abs(decimal.Decimal(value) - expected)
                assert error <= bound * eps * abs(float(expected)) + tiny, (k, times, at)


def test_the_ends_of_the_axis():
    z, rows = table(np.float64)
    ends = [int(np.flatnonzero(z == 0)[0]), -2, -1]
    for k, (values, slopes) in enumerate([(row[0][ends], row[1][ends]) for row in rows]):
        np.testing.assert_array_equal(values, [1 / math.factorial(k), 0.0, np.nan])
        # phi_k'(0) = 1/(k+1)!; at -inf a decaying mode that is gone does not come back.
        np.testing.assert_allclose(slopes, [1 / math.factorial(k + 1), 0.0, np.nan], rtol=1e-15)


def test_batches_are_their_entries_and_a_bad_one_stays_alone():
    z = np.linspace(-30.0, 3.0, 24).reshape(2, 3, 4)
    with_nan, with_inf = z.copy(), z.copy()
    with_nan[0, 0, 0], with_inf[0, 0, 0] = np.nan, -np.inf
    run = jax.jit(lambda z: [(phi(z, k), jax.grad(lambda y, k=k: jnp.sum(phi(y, k)))(z)) for k in (1, 4)])
    entry = jax.jit(lambda z: [phi(z, k) for k in (1, 4)])
    entries = [entry(at) for at in z.ravel()[::5]]
    for i, (whole, bad, slopes) in enumerate(zip(run(z), run(with_nan), run(with_inf), strict=True)):
        assert whole[0].shape == z.shape
        np.testing.assert_array_equal([found[i] for found in entries], whole[0].ravel()[::5])
        np.testing.assert_array_equal(bad[0].ravel()[1:], whole[0].ravel()[1:])
        assert np.isfinite(slopes[1]).all()


def test_a_negative_index_is_refused():
    with pytest.raises(ValueError, match="k must be at least 0, got -1"):
        phi(jnp.zeros(2), -1)
