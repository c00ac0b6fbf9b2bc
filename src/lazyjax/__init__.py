"""How lazily does a model train?

A model is any JAX function `h(w) -> outputs` of a pytree of parameters. lazyjax follows its gradient flow
and that of its tangent model at any output scale, from feature learning to the lazy limit, computes its
tangent kernel, and tells how far apart the two can be.

    import lazyjax as lj

Start with `lj.diagnose` for one answer, with `lj.compare` for the two flows, with `lj.gram` for the kernel.
"""

from importlib.metadata import version as _version

import lazy_loader as _lazy_loader

# What `import lazyjax as lj` offers stands in `__init__.pyi`; a package is loaded when something of it is first used.
__getattr__, __dir__, __all__ = _lazy_loader.attach_stub(__name__, __file__)

__version__ = _version("lazyjax")
