"""Why a flow ended, and what followed it: enumerations that travel through jit and vmap, and print as words."""

from typing import Any

import diffrax
import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Bool

from lazyjax._core.checks import is_concrete


class RESULTS(diffrax.RESULTS):  # pyright: ignore
    """The reasons for the end of a flow: those of diffrax, and the collapse of the steps of a flow with kinks."""

    steps_collapsed = (
        "The step sizes collapsed: a quarter and more of the last 256 attempts were rejected, all were below a "
        "thirtieth of the longest step, and at this pace the steps that are left do not reach the end. So a flow "
        "slides along a kink, as those of ReLU units do, which adaptive steps cannot follow. Take fixed steps instead "
        "(lazyjax.gradient_descent with optax.sgd, or stepsize_controller=diffrax.ConstantStepSize() with dt0), a "
        "looser rtol, more max_steps, or a smooth activation."
    )
    kinks_unresolved = (
        "Several kinks of the model met at one time, and the order in which the flow passes them was not found. "
        "Take gradient descent with a small step instead (lazyjax.gradient_descent with optax.sgd), another rtol, or "
        "parameters w0 that no symmetry holds together."
    )


class SOLVERS(eqx.Enumeration):
    """The solvers that a flow can have been followed with."""

    closed_form = "closed form"
    tsit5 = "Tsit5"
    tangent_exponential = "TangentExponential"
    given = "given by the caller"


class Result(type(diffrax.RESULTS.successful)):  # pyright: ignore[reportGeneralTypeIssues]
    """An item of `RESULTS`: it prints as its name and message, and compares with diffrax's own items too.

    Example:
        >>> print(RESULTS.successful)
        successful
        >>> bool(RESULTS.successful == diffrax.RESULTS.successful)
        True
    """

    def __eq__(self, other: Any) -> Bool[Array, "..."]:
        return super().__eq__(_promote(other))

    def __ne__(self, other: Any) -> Bool[Array, "..."]:
        return super().__ne__(_promote(other))

    __hash__ = None  # pyright: ignore[reportAssignmentType]

    def __repr__(self) -> str:
        """Return the name and the message; for several lanes how many have which name; for a traced one its shape."""
        (value,) = jtu.tree_leaves(self)
        if not is_array(value):
            return f"traced result of shape {getattr(value, 'shape', '()')}"
        numbers, counts = np.unique(np.asarray(value), return_counts=True)
        names = {_number(item): name for name, item in RESULTS._name_to_item.items()}
        if np.ndim(value) == 0:
            name, message = names[int(numbers[0])], RESULTS[self]
            return f"{name}: {message}" if message else name
        return ", ".join(
            f"{names[int(i)]} ({count} of {np.size(value)})" for i, count in zip(numbers, counts, strict=True)
        )

    __str__ = __repr__


def is_array(value: Any) -> bool:
    """Return whether a value is an array whose entries are known."""
    return isinstance(value, np.ndarray | np.generic) or (eqx.is_array(value) and is_concrete(value))


def _number(item: Any) -> int:
    """Return the number of an item, which is its one leaf."""
    (value,) = jtu.tree_leaves(item)
    return int(value)


def _promote(item: Any) -> Any:
    return as_result(item) if isinstance(item, diffrax.RESULTS) else item


def as_result(item: Any) -> Result:
    """Return an item of diffrax's enumeration, or of ours, as a `Result`."""
    if isinstance(item, Result):
        return item
    (value,) = jtu.tree_leaves(item)
    if isinstance(item, diffrax.RESULTS):  # the same name has another number there
        value = np.asarray(PROMOTED[np.asarray(value)]) if is_array(value) else jnp.asarray(PROMOTED)[value]
    return Result(value, RESULTS)  # pyright: ignore[reportCallIssue]


PROMOTED = np.asarray([_number(RESULTS._name_to_item[name]) for name in diffrax.RESULTS._name_to_item], np.int32)
"""The number of each of diffrax's items, in their order, in `RESULTS`."""


for _name, _item in RESULTS._name_to_item.items():
    setattr(RESULTS, _name, as_result(_item))


def is_result(value: Any) -> bool:
    """Return whether a value is an item of diffrax's enumeration or of ours."""
    return isinstance(value, (diffrax.RESULTS, RESULTS))


def check_successful(result: Result, out: Any) -> Any:
    """Return what was computed; raise the message of the result unless it is successful, at run time if it is traced.

    Raises:
        equinox.EquinoxRuntimeError: the result is another than `successful`.
    """
    (value,) = jtu.tree_leaves(result)
    if is_array(value) and np.all(np.asarray(value) == _number(RESULTS.successful)):
        return out  # without a program for the comparison and the error
    return result.error_if(out, result != RESULTS.successful)


def in_words(values: Any) -> str:
    """Return a number as text; for several lanes the smallest and the largest."""
    low, high = (f"{number(np.asarray(values)):.4g}" for number in (np.min, np.max))
    return low if low == high else f"{low} to {high}"


def solver_words(item: Any) -> str:
    """Return what an item of `SOLVERS` says; for several lanes all that they say."""
    (value,) = jtu.tree_leaves(item)
    return ", ".join(SOLVERS._index_to_message[number] for number in np.unique(np.asarray(value)))
