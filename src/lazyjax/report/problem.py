"""What a report is about: a model and its tangent model on the data, and what they are to learn there."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array

from lazyjax._core.checks import check_inputs
from lazyjax._core.types import Model, Params
from lazyjax.flow.start import check_start
from lazyjax.laziness.compare import measure_kernel_drift
from lazyjax.losses.loss import Loss
from lazyjax.losses.targets import Accuracy, make_task
from lazyjax.models.maps import OnData, center, on_data
from lazyjax.models.tangent import Tangent, linearize

PROBE_OUTPUTS = 320
"""The drift of the kernel is measured on as many training samples as have at most this many outputs."""


class Problem(eqx.Module):
    """The model and its tangent model on the data, with the losses; what every part of a report is handed.

    Attributes:
        model: The centered model on the training data, h(w) = f(w, x) - f(w0, x).
        loss, accuracy: On the training data; no accuracy if the targets are not classes.
        test_model: The model on the test data, f(w, x_test): only its changes are asked for. None without test data.
        test_loss, test_accuracy: On the test data.
        probe_model: The model on the training samples that the drift of the kernel is measured on; None if the change
            of Dh cannot be followed through it.
        loss_name: What to call the loss.
        shape: Of the training outputs, (n,) or (n, k).
    """

    model: OnData
    loss: Loss
    accuracy: Accuracy | None
    test_model: OnData | None
    test_loss: Loss | None
    test_accuracy: Accuracy | None
    probe_model: OnData | None
    loss_name: str = eqx.field(static=True)
    shape: tuple[int, ...] = eqx.field(static=True)

    @property
    def w0(self) -> Params:
        """The start: the very arrays that the model was centered at, so that it declares to be zero there.

        A second copy would come out of `jit` as other tracers, and the flows would start from rounding.
        """
        return self.model.f.w0  # pyright: ignore[reportFunctionMemberAccess]

    @property
    def tangent(self) -> Tangent:
        """The tangent model on the training data.

        Linearized anew in each compiled program that asks for it: a `Tangent` handed from one program to another would
        make each of them a new program for every report.
        """
        return linearize(self.model, self.w0)

    @property
    def test_tangent(self) -> Tangent:
        """The tangent model on the test data, for its changes; as `tangent`."""
        assert self.test_model is not None
        return linearize(self.test_model, self.w0)

    def measure(self, outputs: Array, test_outputs: Array | None) -> dict[str, Array]:
        """Return losses and accuracies along a flow, each (time,): those for which there are data and classes."""
        measures: dict[str, tuple[Callable[[Array], Array] | None, Array | None]] = {
            "train_loss": (self.loss, outputs),
            "test_loss": (self.test_loss, test_outputs),
            "train_accuracy": (self.accuracy, outputs),
            "test_accuracy": (self.test_accuracy, test_outputs),
        }
        return {
            name: jax.vmap(function)(values).astype(outputs.dtype)
            for name, (function, values) in measures.items()
            if function is not None and values is not None
        }


def make_problem(
    f: Model, w0: Params, x: Any, y: Any, loss: str | Callable[[Array], Loss], test: tuple[Any, Any] | None
) -> tuple[Problem, list[str]]:
    """Check what `diagnose` is given and make its problem, with notes on what cannot be measured.

    Raises:
        ValueError, TypeError: a bad argument.
    """
    x, shape = check_inputs(f, w0, x, "x")
    train_loss, accuracy = make_task(loss, y, shape, "y")
    train_loss.check(shape)
    test_model = test_loss = test_accuracy = None
    if test is not None:
        x_test, test_shape = check_inputs(f, w0, test[0], "x_test")
        test_loss, test_accuracy = make_task(loss, test[1], test_shape, "y_test", like=y)
        test_model = on_data(f, x_test)
    model = on_data(center(f, w0), x)
    check_start(model, train_loss, w0, 1.0, rtol=1e-6)
    probe_model, notes = _make_probe(f, w0, x, outputs=shape[1] if len(shape) > 1 else 1)
    name = loss if isinstance(loss, str) else type(train_loss).__name__
    problem = Problem(
        model, train_loss, accuracy, test_model, test_loss, test_accuracy, probe_model, name, tuple(shape)
    )
    return problem, notes


def _make_probe(f: Model, w0: Params, x: Array, *, outputs: int) -> tuple[OnData | None, list[str]]:
    """Return the model on the first samples if `finite_jvp` can go through its derivative, else a note why not."""
    probe = on_data(f, x[: max(1, PROBE_OUTPUTS // outputs)])
    change = jtu.tree_map(jnp.zeros_like, eqx.filter(w0, eqx.is_inexact_array))
    try:
        eqx.filter_eval_shape(measure_kernel_drift, probe, w0, change, jnp.ones(()))
    except ValueError as error:
        return None, [f"the drift of the kernel is not measured: {error}"]
    return probe, []
