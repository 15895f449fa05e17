"""Times block sizes, warps and stages of every kernel, and writes the fastest into the repository.

    python -m experiments.benchmarks.tune_kernels                    # on the GPU to tune for
    python -m experiments.benchmarks.tune_kernels --kernel=flash_keys --dry_run
    python -m experiments.benchmarks.tune_kernels --compile_only     # no GPU: which sizes fit

Each candidate first compiles for sm_90; one that spills or takes too much shared memory is not run.
The others are timed in turn, at the shapes of the 8B model and (attention) on a row of documents of
1.5K tokens on average. Rows of bfloat16 are tuned; those of float32 are there for checks alone.
The table is `llama3_jax/kernels/gpu/tuning.json`; commit it.
"""

import itertools
import json
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from rich.console import Console
from rich.table import Table

from experiments.benchmarks import gpu
from llama3_jax import cli
from llama3_jax.errors import UserError
from llama3_jax.files import write_text
from llama3_jax.kernels.attention import Places, make_spans
from llama3_jax.kernels.gpu import tuning
from llama3_jax.kernels.gpu.catalogue import PROBLEMS, TOKENS, VOCABULARY, entry
from llama3_jax.kernels.gpu.compile import compile_for_hopper
from llama3_jax.kernels.gpu.tuning import Blocks

MEAN_DOCUMENT = 1536
# M, N, warps, stages
CANDIDATES = {
    "flash_forward": ((64, 128), (32, 64, 128), (4, 8), (2, 3, 4)),
    "flash_keys": ((32, 64, 128), (64, 128), (4, 8), (1, 2, 3)),
    "flash_queries": ((64, 128), (32, 64, 128), (4, 8), (2, 3, 4)),
    "cross_entropy": ((64, 128, 256), (128, 256), (4, 8), (3, 4, 5)),
}

FLAGS = flags.FLAGS


def candidates(kernel: str, row: str) -> Iterator[Blocks]:
    """The sizes of the table's row, then the others; only those that fit the chip."""
    present = Blocks(**tuning.table()["kernels"][kernel][row])
    grid = (Blocks(*sizes) for sizes in itertools.product(*CANDIDATES[kernel]))
    for blocks in dict.fromkeys([present, *grid]):
        try:
            resources = [compile_for_hopper(x) for x in entry(kernel, row, blocks).launches]
        except Exception as error:  # the compiler's own limits are its exceptions
            Console().print(f"{kernel} {row} {blocks}: {type(error).__name__}", highlight=False)
            continue
        if all(x.fits for x in resources):
            yield blocks


def arguments(kernel: str, shapes: tuple[jax.ShapeDtypeStruct, ...]) -> list[jax.Array]:
    """Random arrays of the problem's shapes, with spans and targets that mean something."""
    random = np.random.default_rng(0)
    arrays = [
        jax.random.normal(jax.random.key(i), x.shape, x.dtype)
        for i, x in enumerate(shapes)
        if jnp.issubdtype(x.dtype, jnp.floating)
    ]
    if kernel == "cross_entropy":
        targets = random.integers(0, VOCABULARY, TOKENS)
        return [*arrays, jnp.asarray(targets, jnp.int32), jnp.ones(TOKENS, bool)]
    lengths = gpu.document_lengths(TOKENS, MEAN_DOCUMENT, random)
    segments = jnp.asarray(np.repeat(np.arange(len(lengths)) + 1, lengths)[None], jnp.int32)
    places = Places(jnp.concatenate([jnp.arange(n) for n in lengths])[None], segments)
    return [*arrays, *make_spans(places, places)]


def contender(kernel: str, row: str, blocks: Blocks) -> gpu.Contender:
    problem = PROBLEMS[kernel](row, blocks)
    run, arrays = jax.jit(problem.function), arguments(kernel, problem.shapes)
    return gpu.Contender(str(tuple(blocks)), lambda: run(*arrays))


def tune(kernel: str, row: str, rounds: int) -> Blocks:
    """Times all candidates in turn and prints them; returns the fastest."""
    fitting = list(candidates(kernel, row))
    taken = gpu.seconds([contender(kernel, row, b) for b in fitting], rounds, 0.02)
    medians = {blocks: float(np.median(taken[str(tuple(blocks))])) for blocks in fitting}
    table = Table(title=f"{kernel} {row}: the whole operation")
    for column in ("M, N, warps, stages", "ms", "of the present one's time"):
        table.add_column(column, justify="right")
    for blocks, time in sorted(medians.items(), key=lambda item: item[1]):
        table.add_row(str(tuple(blocks)), f"{1e3 * time:.3f}", f"{time / medians[fitting[0]]:.2f}")
    Console().print(table)
    return min(medians, key=medians.__getitem__)


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
    flags.DEFINE_multi_string("kernel", list(CANDIDATES), "Kernels to tune.")
    flags.DEFINE_bool("dry_run", False, "Print, and leave the table as it is.")
    flags.DEFINE_bool("compile_only", False, "Print which sizes fit the chip; nothing is timed.")
    flags.DEFINE_integer("rounds", 5, "Measured rounds.", lower_bound=2)


def main(_) -> None:
    if unknown := [kernel for kernel in FLAGS.kernel if kernel not in CANDIDATES]:
        raise UserError(f"--kernel={unknown[0]} is unknown; known: {', '.join(CANDIDATES)}")
    rows = [
        (kernel, row)
        for kernel in FLAGS.kernel
        for row in tuning.table()["kernels"][kernel]
        if row.endswith("bfloat16")
    ]
    if FLAGS.compile_only:
        for kernel, row in rows:
            fitting = [tuple(blocks) for blocks in candidates(kernel, row)]
            print(f"{kernel} {row}: {len(fitting)} fit: {fitting}", flush=True)
        return
    gpu.require_gpu("--compile_only works here")
    table = json.loads(json.dumps(tuning.table()))
    for kernel, row in rows:
        table["kernels"][kernel][row] = tune(kernel, row, FLAGS.rounds)._asdict()
    if set(FLAGS.kernel) == set(CANDIDATES):
        # A part of the table leaves the rest unmeasured.
        table["measured"] = gpu.about()
    if not FLAGS.dry_run:
        write_text(tuning.TABLE, as_text(table))
        print(f"written: {tuning.TABLE}")


if __name__ == "__main__":
    define_flags()
    cli.run(main)
