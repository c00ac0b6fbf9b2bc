"""Settings of all tests: float64, no silent promotion, one key a test."""

import gc
import os
import zlib

# Before anything imports matplotlib: no test opens a window.
os.environ["MPLBACKEND"] = "Agg"

import jax
import jax.random as jr
import pytest

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(autouse=True, scope="module")
def _forget_programs():
    """Compiled programs of one file go before the next one begins.

    On a CPU each takes several memory maps, of which Linux allows a process 65530: XLA crashes without any left.
    """
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture(autouse=True)
def _dtype_promotion(request):
    """Strict everywhere but in tests that say why they cannot be: marked `standard_promotion`."""
    if request.node.get_closest_marker("standard_promotion") is None:
        yield
    else:
        with jax.numpy_dtype_promotion("standard"):
            yield


@pytest.fixture
def getkey(request):
    """A new random key a call; the same ones at every run of the same test, in any order of the tests."""
    key = jr.key(zlib.crc32(request.node.name.encode()))

    def next_key():
        nonlocal key
        key, out = jr.split(key)
        return out

    return next_key
