"""The three kernels of flash attention: forward, backward for keys and values, backward for queries.

flash_attention.py says what they compute, launches them and joins them with JAX.

Shapes: S queries, T keys, H query heads, K KV heads, D head dim; M queries and N keys of a block.
"""

import triton
import triton.language as tl

# Scores of keys that a query may not see; finite, so that no difference of two is NaN.
_MASKED: tl.constexpr = tl.constexpr(-1e30)
# Where a running maximum starts: below any score and far above a masked one, scaled, whose weight is
# then zero also in a block of which a query sees nothing.
_LOWEST: tl.constexpr = tl.constexpr(-1e20)
_LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
_LN_2: tl.constexpr = tl.constexpr(0.6931471805599453)


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
        base = start + _nth(i, before, full, CUT) * N
        keys = base + columns
        k = _rows_of(k_ptr, keys, T, dims, STRIDE, CUT)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if CUT:
            # Numbers within the block are compared: those of its columns do not change.
            seen = columns[None, :] >= (first - base)[:, None]
            seen &= columns[None, :] <= (last - base)[:, None]
            scores = tl.where(seen, scores, _MASKED)
        # The scale is applied to maxima, and to scores within the exponential: one FMA each.
        now_largest = tl.maximum(largest, tl.max(scores, 1) * SCALE)
        weights = tl.exp2(scores * SCALE - now_largest[:, None])
        kept = tl.exp2(largest - now_largest)
        total = total * kept + tl.sum(weights, 1)
        v = _rows_of(v_ptr, keys, T, dims, STRIDE, CUT)
        out = tl.dot(weights.to(v.dtype), v, out * kept[:, None], input_precision=PRECISION)
        largest = now_largest
    return out, total, largest


@triton.jit
def forward_kernel(
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
    largest = tl.full([M], _LOWEST, tl.float32)
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
        weights = tl.exp2(scores - logsumexp[None, :])
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
def keys_kernel(
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
        base = start + _nth(i, before, full, CUT) * N
        keys = base + columns
        k = _rows_of(k_ptr, keys, T, dims, STRIDE, CUT)
        v = _rows_of(v_ptr, keys, T, dims, STRIDE, CUT)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * SCALE
        weights = tl.exp2(scores - logsumexp[:, None])
        if CUT:
            # Numbers within the block are compared: those of its columns do not change.
            seen = columns[None, :] >= (first - base)[:, None]
            seen &= columns[None, :] <= (last - base)[:, None]
            weights = tl.where(seen, weights, 0.0)
        dweights = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
        dscores = weights * (dweights - delta[:, None])
        dq = tl.dot(dscores.to(k.dtype), k, dq, input_precision=PRECISION)
    return dq


@triton.jit
def queries_kernel(
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
    logsumexp = tl.load(logsumexp_ptr + stats, mask=queries < S, other=0.0)
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
