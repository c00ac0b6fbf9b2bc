"""The first-order correction: closed forms, its equation, measured gaps of the flows, precision, every refusal."""

import functools

import diffrax
import equinox as eqx
import jax
import jax.flatten_util as jfu
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import pytest

import lazyjax as lj
from helpers import centered_problem, relative_error, symmetrized_problem
from lazyjax.flow.lazy_correction import lazy_correction


def on_data(problem):
    """The numbers as no part of the compiled program."""
    return problem._replace(h=lj.on_data(problem.f, problem.x))


def cast(tree, dtype):
    return jtu.tree_map(lambda leaf: leaf.astype(dtype) if eqx.is_inexact_array(leaf) else leaf, tree)


TIMES = jnp.array([0.0, 0.5, 2.0, 8.0])
TIGHT = {"rtol": 1e-11, "atol": 1e-13, "solver": diffrax.Tsit5(), "max_steps": 2**14}
CENTERED = on_data(centered_problem(jr.key(2)))
MIRRORED = on_data(symmetrized_problem(jr.key(3)))
LOGISTIC = cast(lj.logistic_loss(jnp.array([0, 1, 1, 0, 1])), float)  # no weak types: one program for what is cast back


class Net(eqx.Module):
    """An Equinox module with a float, an integer and a static leaf, two outputs a sample."""

    weight: jax.Array
    shift: jax.Array
    name: str = eqx.field(static=True)

    def __call__(self, x):
        return jnp.sin(x @ self.weight + self.shift.astype(x.dtype)[None])


def net(key, activation, *, n=5, d=3, width=8):
    """A centered net with biases."""
    keys = jr.split(key, 4)
    w0 = {"a": jr.normal(keys[0], (width,)), "b": jr.normal(keys[1], (d, width)), "c": jr.normal(keys[2], (width,))}
    x = jr.normal(keys[3], (n, d))
    f = lambda w, x: activation(x @ w["b"] + w["c"][None]) @ w["a"]
    return on_data(lj.center(f, w0), x), w0


def gauss_legendre(begin, end, count=28):
    nodes, weights = np.polynomial.legendre.leggauss(count)
    half = (end - begin) / 2
    return begin + half * (1 + nodes), half * weights


NODES, WEIGHTS = gauss_legendre(0.0, 3.0)
SOFTPLUS, RELU = net(jr.key(4), jax.nn.softplus), net(jr.key(6), jax.nn.relu)
MODULE = Net(jr.normal(jr.key(7), (3, 2)), jnp.array([1, -1]), "net")
CASES = {
    "square, relu": (RELU[0], CENTERED.loss, RELU[1], TIMES),
    "logistic, softplus": (SOFTPLUS[0], LOGISTIC, SOFTPLUS[1], jnp.array([0.0, *NODES, 3.0])),
    "softmax, an Equinox module": (
        on_data(lj.center(lambda w, x: w(x), MODULE), jr.normal(jr.key(8), (4, 3))),
        lj.softmax_cross_entropy(jnp.array([0, 1, 1, 0])),
        MODULE,
        TIMES,
    ),
}


def correct(problem, ts=TIMES, **options):
    return lazy_correction(problem.h, problem.loss, problem.w0, ts, **options)


# ---- closed forms ----

SLOPES = jnp.logspace(-1, 2, 8)
BENDS = jnp.array([1.0, -2.0, 0.5, 3.0, -1.0, 2.0, 5.0, 0.0])  # the last one is a line
TARGET = jnp.array([1.0, 2.0, -1.0, 0.5, 3.0, -2.0, 1.5, 1.0])


def parabolas(w):
    """h_i = s_i w_i + c_i w_i^2 / 2, one parameter each."""
    return SLOPES * w + BENDS * w**2 / 2


def closed_form(times):
    r"""Limits for the parabolas with the square loss, mean=False.

    With u = (y*/s) U, tau = s^2 t and eps' = eps c y*/s^2, U' = -(1 + eps' U)(U + eps' U^2/2 - 1). At eps' = 0,
    U = 1 - E with E = e^{-tau}, and V = dU/deps' follows V' = -V - U^2/2 - U(U - 1) = -V - 1/2 + 2E - 3/2 E^2, so
    V = -1/2 - E + 2 tau E + 3/2 E^2; of the outputs Z = V + U^2/2 = 2E(tau - 1 + E).
    """
    tau = np.asarray(times)[:, None] * np.asarray(SLOPES) ** 2
    decay, gone = np.exp(-tau), -np.expm1(-tau)
    late = np.where(np.isinf(tau), 0, tau) * decay
    small = np.asarray(BENDS * TARGET / SLOPES**2)
    v = 2 * late - 2 * gone + 1.5 * gone**2  # the same in 1 - E: early it cancels less
    return np.asarray(TARGET) * small * 2 * (late - decay * gone), np.asarray(TARGET / SLOPES) * small * v


@pytest.mark.parametrize("solver", [None, lj.TangentExponential("lanczos")], ids=["dense", "lanczos"])
def test_the_limits_of_parabolas_at_eigenvalues_from_a_hundredth_to_ten_thousand(solver):
    """Over a time of 1000, where an explicit method needs three million steps, and to the end.

    There the outputs have met, and the parameters have not: h(w) = y*/alpha is not where s w = y*/alpha.
    """
    ts = jnp.array([0.0, 1e-4, 1e-2, 1.0, 30.0, 1000.0, jnp.inf])
    loss = lj.square_loss(TARGET, mean=False)
    # The origin of time is anywhere.
    run = lazy_correction(parabolas, loss, jnp.zeros(8), ts + 1, solver=solver, atol=1e-16)
    outputs, displacement = closed_form(ts)
    assert bool(run.tangent_flow.stats["solver"] == lj.flow.SOLVERS.tangent_exponential)
    assert int(run.tangent_flow.stats["num_steps"]) < 500
    for i in range(1, ts.size):
        scale = np.abs(displacement[i, :-1])
        errors = np.abs(np.asarray(run.displacement[i]) - displacement[i])[:-1]
        assert np.max(errors / scale) < 2e-5, i
        # Late the outputs are the little that is left of two terms that cancel.
        errors = np.abs(np.asarray(run.outputs[i]) - outputs[i])[:-1]
        assert np.max(errors / (np.asarray(SLOPES)[:-1] * scale)) < 2e-5, i
    for found in (run.outputs[:, -1], run.displacement[:, -1]):
        np.testing.assert_allclose(found, 0.0, atol=1e-12 * float(run.param_gap[-1]))
    np.testing.assert_allclose(displacement[-1], -BENDS * TARGET**2 / (2 * SLOPES**3), rtol=1e-14)
    for found in (run.outputs[0], run.displacement[0], run.output_gap[0], run.param_gap[0]):
        np.testing.assert_array_equal(found, 0.0)
    np.testing.assert_array_equal(run.ts, ts + 1)


def test_a_correction_that_grows_for_ever_has_no_limit_and_says_so():
    """Two outputs of one parameter: the residual that stays keeps pulling along its second derivative."""
    h = lambda w: jnp.stack([w[0] + w[1] ** 2 / 2 + w[0] * w[1], 2.0 * w[1] * w[0]])
    loss, ts = lj.square_loss(jnp.array([1.0, 1.0])), jnp.array([0.0, 1.0, jnp.inf])
    options = {"max_steps": 300, "solver": diffrax.Tsit5()}
    with pytest.raises(eqx.EquinoxRuntimeError, match="maximum number of solver steps"):
        lazy_correction(h, loss, jnp.zeros(2), ts, **options)
    # v_2' tends to <residual, D^2h(ubar, e_2)> / 2 = ubar_1, ubar_1 = 1: the rate at which it leaves.
    late = lazy_correction(h, loss, jnp.zeros(2), jnp.array([0.0, 40.0, 50.0]), **options)
    np.testing.assert_allclose((late.displacement[2] - late.displacement[1]) / 10, [0.0, 1.0], atol=1e-4)


# ---- the equation ----


def test_what_is_computed_solves_its_equation_in_the_outputs_and_loses_energy_as_it_must():
    """With dense Jacobians and Hessians, and quadrature between two times.

    In the outputs, z' = -Sigma D^2R(ybar) z - Sigma_1 grad R(ybar) with Sigma_1 the derivative of Dh Dh^T along ubar.
    And d/dt R(y) = -|u'|^2 at every eps, so that <grad R(ybar), z> = -2 int <ubar', v'>.
    """
    h, loss, w0, ts = CASES["logistic, softplus"]
    run = lazy_correction(h, loss, w0, ts, **TIGHT)
    flat, unravel = jfu.ravel_pytree(w0)
    jacobian, hessian = (jax.jit(d(lambda w: h(unravel(w))))(flat) for d in (jax.jacfwd, jax.hessian))

    @jax.vmap
    def terms(ubar, v, y, z):
        ubar, v = jfu.ravel_pytree(ubar)[0], jfu.ravel_pytree(v)[0]
        moved = hessian @ ubar  # of the Jacobian, by eps
        c, dc = loss.weight * loss.gradient(y), loss.weight * loss.hvp(y, z)
        du, dv = -jacobian.T @ c, -jacobian.T @ dc - moved.T @ c
        return jacobian @ ubar, jacobian @ v + moved @ ubar / 2, jacobian @ dv + moved @ du, -2 * du @ dv

    flow = run.tangent_flow
    y, z, slopes, powers = jax.jit(terms)(flow.displacement, run.displacement, flow.outputs, run.outputs)
    assert relative_error(y, flow.outputs) < 1e-12
    assert relative_error(z, run.outputs) < 1e-12
    assert relative_error(WEIGHTS @ slopes[1:-1], run.outputs[-1]) < 1e-9
    np.testing.assert_allclose(WEIGHTS @ powers[1:-1], loss.cotangent(flow.outputs[-1]) @ run.outputs[-1], rtol=1e-9)


# ---- measured gaps ----


@pytest.mark.parametrize("case", CASES)
def test_the_gaps_of_the_flows_tend_to_it_at_every_time_like_one_over_alpha(case):
    """Theorem 2.2's rates with their constants: entry by entry, and in the norms that `compare` gives."""
    h, loss, w0, ts = CASES[case]
    alphas = 10.0 ** np.arange(3, 7)
    limit = lazy_correction(h, loss, w0, ts, **TIGHT)
    picked = (ts.size // 4, ts.size // 2, ts.size - 1)
    names = ("outputs", "displacement", "output_gap", "param_gap")
    errors = {name: np.empty((4, 3)) for name in names}
    for row, alpha in enumerate(alphas):
        both = lj.compare(h, loss, w0, ts, alpha=alpha, **TIGHT)
        measured = {
            "outputs": alpha * (both.flow.outputs - both.tangent_flow.outputs),
            "displacement": jtu.tree_map(
                lambda a, b, alpha=alpha: alpha * (a - b), both.flow.displacement, both.tangent_flow.displacement
            ),
            "output_gap": alpha * both.output_gap,
            "param_gap": alpha**2 * both.param_gap,
        }
        for name in names:
            for column, i in enumerate(picked):
                found, right = (jtu.tree_map(lambda leaf, i=i: leaf[i], tree)
                                for tree in (measured[name], getattr(limit, name)))  # fmt: skip
                errors[name][row, column] = relative_error(found, right)
    for name in names:
        assert errors[name][1:].max() < 1e-3, (name, errors[name])
        assert errors[name][3].max() < 1e-5, (name, errors[name])
        if name in ("outputs", "displacement"):  # in a norm the first order of the deviation may happen to cancel
            slopes = np.diff(np.log10(errors[name][:3]), axis=0)
            np.testing.assert_allclose(slopes, -1.0, atol=0.02, err_msg=str((name, errors[name])))


def test_of_a_mirrored_model_the_outputs_correction_vanishes_and_their_gap_falls_faster():
    limit = correct(MIRRORED, **TIGHT)
    plain = correct(CENTERED, **TIGHT)
    assert float(limit.output_gap.max()) < 1e-14 * float(limit.param_gap.max())
    assert float(plain.output_gap.max()) > 1e-2 * float(plain.param_gap.max())
    first, second = limit.displacement  # symmetric, in the kernel of Dh
    assert relative_error(first, second) < 1e-12
    gaps = []
    for alpha in (100.0, 1000.0):
        both = lj.compare(MIRRORED.h, MIRRORED.loss, MIRRORED.w0, TIMES, alpha=alpha, **TIGHT)
        gaps.append(float(both.output_gap.max()))
        # The next order vanishes for the parameters.
        assert relative_error(alpha**2 * both.param_gap, limit.param_gap) < 10 / alpha
    assert abs(np.log10(gaps[1] / gaps[0]) + 2) < 0.02


# ---- solvers, precision, transforms ----


def test_the_tangent_flow_beside_it_is_that_of_gradient_flow():
    run = correct(CENTERED, **TIGHT)
    flow = lj.gradient_flow(
        lj.linearize(CENTERED.h, CENTERED.w0), CENTERED.loss, CENTERED.w0, TIMES, save=("outputs", "displacement")
    )
    assert relative_error(run.tangent_flow.outputs, flow.outputs) < 1e-8
    assert relative_error(run.tangent_flow.displacement, flow.displacement) < 1e-8
    assert relative_error(run.tangent_flow.loss, flow.loss) < 1e-8
    assert float(run.tangent_flow.alpha) == np.inf


def test_float32_agrees_with_float64_by_a_solver_that_moves_its_linear_part_too():
    single = cast(CASES["logistic, softplus"], jnp.float32)
    run = lazy_correction(*single, solver=lj.TangentExponential("dense", rank=3, relinearize=True))
    truth = lazy_correction(*cast(single, float), **TIGHT)
    for name in ("outputs", "displacement", "output_gap", "param_gap"):
        found = getattr(run, name)
        assert all(leaf.dtype == jnp.float32 for leaf in jtu.tree_leaves(found))
        assert relative_error(found, getattr(truth, name)) < 2e-5, name


def test_lanes_of_a_vmap_over_starts_and_targets_are_single_corrections_and_a_bad_lane_fails_alone():
    f, x = lj.models.two_layer(jnp.tanh), CENTERED.x
    w0s = [lj.models.two_layer().init(jr.key(i), d=3, width=12) for i in (7, 8, 9)]
    targets = jnp.stack([CENTERED.target, -2 * CENTERED.target, CENTERED.target.at[0].set(jnp.nan)])

    def lane(w0, target):
        h = on_data(lj.center(f, w0), x)
        return lazy_correction(h, lj.square_loss(target), w0, TIMES, throw=False)

    stacked = jtu.tree_map(lambda *leaves: jnp.stack(leaves), *w0s)
    run = jax.jit(jax.vmap(lane))(stacked, targets)
    good = np.asarray(jax.vmap(lambda r: r == lj.RESULTS.successful)(run.tangent_flow.result))
    np.testing.assert_array_equal(good, [True, True, False])
    for i in (0, 1):
        single = lazy_correction(on_data(lj.center(f, w0s[i]), x), lj.square_loss(targets[i]), w0s[i], TIMES, **TIGHT)
        assert relative_error(run.outputs[i], single.outputs) < 1e-5
        np.testing.assert_allclose(run.param_gap[i], single.param_gap, rtol=1e-5)


def test_any_function_of_the_outputs_will_do():
    """Its metric is Euclidean."""
    h, loss, w0, ts = CASES["softmax, an Equinox module"]
    rows = jnp.arange(4)

    def own(y):
        return -jnp.sum(jax.nn.log_softmax(y, axis=1)[rows, loss.labels]) / 4

    run, right = (lazy_correction(h, r, w0, ts, **TIGHT) for r in (own, loss))
    assert run.outputs.shape == (4, 4, 2)
    assert isinstance(run.displacement, Net)
    assert run.displacement.shift is None
    assert relative_error(run.outputs, right.outputs) < 1e-9
    np.testing.assert_allclose(run.output_gap, 2 * right.output_gap, rtol=1e-9)
    np.testing.assert_allclose(run.param_gap, right.param_gap, rtol=1e-9)


# ---- refusals ----


def test_a_model_that_is_not_zero_at_the_start_is_refused():
    h = functools.partial(lj.models.two_layer(jnp.tanh), x=CENTERED.x)
    with pytest.raises(ValueError, match=r"needs a model with h\(w0\) = 0.*lazyjax.center"):
        lazy_correction(h, CENTERED.loss, CENTERED.w0, TIMES)


def test_a_start_on_a_kink_is_refused_in_either_precision():
    """One unit sees nothing but its zero bias, of a sample that is all zeros: its two sides differ."""
    h, w0 = RELU
    for dtype in (jnp.float32, float):
        model, start = cast((h, w0), dtype)
        model = on_data(model.f, model.x.at[0].set(0.0))
        loss = lj.square_loss(CENTERED.target.astype(dtype))
        start["c"] = start["c"].at[0].set(0.0)
        model = on_data(lj.center(model.f.f, start), model.x)
        with pytest.raises(ValueError, match=r"two sides of w0.*lies on a kink"):
            lazy_correction(model, loss, start, TIMES)


@pytest.mark.parametrize(
    ("h", "w0", "error", "match"),
    [
        (lambda w: jnp.abs(w) ** 1.5 + w, jnp.zeros(5), ValueError, r"twice differentiable at w0, but 5 of 5 entries"),
        (lambda w: jnp.sqrt(w), jnp.zeros(5), ValueError, "h must be differentiable at w0, but 5 of 5"),
        (lambda w: w, jnp.array([1.0, jnp.nan, 1, 1, 1]), ValueError, r"w0 must be finite, but 1 of its 5.*\(1,\)"),
        (lambda w: 1.0 * w, jnp.arange(5), TypeError, "at least one real floating array"),
        (lambda w: w, jnp.zeros(4), ValueError, r"outputs \(4,\) and target \(5,\)"),
    ],
)
def test_what_cannot_be_followed_is_refused(h, w0, error, match):
    with pytest.raises(error, match=match):
        lazy_correction(h, lj.square_loss(jnp.ones(5)), w0, TIMES)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"ts": jnp.array([0.0, 2.0, 1.0])}, r"ts\[1\] = 2.0 and ts\[2\] = 1.0"),
        ({"ts": jnp.array([0.0, jnp.nan])}, "finite, except that the last may be inf"),
        ({"ts": jnp.array([0.0])}, "at least two times"),
        ({"rtol": 0.0}, "rtol must be positive"),
        ({"atol": -1.0}, "atol not negative"),
        ({"max_steps": 0}, "max_steps must be at least 1"),
    ],
)
def test_bad_times_and_options_are_refused(options, match):
    with pytest.raises(ValueError, match=match):
        correct(CENTERED, **options)
