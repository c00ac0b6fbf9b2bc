"""Certificates: measurements against dense algebra, every bound held and sharp somewhere, every assumption refused."""

import functools

import equinox as eqx
import jax
import jax.flatten_util as jfu
import jax.numpy as jnp
import numpy as np
import pytest

import lazyjax as lj
import problems
from lazyjax.models.maps import on_data
from lazyjax.theory import measurements
from lazyjax.theory.certify import certify
from lazyjax.theory.claims import Status
from measured_net import measured_net

P = measured_net()
H = P.h
TEST = on_data(P.f, problems.normal(9, 6, 3))
TS = jnp.asarray(np.concatenate([np.zeros(1), np.geomspace(0.01, 30, 24)]))
TIGHT = {"rtol": 1e-10, "atol": 1e-13}


@functools.cache
def certificate(alpha):
    return certify(H, P.loss, P.w0, TS, alpha=alpha, test_model=TEST, **TIGHT)


def jacobian(w, h=H):
    flat, unravel = jfu.ravel_pytree(w)
    return np.asarray(jax.jit(jax.jacrev(lambda v: h(unravel(v)).ravel()))(flat))


def start(alpha):
    return jfu.ravel_pytree(P.w0)[0], certificate(alpha)


# ---- what is measured ----


def test_the_measurements_are_those_of_dense_algebra():
    alpha, i = 30.0, 15
    flat, found = start(alpha)
    unravel = jfu.ravel_pytree(P.w0)[1]
    seen, flow = found.measurements, found.comparison.flow
    u = jfu.ravel_pytree(jax.tree.map(lambda leaf: leaf[i], flow.displacement))[0]
    w, n = flat + u / alpha, 5
    before, after = jacobian(P.w0), jacobian(unravel(w))
    values = np.linalg.svd(after / n**0.5, compute_uv=False)
    np.testing.assert_allclose([seen.path_dh_norm[i], seen.path_sigma_min[i]], values[[0, -1]], rtol=1e-7)
    distance = np.linalg.norm(u) / alpha
    np.testing.assert_allclose(
        seen.dh_change_ratio[i], np.linalg.norm(after - before, 2) / n**0.5 / distance, rtol=1e-7
    )
    residual = np.asarray(flow.outputs[i]) - np.asarray(P.target)
    turned = (after @ after.T - before @ before.T) / n @ residual
    np.testing.assert_allclose(seen.perturbation[i], np.linalg.norm(turned) / n**0.5, rtol=1e-6)
    v = after.T @ residual
    v /= np.linalg.norm(v)
    tensor = np.asarray(jax.jit(jax.hessian(lambda c: H(unravel(c))))(w))
    bent = np.einsum("ipq,p,q->i", tensor, v, v)
    np.testing.assert_allclose(seen.curvature[i], np.linalg.norm(bent) / n**0.5, rtol=1e-7)
    np.testing.assert_allclose(seen.start_gradient, np.linalg.norm(before.T @ np.asarray(P.target)) / n, rtol=1e-9)
    assert int(seen.rank) == 5
    rows = jacobian(P.w0, TEST)
    np.testing.assert_allclose(seen.test_dh_norm, np.linalg.norm(rows, axis=1).max(), rtol=1e-9)
    moved = alpha * (TEST(unravel(w)) - TEST(P.w0))
    tangent = rows @ jfu.ravel_pytree(jax.tree.map(lambda leaf: leaf[i], found.comparison.tangent_flow.displacement))[0]
    np.testing.assert_allclose(seen.test_gap[i], np.max(np.abs(moved - tangent)), rtol=1e-6)


def test_large_problems_take_lanczos_from_above(monkeypatch):
    exact = certificate(30.0).measurements
    monkeypatch.setattr(measurements, "DENSE_OUTPUTS", 3)
    # A number of times of its own, so that no program of before is used.
    found = certify(H, P.loss, P.w0, TS[:22], alpha=30.0, **TIGHT)
    for name in ("path_dh_norm", "dh_change_ratio"):
        np.testing.assert_allclose(getattr(found.measurements, name), getattr(exact, name)[:22], rtol=1e-9)
    assert np.isnan(found.measurements.sigma_min)
    assert found.claim("2.4", "output_gap").assumptions[3].status is Status.UNKNOWN
    assert "unknown: Dh(w0) onto" in str(found)
    assert found.claim("2.3", "output_gap").applies


# ---- bounds ----


def test_every_bound_holds_and_none_is_vacuous():
    found = certificate(1000.0)
    assert found.violated == ()
    assert all(bool(claim.applies) for claim in found.claims)
    # Sharp where the proof loses nothing; the others within what their proofs give away.
    factors = {
        ("2.2", "displacement_norm"): 2, ("2.2", "output_gap"): 100, ("2.3", "displacement_norm"): 3,
        ("2.3", "output_gap"): 15, ("2.3", "param_gap"): 5, ("2.4", "residual_norm"): 1.1, ("2.4", "param_gap"): 15,
        ("2.5", "displacement_norm"): 1.1, ("2.5", "output_gap"): 15, ("B.1", "residual_norm"): 1.1,
        ("A.1", "test output gap"): 10, ("LN 2", "tangent loss"): 1.2, ("LN 6", "sigma_max"): 1.6,
        ("LN 6", "1 / sigma_min"): 2.1,
    }  # fmt: skip
    for name, factor in factors.items():
        assert 1 - 1e-9 <= float(found.claim(*name).ratio) <= factor, name


def test_a_wrong_bound_would_be_seen():
    claim = certificate(1000.0).claim("2.3", "output_gap")
    wrong = eqx.tree_at(lambda c: c.bound, claim, claim.bound / 20)
    assert bool(wrong.violated)
    assert float(wrong.ratio) < 1


def test_bounds_fall_as_theorem_2_2_says():
    first, second = (certificate(alpha).claim("2.4", "output_gap") for alpha in (1000.0, 4000.0))
    np.testing.assert_allclose(first.bound[5:] / second.bound[5:], 4, rtol=0.05)
    np.testing.assert_allclose(first.measured[5:20] / second.measured[5:20], 4, rtol=0.05)


def test_in_float32_at_a_large_scale():
    w0, x, target = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), (P.w0, P.x, P.target))
    h = on_data(lj.center(lj.models.two_layer(jnp.tanh), w0), x)
    found = certify(h, lj.square_loss(target), w0, TS.astype(jnp.float32), alpha=1e7)
    assert found.violated == ()
    limit = certificate(4000.0)
    np.testing.assert_allclose(
        found.measurements.dh_change_ratio[5:], limit.measurements.dh_change_ratio[5:], rtol=2e-2
    )
    np.testing.assert_allclose(
        1e7 * found.measurements.displacement_norm, 4e3 * limit.measurements.displacement_norm, rtol=1e-2
    )
    assert found.claim("2.3", "output_gap").bound.dtype == jnp.float32


def test_a_linear_model_has_no_gap():
    p = problems.linear(3)
    found = certify(p.h, p.loss, p.w0, TS, alpha=1.0, **TIGHT)
    assert found.violated == ()
    assert np.all(np.asarray(found.claim("2.4", "param_gap").bound) < 1e-12)
    assert "below resolution" in str(found)


# ---- assumptions ----


def test_below_the_threshold_theorem_2_4_says_nothing():
    found = certificate(1.0)
    assert found.violated == ()
    claim = found.claim("2.4", "output_gap")
    assert not claim.applies
    assert "D < 2 alpha C0: fails" in str(claim.assumptions[-1])
    assert "fails: D < 2 alpha C0" in str(found)
    assert "alpha must exceed" in "\n".join(found.assumptions())


def test_kinks_put_a_model_outside():
    h = on_data(lj.center(lj.models.two_layer(), P.w0), P.x)
    found = certify(h, P.loss, P.w0, TS[:12], alpha=1e3)
    for name in ("2.2", "2.3", "2.4", "2.5"):
        assert found.claim(name, "output_gap").assumptions[0].status is Status.FAILS
    assert "fails: Dh Lipschitz" in str(found)


def test_losses_say_what_they_are():
    logistic = certify(H, lj.logistic_loss(jnp.array([0, 1, 1, 0, 1])), P.w0, TS[:12], alpha=1e3)
    statuses = {a.name: a.status for c in logistic.claims for a in c.assumptions}
    assert (statuses["square loss"], statuses["R strongly convex"], statuses["R smooth"]) == (
        Status.FAILS,
        Status.FAILS,
        Status.HOLDS,
    )
    assert logistic.claim("2.2", "output_gap").applies
    target = P.target
    own = certify(H, lambda y: jnp.sum((y - target) ** 2), P.w0, TS[:12], alpha=1e3)
    statuses = {a.name: a.status for c in own.claims for a in c.assumptions}
    assert (statuses["R strongly convex"], statuses["R smooth"]) == (
        Status.UNKNOWN,
        Status.UNKNOWN,
    )
    assert not own.claim("2.2", "output_gap").applies
    with pytest.raises(KeyError, match="no claim"):
        own.claim("A.1", "test output gap")


def test_the_rank_may_change():
    """h = (w1, w1 w2): of rank 1 at 0, of rank 2 elsewhere."""
    ts = jnp.linspace(0, 5, 11)
    found = certify(lambda w: jnp.stack([w[0], w[0] * w[1]]), lj.square_loss(jnp.ones(2)), jnp.zeros(2), ts, alpha=30.0)
    claim = found.claim("2.5", "output_gap")
    assert "rank of Dh constant near w0: fails (rank 1 at w0, 2 on the way" in str(claim.assumptions[3])
    assert found.claim("2.4", "output_gap").assumptions[3].status is Status.FAILS


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="alpha must be finite"):
        certify(H, P.loss, P.w0, TS, alpha=jnp.inf)
    with pytest.raises(ValueError, match="ts must be finite"):
        certify(H, P.loss, P.w0, jnp.array([0.0, jnp.inf]), alpha=1.0)
    with pytest.raises(ValueError, match="alpha must be a scale"):
        certify(H, P.loss, P.w0, TS, alpha=-1.0)
