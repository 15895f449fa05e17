"""The products of the 8B model's layer, which the planner's "gemm_efficiency" is about (see kernels.py).

All of them are XLA's library calls, here and in a step: each weight's product forward, and the two
of its gradient, as `kernels/linear.py` makes them.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from experiments.benchmarks import gpu
from experiments.benchmarks.gpu import BOTH, FORWARD
from llama3_jax.kernels.linear import linear


class ProductCase(NamedTuple):
    """[tokens, inputs] x [inputs, outputs]."""

    part: str
    tokens: int
    inputs: int
    outputs: int

    @property
    def name(self) -> str:
        return f"{self.part}: {self.tokens:,} x {self.inputs:,} x {self.outputs:,}"

    def flops(self, what: str) -> float:
        return 2.0 * self.tokens * self.inputs * self.outputs * (3 if what == BOTH else 1)


def product_cases() -> list[ProductCase]:
    if gpu.rehearsing():
        return [ProductCase("toy", 32, 16, 24)]
    return [
        ProductCase("query", 8192, 4096, 4096),
        ProductCase("key or value", 8192, 4096, 1024),
        ProductCase("attention's output", 8192, 4096, 4096),
        ProductCase("gate or up", 8192, 4096, 14_336),
        ProductCase("down", 8192, 14_336, 4096),
    ]


def product_contenders(case: ProductCase, what: str) -> list[gpu.Contender]:
    """XLA's alone; "ours" is what a step of ours calls."""
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (case.tokens, case.inputs), jnp.bfloat16)
    w = jax.random.normal(keys[1], (case.inputs, case.outputs), jnp.bfloat16)
    g = jax.random.normal(keys[2], (case.tokens, case.outputs), jnp.bfloat16)

    def run(x, w, g):
        if what == FORWARD:
            return linear(x, w)
        out, pullback = jax.vjp(linear, x, w.astype(jnp.float32))
        return out, pullback(g)

    return [gpu.Contender("ours", functools.partial(jax.jit(run), x, w, g), results=None)]
