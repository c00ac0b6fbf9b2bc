"""Programs that some versions of JAX compile wrongly on a CPU, in silence; run by tests/test_package.py."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

jax.config.update("jax_enable_x64", True)


def check_vmapped_reductions(dtype, n):
    # jax issue 39103: jax 0.10.2 gets the last rows wrong on CPU, silently; pyproject.toml excludes it.
    index = jnp.arange(n, dtype=dtype)
    rows = jnp.stack([index, jnp.zeros_like(index), jnp.zeros_like(index)], axis=1)
    matrix = jnp.eye(3, dtype=dtype)

    @jax.default_matmul_precision("highest")
    def square_norms(rows):
        return jax.vmap(lambda row: jnp.sum((matrix @ row) ** 2))(rows)

    expected = np.arange(n, dtype=np.float64) ** 2
    eps = float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(jax.jit(square_norms)(rows), expected, rtol=4 * eps)
    np.testing.assert_allclose(square_norms(rows), expected, rtol=4 * eps)


def check_derivatives_of_vmapped_convolutions():
    # Up to 0.8.0 this was wrong by 100 % on CPU, silently, for directions that are constants; hence the lower bound.
    keys = jr.split(jr.key(0), 5)
    w, v = (
        {"k": jr.normal(a, (4, 1, 3, 3)), "b": jr.normal(b, (4, 1, 1))}
        for a, b in ((keys[0], keys[1]), (keys[2], keys[3]))
    )
    x = jr.normal(keys[4], (6, 1, 8, 8))

    def one(w, x):
        return jax.lax.conv_general_dilated(x[None], w["k"], (1, 1), "VALID")[0] + w["b"]

    def slope(w):
        return jax.jvp(lambda w: jax.vmap(lambda x: one(w, x))(x), (w,), (v,))[1]

    expected = slope(w)
    np.testing.assert_allclose(jax.jit(slope)(w), expected, rtol=0, atol=1e-12 * float(jnp.max(jnp.abs(expected))))


if __name__ == "__main__":
    check_vmapped_reductions(jnp.float64, 16_385)
    check_vmapped_reductions(jnp.float32, 32_769)
    check_derivatives_of_vmapped_convolutions()
