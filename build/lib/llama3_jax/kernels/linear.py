"""Matrix product with a float32 weight, and a gradient written by hand.

The weight's gradient is one two-dimensional product x^T g, accumulated and returned in float32.
Left to automatic differentiation it is rounded to the activations' dtype, and on CPU XLA fuses the
backward of what follows into a transposing copy of g, which costs more than the product itself.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _product(x_NI: Array, w_IO: Array, out_dtype: jnp.dtype) -> Array:
    return jnp.matmul(x_NI, w_IO.astype(x_NI.dtype), preferred_element_type=out_dtype)


def _product_forward(x_NI, w_IO, out_dtype):
    return _product(x_NI, w_IO, out_dtype), (x_NI, w_IO)


def _product_backward(out_dtype, saved, g_NO):
    x_NI, w_IO = saved
    g_NO = g_NO.astype(x_NI.dtype)
    dw_IO = jnp.matmul(x_NI.T, g_NO, preferred_element_type=w_IO.dtype)
    return g_NO @ w_IO.astype(x_NI.dtype).T, dw_IO


_product.defvjp(_product_forward, _product_backward)


def linear(
    x: Float[Array, "*rows inputs"], w: Float[Array, "inputs outputs"], out_dtype=None
) -> Float[Array, "*rows outputs"]:
    """x w, computed in `x.dtype`, returned in `out_dtype` (by default `x.dtype`)."""
    out = _product(x.reshape(-1, x.shape[-1]), w, jnp.dtype(out_dtype or x.dtype))
    return out.reshape(*x.shape[:-1], w.shape[-1])
