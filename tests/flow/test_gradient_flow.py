"""The flow: closed forms, identities of the gradient flow, rates in alpha, precision, and every refusal."""

import functools

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import pytest

import lazyjax as lj
from helpers import centered_problem, linear_problem, relative_error, symmetrized_problem
from lazyjax.losses.loss import as_loss

TIMES = jnp.array([0.0, 0.5, 2.0, 8.0])
TIGHT = {"rtol": 1e-10, "atol": 1e-12}
LINEAR = linear_problem(jr.key(1))
CENTERED = centered_problem(jr.key(2))
MIRRORED = symmetrized_problem(jr.key(3))


def flow(problem, ts=TIMES, **options):
    return lj.gradient_flow(problem.h, problem.loss, problem.w0, ts, **options)


def tangent_flow(problem, ts=TIMES, **options):
    return lj.gradient_flow(lj.linearize(problem.h, problem.w0), problem.loss, problem.w0, ts, **options)


@pytest.mark.parametrize("alpha", [1e-3, 1.0, 1e12, jnp.inf])
def test_a_linear_model_is_its_own_tangent_at_every_alpha(alpha):
    options = {"alpha": alpha, "save": ("outputs", "displacement"), "solver": diffrax.Tsit5()}
    ours, tangents = flow(LINEAR, **options), tangent_flow(LINEAR, **options)
    assert relative_error(ours.outputs[1:], tangents.outputs[1:]) < 1e-13
    assert relative_error(ours.displacement, tangents.displacement) < 1e-13


def test_the_linear_flow_is_the_matrix_exponential():
    kernel = np.asarray(LINEAR.x @ LINEAR.x.T) / LINEAR.x.shape[0]
    values, vectors = np.linalg.eigh(kernel)
    decay = np.exp(-np.asarray(TIMES)[:, None] * values)
    exact = np.asarray(LINEAR.target) - (decay * (vectors.T @ np.asarray(LINEAR.target))) @ vectors.T
    assert relative_error(flow(LINEAR, **TIGHT).outputs, exact) < 1e-9
    assert relative_error(tangent_flow(LINEAR).outputs, exact) < 1e-13


def test_the_closed_form_of_the_tangent_flow_is_what_the_solver_finds():
    save = ("outputs", "displacement", "params")
    closed = tangent_flow(CENTERED, alpha=10.0, save=save)
    solved = tangent_flow(CENTERED, alpha=10.0, save=save, solver=diffrax.Tsit5(), **TIGHT)
    assert int(closed.stats["num_steps"]) == 0
    assert int(solved.stats["num_vector_field"]) == 6 * int(solved.stats["num_steps"]) + 1
    for name in ("outputs", "displacement", "params", "loss"):
        assert relative_error(getattr(closed, name), getattr(solved, name)) < 1e-9, name


def test_duplicated_inputs_and_infinite_time_give_the_projection():
    """The kernel has an exact zero eigenvalue; the residual along it stays, the rest is fitted."""
    x = jnp.array([[1.0, 2.0, 0.5], [1.0, 2.0, 0.5], [0.3, -1.0, 2.0]])
    target = jnp.array([1.0, 3.0, -1.0])
    h, w0 = functools.partial(lambda w, x: x @ w, x=x), jnp.zeros(3)
    ts = jnp.array([0.0, 1.0, jnp.inf])
    save = ("outputs", "displacement")
    for options in ({}, {"solver": diffrax.Tsit5(), "rtol": 1e-9}):
        both = lj.gradient_flow(lj.linearize(h, w0), lj.square_loss(target), w0, ts, save=save, **options)
        np.testing.assert_allclose(both.outputs[-1], [2.0, 2.0, -1.0], atol=1e-8)
        pseudo_inverse = np.linalg.pinv(np.asarray(x)) @ np.asarray(target)
        np.testing.assert_allclose(both.displacement[-1], pseudo_inverse, atol=1e-8)


def test_the_loss_falls_by_the_squared_gradient():
    """R(t0) - R(t1) is the integral of |u'|^2, by Gauss-Legendre quadrature."""
    nodes, weights = np.polynomial.legendre.leggauss(12)
    ts = jnp.concatenate([jnp.array([0.0, 0.5]), 0.75 + 0.25 * jnp.asarray(nodes), jnp.array([1.0])])
    run = flow(CENTERED, ts, alpha=3.0, save=("outputs", "params"), solver=diffrax.Tsit5(), **TIGHT)

    def speed(params, outputs):
        _, vjp = jax.vjp(CENTERED.h, params)
        return sum(jnp.sum(g**2) for g in jtu.tree_leaves(vjp(CENTERED.loss.cotangent(outputs))))

    speeds = np.asarray(jax.vmap(speed)(run.params, run.outputs))[2:-1]
    np.testing.assert_allclose(run.loss[1] - run.loss[-1], 0.25 * weights @ speeds, rtol=1e-8)
    assert bool(jnp.all(jnp.diff(run.loss) < 0))


def test_relu_networks_conserve_the_balance_of_their_layers():
    """a_j^2 - |b_j|^2 is constant in time for a 2-homogeneous unit, for any loss and any alpha."""
    f, w0 = lj.models.two_layer(), lj.models.two_layer().init(jr.key(4), d=3, width=6)
    x, labels = jr.normal(jr.key(5), (7, 3)), jnp.array([0, 1, 1, 0, 1, 0, 1])
    h = lj.center(functools.partial(f, x=x), w0)
    # A short time: later a neuron sticks to a kink, where adaptive steps collapse (a Filippov sliding mode).
    run = lj.gradient_flow(
        h, lj.logistic_loss(labels), w0, TIMES / 20, alpha=2.0, save=("params",), solver=diffrax.Tsit5()
    )
    balance = run.params["a"] ** 2 - jnp.sum(run.params["b"] ** 2, axis=-1)
    moved = float(jnp.max(jnp.abs(run.params["a"][-1] - w0["a"])))
    assert moved > 0.05
    np.testing.assert_allclose(balance, jnp.broadcast_to(balance[0], balance.shape), atol=1e-6)
    assert run.outputs is None


def test_diagonal_networks_conserve_u_v_and_scale_as_their_homogeneity_says():
    """u v is constant; and with q = 2, w_alpha(t) = v(lam^(2 - 2q) t)/lam, v the flow from lam w0, alpha = lam^q."""
    x, target = jr.normal(jr.key(6), (3, 5)), jnp.array([1.0, -0.5, 0.3])
    h, w0 = functools.partial(lj.models.diagonal_linear, x=x), lj.models.diagonal_linear().init(d=5)
    loss, lam = lj.square_loss(target), 1.7
    options = {"save": ("params",), "solver": diffrax.Tsit5(), **TIGHT}
    run = lj.gradient_flow(h, loss, w0, TIMES, alpha=lam**2, **options)
    np.testing.assert_allclose(run.params["u"] * run.params["v"], 1.0, rtol=1e-8)
    larger = jtu.tree_map(lambda leaf: lam * leaf, w0)
    other = lj.gradient_flow(h, loss, larger, TIMES / lam**2, alpha=1.0, **options)
    assert relative_error(run.params, jtu.tree_map(lambda leaf: leaf / lam, other.params)) < 1e-8


@pytest.mark.parametrize(("problem", "output_rate"), [(CENTERED, -1.0), (MIRRORED, -2.0)], ids=["centered", "mirrored"])
def test_the_gaps_close_at_the_rates_of_theorem_2_2(problem, output_rate):
    alphas = (640.0, 1280.0)
    runs = [
        lj.compare(problem.h, problem.loss, problem.w0, TIMES, alpha=alpha, rtol=1e-12, atol=1e-14) for alpha in alphas
    ]
    slope = {
        name: float(jnp.log(getattr(runs[1], name).max() / getattr(runs[0], name).max()) / jnp.log(2.0))
        for name in ("output_gap", "param_gap", "displacement_norm")
    }
    assert abs(slope["output_gap"] - output_rate) < 0.02
    assert abs(slope["param_gap"] + 2.0) < 0.02
    assert abs(slope["displacement_norm"] + 1.0) < 0.02


def test_alpha_1e8_is_continuous_with_infinity():
    save = ("outputs", "displacement")
    large, limit = (flow(CENTERED, alpha=alpha, save=save, **TIGHT) for alpha in (1e8, jnp.inf))
    assert 0 < relative_error(large.outputs, limit.outputs) < 1e-7
    assert 0 < relative_error(large.displacement, limit.displacement) < 1e-7


@pytest.mark.parametrize("alpha", [1.0, 1e7, 1e12])
@pytest.mark.parametrize("make", [centered_problem, symmetrized_problem])
def test_float32_agrees_with_float64_along_the_whole_flow(make, alpha):
    single, double = _pair(make)
    save = ("outputs", "displacement")
    run = flow(single, alpha=alpha, save=save)
    truth = flow(double, alpha=alpha, save=save, **TIGHT)
    assert run.outputs.dtype == jnp.float32
    for i in range(1, len(TIMES)):
        at = functools.partial(jtu.tree_map, lambda leaf, i=i: leaf[i])
        assert relative_error(run.outputs[i], truth.outputs[i]) < 1e-4
        assert relative_error(at(run.displacement), at(truth.displacement)) < 1e-4


@functools.cache
def _pair(make):
    """A float32 problem, and the float64 one with the very same numbers."""
    single, double = make(jr.key(2), dtype=jnp.float32), make(jr.key(2))
    x, target = single.x.astype(float), single.target.astype(float)
    f = lj.models.two_layer(jnp.tanh)
    w0 = jtu.tree_map(lambda leaf: leaf.astype(float), single.w0)
    if make is centered_problem:
        f = lj.center(f, w0)
    else:
        f, w0 = lj.symmetrize(f, w0[0])
    return single, double._replace(h=functools.partial(f, x=x), w0=w0, loss=lj.square_loss(target))


def test_another_scale_or_tolerance_is_another_argument_of_the_same_program():
    traced = []

    def f(w):
        traced.append(w)
        return jnp.tanh(LINEAR.x @ w["slope"])

    h, w0 = lj.center(f, LINEAR.w0), LINEAR.w0

    def traces_of(**options):
        before = len(traced)
        run = lj.gradient_flow(h, LINEAR.loss, w0, TIMES, solver=diffrax.Tsit5(), **options)
        return len(traced) - before, int(run.stats["num_steps"])

    (first, _), (again, usual) = traces_of(), traces_of()
    assert again < first
    tight, loose = traces_of(rtol=1e-9, atol=1e-12), traces_of(rtol=1e-3, atol=1e-3)
    assert tight[0] == loose[0] == traces_of(alpha=7.0)[0] == traces_of(throw=False)[0] == again
    assert loose[1] < usual < tight[1]


def test_infinite_time_runs_to_a_stationary_point():
    ts = jnp.array([0.0, 1.0, jnp.inf])
    run = flow(LINEAR, ts, alpha=5.0)
    np.testing.assert_allclose(run.outputs[-1], LINEAR.target, atol=1e-4)
    assert bool(run.result == diffrax.RESULTS.successful)
    # The gradient has fallen by rtol, not more: the loss along the slowest mode is still there.
    assert 0 < float(run.loss[-1]) < 1e-8


def test_a_flow_that_is_not_stationary_in_time_says_so():
    ts = jnp.array([0.0, 1.0, jnp.inf])
    run = flow(CENTERED, ts, max_steps=20, throw=False)
    assert bool(run.result == diffrax.RESULTS.max_steps_reached)
    with pytest.raises(eqx.EquinoxRuntimeError, match="maximum number of solver steps"):
        flow(CENTERED, ts, max_steps=20)


@pytest.mark.parametrize(
    ("solver", "rtol"), [(diffrax.Dopri8(), 1e-8), (diffrax.Kvaerno5(), 1e-6), (diffrax.Heun(), 1e-5)]
)
def test_any_diffrax_solver_will_do(solver, rtol):
    reference = flow(CENTERED, alpha=2.0, solver=diffrax.Tsit5(), **TIGHT)
    run = flow(CENTERED, alpha=2.0, solver=solver, rtol=rtol, atol=rtol / 100)
    assert relative_error(run.outputs, reference.outputs) < 100 * rtol
    assert (int(run.stats["num_vector_field"]) == -1) == isinstance(solver, diffrax.Kvaerno5)


def test_a_fixed_step_solver_is_gradient_descent():
    import optax

    run = flow(
        CENTERED, jnp.array([0.0, 4.0]), alpha=2.0, solver=diffrax.Euler(), dt0=0.1,
        stepsize_controller=diffrax.ConstantStepSize(),
    )  # fmt: skip
    descent = lj.gradient_descent(CENTERED.h, CENTERED.loss, CENTERED.w0, optax.sgd(0.1), 40, alpha=2.0)
    assert int(run.stats["num_vector_field"]) == 40
    assert relative_error(run.outputs[-1], descent.outputs) < 1e-12


def test_lanes_of_a_vmap_are_single_flows_and_a_bad_lane_stays_alone():
    alphas = jnp.array([1.0, 30.0, 1e7, jnp.inf])
    h, w0 = CENTERED.h, CENTERED.w0

    def lane(alpha, target):
        return lj.gradient_flow(h, lj.square_loss(target), w0, TIMES, alpha=alpha, throw=False)

    targets = jnp.stack([CENTERED.target] * 4).at[1, 0].set(jnp.nan)
    run = jax.jit(jax.vmap(lane))(alphas, targets)
    good = np.asarray(jax.vmap(lambda r: r == diffrax.RESULTS.successful)(run.result))
    np.testing.assert_array_equal(good, [True, False, True, True])
    for i in (0, 2, 3):
        # Not to rounding: the step-size controller amplifies it, as far as the tolerance 1e-6 lets it. By itself a
        # single flow of known values could have another solver.
        single = flow(CENTERED, alpha=alphas[i], solver=lj.TangentExponential())
        assert relative_error(run.outputs[i], single.outputs) < 1e-8


class Net(eqx.Module):
    """An Equinox module with a float, an integer and a static leaf, two outputs a sample."""

    weight: jax.Array
    shift: jax.Array
    name: str = eqx.field(static=True)

    def __call__(self, x):
        return jnp.tanh(x @ self.weight + self.shift.astype(x.dtype)[None])


def test_equinox_modules_with_integer_leaves_and_several_outputs_flow():
    net = Net(jr.normal(jr.key(7), (3, 2)), jnp.array([1, -1]), "net")
    x, target = jr.normal(jr.key(8), (4, 3)), jr.normal(jr.key(9), (4, 2))
    h = lj.center(lambda w: w(x), net)
    options = {"alpha": 10.0, "save": ("outputs", "params"), "solver": diffrax.Tsit5()}
    run = lj.gradient_flow(h, lj.square_loss(target), net, TIMES, **options)
    assert run.outputs.shape == (4, 4, 2)
    assert isinstance(run.params, Net)
    np.testing.assert_array_equal(run.params.shift, net.shift)
    np.testing.assert_allclose(run.params.weight[0], net.weight)
    other = lj.center(lambda w: jnp.tanh(x @ w + jnp.array([[1.0, -1.0]])), net.weight)
    plain = lj.gradient_flow(other, lj.square_loss(target), net.weight, TIMES, **options)
    assert relative_error(run.outputs, plain.outputs) < 1e-10


def test_flax_parameters_flow_and_descend():
    import optax
    from flax import linen

    net = linen.Dense(2, param_dtype=float)
    x, target = jr.normal(jr.key(8), (4, 3)), jr.normal(jr.key(9), (4, 2))
    w0 = net.init(jr.key(7), x)
    h = lj.center(lambda w: net.apply(w, x), w0)
    kernel = x @ x.T + 1  # of the weights, and of the bias
    values, vectors = np.linalg.eigh(np.asarray(kernel) / 4)
    exact = target - (vectors * np.exp(-8.0 * values)) @ vectors.T @ target
    run = lj.gradient_flow(h, lj.square_loss(target), w0, TIMES, alpha=10.0, **TIGHT)
    assert relative_error(run.outputs[-1], exact) < 1e-8
    descent = lj.gradient_descent(h, lj.square_loss(target), w0, optax.sgd(8.0 / 4000), 4000, alpha=10.0)
    assert jtu.tree_structure(descent.params) == jtu.tree_structure(w0)
    assert relative_error(descent.outputs, exact) < 1e-2


def test_a_flow_may_start_from_an_output_that_is_not_zero():
    w0 = CENTERED.w0
    h = functools.partial(lj.models.two_layer(jnp.tanh), x=CENTERED.x)
    run = lj.gradient_flow(h, CENTERED.loss, w0, TIMES, alpha=3.0)
    np.testing.assert_allclose(run.outputs[0], 3.0 * h(w0), rtol=1e-14)
    moved = jtu.tree_map(lambda leaf: leaf + 0.01, w0)
    tangent = lj.gradient_flow(lj.linearize(h, w0), CENTERED.loss, moved, TIMES, alpha=3.0)
    np.testing.assert_allclose(tangent.outputs[0], 3.0 * lj.linearize(h, w0)(moved), rtol=1e-12)


def test_any_function_of_the_outputs_is_a_loss_and_the_parameters_flow_the_same():
    n = CENTERED.target.size
    own = lambda y: jnp.sum((y - CENTERED.target) ** 2) / (2 * n)
    run = lj.gradient_flow(CENTERED.h, own, CENTERED.w0, TIMES, solver=diffrax.Tsit5())
    assert relative_error(run.outputs, flow(CENTERED, solver=diffrax.Tsit5()).outputs) < 1e-12


def test_progress_is_shown_on_demand(capfd):
    flow(CENTERED, alpha=2.0, progress=True)
    jax.effects_barrier()
    assert "100.00%" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("alpha", "match"),
    [
        (0.0, "alpha must be a scale in"),
        (-1.0, "alpha must be a scale in"),
        (jnp.nan, "alpha must be a scale in"),
        (jnp.ones(2), "alpha must be a scalar"),
    ],
)
def test_a_bad_alpha_is_refused(alpha, match):
    with pytest.raises(ValueError, match=match):
        flow(CENTERED, alpha=alpha)


@pytest.mark.parametrize(
    ("ts", "match"),
    [
        ([0.0, 2.0, 1.0], r"ts\[1\] = 2.0 and ts\[2\] = 1.0"),
        ([0.0, 1.0, 1.0], "strictly increasing"),
        ([0.0], "at least two times"),
        ([0.0, jnp.inf, jnp.inf], "only the last|except that the last"),
        ([0.0, jnp.nan], "finite, except that the last may be inf"),
    ],
)
def test_bad_times_are_refused(ts, match):
    with pytest.raises(ValueError, match=match):
        flow(CENTERED, jnp.array(ts))


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
    h = functools.partial(lj.models.two_layer(jnp.tanh), x=CENTERED.x)
    with pytest.raises(ValueError, match=r"alpha=inf needs a model with h\(w0\) = 0.*lazyjax.center"):
        lj.gradient_flow(h, CENTERED.loss, CENTERED.w0, TIMES, alpha=jnp.inf)
    with pytest.raises(eqx.EquinoxRuntimeError, match="alpha=inf needs a model"):
        eqx.filter_jit(lambda a: lj.gradient_flow(h, CENTERED.loss, CENTERED.w0, TIMES, alpha=a).outputs)(
            jnp.array(jnp.inf)
        )


def test_a_lane_without_a_start_fails_alone():
    h = functools.partial(lj.models.two_layer(jnp.tanh), x=CENTERED.x)

    def lane(alpha):
        solver = lj.TangentExponential()
        return lj.gradient_flow(h, CENTERED.loss, CENTERED.w0, TIMES, alpha=alpha, solver=solver, throw=False)

    run = jax.jit(jax.vmap(lane))(jnp.array([1.0, jnp.inf]))
    good = np.asarray(jax.vmap(lambda r: r == diffrax.RESULTS.successful)(run.result))
    np.testing.assert_array_equal(good, [True, False])
    assert relative_error(run.outputs[0], lane(1.0).outputs) < 1e-8
    # It ends at the smallest step, not after all of max_steps.
    assert int(run.stats["num_steps"][1]) < 100


def test_a_rounding_residue_that_alpha_makes_large_is_warned_of():
    w0 = lj.models.two_layer().init(jr.key(3), d=3, width=12, symmetric=True, dtype=jnp.float32)
    x = jr.normal(jr.key(3), (6, 3), jnp.float32)
    h = functools.partial(lj.models.two_layer(jnp.tanh), x=x)
    residue = float(jnp.max(jnp.abs(jax.jit(h)(w0))))
    assert residue > 0, "the sum cancels by luck: take another key"
    loss = lj.square_loss(jnp.ones(6, jnp.float32))
    with pytest.warns(UserWarning, match="rounding residue.*lazyjax.center"):
        lj.gradient_flow(h, loss, w0, TIMES, alpha=1e5)
    zero = lj.gradient_flow(lj.center(h, w0), loss, w0, TIMES, alpha=1e5)
    np.testing.assert_array_equal(zero.outputs[0], 0.0)


@pytest.mark.parametrize(
    ("h", "w0", "error", "match"),
    [
        (lambda w: jnp.sqrt(w), jnp.zeros(5), ValueError, "h must be differentiable at w0, but 5 of 5"),
        (lambda w: jnp.log(w), -jnp.ones(5), ValueError, r"h\(w0\) must be finite, but 5 of its 5"),
        (lambda w: w, jnp.array([1.0, jnp.nan, 1, 1, 1]), ValueError, r"w0 must be finite, but 1 of its 5.*\(1,\)"),
        (lambda w: 1.0 * w, jnp.arange(5), TypeError, "at least one real floating array"),
        (lambda w: w.real, jnp.ones(5, complex), TypeError, "complex"),
        (lambda w: w, jnp.ones(4), ValueError, r"outputs \(4,\) and target \(5,\)"),
        (lambda w: w[:, None, None], jnp.ones(5), ValueError, r"shape \(n,\) or \(n, k\)"),
        (lambda w: (w > 0).astype(int), jnp.ones(5), TypeError, "real floating outputs"),
        (lambda w: w[:0], jnp.ones(5), ValueError, "is the data empty"),
    ],
)
def test_what_cannot_be_followed_is_refused(h, w0, error, match):
    with pytest.raises(error, match=match):
        lj.gradient_flow(h, lj.square_loss(jnp.ones(5)), w0, TIMES)


def test_a_target_in_place_of_a_loss_is_named():
    with pytest.raises(TypeError, match=r"lazyjax.square_loss\(target\)"):
        as_loss(CENTERED.target)
    with pytest.raises(ValueError, match="to one number"):
        lj.gradient_flow(CENTERED.h, lambda y: y, CENTERED.w0, TIMES)


def test_a_tangent_and_a_start_of_other_structure_are_refused():
    with pytest.raises(ValueError, match="structure of the parameters that h was linearized at"):
        lj.gradient_flow(lj.linearize(CENTERED.h, CENTERED.w0), CENTERED.loss, {"a": jnp.ones(2)}, TIMES)
