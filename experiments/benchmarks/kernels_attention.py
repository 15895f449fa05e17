"""Implementations of attention to be compared: ours, XLA, cuDNN through JAX, torch (see kernel_speed.py).

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

MEAN_DOCUMENT = 1536
# Rows as in pre-training and its long-context stages; what matters most first.
LENGTHS = (8192, 32_768, 131_072, 2048)
# Beyond this length XLA's scores do not fit.
_LONGEST = {"XLA": 8192}


class AttentionCase(NamedTuple):
    """A row of documents at the heads of the 8B model."""

    documents: tuple[int, ...]
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128

    part, whats, unit = "attention", (BOTH, FORWARD), gpu.FLOPS

    @property
    def length(self) -> int:
        return sum(self.documents)

    @property
    def name(self) -> str:
        mix = "1 document" if len(self.documents) == 1 else f"{len(self.documents)} documents"
        return f"{self.length:,} tokens, {mix}"

    def work(self, what: str) -> float:
        forward = 4.0 * self.head_dim * self.heads * gpu.pairs_of(self.documents)
        return forward * (3.5 if what == BOTH else 1)

    def places(self) -> Places:
        return gpu.places_of(self.documents)

    def toy(self) -> "AttentionCase":
        return AttentionCase((100,) if len(self.documents) == 1 else (40, 1, 59), 2, 1, 64)

    def implementations(self, what: str) -> list[gpu.Implementation]:
        """Ours first; the others where they can run."""
        places = self.places()
        keys = jax.random.split(jax.random.key(0), 4)
        heads = (self.heads, self.kv_heads, self.kv_heads, self.heads)
        arrays = [
            jax.random.normal(key, (1, self.length, n, self.head_dim), jnp.bfloat16)
            for key, n in zip(keys, heads, strict=True)
        ]
        all_ = [
            _in_jax("ours", what, _ours, arrays, places, make_spans(places, places)),
            _in_jax("XLA", what, _xla, arrays, places),
        ]
        gpu.expect("cuDNN's graphs", (2 if what == BOTH else 1) * gpu.CUDNN)
        if not gpu.rehearsing():
            lengths = jnp.asarray(self.documents, jnp.int32)
            one = len(self.documents) == 1
            all_.append(
                _in_jax("cuDNN", what, _cudnn_causal, arrays)
                if one
                else _in_jax("cuDNN, packed", what, cudnn_packed, arrays, lengths)
            )
        if gpu.has_torch():
            all_ += _torch(self, what, arrays)
        return [x for x in all_ if self.length <= _LONGEST.get(x.name, self.length)]


def attention_cases(lengths: list[int] | None = None) -> list[AttentionCase]:
    """Rows of one document, and of documents of 1.5K tokens on average."""
    cases = []
    for length in lengths or LENGTHS:
        mixed = gpu.document_lengths(length, MEAN_DOCUMENT, np.random.default_rng(length))
        cases += [AttentionCase((length,)), AttentionCase(tuple(mixed))]
    return cases


def _in_jax(name: str, what: str, compute, arrays, *mask) -> gpu.Implementation:
    """`compute(q, k, v, *mask)`, with the gradients of q, k and v where `what` is both ways."""

    def run(q, k, v, g, *mask):
        if what == FORWARD:
            return compute(q, k, v, *mask)
        out, pullback = jax.vjp(lambda *x: compute(*x, *mask), q, k, v)
        return out, pullback(g)

    def compared(result: Any) -> list:
        return [gpu.sampled(x) for x in jax.tree.leaves(result)]

    return gpu.Implementation(
        name, functools.partial(jax.jit(run), *arrays, *mask), results=compared
    )


def _ours(q, k, v, places, spans):
    return attention(q, k, v, places, places, "triton", spans=spans)


def _xla(q, k, v, places):
    return attention(q, k, v, places, places, "reference")


def _cudnn_causal(q, k, v):
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")


def cudnn_packed(q_BSHD, k_BTKD, v_BTKD, documents_N):
    """cuDNN's attention over one row of packed documents of these lengths, in the row's order.

    JAX has it under a private name alone. JAX 0.10 counts the offsets of keys by the query's heads:
    with fewer KV heads it reads the wrong keys.

    Raises:
      NotImplementedError: the row's KV heads are fewer than its heads, and JAX is older than 0.11.
    """
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    if jax.__version_info__ < (0, 11) and q_BSHD.shape[2] != k_BTKD.shape[2]:
        raise NotImplementedError("cuDNN's packed mode with grouped heads needs JAX 0.11")
    sizes = documents_N[None]
    offsets = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(documents_N)])[None]
    return cudnn.dot_product_attention(
        q_BSHD, k_BTKD, v_BTKD, q_seqlen=sizes, kv_seqlen=sizes, q_offsets=offsets,
        kv_offsets=offsets, scale=q_BSHD.shape[-1] ** -0.5,
        mask_type=cudnn.MaskType.PADDING_CAUSAL,
    )  # fmt: skip


def _torch(case: AttentionCase, what: str, arrays) -> list[gpu.Implementation]:
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

    def implementation(name: str, compute, causal_only: bool) -> gpu.Implementation:
        def start():
            if what == FORWARD:
                with torch.no_grad():
                    return (compute(q, k, v),)
            out = compute(q, k, v)
            return out, *torch.autograd.grad(out, (q, k, v), g)

        def results(tensors) -> list[np.ndarray]:
            return [gpu.sampled(x.detach().transpose(1, 2)).float().cpu().numpy() for x in tensors]

        return gpu.in_torch(name, start, None if causal_only else results)

    documents = torch.from_numpy(np.array(case.places().segments[0])).to(device)

    def same_document(b, h, query, key):
        return (query >= key) & (documents[query] == documents[key])

    @functools.cache
    def mask():
        # Compiled, for otherwise all pairs of a row of 131K tokens lie in memory.
        compiled = gpu.torch_compile(create_block_mask)
        return compiled(same_document, None, None, case.length, case.length, device=device)

    def flex(q, k, v):
        compiled = gpu.torch_compile(flex_attention, what)
        return compiled(q, k, v, block_mask=mask(), enable_gqa=True)

    sdpa = functools.partial(scaled_dot_product_attention, is_causal=True, enable_gqa=True)
    several = len(case.documents) > 1
    found = [implementation("torch SDPA, causal only" if several else "torch SDPA", sdpa, several)]
    gpu.torch_compile(flex_attention, what)
    if what == FORWARD or not gpu.rehearsing():
        found.append(implementation("torch FlexAttention", flex, False))
    return found
