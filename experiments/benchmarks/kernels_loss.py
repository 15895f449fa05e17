"""Contenders of the loss benchmark: the head's product with its cross-entropy (see kernels.py).

The head is in bfloat16, as a step holds it after its gather (parallel/fsdp.py); ours and XLA's
gradient of it is in float32, torch's in bfloat16.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks import gpu
from experiments.benchmarks.gpu import BOTH, FORWARD
from llama3_jax.kernels.cross_entropy import linear_cross_entropy

CONTENDERS = {"ours": "triton", "chunked": "chunked", "XLA": "reference"}


class Sizes(NamedTuple):
    """The head of the 8B model over one row of 8K tokens."""

    tokens: int = 8192
    dim: int = 4096
    vocabulary: int = 128_256


_TOY = Sizes(96, 64, 500)


def sizes() -> Sizes:
    return _TOY if gpu.rehearsing() else Sizes()


class LossCase(NamedTuple):
    """`share` of the positions count."""

    share: float

    @property
    def name(self) -> str:
        return f"{sizes().tokens:,} tokens x {sizes().vocabulary:,}, {self.share:.0%} count"

    def mask(self) -> np.ndarray:
        return np.random.default_rng(0).random(sizes().tokens) < self.share

    def flops(self, what: str) -> float:
        products = 3 if what == BOTH else 1
        return 2.0 * products * float(self.mask().sum()) * sizes().dim * sizes().vocabulary


LOSS_CASES = (LossCase(1.0), LossCase(0.5))


def loss_contenders(case: LossCase, what: str) -> tuple[list[gpu.Contender], dict[str, float]]:
    """The contenders, and the bytes that each needs beside inputs and results."""
    N, M, V = sizes()
    keys = jax.random.split(jax.random.key(0), 3)
    hidden = jax.random.normal(keys[0], (N, M), jnp.bfloat16)
    head = (jax.random.normal(keys[1], (M, V)) * M**-0.5).astype(jnp.bfloat16)
    targets = jax.random.randint(keys[2], (N,), 0, V)
    arrays = hidden, head, targets, jnp.asarray(case.mask())
    contenders, memory = [], {}
    for name, implementation in CONTENDERS.items():
        run = jax.jit(functools.partial(_loss, implementation, what))
        compiled = run.lower(*arrays).compile()
        memory[name] = compiled.memory_analysis().temp_size_in_bytes
        start = functools.partial(compiled, *arrays)
        contenders.append(gpu.Contender(name, start, results=_results))
    if gpu.has_torch():
        _torch(case, what, arrays, contenders, memory)
    return contenders, memory


def _loss(implementation: str, what: str, hidden, head, targets, mask):
    def total(hidden, head):
        return linear_cross_entropy(hidden, head, targets, mask, implementation)[0]

    head = head.astype(jnp.float32)
    if what == FORWARD:
        return total(hidden, head)
    return jax.value_and_grad(total, argnums=(0, 1))(hidden, head)


def _results(result) -> list:
    """The sum and both gradients, of the head's some columns."""
    return [gpu.sampled(x) for x in jax.tree.leaves(result)]


def _torch(case: LossCase, what: str, arrays, contenders: list, memory: dict) -> None:
    import torch

    on_gpu = not gpu.rehearsing()
    hidden, head, targets, mask = (torch.from_dlpack(x).clone() for x in arrays)
    head = head.T.contiguous()
    hidden.requires_grad_(what == BOTH), head.requires_grad_(what == BOTH)
    targets = torch.where(mask.bool(), targets.long(), -100)

    def loss(hidden, head):
        logits = torch.nn.functional.linear(hidden, head).float()
        return torch.nn.functional.cross_entropy(logits, targets, reduction="sum")

    def results(tensors) -> list:
        total, *gradients = (x.detach() for x in tensors)
        if gradients:
            gradients[1] = gradients[1].T
        return _results([x.float().cpu().numpy() for x in (total, *gradients)])

    for name, compute in (("torch", loss), ("torch compiled", gpu.torch_compile(loss))):

        def start(compute=compute):
            if what == FORWARD:
                with torch.no_grad():
                    return (compute(hidden, head),)
            total = compute(hidden, head)
            return total, *torch.autograd.grad(total, (hidden, head))

        start()
        memory[name] = _peak_beside_results(start) if on_gpu else 0
        contenders.append(gpu.torch_contender(name, start, results))


def _peak_beside_results(start) -> int:
    import torch

    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = start()
    kept = torch.cuda.memory_allocated() - before
    del results
    return torch.cuda.max_memory_allocated() - before - kept
