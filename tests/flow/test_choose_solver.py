"""What lanes share, and what flows do at the edges of their arguments."""

import diffrax
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import lazyjax as lj
from helpers import relative_error
from lazyjax._core.cost import ATTEMPTS, cheapest_rank, dense_cost, method_cost
from lazyjax.flow.choose_solver import _measure_stiffness
from lazyjax.flow.field import ScaledObjective
from lazyjax.models.maps import on_data

KEYS = jr.split(jr.key(0), 3)
W0 = lj.models.two_layer().init(KEYS[0], d=4, width=20)
H = on_data(lj.center(lj.models.two_layer(jnp.tanh), W0), jr.normal(KEYS[1], (12, 4)))
LOSS = lj.square_loss(jr.normal(KEYS[2], (12,)))


def test_lanes_over_alpha_share_one_eigendecomposition():
    """No array with the eigenvectors' shape carries a lane axis: memory and set-up are those of one flow."""

    def lane(alpha):
        return lj.gradient_flow(H, LOSS, W0, jnp.array([0.0, 1.0]), alpha=alpha, throw=False).loss

    program = str(jax.make_jaxpr(jax.vmap(lane))(jnp.array([1.0, 10.0, jnp.inf])))
    assert "f64[12,12]" in program
    assert "f64[3,12,12]" not in program


@pytest.mark.parametrize("solver", [diffrax.Tsit5(), lj.TangentExponential()])
def test_a_start_that_is_stationary_stays(solver):
    at_target = lj.square_loss(jnp.zeros(12))
    flow = lj.gradient_flow(H, at_target, W0, jnp.array([0.0, jnp.inf]), solver=solver)
    np.testing.assert_array_equal(flow.outputs, 0)


def test_the_derivative_by_the_start_passes_through_an_output_that_is_zero():
    """The first output is alpha h(w0): zero for a centered model, but not its derivative by w0."""

    def first(w):
        return lj.gradient_flow(H, LOSS, w, jnp.array([0.0, 1e-3]), alpha=3.0, solver=diffrax.Tsit5()).outputs[0].sum()

    exact = jax.tree.map(lambda leaf: 3 * leaf, jax.grad(lambda w: H(w).sum())(W0))
    assert relative_error(jax.grad(first)(W0), exact) < 1e-12


def test_lanczos_is_for_many_outputs_and_short_flows():
    """nk = 2560 of a small MLP on digits is worth an eigendecomposition, 9000 over a short horizon is not."""
    assert method_cost(2.3e6, 2560, 64, stiffness=1e5)[0] == "dense"
    assert method_cost(2.3e6, 2560, 64, stiffness=jnp.inf)[0] == "dense"
    assert method_cost(2.3e6, 9000, 64, stiffness=100.0)[0] == "lanczos"
    assert method_cost(2.3e6, 20_000, 64)[0] == "lanczos"


def test_a_low_rank_is_for_many_outputs_of_which_few_are_stiff():
    """lambda_r T = 1e5 (r / 30 + 1)^-2: the rank at which both the products and the steps are few."""
    falling = lambda r: 1e5 * (r / 30 + 1) ** -2.0
    rank, cost = cheapest_rank(2.3e6, 2560, falling)
    assert rank is not None
    for other in (rank // 2, 2 * rank):
        setup, step = dense_cost(2.3e6, 2560, other)
        assert cost < setup + step * (ATTEMPTS + falling(other) / 3.3)
    assert cost < method_cost(2.3e6, 2560, 64)[1] / 2
    # Where nothing falls a low rank leaves all the stiffness; few outputs are no work at all.
    assert cheapest_rank(2.3e6, 2560, lambda r: 1e8)[1] > method_cost(2.3e6, 2560, 64)[1]
    assert cheapest_rank(2.3e6, 100, falling) == (None, np.inf)


def test_the_density_of_the_eigenvalues_is_estimated():
    """Of 300 eigenvalues that fall as 1/j^2, how many are above the j-th: within a factor of 2 for j = 10 to 100."""
    scales = 1.0 / jnp.arange(1.0, 301.0)
    h = on_data(lambda w, x: x * w, scales)
    loss = lj.square_loss(jnp.ones(300), mean=False)
    size, _, values, counts = _measure_stiffness(ScaledObjective.of(h, loss, jnp.ones(300), 1.0, False))
    assert size == 300
    np.testing.assert_allclose(values[0], 1.0, rtol=1e-6)
    for j in (10, 30, 100):
        found = float(values[np.searchsorted(counts, j)])
        assert (2.0 * j) ** -2 < found < (j / 2.0) ** -2


@pytest.mark.parametrize("scale", [1.0, 0.0])
def test_a_kernel_with_one_eigenvalue_is_measured(scale):
    """The Krylov space ends at once, and goes on from another vector than the one it began with."""
    h, loss = lambda w: scale * w, lj.square_loss(jnp.zeros(4, jnp.float32), mean=False)
    _, _, values, counts = _measure_stiffness(ScaledObjective.of(h, loss, jnp.ones(4, jnp.float32), 1.0, False))
    np.testing.assert_allclose(values, scale, rtol=1e-5)
    np.testing.assert_allclose(counts[-1], 4, rtol=1e-5)
