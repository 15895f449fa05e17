"""RMSNorm with its residual sum, RoPE and SwiGLU in Triton and by XLA's fusions (see kernel_speed.py).

At the widths of the 8B model on 16,384 tokens in bfloat16. These operations are bound by memory: GB/s
count each input and each result once. An operation on its own is kinder to a kernel than a step is,
where XLA may fuse it with its neighbours: the step's benchmark (step_h100.py) has the last word.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from experiments.benchmarks import gpu
from experiments.benchmarks.gpu import BOTH, FORWARD
from llama3_jax.kernels import pointwise

BATCH, LENGTH, DIM, HEADS, KV_HEADS, HEAD_DIM, FFN = 2, 8192, 4096, 32, 8, 128, 14_336


class Operation(NamedTuple):
    """`compute(implementation, *inputs)`; gradients are taken of the first `differentiated`."""

    operation: str
    compute: Callable[..., Any]
    inputs: tuple[jax.ShapeDtypeStruct, ...]
    differentiated: int

    part, whats, unit = "pointwise", (FORWARD, BOTH), gpu.BYTES

    @property
    def name(self) -> str:
        return f"{self.operation}, {math.prod(self.inputs[0].shape[:2]):,} tokens"

    def toy(self) -> "Operation":
        return next(x for x in operations(1, 4) if x.operation == self.operation)

    def arrays(self) -> tuple[jax.Array, ...]:
        keys = jax.random.split(jax.random.key(0), len(self.inputs))
        return tuple(
            jax.random.normal(key, x.shape, x.dtype)
            for key, x in zip(keys, self.inputs, strict=True)
        )

    def implementations(self, what: str) -> list[gpu.Implementation]:
        inputs = self.arrays()
        return [
            gpu.Implementation(name, functools.partial(jax.jit(self.function(how, what)), *inputs))
            for name, how in (("ours", "triton"), ("XLA", "reference"))
        ]

    def function(self, implementation: str, what: str) -> Callable[..., Any]:
        """All results of the operation, with the gradients where `what` is both ways."""

        def run(*inputs):
            wanted, rest = inputs[: self.differentiated], inputs[self.differentiated :]
            if what == FORWARD:
                return self.compute(implementation, *inputs)
            out, pullback = jax.vjp(lambda *w: self.compute(implementation, *w, *rest), *wanted)
            # Cotangents that are neither constant nor another array to read.
            return out, pullback(out)

        return run

    def work(self, what: str) -> float:
        """Of the inputs and results, each once; the backward pass reads the inputs again."""
        results = jax.eval_shape(self.function("reference", what), *self.inputs)
        read = self.inputs * (2 if what == BOTH else 1)
        moved = [*read, *jax.tree.leaves(results)]
        if what == BOTH:  # it reads the cotangents, which are the forward pass's results
            moved += jax.tree.leaves(
                jax.eval_shape(self.function("reference", FORWARD), *self.inputs)
            )
        return sum(x.size * x.dtype.itemsize for x in moved)


def operations(batch: int = BATCH, length: int = LENGTH) -> list[Operation]:
    def struct(*shape: int, dtype=jnp.bfloat16) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    x, ffn = struct(batch, length, DIM), struct(batch, length, FFN)
    table = struct(batch, length, HEAD_DIM // 2, dtype=jnp.float32)
    scale = struct(DIM, dtype=jnp.float32)
    q, k = struct(batch, length, HEADS, HEAD_DIM), struct(batch, length, KV_HEADS, HEAD_DIM)
    return [
        Operation(
            "RMSNorm", lambda how, x, scale: pointwise.add_norm(x, None, scale, 1e-5, how)[1],
            (x, scale), 2,
        ),
        Operation(
            "residual + RMSNorm",
            lambda how, x, update, scale: pointwise.add_norm(x, update, scale, 1e-5, how),
            (x, x, scale), 3,
        ),
        Operation(
            "RoPE", lambda how, q, k, cos, sin: pointwise.rotate(q, k, (cos, sin), how),
            (q, k, table, table), 2,
        ),
        Operation("SwiGLU", lambda how, g, u: pointwise.swiglu(g, u, how), (ffn, ffn), 2),
    ]  # fmt: skip
