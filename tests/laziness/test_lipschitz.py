"""Lipschitz constants: along flows against dense Jacobians and the bounds that use them, on balls, local, refusals."""

import functools

import equinox as eqx
import jax
import jax.flatten_util as jfu
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import pytest

import lazyjax as lj
import problems
from lazyjax.laziness.jacobian_change import differential_change
from lazyjax.laziness.lipschitz import (
    _ACTIVATION_BOUNDS,
    lipschitz_along,
    local_lipschitz,
    path_constants,
    path_slack,
    sampled_lipschitz_lower,
    two_layer_lipschitz,
)
from lazyjax.models.maps import on_data
from lazyjax.theory import bounds
from measured_net import measured_net

CENTERED = measured_net()
N = CENTERED.target.size
TIMES = jnp.array([0.0, 0.1, 0.5, 2.0, 5.0])


@functools.cache
def flow_at(alpha):
    return lj.gradient_flow(
        CENTERED.h, CENTERED.loss, CENTERED.w0, TIMES, alpha=alpha, save=("outputs", "displacement", "params")
    )


derivative = jax.jit(jax.jacrev(CENTERED.h))


@functools.cache
def along(alpha):
    return lipschitz_along(CENTERED.h, CENTERED.loss, CENTERED.w0, flow_at(alpha))


def jacobian(w):
    rows = jtu.tree_leaves(derivative(w))
    return np.concatenate([np.asarray(row).reshape(N, -1) for row in rows], axis=1) / N**0.5


def at_time(tree, i):
    return jtu.tree_map(lambda leaf: jnp.asarray(np.asarray(leaf)[i]), tree)


def distance(w):
    squares = [np.sum((np.asarray(w[k]) - np.asarray(CENTERED.w0[k])) ** 2) for k in "ab"]
    return float(np.sqrt(sum(squares)))


# ---- along a flow ----


def test_along_a_flow_they_are_what_dense_jacobians_give():
    flow = flow_at(1.0)
    found = along(1.0)
    assert found.failure == 0
    assert f"Lip(Dh) = {float(found.lip_dh):.4g}" in str(found)
    assert repr(found) == str(found)
    start = jacobian(CENTERED.w0)
    for i in range(TIMES.size):
        w = at_time(flow.params, i)
        there = jacobian(w)
        np.testing.assert_allclose(found.dh_norm[i], np.linalg.norm(there, 2), rtol=1e-9)
        if i:
            np.testing.assert_allclose(
                found.dh_change_ratio[i], np.linalg.norm(there - start, 2) / distance(w), rtol=1e-6
            )
    assert float(found.dh_change_ratio[0]) == 0.0
    np.testing.assert_allclose(found.lip_h, jnp.max(found.dh_norm))
    np.testing.assert_allclose(found.lip_dh, jnp.max(found.dh_change_ratio))


def test_they_make_theorem_2_3_hold_for_the_flow_and_not_by_far():
    for alpha in (3.0, 100.0):
        found = along(alpha)
        both = lj.compare(CENTERED.h, CENTERED.loss, CENTERED.w0, TIMES[:3], alpha=alpha)
        bound = bounds.theorem_2_3(
            alpha=alpha,
            horizon=TIMES[1:3],
            residual_norm=np.linalg.norm(CENTERED.target) / N**0.5,
            lip_h=found.lip_h,
            lip_dh=found.lip_dh,
        )
        for name in ("output_gap", "displacement_norm"):
            measured, limit = np.asarray(getattr(both, name)[1:]), np.asarray(getattr(bound, name))
            assert np.all(measured <= limit)
            # It grows as the square of the time.
            assert limit[0] <= 20 * measured[0]


def test_large_scales_keep_their_digits_in_float32_and_tend_to_the_limit():
    limit = along(jnp.inf)
    w0, x, target = jtu.tree_map(lambda leaf: leaf.astype(jnp.float32), (CENTERED.w0, CENTERED.x, CENTERED.target))
    h = on_data(lj.center(lj.models.two_layer(jnp.tanh), w0), x)
    loss = lj.square_loss(target)
    single = lj.gradient_flow(h, loss, w0, TIMES.astype(jnp.float32), alpha=1e7, save=("displacement",))
    found = lipschitz_along(h, loss, w0, single)
    assert found.lip_dh.dtype == jnp.float32
    np.testing.assert_allclose(found.dh_change_ratio, limit.dh_change_ratio, rtol=2e-4)
    np.testing.assert_allclose(found.dh_norm, limit.dh_norm, rtol=1e-5)
    # The limit is that of D2h along the displacement.
    u = jfu.ravel_pytree(at_time(flow_at(jnp.inf).displacement, 3))[0]
    flat, unravel = jfu.ravel_pytree(CENTERED.w0)
    tensor, u = np.asarray(jax.jit(jax.hessian(lambda v: CENTERED.h(unravel(v))))(flat)), np.asarray(u)
    expected = np.linalg.norm(tensor @ (u / np.linalg.norm(u)), 2) / N**0.5
    np.testing.assert_allclose(limit.dh_change_ratio[3], expected, rtol=1e-7)


def test_the_change_of_the_differential_is_that_of_dense_jacobians():
    flat, unravel = jfu.ravel_pytree(CENTERED.w0)
    u, v, r = problems.normal(5, flat.size), problems.normal(6, flat.size), problems.normal(7, N)

    @jax.jit
    def products(eps):
        change, transpose = differential_change(CENTERED.h, CENTERED.w0, unravel(u), eps)
        return change(unravel(v)), jfu.ravel_pytree(transpose(r))[0]

    @jax.jit
    def expected(eps):
        dense = jax.jacrev(lambda c: CENTERED.h(unravel(c)))
        limit = jnp.einsum("npq,q->np", jax.hessian(lambda c: CENTERED.h(unravel(c)))(flat), u)
        return jnp.where(eps > 0.1, (dense(flat + eps * u) - dense(flat)) / jnp.maximum(eps, 0.1), limit)

    for eps in (0.0, 1e-12, 0.3):
        (forward, backward), matrix = products(jnp.asarray(eps)), np.asarray(expected(jnp.asarray(eps)))
        np.testing.assert_allclose(forward, matrix @ np.asarray(v), rtol=1e-7)
        np.testing.assert_allclose(backward, np.asarray(r) @ matrix, rtol=1e-7, atol=1e-9)


def test_their_core_runs_over_flows_at_several_scales_at_once():
    """One program with the flows' scales and displacements as lanes; `path_slack` says what the norms may lack."""
    alphas = (3.0, jnp.inf)
    paths = jtu.tree_map(lambda *leaves: jnp.stack(leaves), *(flow_at(alpha).displacement for alpha in alphas))
    keys = jr.split(jr.key(0), TIMES.size)
    core = functools.partial(path_constants, CENTERED.h, CENTERED.loss, CENTERED.w0)
    found = jax.jit(jax.vmap(lambda u, eps: core(u, eps, keys)))(paths, 1 / jnp.asarray(alphas))
    assert path_slack(N, TIMES.size) == (1.0, 0.0)
    for i, alpha in enumerate(alphas):
        one = along(alpha)
        np.testing.assert_allclose(found[0][i], one.dh_norm, rtol=1e-10)
        np.testing.assert_allclose(found[1][i], one.dh_change_ratio, rtol=1e-10)


def test_with_many_outputs_they_are_from_above():
    x = problems.normal(0, 90, 3)
    h = on_data(lj.center(lj.models.two_layer(jnp.tanh), CENTERED.w0), x)
    loss = lj.square_loss(jnp.sin(x[:, 0]), mean=False)
    flow = lj.gradient_flow(h, loss, CENTERED.w0, jnp.array([0.0, 0.01]), save=("displacement", "params"))
    found = lipschitz_along(h, loss, CENTERED.w0, flow)
    rows = jtu.tree_leaves(jax.jit(jax.jacrev(h))(at_time(flow.params, 1)))
    truth = np.linalg.norm(np.concatenate([np.asarray(row).reshape(90, -1) for row in rows], axis=1), 2)
    assert found.failure == 1e-6
    assert truth < found.dh_norm[1] < 1.05 * truth


# ---- on balls ----


@pytest.mark.parametrize("activation", [jnp.tanh, jax.nn.sigmoid, jax.nn.softplus, jax.scipy.special.erf, jnp.sin])
def test_bounds_of_activations_are_attained(activation):
    z = jnp.asarray(np.linspace(-6, 6, 120_001))
    derivatives = jax.jit(jax.vmap(lambda s: (jax.grad(activation)(s), jax.grad(jax.grad(activation))(s))))
    slope, curvature = (np.abs(values).max() for values in derivatives(z))
    known = _ACTIVATION_BOUNDS[activation]
    np.testing.assert_allclose(known, [slope, curvature], rtol=3e-3)
    assert known.slope >= slope * (1 - 1e-12)
    assert known.curvature >= curvature * (1 - 1e-9)


@pytest.mark.parametrize(("radius", "looseness"), [(0.1, 3.0), (2.0, 8.0)])
def test_analytic_constants_are_above_sampled_ones_and_those_along_flows(radius, looseness):
    constants = two_layer_lipschitz(CENTERED.f, CENTERED.w0, CENTERED.x)
    sampled = sampled_lipschitz_lower(CENTERED.h, CENTERED.loss, CENTERED.w0, radius, samples=8)
    for above, below in (
        (constants.lip_h(radius), sampled.lip_h_lower),
        (constants.lip_dh(radius), sampled.lip_dh_lower),
    ):
        assert below <= above <= looseness * below
    flow = flow_at(3.0)
    moved = max(distance(at_time(flow.params, i)) for i in range(TIMES.size))
    assert along(3.0).lip_h <= constants.lip_h(moved)
    assert along(3.0).lip_dh <= constants.lip_dh(moved)


def test_analytic_constants_are_sharp_for_one_neuron_on_one_input():
    """sigma = sin with b.x = 3 pi / 4: |sigma'| = |sigma''| = 0.71, so the constants are 1.4 too large, and no more."""
    w0 = {"a": jnp.array([2.0]), "b": jnp.array([[0.75 * np.pi]])}
    f, x = lj.models.two_layer(jnp.sin), jnp.ones((1, 1))
    constants = two_layer_lipschitz(f, w0, x)
    hessian = jax.jit(jax.hessian(lambda v: f({"a": v[:1], "b": v[1:][None]}, x)[0]))
    tensor = hessian(jnp.array([2.0, 0.75 * np.pi]))
    np.testing.assert_allclose(constants.lip_dh(0.0), np.linalg.norm(tensor, 2) * 2**0.5, rtol=1e-12)
    np.testing.assert_allclose(constants.dh_norm, np.hypot(np.sin(0.75 * np.pi), 2 * np.cos(0.75 * np.pi)), rtol=1e-12)
    rescaled = two_layer_lipschitz(lj.rescale(f, -3.0), w0, x, bounds=(1.0, 1.0))
    np.testing.assert_allclose(rescaled.lip_dh(0.5), 3 * constants.lip_dh(0.5), rtol=1e-12)
    np.testing.assert_allclose(rescaled.lip_h(0.5), 3 * constants.lip_h(0.5), rtol=1e-12)


def test_samples_find_the_constants_of_a_cubic_model():
    """h = w^3 / 6 on a ball of radius 1/2 around 1 in one dimension: Dh = w^2 / 2, D2h = w, largest at its edge."""
    found = sampled_lipschitz_lower(lambda w: w**3 / 6, lj.square_loss(jnp.zeros(1)), jnp.ones(1), 0.5)
    np.testing.assert_allclose([found.lip_h_lower, found.lip_dh_lower], [1.125, 1.5], rtol=1e-12)


# ---- the local constant ----


@pytest.mark.parametrize(("slope", "sigma"), [(0.0, 1.0), (1.0, 4.0), (30.0, 0.01), (0.001, 1e4)])
def test_the_local_constant_solves_its_equation(slope, sigma):
    """l(r) = 1.5 + slope r: L^2 = 1.5 L + slope sigma / 2."""
    found = local_lipschitz(lambda r: 1.5 + slope * r, sigma)
    np.testing.assert_allclose(found, 0.75 + (0.75**2 + slope * sigma / 2) ** 0.5, rtol=1e-12)
    assert 1.5 + slope * sigma / (2 * found) <= found


def test_the_local_constant_at_a_jump_is_where_the_ball_ends():
    found = local_lipschitz(lambda r: 1.0 if r <= 0.1 else 50.0, 2.0)
    np.testing.assert_allclose(found, 2.0 / 0.2, rtol=1e-12)
    assert local_lipschitz(lambda r: 0.0, 1.0) < 1e-12


def test_the_local_constant_of_a_two_layer_net_is_smaller_than_on_the_unit_ball():
    constants = two_layer_lipschitz(CENTERED.f, CENTERED.w0, CENTERED.x)
    sigma = float(lj.singular_values(lj.linearize(CENTERED.h, CENTERED.w0), CENTERED.loss).smallest)
    local = local_lipschitz(constants.lip_dh, sigma)
    np.testing.assert_allclose(constants.lip_dh(sigma / (2 * local)), local, rtol=1e-10)
    assert constants.lip_dh(0.0) < local < constants.lip_dh(1.0)


# ---- refusals ----


def test_bad_arguments_are_refused():
    w0, x, h, loss = CENTERED.w0, CENTERED.x, CENTERED.h, CENTERED.loss
    flow = flow_at(1.0)
    bare = eqx.tree_at(lambda f: f.displacement, flow, None)
    with pytest.raises(ValueError, match="flow must hold displacements"):
        lipschitz_along(h, loss, w0, bare)
    with pytest.raises(TypeError, match="f must be a two_layer net"):
        two_layer_lipschitz(lj.models.mlp(), w0, x)
    with pytest.raises(ValueError, match="bounds must be given for the activation"):
        two_layer_lipschitz(lj.models.two_layer(), w0, x)
    for wrong in ((1.0, jnp.inf), (-1.0, 1.0)):
        with pytest.raises(ValueError, match="bounds must be positive and finite"):
            two_layer_lipschitz(lj.models.two_layer(), w0, x, bounds=wrong)
    for radius in (0.0, float("inf")):
        with pytest.raises(ValueError, match="radius must be positive and finite"):
            sampled_lipschitz_lower(h, loss, w0, radius)
    with pytest.raises(ValueError, match="samples must be at least 1"):
        sampled_lipschitz_lower(h, loss, w0, 1.0, samples=0)
    with pytest.raises(ValueError, match="sigma_min must be positive"):
        local_lipschitz(lambda r: 1.0, 0.0)
    with pytest.raises(ValueError, match="lip_dh must give numbers"):
        local_lipschitz(lambda r: -1.0, 1.0)
