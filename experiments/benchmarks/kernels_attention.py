"""Contenders of the attention benchmark: ours, XLA, cuDNN through JAX, torch (see kernels.py).

All get the same arrays. What of a mask does not change from layer to layer (our spans, torch's block
mask) is made once, as a step makes it. A rehearsal leaves out what torch and JAX have for GPUs alone:
cuDNN, and FlexAttention's gradient.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks import gpu
from experiments.benchmarks.gpu import BOTH, FORWARD
from llama3_jax.kernels.attention import Places, attention, make_spans

# Beyond these lengths a contender's scores or mask do not fit, or take minutes.
_LONGEST = {"XLA": 8192, "chunked": 32_768, "cuDNN, dense mask": 8192}


class Sizes(NamedTuple):
    """The heads of the 8B model, and rows as in pre-training and its long-context stages."""

    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    mean_document: int = 1536
    lengths: tuple[int, ...] = (8192, 32_768, 131_072, 2048)  # what matters most first


_TOY = Sizes(4, 2, 64, 40, (150,))


def sizes() -> Sizes:
    return _TOY if gpu.rehearsing() else Sizes()


class AttentionCase(NamedTuple):
    length: int
    documents: tuple[int, ...]

    @property
    def name(self) -> str:
        mix = "1 document" if len(self.documents) == 1 else f"{len(self.documents)} documents"
        return f"{self.length:,} tokens, {mix}"

    def flops(self, what: str) -> float:
        forward = 4.0 * sizes().head_dim * sizes().heads * gpu.pairs_of(self.documents)
        return forward * (3.5 if what == BOTH else 1)

    def places(self) -> Places:
        return gpu.places_of(self.documents)


def attention_cases(lengths: list[int] | None = None) -> list[AttentionCase]:
    """Rows of one document, and of documents of 1.5K tokens on average."""
    cases = []
    for length in lengths or sizes().lengths:
        random = np.random.default_rng(length)
        mixed = gpu.document_lengths(length, sizes().mean_document, random)
        cases += [AttentionCase(length, (length,)), AttentionCase(length, tuple(mixed))]
    return cases


def attention_contenders(case: AttentionCase, what: str) -> list[gpu.Contender]:
    """Ours first; the others where they can run."""
    shape, places = sizes(), case.places()
    keys = jax.random.split(jax.random.key(0), 4)
    heads = (shape.heads, shape.kv_heads, shape.kv_heads, shape.heads)
    arrays = [
        jax.random.normal(key, (1, case.length, n, shape.head_dim), jnp.bfloat16)
        for key, n in zip(keys, heads, strict=True)
    ]
    all_ = [_ours(case, what, arrays, places), *_in_jax(case, what, arrays, places)]
    if not gpu.rehearsing():
        all_ += _cudnn(case, what, arrays, places)
    if gpu.has_torch():
        all_ += _torch(case, what, arrays)
    return [c for c in all_ if case.length <= _LONGEST.get(c.name, case.length)]


def _contender(name: str, what: str, compute, arrays, *mask, results=jax.tree.leaves):
    """`compute(q, k, v, *mask)`, with the gradients of q, k and v where `what` is both ways."""

    def run(q, k, v, g, *mask):
        if what == FORWARD:
            return compute(q, k, v, *mask)
        out, pullback = jax.vjp(lambda *x: compute(*x, *mask), q, k, v)
        return out, pullback(g)

    def compared(result: Any) -> list:
        return [gpu.sampled(x) for x in results(result)]

    start = functools.partial(jax.jit(run), *arrays, *mask)
    return gpu.Contender(name, start, results=compared if results else None)


def _ours(case, what, arrays, places: Places) -> gpu.Contender:
    def compute(q, k, v, places, spans):
        return attention(q, k, v, places, places, "triton", spans=spans)

    return _contender("ours", what, compute, arrays, places, make_spans(places, places))


def _in_jax(case, what, arrays, places: Places) -> list[gpu.Contender]:
    def compute(implementation, q, k, v, places):
        return attention(q, k, v, places, places, implementation)

    return [
        _contender(name, what, functools.partial(compute, implementation), arrays, places)
        for name, implementation in (("XLA", "reference"), ("chunked", "chunked"))
    ]


def _cudnn(case, what, arrays, places: Places) -> list[gpu.Contender]:
    causal = functools.partial(jax.nn.dot_product_attention, is_causal=True, implementation="cudnn")

    def masked(q, k, v, places):
        return attention(q, k, v, places, places, "cudnn")

    dense = _contender("cuDNN, dense mask", what, masked, arrays, places)
    if len(case.documents) == 1:
        return [_contender("cuDNN", what, causal, arrays), dense]

    def by_length(q, k, v, lengths):
        return causal(q, k, v, query_seq_lengths=lengths, key_value_seq_lengths=lengths)

    return [
        _contender("cuDNN, causal only", what, causal, arrays, results=None),
        dense,
        _contender(
            "cuDNN, lengths", what, by_length, [as_rows(x, case.documents) for x in arrays],
            jnp.asarray(case.documents, jnp.int32),
            results=lambda result: [from_rows(x, case.documents) for x in jax.tree.leaves(result)],
        ),
    ]  # fmt: skip


def as_rows(x, documents):
    """[documents, longest, heads, head dim], padded."""
    longest, ends = max(documents), np.cumsum(documents)
    parts = [x[0, end - n : end] for n, end in zip(documents, ends, strict=True)]
    return jnp.stack([jnp.pad(p, ((0, longest - len(p)), (0, 0), (0, 0))) for p in parts])


def from_rows(rows, documents):
    return jnp.concatenate([row[:n] for row, n in zip(rows, documents, strict=True)])[None]


def _torch(case: AttentionCase, what: str, arrays) -> list[gpu.Contender]:
    import torch
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention
    from torch.nn.functional import scaled_dot_product_attention

    device = gpu.torch_device()

    def tensor(x):
        # Heads before tokens, as torch's kernels want them.
        copied = torch.from_dlpack(x).transpose(1, 2).contiguous()
        return copied.requires_grad_(what == BOTH)

    q, k, v, g = (tensor(x) for x in arrays)
    g = g.detach()

    def contender(name: str, compute, several_are_one: bool) -> gpu.Contender:
        def start():
            if what == FORWARD:
                with torch.no_grad():
                    return (compute(q, k, v),)
            out = compute(q, k, v)
            return out, *torch.autograd.grad(out, (q, k, v), g)

        def results(tensors) -> list[np.ndarray]:
            return [gpu.sampled(x.detach().transpose(1, 2)).float().cpu().numpy() for x in tensors]

        return gpu.torch_contender(name, start, None if several_are_one else results)

    documents = torch.from_numpy(np.array(case.places().segments[0])).to(device)

    def same_document(b, h, query, key):
        return (query >= key) & (documents[query] == documents[key])

    # Compiled, for otherwise all pairs of a row of 131K tokens lie in memory.
    mask = gpu.torch_compile(create_block_mask)(
        same_document, None, None, case.length, case.length, device=device
    )
    flex = functools.partial(gpu.torch_compile(flex_attention), block_mask=mask, enable_gqa=True)
    sdpa = functools.partial(scaled_dot_product_attention, is_causal=True, enable_gqa=True)
    several = len(case.documents) > 1
    found = [contender("torch SDPA, causal only" if several else "torch SDPA", sdpa, several)]
    if what == FORWARD or not gpu.rehearsing():
        found.append(contender("torch FlexAttention", flex, False))
    return found
