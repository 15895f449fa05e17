"""Flash attention in Triton: causal, grouped-query, by document, forward and backward.

After Dao 2023 (arXiv 2307.08691): scores never leave the chip, the backward pass computes them again
from each query's log-sum-exp. A query sees a contiguous range of keys, from its document's first to
itself, so the mask is two integers a query (`Spans`): a block of queries walks the keys of its own
documents and no others, and compares indices only in blocks that its mask cuts.

Two passes make the gradient: one over blocks of keys for dK and dV, with the query heads of a KV
head in turn, and one over blocks of queries for dQ. Nothing is added up atomically, so results
are reproducible.

Shapes: B batch, S queries, T keys, H query heads, K KV heads, D head dim; M queries and N keys of a
block; J blocks of queries, L blocks of keys.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import triton
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from llama3_jax.errors import UserError
from llama3_jax.kernels.attention import Places, Spans, make_spans
from llama3_jax.kernels.gpu import flash_kernels
from llama3_jax.kernels.gpu.call import triton_call
from llama3_jax.kernels.gpu.tuning import Blocks, blocks_for

HEAD_DIMS = (16, 32, 64, 128)


class Tuning(NamedTuple):
    """Block sizes of the three kernels."""

    forward: Blocks
    keys: Blocks
    queries: Blocks


def tuning_for(head_dim: int, dtype: jnp.dtype) -> Tuning:
    """The tuned sizes of the repository's table."""
    row = f"{max(head_dim, 64)} {jnp.dtype(dtype).name}"
    return Tuning(*(blocks_for(f"flash_{name}", row) for name in ("forward", "keys", "queries")))


def flash_attention(
    q_BSHD: Float[Array, "B S H D"],
    k_BTKD: Float[Array, "B T K D"],
    v_BTKD: Float[Array, "B T K D"],
    spans: Spans,
    tuning: Tuning | None = None,
) -> tuple[Float[Array, "B S H D"], Float[Array, "B H S"]]:
    """Attention of each query to the keys of its span, and the log-sum-exp of its scores.

    Accumulated in float32. A query with an empty span costs next to nothing; its result is zero and
    its log-sum-exp a finite large negative number.

    Raises:
      UserError: a head dimension that the kernels are not made for, or indices beyond 32 bits.
    """
    (_, S, H, D), (_, T, K, _) = q_BSHD.shape, k_BTKD.shape
    if D not in HEAD_DIMS:
        raise UserError(
            f"attention='triton' takes a head_dim of {', '.join(map(str, HEAD_DIMS))}, not {D}; "
            "'chunked' takes any"
        )
    if max(S * H, T * K) * D >= 2**31:
        raise UserError(
            f"attention='triton': {S} queries x {H} heads or {T} keys x {K} heads, times {D}, pass "
            "2^31; split the row over context or the heads over tensor"
        )
    return _flash(q_BSHD, k_BTKD, v_BTKD, spans, tuning or tuning_for(D, q_BSHD.dtype))


def attention(
    q_BSHD: Float[Array, "B S H D"],
    k_BTKD: Float[Array, "B T K D"],
    v_BTKD: Float[Array, "B T K D"],
    queries: Places,
    keys: Places,
    rows: Int[Array, "S"] | None = None,
    spans: Spans | None = None,
) -> Float[Array, "B S H D"]:
    """`flash_attention` with the arguments of `kernels.attention.attention`."""
    spans = make_spans(queries, keys, rows) if spans is None else spans
    return flash_attention(q_BSHD, k_BTKD, v_BTKD, spans)[0]


def _flash(q_BSHD, k_BTKD, v_BTKD, spans: Spans, tuning: Tuning):
    """Result and log-sum-exp. What the kernel gives is named, so that a remat policy may keep it:
    inside of a custom_vjp it would be out of the policy's sight, and the kernel would run again."""
    q, k, v = map(jax.lax.stop_gradient, (q_BSHD, k_BTKD, v_BTKD))
    out_BSHD, logsumexp_BHS = (
        checkpoint_name(x, "attention_out") for x in _launch_forward(q, k, v, spans, tuning)
    )
    return _with_gradient(q_BSHD, k_BTKD, v_BTKD, spans, out_BSHD, logsumexp_BHS, tuning)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _with_gradient(q_BSHD, k_BTKD, v_BTKD, spans: Spans, out_BSHD, logsumexp_BHS, tuning: Tuning):
    """The given result of attention over q, k and v, with its gradient in these."""
    return out_BSHD, logsumexp_BHS


def _constants(q_BSHD: Array, k_BTKD: Array, blocks: Blocks) -> dict:
    (_, S, H, D), (_, T, K, _) = q_BSHD.shape, k_BTKD.shape
    # bfloat16 products are exact in float32 whatever this says.
    precision = "ieee" if q_BSHD.dtype == jnp.float32 else "tf32"
    return blocks._asdict() | dict(S=S, T=T, H=H, K=K, D=D, SCALE=D**-0.5, PRECISION=precision)


def _launch_forward(q_BSHD, k_BTKD, v_BTKD, spans: Spans, tuning: Tuning):
    B, S, H, _ = q_BSHD.shape
    blocks = tuning.forward
    return triton_call(
        flash_kernels.forward_kernel,
        [q_BSHD, k_BTKD, v_BTKD, *spans],
        [
            jax.ShapeDtypeStruct(q_BSHD.shape, q_BSHD.dtype),
            jax.ShapeDtypeStruct((B, H, S), jnp.float32),
        ],
        grid=(triton.cdiv(S, blocks.M), H, B),
        **_constants(q_BSHD, k_BTKD, blocks),
    )


def _forward(q_BSHD, k_BTKD, v_BTKD, spans, out_BSHD, logsumexp_BHS, tuning: Tuning):
    saved = (q_BSHD, k_BTKD, v_BTKD, spans, out_BSHD, logsumexp_BHS)
    return (out_BSHD, logsumexp_BHS), saved


def _backward(tuning: Tuning, saved, cotangents):
    q_BSHD, k_BTKD, v_BTKD, spans, out_BSHD, logsumexp_BHS = saved
    dout_BSHD, dlogsumexp_BHS = cotangents
    (B, S, H, _), (_, T, K, _) = q_BSHD.shape, k_BTKD.shape
    # What the softmax's normalisation takes off every weight's gradient.
    delta_BSH = jnp.sum(dout_BSHD.astype(jnp.float32) * out_BSHD.astype(jnp.float32), axis=-1)
    delta_BHS = delta_BSH.transpose(0, 2, 1) - dlogsumexp_BHS
    dout_BSHD = dout_BSHD.astype(q_BSHD.dtype)
    # In base 2, as the kernels' exponentials are.
    stats = [dout_BSHD, logsumexp_BHS * math.log2(math.e), delta_BHS]
    like = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)  # noqa: E731
    blocks = tuning.keys
    dk_BTKD, dv_BTKD = triton_call(
        flash_kernels.keys_kernel,
        [q_BSHD, k_BTKD, v_BTKD, *spans, query_reach(spans, T, blocks.M, blocks.N), *stats],
        [like(k_BTKD), like(v_BTKD)],
        grid=(triton.cdiv(T, blocks.N), K, B),
        **_constants(q_BSHD, k_BTKD, blocks),
    )
    blocks = tuning.queries
    (dq_BSHD,) = triton_call(
        flash_kernels.queries_kernel,
        [q_BSHD, k_BTKD, v_BTKD, *spans, *stats],
        [like(q_BSHD)],
        grid=(triton.cdiv(S, blocks.M), H, B),
        **_constants(q_BSHD, k_BTKD, blocks),
    )
    return dq_BSHD, dk_BTKD, dv_BTKD, None, None, None


_with_gradient.defvjp(_forward, _backward)


def query_reach(spans: Spans, keys: int, M: int, N: int) -> Int[Array, "B L 4"]:
    """For each block of N keys, which blocks of M queries see some of it: (the first, how many
    before those whose every query sees all of it, how many such, how many after)."""
    padding = ((0, 0), (0, -spans.first.shape[1] % M))
    split = lambda x: x.reshape(len(x), 1, -1, M)  # noqa: E731
    first_B1JM = split(jnp.pad(spans.first, padding, constant_values=keys))
    last_B1JM = split(jnp.pad(spans.last, padding, constant_values=-1))
    start_L1 = jnp.arange(0, keys, N)[:, None]
    stop_L1 = jnp.minimum(start_L1 + N, keys)
    some_BLJ = (first_B1JM.min(-1) < stop_L1) & (last_B1JM.max(-1) >= start_L1)
    # A last block with fewer keys is one that the mask cuts.
    all_BLJ = (first_B1JM.max(-1) <= start_L1) & (last_B1JM.min(-1) >= start_L1 + N - 1)
    J = some_BLJ.shape[-1]
    index_J = jnp.arange(J)
    stop = jnp.where(some_BLJ, index_J + 1, 0).max(-1)
    start = jnp.minimum(jnp.where(some_BLJ, index_J, J).min(-1), stop)
    full_start = jnp.minimum(jnp.where(all_BLJ, index_J, J).min(-1), stop)
    ends_BLJ = ~all_BLJ & (index_J >= full_start[..., None])
    full_stop = jnp.minimum(jnp.where(ends_BLJ, index_J, J).min(-1), stop)
    counts = [start, full_start - start, full_stop - full_start, stop - full_stop]
    return jnp.stack(counts, axis=-1).astype(jnp.int32)
