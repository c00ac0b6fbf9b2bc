"""phi functions against their definition in 160 decimal digits: values and two derivatives, both precisions."""

import decimal
import functools
import math

import equinox as eqx
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


def arguments(dtype, k):
    """From -1e8 to 60; close to 0, and on both sides of |z| = k, where phi changes its formula."""
    border = k * (1 + np.linspace(-1e-2, 1e-2, 11))
    z = np.concatenate([-np.logspace(8, -12, 81), [0.0, -0.0], np.logspace(-12, math.log10(60), 41), -border, border])
    return np.unique(z.astype(dtype))


# Largest errors, in rounding units, all of them next to |z| = k: 2.0, 8.0 and 18; for negative z 1.2, 3.7 and 11.
@pytest.mark.parametrize(("times", "bound"), [(0, 3), (1, 10), (2, 25)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_values_and_derivatives_are_right_to_a_few_rounding_units(dtype, times, bound):
    for k in range(6):
        f = functools.partial(phi, k=k)
        for _ in range(times):
            f = jax.grad(f)
        z = arguments(dtype, k)
        got = np.asarray(jax.jit(jax.vmap(f))(jnp.asarray(z)))
        assert got.dtype == dtype
        tiny = float(np.finfo(dtype).tiny)
        for value, at in zip(got.tolist(), z.tolist(), strict=True):
            expected = exact_derivative(at, k, times)
            # e^z may underflow to zero, or be flushed to it.
            error = abs(decimal.Decimal(value) - expected)
            assert error <= bound * float(np.finfo(dtype).eps) * abs(float(expected)) + tiny, (k, at)


def test_the_ends_of_the_axis():
    ends = jnp.array([0.0, -jnp.inf, jnp.nan])
    for k in range(6):
        values, slopes = (np.asarray(f(ends, k)) for f in (phi, eqx.filter_vmap(jax.grad(phi), in_axes=(0, None))))
        np.testing.assert_array_equal(values, [1 / math.factorial(k), 0.0, np.nan])
        # phi_k'(0) = 1/(k+1)!; at -inf a decaying mode that is gone does not come back.
        np.testing.assert_allclose(slopes, [1 / math.factorial(k + 1), 0.0, np.nan], rtol=1e-15)


def test_batches_are_their_entries_and_a_bad_one_stays_alone():
    z = jnp.linspace(-30.0, 3.0, 24).reshape(2, 3, 4)
    for k in (1, 4):
        whole = phi(z, k)
        assert whole.shape == z.shape
        np.testing.assert_array_equal([phi(entry, k) for entry in z.ravel()[::5]], whole.ravel()[::5])
        with_bad = phi(z.at[0, 0, 0].set(jnp.nan), k)
        np.testing.assert_array_equal(with_bad.ravel()[1:], whole.ravel()[1:])
        slope = jax.grad(lambda y, k=k: jnp.sum(phi(y, k)))(z.at[0, 0, 0].set(-jnp.inf))
        assert bool(jnp.all(jnp.isfinite(slope)))


def test_a_negative_index_is_refused():
    with pytest.raises(ValueError, match="k must be at least 0, got -1"):
        phi(jnp.zeros(2), -1)
