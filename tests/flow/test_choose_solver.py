"""What lanes share, and what flows do at the edges of their arguments."""

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lazyjax as lj
import problems
from helpers import relative_error
from lazyjax._core.cost import ATTEMPTS, cheapest_rank, dense_cost, method_cost
from lazyjax.flow.choose_solver import _measure_stiffness
from lazyjax.flow.field import ScaledObjective

H, W0, LOSS = problems.centered(1, n=12, d=4, width=20)[:3]


def test_lanes_over_alpha_share_one_eigendecomposition():
    """No array with the eigenvectors' shape carries a lane axis: memory and set-up are those of one flow."""

    def lane(alpha):
        return lj.gradient_flow(H, LOSS, W0, jnp.asarray(np.array([0.0, 1.0])), alpha=alpha, throw=False).loss

    program = str(jax.make_jaxpr(jax.vmap(lane))(jnp.asarray(np.array([1.0, 10.0, np.inf]))))
    assert "f64[12,12]" in program
    assert "f64[3,12,12]" not in program


@pytest.mark.parametrize("solver", [diffrax.Tsit5(), lj.TangentExponential()])
def test_a_start_that_is_stationary_stays(solver):
    at_target, ts = lj.square_loss(jnp.asarray(np.zeros(12))), jnp.asarray(np.array([0.0, np.inf]))
    flow = lj.gradient_flow(H, at_target, W0, ts, solver=solver)
    np.testing.assert_array_equal(flow.outputs, 0)


def test_the_derivative_by_the_start_passes_through_an_output_that_is_zero():
    """The first output is alpha h(w0): zero for a centered model, but not its derivative by w0."""

    def first(w):
        ts, solver = jnp.asarray(np.array([0.0, 1e-3])), diffrax.Euler()
        options = {"solver": solver, "dt0": 1e-3, "stepsize_controller": diffrax.ConstantStepSize(), "max_steps": 2}
        return lj.gradient_flow(H, LOSS, w, ts, alpha=3.0, **options).outputs[0].sum()

    exact, found = jax.jit(lambda w: (jax.grad(lambda w: 3 * H(w).sum())(w), jax.grad(first)(w)))(W0)
    assert relative_error(found, exact) < 1e-12


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
    h, ones = lj.on_data(lambda w, x: x * w, jnp.asarray(1.0 / np.arange(1.0, 301.0))), jnp.asarray(np.ones(300))
    loss = lj.square_loss(ones, mean=False)
    size, _, values, counts = _measure_stiffness(ScaledObjective.of(h, loss, ones, 1.0, False))
    values, counts = np.asarray(values), np.asarray(counts)
    assert size == 300
    np.testing.assert_allclose(values[0], 1.0, rtol=1e-6)
    for j in (10, 30, 100):
        found = float(values[np.searchsorted(counts, j)])
        assert (2.0 * j) ** -2 < found < (j / 2.0) ** -2


@pytest.mark.parametrize("scale", [1.0, 0.0])
def test_a_kernel_with_one_eigenvalue_is_measured(scale):
    """The Krylov space ends at once, and goes on from another vector than the one it began with."""
    one = jnp.asarray(np.ones(4, np.float32))
    h, loss = (
        lj.on_data(lambda w, x: x * w, jnp.asarray(scale * np.ones(4, np.float32))),
        lj.square_loss(one, mean=False),
    )
    _, _, values, counts = _measure_stiffness(ScaledObjective.of(h, loss, one, 1.0, False))
    np.testing.assert_allclose(values, scale, rtol=1e-5)
    np.testing.assert_allclose(counts[-1], 4, rtol=1e-5)


def test_a_kernel_of_low_rank_has_no_stiffness_where_it_is_zero_even_without_an_end():
    """A warning of 0 inf, for the eigenvalues that rounding has left below zero, would be an error here."""
    directions = jnp.asarray(np.random.default_rng(0).normal(size=8))
    flow = lj.gradient_flow(
        lambda w: jnp.tanh(w) * directions, lj.square_loss(jnp.zeros(8)), jnp.ones(1), jnp.array([0.0, jnp.inf])
    )
    np.testing.assert_allclose(flow.outputs[-1], 0, atol=1e-5)
