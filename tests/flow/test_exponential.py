"""`TangentExponential` as a diffrax solver: its scheme and order, its linear part, what diffrax does around it."""

import functools
import types

import diffrax
import equinox as eqx
import jax
import jax.flatten_util
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import optimistix
import pytest
import scipy.integrate
import scipy.linalg

import lazyjax as lj
from helpers import relative_error
from lazyjax._core.phi import phi
from lazyjax.flow.exponential import LAG_CONTRACTION, RelinearizationCost, contraction
from lazyjax.flow.linear_part import ritz_part
from lazyjax.losses.loss import as_loss
from problems import normal, normal_like

DENSE = lj.TangentExponential("dense")
N, D, WIDTH = 24, 3, 4  # 16 parameters: BB^T is 24 x 24 of rank 16


class Net(eqx.Module):
    """Two tanh layers, a factor for the outputs of every sample: a large one makes a flow stiff."""

    x: jax.Array
    factor: jax.Array

    def __call__(self, w):
        y = jnp.tanh(self.x @ w["b"].T) @ w["a"]
        return self.factor * y if y.ndim == 1 else self.factor[:, None] * y


class Linear(eqx.Module):
    """h(w) = x w."""

    x: jax.Array

    def __call__(self, w):
        return self.x @ w


@jax.jit
def draw(key):
    """X, the target, the parameters, and the head of three outputs, in one program."""
    shapes = ((N, D), (N,), (WIDTH,), (WIDTH, D), (WIDTH, 3))
    return [jr.normal(k, shape) for k, shape in zip(jr.split(key, 5), shapes, strict=True)]


X, TARGET, A, B, HEAD = (jnp.asarray(np.asarray(array)) for array in draw(jr.key(5)))
W0, WIDE = {"a": A, "b": B}, {"a": HEAD, "b": B}
LABELS, CLASSES = jnp.asarray(np.arange(N) % 2), jnp.asarray(np.arange(N) % 3)
ONES, STIFF = np.ones(N), np.array([200.0, *np.ones(N - 1)])


W_ZERO = jtu.tree_map(lambda leaf: jnp.asarray(np.zeros(leaf.shape)), W0)


def net(factor=ONES, w0=W0):
    return lj.center(Net(X, jnp.asarray(factor)), w0)


@functools.cache
def _prepared(alpha, stiff, solver):
    factor = STIFF if stiff else ONES
    return solver.prepare(net(factor), lj.square_loss(jnp.asarray(factor * np.asarray(TARGET))), W0, alpha=alpha)


def prepare(alpha, factor=ONES, solver=DENSE):
    """What diffrax needs for the square loss; another alpha or factor is another argument of one program."""
    if isinstance(alpha, float):
        return _prepared(alpha, factor is STIFF, solver)
    loss = lj.square_loss(jnp.asarray(factor * np.asarray(TARGET)))
    return solver.prepare(net(factor), loss, W0, alpha=alpha)


def jacobian(factor=ONES):
    """The Jacobian of the net at W0, (n, p), with the parameters in the order of `ravel_pytree`."""
    z = np.asarray(X) @ np.asarray(B).T
    slopes = (1 - np.tanh(z) ** 2) * np.asarray(A)
    by_b = slopes[:, :, None] * np.asarray(X)[:, None, :]
    return factor[:, None] * np.concatenate([np.tanh(z), by_b.reshape(N, -1)], axis=1)


def ravel(tree):
    return np.concatenate([np.ravel(np.asarray(leaf)) for leaf in jtu.tree_leaves(tree)])


def at(tree, i):
    return jtu.tree_map(lambda leaf: np.asarray(leaf)[i], tree)


def last(solution):
    return at(solution.ys, -1)


def as_arrays(function):
    """Compiled once for all numbers: a Python number would be part of the program."""
    compiled = eqx.filter_jit(function)
    return lambda *args: compiled(*(jnp.asarray(np.asarray(a)) if isinstance(a, float) else a for a in args))


@as_arrays
def fixed(prepared, u0, t1, steps):
    term, solver, _ = prepared
    controller = diffrax.ConstantStepSize()
    return diffrax.diffeqsolve(term, solver, 0.0, t1, t1 / steps, u0, stepsize_controller=controller)


def solve(prepared, u0, t1, rtol):
    term, solver, _ = prepared
    # A lane of NaN ends at the smallest step.
    controller = diffrax.PIDController(rtol, 0.01 * rtol, dtmin=1e-12 * t1, force_dtmin=False)
    saveat = diffrax.SaveAt(t1=True, solver_state=True)
    return diffrax.diffeqsolve(
        term,
        solver,
        0.0,
        t1,
        1e-6 * t1,
        u0,
        stepsize_controller=controller,
        saveat=saveat,
        max_steps=2**15,
        throw=False,
    )


adaptive = as_arrays(solve)


# ---- the scheme ----


def orders(prepared, u0, t1, steps):
    """Errors of fixed steps, each run with twice as many as the one before, and the orders they show."""
    truth = last(adaptive(prepared, u0, t1, 1e-12))
    errors = np.array([relative_error(last(fixed(prepared, u0, t1, float(count))), truth) for count in steps])
    return errors, np.log2(errors[:-1] / errors[1:])


def test_order_four_where_nothing_is_stiff():
    prepared = prepare(1.0)
    errors, found = orders(prepared, prepared[2], 2.0, [16, 32, 64, 128])  # 1.2e-7 to 2.8e-11
    assert float(prepared[1].linear.top) * 2.0 / 16 < 0.25
    assert errors[0] < 1e-6
    np.testing.assert_allclose(found, 4.0, atol=0.2)  # 3.99, 4.00, 4.03


def test_order_two_where_a_stiff_mode_itself_moves():
    """The derivative of N is about lambda_max/alpha here, which the theory of stiff order (3) takes to be bounded.

    The errors are small all the same, and fall like 1/alpha^2. Started after the initial layer.
    """
    coarse = []
    for alpha in (100.0, 1000.0):
        prepared = prepare(alpha, STIFF)
        start = last(adaptive(prepared, prepared[2], 1.0, 1e-12))
        errors, found = orders(prepared, start, 4.0, [8, 16, 32, 64])
        assert float(prepared[1].linear.top) * 4.0 / 64 > 200
        np.testing.assert_allclose(found, 2.0, atol=0.2)  # 1.97, 1.96, 1.93 and 2.02, 2.03, 2.11
        coarse.append(errors[0])  # 2.2e-6 and 2.3e-8
    np.testing.assert_allclose(np.log10(coarse[0] / coarse[1]), 2.0, atol=0.1)


def spectra():
    """Inputs of 8 samples and 5 parameters, so that at least 3 eigenvalues are zero."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((8, 5))
    u, _, vt = np.linalg.svd(x, full_matrices=False)
    duplicated = x.copy()
    duplicated[1:4] = duplicated[0]
    return {
        "random": x,
        "rank 2": x[:, :2] @ rng.standard_normal((2, 5)),
        "duplicated": duplicated,
        "spread": (u * np.logspace(3, -3, 5)) @ vt,
        "one value": 3.0 * u @ vt,
        "zero columns": x * np.array([1.0, 0.0, 1.0, 1.0, 0.0]),
    }


def test_linear_flows_are_exact_at_any_step_size():
    target, eps = np.asarray(normal(0, 8)), np.finfo(float).eps
    for name, x in spectra().items():
        prepared = DENSE.prepare(
            Linear(jnp.asarray(x)), lj.square_loss(jnp.asarray(target)), jnp.asarray(np.zeros(5)), alpha=3.0
        )
        u, s, vt = np.linalg.svd(x, full_matrices=False)
        kept = s > 1e-12
        for t1 in (1e-6, 1e-2, 1.0, 1e3, 1e8):
            factor = np.where(kept, -np.expm1(-(s**2) * t1 / 8) / np.where(kept, s, 1), 0)
            exact = vt.T @ (factor * (u.T @ target))
            # An eigenvalue of BB^T is right to eps lambda_max, so the exponent to t eps lambda_max.
            bound = eps * (20 + 2 * t1 * s[0] ** 2 / 8)
            for steps in (1.0, 5.0):
                assert relative_error(last(fixed(prepared, prepared[2], t1, steps)), exact) < bound, (name, t1, steps)


def test_a_stationary_point_stays():
    """Not near where L was taken: the increments D_i are zero with f."""
    field = prepare(2.0)[0].vector_field.field
    rest = jtu.tree_map(lambda leaf: jnp.asarray(1.0 + 0.1 * np.asarray(leaf)), W0)
    loss = lj.square_loss(eqx.filter_jit(lambda field, u: field.outputs(u))(field, rest))
    prepared = DENSE.prepare(net(), loss, W0, alpha=2.0)
    for t1 in (0.1, 1.0, 10.0):
        assert relative_error(last(fixed(prepared, rest, t1, 1.0)), rest) < 1e-13, t1


# ---- the linear part ----


def quartic(y):
    return jnp.sum(y**4) + jnp.sum(y**2 * jnp.roll(y, 1) ** 2)


@pytest.mark.parametrize(
    ("name", "mean"), [("square", True), ("logistic", False), ("softmax", True), ("own", True), ("not convex", True)]
)
def test_the_root_times_its_transpose_is_the_hessian(name, mean):
    y, v, other = normal(1, 5, 3, scale=3.0), normal(2, 5, 3), normal(3, 5, 3)
    loss = {
        "square": lambda: lj.square_loss(y + 1, mean=mean),
        "logistic": lambda: lj.logistic_loss(LABELS[:5], mean=mean),
        "softmax": lambda: lj.softmax_cross_entropy(CLASSES[:5], mean=mean),
        "own": lambda: as_loss(quartic),
        "not convex": lambda: as_loss(lambda y: jnp.sum(jnp.cos(y))),
    }[name]()
    if name == "logistic":
        y, v, other = y[:, 0], v[:, 0], other[:, 0]

    @eqx.filter_jit
    def products(loss, y, v, other):
        root = loss.root(y)
        expected = loss.weight * loss.hvp(y, v)
        return (
            root.apply(root.transpose(v)),
            expected,
            jnp.vdot(root.apply(v), other),
            jnp.vdot(v, root.transpose(other)),
        )

    product, expected, forward, backward = products(loss, y, v, other)
    if name == "not convex":  # the nearest positive semi-definite matrix: the diagonal one's positive part
        expected = np.maximum(-np.cos(y), 0) * v
    np.testing.assert_allclose(product, expected, rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(forward, backward, rtol=1e-12)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_roots_hold_for_outputs_far_out(dtype):
    """Probabilities underflow, their roots less; an e^-100 that vanished would be no error, a NaN would."""
    y = jnp.asarray(np.array([[100.0, -100.0, 0.0], [1e4, 0.0, -1e4]]), dtype)
    v = jnp.asarray(np.array([[2.0] * 3, [1.0] * 3]), dtype)

    @eqx.filter_jit
    def products(loss, y, v):
        root = loss.root(y)
        return root.apply(root.transpose(v)), jnp.asarray(loss.weight, y.dtype) * loss.hvp(y, v)

    softmax, logistic = lj.softmax_cross_entropy(CLASSES[1:3]), lj.logistic_loss(LABELS[1:3])
    for loss, outputs, direction in [(softmax, y, v), (logistic, y[:, 0], v[:, 0])]:
        product, expected = products(loss, outputs, direction)
        assert product.dtype == dtype
        np.testing.assert_allclose(product, expected, atol=1e-30)


def test_the_eigenvalues_are_those_of_the_gauss_newton_matrix():
    """p less than nk: 16 parameters, 72 outputs."""
    h, loss = net(STIFF, WIDE), lj.softmax_cross_entropy(CLASSES)
    _, solver, _ = DENSE.prepare(h, loss, WIDE, alpha=5.0)
    flat, unravel = jax.flatten_util.ravel_pytree(WIDE)
    j = np.asarray(jax.jit(jax.jacfwd(lambda v: h(unravel(v)).ravel()))(flat))
    hessian = np.kron(np.eye(N), (np.eye(3) - 1 / 3) / 3) / N  # at p = 1/3
    exact = np.linalg.eigvalsh(j.T @ hessian @ j)
    found = np.asarray(solver.linear.values)
    assert found.shape == (3 * N,)
    np.testing.assert_allclose(found[-flat.size :], exact, atol=1e-14 * exact[-1])
    assert np.all((found[: -flat.size] >= 0) & (found[: -flat.size] < 1e-13 * exact[-1]))
    np.testing.assert_array_equal(solver.linear.top, found[-1])


# ---- against SciPy ----


@pytest.mark.parametrize(
    ("w0", "loss"),
    [(W0, lj.square_loss(TARGET)), (W0, lj.logistic_loss(LABELS)), (WIDE, lj.softmax_cross_entropy(CLASSES))],
    ids=["square", "logistic", "softmax"],
)
def test_scipys_radau_finds_the_same(w0, loss):
    h, alpha, t1 = net(w0=w0), 2.0, 20.0
    start, unravel = jax.flatten_util.ravel_pytree(w0)
    objective = lambda v: loss(alpha * h(unravel(v))) / alpha**2
    gradient, hessian, outputs = (
        jax.jit(jax.grad(objective)),
        jax.jit(jax.hessian(objective)),
        jax.jit(lambda v: h(unravel(v))),
    )
    truth = scipy.integrate.solve_ivp(
        lambda t, v: -np.asarray(gradient(v)), (0, t1), np.asarray(start), method="Radau", rtol=1e-10, atol=1e-12,
        jac=lambda t, v: -np.asarray(hessian(v)),
    ).y[:, -1]  # fmt: skip
    prepared = DENSE.prepare(h, loss, w0, alpha=alpha)
    found = np.asarray(start) + ravel(last(adaptive(prepared, prepared[2], t1, 1e-10))) / alpha
    # 2.6e-11, 2.3e-11, 2.3e-11 of the way, at most 9e-11 of the outputs.
    assert relative_error(found - start, truth - start) < 1e-9
    assert relative_error(outputs(found), outputs(truth)) < 1e-9


def test_relinearization_follows_a_hessian_that_fades():
    """Cross-entropy: what is fitted loses its curvature, and a linear part that stays behind costs order and steps."""
    factor, loss = STIFF**0.5, lj.logistic_loss(LABELS)
    prepared, moving = (
        solver.prepare(net(factor), loss, W0, alpha=100.0)
        for solver in (DENSE, lj.TangentExponential("dense", relinearize=True))
    )
    truth = last(adaptive(prepared, prepared[2], 100.0, 1e-8))
    plain, moved = (adaptive(p, p[2], 100.0, 1e-5) for p in (prepared, moving))
    assert int(plain.stats["num_steps"]) > 5 * int(moved.stats["num_steps"])
    assert relative_error(last(plain), truth) < 1e-4  # 1.1e-5
    assert relative_error(last(moved), truth) < 1e-5  # 3.5e-7


def test_the_contraction_of_the_stages_is_that_of_a_scalar_problem():
    """u' = -(lambda + delta) u with L = -lambda: D_3 - D_2 is -delta (U_3 - U_2), and phi_2(-h lambda / 2) takes it."""
    one = jnp.asarray(np.ones(1))
    _, solver, _ = DENSE.prepare(Linear(jnp.asarray(np.array([[2.0]]))), lj.square_loss(one), 0 * one)
    delta = 0.5

    @eqx.filter_jit
    def contractions(linear, h):
        b = linear.point.products()
        d2 = linear.expand(b, 0.7 * one, linear.origin())
        moved, _ = linear.combine(b, h, [(d2, 0.5, {2: 1.0})])
        d3 = linear.expand(b, d2.direct - delta * moved, linear.origin())
        large = linear.expand(b, 1e17 * moved, linear.origin())
        return [contraction(linear, b, h, f, d2, d3, moved) for f in (d2, large)], phi(-0.5 * h * linear.top, 2)

    (found, rounding), value = contractions(solver.linear, jnp.asarray(np.array(0.3)))
    np.testing.assert_allclose(found, 0.3 * delta * float(value), rtol=1e-12)
    # What is smaller than the rounding of f says nothing.
    assert float(rounding) == 0


def test_a_new_linear_part_that_changes_little_doubles_its_price():
    number = lambda value: jnp.asarray(np.array(value))
    start = RelinearizationCost.at_start(0.0, 5.0, number(0.0))
    stepped = lambda cost, *contractions: functools.reduce(
        lambda c, rho: c.add_step(number(rho), number(2.0), 4.0), contractions, cost
    )
    assert float(stepped(start, 3.0).price) == 5
    np.testing.assert_allclose(stepped(start, 0.5 * LAG_CONTRACTION, 4 * LAG_CONTRACTION).steps_lost, 0.75)
    renewed = stepped(start, 3.0).renewed(number(0.4))
    assert (float(renewed.steps_lost), float(renewed.price)) == (0, 5)
    lossy = stepped(start, *[3.0] * 6)
    assert bool(lossy.is_due(number(6.0)))
    assert not bool(lossy.is_due(number(4.0)))
    assert not bool(stepped(start, 3.0).is_due(number(6.0)))
    assert float(stepped(renewed, 0.5).price) == 10
    assert float(stepped(renewed, 0.3).price) == 4
    assert float(stepped(renewed, 0.5, 0.5).price) == 10


def test_nothing_is_linearized_anew_along_a_linear_flow():
    """Rounding alone would contract by 0.7 and more."""
    for alpha in (1e9, np.inf):
        prepared = prepare(alpha, STIFF, lj.TangentExponential("dense", relinearize=True))
        run = adaptive(prepared, prepared[2], 1e4, 1e-6)
        assert float(run.solver_state.cost.steps_lost) < 0.3 * int(run.stats["num_steps"])


# ---- low rank ----


def test_ritz_pairs_of_the_linear_part():
    """All of them are the eigenpairs; of a few, functions are those of -B^T V V^T B, whatever V is."""
    point, ritz = prepare(2.0, STIFF)[1].linear.point, eqx.filter_jit(ritz_part)
    whole, exact = ritz(point, N), prepare(2.0, STIFF)[1].linear
    np.testing.assert_allclose(whole.values[-16:], exact.values[-16:], rtol=1e-11, atol=1e-13 * float(exact.top))
    few = ritz(point, 4)
    assert relative_error(few.values[-1], exact.values[-1]) < 1e-6
    assert np.all(np.asarray(few.values) <= np.asarray(exact.values[-4:]) * (1 + 1e-12))
    again = ritz(point, 4, few.vectors)
    assert np.all(np.asarray(again.values) >= np.asarray(few.values) * (1 - 1e-12))
    direction = normal_like(7, W0)
    d, b = ravel(direction), jacobian(STIFF) / N**0.5
    projected = np.asarray(few.vectors).T @ b
    for h in (1e-2, 10.0):
        argument = -h * projected.T @ projected
        augmented = np.block([[argument, d[:, None]], [np.zeros((1, d.size + 1))]])
        delta, _ = phi_of(few, jnp.asarray(np.array(h)), direction)
        assert relative_error(ravel(delta), h * scipy.linalg.expm(augmented)[:-1, -1]) < 1e-10


def test_a_low_rank_costs_steps_and_no_precision():
    """What is left out of L is in N: the same flow, in more steps where what is left out is stiff."""
    truth, few = (prepare(10.0, STIFF, lj.TangentExponential("dense", rank=rank)) for rank in (None, 3))
    assert few[1].linear.vectors.shape == (N, 3)
    truth, found = (adaptive(prepared, prepared[2], 100.0, 1e-7) for prepared in (truth, few))
    assert relative_error(last(found), last(truth)) < 1e-6
    assert int(found.stats["num_steps"]) > int(truth.stats["num_steps"])


def test_a_low_rank_that_moves_with_the_kernel_and_its_gradient():
    """What `solver=None` takes for many outputs: the same flow, and the derivative of its end by alpha."""
    solver = lj.TangentExponential("dense", relinearize=True, rank=6)

    given = normal_like(8, W0)

    @jax.jit
    @functools.partial(jax.grad, has_aux=True)
    def slope_and_end(alpha):
        prepared = prepare(alpha, STIFF, solver)
        end = jtu.tree_map(lambda leaf: leaf[-1], solve(prepared, prepared[2], 100.0, 1e-7).ys)
        return sum(jnp.vdot(a, b) for a, b in zip(jtu.tree_leaves(end), jtu.tree_leaves(given), strict=True)), end

    def whole(alpha):
        return ravel(last(adaptive(prepare(alpha, STIFF), W_ZERO, 100.0, 1e-7)))

    slope, few = slope_and_end(jnp.asarray(np.array(20.0)))
    assert relative_error(ravel(few), whole(20.0)) < 3e-5  # 1.2e-5
    difference = (whole(20.5) - whole(19.5)) @ ravel(given)
    np.testing.assert_allclose(slope, difference, rtol=1e-2)
    # As many as there are outputs, or more, are all of them.
    assert prepare(1.0, STIFF, lj.TangentExponential("dense", rank=100))[1].rank is None


def test_a_bad_rank_is_refused():
    with pytest.raises(ValueError, match=r"rank must be at least 1.*rank=0"):
        lj.TangentExponential("dense", rank=0)
    with pytest.raises(ValueError, match=r'rank must be.*method="lanczos"'):
        lj.TangentExponential("lanczos", rank=4)


# ---- Lanczos ----


@eqx.filter_jit
def phi_of(part, h, direction):
    """h phi_1(hL) d, and B of it."""
    b = part.point.products()
    return part.combine(b, h, [(part.expand(b, direction, part.origin()), 1.0, {1: 1.0})])


def test_functions_of_the_linear_part_are_those_of_its_matrix():
    """By the eigendecomposition and by Lanczos in a Krylov space that ends early: the rank is 16, the dimension 24."""
    direction = normal_like(7, W0)
    d = ravel(direction)
    for factor in (ONES, STIFF):
        parts = [prepare(2.0, factor, solver)[1].linear for solver in (DENSE, lj.TangentExponential("lanczos", 64))]
        b = jacobian(factor) / N**0.5
        _, singular, vt = np.linalg.svd(b)
        for h in (1e-3, 1.0, 1e4):
            z = singular**2 * h
            exact = h * vt.T @ (-np.expm1(-z) / z * (vt @ d))
            for part, basis in zip(parts, (np.asarray(parts[0].vectors), np.eye(N)), strict=True):
                delta, image = phi_of(part, jnp.asarray(np.array(h)), direction)
                found = ravel(delta)
                # An eigenvalue is right to eps lambda_max, so the exponent to h eps lambda_max.
                bound = 1e-14 * (100 + singular[0] ** 2 * h)
                assert relative_error(found, exact) < bound, h
                assert relative_error(basis @ image, b @ exact) < bound, h


def test_lanczos_follows_the_same_flow_as_the_eigendecomposition():
    """With a Krylov space that is too small: its truncation is in the error estimate, and bounds the step."""
    for factor, t1 in [(ONES, 100.0), (ONES, 1e4), (STIFF, 10.0)]:
        dense, krylov = (prepare(1000.0, factor, solver) for solver in (DENSE, lj.TangentExponential("lanczos", 6)))
        np.testing.assert_allclose(krylov[1].linear.top, dense[1].linear.top, rtol=1e-12)
        truth, found = (adaptive(prepared, prepared[2], t1, 1e-5) for prepared in (dense, krylov))
        assert relative_error(last(found), last(truth)) < 3e-5  # 2.2e-6, 4.9e-6, 1.3e-10
        assert int(found.stats["num_steps"]) >= int(truth.stats["num_steps"])


def test_lanczos_follows_a_flow_with_one_output():
    zero, one = jnp.asarray(np.zeros(1)), jnp.asarray(np.ones(1))
    ts = jnp.asarray(np.array([0.0, 1.0]))
    flow = lj.gradient_flow(lambda w: w, lj.square_loss(zero), one, ts, solver=lj.TangentExponential("lanczos"))
    np.testing.assert_allclose(flow.outputs[-1], np.exp(-1), rtol=1e-6)


def test_a_gradient_through_lanczos_is_refused_and_named():
    lanczos = lj.TangentExponential("lanczos", 6)

    def value(alpha):
        prepared = prepare(alpha, solver=lanczos)
        return jnp.sum(solve(prepared, prepared[2], 1.0, 1e-4).ys["a"])

    with pytest.raises(NotImplementedError, match='method="dense"'):
        jax.make_jaxpr(jax.grad(value))(2.0)


# ---- what diffrax does around a solver ----

GRID = np.linspace(0.0, 8.0, 33)


@as_arrays
def observed(prepared, t1, rtol, level):
    """Everything at once: a clipped controller, a progress meter, save times, dense output, an event with a root."""
    term, solver, u0 = prepared
    field = term.vector_field.field
    controller = diffrax.ClipStepSizeController(
        diffrax.PIDController(rtol, 0.01 * rtol), step_ts=jnp.asarray(np.array([0.123]))
    )
    event = diffrax.Event(
        lambda t, y, args, **kwargs: field.loss(field.outputs(y)) - level, optimistix.Newton(1e-12, 1e-12)
    )
    saveat, meter = diffrax.SaveAt(ts=jnp.asarray(GRID), t1=True, dense=True), diffrax.TqdmProgressMeter()
    return diffrax.diffeqsolve(
        term,
        solver,
        0.0,
        t1,
        1e-3,
        u0,
        max_steps=128,
        stepsize_controller=controller,
        event=event,
        saveat=saveat,
        progress_meter=meter,
    )


def test_dense_output_save_times_and_an_event_are_restarts(capfd):
    prepared = prepare(10.0)
    field, u0 = prepared[0].vector_field.field, prepared[2]
    ends = (0.01, 0.123, 0.61, 2.8, 3.3)
    truths = {t: last(adaptive(prepared, u0, t, 1e-11)) for t in ends}
    level = eqx.filter_jit(lambda field, u: field.loss(field.outputs(u)))(field, truths[3.3])
    found = observed(prepared, 8.0, 1e-8, level)
    jax.effects_barrier()
    assert "100.00%" in capfd.readouterr().err
    assert 10 < int(found.stats["num_steps"]) < 60
    dense = eqx.filter_jit(lambda found, ts: jax.vmap(found.evaluate)(ts))(
        found, jnp.asarray(np.array([*ends, *GRID[:14]]))
    )
    for i, t in enumerate(ends):
        assert relative_error(at(dense, i), truths[t]) < 1e-6, t  # at most 1.1e-7
    # The save times before the event, then the event itself, then nothing.
    assert bool(found.result == diffrax.RESULTS.event_occurred)
    saved = int(np.sum(np.asarray(found.ts) < np.inf))
    np.testing.assert_array_equal(found.ts[: saved - 1], GRID[: saved - 1])
    assert GRID[saved - 2] < found.ts[saved - 1] < GRID[saved - 1]
    np.testing.assert_allclose(found.ts[saved - 1], 3.3, atol=1e-7)
    assert relative_error(at(found.ys, saved - 1), truths[3.3]) < 1e-6
    assert relative_error(at(found.ys, slice(1, saved - 1)), at(dense, slice(len(ends) + 1, None))) < 1e-14


def lane(alpha, w0, target):
    """Followed from its own start: its own Gram matrix, step sizes and number of steps."""
    prepared = DENSE.prepare(net(w0=w0), lj.square_loss(target), w0, alpha=alpha)
    return solve(prepared, prepared[2], 5.0, 1e-6)


def test_lanes_are_single_solves_and_nan_stays_in_its_lane():
    alphas, targets = np.array([0.5, 3.0, 1e4, np.inf]), np.asarray(normal(4, 4, N))
    scale = np.array([0.5, 1.0, 2.0, 1.0])
    w0s = {"a": scale[:, None] * normal(3, 4, WIDTH), "b": scale[:, None, None] * normal(6, 4, WIDTH, D)}
    lanes = jax.jit(jax.vmap(lane))
    whole = lanes(jnp.asarray(alphas), w0s, jnp.asarray(targets))
    successful = lambda run: np.asarray(jax.vmap(lambda r: r == diffrax.RESULTS.successful)(run.result))
    assert np.all(successful(whole))
    for i in range(4):
        w0 = jtu.tree_map(jnp.asarray, at(w0s, i))
        prepared = DENSE.prepare(net(w0=w0), lj.square_loss(jnp.asarray(targets[i])), w0, alpha=float(alphas[i]))
        single = adaptive(prepared, prepared[2], 5.0, 1e-6)
        assert int(single.stats["num_steps"]) == int(whole.stats["num_steps"][i])
        assert relative_error(at(whole.ys, i), single.ys) < 1e-12
    spoilt = targets.copy()
    spoilt[1, 0] = np.nan
    others = [0, 2, 3]
    run = lanes(jnp.asarray(alphas), w0s, jnp.asarray(spoilt))
    np.testing.assert_array_equal(successful(run), [True, False, True, True])
    jtu.tree_map(np.testing.assert_array_equal, at(run.ys, others), at(whole.ys, others))


# ---- refusals ----


def test_unfit_options_are_refused():
    with pytest.raises(ValueError, match="num_lanczos must be at least 2, got 1"):
        lj.TangentExponential(num_lanczos=1)
    # The annotation would speak first.
    unknown = types.SimpleNamespace(method="eigh", num_lanczos=64)
    with pytest.raises(ValueError, match=r"method must be .auto., .dense. or .lanczos., got 'eigh'"):
        lj.TangentExponential.__check_init__(unknown)


def test_a_solver_without_its_linear_part_says_how_to_get_it():
    term, _, u0 = prepare(1.0)
    with pytest.raises(ValueError, match=r"needs its linear part.*prepare\(h, loss, w0, alpha"):
        diffrax.diffeqsolve(term, lj.TangentExponential(), 0.0, 1.0, 0.1, u0)


def test_prepare_refuses_what_gradient_flow_refuses():
    h, loss = net(), lj.square_loss(TARGET)
    with pytest.raises(ValueError, match="alpha must be a scale in"):
        DENSE.prepare(h, loss, W0, alpha=-1.0)
    with pytest.raises(ValueError, match="same shape"):
        DENSE.prepare(h, lj.square_loss(TARGET[1:]), W0)
    with pytest.raises(ValueError, match="alpha=inf needs a model"):
        DENSE.prepare(Net(X, jnp.asarray(ONES)), loss, W0, alpha=np.inf)
