"""Grouped-query attention with causal and document mask.

`reference` is the definition, in plain JAX. `chunked` computes the same a chunk of queries at a
time, without the scores of keys that come after the chunk, and recomputes probabilities in the
backward pass: less memory, and several times faster on CPU. For GPUs there are "triton"
(gpu/flash_attention.py), whose work is that of the documents, and "cudnn", which takes the mask as a
dense array [B, S, T] and computes all of it.

Shapes: B batch, S query length, T key length, H query heads, K KV heads, G = H / K, D head dim,
N = G x rows of a chunk.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from llama3_jax.kernels.dispatch import resolve

Implementation = Literal["reference", "chunked", "triton", "cudnn"]

# Finite, so that a row whose every key is masked gives a uniform softmax instead of NaN.
_MASKED = -0.7 * float(jnp.finfo(jnp.float32).max)
# Few queries at a time keep a chunk's scores in the cache. At most `_MOST_CHUNKS` chunks, because
# each is compiled by itself.
_SMALLEST_CHUNK, _MOST_CHUNKS = 64, 16
_ROWS_CHUNK = 512


class Places(NamedTuple):
    """Of each token its position in its document, and which document (segment) that is.

    Queries may have a position before which they see nothing (a sliding window); None: they see all.
    """

    positions: Int[Array, "B S"]
    segments: Int[Array, "B S"]
    earliest: Int[Array, "B S"] | None = None


class Spans(NamedTuple):
    """The mask as a range of keys for each query: indices of the first and last that it sees.

    Padding sees none: its range is empty.
    """

    first: Int[Array, "B S"]
    last: Int[Array, "B S"]


def make_spans(queries: Places, keys: Places, rows: Int[Array, "S"] | None = None) -> Spans:
    """Spans of queries that are the keys `rows` (None: all of them, in order).

    Documents must be in order and in one piece, as the packer leaves them.
    """
    T = keys.segments.shape[1]
    rows = jnp.arange(T) if rows is None else rows
    starts = jnp.diff(keys.segments, axis=1, prepend=-1) != 0
    first = jax.lax.cummax(jnp.where(starts, jnp.arange(T), 0), axis=1)[:, rows]
    if queries.earliest is not None:
        start = jnp.take_along_axis(keys.positions, first, axis=1)
        first += jnp.maximum(queries.earliest - start, 0)
    real = queries.segments > 0
    last = jnp.broadcast_to(rows, first.shape)
    spans = Spans(jnp.where(real, first, T), jnp.where(real, last, -1))
    return jax.tree.map(lambda x: x.astype(jnp.int32), spans)


def attention_mask(queries: Places, keys: Places) -> Bool[Array, "B S T"]:
    """True where a query may see a key: same document, and not later in it.

    Attention never crosses a document boundary (Llama 3 paper, section 3.2). Positions, not array
    indices, give the order, so permuted rows and caches need no other rule.
    """
    same_document = queries.segments[:, :, None] == keys.segments[:, None, :]
    not_later = queries.positions[:, :, None] >= keys.positions[:, None, :]
    mask = same_document & not_later
    if queries.earliest is not None:
        mask &= keys.positions[:, None, :] >= queries.earliest[:, :, None]
    return mask


def attention(
    q_BSHD: Float[Array, "B S H D"],
    k_BTKD: Float[Array, "B T K D"],
    v_BTKD: Float[Array, "B T K D"],
    queries: Places,
    keys: Places,
    implementation: Implementation = "reference",
    rows: Int[Array, "S"] | None = None,
    spans: Spans | None = None,
) -> Float[Array, "B S H D"]:
    """Softmax attention, scores and softmax in float32, result in `q.dtype`.

    `rows` are the indices of the queries among the keys; None: they are all of them, in order.
    `chunked` needs documents in order: a key later in the array than a query is never in its past.
    "triton" needs them in one piece too; `spans` spares it making them of places and rows.
    What padding (segment 0) attends to differs between them, and is for nobody to use.
    What a backward pass need not compute again has the name "attention_out" for remat policies.

    Raises:
      UserError: the implementation is unknown, not installed, or not made for such heads.
    """
    compute = resolve("attention", implementation)
    out_BSHD = compute(q_BSHD, k_BTKD, v_BTKD, queries, keys, rows, spans)
    # The Triton kernel's results have it inside, before its gradient is attached.
    return out_BSHD if implementation == "triton" else checkpoint_name(out_BSHD, "attention_out")


def reference(q_BSHD, k_BTKD, v_BTKD, queries: Places, keys: Places, rows=None, spans=None):
    """The definition. Arguments and result as for `attention`."""
    del rows, spans
    B, S, H, D = q_BSHD.shape
    weights_BKGST = _weights(q_BSHD, k_BTKD, queries, keys).astype(q_BSHD.dtype)
    out_BSKGD = jnp.einsum("BKGST,BTKD->BSKGD", weights_BKGST, v_BTKD)
    return out_BSKGD.reshape(B, S, H, D)


def attention_weights(
    q_BSHD: Float[Array, "B S H D"], k_BTKD: Float[Array, "B T K D"], queries: Places, keys: Places
) -> Float[Array, "B H S T"]:
    """What each query takes of each key, float32: rows sum to 1, also those of padding."""
    B, S, H, _ = q_BSHD.shape
    return _weights(q_BSHD, k_BTKD, queries, keys).reshape(B, H, S, -1)


def attention_logits(
    q_BSHD: Float[Array, "B S H D"], k_BTKD: Float[Array, "B T K D"], queries: Places, keys: Places
) -> tuple[Float[Array, "B K G S T"], Bool[Array, "B 1 1 S T"]]:
    """Scaled products of queries and keys, float32, G query heads to a KV head; and the mask."""
    B, S, H, D = q_BSHD.shape
    K = k_BTKD.shape[2]
    mask_BST = attention_mask(queries, keys)
    q_BSKGD = q_BSHD.reshape(B, S, K, H // K, D)
    scores_BKGST = jnp.einsum(
        "BSKGD,BTKD->BKGST", q_BSKGD, k_BTKD, preferred_element_type=jnp.float32
    )
    return scores_BKGST * D**-0.5, mask_BST[:, None, None]


def _weights(q_BSHD, k_BTKD, queries: Places, keys: Places) -> Float[Array, "B K G S T"]:
    scores_BKGST, mask = attention_logits(q_BSHD, k_BTKD, queries, keys)
    return jax.nn.softmax(jnp.where(mask, scores_BKGST, _MASKED), axis=-1)


def cudnn(q_BSHD, k_BTKD, v_BTKD, queries: Places, keys: Places, rows=None, spans=None):
    """cuDNN's fused attention through JAX. Arguments and result as for `attention`."""
    del rows, spans
    mask_BST = attention_mask(queries, keys)
    return jax.nn.dot_product_attention(
        q_BSHD, k_BTKD, v_BTKD, mask=mask_BST[:, None], implementation="cudnn"
    )


def chunked(q_BSHD, k_BTKD, v_BTKD, queries: Places, keys: Places, rows=None, spans=None):
    """A chunk of queries at a time. Arguments and result as for `attention`."""
    del spans
    if rows is None:
        return _chunked(q_BSHD, k_BTKD, v_BTKD, queries)
    return _chunked_rows(q_BSHD, k_BTKD, v_BTKD, queries, keys)


def _chunked_rows(q_BSHD, k_BTKD, v_BTKD, queries: Places, keys: Places) -> Array:
    """A chunk of queries at a time against all keys: which are in reach is known on the device only.

    The scores of a chunk are computed again in the backward pass.
    """
    S = q_BSHD.shape[1]
    size = next(n for n in range(min(_ROWS_CHUNK, S), 0, -1) if S % n == 0)

    def chunks(x):
        return x.reshape(x.shape[0], S // size, size, *x.shape[2:]).swapaxes(0, 1)

    @jax.checkpoint
    def attend(chunk):
        q, places = chunk
        return reference(q, k_BTKD, v_BTKD, places, keys)

    out = jax.lax.map(attend, (chunks(q_BSHD), jax.tree.map(chunks, queries)))
    return out.swapaxes(0, 1).reshape(q_BSHD.shape)


# ------------------------------------------------------------------------------------- chunked


def _chunked(q_BSHD: Array, k_BSKD: Array, v_BSKD: Array, places: Places) -> Array:
    B, S, H, D = q_BSHD.shape
    K = k_BSKD.shape[2]
    # Heads outermost, the G query heads of a KV head together: each product is then one of
    # contiguous matrices.
    q_BKGSD = q_BSHD.reshape(B, S, K, H // K, D).transpose(0, 2, 3, 1, 4) * D**-0.5
    out_BKGSD = _chunked_heads(
        q_BKGSD, k_BSKD.transpose(0, 2, 1, 3), v_BSKD.transpose(0, 2, 1, 3), places
    )
    return out_BKGSD.transpose(0, 3, 1, 2, 4).reshape(B, S, H, D)


@jax.custom_vjp
def _chunked_heads(q_BKGSD, k_BKSD, v_BKSD, places):
    return _forward(q_BKGSD, k_BKSD, v_BKSD, places)[0]


def _chunks(length: int) -> list[tuple[int, int]]:
    size = max(_SMALLEST_CHUNK, -(-length // _MOST_CHUNKS))
    return [(start, min(start + size, length)) for start in range(0, length, size)]


def _scores(q_BKGSD: Array, k_BKSD: Array, places: Places, start: int, stop: int) -> Array:
    """Masked float32 scores of queries [start, stop) against keys [0, stop), as [B, K, N, stop]."""
    B, K, G, _, D = q_BKGSD.shape
    q_BKND = q_BKGSD[:, :, :, start:stop].reshape(B, K, -1, D)
    scores_BKNT = jnp.einsum(
        "BKND,BKTD->BKNT", q_BKND, k_BKSD[:, :, :stop], preferred_element_type=jnp.float32
    )
    rows = jax.tree.map(lambda x: x[:, start:stop], places)
    mask = attention_mask(rows, jax.tree.map(lambda x: x[:, :stop], places))
    bias = jnp.where(mask, 0.0, _MASKED)[:, None, None]
    scores = scores_BKNT.reshape(B, K, G, stop - start, stop) + bias
    return scores.reshape(B, K, -1, stop)


def _forward(q_BKGSD, k_BKSD, v_BKSD, places):
    B, K, G, S, D = q_BKGSD.shape
    outs, logsumexps = [], []
    for start, stop in _chunks(S):
        scores_BKNT = _scores(q_BKGSD, k_BKSD, places, start, stop)
        largest = scores_BKNT.max(-1, keepdims=True)
        weights_BKNT = jnp.exp(scores_BKNT - largest)
        total = weights_BKNT.sum(-1, keepdims=True)
        out_BKND = jnp.einsum(
            "BKNT,BKTD->BKND", weights_BKNT.astype(v_BKSD.dtype), v_BKSD[:, :, :stop],
            preferred_element_type=jnp.float32,
        ) / total  # fmt: skip
        outs.append(out_BKND.astype(q_BKGSD.dtype).reshape(B, K, G, -1, D))
        logsumexps.append((largest + jnp.log(total)).reshape(B, K, G, -1))
    out_BKGSD = jnp.concatenate(outs, axis=3)
    logsumexp_BKGS = jnp.concatenate(logsumexps, axis=3)
    return out_BKGSD, (q_BKGSD, k_BKSD, v_BKSD, places, out_BKGSD, logsumexp_BKGS)


def _backward(saved, dout_BKGSD):
    q_BKGSD, k_BKSD, v_BKSD, places, out_BKGSD, logsumexp_BKGS = saved
    B, K, G, S, D = q_BKGSD.shape
    f32 = jnp.float32
    delta_BKGS = jnp.sum(dout_BKGSD.astype(f32) * out_BKGSD.astype(f32), axis=-1)
    dqs = []
    dk_BKSD, dv_BKSD = jnp.zeros(k_BKSD.shape, f32), jnp.zeros(v_BKSD.shape, f32)
    for start, stop in _chunks(S):

        def rows(x, start=start, stop=stop):
            return x[:, :, :, start:stop].reshape(B, K, -1, *x.shape[4:])

        scores_BKNT = _scores(q_BKGSD, k_BKSD, places, start, stop)
        weights_BKNT = jnp.exp(scores_BKNT - rows(logsumexp_BKGS)[..., None])
        dout_BKND = rows(dout_BKGSD)
        dweights_BKNT = jnp.einsum(
            "BKND,BKTD->BKNT", dout_BKND, v_BKSD[:, :, :stop], preferred_element_type=f32
        )
        dscores_BKNT = weights_BKNT * (dweights_BKNT - rows(delta_BKGS)[..., None])
        dscores_BKNT = dscores_BKNT.astype(q_BKGSD.dtype)
        weights_BKNT = weights_BKNT.astype(q_BKGSD.dtype)
        dq_BKND = jnp.einsum("BKNT,BKTD->BKND", dscores_BKNT, k_BKSD[:, :, :stop])
        dqs.append(dq_BKND.reshape(B, K, G, -1, D))
        # einsum over the chunk's rows; keys after the chunk get nothing from it.
        later = ((0, 0), (0, 0), (0, S - stop), (0, 0))
        for_keys = "BKNT,BKND->BKTD"
        dk = jnp.einsum(for_keys, dscores_BKNT, rows(q_BKGSD), preferred_element_type=f32)
        dv = jnp.einsum(for_keys, weights_BKNT, dout_BKND, preferred_element_type=f32)
        dk_BKSD, dv_BKSD = dk_BKSD + jnp.pad(dk, later), dv_BKSD + jnp.pad(dv, later)
    dq_BKGSD = jnp.concatenate(dqs, axis=3)
    return dq_BKGSD, dk_BKSD.astype(k_BKSD.dtype), dv_BKSD.astype(v_BKSD.dtype), None


_chunked_heads.defvjp(_forward, _backward)
