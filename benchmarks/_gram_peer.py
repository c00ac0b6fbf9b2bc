"""The side of neural-tangents 0.6.5 in `gram.py`, which starts this file with the python of `peer_env.sh`.

Each of its four implementations, jitted, with `vmap_axes=0` (without it they are up to 160 times slower) and
`trace_axes=()`. The library is archived; what has moved in jax since then is put back by `load`, results as they were.
"""

import sys
import types
from importlib.metadata import version
from typing import Any

import jax
from jax.extend import source_info_util
from jax.interpreters import ad

import _gram_worker
from _gram_worker import Contender


def load() -> Any:
    """The library, able to run on jax 0.5.3."""
    # This part alone needs TensorFlow, and nothing here needs this part.
    sys.modules["neural_tangents.experimental"] = types.ModuleType("neural_tangents.experimental")
    # Names gone since jax 0.4.26.
    for name, value in {"source_info_util": source_info_util, "config": jax.config}.items():
        if not hasattr(ad, name):
            setattr(ad, name, value)
    import neural_tangents
    from neural_tangents._src import empirical

    # AUTO chooses by a count of operations, which came in a list before jax 0.5.
    empirical._get_flops = operations
    return neural_tangents


def operations(f: Any, optimize: bool, *args: Any, **options: Any) -> float:
    """Return what XLA counts for f(*args), before or after its optimizations."""
    lowered = jax.jit(f).lower(*args, **options)
    return ((lowered.compile() if optimize else lowered).cost_analysis() or {})["flops"]


def prepare(kind: str) -> Contender:
    library = load()
    options = {"trace_axes": (), "vmap_axes": 0, "implementation": library.NtkImplementation[kind]}

    def make(f: Any) -> Any:
        gram = library.empirical_ntk_fn(f, **options)
        return lambda w, x: gram(x, None, w)

    versions = {name: version(name) for name in ("jax", "jaxlib", "numpy", "neural-tangents")}
    return Contender(make, axes=(0, 2, 1, 3), versions=versions)


if __name__ == "__main__":
    _gram_worker.serve(prepare)
