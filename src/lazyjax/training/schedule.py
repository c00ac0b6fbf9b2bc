"""Learning rates that optax does not have."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import optax


def inverse_time_decay(init_value: float, beta: float, *, steps_per_epoch: Any) -> optax.Schedule:
    r"""Learning rate $\eta_0/(1 + \beta t)$ in epoch t = 0, 1, ..., constant within an epoch, as an optax schedule.

    Args:
        init_value: $\eta_0$.
        beta: Decay per epoch.
        steps_per_epoch: Steps of an epoch, in `train` n // batch_size.

    Returns:
        A function of the number of steps taken, for example for `optax.sgd`.

    Raises:
        ValueError: beta negative, or steps_per_epoch no whole number of at least 1.

    Source:
        Chizat, Oyallon, Bach (2019), section 3.2; their code has $\beta = 1/3$.

    Example:
        >>> schedule = inverse_time_decay(1.0, 1 / 3, steps_per_epoch=10)
        >>> print(schedule(9), schedule(30))
        1.0 0.5
    """
    if not (np.isfinite(beta) and beta >= 0):
        msg = f"beta must be a decay per epoch of at least 0, got {beta}."
        raise ValueError(msg)
    if not isinstance(steps_per_epoch, (int, np.integer)) or steps_per_epoch < 1:
        msg = f"steps_per_epoch must be a whole number of at least 1, such as n // batch_size, got {steps_per_epoch!r}."
        raise ValueError(msg)

    def schedule(count: Any) -> Any:
        return init_value / (1 + beta * jnp.asarray(count // steps_per_epoch, float))

    return schedule
