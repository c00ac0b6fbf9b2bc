"""The tangent model and the extreme singular values of Dh, against Jacobians and NumPy."""

import equinox as eqx
import jax
import jax.flatten_util
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from flax import linen

import lazyjax as lj
from lazyjax._core.lanczos import lanczos
from lazyjax.models.tangent import singular_values


def mixed(w, x):
    """Outputs (n, 2) of parameters with an integer leaf, which picks a row, and a static one."""
    return jnp.outer(jnp.tanh(x @ w["b"].T) @ w["a"], w["c"][w["row"]]) * w["scale"]


@pytest.fixture(scope="module")
def problem():
    w0 = {"a": normal(0, 6), "b": normal(1, 6, 3), "c": normal(2, 4, 2), "row": jnp.array(1), "scale": 1.5}
    x = normal(3, 5, 3)
    h = lambda w: mixed(w, x)
    return h, w0, lj.linearize(h, w0), 4


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def flat(tree):
    leaves = jax.tree.leaves(eqx.filter(tree, eqx.is_inexact_array))
    return np.concatenate([np.ravel(np.asarray(leaf)) for leaf in leaves])


def random_like(seed, w):
    """Other coordinates of the same shapes and dtypes."""
    rng = np.random.default_rng(seed)
    draw = lambda leaf: jnp.asarray(rng.normal(size=leaf.shape).astype(leaf.dtype))
    return jax.tree.map(lambda leaf: draw(leaf) if eqx.is_inexact_array(leaf) else leaf, w)


def jacobian_of(h, w):
    coordinates, rest = eqx.partition(w, eqx.is_inexact_array)
    vector, unravel = jax.flatten_util.ravel_pytree(coordinates)
    return np.asarray(jax.jit(jax.jacrev(lambda v: h(eqx.combine(unravel(v), rest)).ravel()))(vector))


def test_a_model_linear_in_its_parameters_is_its_own_tangent_model_anywhere():
    x = normal(0, 4, 6)
    h = lambda w: x @ w["w"] + w["b"]
    tangent = lj.linearize(h, {"w": normal(1, 6), "b": jnp.ones((1,))})
    for scale in (1e-6, 1.0, 1e6):
        w = {"w": scale * normal(2, 6), "b": jnp.full((1,), scale)}
        np.testing.assert_allclose(tangent(w), h(w), rtol=1e-13, atol=1e-13 * max(1, scale))


def test_products_are_those_of_the_jacobian_and_leave_other_leaves_alone(problem):
    h, w0, tangent, key = problem
    jacobian = jacobian_of(h, w0)
    u, r = random_like(key, w0), normal(key, 5, 2)
    np.testing.assert_allclose(tangent.jvp(u).ravel(), jacobian @ flat(u), rtol=1e-12, atol=1e-13)
    back = tangent.vjp(r)
    np.testing.assert_allclose(flat(back), jacobian.T @ np.asarray(r).ravel(), rtol=1e-12, atol=1e-13)
    assert back["row"] is None
    assert back["scale"] is None
    gram_r = tangent.jvp(back).ravel()  # what vjp returns is a direction that jvp takes
    np.testing.assert_allclose(gram_r, jacobian @ jacobian.T @ np.asarray(r).ravel(), rtol=1e-12, atol=1e-12)
    moved = jax.tree.map(lambda a, b: a + b if eqx.is_inexact_array(a) else a, w0, u)
    np.testing.assert_allclose(tangent(moved), h(w0) + tangent.jvp(u), rtol=1e-12)
    np.testing.assert_array_equal(tangent(w0), h(w0))
    np.testing.assert_array_equal(tangent.outputs, h(w0))


def test_the_two_products_are_adjoint_in_both_metrics(problem):
    _, w0, tangent, key = problem
    u, r = random_like(key, w0), normal(7, 5, 2)
    for mean in (True, False):
        weight = lj.square_loss(r, mean=mean).weight
        in_f = weight * jnp.sum(tangent.jvp(u) * r)  # <Dh u, r>_F
        in_parameters = flat(u) @ (weight * flat(tangent.vjp(r)))  # u . Dh* r
        np.testing.assert_allclose(in_f, in_parameters, rtol=1e-13)


def test_the_model_is_evaluated_once_for_all_products(problem):
    h, w0, _, key = problem
    coordinates, rest = eqx.partition(w0, eqx.is_inexact_array)
    u = eqx.filter(random_like(key, w0), eqx.is_inexact_array)

    def everything(coordinates, u, r):
        tangent = lj.linearize(h, eqx.combine(coordinates, rest))
        return tangent.outputs, tangent.jvp(u), tangent.jvp(tangent.vjp(r)), tangent.vjp(r + r)

    # tanh is evaluated by the model and, as its derivative is 1 - tanh^2, by no product.
    program = str(jax.make_jaxpr(everything)(coordinates, u, h(w0)))
    assert (
        program.count("= tanh")
        == str(jax.make_jaxpr(lambda c: h(eqx.combine(c, rest)))(coordinates)).count("= tanh")
        == 1
    )


def test_directions_and_cotangents_come_in_any_floating_dtype(problem):
    _, w0, tangent, key = problem
    u = jax.tree.map(lambda a: a.astype(jnp.float32) if eqx.is_inexact_array(a) else a, random_like(key, w0))
    assert tangent.jvp(u).dtype == jnp.float64
    assert tangent.vjp(jnp.ones((5, 2), jnp.float32))["a"].dtype == jnp.float64


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda t: t.jvp({"a": jnp.ones(6)}), "u must have a floating array of the same shape"),
        (lambda t: t.jvp(jax.tree.map(jnp.ones_like, t.w0) | {"a": jnp.ones(5)}), r"got .* with shapes \[\(5,\)"),
        (lambda t: t.jvp(jax.tree.map(jnp.ones_like, t.w0) | {"a": jnp.ones(6, int)}), "floating array of the same"),
        (lambda t: t.vjp(jnp.ones(10)), r"r must have the shape of the outputs, \(5, 2\), got \(10,\)"),
        (lambda t: lj.linearize(lambda w: jnp.sum(w), jnp.ones(2)), r"one array of shape \(n,\) or \(n, k\)"),
        (lambda t: lj.linearize(jnp.sin, jnp.array([jnp.inf])), "w0 must be finite, but 1 of its 1"),
        (lambda t: singular_values(t, num_matvecs=0), "num_matvecs must be at least 1, got 0"),
    ],
)
def test_unfit_arguments_are_refused(problem, call, match):
    with pytest.raises(ValueError, match=match):
        call(problem[2])


def test_parameters_without_coordinates_are_refused():
    with pytest.raises(TypeError, match="at least one real floating array"):
        lj.linearize(lambda w: w * 1.0, jnp.arange(3))


def test_a_declared_zero_is_an_exact_zero_of_the_tangent_model(problem):
    h, w0, _, _ = problem
    w32 = jax.tree.map(lambda a: a.astype(jnp.float32) if eqx.is_inexact_array(a) else a, w0)
    x = jnp.asarray(np.random.default_rng(2).normal(size=(5, 3)).astype(np.float32))
    w32["scale"] = jnp.float32(1.5)
    tangent = lj.linearize(lj.center(lambda w: mixed(w, x), w32), w32)
    np.testing.assert_array_equal(tangent.outputs, np.zeros((5, 2)))
    assert tangent.declares_zero(w32)
    assert not tangent.declares_zero({"other": jnp.ones(2)})
    assert not tangent.declares_zero(w32 | {"row": jnp.array(0)})
    assert not lj.linearize(h, w0).declares_zero(w0)


def test_equinox_and_flax_models_linearize():
    x = normal(1, 4, 3)
    net = eqx.nn.MLP(3, 2, 5, 1, activation=jnp.tanh, key=jr.key(0), dtype=jnp.float64)
    dense = linen.Sequential(
        [linen.Dense(5, param_dtype=jnp.float64), jnp.tanh, linen.Dense(2, param_dtype=jnp.float64)]
    )
    for h, w0 in [(lambda w: jax.vmap(w)(x), net), (lambda w: dense.apply(w, x), dense.init(jr.key(2), x))]:
        tangent = lj.linearize(h, w0)
        jacobian, u = jacobian_of(h, w0), random_like(3, w0)
        np.testing.assert_allclose(tangent.jvp(u).ravel(), jacobian @ flat(u), rtol=1e-12, atol=1e-13)
        expected = np.asarray(h(w0)).ravel() + jacobian @ (flat(u) - flat(w0))
        np.testing.assert_allclose(tangent(u).ravel(), expected, rtol=1e-12, atol=1e-12)


# ---- singular values ----


@eqx.filter_jit
def values_of(jacobian, num_matvecs, loss=None):
    tangent = lj.linearize(lambda w: jacobian @ w, jnp.zeros(jacobian.shape[1], jacobian.dtype))
    return singular_values(tangent, loss, num_matvecs=num_matvecs)


def matrices(n, p):
    """Jacobians whose spectra are easy, flat, repeated, of low rank, and spread over eight decades."""
    rng = np.random.default_rng(0)
    a = rng.standard_normal((n, p))
    u, _, vt = np.linalg.svd(a, full_matrices=False)
    duplicated = a.copy()
    duplicated[1] = duplicated[0]
    return {
        "random": a,
        "identity": np.eye(n, p),
        "two values": (u * np.where(np.arange(len(vt)) < 3, 2.0, 1.0)) @ vt,
        "rank 3": a[:, :3] @ rng.standard_normal((3, p)),
        "duplicated": duplicated,
        "spread": (u * np.logspace(0, -8, len(vt))) @ vt,
        "zero": np.zeros((n, p)),
    }


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("num_matvecs", [12, 40])
def test_singular_values_and_their_errors_hold_on_every_kind_of_spectrum(dtype, num_matvecs):
    n, p = 12, 15
    eps = np.finfo(dtype).eps
    for name, matrix in matrices(n, p).items():
        jacobian = matrix.astype(dtype)
        got = values_of(jnp.asarray(jacobian), num_matvecs)
        exact = np.linalg.svd(jacobian.astype(np.float64), compute_uv=False) / np.sqrt(n)
        # n steps are all there are, so nothing is left but rounding: sqrt(n) eps |Dh|^2 on an eigenvalue.
        rounding = 10 * np.sqrt(n) * eps * exact[0] ** 2
        for value, error, expected in [
            (got.largest, got.largest_error, exact[0]),
            (got.smallest, got.smallest_error, exact[-1]),
        ]:
            assert value.dtype == dtype
            assert abs(float(value) ** 2 - expected**2) <= float(error) <= 1.1 * rounding + 1e-300, name


def test_unconverged_singular_values_are_bounded_by_their_errors():
    n, p = 40, 60
    jacobian = matrices(n, p)["random"]
    eigenvalues = np.linalg.svd(jacobian, compute_uv=False) ** 2 / n
    got = values_of(jnp.asarray(jacobian), 8)
    # Ritz values lie inside the spectrum, and an eigenvalue lies within the error of each.
    assert eigenvalues[-1] < got.smallest**2 < got.largest**2 < eigenvalues[0]
    for value, error in [(got.largest, got.largest_error), (got.smallest, got.smallest_error)]:
        assert np.abs(eigenvalues - value**2).min() <= error < 0.5 * eigenvalues[0]
    # The largest converges long before n steps.
    np.testing.assert_allclose(values_of(jnp.asarray(jacobian), 30).largest ** 2, eigenvalues[0], rtol=1e-8)


def test_fewer_parameters_than_outputs_make_the_smallest_exactly_zero():
    got = values_of(jnp.asarray(matrices(12, 5)["random"]), 100)
    assert got.smallest == got.smallest_error == 0
    assert got.largest > 0


def test_the_metric_is_that_of_the_loss():
    jacobian = jnp.asarray(matrices(12, 15)["random"])
    plain = values_of(jacobian, 40, lj.square_loss(jnp.zeros(12), mean=False))
    mean = values_of(jacobian, 40, lj.square_loss(jnp.zeros(12)))
    np.testing.assert_allclose(plain.largest, np.linalg.norm(jacobian, 2), rtol=1e-13)
    np.testing.assert_allclose([mean.largest, mean.smallest], np.array([plain.largest, plain.smallest]) / np.sqrt(12))
    np.testing.assert_allclose(mean.largest, values_of(jacobian, 40).largest, rtol=1e-15)


def test_singular_values_of_one_number_and_of_several_outputs_a_sample():
    one = values_of(jnp.full((1, 1), 3.0), 100)
    np.testing.assert_allclose([one.largest, one.smallest], [3.0, 3.0], rtol=1e-15)
    assert repr(one).startswith("singular values of Dh(w0): 3 down to 3\n")
    matrix = matrices(10, 12)["random"]
    tangent = lj.linearize(lambda w: (jnp.asarray(matrix) @ w).reshape(5, 2), jnp.zeros(12))
    got = singular_values(tangent, key=jr.key(5))
    exact = np.linalg.svd(matrix, compute_uv=False) / np.sqrt(5)  # n is 5, the samples
    np.testing.assert_allclose([got.largest, got.smallest], [exact[0], exact[-1]], rtol=1e-12)


@pytest.mark.parametrize("repeats", [1, 4])
def test_lanczos_returns_eigenpairs_of_what_it_was_given(repeats):
    # Each eigenvalue `repeats` times: the Krylov space ends early, and the recurrence must go on in a new direction.
    eigenvalues = np.repeat([5.0, 2.0, 0.5], repeats)
    q, _ = np.linalg.qr(np.random.default_rng(1).standard_normal((3 * repeats, 3 * repeats)))
    matrix = jnp.asarray((q * eigenvalues) @ q.T)
    theta, residuals, vectors = lanczos(lambda v: matrix @ v, 3 * repeats, 100, dtype=jnp.float64)
    np.testing.assert_allclose(theta, np.sort(eigenvalues), rtol=1e-13)
    np.testing.assert_array_equal(residuals, 0)
    np.testing.assert_allclose(vectors @ vectors.T, np.eye(3 * repeats), atol=1e-13)
    np.testing.assert_allclose(matrix @ vectors.T, vectors.T * theta[None], atol=1e-12)
