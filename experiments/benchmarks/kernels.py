"""Each kernel against XLA, cuDNN through JAX, and torch, on one NVIDIA GPU.

    python -m experiments.benchmarks.kernels                  # everything
    python -m experiments.benchmarks.kernels --only=attention --lengths=8192
    python -m experiments.benchmarks.kernels --compile_only   # no GPU: registers, spills, shared memory
    python -m experiments.benchmarks.kernels --rehearse       # no GPU: every line at toy sizes

Attention runs at the head shapes of the 8B model, forward and forward with backward, on rows of one
document and of documents of 1.5K tokens on average. Its TFLOP/s count what the mask lets through and
nothing else (4 x head dim x heads a pair forward, 2.5 times that backward). A contender that ignores
documents computes more than asked for and is marked "causal only"; one that packs documents as rows
of the longest one's length is marked "lengths". The loss runs at the head of the 8B model; its
TFLOP/s count three products over the positions of the mask.

Contenders run in turn in each round, so a ratio holds where a time may not. Before anything is timed
all that compute the same are compared. Shares are of what this chip was measured to do (a product of
8192^3, a copy). "products" are those of a layer, for the planner (planner_constants.py).
"""

import os

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch shares the device

from typing import Any

import jax
import numpy as np
from absl import flags
from rich.console import Console
from rich.table import Table

from experiments.benchmarks import gpu
from experiments.benchmarks.gpu import BOTH, FORWARD
from experiments.benchmarks.kernels_attention import attention_cases, attention_contenders
from experiments.benchmarks.kernels_loss import LOSS_CASES, loss_contenders
from experiments.benchmarks.kernels_products import product_cases, product_contenders
from llama3_jax import cli

PARTS = ("attention", "loss", "products")
# Of the largest value. Contenders round to bfloat16 (8 bits) at different places.
TOLERANCE = 0.03

FLAGS = flags.FLAGS


def rows_of(
    part: str,
    case: Any,
    what: str,
    taken: dict[str, list[float]],
    ceiling: dict[str, float],
    memory=None,
) -> list[dict[str, Any]]:
    """A row for each contender: TFLOP/s, share of the ceiling, and ours over it by round."""
    rows = []
    for name, times in taken.items():
        tflops = case.flops(what) / float(np.median(times)) / 1e12
        ratios = np.divide(times, taken["ours"])
        rows.append(
            dict(
                part=part, case=case.name, what=what, contender=name, milliseconds=1e3 * float(np.median(times)),
                flops=case.flops(what), tflops=tflops, share_of_product=tflops / ceiling["tflops"],
                ours_over_it=float(np.median(ratios)),
                quartiles=[float(x) for x in np.percentile(ratios, (25, 75))],
                temporary_bytes=None if memory is None else int(memory[name]),
            )
        )  # fmt: skip
    return rows


def same_case(row: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(row[key] == other[key] for key in ("part", "case", "what"))


def table_of(rows: list[dict[str, Any]]) -> Table:
    table = Table(title=f"{rows[0]['case']}, {rows[0]['what']}")
    table.add_column("contender")
    for column in ("ms", "TFLOP/s", "of a product", "speed, ours over it", "memory, MB"):
        table.add_column(column, justify="right")
    for row in rows:
        low, high = row["quartiles"]
        memory = row["temporary_bytes"]
        table.add_row(
            row["contender"], f"{row['milliseconds']:.3f}", f"{row['tflops']:.0f}",
            f"{row['share_of_product']:.0%}", f"{row['ours_over_it']:.2f} ({low:.2f}..{high:.2f})",
            "" if memory is None else f"{memory / 1e6:,.0f}",
        )  # fmt: skip
    return table


def resources_table(kernels: list[str] | None) -> tuple[Table, bool]:
    """Every row of the tuning table compiled for sm_90, and whether all fit the chip."""
    from llama3_jax.kernels.gpu import tuning
    from llama3_jax.kernels.gpu.catalogue import entries
    from llama3_jax.kernels.gpu.compile import SHARED_BYTES, compile_for_hopper

    measured = tuning.table()["measured"]
    state = f"sizes measured on {measured}" if measured else "sizes not yet measured"
    table = Table(title=f"Compiled for sm_90 ({state}); a block may have {SHARED_BYTES:,} B shared")
    for column in ("kernel", "row"):
        table.add_column(column)
    for column in ("M x N", "warps", "stages", "registers", "spilled B", "shared B", "fits"):
        table.add_column(column, justify="right", no_wrap=True)
    all_fit = True
    for entry in entries():
        if kernels and entry.kernel not in kernels:
            continue
        for launch in entry.launches:
            taken = compile_for_hopper(launch)
            all_fit &= taken.fits
            name = launch.kernel.__name__.strip("_").removesuffix("_kernel")
            size = f"{entry.blocks.M} x {entry.blocks.N}" if entry.blocks else "-"
            table.add_row(
                f"{entry.kernel}: {name}", entry.row, size,
                str(launch.num_warps), str(launch.num_stages), str(taken.registers),
                str(taken.spilled_bytes), f"{taken.shared_bytes:,}", "yes" if taken.fits else "NO",
            )  # fmt: skip
    return table, all_fit


def define_flags() -> None:
    flags.DEFINE_bool("compile_only", False, "Compile for sm_90 and print what each kernel takes.")
    flags.DEFINE_multi_enum("only", list(PARTS), list(PARTS), "What to time.")
    flags.DEFINE_multi_string("kernel", None, "With --compile_only: these kernels alone.")
    flags.DEFINE_multi_integer("lengths", None, "Tokens of a row, of attention.", lower_bound=128)
    flags.DEFINE_integer("rounds", 7, "Measured rounds.", lower_bound=2)
    gpu.define_flags()


def main(_) -> int:
    console = Console(width=120)
    if FLAGS.compile_only:
        table, all_fit = resources_table(FLAGS.kernel)
        console.print(table)
        return 0 if all_fit else 1
    with gpu.machine("--compile_only"):
        measure_all(console)
    return 0


def measure_all(console: Console) -> None:
    ceiling = gpu.ceilings()
    console.print(
        f"{jax.devices()[0].device_kind}: {ceiling['tflops']:.0f} TFLOP/s in a product, "
        f"{ceiling['gb_per_s']:.0f} GB/s in a copy"
    )
    gpu.say_without_torch()
    # A day's calls, each of some parts or lengths, fill one file.
    before = gpu.saved("kernels")
    results: list[dict[str, Any]] = before.get("results", [])
    failures: list[dict[str, Any]] = before.get("failures", [])

    def measure(part, case, what, contenders, memory=None):
        contenders, failed = gpu.running(contenders)
        for name, why in failed.items():
            console.print(f"{case.name}, {what}: no figure of {name}, which failed: {why}")
            failures.append(dict(part=part, case=case.name, what=what, contender=name, why=why))
        # The products have no rival: they are XLA's in every contender.
        gpu.compare(contenders, TOLERANCE, least=0 if part == "products" else 2)
        taken = gpu.seconds(contenders, FLAGS.rounds)
        rows = rows_of(part, case, what, taken, ceiling, memory)
        console.print(table_of(rows))
        results[:] = [row for row in results if not same_case(row, rows[0])] + rows
        # After each case, so that a failure loses nothing.
        return gpu.save("kernels", dict(
            ceilings=ceiling, rounds=FLAGS.rounds, results=results, failures=failures
        ))  # fmt: skip

    written = ""
    for part in FLAGS.only:
        for what in (FORWARD, BOTH):
            if part == "attention":
                for case in attention_cases(FLAGS.lengths):
                    written = measure(part, case, what, attention_contenders(case, what))
            if part == "loss":
                for case in LOSS_CASES:
                    written = measure(part, case, what, *loss_contenders(case, what))
            if part == "products":
                for case in product_cases():
                    written = measure(part, case, what, product_contenders(case, what))
    print(f"written: {written}")


if __name__ == "__main__":
    define_flags()
    cli.run(main)
