"""Flows through kinks: closed forms, a reference made by other means, what is conserved and what falls."""

import itertools
import math
import sys

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
import scipy.optimize

import lazyjax as lj
from flow.relu_reference import Reference, problem
from lazyjax.flow import ThroughKinks
from lazyjax.losses import function_loss

SOLVER = ThroughKinks(diffrax.Tsit5())
TS = np.concatenate([[0.0], np.geomspace(0.05, 4, 12)])


def follow(h, loss, w0, ts=TS, **options):
    options = {"solver": SOLVER, "rtol": 1e-8, "atol": 1e-11, "save": ("outputs", "params")} | options
    return lj.gradient_flow(h, loss, jnp.asarray(w0), jnp.asarray(ts), **options)


# ---- closed forms ----

# Models side by side: w and the outputs are stacked, the losses added up, so that each flows as if it were alone, and
# meets its kinks while the steps are those of all of them.


def rest():
    """F = (|w| + 1)^2/2: w' = -(w + 1) until w = 0, where both sides point to 0."""
    return jnp.abs, lambda y: 0.5 * (y[0] + 1) ** 2, [1.0], [np.maximum(2 * np.exp(-TS) - 1, 0)]


def release():
    """R = y1 y2 + y2 - y3: x' = 1 - H(x) z, z' = -max(x, 0) - 1, from x = 1, z = 4; with s = x + 1: s'' = s."""
    first = math.log(math.sqrt(6) - 1)
    z_first = 1 - (2 * math.sinh(first) - 3 * math.cosh(first))
    last = first + z_first - 1  # the gate value is 1/z
    assert first < last < 3.5
    x = 2 * np.cosh(TS) - 3 * np.sinh(TS) - 1
    z = 1 - 2 * np.sinh(TS) + 3 * np.cosh(TS)
    x = np.where(first > TS, x, np.where(last > TS, 0, np.cosh(TS - last) - 1))
    z = np.where(first > TS, z, np.where(last > TS, z_first + first - TS, 1 - np.sinh(TS - last)))
    h = lambda w: jnp.stack([jax.nn.relu(w[0]), w[1], w[0]])
    return h, lambda y: y[0] * y[1] + y[1] - y[2], [1.0, 4.0], [x, z]


def death():
    """R = (y1 + 1)^2/2 + y2/2 with y1 = max(w, 0), y2 = w: w' = -(w + 3/2) for w > 0, then -1/2."""
    end = math.log(5 / 3)
    right = np.where(end > TS, 2.5 * np.exp(-TS) - 1.5, -0.5 * (TS - end))
    h = lambda w: jnp.concatenate([jax.nn.relu(w), w])
    return h, lambda y: 0.5 * (y[0] + 1) ** 2 + 0.5 * y[1], [1.0], [right]


def corner():
    """F = (|v| + 2|w| + 1)^2/2 from (1, 0.5): r = |v| + 2|w| + 1, v' = -r, w' = -2r; w arrives first, then v."""
    both = math.log(3 / 1.75) / 5  # r = 3 exp(-5 t) until w = (r - r0) 2/5 + 1/2 = 0
    v = np.where(both > TS, 0.4 + 0.6 * np.exp(-5 * TS), np.maximum(1.75 * np.exp(-(TS - both)) - 1, 0))
    w = np.maximum(1.2 * np.exp(-5 * TS) - 0.7, 0)
    h = lambda w: jnp.abs(w[:1]) + 2 * jnp.abs(w[1:])
    return h, lambda y: 0.5 * (y[0] + 1) ** 2, [1.0, 0.5], [v, w]


def repelled():
    """F = (|w| - 2)^2/2 with a push that leads across 0, where the kink repels: R = (y1 - 2)^2/2 + 3 y2."""
    crossing = math.log(2)  # w' = -(w + 1) for w > 0, then -(w + 5)
    right = np.where(crossing > TS, 2 * np.exp(-TS) - 1, 5 * np.exp(-(TS - crossing)) - 5)
    h = lambda w: jnp.concatenate([jnp.abs(w), w])
    return h, lambda y: 0.5 * (y[0] - 2) ** 2 + 3 * y[1], [1.0], [right]


def turns():
    """R = -y1 - 0.3 y2 + (y3 - 1)^2/2 with y = (a|b|, a b, a): b' = a (sign b + 0.3), a' = |b| + 0.3 b + 1 - a.

    While a < 0 the kink at b = 0 attracts, from both sides; once a > 0 it repels, and the flow leaves it, to the side
    that its gate value of 0.35 is nearer to.
    """

    def linear(rate, b, a, t):
        matrix = np.array([[0.0, rate, 0], [rate, -1, 1], [0, 0, 0]])
        return scipy.linalg.expm(matrix * t)[:2] @ [b, a, 1]

    arrival = scipy.optimize.brentq(lambda t: linear(1.3, 0.2, -2, t)[0], 0, 0.2)
    pull = 1 - linear(1.3, 0.2, -2, arrival)[1]
    leaving = arrival + math.log(pull)
    right = np.zeros((2, TS.size))
    for i, t in enumerate(TS):
        if t < arrival:
            right[:, i] = linear(1.3, 0.2, -2, t)
        elif t < leaving:
            right[1, i] = 1 - pull * math.exp(arrival - t)
        else:
            right[:, i] = linear(-0.7, 0, 0, t - leaving)
    h = lambda w: jnp.stack([w[1] * jnp.abs(w[0]), w[1] * w[0], w[1]])
    return h, lambda y: -y[0] - 0.3 * y[1] + 0.5 * (y[2] - 1) ** 2, [0.2, -2.0], list(right)


CASES = {
    "slides to rest": rest,
    "leaves": release,
    "dies": death,
    "two surfaces": corner,
    "repelled": repelled,
    "turns": turns,
}


@pytest.fixture(scope="module")
def cases():
    """The flow of all cases, the part of the parameters that is each one's, and what is right."""
    models, losses, starts, rights = zip(*[case() for case in CASES.values()], strict=True)
    shapes = [jax.eval_shape(h, jnp.zeros(len(start))) for h, start in zip(models, starts, strict=True)]
    parts, outputs = (np.cumsum([0, *sizes]) for sizes in (map(len, starts), [shape.size for shape in shapes]))

    def parted(flat, ends):
        return [flat[i:j] for i, j in itertools.pairwise(ends.tolist())]

    def h(w):
        return jnp.concatenate([h(v) for h, v in zip(models, parted(w, parts), strict=True)])

    def risk(y):
        return sum(loss(v) for loss, v in zip(losses, parted(y, outputs), strict=True))

    flow = follow(h, function_loss(risk), np.concatenate(starts))
    return flow, dict(zip(CASES, zip(parted(np.asarray(flow.params).T, parts), rights, strict=True), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_flows_through_kinks_are_their_closed_forms(cases, name):
    found, right = cases[1][name]
    np.testing.assert_allclose(found, np.stack(right), rtol=1e-7, atol=1e-8)


def test_slides_and_crossings_are_counted(cases):
    """One slide to rest, two that end, two at the corner; a death and a repelling kink are crossed."""
    stats = cases[0].stats
    assert (int(stats["num_slides"]), int(stats["num_crossings"])) == (5, 2)


def test_a_flow_without_an_end_stops_on_a_kink():
    """There the gradient is not zero, but zero is between those of the two sides."""
    flow = follow(jnp.abs, lj.square_loss(-jnp.ones(1)), jnp.ones(1), [0.0, np.inf])
    assert flow.result == lj.RESULTS.successful
    np.testing.assert_allclose(flow.params[-1], 0, atol=1e-10)


# ---- the two-layer ReLU net ----

NET = lj.models.two_layer(jax.nn.relu)
TIMES = np.concatenate([[0.0], np.geomspace(1e-2, 100, 25)])


def net_problem(seed, dtype=np.float64):
    """Return a model that is zero at its start, the loss and the start."""
    x, y, b, a = (jnp.asarray(v, dtype) for v in problem(seed))
    w0 = {"a": a, "b": b}
    return lj.center(lj.on_data(NET, x), w0), lj.square_loss(y), w0


def net_flow(seed, rtol, dtype=np.float64, **options):
    options = {"solver": SOLVER, "rtol": rtol, "atol": 1e-3 * rtol, "save": ("params",)} | options
    return lj.gradient_flow(*net_problem(seed, dtype), jnp.asarray(TIMES, dtype), **options)


def flat(params):
    return np.concatenate([np.asarray(params["b"]).reshape(len(params["b"]), -1), np.asarray(params["a"])], axis=1)


@pytest.mark.parametrize("seed", [0, 1])
def test_relu_flows_are_those_of_the_reference(seed):
    x, y, b, a = problem(seed)
    right, slides = Reference(x, y, len(a)).run(b, a, TIMES)
    assert slides >= 3
    for rtol in (1e-4, 1e-6, 1e-8):
        flow = net_flow(seed, rtol)
        assert flow.result == lj.RESULTS.successful
        error = np.max(np.abs(flat(flow.params) - right)) / np.max(np.abs(right))
        assert error < 10 * rtol
        assert int(flow.stats["num_slides"]) >= slides
    # The balance of every unit, also while it slides; and a loss that falls.
    balance = np.asarray(flow.params["a"]) ** 2 - np.sum(np.asarray(flow.params["b"]) ** 2, axis=-1)
    np.testing.assert_allclose(balance, np.broadcast_to(balance[0], balance.shape), atol=1e-7)
    assert np.all(np.diff(flow.loss) < 0)


def test_units_that_arrive_at_zero_go_on_as_in_gradient_descent():
    """All surfaces of a unit meet at zero; which of them it leaves again, no first change there tells."""
    h, loss, w0 = net_problem(97)
    late = int(np.argmax(TIMES > 10))
    flow = net_flow(97, 1e-6)
    assert int(flow.stats["num_meetings"]) > 0
    slope = jax.grad(lambda w: loss(h(w)))
    distances = []
    for eta in (1e-3, 2.5e-4):
        step = lambda _, w, eta=eta: jax.tree.map(lambda a, b: a - eta * b, w, slope(w))
        w = jax.jit(lambda w, step=step, eta=eta: jax.lax.fori_loop(0, round(TIMES[late] / eta), step, w))(w0)
        end = jax.tree.map(lambda leaf: leaf[late], flow.params)
        distances.append(max(jax.tree.leaves(jax.tree.map(lambda a, b: float(jnp.max(jnp.abs(a - b))), end, w))))
    assert distances[1] < 5e-5
    assert distances[1] < distances[0] / 2


def test_default_flows_pass_through_kinks():
    """Without a word of kinks, and of a solver, the flow is right to its tolerance; `adjoint` asks for another one."""
    told, default = (net_flow(1, 1e-6, **options) for options in ({}, {"solver": None}))
    assert int(default.stats["num_slides"]) > 0
    assert np.max(np.abs(flat(default.params) - flat(told.params))) < 10 * 1e-6
    ordinary = net_flow(1, 1e-3, solver=None, adjoint=diffrax.RecursiveCheckpointAdjoint(), throw=False)
    assert int(ordinary.stats["num_slides"]) == 0


def test_more_gates_are_passed_once_steps_have_collapsed(monkeypatch):
    """As of a model with very many gates: an ordinary solver first, and where that stops once more, through kinks."""
    monkeypatch.setattr(sys.modules["lazyjax.flow.gradient_flow"], "FEW_GATES", 1)
    flow = net_flow(1, 1e-8, solver=None, max_steps=5000)
    assert flow.result == lj.RESULTS.successful
    assert int(flow.stats["num_slides"]) > 0


@pytest.mark.usefixtures("untyped")
def test_a_flow_through_kinks_takes_no_adjoint():
    with pytest.raises(ValueError, match="adjoint is for flows without kinks on their way"):
        net_flow(1, 1e-6, adjoint=diffrax.ForwardMode())


def test_adaptive_steps_alone_collapse_there():
    """What it is for: the same flow without being told of kinks does not arrive."""
    flow = net_flow(1, 1e-8, solver=diffrax.Tsit5(), throw=False)
    assert flow.result == lj.RESULTS.steps_collapsed or flow.result == lj.RESULTS.max_steps_reached


def test_single_precision_follows_double_precision():
    double, single = (net_flow(0, 1e-5, dtype) for dtype in (np.float64, np.float32))
    right = flat(double.params)
    assert np.max(np.abs(flat(single.params) - right)) < 1e-4 * np.max(np.abs(right))


@pytest.mark.end_to_end
def test_lanes_are_flows_of_their_own_and_at_infinite_scale_that_of_the_tangent_model():
    h, loss, w0 = net_problem(0)
    alphas = jnp.array([1.0, 30.0, jnp.inf])

    def run(alpha):
        options = {"solver": SOLVER, "save": ("displacement",), "throw": False, "rtol": 1e-6}
        flow = lj.gradient_flow(h, loss, w0, jnp.asarray(TIMES), alpha=alpha, **options)
        return flow.displacement, flow.result, flow.stats["num_crossings"]

    moved, results, crossings = eqx.filter_jit(jax.vmap(run))(alphas)
    assert bool(jnp.all(results == lj.RESULTS.successful))
    assert crossings[0] > crossings[1] >= crossings[2] == 0
    lane = lambda i: flat(jax.tree.map(lambda leaf: leaf[i], moved))
    tangent = lj.gradient_flow(h, loss, w0, jnp.asarray(TIMES), alpha=jnp.inf, save=("displacement",))  # closed form
    np.testing.assert_allclose(lane(2), flat(tangent.displacement), rtol=1e-5, atol=1e-6)
    alone = net_flow(0, 1e-6, alpha=30.0)
    np.testing.assert_allclose(lane(1), 30 * (flat(alone.params) - flat(alone.params)[:1]), rtol=1e-6, atol=1e-8)


# ---- deeper, and beyond ----


def test_gradient_descent_converges_to_the_flow_of_a_deep_net():
    keys = jax.random.split(jax.random.key(0), 4)
    x = jax.random.normal(keys[0], (10, 2))
    y = jnp.sin(2 * x[:, 0]) * x[:, 1]
    w0 = {
        "first": 0.5 * jax.random.normal(keys[1], (2, 6)),
        "second": 0.5 * jax.random.normal(keys[2], (6, 6)),
        "last": 0.5 * jax.random.normal(keys[3], (6,)),
    }
    h = lambda w: jax.nn.relu(jax.nn.relu(x @ w["first"]) @ w["second"]) @ w["last"]
    flow = lj.gradient_flow(h, lj.square_loss(y), w0, jnp.array([0.0, 20.0]), solver=SOLVER, save=("params",))
    assert int(flow.stats["num_crossings"]) > 10
    assert int(flow.stats["num_slides"]) > 0
    slope = jax.grad(lambda w: jnp.mean((h(w) - y) ** 2) / 2)

    @jax.jit
    def descend(eta):
        steps = jnp.round(20 / eta).astype(int)
        step = lambda _, w: jax.tree.map(lambda w, g: w - eta * g, w, slope(w))
        return jax.lax.fori_loop(0, steps, step, w0)

    end = jax.tree.map(lambda leaf: leaf[-1], flow.params)
    distances = [
        max(float(jnp.max(jnp.abs(p - q))) for p, q in zip(jax.tree.leaves(end), jax.tree.leaves(w), strict=True))
        for w in map(descend, (4e-3, 1e-3))
    ]
    assert distances[1] < 1e-3
    assert 2.5 < distances[0] / distances[1] < 6.5  # 4, if they fall like the step


def test_a_smooth_model_takes_the_solver_inside():
    options = {"save": ("outputs",), "rtol": 1e-6}
    w0, loss = jnp.ones(2), lj.square_loss(jnp.zeros(2))
    plain, told = (follow(jnp.tanh, loss, w0, solver=s, **options) for s in (diffrax.Tsit5(), SOLVER))
    np.testing.assert_array_equal(plain.outputs, told.outputs)
    assert int(told.stats["num_crossings"]) == 0


def shifted_kinks(w, x):
    units = sum(jax.nn.relu(c * w + i * x) for i, c in enumerate((1.0, 2.0, 3.0)))
    return jnp.concatenate([units, jax.nn.relu(w + 0.5), w])[None]


PUSHED = function_loss(lambda y: 0.5 * (y[0, 0] + 1) ** 2 + y[0, 1] + y[0, 2])


@pytest.mark.parametrize(("shift", "meet"), [(0.0, True), (0.2, False)])
def test_surfaces_that_meet_are_counted(shift, meet):
    """Three kinks at w = 0, or a little apart, which change the field, and one at -0.5.

    Only where they meet is the order open.
    """
    flow = follow(lj.on_data(shifted_kinks, jnp.full(1, shift)), PUSHED, [1.0])
    assert int(flow.stats["num_crossings"]) == 4
    assert (int(flow.stats["num_meetings"]) > 0) is meet


def crowd(w, kinks):
    """The outputs w and one for each kink: w' = -w - sum_i c_i [w > s_i] for the loss below."""
    return jnp.concatenate([w[None], jax.nn.relu(w[None] - kinks)], axis=1)


JUMP = 1e-3
CROWDED = function_loss(lambda y: 0.5 * y[0, 0] ** 2 + JUMP * jnp.sum(y[0, 1:]))


@pytest.mark.parametrize("rtol", [1e-4, 1e-6])
def test_many_kinks_are_passed_in_one_step(rtol):
    kinks = np.sort(np.random.default_rng(0).uniform(0.2, 0.9, 1000))[::-1]
    t, w, right = 0.0, 1.0, np.full(TS.shape, 1.0)
    for i, kink in enumerate([*kinks, -np.inf]):  # from kink to kink: w' = -(w + pull)
        pull = JUMP * (kinks.size - i)
        end = t + math.log((w + pull) / (kink + pull)) if kink > -np.inf else np.inf
        inside = (t <= TS) & (end >= TS)
        right[inside] = (w + pull) * np.exp(-(TS[inside] - t)) - pull
        t, w = end, kink
    h = lj.on_data(crowd, jnp.asarray(kinks.copy())[None])
    flow = follow(h, CROWDED, [1.0], rtol=rtol, atol=1e-3 * rtol)
    assert int(flow.stats["num_crossings"]) == kinks.size
    assert int(flow.stats["num_steps"]) < kinks.size / 3
    assert np.max(np.abs(flow.params[:, 0] - right)) < 3 * rtol


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize("solver", [diffrax.Kvaerno5(), SOLVER, "Tsit5"])
def test_what_takes_no_explicit_steps_is_refused(solver):
    with pytest.raises(TypeError, match=r"solver must be an explicit diffrax solver, .* got"):
        ThroughKinks(solver)


def test_a_sort_cannot_be_followed_through_its_kinks():
    with pytest.raises(ValueError, match="the primitive 'sort', of which no gates can be made"):
        follow(jnp.sort, lj.square_loss(jnp.zeros(2)), jnp.array([1.0, 2.0]))
