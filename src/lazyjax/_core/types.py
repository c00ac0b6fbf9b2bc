"""Type aliases that all packages share."""

from collections.abc import Callable
from typing import Any

from jaxtyping import Array, Float, PyTree, Real

Params = PyTree
"""Parameters: any pytree; its real floating arrays are the p coordinates, the rest stays as it is."""

Outputs = Float[Array, "n"] | Float[Array, "n k"]
"""What a model returns: one row (or one number) per sample."""

Model = Callable[..., Any]
"""A model h: parameters to outputs, the data inside; or f: (parameters, inputs) to outputs."""

RealScalar = float | int | Real[Array, "..."]
"""A number or a scalar array, perhaps traced; the checks refuse other shapes with a message of their own."""
