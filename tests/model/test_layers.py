import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama3_jax.model.layers import _swiglu


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 0.05)])
def test_swiglu_gradients_equal_those_of_automatic_differentiation_in_float64(dtype, tolerance):
    random = np.random.default_rng()
    gate, up, g = (3 * random.normal(size=(3, 5, 7))).astype(jnp.bfloat16).astype(np.float64)
    out, pullback = jax.vjp(_swiglu, jnp.asarray(gate, dtype), jnp.asarray(up, dtype))
    ours = (out, *pullback(jnp.asarray(g, dtype)))
    with jax.enable_x64(True):
        expected, pullback = jax.vjp(lambda gate, up: jax.nn.silu(gate) * up, gate, up)
        expected = (expected, *pullback(g))
    for array, reference in zip(ours, expected, strict=True):
        assert array.dtype == dtype
        np.testing.assert_allclose(
            np.asarray(array, np.float64), reference, rtol=tolerance, atol=tolerance
        )
