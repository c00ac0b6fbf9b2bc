"""Why a flow ended, and what followed it: enumerations that travel through jit and vmap."""

from typing import Any

import diffrax
import equinox as eqx
import jax.tree_util as jtu
from jaxtyping import Array, Bool


class RESULTS(diffrax.RESULTS):  # pyright: ignore
    """diffrax's, and the collapse of the steps of a flow with kinks."""

    steps_collapsed = (
        "The step sizes collapsed: a quarter and more of the last 256 attempts were rejected, all were below a "
        "thirtieth of the longest step, and at this pace the steps that are left do not reach the end. So a flow "
        "slides along a kink, as those of ReLU units do, which adaptive steps cannot follow. Take fixed steps instead "
        "(lazyjax.gradient_descent with optax.sgd, or stepsize_controller=diffrax.ConstantStepSize() with dt0), a "
        "looser rtol, more max_steps, or a smooth activation."
    )


class SOLVERS(eqx.Enumeration):
    """What a flow was followed with."""

    closed_form = "closed form"
    tsit5 = "Tsit5"
    tangent_exponential = "TangentExponential"
    given = "given by the caller"


class Result(type(diffrax.RESULTS.successful)):  # pyright: ignore[reportGeneralTypeIssues]
    """An item of `RESULTS` that also compares with diffrax's own: `flow.result == diffrax.RESULTS.successful`."""

    def __eq__(self, other: Any) -> Bool[Array, "..."]:
        return super().__eq__(_promote(other))

    def __ne__(self, other: Any) -> Bool[Array, "..."]:
        return super().__ne__(_promote(other))

    __hash__ = None  # pyright: ignore[reportAssignmentType]


def _promote(item: Any) -> Any:
    return RESULTS.promote(item) if isinstance(item, diffrax.RESULTS) else item


def as_result(item: Any) -> Result:
    """An item of diffrax's enumeration, or of ours, as a `Result`."""
    if isinstance(item, Result):
        return item
    # The one leaf of an item is its number.
    (value,) = jtu.tree_leaves(_promote(item))
    return Result(value, RESULTS)  # pyright: ignore[reportCallIssue]


def is_result(value: Any) -> bool:
    """Whether a value is an item of diffrax's enumeration or of ours."""
    return isinstance(value, (diffrax.RESULTS, RESULTS))
