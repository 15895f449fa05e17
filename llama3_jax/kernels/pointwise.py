"""What is between the products of a block: RMSNorm after a residual sum, RoPE, SwiGLU.

"reference" is the definition, in plain JAX, which XLA fuses by itself. "triton" (gpu/pointwise.py)
is one launch for each, forward and backward. Neither was timed against the other on a GPU yet, so
the config's default is the reference.

Shapes: B batch, S length, M model dim, H query heads, K KV heads, D head dim, F FFN dim.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from llama3_jax.kernels.dispatch import resolve

Implementation = Literal["reference", "triton"]
Tables = tuple[Float[Array, "B S half"], Float[Array, "B S half"]]


def add_norm(
    x: Float[Array, "*rows M"],
    update: Float[Array, "*rows M"] | None,
    scale: Float[Array, "M"],
    eps: float,
    implementation: Implementation = "reference",
) -> tuple[Float[Array, "*rows M"], Float[Array, "*rows M"]]:
    """x + update (None: x alone), and its root mean square norm times `scale`.

    The norm (Zhang & Sennrich 2019) is computed in float32 and returned in `x.dtype`.
    """
    return resolve("norm", implementation)(x, update, scale, eps)


def rotate(
    q: Float[Array, "B S H D"],
    k: Float[Array, "B S K D"],
    tables: Tables,
    implementation: Implementation = "reference",
) -> tuple[Float[Array, "B S H D"], Float[Array, "B S K D"]]:
    """RoPE on queries and keys: the head dim's first half against its second, in float32."""
    return resolve("rotary", implementation)(q, k, tables)


def swiglu(
    gate: Float[Array, "*rows F"],
    up: Float[Array, "*rows F"],
    implementation: Implementation = "reference",
) -> Float[Array, "*rows F"]:
    """silu(gate) up; it keeps its two inputs for the backward pass and no value between them."""
    return resolve("swiglu", implementation)(gate, up)


# -------------------------------------------------------------------------------------- definitions


def reference_add_norm(x, update, scale, eps: float):
    x = x if update is None else x + update
    x32 = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return x, (x32 * inverse * scale).astype(x.dtype)


def reference_rotate(q, k, tables: Tables):
    cos, sin = (table[:, :, None, :] for table in tables)

    def turn(x):
        first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
        rotated = [first * cos - second * sin, second * cos + first * sin]
        return jnp.concatenate(rotated, axis=-1).astype(x.dtype)

    return turn(q), turn(k)


@jax.custom_vjp
def reference_swiglu(gate, up):
    return jax.nn.silu(gate) * up


def _swiglu_forward(gate, up):
    return reference_swiglu(gate, up), (gate, up)


def _swiglu_backward(saved, g):
    gate, up = saved
    sigmoid = jax.nn.sigmoid(gate)
    return g * up * sigmoid * (1 + gate * (1 - sigmoid)), g * gate * sigmoid


reference_swiglu.defvjp(_swiglu_forward, _swiglu_backward)
