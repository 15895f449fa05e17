"""RMSNorm with its residual sum, RoPE and SwiGLU in Triton against XLA's fusions, on an NVIDIA GPU.

    python -m experiments.benchmarks.pointwise
    python -m experiments.benchmarks.pointwise --rehearse     # no GPU: every line at toy sizes

At the widths of the 8B model on 16,384 tokens in bfloat16, forward and forward with backward. These
operations are bound by memory: GB/s count each input and each result once, and the share is of what
this chip was measured to copy. Contenders run in turn in each round; their results are compared
before anything is timed. An operation on its own is kinder to a kernel than a step is, where XLA may
fuse it with its neighbours: the step's benchmark (step_h100.py) has the last word.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from rich.console import Console
from rich.table import Table

from experiments.benchmarks import gpu
from experiments.benchmarks.gpu import BOTH, FORWARD
from llama3_jax import cli
from llama3_jax.kernels import pointwise

BATCH, LENGTH, DIM, HEADS, KV_HEADS, HEAD_DIM, FFN = 2, 8192, 4096, 32, 8, 128, 14_336
TOLERANCE = 0.02  # of the largest value; bfloat16 has 8 bits

FLAGS = flags.FLAGS


class Operation(NamedTuple):
    """`compute(implementation, *inputs)`; gradients are taken of the first `differentiated`."""

    name: str
    compute: Callable[..., Any]
    inputs: tuple[jax.ShapeDtypeStruct, ...]
    differentiated: int

    def arrays(self) -> tuple[jax.Array, ...]:
        keys = jax.random.split(jax.random.key(0), len(self.inputs))
        return tuple(
            jax.random.normal(key, x.shape, x.dtype)
            for key, x in zip(keys, self.inputs, strict=True)
        )

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

    def bytes(self, what: str) -> int:
        """Of the inputs and results, each once; the backward pass reads the inputs again."""
        results = jax.eval_shape(self.function("reference", what), *self.inputs)
        read = self.inputs * (2 if what == BOTH else 1)
        moved = [*read, *jax.tree.leaves(results)]
        if what == BOTH:  # it reads the cotangents, which are the forward pass's results
            moved += jax.tree.leaves(
                jax.eval_shape(self.function("reference", FORWARD), *self.inputs)
            )
        return sum(x.size * x.dtype.itemsize for x in moved)


def tokens() -> tuple[int, int]:
    """Rows and their length."""
    return (1, 4) if gpu.rehearsing() else (BATCH, LENGTH)


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


def measure(operation: Operation, what: str, rounds: int, ceiling: float) -> list[dict[str, Any]]:
    """A row for each contender: GB/s, share of a copy, XLA's time over ours by round.

    Raises:
      UserError: the kernel's results differ from the definition's by more than rounding.
    """
    inputs = operation.arrays()
    contenders = []
    for name, how in (("ours", "triton"), ("XLA", "reference")):
        compiled = jax.jit(operation.function(how, what))
        contenders.append(gpu.Contender(name, lambda run=compiled: run(*inputs)))
    gpu.compare(contenders, TOLERANCE)
    taken, rows = gpu.seconds(contenders, rounds), []
    for name, times in taken.items():
        ratios = np.divide(times, taken["ours"])
        rate = operation.bytes(what) / float(np.median(times)) / 1e9
        rows.append(dict(
            operation=operation.name, what=what, contender=name,
            milliseconds=1e3 * float(np.median(times)), gb_per_s=rate, share_of_copy=rate / ceiling,
            ours_over_it=float(np.median(ratios)),
            quartiles=[float(x) for x in np.percentile(ratios, (25, 75))],
        ))  # fmt: skip
    return rows


def table_of(rows: list[dict[str, Any]]) -> Table:
    table = Table(title="{} x {:,} tokens, bfloat16".format(*tokens()))
    for column in ("operation", "", "contender"):
        table.add_column(column)
    for column in ("ms", "GB/s", "of a copy", "speed, ours over it"):
        table.add_column(column, justify="right")
    for row in rows:
        low, high = row["quartiles"]
        table.add_row(
            row["operation"], row["what"], row["contender"], f"{row['milliseconds']:.3f}",
            f"{row['gb_per_s']:,.0f}", f"{row['share_of_copy']:.0%}",
            f"{row['ours_over_it']:.2f} ({low:.2f}..{high:.2f})",
        )  # fmt: skip
    return table


def main(_) -> int:
    with gpu.machine("kernels.py --compile_only, which prints the kernels' registers and spills"):
        ceiling, rows, written = gpu.ceilings(), [], ""
        for operation in operations(*tokens()):
            for what in (FORWARD, BOTH):
                rows += measure(operation, what, FLAGS.rounds, ceiling["gb_per_s"])
                results = dict(ceilings=ceiling, rounds=FLAGS.rounds, results=rows)
                # After each case, so that a failure loses nothing.
                written = gpu.save("pointwise", results)
        Console(width=120).print(table_of(rows))
        print(f"written: {written}")
    return 0


if __name__ == "__main__":
    flags.DEFINE_integer("rounds", 7, "Measured rounds.", lower_bound=2)
    gpu.define_flags()
    cli.run(main)
