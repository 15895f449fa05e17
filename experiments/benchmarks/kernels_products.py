"""The products of the 8B model's layer, which the planner's "gemm_efficiency" is about (see
kernel_speed.py).

All of them are XLA's library calls, here and in a step: each weight's product forward, and the two
of its gradient, as `kernels/linear.py` makes them.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from experiments.benchmarks import gpu
from experiments.benchmarks.gpu import BOTH
from llama3_jax.kernels.linear import linear


class ProductCase(NamedTuple):
    """[tokens, inputs] x [inputs, outputs], of a layer's `place`."""

    place: str
    tokens: int
    inputs: int
    outputs: int

    part, whats, unit = "products", (BOTH,), gpu.FLOPS

    @property
    def name(self) -> str:
        return f"{self.place}: {self.tokens:,} x {self.inputs:,} x {self.outputs:,}"

    def work(self, what: str) -> float:
        return 2.0 * self.tokens * self.inputs * self.outputs * (3 if what == BOTH else 1)

    def toy(self) -> "ProductCase":
        return ProductCase(self.place, 32, 16, 24)

    def implementations(self, what: str) -> list[gpu.Implementation]:
        """XLA's alone, with its gradients; "ours" is what a step of ours calls."""
        keys = jax.random.split(jax.random.key(0), 3)
        shapes = (
            (self.tokens, self.inputs), (self.inputs, self.outputs), (self.tokens, self.outputs)
        )  # fmt: skip
        x, w, g = (
            jax.random.normal(key, shape, jnp.bfloat16)
            for key, shape in zip(keys, shapes, strict=True)
        )

        def run(x, w, g):
            out, pullback = jax.vjp(linear, x, w.astype(jnp.float32))
            return out, pullback(g)

        return [gpu.Implementation("ours", functools.partial(jax.jit(run), x, w, g), results=None)]


PRODUCT_CASES = (
    ProductCase("query", 8192, 4096, 4096),
    ProductCase("key or value", 8192, 4096, 1024),
    ProductCase("attention's output", 8192, 4096, 4096),
    ProductCase("gate or up", 8192, 4096, 14_336),
    ProductCase("down", 8192, 14_336, 4096),
)
