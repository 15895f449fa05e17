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
from typing import NamedTuple

import jax
import jax.numpy as jnp
import triton
import triton.language as tl
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from llama3_jax.errors import UserError
from llama3_jax.kernels.attention import Places, Spans, make_spans
from llama3_jax.kernels.gpu.call import triton_call
from llama3_jax.kernels.gpu.tuning import Blocks, blocks_for

# Scores of keys that a query may not see; finite, so that no difference of two is NaN.
_MASKED: tl.constexpr = tl.constexpr(-1e30)
_LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
_LN_2: tl.constexpr = tl.constexpr(0.6931471805599453)

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


# ----------------------------------------------------------------------------------------- forward


@triton.jit
def _block_spans(first_ptr, last_ptr, rows, S, T):
    """First and last key of each query; beyond the end, an empty span."""
    first = tl.load(first_ptr + rows, mask=rows < S, other=T)
    last = tl.load(last_ptr + rows, mask=rows < S, other=-1)
    return first, last


@triton.jit
def _key_range(first, last, BLOCK: tl.constexpr):
    """The keys in reach of a block of queries, in blocks from the first on: (start, blocks before
    those that all queries see, how many all see, blocks after)."""
    start = tl.min(first, 0)
    keys = tl.maximum(tl.max(last, 0) + 1 - start, 0)
    before = tl.minimum(tl.cdiv(tl.max(first, 0) - start, BLOCK), tl.cdiv(keys, BLOCK))
    full = tl.maximum(tl.min(last, 0) + 1 - start - before * BLOCK, 0) // BLOCK
    return start, before, full, tl.cdiv(keys, BLOCK) - before - full


@triton.jit
def _nth(i, before, full, CUT: tl.constexpr):
    """The i-th of the blocks that the mask cuts, before and after the full ones; or of the full."""
    return tl.where(i < before, i, i + full) if CUT else before + i


@triton.jit
def _rows_of(ptr, rows, size, dims, STRIDE: tl.constexpr, CHECK: tl.constexpr):
    """A block [rows, dims] of a matrix, or of one head of an array."""
    at = ptr + rows[:, None] * STRIDE + dims[None, :]
    if CHECK:
        return tl.load(at, mask=rows[:, None] < size, other=0.0)
    return tl.load(at)


@triton.jit
def _attend(
    out, total, largest, q, k_ptr, v_ptr, first, last, start, before, full, steps, T,
    SCALE: tl.constexpr, STRIDE: tl.constexpr, D: tl.constexpr, N: tl.constexpr, CUT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds `steps` blocks of keys to the running softmax: those that the mask cuts, or the full."""
    dims, columns = tl.arange(0, D), tl.arange(0, N)
    for i in tl.range(0, steps):
        keys = start + _nth(i, before, full, CUT) * N + columns
        k = _rows_of(k_ptr, keys, T, dims, STRIDE, CUT)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * SCALE
        if CUT:
            seen = (keys[None, :] >= first[:, None]) & (keys[None, :] <= last[:, None])
            scores = tl.where(seen, scores, _MASKED)
        now_largest = tl.maximum(largest, tl.max(scores, 1))
        weights = tl.exp2(scores - now_largest[:, None])
        kept = tl.exp2(largest - now_largest)
        total = total * kept + tl.sum(weights, 1)
        v = _rows_of(v_ptr, keys, T, dims, STRIDE, CUT)
        out = tl.dot(weights.to(v.dtype), v, out * kept[:, None], input_precision=PRECISION)
        largest = now_largest
    return out, total, largest


@triton.jit
def _forward_kernel(
    q_ptr, k_ptr, v_ptr, first_ptr, last_ptr, out_ptr, logsumexp_ptr,
    S: tl.constexpr, T: tl.constexpr, H: tl.constexpr, K: tl.constexpr, D: tl.constexpr,
    SCALE: tl.constexpr, M: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # The last blocks see the most keys: they go first.
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    head, row = tl.program_id(1), tl.program_id(2).to(tl.int64)
    queries, dims = block * M + tl.arange(0, M), tl.arange(0, D)
    first, last = _block_spans(first_ptr + row * S, last_ptr + row * S, queries, S, T)
    start, before, full, after = _key_range(first, last, N)

    offset = ((row * S + block * M) * H + head) * D
    inside = tl.minimum(S - block * M, M)
    q = _rows_of(q_ptr + offset, tl.arange(0, M), inside, dims, H * D, True)
    k_ptr += (row * T * K + head // (H // K)) * D
    v_ptr += (row * T * K + head // (H // K)) * D

    out = tl.zeros([M, D], tl.float32)
    total = tl.zeros([M], tl.float32)
    largest = tl.full([M], _MASKED, tl.float32)
    out, total, largest = _attend(
        out, total, largest, q, k_ptr, v_ptr, first, last, start, before, full, full, T,
        SCALE * _LOG2_E, K * D, D, N, False, PRECISION,
    )  # fmt: skip
    out, total, largest = _attend(
        out, total, largest, q, k_ptr, v_ptr, first, last, start, before, full, before + after, T,
        SCALE * _LOG2_E, K * D, D, N, True, PRECISION,
    )  # fmt: skip

    empty = last < first
    total = tl.where(empty, 1.0, total)
    out = tl.where(empty[:, None], 0.0, out / total[:, None])
    logsumexp = tl.where(empty, _MASKED, (largest + tl.log2(total)) * _LN_2)
    at = offset + tl.arange(0, M)[:, None] * (H * D) + dims[None, :]
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=queries[:, None] < S)
    tl.store(logsumexp_ptr + (row * H + head) * S + queries, logsumexp, mask=queries < S)


# ---------------------------------------------------------------------------------------- backward


@triton.jit
def _collect(
    dk, dv, k, v, q_ptr, dout_ptr, logsumexp_ptr, delta_ptr, first_ptr, last_ptr, first_key,
    start, before, full, steps, SCALE: tl.constexpr,
    S: tl.constexpr, T: tl.constexpr, STRIDE: tl.constexpr, D: tl.constexpr, M: tl.constexpr,
    N: tl.constexpr, CUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds what `steps` blocks of queries of one head send to a block of keys."""
    dims = tl.arange(0, D)
    for i in tl.range(0, steps):
        block = start + _nth(i, before, full, CUT)
        queries = block * M + tl.arange(0, M)
        # Only whole blocks are beyond the mask's reach.
        at = block * M * STRIDE
        q = _rows_of(q_ptr + at, tl.arange(0, M), S - block * M, dims, STRIDE, CUT)
        dout = _rows_of(dout_ptr + at, tl.arange(0, M), S - block * M, dims, STRIDE, CUT)
        logsumexp = tl.load(logsumexp_ptr + queries, mask=queries < S, other=0.0)
        scores = tl.dot(k, tl.trans(q), input_precision=PRECISION) * SCALE
        weights = tl.exp2(scores - logsumexp[None, :] * _LOG2_E)
        if CUT:
            first, last = _block_spans(first_ptr, last_ptr, queries, S, T)
            keys = first_key + tl.arange(0, N)
            seen = (keys[:, None] >= first[None, :]) & (keys[:, None] <= last[None, :])
            weights = tl.where(seen, weights, 0.0)
        dv = tl.dot(weights.to(dout.dtype), dout, dv, input_precision=PRECISION)
        dweights = tl.dot(v, tl.trans(dout), input_precision=PRECISION)
        delta = tl.load(delta_ptr + queries, mask=queries < S, other=0.0)
        dscores = weights * (dweights - delta[None, :])
        dk = tl.dot(dscores.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit
def _keys_kernel(
    q_ptr, k_ptr, v_ptr, first_ptr, last_ptr, reach_ptr, dout_ptr, logsumexp_ptr, delta_ptr,
    dk_ptr, dv_ptr,
    S: tl.constexpr, T: tl.constexpr, H: tl.constexpr, K: tl.constexpr, D: tl.constexpr,
    SCALE: tl.constexpr, M: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    block, kv_head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    keys, dims = block * N + tl.arange(0, N), tl.arange(0, D)
    own = (row * T * K + kv_head) * D
    k = _rows_of(k_ptr + own, keys, T, dims, K * D, True)
    v = _rows_of(v_ptr + own, keys, T, dims, K * D, True)
    dk = tl.zeros([N, D], tl.float32)
    dv = tl.zeros([N, D], tl.float32)
    first_ptr += row * S
    last_ptr += row * S
    reach_ptr += (row * tl.num_programs(0) + block) * 4
    start, before = tl.load(reach_ptr), tl.load(reach_ptr + 1)
    full, after = tl.load(reach_ptr + 2), tl.load(reach_ptr + 3)
    for member in tl.range(0, H // K):
        head = kv_head * (H // K) + member
        rows = (row * S * H + head) * D
        stats = (row * H + head) * S
        dk, dv = _collect(
            dk, dv, k, v, q_ptr + rows, dout_ptr + rows, logsumexp_ptr + stats, delta_ptr + stats,
            first_ptr, last_ptr, block * N, start, before, full, full, SCALE * _LOG2_E,
            S, T, H * D, D, M, N, False, PRECISION,
        )  # fmt: skip
        dk, dv = _collect(
            dk, dv, k, v, q_ptr + rows, dout_ptr + rows, logsumexp_ptr + stats, delta_ptr + stats,
            first_ptr, last_ptr, block * N, start, before, full, before + after, SCALE * _LOG2_E,
            S, T, H * D, D, M, N, True, PRECISION,
        )  # fmt: skip
    at = own + keys[:, None] * (K * D) + dims[None, :]
    tl.store(dk_ptr + at, (dk * SCALE).to(dk_ptr.dtype.element_ty), mask=keys[:, None] < T)
    tl.store(dv_ptr + at, dv.to(dv_ptr.dtype.element_ty), mask=keys[:, None] < T)


@triton.jit
def _receive(
    dq, q, dout, logsumexp, delta, k_ptr, v_ptr, first, last, start, before, full, steps, T,
    SCALE: tl.constexpr, STRIDE: tl.constexpr, D: tl.constexpr, N: tl.constexpr, CUT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds what `steps` blocks of keys send to a block of queries."""
    dims, columns = tl.arange(0, D), tl.arange(0, N)
    for i in tl.range(0, steps):
        keys = start + _nth(i, before, full, CUT) * N + columns
        k = _rows_of(k_ptr, keys, T, dims, STRIDE, CUT)
        v = _rows_of(v_ptr, keys, T, dims, STRIDE, CUT)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * SCALE
        weights = tl.exp2(scores - logsumexp[:, None])
        if CUT:
            seen = (keys[None, :] >= first[:, None]) & (keys[None, :] <= last[:, None])
            weights = tl.where(seen, weights, 0.0)
        dweights = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
        dscores = weights * (dweights - delta[:, None])
        dq = tl.dot(dscores.to(k.dtype), k, dq, input_precision=PRECISION)
    return dq


@triton.jit
def _queries_kernel(
    q_ptr, k_ptr, v_ptr, first_ptr, last_ptr, dout_ptr, logsumexp_ptr, delta_ptr, dq_ptr,
    S: tl.constexpr, T: tl.constexpr, H: tl.constexpr, K: tl.constexpr, D: tl.constexpr,
    SCALE: tl.constexpr, M: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    head, row = tl.program_id(1), tl.program_id(2).to(tl.int64)
    queries, dims = block * M + tl.arange(0, M), tl.arange(0, D)
    first, last = _block_spans(first_ptr + row * S, last_ptr + row * S, queries, S, T)
    start, before, full, after = _key_range(first, last, N)

    offset = ((row * S + block * M) * H + head) * D
    inside = tl.minimum(S - block * M, M)
    q = _rows_of(q_ptr + offset, tl.arange(0, M), inside, dims, H * D, True)
    dout = _rows_of(dout_ptr + offset, tl.arange(0, M), inside, dims, H * D, True)
    stats = (row * H + head) * S + queries
    logsumexp = tl.load(logsumexp_ptr + stats, mask=queries < S, other=0.0) * _LOG2_E
    delta = tl.load(delta_ptr + stats, mask=queries < S, other=0.0)
    k_ptr += (row * T * K + head // (H // K)) * D
    v_ptr += (row * T * K + head // (H // K)) * D

    dq = tl.zeros([M, D], tl.float32)
    dq = _receive(
        dq, q, dout, logsumexp, delta, k_ptr, v_ptr, first, last, start, before, full, full, T,
        SCALE * _LOG2_E, K * D, D, N, False, PRECISION,
    )  # fmt: skip
    dq = _receive(
        dq, q, dout, logsumexp, delta, k_ptr, v_ptr, first, last, start, before, full,
        before + after, T, SCALE * _LOG2_E, K * D, D, N, True, PRECISION,
    )  # fmt: skip
    at = offset + tl.arange(0, M)[:, None] * (H * D) + dims[None, :]
    tl.store(dq_ptr + at, (dq * SCALE).to(dq_ptr.dtype.element_ty), mask=queries[:, None] < S)


# --------------------------------------------------------------------------------- joined with JAX


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
        _forward_kernel,
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
    stats = [dout_BSHD, logsumexp_BHS, delta_BHS]
    like = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)  # noqa: E731
    blocks = tuning.keys
    dk_BTKD, dv_BTKD = triton_call(
        _keys_kernel,
        [q_BSHD, k_BTKD, v_BTKD, *spans, query_reach(spans, T, blocks.M, blocks.N), *stats],
        [like(k_BTKD), like(v_BTKD)],
        grid=(triton.cdiv(T, blocks.N), K, B),
        **_constants(q_BSHD, k_BTKD, blocks),
    )
    blocks = tuning.queries
    (dq_BSHD,) = triton_call(
        _queries_kernel,
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
