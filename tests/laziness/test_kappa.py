"""Kappa: closed forms, brute force, every bound from above against the truth, invariances, kinks, every refusal."""

import functools
import itertools

import equinox as eqx
import jax
import jax.flatten_util as jfu
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import lazyjax as lj
import problems
from lazyjax._core.lanczos import lanczos_slack
from lazyjax.laziness import second_derivative as _curvature
from lazyjax.laziness import two_layer as _neurons
from lazyjax.laziness.hessian_norm import SecondDerivative, dense_norm_lower
from lazyjax.laziness.kappa import KINKED, kappa, measure_kinks
from lazyjax.laziness.sample_hessians import OutputRows, SampleRows, as_samples, independent_samples
from lazyjax.laziness.second_derivative import bracket, dense_upper, leaf_groups
from lazyjax.laziness.two_layer import two_layer_curvature
from lazyjax.models.maps import on_data

CENTERED = problems.centered(2, n=4, d=2, width=4)


class Polynomial(eqx.Module):
    """h(w) = L w + B(w, w) / 2 with 6 outputs and 5 parameters, as arrays: every such model is the same program."""

    linear: jax.Array
    bilinear: jax.Array

    def __call__(self, w):
        return self.linear @ w + 0.5 * (self.bilinear @ w) @ w


def polynomial(linear, bilinear):
    """From the entries that are not zero, the bilinear part symmetric."""
    full = np.zeros((6, 5)), np.zeros((6, 5, 5))
    for array, entries in zip(full, (linear, bilinear), strict=True):
        for index, value in entries.items():
            array[index] = value
    return Polynomial(jnp.asarray(full[0]), jnp.asarray(full[1] + full[1].swapaxes(1, 2)))


def padded(values, size):
    return jnp.asarray(np.append(values, np.zeros(size - len(values))))


def hessians(h, w0):
    """(outputs, p, p), plain."""
    flat, unravel = jfu.ravel_pytree(w0)
    return np.asarray(jax.jit(jax.hessian(lambda v: h(unravel(v)).ravel()))(flat))


def brute_norm(tensor, starts=400, iterations=3000):
    """sup over unit u of |B(u, u)| by projected gradient ascent from many starts: nothing of what kappa does."""
    u = np.random.default_rng(0).normal(size=(starts, tensor.shape[1]))
    shift = np.linalg.norm(tensor) ** 2 / 10
    reached = 0.0
    for i in range(iterations):
        u /= np.linalg.norm(u, axis=1, keepdims=True)
        hu = np.tensordot(u, tensor, (1, 2))
        value = np.einsum("snp,sp->sn", hu, u)
        size = np.sum(value**2, axis=1)
        if i > 300 and i % 50 == 0:  # until nothing is gained
            if np.max(size) <= reached * (1 + 1e-14):
                break
            reached = np.max(size)
        if i == 300:  # the best few are enough
            keep = np.argsort(-size)[:20]
            u, hu, value = u[keep], hu[keep], value[keep]
        u = u * shift / 20 + np.einsum("sn,snp->sp", value, hu)
    return np.sqrt(np.max(size))


def dense_kappa(h, w0, target, alphas):
    """Kappa by dense linear algebra and brute force."""
    flat, unravel = jfu.ravel_pytree(w0)
    jacobian = np.asarray(jax.jit(jax.jacrev(lambda v: h(unravel(v)).ravel()))(flat))
    residuals = [np.linalg.norm(alpha * np.asarray(h(w0)) - np.asarray(target)) / alpha for alpha in alphas]
    return np.asarray(residuals) * brute_norm(hessians(h, w0)) / np.linalg.norm(jacobian, 2) ** 2


@functools.partial(jax.jit, static_argnums=2)
def norm_of(tensor, key, starts):
    """From below, by the search on all Hessians."""
    image = lambda u: jnp.einsum("qab,a,b->q", tensor, u, u)
    outputs = (tensor.shape[0], tensor.dtype)
    return dense_norm_lower(lambda z: jnp.tensordot(z, tensor, 1), image, outputs, key, starts)


@functools.cache
def mlp_on(n=4, sizes=(2, 2, 2)):
    """(closure, partial, w0, target) of a tanh MLP with random biases."""
    rng = np.random.default_rng(5)
    w0 = [
        {"weight": problems.normal(rng, b, a, scale=(2 / a) ** 0.5), "bias": problems.normal(rng, b, scale=0.5)}
        for a, b in itertools.pairwise(sizes)
    ]
    x, f = problems.normal(rng, n, sizes[0]), lj.models.mlp(jnp.tanh)
    return (lambda w: f(w, x)), functools.partial(f, x=x), w0, problems.normal(rng, n, sizes[-1])


# ---- closed forms ----


def test_one_parameter_and_one_output():
    loss = lj.square_loss(padded(np.ones(2), 6))
    found = kappa(polynomial({}, {(0, 0, 0): 3.0, (1, 0, 0): 4.0}), loss, padded([2.0], 5))
    # |Dh| = 20, |D2h| = 10, residual (11, 15), all over sqrt 6
    np.testing.assert_allclose(found.value, np.hypot(11, 15) * 10 / 400, rtol=1e-12)
    np.testing.assert_allclose([found.lower, found.upper], found.value, rtol=1e-12)
    np.testing.assert_allclose([found.dh_norm, found.d2h_norm_lower], np.array([20, 10]) / 6**0.5, rtol=1e-12)
    matrix = np.array([[1.0, 2.0], [2.0, -5.0]])
    h = polynomial({}, {(0, i, j): matrix[i, j] for i in range(2) for j in range(2)})
    found = kappa(h, lj.square_loss(padded([], 6)), padded(np.ones(2), 5))
    largest = 2 * np.abs(np.linalg.eigvalsh(matrix)).max() / 6**0.5
    np.testing.assert_allclose([found.d2h_norm_lower, found.d2h_norm_upper], largest, rtol=1e-12)
    assert found.failure == 0


def test_diagonal_quadratic_models_attain_a_vertex():
    a = np.random.default_rng(1).normal(size=(6, 5))
    h = polynomial({}, {(i, j, j): a[i, j] for i in range(6) for j in range(5)})
    found = kappa(h, lj.square_loss(padded([], 6)), padded(np.ones(5), 5))
    truth = 2 * np.linalg.norm(a, axis=0).max() / 6**0.5
    np.testing.assert_allclose(found.d2h_norm_lower, truth, rtol=1e-9)
    assert found.d2h_norm_upper < 1.2 * found.d2h_norm_lower


def test_plus_minus_pairs_of_eigenvalues():
    """a (b . x): each Hessian has the eigenvalues +-|x_i|, and the norm is that of X."""
    x = problems.normal(3, 7, 6)
    w0 = {"a": jnp.ones(1), "b": jnp.ones((1, 6))}
    expected = np.linalg.norm(x, 2)
    loss = lj.square_loss(jnp.zeros(7), mean=False)
    closure = kappa(lambda w: (x @ w["b"][0]) * w["a"][0], loss, w0)
    by_neuron = kappa(on_data(lj.models.two_layer(lambda s: s), x), loss, w0)
    for found in (closure, by_neuron):
        # Blocks make it exact: both unfoldings of the whole are larger, by sqrt 2 or more.
        np.testing.assert_allclose([found.d2h_norm_lower, found.d2h_norm_upper], expected, rtol=1e-9)
    assert by_neuron.how == "neuron by neuron"


def test_filling_the_eigenvalues_makes_the_unfolding_of_outputs_exact():
    """h = (w w^T, t |w|^2), of norm 2 sqrt(1 + t^2); its unfoldings: 2 sqrt(1 + t^2 p), 2 sqrt((p + 1) / 2 + t^2)."""
    p, t = 6, 1.5
    tensor = np.asarray(jax.hessian(lambda w: jnp.append(jnp.outer(w, w).ravel(), t * w @ w))(jnp.ones(p)))
    whole = np.sqrt(np.linalg.eigvalsh(np.einsum("iab,iac->bc", tensor, tensor))[-1])
    outputs = np.sqrt(np.linalg.eigvalsh(np.einsum("iab,jab->ij", tensor, tensor))[-1])
    np.testing.assert_allclose([whole, outputs], 2 * np.sqrt([(p + 1) / 2 + t**2, 1 + t**2 * p]), rtol=1e-12)
    truth = 2 * np.sqrt(1 + t**2)
    np.testing.assert_allclose(norm_of(tensor, jr.key(0), 3), truth, rtol=1e-10)
    np.testing.assert_allclose(dense_upper(jnp.asarray(tensor), (0,) * p), truth, rtol=1e-10)


# ---- brute force ----


@pytest.mark.parametrize("kind", ["two-layer", "mlp"])
def test_the_value_is_that_of_brute_force(kind):
    if kind == "two-layer":
        h, w0, target = (lambda w: CENTERED.h(w)), CENTERED.w0, CENTERED.target
    else:
        h, _, w0, target = mlp_on()
    alphas = (1.0, 7.0)
    for alpha, truth in zip(alphas, dense_kappa(h, w0, target, alphas), strict=True):
        found = kappa(h, lj.square_loss(target), w0, alpha=alpha)
        np.testing.assert_allclose(found.value, truth, rtol=1e-6)
        assert found.lower <= truth * (1 + 1e-9)
        assert truth <= found.upper <= 1.5 * truth
    assert found.how == "all Hessians formed"


def test_neuron_by_neuron_is_the_whole_net():
    tensor = hessians(CENTERED.h, CENTERED.w0) / np.sqrt(CENTERED.target.size)
    truth = brute_norm(tensor)
    each = two_layer_curvature(CENTERED.f, CENTERED.w0, CENTERED.x)
    assert each.lower.shape == (4,)
    whole = kappa(CENTERED.h, CENTERED.loss, CENTERED.w0)
    assert whole.how == "neuron by neuron"
    np.testing.assert_allclose([whole.d2h_norm_lower, jnp.max(each.lower)], truth, rtol=1e-6)
    assert bool(jnp.all(each.lower <= each.upper * (1 + 1e-12)))
    assert truth * (1 - 1e-9) <= whole.d2h_norm_upper <= 1.3 * truth
    # Each neuron by itself is a net of one.
    flat = [np.asarray(CENTERED.w0["a"]), np.asarray(CENTERED.w0["b"])]
    for j in range(4):
        one = {"a": jnp.asarray(flat[0][j : j + 1]), "b": jnp.asarray(flat[1][j : j + 1])}
        np.testing.assert_allclose(each.lower[j], brute_norm(hessians(CENTERED.h, one)) / 2, rtol=1e-6)


def test_symmetrized_and_rescaled_nets_are_seen_neuron_by_neuron():
    double = problems.symmetrized(4, n=4, d=2, width=3)
    found = kappa(double.h, double.loss, double.w0)
    assert found.how == "neuron by neuron"
    np.testing.assert_allclose(found.d2h_norm_lower, brute_norm(hessians(double.h, double.w0)) / 2, rtol=1e-6)
    rescaled = kappa(lj.rescale(on_data(CENTERED.f, CENTERED.x), -3.0), CENTERED.loss, CENTERED.w0)
    assert rescaled.how == "neuron by neuron"
    plain = kappa(CENTERED.h, CENTERED.loss, CENTERED.w0)
    np.testing.assert_allclose(rescaled.d2h_norm_upper, 3 * plain.d2h_norm_upper, rtol=1e-9)


# ---- bounds from above beyond dense sizes ----


def conv_net(w, x):
    """A convolution, a look-up by the sample's class, a weight used twice, a scan: all kinds of factors."""
    seen = jax.lax.conv_general_dilated(x[:, None, :-1], w["kernel"], (1,), "VALID")
    hidden = jnp.tanh(seen.reshape(x.shape[0], -1) @ w["dense"]) + w["table"][x[:, -1].astype(int)]
    hidden = jnp.tanh(hidden @ w["square"])
    hidden = jax.lax.scan(lambda c, _: (jnp.tanh(c * w["gain"][None]), None), hidden, None, length=2)[0]
    return hidden @ w["square"][:, :2]


def conv_problem():
    rng = np.random.default_rng(9)
    shapes = {"kernel": (2, 1, 2), "dense": (6, 3), "table": (2, 3), "square": (3, 3), "gain": (3,)}
    w0 = {name: problems.normal(rng, *shape, scale=0.7) for name, shape in shapes.items()}
    x = jnp.asarray(np.concatenate([rng.normal(size=(5, 4)), np.arange(5.0)[:, None] % 2], axis=1))
    return w0, x


def test_products_with_the_sums_of_squared_hessians_in_both_ways(monkeypatch):
    w0, x = conv_problem()
    h = on_data(conv_net, x)
    form = SecondDerivative(h, w0, 0.2**0.5)
    tensor = np.sqrt(0.2) * hessians(h, w0)
    u = np.random.default_rng(1).normal(size=tensor.shape[1])
    scales = np.array([0.0, 1.0, 2.0, 0.5, 3.0])
    repeated = np.repeat(scales, [leaf.size for leaf in jax.tree.leaves(w0)])
    expected = np.einsum("iab,b,ibc,c->a", tensor, repeated, tensor, u)
    f, inputs = independent_samples(h, w0)
    rows = SampleRows(f, w0, inputs, 0.2**0.5)
    outputs = OutputRows(form, 10)
    # In blocks that do not divide the samples and outputs evenly.
    monkeypatch.setattr("lazyjax.laziness.sample_hessians.BYTES", 3 * 4 * u.size * 8)
    monkeypatch.setattr("lazyjax.laziness.sample_hessians.block_sizes", lambda *_: (2, 2))
    for way in (rows, outputs):
        found = eqx.filter_jit(lambda w, u, s: w.product(u, s))(way, jnp.asarray(u), jnp.asarray(scales))
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("route", "looseness", "visible"),
    [
        ("unfoldings by Lanczos", 1.6, True),
        ("1 unfolding by Lanczos", 2.5, False),
        ("random outputs", 12.0, False),
    ],
)
def test_every_bound_from_above_holds_and_is_not_vacuous(monkeypatch, route, looseness, visible):
    closure, partial, w0, _ = mlp_on(n=6, sizes=(3, 5, 5, 2))
    monkeypatch.setattr(_curvature, "DENSE", 0)
    h = partial if visible else closure
    if route.startswith("1"):
        monkeypatch.setattr(_curvature, "leaf_groups", lambda c: [0] * len(jax.tree.leaves(c)))
    if route == "random outputs":
        monkeypatch.setattr(_curvature, "_plan_runs", lambda *_: ([], _curvature.STEPS))
    truth = float(reference_norm())
    found = bracket(h, w0, 1 / 6, 12, jr.key(1), 10)
    assert route in found.how
    np.testing.assert_allclose(found.lower, truth, rtol=1e-5)
    assert truth * (1 - 1e-9) <= found.upper <= looseness * truth
    assert found.failure == 1e-6


@functools.cache
def reference_norm():
    closure, _, w0, _ = mlp_on(n=6, sizes=(3, 5, 5, 2))
    return norm_of(hessians(closure, w0) / 6**0.5, jr.key(77), 20)


def test_what_lanczos_may_lack_holds_as_often_as_it_says():
    """On a matrix with the spectrum of Chebyshev nodes, hard for Lanczos, from 4000 random starts."""
    size, failure = 200, 0.1
    values = np.append(0.5 * (1 - np.cos(np.pi * (np.arange(size - 1) + 0.5) / (size - 1))) * 0.9, 1.0)
    start = np.random.default_rng(0).normal(size=(4000, size))
    for steps in (8, 12):
        basis = np.zeros((4000, steps, size))
        for i in range(steps):
            v = start if i == 0 else basis[:, i - 1] * values
            for _ in range(2):
                v = v - np.einsum("sk,skp->sp", np.einsum("skp,sp->sk", basis, v), basis)
            basis[:, i] = v / np.linalg.norm(v, axis=1, keepdims=True)
        theta = np.linalg.eigvalsh(np.einsum("skp,p,slp->skl", basis, values, basis))[:, -1]
        slack = lanczos_slack(size, steps, failure)
        assert np.mean(theta * slack < 1) <= failure
        assert np.isfinite(slack)
        assert np.quantile(theta, failure) * slack < 1.5
    assert lanczos_slack(200, 200, 1e-6) == 1.0
    assert lanczos_slack(200, 3, 1e-6) == np.inf
    assert lanczos_slack(10**6, 40, 1e-6) < 1.09


def test_blocks_are_leaves_or_layers():
    assert leaf_groups({"a": jnp.ones(1), "b": jnp.ones(1)}) == [0, 1]
    assert leaf_groups(problems.rows(0, sizes=(2, 3, 4, 1)).w0) == [0, 0, 1, 1, 2, 2]
    assert leaf_groups([jnp.ones(1)] * 9) == [0] * 9


def test_samples_are_seen_where_they_are_independent_only():
    x, w0 = CENTERED.x, CENTERED.w0
    for h in (CENTERED.h, on_data(CENTERED.f, x), lj.center(on_data(lj.models.two_layer(jnp.tanh), x), w0)):
        assert independent_samples(h, w0) is not None
    assert as_samples(lambda w: CENTERED.f(w, x)) is None
    mixing = on_data(lambda w, x: jnp.tanh((x - x.mean(axis=0, keepdims=True)) @ w["b"].T) @ w["a"], x)
    assert as_samples(mixing) is not None
    assert independent_samples(mixing, w0) is None


# ---- invariances and scales ----


class Units(eqx.Module):
    """F with other units: of outputs, of parameters."""

    f: object
    outputs: jax.Array
    params: jax.Array

    def __call__(self, w, x):
        return self.outputs * self.f(jax.tree.map(lambda leaf: leaf / self.params, w), x)


def test_units_of_outputs_parameters_and_of_the_metric_do_not_matter():
    _, partial, w0, target = mlp_on()

    def in_units(outputs, params, **options):
        h = on_data(Units(partial.func, jnp.asarray(outputs), jnp.asarray(params)), partial.keywords["x"])
        loss = lj.square_loss(jnp.asarray(outputs * np.asarray(target)), **options)
        return kappa(h, loss, jax.tree.map(lambda leaf: jnp.asarray(params * np.asarray(leaf)), w0))

    plain, outputs, params = in_units(1.0, 1.0), in_units(7.0, 1.0), in_units(1.0, 3.0)
    euclidean = in_units(1.0, 1.0, mean=False)
    for other in (outputs, params, euclidean):
        names = ("value", "lower", "upper", "lazy_ratio", "alignment")
        for name in names:
            np.testing.assert_allclose(getattr(other, name), getattr(plain, name), rtol=1e-6)
    for name in ("residual_norm", "dh_norm", "d2h_norm_lower", "d2h_norm_upper"):
        np.testing.assert_allclose(getattr(euclidean, name), 2 * getattr(plain, name), rtol=1e-6)


def test_scales_alpha_and_larger_starts_of_homogeneous_models():
    a = problems.normal(1, 4, 3)
    w0 = jnp.array([1.0, -2.0, 0.5])
    target = problems.normal(2, 4)
    loss = lj.square_loss(target)
    h, q = lambda w: a @ w**3, 3
    at_one = kappa(h, loss, w0)
    for lam in (0.5, 3.0):
        direct = kappa(h, loss, jnp.asarray(lam * np.asarray(w0)))
        np.testing.assert_allclose(at_one.scaled(lam**q), direct.value, rtol=1e-8)
        formula = np.linalg.norm(lam**q * np.asarray(h(w0)) - target) / 2 / lam**q
        np.testing.assert_allclose(direct.value, formula * at_one.d2h_norm_lower / at_one.dh_norm**2, rtol=1e-8)
    alphas = jnp.array([[1.0, 10.0], [1e3, jnp.inf]])
    values = at_one.scaled(alphas)
    assert values.shape == (2, 2)
    np.testing.assert_allclose(values[0, 1], kappa(h, loss, w0, alpha=10.0).value, rtol=1e-8)
    limit = np.linalg.norm(h(w0)) / 2 * at_one.d2h_norm_lower / at_one.dh_norm**2
    np.testing.assert_allclose(values[1, 1], limit, rtol=1e-8)


def test_alpha_inf_of_a_centered_model_is_zero():
    found = kappa(CENTERED.h, CENTERED.loss, CENTERED.w0, alpha=jnp.inf)
    assert float(found.value) == float(found.upper) == 0.0
    np.testing.assert_allclose(found.residual_norm, np.linalg.norm(CENTERED.target) / 2)
    finite = kappa(CENTERED.h, CENTERED.loss, CENTERED.w0, alpha=5.0)
    np.testing.assert_allclose(found.alignment, finite.alignment, rtol=1e-12)


def test_the_slopes_in_the_width_of_two_layer_nets():
    """Bounded weights, tanh: kappa falls as m^-1/2 with a(m) = 1/sqrt m and stays with the mean field's 1/m."""
    x = problems.normal(0, 5, 3)
    loss = lj.square_loss(jnp.array([1.0, -1.0, 0.5, 2.0, -1.5]))
    widths = (40, 2000)
    slopes = {-0.5: -0.5, -1.0: 0.0}

    @functools.partial(jax.jit, static_argnums=0)
    def mean_kappa(width):
        def one(item):
            power, key = item
            first, second = jr.split(key)
            w0 = {
                "a": jr.uniform(first, (width,), minval=-1, maxval=1),
                "b": jr.uniform(second, (width, 3), minval=-1, maxval=1),
            }
            f = lj.rescale(lj.models.two_layer(jnp.tanh), jnp.asarray(float(width)) ** power)
            return kappa(on_data(f, x), loss, w0, starts=3).value

        powers, keys = jnp.repeat(jnp.asarray(list(slopes)), 12), jr.split(jr.key(width), 12)
        return jnp.mean(jax.lax.map(one, (powers, jnp.tile(keys, 2))).reshape(2, 12), axis=1)

    few, many = (mean_kappa(m) for m in widths)
    found = np.log(many / few) / np.log(widths[1] / widths[0])
    np.testing.assert_allclose(found, list(slopes.values()), atol=0.05)


# ---- kinks ----


def test_kinds_of_models():
    p = problems.centered(1, n=6, d=3, width=20)
    x, two, loss = p.x, p.w0, lj.square_loss(jnp.asarray(np.ones(6)))
    cases = {
        "smooth": (lambda w: jax.nn.logsumexp(w["b"] @ x.T, axis=0), two),
        "kinked": (on_data(lj.models.two_layer(), x), two),
        "none almost everywhere": (lambda w: jax.nn.relu(x @ w.T) @ two["a"], two["b"]),
        "affine": (polynomial({(i, i % 5): 1.0 for i in range(6)}, {}), padded([1.0], 5)),
    }
    for kind, (h, w0) in cases.items():
        found = kappa(h, loss, w0)
        assert found.curvature == kind
        outside = kind in ("kinked", "none almost everywhere")
        assert ("OUTSIDE THE THEORY" in str(found)) == outside
        assert ("step_criterion" in str(found)) == outside
        assert ("its own tangent model" in str(found)) == (kind == "affine")
        assert "certified within" in str(found)
        assert repr(found) == str(found)
    seen = []
    eqx.filter_eval_shape(lambda k: seen.append(str(k)) or k.value, found)
    assert "traced" in seen[0]


def test_sharp_bends_are_no_kinks_and_a_maximum_is():
    p = problems.centered(1, n=6, d=3, width=20)
    x, two = p.x, p.w0
    bends = lambda w: jax.nn.softplus(20 * x @ w.T) @ two["a"]
    largest = lambda w: jnp.max(x @ w.T, axis=1)
    shares = [measure_kinks(SecondDerivative(h, two["b"], 1.0), jr.key(2))[0] for h in (bends, largest)]
    assert shares[0] < 0.1 * KINKED
    assert shares[1] > 0.9


def test_the_finite_curvature_of_a_quadratic_model_is_below_its_norm_and_of_a_kink_what_it_jumps():
    form = SecondDerivative(lambda w: w**2, jnp.array([1.0]), 1.0)
    share, slope, finite = measure_kinks(form, jr.key(0))
    np.testing.assert_allclose(share, 0, atol=1e-10)
    np.testing.assert_allclose(slope, 2.0, rtol=1e-12)
    assert bool(finite)
    # |w - 1 + 1e-9|: over a step of 0.3 the slope changes by 2.
    form = SecondDerivative(lambda w: jnp.abs(w - 1 + 1e-9) + w**2, jnp.array([1.0]), 1.0)
    share, slope, _ = measure_kinks(form, jr.key(0))
    np.testing.assert_allclose(share, 2 * 0.3 / (2 * 0.3 + 2 * 0.3**2), rtol=1e-6)
    np.testing.assert_allclose(slope, (0.6 + 0.18) / 0.09, rtol=1e-6)


# ---- next to lazy_ratio ----


def test_the_lazy_ratio_is_lazy_ratio_and_at_least_half_of_kappa():
    found = kappa(CENTERED.h, CENTERED.loss, CENTERED.w0, alpha=3.0)
    other = lj.laziness.lazy_ratio(CENTERED.h, CENTERED.loss, CENTERED.w0, alpha=3.0)
    np.testing.assert_allclose(found.lazy_ratio, other, rtol=1e-6)
    assert found.lazy_ratio >= found.value / 2
    assert 0 < found.alignment <= 1


def test_a_small_kappa_with_a_large_lazy_ratio():
    """The residual avoids the leading direction of Dh: kappa is small, the step criterion is not."""
    h = polynomial({(0, 0): 100.0, (1, 1): 1.0}, {(1, 1, 1): 1.0})  # (100 w0, w1 + w1^2)
    loss = lj.square_loss(padded([0.0, 1.0], 6))
    found = kappa(h, loss, padded([], 5))
    assert found.value < 1e-3
    np.testing.assert_allclose(found.lazy_ratio, found.value * 50, rtol=1e-9)
    still = kappa(h, loss, padded([0.0, -0.5], 5))
    assert float(still.alignment) == 0.0
    assert np.isinf(still.lazy_ratio)


def test_float32_and_jit_and_vmap():
    w0, x, target = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), (CENTERED.w0, CENTERED.x, CENTERED.target))
    found = kappa(on_data(lj.center(lj.models.two_layer(jnp.tanh), w0), x), lj.square_loss(target), w0)
    truth = kappa(CENTERED.h, CENTERED.loss, CENTERED.w0)
    assert found.curvature == "smooth"
    for name in ("value", "upper", "lazy_ratio", "d2h_norm_upper"):
        assert getattr(found, name).dtype == jnp.float32

    def value(scale):
        w0 = jax.tree.map(lambda leaf: scale * leaf, CENTERED.w0)
        out = kappa(lambda w: CENTERED.h(w), CENTERED.loss, w0)
        return jnp.stack([out.lower, out.value, out.upper])

    values = jax.jit(jax.vmap(value))(jnp.array([1.0, 2.0]))
    np.testing.assert_allclose(values[0, :2], [truth.lower, truth.value], rtol=1e-6)
    assert truth.value <= values[0, 2] <= 1.3 * truth.value
    np.testing.assert_allclose(found.value, truth.value, rtol=1e-4)


def test_many_outputs_have_an_upper_bound_of_dh():
    x = problems.normal(0, 80, 2)
    found = kappa(lambda w: jnp.tanh(x @ w), lj.square_loss(jnp.zeros(80)), jnp.ones(2))
    assert found.dh_norm < found.dh_norm_upper < 1.2 * found.dh_norm
    np.testing.assert_allclose(found.lower, found.value * (found.dh_norm / found.dh_norm_upper) ** 2, rtol=1e-12)
    assert found.failure == 1e-6
    assert "except with probability 1e-06" in str(found)


# ---- refusals ----


def test_bad_arguments_are_refused(monkeypatch, untyped):
    h, loss, w0 = CENTERED.h, CENTERED.loss, CENTERED.w0
    ones = lj.square_loss(jnp.ones(2))
    with pytest.raises(ValueError, match="alpha must be a scale"):
        kappa(h, loss, w0, alpha=0.0)
    with pytest.raises(ValueError, match="starts must be at least 1"):
        kappa(h, loss, w0, starts=0)
    for other in (lj.logistic_loss(jnp.ones(4)), lambda y: jnp.sum(y**2)):
        with pytest.raises(TypeError, match=r"loss must be a square loss, got \w+: kappa compares .* use square_loss"):
            kappa(h, other, w0)
    with pytest.raises(TypeError, match="loss must be a function of the outputs"):
        kappa(h, CENTERED.target, w0)
    with pytest.raises(ValueError, match="outputs and target must have the same shape"):
        kappa(h, lj.square_loss(jnp.ones(3)), w0)
    with pytest.raises(ValueError, match=r"alpha=inf needs a model with h\(w0\) = 0"):
        kappa(lambda w: w, ones, jnp.ones(2), alpha=jnp.inf)
    with pytest.raises(ValueError, match="h must depend on w0 to first order"):
        kappa(polynomial({}, {(0, 0, 0): 1.0}), lj.square_loss(padded([1.0], 6)), padded([], 5))
    with pytest.raises(ValueError, match=r"w0 and h\(w0\) must be float32 or float64, got bfloat16"):
        kappa(lambda w: w, lj.square_loss(jnp.ones(2, jnp.bfloat16)), jnp.ones(2, jnp.bfloat16))
    with pytest.raises(ValueError, match="h must be twice differentiable at w0"):
        kappa(lambda w: w + jnp.where(w == 0, 0.0, jnp.abs(w)) ** 1.5, ones, jnp.zeros(2))
    with pytest.raises(TypeError, match="f must be a two_layer net"):
        two_layer_curvature(lj.models.mlp(), w0, CENTERED.x)
    with pytest.raises(ValueError, match="starts must be at least 1"):
        two_layer_curvature(CENTERED.f, w0, CENTERED.x, starts=0)
    monkeypatch.setattr(_neurons, "BUDGET", 10)
    with pytest.raises(ValueError, match="x and w0 must be small enough"):
        two_layer_curvature(CENTERED.f, w0, CENTERED.x)
