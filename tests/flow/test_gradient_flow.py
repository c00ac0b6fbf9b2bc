"""The flow: closed forms, identities of the gradient flow, rates in alpha, precision, programs, and every refusal."""

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import optax
import pytest

import lazyjax as lj
import problems
from helpers import relative_error
from lazyjax.flow.field import make_field
from lazyjax.flow.start import check_start
from lazyjax.losses.loss import as_loss
from problems import normal

NODES, WEIGHTS = np.polynomial.legendre.leggauss(12)
TIMES = np.array([0.0, 0.5, *(0.75 + 0.25 * NODES), 1.0, 2.0, 8.0])
TO_INFINITY = np.array([0.0, 1.0, np.inf])
TSIT5 = {"solver": diffrax.Tsit5()}
TIGHT = {"rtol": 1e-10, "atol": 1e-12}
SAVE = ("outputs", "displacement", "params")  # always all: another choice is another program
LINEAR, CENTERED, SYMMETRIZED = problems.linear(1), problems.centered(2), problems.symmetrized(3)
UNCENTERED = CENTERED._replace(f=lj.models.two_layer(jnp.tanh))
UNCENTERED = UNCENTERED._replace(h=lj.on_data(UNCENTERED.f, UNCENTERED.x))


def flow(problem, ts=TIMES, **options):
    return lj.gradient_flow(problem.h, problem.loss, problem.w0, jnp.asarray(ts), **{"save": SAVE, **options})


def tangent_flow(problem, ts=TIMES, **options):
    return flow(problem._replace(h=lj.linearize(problem.h, problem.w0)), ts, **options)


def at(tree, i):
    return jtu.tree_map(lambda leaf: np.asarray(leaf)[i], tree)


def count_programs():
    """Programs that JAX has compiled since the first call of this, as a list of one number."""
    if not COUNT:
        COUNT.append(0)
        jax.monitoring.register_event_duration_secs_listener(_count)
    return COUNT[0]


COUNT = []


def _count(event, duration, **kwargs):
    del duration, kwargs
    COUNT[0] += event == "/jax/core/compile/backend_compile_duration"


# ---- closed forms ----


@pytest.mark.parametrize("alpha", [1e-3, 1.0, 1e12, np.inf])
def test_a_linear_model_is_its_own_tangent_at_every_alpha(alpha):
    ours, tangents = (f(LINEAR, alpha=alpha, **TSIT5, **TIGHT) for f in (flow, tangent_flow))
    assert relative_error(ours.outputs[1:], tangents.outputs[1:]) < 1e-13
    assert relative_error(ours.displacement, tangents.displacement) < 1e-13


def test_the_linear_flow_is_the_matrix_exponential():
    x, target = np.asarray(LINEAR.x), np.asarray(LINEAR.target)
    values, vectors = np.linalg.eigh(x @ x.T / x.shape[0])
    exact = target - (np.exp(-TIMES[:, None] * values) * (vectors.T @ target)) @ vectors.T
    assert relative_error(flow(LINEAR, **TSIT5, **TIGHT).outputs, exact) < 1e-9
    assert relative_error(tangent_flow(LINEAR).outputs, exact) < 1e-13


def test_the_closed_form_of_the_tangent_flow_is_what_the_solver_finds():
    closed = tangent_flow(CENTERED, alpha=10.0)
    solved = tangent_flow(CENTERED, alpha=10.0, **TSIT5, **TIGHT)
    assert int(closed.stats["num_steps"]) == 0
    assert int(solved.stats["num_vector_field"]) == 6 * int(solved.stats["num_steps"]) + 1
    for name in (*SAVE, "loss"):
        assert relative_error(getattr(closed, name), getattr(solved, name)) < 1e-9, name


def test_duplicated_inputs_and_infinite_time_give_the_projection():
    """The kernel has exact zero eigenvalues; the residual along them stays, the rest is fitted."""
    x = np.linalg.qr(np.asarray(LINEAR.x).T)[0].T * np.array([[1.0], [1.0], [1.5], [2.0], [0.8]])
    x[1], target = x[0], np.array([1.0, 3.0, -1.0, 2.0, 0.5])
    problem = LINEAR._replace(h=lj.on_data(LINEAR.f, jnp.asarray(x)), loss=lj.square_loss(jnp.asarray(target)))
    for run in (tangent_flow(problem, TO_INFINITY), flow(problem, TO_INFINITY, rtol=1e-9, **TSIT5)):
        np.testing.assert_allclose(run.outputs[-1], [2.0, 2.0, *target[2:]], atol=1e-8)
        np.testing.assert_allclose(run.displacement["slope"][-1], np.linalg.pinv(x) @ target, atol=1e-8)


# ---- identities ----


def test_the_loss_falls_by_the_squared_gradient():
    """R(t0) - R(t1) is the integral of |u'|^2, by Gauss-Legendre quadrature."""
    run = flow(CENTERED, alpha=3.0, **TSIT5, **TIGHT)

    @eqx.filter_jit
    @eqx.filter_vmap(in_axes=(None, None, 0, 0))
    def speed(h, loss, params, outputs):
        _, vjp = jax.vjp(h, params)
        return sum(jnp.sum(g**2) for g in jtu.tree_leaves(vjp(loss.cotangent(outputs))))

    speeds = np.asarray(speed(CENTERED.h, CENTERED.loss, run.params, run.outputs))[2:14]
    loss = np.asarray(run.loss)
    np.testing.assert_allclose(loss[1] - loss[14], 0.25 * WEIGHTS @ speeds, rtol=1e-8)
    assert np.all(np.diff(loss) < 0)


def test_relu_networks_conserve_the_balance_of_their_layers():
    """a_j^2 - |b_j|^2 is constant in time for a 2-homogeneous unit, for any loss and any alpha."""
    w0, labels = {"a": normal(4, 6), "b": normal(5, 6, 3)}, jnp.asarray(np.array([0, 1, 1, 0, 1, 0, 1]))
    h = lj.on_data(lj.center(lj.models.two_layer(), w0), normal(6, 7, 3))
    # A short time: later a neuron sticks to a kink, where adaptive steps collapse (a Filippov sliding mode).
    ts = jnp.asarray(TIMES / 20)
    run = lj.gradient_flow(h, lj.logistic_loss(labels), w0, ts, alpha=2.0, save=("params",), **TSIT5)
    a, b = np.asarray(run.params["a"]), np.asarray(run.params["b"])
    balance = a**2 - np.sum(b**2, axis=-1)
    assert np.max(np.abs(a[-1] - a[0])) > 0.05
    np.testing.assert_allclose(balance, np.broadcast_to(balance[0], balance.shape), atol=1e-6)
    assert run.outputs is None


def test_diagonal_networks_conserve_u_v_and_scale_as_their_homogeneity_says():
    """u v is constant; and with q = 2, w_alpha(t) = v(lam^(2 - 2q) t)/lam, v the flow from lam w0, alpha = lam^q."""
    net, lam = lj.models.diagonal_linear(), 1.7
    w0, h = net.init(d=5), lj.on_data(net, normal(6, 3, 5))
    problem = CENTERED._replace(h=h, w0=w0, loss=lj.square_loss(jnp.asarray(np.array([1.0, -0.5, 0.3]))))
    run = flow(problem, alpha=lam**2, **TSIT5, **TIGHT)
    np.testing.assert_allclose(np.asarray(run.params["u"]) * np.asarray(run.params["v"]), 1.0, rtol=1e-8)
    larger = problem._replace(w0=jtu.tree_map(lambda leaf: jnp.asarray(lam * np.asarray(leaf)), w0))
    other = flow(larger, TIMES / lam**2, alpha=1.0, **TSIT5, **TIGHT)
    assert relative_error(run.params, jtu.tree_map(lambda leaf: np.asarray(leaf) / lam, other.params)) < 1e-8


@pytest.mark.parametrize(
    ("problem", "output_rate"), [(CENTERED, -1.0), (SYMMETRIZED, -2.0)], ids=["centered", "symmetrized"]
)
def test_the_gaps_close_at_the_rates_of_theorem_2_2(problem, output_rate):
    def gaps(alpha):
        options = {"alpha": alpha, "rtol": 1e-12, "atol": 1e-14, **TSIT5}
        model, tangent = flow(problem, **options), tangent_flow(problem, **options)
        leaves = zip(jtu.tree_leaves(model.displacement), jtu.tree_leaves(tangent.displacement), strict=True)
        return {
            "outputs": np.max(np.abs(np.asarray(model.outputs) - np.asarray(tangent.outputs))),
            "params": max(np.max(np.abs(np.asarray(a) - np.asarray(b))) for a, b in leaves) / alpha,
            "displacement": max(np.max(np.abs(leaf)) for leaf in jtu.tree_leaves(model.displacement)) / alpha,
        }

    near, far = gaps(640.0), gaps(1280.0)
    slope = {name: np.log2(far[name] / near[name]) for name in near}
    assert abs(slope["outputs"] - output_rate) < 0.02
    assert abs(slope["params"] + 2.0) < 0.02
    assert abs(slope["displacement"] + 1.0) < 0.02


# ---- precision ----


def test_alpha_1e8_is_continuous_with_infinity():
    large, limit = (flow(CENTERED, alpha=alpha, **TSIT5, **TIGHT) for alpha in (1e8, np.inf))
    assert 0 < relative_error(large.outputs, limit.outputs) < 1e-7
    assert 0 < relative_error(large.displacement, limit.displacement) < 1e-7


@pytest.mark.parametrize("alpha", [1.0, 1e7, 1e12])
@pytest.mark.parametrize("make", [problems.centered, problems.symmetrized])
def test_float32_agrees_with_float64_along_the_whole_flow(make, alpha):
    single = make(2, dtype=jnp.float32)
    double = jtu.tree_map(lambda leaf: leaf.astype(float) if eqx.is_inexact_array(leaf) else leaf, single)
    run, truth = flow(single, alpha=alpha, **TSIT5), flow(double, alpha=alpha, **TSIT5, **TIGHT)
    assert run.outputs.dtype == jnp.float32
    for i in range(1, len(TIMES)):
        assert relative_error(run.outputs[i], truth.outputs[i]) < 1e-4
        assert relative_error(at(run.displacement, i), at(truth.displacement, i)) < 1e-4


# ---- programs ----


def test_other_numbers_are_other_arguments_of_the_same_programs():
    """Data, targets, parameters, times, scale and tolerances: whatever is not a shape, a function or an option."""
    first, second, third = problems.centered(11), problems.centered(12), problems.centered(13)
    ts = TIMES[[0, 1, -1]]
    count_programs()
    solve = lambda problem, ts, **options: flow(problem, ts, alpha=4.0, **options)
    usual = solve(first, ts)
    before = count_programs()
    for problem in (second, third):
        loose, tight = solve(problem, 1.5 * ts, rtol=1e-3, atol=1e-3), solve(problem, 1.5 * ts, rtol=1e-8, atol=1e-9)
        assert int(loose.stats["num_steps"]) < int(tight.stats["num_steps"])
    flow(first, ts, alpha=7.0, throw=False)
    assert count_programs() == before
    # A tangent model is linearized inside.
    tangent_flow(first, ts)
    before = count_programs()
    tangent_flow(second, 1.5 * ts, alpha=7.0)
    assert count_programs() == before
    assert bool(usual.result == lj.RESULTS.successful)


def test_a_first_flow_compiles_few_programs():
    count_programs()
    problem = problems.centered(14, n=6, width=7)
    before = count_programs()
    flow(problem, TIMES[[0, 1, -1]])
    assert count_programs() - before <= 8


# ---- how a flow ends ----


def test_infinite_time_runs_to_a_stationary_point():
    run = flow(LINEAR, TO_INFINITY, alpha=5.0, **TSIT5)
    np.testing.assert_allclose(run.outputs[-1], LINEAR.target, atol=1e-4)
    assert bool(run.result == diffrax.RESULTS.successful)
    # The gradient has fallen by rtol, not more: the loss along the slowest mode is still there.
    assert 0 < float(run.loss[-1]) < 1e-8


def test_a_long_horizon_in_single_precision_ends_where_an_infinite_one_does():
    """Its rounding is all that moves there; a residual is left, and times before the end are as ever."""
    rng = np.random.default_rng(0)
    x, y = (jnp.asarray(rng.standard_normal(shape), np.float32) for shape in ((20, 3), 20))
    h, loss, w0 = lj.on_data(_rows_times_weights, x), lj.square_loss(y), jnp.zeros(3, np.float32)
    best = x @ np.linalg.lstsq(np.asarray(x, np.float64), np.asarray(y, np.float64))[0].astype(np.float32)
    early = None
    for end in (1e9, 1e11, 1e20, 1e30):
        flow = lj.gradient_flow(h, loss, w0, jnp.array([0.0, 1.0, end, 2 * end], np.float32))
        assert relative_error(flow.outputs[2:], np.stack([best, best])) < 1e-5
        assert flow.stats["num_steps"] < 50
        early = flow.outputs[1] if early is None else early
        assert relative_error(flow.outputs[1], early) < 1e-5


def _rows_times_weights(w, x):
    return x @ w


def test_a_flow_that_fails_in_its_first_step_keeps_its_start():
    problem = problems.linear()
    options = {"solver": diffrax.Tsit5(), "stepsize_controller": diffrax.ConstantStepSize(), "dt0": 1e6, "throw": False}
    flow = lj.gradient_flow(problem.h, problem.loss, problem.w0, jnp.array([0.0, 1e30]), max_steps=1, **options)
    np.testing.assert_array_equal(flow.outputs[0], np.zeros(5))
    assert not np.isfinite(flow.outputs[1]).any()


def test_times_are_counted_from_the_first_one(untyped):
    """1e8 and 1e8 + 1 are one number in single precision, but not their distance from the start."""
    problem = problems.linear(dtype=np.float32)
    late, early = (
        lj.gradient_flow(problem.h, problem.loss, problem.w0, start + np.array([0.0, 0.5, 1.0])) for start in (1e8, 0.0)
    )
    np.testing.assert_array_equal(late.outputs, early.outputs)
    np.testing.assert_array_equal(late.ts, np.float32([1e8, 1e8, 1e8]))
    with pytest.raises(ValueError, match=r"ts must be strictly increasing in the precision of the outputs, float32"):
        lj.gradient_flow(problem.h, problem.loss, problem.w0, np.array([0.0, 1e8, 1e8 + 1]))


def test_a_flow_that_is_not_stationary_in_time_says_so():
    run = flow(CENTERED, TO_INFINITY, max_steps=20, throw=False, **TSIT5)
    assert bool(run.result == diffrax.RESULTS.max_steps_reached)
    with pytest.raises(eqx.EquinoxRuntimeError, match="maximum number of solver steps"):
        flow(CENTERED, TO_INFINITY, max_steps=20, **TSIT5)


# ---- solvers, lanes, parameters ----


@pytest.mark.parametrize(("solver", "rtol"), [(diffrax.Kvaerno3(), 1e-6), (diffrax.Heun(), 1e-5)])
def test_any_diffrax_solver_will_do(solver, rtol):
    reference = flow(CENTERED, alpha=2.0, **TSIT5, **TIGHT)
    run = flow(CENTERED, alpha=2.0, solver=solver, rtol=rtol, atol=rtol / 100)
    assert relative_error(run.outputs, reference.outputs) < 100 * rtol
    assert (int(run.stats["num_vector_field"]) == -1) == isinstance(solver, diffrax.Kvaerno3)


def test_a_fixed_step_solver_is_gradient_descent():
    fixed = {"solver": diffrax.Euler(), "dt0": 0.1, "stepsize_controller": diffrax.ConstantStepSize()}
    run = flow(CENTERED, np.array([0.0, 4.0]), alpha=2.0, **fixed)
    descent = lj.gradient_descent(CENTERED.h, CENTERED.loss, CENTERED.w0, optax.sgd(0.1), 40, alpha=2.0)
    assert int(run.stats["num_vector_field"]) == 40
    assert relative_error(run.outputs[-1], descent.outputs) < 1e-12


def test_lanes_of_a_vmap_are_single_flows_and_a_bad_lane_stays_alone():
    alphas = jnp.asarray(np.array([1.0, 30.0, 1e7, np.inf]))
    targets = np.stack([CENTERED.target] * 4)
    targets[1, 0] = np.nan
    solver = lj.TangentExponential()

    def lane(alpha, target):
        return lj.gradient_flow(
            CENTERED.h, lj.square_loss(target), CENTERED.w0, jnp.asarray(TIMES), alpha=alpha, throw=False
        )

    run = jax.jit(jax.vmap(lane))(alphas, jnp.asarray(targets))
    good = np.asarray(jax.vmap(lambda r: r == diffrax.RESULTS.successful)(run.result))
    np.testing.assert_array_equal(good, [True, False, True, True])
    for i in (0, 2, 3):
        # Not to rounding: the step-size controller amplifies it, as far as the tolerance 1e-6 lets it. By itself a
        # single flow of known values could have another solver.
        single = flow(CENTERED, alpha=alphas[i], solver=solver)
        assert relative_error(run.outputs[i], single.outputs) < 1e-8
    assert str(run).splitlines()[0] == "Flow at alpha = 1 to inf, 17 times from 0 to 8, 4 lanes"
    assert "successful (3 of 4)" in str(run)


class Net(eqx.Module):
    """An Equinox module with a float, an integer and a static leaf, two outputs a sample."""

    weight: jax.Array
    shift: jax.Array
    name: str = eqx.field(static=True)

    def __call__(self, x):
        return jnp.tanh(x @ self.weight + self.shift.astype(x.dtype)[None])


def call(w, x):
    return w(x)


def shifted(w, x):
    return jnp.tanh(x @ w + jnp.asarray(np.array([[1.0, -1.0]])))


def test_equinox_modules_with_integer_leaves_and_several_outputs_flow():
    net = Net(normal(7, 3, 2), jnp.asarray(np.array([1, -1])), "net")
    x, loss = normal(8, 4, 3), lj.square_loss(normal(9, 4, 2))
    run, plain = (
        flow(CENTERED._replace(h=lj.on_data(lj.center(f, w0), x), loss=loss, w0=w0), alpha=10.0, **TSIT5)
        for f, w0 in ((call, net), (shifted, net.weight))
    )
    assert run.outputs.shape == (len(TIMES), 4, 2)
    assert isinstance(run.params, Net)
    np.testing.assert_array_equal(run.params.shift, net.shift)
    np.testing.assert_allclose(run.params.weight[0], net.weight)
    assert relative_error(run.outputs, plain.outputs) < 1e-10


def test_flax_parameters_flow_and_descend():
    from flax import linen

    net = linen.Dense(2, param_dtype=float)
    x, target = normal(8, 4, 3), normal(9, 4, 2)
    w0 = net.init(jax.random.key(7), x)
    h = lj.on_data(lj.center(lambda w, x: net.apply(w, x), w0), x)
    values, vectors = np.linalg.eigh((np.asarray(x) @ np.asarray(x).T + 1) / 4)  # of the weights, and of the bias
    exact = target - (vectors * np.exp(-8.0 * values)) @ vectors.T @ target
    problem = CENTERED._replace(h=h, w0=w0, loss=lj.square_loss(target))
    assert relative_error(flow(problem, alpha=10.0, **TSIT5, **TIGHT).outputs[-1], exact) < 1e-8
    descent = lj.gradient_descent(h, problem.loss, w0, optax.sgd(8.0 / 4000), 4000, alpha=10.0)
    assert jtu.tree_structure(descent.params) == jtu.tree_structure(w0)
    assert relative_error(descent.outputs, exact) < 1e-2


def test_a_flow_may_start_from_an_output_that_is_not_zero():
    initial = np.asarray(UNCENTERED.h(UNCENTERED.w0))
    np.testing.assert_allclose(flow(UNCENTERED, alpha=3.0, **TSIT5).outputs[0], 3.0 * initial, rtol=1e-14)
    moved = jtu.tree_map(lambda leaf: jnp.asarray(np.asarray(leaf) + 0.01), UNCENTERED.w0)
    tangent = lj.linearize(UNCENTERED.h, UNCENTERED.w0)
    run = flow(UNCENTERED._replace(h=tangent, w0=moved), alpha=3.0)
    np.testing.assert_allclose(run.outputs[0], 3.0 * tangent(moved), rtol=1e-12)


def test_any_function_of_the_outputs_is_a_loss_and_the_parameters_flow_the_same():
    target = np.asarray(CENTERED.target)
    own = lambda y: jnp.sum((y - target) ** 2) / (2 * target.size)
    run = flow(CENTERED._replace(loss=own), **TSIT5)
    assert relative_error(run.outputs, flow(CENTERED, **TSIT5).outputs) < 1e-12


def test_progress_is_shown_on_demand(capfd):
    flow(LINEAR, np.array([0.0, 8.0]), alpha=2.0, progress=True, **TSIT5)
    jax.effects_barrier()
    assert "100.00%" in capfd.readouterr().err


def test_a_flow_prints_its_numbers_and_inside_a_trace_its_shapes():
    run = flow(CENTERED, alpha=10.0, **TSIT5)
    assert str(run) == repr(run)
    first, last = (f"{float(run.loss[i]):.4g}" for i in (0, -1))
    lines = str(run).splitlines()
    assert lines[0] == "Flow at alpha = 10, 17 times from 0 to 8"
    assert lines[1].split() == ["loss", first, "at", "the", "start,", last, "at", "the", "end"]
    assert lines[2].split(maxsplit=1) == ["outputs", "(17, 5)"]
    assert lines[3].split(maxsplit=1) == ["displacement", "(17, 12), (17, 12, 3)"]
    assert lines[5].split(maxsplit=1) == ["result", "successful"]
    assert lines[6].split(maxsplit=1) == ["solver", f"Tsit5, {int(run.stats['num_steps'])} steps"]
    texts = []
    eqx.filter_jit(lambda run: texts.append(str(run)))(run)
    assert "outputs=f64[17,5]" in texts[0]


# ---- refusals ----


@pytest.mark.parametrize(
    ("alpha", "match"),
    [
        (0.0, "alpha must be a scale in"),
        (-1.0, "alpha must be a scale in"),
        (np.nan, "alpha must be a scale in"),
        (np.ones(2), "alpha must be a scalar"),
    ],
)
def test_a_bad_alpha_is_refused(alpha, match):
    with pytest.raises(ValueError, match=match):
        flow(CENTERED, alpha=alpha if np.ndim(alpha) == 0 else jnp.asarray(alpha))


@pytest.mark.parametrize(
    ("ts", "match"),
    [
        ([0.0, 2.0, 1.0], r"ts\[1\] = 2.0 and ts\[2\] = 1.0"),
        ([0.0, 1.0, 1.0], "strictly increasing"),
        ([0.0], "at least two times"),
        ([0.0, np.inf, np.inf], "only the last|except that the last"),
        ([0.0, np.nan], "finite, except that the last may be inf"),
    ],
)
def test_bad_times_are_refused(ts, match):
    with pytest.raises(ValueError, match=match):
        flow(CENTERED, np.array(ts))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"save": ("output",)}, "save must be a tuple"),
        ({"save": "outputs"}, "save must be a tuple"),
        ({"rtol": 0.0}, "rtol must be positive"),
        ({"atol": -1.0}, "atol not negative"),
        ({"max_steps": 0}, "max_steps must be at least 1"),
    ],
)
def test_bad_options_are_refused(options, match):
    with pytest.raises(ValueError, match=match):
        flow(CENTERED, **options)


def test_alpha_inf_needs_a_zero_output():
    with pytest.raises(ValueError, match=r"alpha=inf needs a model with h\(w0\) = 0.*lazyjax.center"):
        flow(UNCENTERED, alpha=np.inf)
    start = eqx.filter_jit(lambda h, loss, w0, alpha: make_field(h, loss, w0, alpha, zero_start=False).start)
    with pytest.raises(eqx.EquinoxRuntimeError, match="alpha=inf needs a model"):
        start(UNCENTERED.h, UNCENTERED.loss, UNCENTERED.w0, jnp.asarray(np.inf))


def test_a_lane_without_a_start_fails_alone():
    run = jax.jit(jax.vmap(lambda alpha: flow(UNCENTERED, alpha=alpha, throw=False, **TSIT5)))(
        jnp.asarray(np.array([1.0, np.inf]))
    )
    good = np.asarray(jax.vmap(lambda r: r == diffrax.RESULTS.successful)(run.result))
    np.testing.assert_array_equal(good, [True, False])
    assert relative_error(run.outputs[0], flow(UNCENTERED, alpha=1.0, **TSIT5).outputs) < 1e-8
    # It ends at the smallest step, not after all of max_steps.
    assert int(run.stats["num_steps"][1]) < 100


def test_a_rounding_residue_that_alpha_makes_large_is_warned_of():
    half = problems.centered(3, dtype=jnp.float32).w0
    both = zip((half["a"], half["b"]), (-half["a"], half["b"]), strict=True)
    a, b = (jnp.asarray(np.concatenate(pair)) for pair in both)
    w0, x, loss = {"a": a, "b": b}, normal(3, 5, 3, dtype=jnp.float32), lj.square_loss(jnp.asarray(np.ones(5, "f4")))
    h = lj.on_data(lj.models.two_layer(jnp.tanh), x)
    assert np.max(np.abs(jax.jit(h)(w0))) > 0, "the sum cancels by luck: take another seed"
    with pytest.warns(UserWarning, match="rounding residue.*lazyjax.center"):
        assert not check_start(h, loss, w0, 1e5, 1e-6)
    assert check_start(lj.on_data(lj.center(h.f, w0), x), loss, w0, 1e5, 1e-6)


@pytest.mark.parametrize(
    ("h", "w0", "error", "match"),
    [
        (lambda w: jnp.sqrt(w), np.zeros(5), ValueError, "h must be differentiable at w0, but 5 of 5"),
        (lambda w: jnp.log(w), -np.ones(5), ValueError, r"h\(w0\) must be finite, but 5 of its 5"),
        (lambda w: 1 / w, np.array([1.0, 1, 0, 1, 1]), ValueError, r"h\(w0\) must be finite, but 1 of its 5"),
        (lambda w: w, np.array([1.0, np.nan, 1, 1, 1]), ValueError, r"w0 must be finite, but 1 of its 5.*\(1,\)"),
        (lambda w: 1.0 * w, np.arange(5), TypeError, "at least one real floating array"),
        (lambda w: w.real, np.ones(5, complex), TypeError, "complex"),
        (lambda w: w, np.ones(4), ValueError, r"outputs \(4,\) and target \(5,\)"),
        (lambda w: w[:, None, None], np.ones(5), ValueError, r"shape \(n,\) or \(n, k\)"),
        (lambda w: (w > 0).astype(int), np.ones(5), TypeError, "real floating outputs"),
        (lambda w: w[:0], np.ones(5), ValueError, "is the data empty"),
    ],
)
def test_what_cannot_be_followed_is_refused(h, w0, error, match):
    with pytest.raises(error, match=match):
        lj.gradient_flow(h, lj.square_loss(jnp.asarray(np.ones(5))), jnp.asarray(w0), jnp.asarray(TIMES))


def test_a_target_in_place_of_a_loss_is_named():
    with pytest.raises(TypeError, match=r"lazyjax.square_loss\(target\)"):
        as_loss(CENTERED.target)
    with pytest.raises(ValueError, match="to one real number"):
        flow(CENTERED._replace(loss=lambda y: y))


def test_a_tangent_and_a_start_of_other_structure_are_refused():
    tangent = lj.linearize(CENTERED.h, CENTERED.w0)
    with pytest.raises(ValueError, match="structure of the parameters that h was linearized at"):
        flow(CENTERED._replace(h=tangent, w0={"a": CENTERED.w0["a"]}))


@pytest.mark.parametrize("alpha", [1e39, 1e-46])
def test_a_scale_that_the_outputs_do_not_hold_is_refused(alpha):
    w0 = jnp.ones(2, jnp.float32)
    loss = lj.square_loss(jnp.ones(2, jnp.float32))
    with pytest.raises(ValueError, match=r"alpha must be a number that float32 holds, got 1e"):
        check_start(jnp.sin, loss, w0, alpha, 1e-6)


def test_a_loss_without_a_derivative_at_the_start_is_named():
    singular = lj.losses.function_loss(lambda y: jnp.sum(jnp.log(y)))
    with pytest.raises(ValueError, match=r"loss must be differentiable at the outputs.* 5 of the 5 entries"):
        flow(problems.linear()._replace(loss=singular))


def test_forward_mode_passes_through_a_flow():
    """d/ds of the flow of target s y from 0 is the flow of target y, for a linear model."""
    problem = problems.linear()
    ts = jnp.asarray(TIMES)

    def outputs(s):
        loss = lj.square_loss(s * problem.target)
        adjoint = diffrax.ForwardMode()
        return lj.gradient_flow(problem.h, loss, problem.w0, ts, solver=diffrax.Tsit5(), adjoint=adjoint).outputs

    value, slope = jax.jvp(outputs, (jnp.ones(()),), (jnp.ones(()),))
    np.testing.assert_allclose(slope, value, rtol=1e-4, atol=1e-6)


def test_linear_algebra_in_half_precision_is_refused():
    h, w0, loss = (lambda w: w), jnp.ones(3, jnp.bfloat16), lj.square_loss(jnp.zeros(3))
    for model in (h, lj.linearize(h, w0)):
        with pytest.raises(TypeError, match=r"h must return float32 or float64 outputs.* got bfloat16; cast them up"):
            lj.gradient_flow(model, loss, w0, jnp.array([0.0, 1.0]))
