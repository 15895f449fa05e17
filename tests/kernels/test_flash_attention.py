"""The Triton kernels in the interpreter, against the formulas in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("triton", reason="triton has wheels for Linux only")

from experiments.benchmarks import float64
from llama3_jax.errors import UserError
from llama3_jax.kernels.attention import Places, Spans, attention, make_spans
from llama3_jax.kernels.gpu.call import interpreted
from llama3_jax.kernels.gpu.flash_attention import Tuning, flash_attention, query_reach
from llama3_jax.kernels.gpu.tuning import Blocks
from llama3_jax.parallel.context import rank_chunks
from tests.kernels.test_attention import packed_places, windows

# Small blocks, unlike in each kernel, so that short rows have many.
SMALL = Tuning(Blocks(32, 16, 4, 1), Blocks(16, 32, 4, 1), Blocks(16, 16, 4, 1))


def places_of(*rows: list[int]) -> Places:
    """Rows of documents by their lengths; a negative one is padding."""
    positions = [np.concatenate([np.arange(abs(n)) for n in row]) for row in rows]
    segments = [
        np.repeat([0 if n < 0 else i + 1 for i, n in enumerate(row)], np.abs(row)) for row in rows
    ]
    return Places(jnp.asarray(positions, jnp.int32), jnp.asarray(segments, jnp.int32))


def compare(random, places: Places, heads: int, kv_heads: int, head_dim=16, rows=None):
    """Values and gradients of queries `rows` (None: all) against float64."""
    batch, length = places.segments.shape
    queries = places if rows is None else jax.tree.map(lambda x: x[:, rows], places)
    q, g = random.normal(size=(2, batch, queries.segments.shape[1], heads, head_dim))
    k, v = random.normal(size=(2, batch, length, kv_heads, head_dim))
    real = np.asarray(queries.segments) > 0
    g = g * real[..., None, None]

    def ours(q, k, v):
        spans = make_spans(queries, places, rows)
        out, logsumexp = flash_attention(q, k, v, spans, SMALL)
        return jnp.sum(out * g.astype(np.float32)), (out, logsumexp)

    def definition(q, k, v):
        out = float64.attention(q, k, v, queries, places)
        return jnp.sum(out * g), out

    both = dict(argnums=(0, 1, 2), has_aux=True)
    with interpreted():
        single = (x.astype(np.float32) for x in (q, k, v))
        (_, (out, logsumexp)), gradients = jax.jit(jax.value_and_grad(ours, **both))(*single)
    with jax.enable_x64(True):
        (_, exact), expected = jax.value_and_grad(definition, **both)(q, k, v)
    np.testing.assert_allclose(out[real], exact[real], atol=4e-6, rtol=1e-4)
    assert (np.asarray(out)[~real] == 0).all() and np.isfinite(logsumexp).all()
    for ours, reference_gradient in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(ours, reference_gradient, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("group", [1, 2, 3, 8])
def test_random_documents_and_lengths_equal_the_definition(group):
    random = np.random.default_rng()
    length = int(random.integers(33, 66))
    places = packed_places(random, 1, length)
    compare(random, places, 1 * group, 1)


def test_one_token_documents_a_whole_row_and_rows_of_padding():
    places = places_of([1] * 5 + [32], [37], [-37])
    compare(np.random.default_rng(), places, 2, 2)


def test_padding_before_and_between_documents():
    compare(np.random.default_rng(), places_of([-3, 20, -18, 2]), 2, 1)


@pytest.mark.parametrize("context, rank", [(2, 0), (2, 1), (3, 2)])
def test_chunks_of_queries_over_gathered_keys(context, rank):
    # Chunks of 13 or 9 tokens: blocks of queries hold the end of one and the start of the next.
    random = np.random.default_rng()
    length = 54 if context == 3 else 52
    places = packed_places(random, 1, length)
    size = length // (2 * context)
    rows = (rank_chunks(context)[rank][:, None] * size + np.arange(size)).reshape(-1)
    compare(random, places, 2, 1, rows=jnp.asarray(rows))


@pytest.mark.parametrize("rows", [None, np.r_[10:19, 37:46]], ids=["all", "chunks"])
def test_windows(rows):
    random = np.random.default_rng()
    places = windows(random, packed_places(random, 1, 54))
    compare(random, places, 2, 1, rows=None if rows is None else jnp.asarray(rows))


@pytest.mark.parametrize("head_dim", [64, 128])
def test_head_dimensions(head_dim):
    compare(np.random.default_rng(), places_of([21, 12]), 2, 1, head_dim)


def test_logsumexp_and_its_gradient():
    random = np.random.default_rng()
    places = places_of([7, 30])
    q, k, v = (jnp.asarray(random.normal(size=(1, 37, 1, 16)), jnp.float32) for _ in range(3))
    g = random.normal(size=(1, 1, 37))

    def ours(q, k):
        return jnp.sum(flash_attention(q, k, v, make_spans(places, places), SMALL)[1] * g)

    def definition(q, k):
        scores = float64.attention_scores(q, k, places, places)
        return jnp.sum(jax.nn.logsumexp(scores, axis=-1) * g)

    with interpreted():
        value, gradients = jax.jit(jax.value_and_grad(ours, (0, 1)))(q, k)
    with jax.enable_x64(True):
        exact = (np.asarray(x, np.float64) for x in (q, k))
        expected, expected_gradients = jax.value_and_grad(definition, (0, 1))(*exact)
    assert float(value) == pytest.approx(float(expected), rel=1e-5, abs=1e-4)
    for ours, expected in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(ours, expected, atol=2e-5, rtol=1e-4)


def test_bfloat16_stays_close_to_float64():
    random = np.random.default_rng(0)
    q = random.normal(size=(1, 64, 4, 32))
    k, v = random.normal(size=(2, 1, 64, 2, 32))
    places = packed_places(random, 1, 64)
    low = [jnp.asarray(x, jnp.bfloat16) for x in (q, k, v)]
    with interpreted():
        out = jax.jit(lambda *x: attention(*x, places, places, "triton"))(*low)
    assert out.dtype == jnp.bfloat16
    with jax.enable_x64(True):
        exact = float64.attention(*(np.asarray(x, np.float64) for x in low), places, places)
    real = np.asarray(places.segments) > 0
    np.testing.assert_allclose(np.float64(out)[real], exact[real], atol=0.02)


def test_blocks_outside_a_document_are_never_read():
    # Not-a-number times a weight of zero is not a number: reading the first document's values in
    # a block of the second's queries would show.
    places = places_of([64, 64])
    q, k, v = np.random.default_rng().normal(size=(3, 1, 128, 1, 16)).astype(np.float32)
    k[:, :64] = v[:, :64] = np.nan

    def loss(q, k, v):
        out, _ = flash_attention(q, k, v, make_spans(places, places), SMALL)
        return jnp.sum(out[:, 64:] ** 2), out

    with interpreted():
        (_, out), (dq, dk, dv) = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(q, k, v)
    assert np.isnan(out[:, :64]).all()
    for own in (out, dq, dk, dv):
        assert np.isfinite(own[:, 64:]).all()


def test_reach_is_exact_to_the_block():
    random = np.random.default_rng()
    places = packed_places(random, 2, 90)
    rows = jnp.asarray(np.r_[0:20, 60:83])
    queries = jax.tree.map(lambda x: x[:, rows], places)
    # No block of queries holds the end of one chunk and the start of the next.
    spans, M, N = make_spans(queries, places, rows), 4, 16
    reach = np.asarray(query_reach(spans, 90, M, N))
    first, last = (np.asarray(x) for x in spans)
    keys = np.arange(90)
    for b, block in np.ndindex(reach.shape[:2]):
        own = keys[block * N : (block + 1) * N]
        seen = (first[b, :, None] <= own) & (own <= last[b, :, None])
        blocks = [seen[at : at + M] for at in range(0, len(rows), M)]
        some = [i for i, x in enumerate(blocks) if x.any()]
        start, before, full, after = reach[b, block]
        assert (start, before + full + after) == (
            (some[0], some[-1] + 1 - some[0]) if some else (start, 0)
        )
        whole = blocks[start + before : start + before + full]
        assert all(x.all() and x.shape == (M, N) for x in whole)
        assert sum(x.all() and x.shape == (M, N) for x in blocks) == full


def test_work_is_that_of_the_documents():
    # Of 4096 tokens in documents of 512, at blocks of 128: 10 of each document's 16 pairs of
    # blocks, where a causal mask alone would leave 528 in all.
    places = places_of([512] * 8)
    reach = np.asarray(query_reach(make_spans(places, places), 4096, 128, 128))
    assert reach[..., 1:].sum() == 8 * 10
    causal = Spans(jnp.zeros((1, 4096), jnp.int32), jnp.arange(4096, dtype=jnp.int32)[None])
    assert np.asarray(query_reach(causal, 4096, 128, 128))[..., 1:].sum() == 528


def test_what_the_kernels_are_not_made_for_is_refused():
    places = places_of([8])
    x = jnp.zeros((1, 8, 1, 24))
    with pytest.raises(UserError, match="head_dim of 16, 32, 64, 128, not 24"):
        attention(x, x, x, places, places, "triton")
    x = jnp.zeros((1, 8, 1, 16))
    with pytest.raises(UserError, match="unknown; known: reference, chunked, triton, cudnn"):
        attention(x, x, x, places, places, "flash")
