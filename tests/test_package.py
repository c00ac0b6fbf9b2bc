"""What the installed package promises: its version, its types, a quick import, a JAX that computes right."""

import importlib.metadata
import importlib.resources
import inspect
import os
import subprocess
import sys
from pathlib import Path

import conftest
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


def test_this_jax_compiles_right():
    """In a process of its own, compiled as a user's programs are, not as quickly as the other tests' are."""
    env = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", *conftest.QUICK_SETTINGS)}
    script = Path(__file__).with_name("this_jax.py")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120, env=env, check=False)
    assert done.returncode == 0, done.stderr
