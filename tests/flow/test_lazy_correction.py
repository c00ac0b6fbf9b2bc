"""The first-order correction: closed forms, its equation, measured gaps of the flows, precision, every refusal."""

import diffrax
import equinox as eqx
import jax
import jax.flatten_util as jfu
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import pytest

import lazyjax as lj
import problems
from helpers import relative_error
from lazyjax.flow.lazy_correction import lazy_correction
from problems import normal


def cast(tree, dtype):
    return jtu.tree_map(lambda leaf: leaf.astype(dtype) if eqx.is_inexact_array(leaf) else leaf, tree)


NODES, WEIGHTS = np.polynomial.legendre.leggauss(28)
NODES, WEIGHTS = 1.5 * (1 + NODES), 1.5 * WEIGHTS  # on [0, 3]
TIMES = np.array([0.0, 0.5, 2.0, 8.0])
FINE = np.array([0.0, *NODES, 3.0])
TIGHT = {"rtol": 1e-11, "atol": 1e-13, "solver": diffrax.Tsit5(), "max_steps": 2**14}
CENTERED, SYMMETRIZED = problems.centered(2), problems.symmetrized(3)
# float signs, no weak types: one program for what is cast back
LOGISTIC = cast(lj.logistic_loss(jnp.asarray(np.array([0, 1, 1, 0, 1]))), float)


class Net(eqx.Module):
    """An Equinox module with a float, an integer and a static leaf, two outputs a sample."""

    weight: jax.Array
    shift: jax.Array
    name: str = eqx.field(static=True)

    def __call__(self, x):
        return jnp.sin(x @ self.weight + self.shift.astype(x.dtype)[None])


def call(w, x):
    return w(x)


class Biased(eqx.Module):
    """A two-layer net with biases."""

    activation: object = eqx.field(static=True)

    def __call__(self, w, x):
        return self.activation(x @ w["b"] + w["c"][None]) @ w["a"]


def biased(seed, activation, *, n=5, d=3, width=8):
    rng = np.random.default_rng(seed)
    w0, x = {"a": normal(rng, width), "b": normal(rng, d, width), "c": normal(rng, width)}, normal(rng, n, d)
    return lj.on_data(lj.center(Biased(activation), w0), x), w0


SOFTPLUS, RELU = biased(4, jax.nn.softplus), biased(6, jax.nn.relu)
MODULE = Net(normal(7, 3, 2), jnp.asarray(np.array([1, -1])), "net")
CASES = {
    # By t = 8 the outputs' correction has fallen to 2e-4, and the tolerance of the flows, times alpha = 1e5, is a tenth
    # of how far the gap is from its limit: the order of what is left is seen at earlier times only.
    "square, relu": (RELU[0], CENTERED.loss, RELU[1], TIMES / 2),
    "logistic, softplus": (SOFTPLUS[0], LOGISTIC, SOFTPLUS[1], FINE),
    "softmax, an Equinox module": (
        lj.on_data(lj.center(call, MODULE), normal(8, 4, 3)),
        lj.softmax_cross_entropy(jnp.asarray(np.array([0, 1, 1, 0]))),
        MODULE,
        TIMES,
    ),
}


def at(tree, i):
    return jtu.tree_map(lambda leaf: np.asarray(leaf)[i], tree)


def minus(a, b, scale=1.0):
    return jtu.tree_map(lambda x, y: scale * (np.asarray(x) - np.asarray(y)), a, b)


def correct(problem, ts=TIMES, **options):
    return lazy_correction(problem.h, problem.loss, problem.w0, jnp.asarray(ts), **options)


def correct_case(case, **options):
    h, loss, w0, ts = CASES[case]
    return lazy_correction(h, loss, w0, jnp.asarray(ts), **options)


def flows(case, alpha):
    """The flow of the model and that of its tangent, in the programs of all scales."""
    h, loss, w0, ts = case
    options = {"alpha": alpha, "save": ("outputs", "displacement"), **TIGHT}
    return (lj.gradient_flow(model, loss, w0, jnp.asarray(ts), **options) for model in (h, lj.linearize(h, w0)))


# ---- closed forms ----

SLOPES = np.logspace(-1, 2, 8)
BENDS = np.array([1.0, -2.0, 0.5, 3.0, -1.0, 2.0, 5.0, 0.0])  # the last one is a line
TARGET = np.array([1.0, 2.0, -1.0, 0.5, 3.0, -2.0, 1.5, 1.0])


def parabolas(w):
    """h_i = s_i w_i + c_i w_i^2 / 2, one parameter each."""
    return SLOPES * w + BENDS * w**2 / 2


def closed_form(times):
    r"""Limits for the parabolas with the square loss, mean=False.

    With u = (y*/s) U, tau = s^2 t and eps' = eps c y*/s^2, U' = -(1 + eps' U)(U + eps' U^2/2 - 1). At eps' = 0,
    U = 1 - E with E = e^{-tau}, and V = dU/deps' follows V' = -V - U^2/2 - U(U - 1) = -V - 1/2 + 2E - 3/2 E^2, so
    V = -1/2 - E + 2 tau E + 3/2 E^2; of the outputs Z = V + U^2/2 = 2E(tau - 1 + E).
    """
    tau = np.asarray(times)[:, None] * SLOPES**2
    decay, gone = np.exp(-tau), -np.expm1(-tau)
    late = np.where(np.isinf(tau), 0, tau) * decay
    small = BENDS * TARGET / SLOPES**2
    v = 2 * late - 2 * gone + 1.5 * gone**2  # the same in 1 - E: early it cancels less
    return TARGET * small * 2 * (late - decay * gone), TARGET / SLOPES * small * v


@pytest.mark.parametrize("solver", [None, lj.TangentExponential("lanczos")], ids=["dense", "lanczos"])
def test_the_limits_of_parabolas_at_eigenvalues_from_a_hundredth_to_ten_thousand(solver):
    """Over a time of 1000, where an explicit method needs three million steps, and to the end.

    There the outputs have met, and the parameters have not: h(w) = y*/alpha is not where s w = y*/alpha.
    """
    ts = np.array([0.0, 1e-4, 1e-2, 1.0, 30.0, 1000.0, np.inf])
    loss = lj.square_loss(jnp.asarray(TARGET), mean=False)
    # The origin of time is anywhere.
    zero = jnp.asarray(np.zeros(8))
    run = lazy_correction(parabolas, loss, zero, jnp.asarray(ts + 1), solver=solver, atol=1e-16)
    outputs, displacement = closed_form(ts)
    assert bool(run.tangent_flow.stats["solver"] == lj.flow.SOLVERS.tangent_exponential)
    assert int(run.tangent_flow.stats["num_steps"]) < 500
    for i in range(1, ts.size):
        scale = np.abs(displacement[i, :-1])
        errors = np.abs(np.asarray(run.displacement[i]) - displacement[i])[:-1]
        assert np.max(errors / scale) < 2e-5, i
        # Late the outputs are the little that is left of two terms that cancel.
        errors = np.abs(np.asarray(run.outputs[i]) - outputs[i])[:-1]
        assert np.max(errors / (SLOPES[:-1] * scale)) < 2e-5, i
    for found in (run.outputs[:, -1], run.displacement[:, -1]):
        np.testing.assert_allclose(found, 0.0, atol=1e-12 * float(run.param_gap[-1]))
    np.testing.assert_allclose(displacement[-1], -BENDS * TARGET**2 / (2 * SLOPES**3), rtol=1e-14)
    for found in (run.outputs[0], run.displacement[0], run.output_gap[0], run.param_gap[0]):
        np.testing.assert_array_equal(found, 0.0)
    np.testing.assert_array_equal(run.ts, ts + 1)


def test_a_correction_that_grows_for_ever_has_no_limit_and_says_so():
    """Two outputs of one parameter: the residual that stays keeps pulling along its second derivative."""
    h = lambda w: jnp.stack([w[0] + w[1] ** 2 / 2 + w[0] * w[1], 2.0 * w[1] * w[0]])
    loss, zero = lj.square_loss(jnp.asarray(np.ones(2))), jnp.asarray(np.zeros(2))
    options = {"max_steps": 300, "solver": diffrax.Tsit5()}
    with pytest.raises(eqx.EquinoxRuntimeError, match="maximum number of solver steps"):
        lazy_correction(h, loss, zero, jnp.asarray(np.array([0.0, 1.0, np.inf])), **options)
    # v_2' tends to <residual, D^2h(ubar, e_2)> / 2 = ubar_1, ubar_1 = 1: the rate at which it leaves.
    late = lazy_correction(h, loss, zero, jnp.asarray(np.array([0.0, 40.0, 50.0])), **options)
    v = np.asarray(late.displacement)
    np.testing.assert_allclose((v[2] - v[1]) / 10, [0.0, 1.0], atol=1e-4)


# ---- the equation ----


def test_what_is_computed_solves_its_equation_in_the_outputs_and_loses_energy_as_it_must():
    """With dense Jacobians and Hessians, and quadrature between two times.

    In the outputs, z' = -Sigma D^2R(ybar) z - Sigma_1 grad R(ybar) with Sigma_1 the derivative of Dh Dh^T along ubar.
    And d/dt R(y) = -|u'|^2 at every eps, so that <grad R(ybar), z> = -2 int <ubar', v'>.
    """
    h, loss, w0, _ = CASES["logistic, softplus"]
    run = correct_case("logistic, softplus", **TIGHT)
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
    _, loss, _, ts = CASES[case]
    alphas = 10.0 ** np.arange(3, 7)
    limit = correct_case(case, **TIGHT)
    picked = (ts.size // 4, ts.size // 2, ts.size - 1)
    names = ("outputs", "displacement", "output_gap", "param_gap")
    errors = {name: np.empty((4, 3)) for name in names}
    for row, alpha in enumerate(alphas):
        flow, tangent = flows(CASES[case], alpha)
        outputs = minus(flow.outputs, tangent.outputs, alpha)
        displacement = minus(flow.displacement, tangent.displacement, alpha)
        squares = sum(np.sum(leaf.reshape(ts.size, -1) ** 2, axis=1) for leaf in jtu.tree_leaves(displacement))
        measured = {
            "outputs": outputs,
            "displacement": displacement,
            "output_gap": np.sqrt(loss.weight * np.sum(outputs.reshape(ts.size, -1) ** 2, axis=1)),
            "param_gap": np.sqrt(squares),
        }
        for name in names:
            for column, i in enumerate(picked):
                errors[name][row, column] = relative_error(at(measured[name], i), at(getattr(limit, name), i))
    for name in names:
        assert errors[name][1:].max() < 1e-3, (name, errors[name])
        assert errors[name][3].max() < 1e-5, (name, errors[name])
        if name in ("outputs", "displacement"):  # in a norm the first order of the deviation may happen to cancel
            slopes = np.diff(np.log10(errors[name][:3]), axis=0)
            np.testing.assert_allclose(slopes, -1.0, atol=0.02, err_msg=str((name, errors[name])))


def test_the_outputs_correction_of_a_symmetrized_model_vanishes_and_their_gap_falls_faster():
    limit = correct(SYMMETRIZED, **TIGHT)
    plain = correct(CENTERED, **TIGHT)
    assert np.max(limit.output_gap) < 1e-14 * np.max(limit.param_gap)
    assert np.max(plain.output_gap) > 1e-2 * np.max(plain.param_gap)
    first, second = limit.displacement  # symmetric, in the kernel of Dh
    assert relative_error(first, second) < 1e-12
    gaps = []
    for alpha in (100.0, 1000.0):
        flow, tangent = flows((SYMMETRIZED.h, SYMMETRIZED.loss, SYMMETRIZED.w0, TIMES), alpha)
        gaps.append(np.max(np.abs(minus(flow.outputs, tangent.outputs))))
        # The next order vanishes for the parameters.
        moved = minus(flow.displacement, tangent.displacement, alpha)
        squares = sum(np.sum(leaf.reshape(TIMES.size, -1) ** 2, axis=1) for leaf in jtu.tree_leaves(moved))
        assert relative_error(np.sqrt(squares), limit.param_gap) < 10 / alpha
    assert abs(np.log10(gaps[1] / gaps[0]) + 2) < 0.02


# ---- solvers, precision, transforms ----


def test_its_tangent_flow_is_that_of_gradient_flow():
    run = correct(CENTERED, **TIGHT)
    tangent, save = lj.linearize(CENTERED.h, CENTERED.w0), ("outputs", "displacement")
    flow = lj.gradient_flow(tangent, CENTERED.loss, CENTERED.w0, jnp.asarray(TIMES), save=save)
    assert relative_error(run.tangent_flow.outputs, flow.outputs) < 1e-8
    assert relative_error(run.tangent_flow.displacement, flow.displacement) < 1e-8
    assert relative_error(run.tangent_flow.loss, flow.loss) < 1e-8
    assert float(run.tangent_flow.alpha) == np.inf
    lines = str(run).splitlines()
    assert lines[0] == "Correction to first order in 1/alpha"
    assert lines[1].split() == ["output_gap", f"{float(run.output_gap[-1]):.4g}", *["/", "alpha", "at", "the", "end"]]
    assert lines[2].split() == ["param_gap", f"{float(run.param_gap[-1]):.4g}", *["/", "alpha^2", "at", "the", "end"]]
    assert lines[5] == "  along a Flow at alpha = inf, 4 times from 0 to 8"


def test_float32_agrees_with_float64_by_a_solver_that_moves_its_linear_part_too():
    single = cast(CASES["logistic, softplus"][:3], jnp.float32)
    ts, solver = jnp.asarray(FINE), lj.TangentExponential("dense", rank=3, relinearize=True)
    run = lazy_correction(*single, ts.astype(jnp.float32), solver=solver)
    truth = lazy_correction(*cast(single, float), ts, **TIGHT)
    for name in ("outputs", "displacement", "output_gap", "param_gap"):
        found = getattr(run, name)
        assert all(leaf.dtype == jnp.float32 for leaf in jtu.tree_leaves(found))
        assert relative_error(found, getattr(truth, name)) < 2e-5, name


def test_lanes_of_a_vmap_over_starts_and_targets_are_single_corrections_and_a_bad_lane_fails_alone():
    f, x = lj.models.two_layer(jnp.tanh), CENTERED.x
    w0s = [problems.centered(i).w0 for i in (7, 8, 9)]
    target = np.asarray(CENTERED.target)
    targets = jnp.asarray(np.stack([target, -2 * target, np.where(np.arange(5) == 0, np.nan, target)]))

    def lane(w0, target, **options):
        h = lj.on_data(lj.center(f, w0), x)
        return lazy_correction(h, lj.square_loss(target), w0, jnp.asarray(TIMES), **options)

    stacked = jtu.tree_map(lambda *leaves: jnp.asarray(np.stack(leaves)), *w0s)
    run = jax.jit(jax.vmap(lambda *args: lane(*args, throw=False)))(stacked, targets)
    good = np.asarray(jax.vmap(lambda r: r == lj.RESULTS.successful)(run.tangent_flow.result))
    np.testing.assert_array_equal(good, [True, True, False])
    for i in (0, 1):
        single = lane(w0s[i], targets[i], **TIGHT)
        assert relative_error(run.outputs[i], single.outputs) < 1e-5
        np.testing.assert_allclose(run.param_gap[i], single.param_gap, rtol=1e-5)


def test_any_function_of_the_outputs_will_do():
    """Its metric is Euclidean."""
    case = "softmax, an Equinox module"
    h, loss, w0, ts = CASES[case]
    labels = np.asarray(loss.labels)

    def own(y):
        return -jnp.sum(jax.nn.log_softmax(y, axis=1)[np.arange(4), labels]) / 4

    run, right = lazy_correction(h, own, w0, jnp.asarray(ts), **TIGHT), correct_case(case, **TIGHT)
    assert run.outputs.shape == (4, 4, 2)
    assert isinstance(run.displacement, Net)
    assert run.displacement.shift is None
    assert relative_error(run.outputs, right.outputs) < 1e-9
    np.testing.assert_allclose(run.output_gap, 2 * np.asarray(right.output_gap), rtol=1e-9)
    np.testing.assert_allclose(run.param_gap, right.param_gap, rtol=1e-9)


# ---- refusals ----


def test_a_model_that_is_not_zero_at_the_start_is_refused():
    h = lj.on_data(lj.models.two_layer(jnp.tanh), CENTERED.x)
    with pytest.raises(ValueError, match=r"needs a model with h\(w0\) = 0.*lazyjax.center"):
        correct(CENTERED._replace(h=h))


def test_a_start_on_a_kink_is_refused_in_either_precision():
    """One unit sees nothing but its zero bias, of a sample that is all zeros: its two sides differ."""
    h, w0 = RELU
    for dtype in (jnp.float32, float):
        x, c = np.array(h.x), np.array(w0["c"])
        x[0], c[0] = 0.0, 0.0
        start, inputs, loss = cast((w0 | {"c": jnp.asarray(c)}, jnp.asarray(x), CENTERED.loss), dtype)
        model = lj.on_data(lj.center(h.f.f, start), inputs)
        with pytest.raises(ValueError, match=r"two sides of w0.*lies on a kink"):
            correct(CENTERED._replace(h=model, loss=loss, w0=start))


@pytest.mark.parametrize(
    ("h", "w0", "error", "match"),
    [
        (lambda w: jnp.abs(w) ** 1.5 + w, np.zeros(5), ValueError, r"twice differentiable at w0, but 5 of 5 entries"),
        (lambda w: jnp.sqrt(w), np.zeros(5), ValueError, "h must be differentiable at w0, but 5 of 5"),
        (lambda w: w / (w - 2), np.array([0.0, 0, 2, 0, 0]), ValueError, r"h\(w0\) must be finite, but 1 of its 5"),
        (lambda w: w, np.array([1.0, np.nan, 1, 1, 1]), ValueError, r"w0 must be finite, but 1 of its 5.*\(1,\)"),
        (lambda w: 1.0 * w, np.arange(5), TypeError, "at least one real floating array"),
        (lambda w: w, np.zeros(4), ValueError, r"outputs \(4,\) and target \(5,\)"),
    ],
)
def test_what_cannot_be_followed_is_refused(h, w0, error, match):
    with pytest.raises(error, match=match):
        lazy_correction(h, lj.square_loss(jnp.asarray(np.ones(5))), jnp.asarray(w0), jnp.asarray(TIMES))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"ts": np.array([0.0, 2.0, 1.0])}, r"ts\[1\] = 2.0 and ts\[2\] = 1.0"),
        ({"ts": np.array([0.0, np.nan])}, "finite, except that the last may be inf"),
        ({"ts": np.array([0.0])}, "at least two times"),
        ({"rtol": 0.0}, "rtol must be positive"),
        ({"atol": -1.0}, "atol not negative"),
        ({"max_steps": 0}, "max_steps must be at least 1"),
    ],
)
def test_bad_times_and_options_are_refused(options, match):
    with pytest.raises(ValueError, match=match):
        correct(CENTERED, **options)
