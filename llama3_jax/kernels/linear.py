"""Matrix product with a float32 weight, and a gradient written by hand.

The weight's gradient is one two-dimensional product x^T g, accumulated and returned in float32.
Left to automatic differentiation it is rounded to the activations' dtype, and on CPU XLA fuses the
backward of what follows into a transposing copy of g, which costs more than the product itself.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _products(xs_NI: tuple[Array, ...], w_IO: Array, out_dtype: jnp.dtype) -> tuple[Array, ...]:
    return tuple(
        jnp.matmul(x_NI, w_IO.astype(x_NI.dtype), preferred_element_type=out_dtype)
        for x_NI in xs_NI
    )


def _products_forward(xs_NI, w_IO, out_dtype):
    return _products(xs_NI, w_IO, out_dtype), (xs_NI, w_IO)


def _products_backward(out_dtype, saved, gs_NO):
    xs_NI, w_IO = saved
    gs_NO = [g_NO.astype(x_NI.dtype) for x_NI, g_NO in zip(xs_NI, gs_NO, strict=True)]
    dxs_NI = tuple(g_NO @ w_IO.astype(g_NO.dtype).T for g_NO in gs_NO)
    # One product over all pieces: a sum of one a piece would write and read float32 weights' worth
    # of memory for each of them.
    x_NI, g_NO = (a[0] if len(a) == 1 else jnp.concatenate(a) for a in (xs_NI, gs_NO))
    return dxs_NI, jnp.matmul(x_NI.T, g_NO, preferred_element_type=w_IO.dtype)


_products.defvjp(_products_forward, _products_backward)


def linear(
    x: Float[Array, "*rows inputs"], w: Float[Array, "inputs outputs"], out_dtype=None
) -> Float[Array, "*rows outputs"]:
    """x w, computed in `x.dtype`, returned in `out_dtype` (by default `x.dtype`)."""
    return linear_pieces([x], w, out_dtype)[0]


def linear_pieces(
    xs: Sequence[Float[Array, "*rows inputs"]], w: Float[Array, "inputs outputs"], out_dtype=None
) -> list[Float[Array, "*rows outputs"]]:
    """As `linear`, of pieces of the rows: a product each, but one for the weight's gradient."""
    flat = tuple(x.reshape(-1, x.shape[-1]) for x in xs)
    outs = _products(flat, w, jnp.dtype(out_dtype or xs[0].dtype))
    return [out.reshape(*x.shape[:-1], w.shape[-1]) for out, x in zip(outs, xs, strict=True)]
