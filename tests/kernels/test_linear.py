import jax
import jax.numpy as jnp
import numpy as np

from llama3_jax.kernels.linear import linear, linear_pieces


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


def test_pieces_are_the_whole_and_the_weight_has_one_gradient():
    random = np.random.default_rng()
    x, w, g = (random.normal(size=shape) for shape in ((2, 6, 7), (7, 11), (2, 6, 11)))
    split = lambda a: np.split(np.float32(a), 3, axis=1)  # noqa: E731
    outs, pullback = jax.vjp(linear_pieces, split(x), jnp.float32(w))
    dxs, dw = pullback([jnp.asarray(part) for part in split(g)])
    np.testing.assert_allclose(np.concatenate(outs, 1), x @ w, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(np.concatenate(dxs, 1), g @ w.T, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(dw, np.einsum("bsi,bso->io", x, g), rtol=1e-5, atol=1e-5)
    text = str(jax.make_jaxpr(lambda x, w: jax.vjp(linear_pieces, x, w)[1](outs))(split(x), w))
    assert text.count("dot_general") == 3 + 1 + 3  # each piece twice, the weight once
