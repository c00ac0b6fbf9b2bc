"""What the installed package promises: its version, its types, a quick import, a JAX that computes right."""

import importlib.metadata
import importlib.resources
import inspect
import subprocess
import sys

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import lazyjax as lj


def test_version_is_that_of_the_metadata():
    assert lj.__version__ == importlib.metadata.version("lazyjax")


def test_types_are_shipped():
    assert importlib.resources.files("lazyjax").joinpath("py.typed").is_file()


def test_import_leaves_heavy_libraries_alone():
    heavy = ["matplotlib", "xarray", "pandas", "sklearn", "tyro", "netCDF4", "h5netcdf", "flax"]
    code = f"import sys, lazyjax; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[]"


def test_import_leaves_the_configuration_of_jax_alone():
    code = (
        "import jax; names = ['jax_enable_x64', 'jax_numpy_dtype_promotion', 'jax_compilation_cache_dir'];"
        "before = [getattr(jax.config, n) for n in names]; import lazyjax;"
        "print(before == [getattr(jax.config, n) for n in names])"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "True"


def test_every_public_name_is_documented():
    public = {name: value for name, value in vars(lj).items() if not name.startswith("_")}
    # Submodules, and the import that jaxtyping's hook adds, are not names of ours.
    undocumented = [n for n, value in public.items() if not inspect.ismodule(value) and not value.__doc__]
    assert undocumented == []


@pytest.mark.parametrize(("dtype", "n"), [(jnp.float64, 16_385), (jnp.float32, 32_769)])
def test_this_jax_compiles_vmapped_reductions_right(dtype, n):
    # jax issue 39103: jax 0.10.2 gets the last rows wrong on CPU, silently; pyproject.toml excludes it.
    index = jnp.arange(n, dtype=dtype)
    rows = jnp.stack([index, jnp.zeros_like(index), jnp.zeros_like(index)], axis=1)
    matrix = jnp.eye(3, dtype=dtype)

    @jax.default_matmul_precision("highest")
    def square_norms(rows):
        return jax.vmap(lambda row: jnp.sum((matrix @ row) ** 2))(rows)

    expected = np.arange(n, dtype=np.float64) ** 2
    eps = float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(jax.jit(square_norms)(rows), expected, rtol=4 * eps)
    np.testing.assert_allclose(square_norms(rows), expected, rtol=4 * eps)


def test_this_jax_compiles_derivatives_of_vmapped_convolutions_right():
    # Up to 0.8.0 this was wrong by 100 % on CPU, silently, for directions that are constants; hence the lower bound.
    keys = jr.split(jr.key(0), 5)
    w, v = (
        {"k": jr.normal(a, (4, 1, 3, 3)), "b": jr.normal(b, (4, 1, 1))}
        for a, b in ((keys[0], keys[1]), (keys[2], keys[3]))
    )
    x = jr.normal(keys[4], (6, 1, 8, 8))

    def one(w, x):
        return jax.lax.conv_general_dilated(x[None], w["k"], (1, 1), "VALID")[0] + w["b"]

    def slope(w):
        return jax.jvp(lambda w: jax.vmap(lambda x: one(w, x))(x), (w,), (v,))[1]

    expected = slope(w)
    np.testing.assert_allclose(jax.jit(slope)(w), expected, rtol=0, atol=1e-12 * float(jnp.max(jnp.abs(expected))))
