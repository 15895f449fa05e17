"""Each kernel against XLA, cuDNN through JAX, and torch, on one NVIDIA GPU.

    python -m experiments.benchmarks.kernel_speed                  # everything
    python -m experiments.benchmarks.kernel_speed --only=attention --lengths=8192
    python -m experiments.benchmarks.kernel_speed --compile_only   # no GPU: registers, spills, loops
    python -m experiments.benchmarks.kernel_speed --rehearse       # no GPU: every line at toy sizes

Attention runs at the head shapes of the 8B model, forward and forward with backward, on rows of one
document and of documents of 1.5K tokens on average. Its TFLOP/s count what the mask lets through and
nothing else (4 x head dim x heads a pair forward, 2.5 times that backward). One that ignores documents
computes more than asked for and is marked "causal only". The loss runs with its gradients at the
head of the 8B model; its TFLOP/s count three products over the positions of the mask. "products" are
those of a layer, for the planner (planner_constants.py), "pointwise" is norm, RoPE and SwiGLU.

Implementations run in turn in each round, so a ratio holds where a time may not. Before anything is
timed all that compute the same are compared. Shares are of what this chip was measured to do (a
product of 8192^3, a copy).
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
from experiments.benchmarks.kernels_attention import attention_cases
from experiments.benchmarks.kernels_loss import LOSS_CASES
from experiments.benchmarks.kernels_pointwise import operations
from experiments.benchmarks.kernels_products import PRODUCT_CASES
from llama3_jax import cli
from llama3_jax.errors import UserError

CASES = {
    "attention": lambda: attention_cases(FLAGS.lengths),
    "loss": lambda: LOSS_CASES,
    "products": lambda: PRODUCT_CASES,
    "pointwise": operations,
}
# Of the largest value. Implementations round to bfloat16 (8 bits) at different places.
TOLERANCE = 0.03

FLAGS = flags.FLAGS


def rows_of(
    case: Any,
    what: str,
    taken: dict[str, list[float]],
    ceilings: dict[str, float],
    memory: dict[str, int],
) -> list[dict[str, Any]]:
    """A row for each implementation: its rate, share of the ceiling, and ours over it by round."""
    (ceiling, unit, one), rows = case.unit, []
    for name, times in taken.items():
        median, ratios = float(np.median(times)), np.divide(times, taken["ours"])
        rate = case.work(what) / median / one
        rows.append(dict(
            part=case.part, case=case.name, what=what, implementation=name,
            milliseconds=1e3 * median, work=case.work(what), rate=rate, unit=unit,
            share=rate / ceilings[ceiling], ours_over_it=float(np.median(ratios)),
            quartiles=[float(x) for x in np.percentile(ratios, (25, 75))],
            temporary_bytes=memory.get(name),
        ))  # fmt: skip
    return rows


def same_case(row: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(row[key] == other[key] for key in ("part", "case", "what"))


def table_of(rows: list[dict[str, Any]]) -> Table:
    table = Table(title=f"{rows[0]['case']}, {rows[0]['what']}")
    table.add_column("implementation")
    for column in ("ms", rows[0]["unit"], "of the ceiling", "speed, ours over it", "memory, MB"):
        table.add_column(column, justify="right")
    for row in rows:
        low, high = row["quartiles"]
        memory = row["temporary_bytes"]
        table.add_row(
            row["implementation"], f"{row['milliseconds']:.3f}", f"{row['rate']:,.0f}",
            f"{row['share']:.0%}", f"{row['ours_over_it']:.2f} ({low:.2f}..{high:.2f})",
            "" if memory is None else f"{memory / 1e6:,.0f}",
        )  # fmt: skip
    return table


def resources_table(kernels: list[str] | None) -> tuple[Table, bool]:
    """Every row of the tuning table compiled for sm_90, and whether all fit the chip.

    "loops" are the machine instructions of each loop over products: where the mask cuts nothing,
    and where it does.
    """
    from llama3_jax.kernels.gpu import tuning
    from llama3_jax.kernels.gpu.catalogue import entries
    from llama3_jax.kernels.gpu.compile import SHARED_BYTES, compile_for_hopper

    measured = tuning.table()["measured"]
    state = f"sizes measured on {measured}" if measured else "sizes not yet measured"
    table = Table(title=f"Compiled for sm_90 ({state}); a block may have {SHARED_BYTES:,} B shared")
    for column in ("kernel", "row"):
        table.add_column(column)
    columns = "M x N", "warps", "stages", "registers", "spilled B", "shared B", "loops", "fits"
    for column in columns:
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
                str(taken.spilled_bytes), f"{taken.shared_bytes:,}",
                " + ".join(map(str, taken.loops)), "yes" if taken.fits else "NO",
            )  # fmt: skip
    return table, all_fit


def define_flags() -> None:
    flags.DEFINE_bool("compile_only", False, "Compile for sm_90 and print what each kernel takes.")
    flags.DEFINE_multi_enum("only", list(CASES), list(CASES), "What to time.")
    flags.DEFINE_multi_string("kernel", None, "With --compile_only: these kernels alone.")
    flags.DEFINE_multi_integer("lengths", None, "Tokens of a row, of attention.", lower_bound=128)
    flags.DEFINE_integer("rounds", 7, "Measured rounds.", lower_bound=2)
    gpu.define_flags()


def main(_) -> int:
    console = Console(width=130)
    if FLAGS.compile_only:
        table, all_fit = resources_table(FLAGS.kernel)
        console.print(table)
        return 0 if all_fit else 1
    with gpu.machine("--compile_only"):
        measure_all(console)
    return 0


def measure_all(console: Console) -> None:
    gpu.say_without_torch()
    # A day's calls, each of some parts or lengths, fill one file.
    found = gpu.saved("kernels") or dict(rounds=FLAGS.rounds, results=[], failures=[])
    found["ceilings"] = found.get("ceilings") or gpu.ceilings()
    product, copy = found["ceilings"]["tflops"], found["ceilings"]["gb_per_s"]
    chip = jax.devices()[0].device_kind
    console.print(f"{chip}: {product:.0f} TFLOP/s in a product, {copy:.0f} GB/s in a copy")
    wrong, written = [], "nowhere"
    for case, what in ((x, what) for part in FLAGS.only for x in CASES[part]() for what in x.whats):
        try:
            written = measure(case, what, found, console)
        except (UserError, RuntimeError) as error:  # of JAX and torch, such as no memory
            # The other cases are measured all the same.
            wrong.append(f"{case.name}, {what}: {str(error)[:300]}")
            console.print(wrong[-1])
        gpu.release_torch_memory()
    print(f"written: {written}")
    if wrong:
        raise UserError("; ".join(wrong))


def measure(case: Any, what: str, found: dict[str, Any], console: Console) -> str:
    """Measures one case into `found`, and says where that is written.

    Raises:
      UserError: no other implementation agrees with ours.
    """
    shown = case.toy() if gpu.rehearsing() else case
    able, failed = gpu.running(shown.implementations(what))
    # The products are XLA's alone.
    able, differing = gpu.agreeing(able, TOLERANCE, least=0 if case.part == "products" else 2)
    failures = [
        dict(part=case.part, case=shown.name, what=what, implementation=name, why=why)
        for name, why in (failed | differing).items()
    ]
    for row in failures:
        console.print(f"{row['case']}, {what}: no figure of {row['implementation']}: {row['why']}")
    on_gpu = case.work(what) / gpu.RATES[case.unit]
    taken = gpu.seconds(able, FLAGS.rounds, on_gpu=on_gpu)
    memory = {x.name: x.memory() for x in able if x.memory}
    rows = rows_of(shown, what, taken, found["ceilings"], memory)
    console.print(table_of(rows))
    for name, new in (("results", rows), ("failures", failures)):
        found[name] = [row for row in found[name] if not same_case(row, rows[0])] + new
    # After each case, so that a failure loses nothing.
    return gpu.save("kernels", found)


if __name__ == "__main__":
    define_flags()
    cli.run(main)
