"""Times a shortlist of block sizes, warps and stages, and writes the fastest into the repository.

    python -m experiments.benchmarks.tune_kernels                    # on the GPU to tune for
    python -m experiments.benchmarks.tune_kernels --kernel=flash_keys --dry_run
    python -m experiments.benchmarks.tune_kernels --rehearse --dry_run   # no GPU: every line, toy sizes

The shortlist is what compiles for sm_90 without spilling and prefetches at least one tile (three
stages or more), at head dim 128 and in bfloat16: the other rows of the table are there for small
models and for checks. Sizes are compared and timed in turn, at the shapes of the 8B model and
(attention) on a row of documents of 1.5K tokens on average.
The table is `llama3_jax/kernels/gpu/tuning.json`; commit it.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from rich.console import Console
from rich.table import Table

from experiments.benchmarks import gpu
from experiments.benchmarks.kernels_attention import MEAN_DOCUMENT
from llama3_jax import cli
from llama3_jax.errors import UserError
from llama3_jax.files import write_text
from llama3_jax.kernels.attention import make_spans
from llama3_jax.kernels.gpu import tuning
from llama3_jax.kernels.gpu.catalogue import MODEL, PROBLEMS, Sizes
from llama3_jax.kernels.gpu.tuning import Blocks

TOLERANCE = 0.03  # of the largest value, in bfloat16
# Kernel: its row of the table, and what is timed beside the row's present sizes.
SHORTLIST = {
    "flash_forward": ("128 bfloat16", [Blocks(64, 64, 4, 3), Blocks(128, 64, 8, 3)]),
    "flash_keys": ("128 bfloat16", [Blocks(32, 64, 4, 3), Blocks(32, 128, 8, 3)]),
    "flash_queries": ("128 bfloat16", [Blocks(128, 64, 8, 4), Blocks(64, 64, 4, 3)]),
    "cross_entropy": ("bfloat16", [Blocks(128, 256, 8, 4), Blocks(256, 128, 8, 3)]),
}

FLAGS = flags.FLAGS


def sizes() -> Sizes:
    return Sizes(100, 32, 300, 2, 1) if gpu.rehearsing() else MODEL


def candidates(kernel: str) -> list[Blocks]:
    """The sizes of the table's row first."""
    row, others = SHORTLIST[kernel]
    return list(dict.fromkeys([tuning.blocks_for(kernel, row), *others]))


def arguments(kernel: str, shapes: tuple[jax.ShapeDtypeStruct, ...]) -> list[jax.Array]:
    """Random arrays of the problem's shapes, with spans and targets that mean something."""
    random = np.random.default_rng(0)
    arrays = [
        jax.random.normal(jax.random.key(i), x.shape, x.dtype)
        for i, x in enumerate(shapes)
        if jnp.issubdtype(x.dtype, jnp.floating)
    ]
    if kernel == "cross_entropy":
        tokens = len(arrays[0])
        targets = random.integers(0, arrays[1].shape[1], tokens)
        return [*arrays, jnp.asarray(targets, jnp.int32), jnp.ones(tokens, bool)]
    lengths = gpu.document_lengths(arrays[0].shape[1], MEAN_DOCUMENT, random)
    places = gpu.places_of(lengths)
    return [*arrays, *make_spans(places, places)]


def with_blocks(kernel: str, blocks: Blocks) -> gpu.Implementation:
    problem = PROBLEMS[kernel](SHORTLIST[kernel][0], blocks, sizes())
    run, arrays = jax.jit(problem.function), arguments(kernel, problem.shapes)

    def results(result) -> list:
        return [gpu.sampled(x) for x in jax.tree.leaves(result)]

    return gpu.Implementation(str(tuple(blocks)), lambda: run(*arrays), results=results)


def tune(kernel: str, rounds: int) -> dict[str, float]:
    """Seconds of the whole operation with each candidate's sizes, the present ones' first."""
    able, failed = gpu.running([with_blocks(kernel, blocks) for blocks in candidates(kernel)])
    # The fastest may be one that a compiler got wrong.
    able, differing = gpu.agreeing(able, TOLERANCE, least=1)
    for name, why in (failed | differing).items():
        print(f"{kernel}: {name} left out: {why}", flush=True)
    taken = gpu.seconds(able, rounds, 0.02)
    medians = {name: float(np.median(times)) for name, times in taken.items()}
    table = Table(title=f"{kernel}, {SHORTLIST[kernel][0]}: the whole operation")
    for column in ("M, N, warps, stages", "ms", "of the present one's time"):
        table.add_column(column, justify="right")
    present = next(iter(medians.values()))
    for name, time in sorted(medians.items(), key=lambda item: item[1]):
        table.add_row(name, f"{1e3 * time:.3f}", f"{time / present:.2f}")
    Console().print(table)
    return medians


def as_text(table: dict) -> str:
    """JSON with a line for each row of sizes."""
    kernels = []
    for kernel, rows in table["kernels"].items():
        lines = [f"   {json.dumps(row)}: {json.dumps(sizes)}" for row, sizes in rows.items()]
        kernels.append(f"  {json.dumps(kernel)}: {{\n" + ",\n".join(lines) + "\n  }")
    measured = json.dumps(table["measured"])
    body = ",\n".join(kernels)
    return f'{{\n "measured": {measured},\n "kernels": {{\n{body}\n }}\n}}\n'


def define_flags() -> None:
    flags.DEFINE_multi_enum("kernel", list(SHORTLIST), list(SHORTLIST), "Kernels to tune.")
    flags.DEFINE_bool("dry_run", False, "Print, and leave the table as it is.")
    flags.DEFINE_integer("rounds", 5, "Measured rounds.", lower_bound=2)
    gpu.define_flags()


def main(_) -> None:
    if FLAGS.rehearse and not FLAGS.dry_run:
        raise UserError("--rehearse times nothing real: give --dry_run, which keeps the table")
    with gpu.machine("kernel_speed.py --compile_only"):
        tune_all()


def tune_all() -> None:
    table, results = json.loads(json.dumps(tuning.table())), gpu.saved("tune").get("results", {})
    for kernel in FLAGS.kernel:
        results[kernel] = medians = tune(kernel, FLAGS.rounds)
        fastest = min(medians, key=medians.__getitem__)
        blocks = next(x for x in candidates(kernel) if str(tuple(x)) == fastest)
        table["kernels"][kernel][SHORTLIST[kernel][0]] = blocks._asdict()
        # What is measured stays, if a later kernel fails; "measured" waits for all of them.
        written = gpu.save("tune", dict(results=results, table=table["kernels"]))
        if set(results) == set(SHORTLIST):
            table["measured"] = gpu.about()
        if not FLAGS.dry_run:
            write_text(tuning.TABLE, as_text(table))
    print(f"written: {written}" + ("" if FLAGS.dry_run else f", {tuning.TABLE}"))


if __name__ == "__main__":
    define_flags()
    cli.run(main)
