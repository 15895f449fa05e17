import jax
import jax.numpy as jnp
import numpy as np

from llama3_jax.kernels.linear import linear


def test_value_and_gradients_equal_those_of_numpy_in_float64():
    random = np.random.default_rng()
    x, w, g = (random.normal(size=shape) for shape in ((3, 5, 7), (7, 11), (3, 5, 11)))
    out, pullback = jax.vjp(linear, jnp.float32(x), jnp.float32(w))
    dx, dw = pullback(jnp.float32(g))
    np.testing.assert_allclose(out, x @ w, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(dx, g @ w.T, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(dw, np.einsum("bsi,bso->io", x, g), rtol=1e-5, atol=1e-5)


def test_bfloat16_activations_keep_a_float32_weight_gradient():
    random = np.random.default_rng(0)
    x = jnp.asarray(random.normal(size=(64, 8)), jnp.bfloat16)
    w = jnp.asarray(random.normal(size=(8, 4)), jnp.float32)
    out, pullback = jax.vjp(linear, x, w)
    g = jnp.asarray(random.normal(size=(64, 4)), jnp.bfloat16)
    dx, dw = pullback(g)
    assert (out.dtype, dx.dtype, dw.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)
    exact = np.asarray(x, np.float64).T @ np.asarray(g, np.float64)
    np.testing.assert_allclose(dw, exact, rtol=1e-5, atol=1e-4)
    assert linear(x, w, jnp.float32).dtype == jnp.float32
