"""Memory of the head's product with its loss, compiled for an H100 that is not there.

    python -m experiments.benchmarks.loss_memory                 # no GPU: the extra `plan`
    python -m experiments.benchmarks.loss_memory --tokens=16384

Bytes are XLA's own account of a forward and backward pass beside inputs and results, at the head of
the 8B model. "bfloat16" is the head as a step holds it after its gather (parallel/fsdp.py), with a
gradient in float32; of a "float32" one every implementation makes a bfloat16 copy, 1.05 GB.
"""

import llama3_jax.planning.environment  # isort: skip  # noqa: F401

import jax
import jax.numpy as jnp
from absl import flags
from jax.sharding import SingleDeviceSharding
from rich.console import Console
from rich.table import Table

from llama3_jax import cli
from llama3_jax.kernels.cross_entropy import linear_cross_entropy
from llama3_jax.planning.compiler import h100s

DIM, VOCABULARY = 4096, 128_256
# The definition first: the others are shares of it.
IMPLEMENTATIONS = {"XLA": "reference", "chunked": "chunked", "ours": "triton"}

FLAGS = flags.FLAGS


def temporary_bytes(implementation: str, head_dtype: str, tokens: int) -> int:
    """What XLA allocates beside inputs and results for the loss and its two gradients."""

    def both(hidden, head, targets, mask):
        def total(hidden, head):
            return linear_cross_entropy(hidden, head, targets, mask, implementation)[0]

        return jax.value_and_grad(total, argnums=(0, 1))(hidden, head.astype(jnp.float32))

    chip = SingleDeviceSharding(h100s(1)[0])
    shapes = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=chip)
        for shape, dtype in [
            ((tokens, DIM), "bfloat16"), ((DIM, VOCABULARY), head_dtype),
            ((tokens,), "int32"), ((tokens,), "bool"),
        ]
    ]  # fmt: skip
    return jax.jit(both).lower(*shapes).compile().memory_analysis().temp_size_in_bytes


def main(_) -> None:
    table = Table(title=f"{FLAGS.tokens:,} tokens x {VOCABULARY:,}, forward + backward, H100")
    for column in ("head", "implementation"):
        table.add_column(column)
    for column in ("temporary MB", "of XLA's"):
        table.add_column(column, justify="right")
    for dtype in ("bfloat16", "float32"):
        taken = {
            name: temporary_bytes(how, dtype, FLAGS.tokens) for name, how in IMPLEMENTATIONS.items()
        }
        for name, size in taken.items():
            table.add_row(dtype, name, f"{size / 1e6:,.0f}", f"{size / taken['XLA']:.3f}")
    Console(width=100).print(table)


if __name__ == "__main__":
    flags.DEFINE_integer("tokens", 8192, "Tokens of a micro-batch.", lower_bound=128)
    cli.run(main)
