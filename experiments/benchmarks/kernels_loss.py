"""Implementations of the loss to be compared: the head's product with its cross-entropy (see
kernel_speed.py).

The head is in bfloat16, as a step holds it after its gather (parallel/fsdp.py); ours and XLA's
gradient of it is in float32, torch's in bfloat16.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks import gpu
from experiments.benchmarks.gpu import BOTH
from llama3_jax.kernels.cross_entropy import linear_cross_entropy


class LossCase(NamedTuple):
    """`share` of the positions count."""

    share: float
    tokens: int = 8192
    dim: int = 4096
    vocabulary: int = 128_256

    part, whats, unit = "loss", (BOTH,), gpu.FLOPS

    @property
    def name(self) -> str:
        shape = f"{self.tokens:,} tokens x {self.dim:,} x {self.vocabulary:,}"
        return f"{shape}, {self.share:.0%} count"

    def mask(self) -> np.ndarray:
        return np.random.default_rng(0).random(self.tokens) < self.share

    def work(self, what: str) -> float:
        products = 3 if what == BOTH else 1
        return 2.0 * products * float(self.mask().sum()) * self.dim * self.vocabulary

    def toy(self) -> "LossCase":
        return LossCase(self.share, 96, 64 if self.dim == 4096 else 48, 500)

    def implementations(self, what: str) -> list[gpu.Implementation]:
        """With their gradients."""
        N, M, V = self.tokens, self.dim, self.vocabulary
        keys = jax.random.split(jax.random.key(0), 3)
        hidden = jax.random.normal(keys[0], (N, M), jnp.bfloat16)
        head = (jax.random.normal(keys[1], (M, V)) * M**-0.5).astype(jnp.bfloat16)
        targets = jax.random.randint(keys[2], (N,), 0, V)
        arrays = hidden, head, targets, jnp.asarray(self.mask())
        found = []
        for name, how in dict(ours="triton", XLA="reference").items():
            compiled = jax.jit(functools.partial(_loss, how)).lower(*arrays).compile()
            start = functools.partial(compiled, *arrays)
            memory = lambda x=compiled: x.memory_analysis().temp_size_in_bytes  # noqa: E731
            found.append(gpu.Implementation(name, start, results=_results, memory=memory))
        return found + (_torch(arrays) if gpu.has_torch() else [])


# The 8B model over one row of 8K tokens, and a shape for which others published figures (marin#6596).
LOSS_CASES = (LossCase(1.0), LossCase(0.5), LossCase(1.0, 32_768, 2560))


def _loss(implementation: str, hidden, head, targets, mask):
    def total(hidden, head):
        return linear_cross_entropy(hidden, head, targets, mask, implementation)[0]

    return jax.value_and_grad(total, argnums=(0, 1))(hidden, head.astype(jnp.float32))


def _results(result) -> list:
    """The sum and both gradients, of the head's some columns."""
    return [gpu.sampled(x) for x in jax.tree.leaves(result)]


def _torch(arrays) -> list[gpu.Implementation]:
    import torch

    hidden, head, targets, mask = (torch.from_dlpack(x).clone() for x in arrays)
    head = head.T.contiguous()
    hidden.requires_grad_(), head.requires_grad_()
    targets = torch.where(mask.bool(), targets.long(), -100)

    def start(compute):
        total = compute(hidden, head, targets)
        return total, *torch.autograd.grad(total, (hidden, head))

    def results(tensors) -> list:
        total, dhidden, dhead = (x.detach() for x in tensors)
        return _results([x.float().cpu().numpy() for x in (total, dhidden, dhead.T)])

    compiled = gpu.torch_compile(_loss_in_torch, hidden.shape)
    found = []
    for name, compute in (("torch", _loss_in_torch), ("torch compiled", compiled)):
        run = functools.partial(start, compute)
        memory = functools.partial(_peak_beside_results, run)
        found.append(gpu.in_torch(name, run, results)._replace(memory=memory))
    return found


def _loss_in_torch(hidden, head, targets):
    import torch

    logits = torch.nn.functional.linear(hidden, head).float()
    return torch.nn.functional.cross_entropy(logits, targets, reduction="sum")


def _peak_beside_results(start) -> int:
    import torch

    if gpu.rehearsing():
        return 0
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = start()
    kept = torch.cuda.memory_allocated() - before
    del results
    return torch.cuda.max_memory_allocated() - before - kept
