"""Every public function with a derivative has a difference that keeps its digits, or one clear refusal.

Functions take a (4, 4) matrix. Those that bring a primitive of their own are compared in values, all are traced.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import jax.scipy as jsp
import numpy as np
import pytest
from jax import lax

import lazyjax as lj
from helpers import relative_error

sp = jsp.special
ALPHAS = np.array([1.0, 3.0, 10.0, 100.0, 1e3, 1e6, 1e9, 1e12, np.inf])
# Numbers that both precisions hold.
EPS = (1 / ALPHAS).astype(np.float32).astype(np.float64)


def normal(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((4, 4), np.float32).astype(np.float64)


A, U = normal(0), normal(1)


def ones(a: jax.Array) -> jax.Array:
    return jnp.ones(4, a.dtype)


def positive(a: jax.Array) -> jax.Array:
    return jnp.abs(a) + 0.1


def unit(a: jax.Array) -> jax.Array:
    return 0.1 + 0.8 * jax.nn.sigmoid(a)


def definite(a: jax.Array) -> jax.Array:
    return a @ a.T + jnp.eye(4, dtype=a.dtype)


def complex_of(a: jax.Array) -> jax.Array:
    return lax.complex(a, a.T)


def constant(value: float, a: jax.Array) -> jax.Array:
    return jnp.full_like(a, value)


def symmetric(a: jax.Array) -> jax.Array:
    return a + a.T


def outer_products(v: jax.Array) -> jax.Array:
    """What is known of vectors without their signs."""
    return jnp.einsum("ij,kj->jik", v, jnp.conj(v)).real


def qr_without_signs(a: jax.Array) -> Any:
    q, r = jnp.linalg.qr(a)
    return outer_products(q), outer_products(r.T)


def svd_without_signs(a: jax.Array) -> Any:
    u, s, vt = jnp.linalg.svd(a[:, :3], full_matrices=False)
    return jnp.einsum("ij,jk->jik", u, vt), s


def grown(a: jax.Array) -> jax.Array:
    return lax.while_loop(lambda z: jnp.sum(z) < 300.0, lambda z: 2.0 * z, jnp.abs(a))


def gate_circuit(a: jax.Array) -> jax.Array:
    """A quantum circuit: a state, rotations with complex phases, and what is measured."""
    state = lax.complex(jnp.array([1.0, 0.0], a.dtype), jnp.zeros(2, a.dtype))
    for angle, phase in zip(a[0], a[1], strict=True):
        c, s = (lax.complex(f(angle / 2), jnp.zeros_like(angle)) for f in (jnp.cos, jnp.sin))
        turn = jnp.exp(lax.complex(jnp.zeros_like(phase), phase))
        state = jnp.stack([c * state[0] - s * state[1], turn * (s * state[0] + c * state[1])])
    return jnp.abs(state) ** 2


def fourier_layer(a: jax.Array) -> jax.Array:
    """The layer of a Fourier neural operator."""
    modes = jnp.fft.rfft(jnp.asarray(A, a.dtype), axis=0) * lax.complex(a[:3], a[1:])
    return jnp.tanh(jnp.fft.irfft(modes, 4, axis=0))


# name -> function; the primitives in it have a rule of their own, or are measured
VALUES: dict[str, Callable[[jax.Array], Any]] = {
    "solve": lambda a: jnp.linalg.solve(a, ones(a)),
    "det": jnp.linalg.det,
    "slogdet": lambda a: jnp.linalg.slogdet(a)[1],
    "cholesky": lambda a: jnp.linalg.cholesky(definite(a)),
    "cho_solve": lambda a: jsp.linalg.cho_solve(jsp.linalg.cho_factor(definite(a)), ones(a)),
    "triangular": lambda a: jsp.linalg.solve_triangular(definite(a), ones(a), lower=True, unit_diagonal=True),
    "triangular_right": lambda a: lax.linalg.triangular_solve(definite(a), a, left_side=False, transpose_a=True),
    "eigh": lambda a: outer_products(jnp.linalg.eigh(symmetric(a))[1]),
    "eigvalsh": lambda a: jnp.linalg.eigvalsh(symmetric(a)),
    "svd": svd_without_signs,
    "qr": qr_without_signs,
    "lu": lambda a: jsp.linalg.lu(a)[1:],
    "pinv": lambda a: jnp.linalg.pinv(a[:, :3]),
    "expm": jsp.linalg.expm,
    "tridiagonal": lambda a: lax.linalg.tridiagonal_solve(
        a[0] * jnp.array([0, 1, 1, 1], a.dtype), a[1] + 6, a[2] * jnp.array([1, 1, 1, 0], a.dtype), a[3][:, None]
    ),
    "sort": jnp.sort,
    "sort_key_val": lambda a: lax.sort_key_val(a, jnp.sin(a.T), dimension=0),
    "top_k": lambda a: lax.top_k(a, 2)[0],
    "quantile": lambda a: jnp.quantile(a, 0.3, axis=0),
    "cumlogsumexp": lambda a: lax.cumlogsumexp(a, reverse=True),
    "scatter_max": lambda a: jnp.zeros(3, a.dtype).at[jnp.array([0, 1, 0, 2])].max(2 * a[0]),
    "scatter_min": lambda a: a.at[jnp.array([0, 1, 1])].min(a[1:]),
    "scatter_mul": lambda a: a.at[jnp.array([0, 1])].multiply(a[2:], unique_indices=True),
    "rem": lambda a: lax.rem(a, positive(a.T)),
    "fft": lambda a: jnp.abs(jnp.fft.fft(a)),
    "fourier_layer": fourier_layer,
    "circuit": gate_circuit,
    "complex_log": lambda a: jnp.log(complex_of(a)).real,
    "complex_roots": lambda a: (jnp.sqrt(complex_of(a)) * complex_of(a) ** complex_of(a.T)).imag,
    "complex_rational": lambda a: (jnp.tanh(complex_of(a)) / (2.0 + jnp.exp(complex_of(a.T)))).real,
    "gammaln": lambda a: sp.gammaln(positive(a)),
    "digamma": lambda a: sp.digamma(positive(a)),
    "polygamma": lambda a: sp.polygamma(1, positive(a)),
    "gammainc": lambda a: sp.gammainc(positive(a), positive(a.T)) + sp.gammaincc(positive(a.T), positive(a)),
    "betainc": lambda a: sp.betainc(constant(1.5, a), constant(0.7, a), unit(a)),
    "bessel": lambda a: sp.i0e(a) + sp.i1e(a.T) + sp.i0(a) * sp.i1(a),
    "while": grown,
    "conditioned": lambda a: jnp.linalg.solve(a @ jnp.diag(jnp.array([1, 10, 1e2, 1e3], a.dtype)), ones(a)),
}


@functools.cache
def compared() -> tuple[Any, Any, Any, Any]:
    """Differences in both precisions, and in double precision plain ones and the derivatives."""

    def h(w):
        return {name: function(w[name]) for name, function in VALUES.items()}

    def run(dtype):
        w, u = ({name: jnp.asarray(z, dtype) for name in VALUES} for z in (A, U))
        return w, u, jnp.asarray(EPS, dtype)

    @jax.jit
    def differences(w, u, eps):
        return lax.map(lambda e: lj.finite_jvp(h, w, u, e), eps)

    @jax.jit
    def plain(w, u, eps):
        def moved(e):
            return jax.tree.map(lambda p, q: (p - q) / e, h(jax.tree.map(lambda z, d: z + e * d, w, u)), h(w))

        return lax.map(moved, eps[:5]), jax.jvp(h, (w,), (u,))[1]

    single, double = run("float32"), run("float64")
    found = differences(*single), differences(*double), *plain(*double)
    return tuple(jax.tree.map(np.asarray, part) for part in found)


def at(tree: Any, i: int) -> Any:
    return jax.tree.map(lambda z: z[i], tree)


@pytest.mark.parametrize("name", VALUES)
def test_differences_keep_their_digits(name):
    single, double, plain, derivative = (part[name] for part in compared())
    for i, alpha in enumerate(ALPHAS):
        assert relative_error(at(single, i), at(double, i)) < 2e-5, alpha
        if i < 5:
            assert relative_error(at(double, i), at(plain, i)) < 1e-12 + 1e-13 * alpha, alpha
    assert relative_error(at(double, 7), derivative) < 1e-10
    assert relative_error(at(double, 8), derivative) < 1e-12


def root(a: jax.Array) -> jax.Array:
    cube = lambda x: x**3 - positive(a[0, 0])
    newton = lambda f, x: lax.fori_loop(0, 30, lambda _, z: z - f(z) / (3 * z * z), x)
    return lax.custom_root(cube, jnp.ones((), a.dtype), newton, lambda g, y: y / g(jnp.ones_like(y)))


def solved(a: jax.Array) -> jax.Array:
    return lax.custom_linear_solve(
        lambda x: definite(a) @ x, a[0], lambda f, b: jnp.linalg.solve(definite(a), b), symmetric=True
    )


def window(a: jax.Array) -> jax.Array:
    return lax.reduce_window(a, 0.0, lax.add, (2, 2), (1, 1), "VALID")


ROWS = lax.ScatterDimensionNumbers((1,), (0,), (0,))

# module -> name -> function, for those that one array is not enough for
CALLS: dict[str, dict[str, Callable[[jax.Array], Any]]] = {
    "jax.lax": {
        "approx_max_k": lambda a: lax.approx_max_k(a, 2),
        "approx_min_k": lambda a: lax.approx_min_k(a, 2),
        "associative_scan": lambda a: lax.associative_scan(jnp.multiply, a),
        "batch_matmul": lambda a: lax.batch_matmul(a[None], a[None]),
        "betainc": lambda a: lax.betainc(constant(1.5, a), constant(0.7, a), unit(a)),
        "clamp": lambda a: lax.clamp(0.1, a, 0.7),
        "complex": complex_of,
        "cond": lambda a: lax.cond(a[0, 0] > 0, jnp.sin, jnp.cos, a),
        "conj": lambda a: lax.conj(complex_of(a)),
        "conv": lambda a: lax.conv(a[None, None], a[None, None, :2, :2], (1, 1), "SAME"),
        "conv_transpose": lambda a: lax.conv_transpose(a[None, :, :, None], a[:2, :2, None, None], (1, 1), "SAME"),
        "conv_general_dilated_patches": lambda a: lax.conv_general_dilated_patches(
            a[None, None], (2, 2), (1, 1), "SAME"
        ),
        "custom_linear_solve": solved,
        "custom_root": root,
        "div": lambda a: lax.div(a, positive(a)),
        "dot": lambda a: lax.dot(a, a),
        "fft": lambda a: lax.fft(complex_of(a), "FFT", (4,)),
        "fori_loop": lambda a: lax.fori_loop(0, 2, lambda i, z: jnp.sin(z), a),
        "igamma": lambda a: lax.igamma(positive(a), positive(a.T)),
        "igammac": lambda a: lax.igammac(positive(a), positive(a.T)),
        "imag": lambda a: lax.imag(complex_of(a)),
        "integer_pow": lambda a: lax.integer_pow(a, 3),
        "map": lambda a: lax.map(jnp.sin, a),
        "nextafter": lambda a: lax.nextafter(a, 2 * a),
        "platform_dependent": lambda a: lax.platform_dependent(a, cpu=jnp.sin, default=jnp.cos),
        "polygamma": lambda a: lax.polygamma(constant(2.0, a), positive(a)),
        "pow": lambda a: lax.pow(positive(a), a),
        "ragged_dot": lambda a: lax.ragged_dot(a, jnp.stack([a, a.T]), jnp.array([1, 3], jnp.int32)),
        "random_gamma_grad": lambda a: lax.random_gamma_grad(positive(a), positive(a.T)),
        "reduce": lambda a: lax.reduce(a, jnp.zeros((), a.dtype), lambda x, y: x + y + 0.1 * x * y, (0,)),
        "reduce_window": window,
        "scatter_apply": lambda a: lax.scatter_apply(a, jnp.array([[0]]), lambda x: 2.0 * x, ROWS, update_shape=(1, 4)),
        "signbit": lambda a: jnp.where(jnp.signbit(a), a, 2 * a),
        "switch": lambda a: lax.switch(1, [jnp.sin, jnp.cos], a),
        "while_loop": grown,
    },
    "jax.numpy.linalg": {
        "cross": lambda a: jnp.linalg.cross(a[:, :3], a[:, 1:]),
        "eigvals": jnp.linalg.eigvals,
        "lstsq": lambda a: jnp.linalg.lstsq(a[:, :3], a[:, 3])[:2],
        "matrix_power": lambda a: jnp.linalg.matrix_power(a, 3),
        "multi_dot": lambda a: jnp.linalg.multi_dot([a, a, a]),
        "tensorinv": lambda a: jnp.linalg.tensorinv(a.reshape(2, 2, 2, 2)),
        "tensorsolve": lambda a: jnp.linalg.tensorsolve(a, a[0]),
    },
    "jax.scipy.linalg": {
        "polar": jsp.linalg.polar,
        "expm_frechet": lambda a: jsp.linalg.expm_frechet(a, a),
        "toeplitz": lambda a: jsp.linalg.toeplitz(a[0]),
        "eigh_tridiagonal": lambda a: jsp.linalg.eigh_tridiagonal(a[0], a[1, :3], eigvals_only=True),
    },
    "jax.numpy.fft": {
        name: lambda a, name=name: getattr(jnp.fft, name)(a if name in ("ihfft", "rfft", "rfft2") else complex_of(a))
        for name in ("fft", "fft2", "fftn", "ifft", "ifftn", "ihfft", "rfft", "rfft2", "irfft", "irfftn", "hfft")
    },
    "jax.nn": {"dot_product_attention": lambda a: jax.nn.dot_product_attention(*[a[None, :, None]] * 3)},
    "jax.scipy.special": {
        "beta": lambda a: sp.beta(positive(a), positive(a.T)),
        "betaln": lambda a: sp.betaln(positive(a), positive(a.T)),
        "expn": lambda a: sp.expn(2, positive(a)),
        "hyp1f1": lambda a: sp.hyp1f1(constant(1.0, a), constant(2.0, a), a),
        "kl_div": lambda a: sp.kl_div(positive(a), positive(a.T)),
        "multigammaln": lambda a: sp.multigammaln(positive(a) + 2, 2),
        "owens_t": lambda a: sp.owens_t(a, a.T),
        "poch": lambda a: sp.poch(positive(a), 2.0),
        "rel_entr": lambda a: sp.rel_entr(positive(a), positive(a.T)),
        "bessel_jn": lambda a: sp.bessel_jn(a[0], v=2),
        "xlog1py": lambda a: sp.xlog1py(a, positive(a)),
        "xlogy": lambda a: sp.xlogy(a, positive(a)),
    },
    "jax.random": {"gamma": lambda a: jax.random.gamma(jax.random.key(0), positive(a))},
    "jax.lax.linalg": {"qdwh": lambda a: lax.linalg.qdwh(definite(a))[:2]},
}

# What JAX itself has no derivative of, or what works on the bits of numbers.
REFUSED: dict[str, Callable[[jax.Array], Any]] = {
    "betainc": lambda a: sp.betainc(positive(a), positive(a.T), unit(a)),
    "callback": lambda a: jax.pure_callback(np.sin, jax.ShapeDtypeStruct((4, 4), a.dtype), a),
    "eig": jnp.linalg.eig,
    "full_svd": lambda a: jnp.linalg.svd(a[:, :3]),
    "hessenberg": lax.linalg.hessenberg,
    "householder_product": lambda a: lax.linalg.householder_product(a, a[0]),
    "igamma_grad_a": lambda a: lax.igamma_grad_a(positive(a), positive(a.T)),
    "rng_uniform": lambda a: lax.rng_uniform(a[0, 0], a[1, 1], (2,)),
    "scatter_mul": lambda a: a.at[jnp.array([0, 0])].multiply(a[2:]),
    "schur": lax.linalg.schur,
    "tridiagonal": lax.linalg.tridiagonal,
    "zeta": lambda a: lax.zeta(positive(a) + 1, positive(a)),
}


def parts(out: Any) -> list[jax.Array]:
    """The real floating numbers in what a function returns."""
    arrays = [z for z in jax.tree.leaves(out) if hasattr(z, "dtype") and jnp.issubdtype(z.dtype, jnp.inexact)]
    return [part for z in arrays for part in ([z.real, z.imag] if jnp.iscomplexobj(z) else [z])]


def unary(module: Any) -> dict[str, Callable[[jax.Array], Any]]:
    """The public functions of a module that take one matrix, and give floating numbers."""
    found = {}
    for name in sorted(vars(module)):
        function = getattr(module, name)
        if name.startswith("_") or not callable(function) or isinstance(function, type):
            continue
        try:
            out = jax.eval_shape(lambda a, f=function: parts(f(unit(a))), A)
        except Exception:
            continue
        if out:
            found[name] = lambda a, f=function: f(unit(a))
    return found


@pytest.mark.standard_promotion
@pytest.mark.parametrize("module", CALLS)
def test_every_public_function_is_differenced(module):
    functions = dict(CALLS[module])
    if module not in ("jax.random", "jax.scipy.linalg"):
        functions |= {n: f for n, f in unary(eval(module, {"jax": jax})).items() if n not in REFUSED}
    for name, function in functions.items():
        h = lambda a, f=function: parts(f(a))
        out = jax.eval_shape(lambda eps, h=h: lj.finite_jvp(h, A, U, eps), np.float64(1.0))
        assert out == jax.eval_shape(h, A), name


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_derivative_is_refused(name):
    h = lambda a: parts(REFUSED[name](a))
    match = "JAX has no derivative of it|of which JAX has no derivative|no difference keeps their digits"
    with pytest.raises(ValueError, match=match):
        jax.eval_shape(lambda eps: lj.finite_jvp(h, A, U, eps), np.float64(1.0))


def test_a_loop_that_ends_elsewhere_jumps():
    h = lambda w: lax.while_loop(lambda z: z < 10.0, lambda z: 2.0 * z, w)
    # 1.2 doubles four times, 1.3 three times; the lanes of a batch end apart.
    w, u = jnp.array([1.2, 1.3, 12.0]), jnp.array([1.0, 0.1, 3.0])
    out = lj.finite_jvp(jax.vmap(h), w, u, 0.1)
    np.testing.assert_allclose(out, [(10.4 - 19.2) / 0.1, 0.8, 3.0], rtol=1e-12)
    np.testing.assert_allclose(lj.finite_jvp(h, w[0], u[0], 0.1), -88.0, rtol=1e-12)


def test_ties_of_pivots_do_not_matter():
    """The pivots of a matrix of signs are ties, which any step decides."""
    h = lambda a: (jnp.linalg.solve(a, ones(a)), jnp.linalg.slogdet(a)[1])
    hadamard = np.kron([[1.0, 1.0], [1.0, -1.0]], [[1.0, 1.0], [1.0, -1.0]])
    run = jax.jit(lambda a, u, eps: lj.finite_jvp(h, a, u, eps))
    single = run(*(np.asarray(z, np.float32) for z in (hadamard, U, 1e-7)))
    derivative = jax.jvp(h, (jnp.asarray(hadamard),), (jnp.asarray(U),))[1]
    for ours, right in zip(single, derivative, strict=True):
        np.testing.assert_allclose(ours, right, rtol=3e-6, atol=3e-7)


def test_derivatives_pass_through_measured_rules():
    """The gradient with respect to u is that of the model at the end of the step."""
    h = lambda a: (
        jnp.linalg.slogdet(definite(a))[1] + sp.gammaln(positive(a)).sum() + jnp.linalg.eigvalsh(symmetric(a))[0]
    )

    @jax.jit
    def both(a, u, eps):
        return jax.grad(lambda v: lj.finite_jvp(h, a, v, eps))(u), jax.grad(h)(a + eps * u)

    for eps, tolerance in ((1e-3, 1e-9), (0.0, 1e-13)):
        np.testing.assert_allclose(*both(A, U, eps), rtol=tolerance, atol=tolerance)


def test_a_flow_refuses_before_any_work():
    h = lambda w: lax.linalg.schur(w)[0][0]
    with pytest.raises(ValueError, match="h applies the primitive 'schur'"):
        lj.gradient_flow(h, lj.square_loss(jnp.zeros(4)), jnp.asarray(A), jnp.array([0.0, 1.0]))
