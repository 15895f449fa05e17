"""Rows of an embedding table, with a gradient that is added up in float32.

Left to automatic differentiation the gradient of a cast and a gather is added up in the activations'
dtype: in bfloat16 a sum of ones stops at 256, and frequent tokens lose most of their gradient.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def lookup(
    table_VM: Float[Array, "vocab dim"], tokens: Int[Array, "*rows"], dtype: jnp.dtype
) -> Float[Array, "*rows dim"]:
    """The tokens' rows in `dtype`; zeros, without a gradient, for a token of `vocab`."""
    return _lookup(table_VM, tokens, jnp.dtype(dtype), len(table_VM))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _lookup(table_VM: Array, tokens: Array, dtype: jnp.dtype, vocab: int) -> Array:
    # Cast before the gather: a table that was gathered in `dtype` (parallel/ranks.py) stays so.
    return jnp.asarray(table_VM, dtype).at[tokens].get(mode="fill", fill_value=0)


def _lookup_backward(dtype, vocab, tokens, g):
    # Zeros that depend on g: of a constant XLA would keep a copy for all micro-batches.
    table_VM = jnp.full((vocab, g.shape[-1]), 0 * g.reshape(-1)[0], jnp.float32)
    return table_VM.at[tokens].add(g.astype(jnp.float32), mode="drop"), None


_lookup.defvjp(
    lambda table, tokens, dtype, vocab: (_lookup(table, tokens, dtype, vocab), tokens),
    _lookup_backward,
)
