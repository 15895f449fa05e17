"""Times block sizes, warps and stages of every kernel, and writes the fastest into the repository.

    python -m experiments.benchmarks.tune_kernels                    # on the GPU to tune for
    python -m experiments.benchmarks.tune_kernels --kernel=flash_keys --dry_run
    python -m experiments.benchmarks.tune_kernels --compile_only     # no GPU: which sizes fit
    python -m experiments.benchmarks.tune_kernels --rehearse --dry_run   # no GPU: every line, toy sizes

Each candidate first compiles for sm_90, in processes side by side; one that spills or takes too much
shared memory is not run. The others are compared and timed in turn, at the shapes of the 8B model and
(attention) on a row of documents of 1.5K tokens on average. Rows of bfloat16 are tuned; those of
float32 are there for checks alone.
The table is `llama3_jax/kernels/gpu/tuning.json`; commit it.
"""

import itertools
import json
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor

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
from llama3_jax.kernels.attention import make_spans
from llama3_jax.kernels.gpu import tuning
from llama3_jax.kernels.gpu.catalogue import MODEL, PROBLEMS, Sizes, entry
from llama3_jax.kernels.gpu.compile import compile_for_hopper
from llama3_jax.kernels.gpu.tuning import Blocks

MEAN_DOCUMENT = 1536
TOLERANCE = 0.03  # of the largest value, in bfloat16
# M, N, warps, stages
CANDIDATES = {
    "flash_forward": ((64, 128), (32, 64, 128), (4, 8), (2, 3, 4)),
    "flash_keys": ((32, 64, 128), (64, 128), (4, 8), (1, 2, 3)),
    "flash_queries": ((64, 128), (32, 64, 128), (4, 8), (2, 3, 4)),
    "cross_entropy": ((64, 128, 256), (128, 256), (4, 8), (3, 4, 5)),
}

FLAGS = flags.FLAGS


def sizes() -> Sizes:
    return Sizes(150, 32, 300, 4, 2) if gpu.rehearsing() else MODEL


def candidates(kernel: str, row: str) -> list[Blocks]:
    """The sizes of the table's row, then the others; only those that fit the chip."""
    present = Blocks(**tuning.table()["kernels"][kernel][row])
    grid = [Blocks(*numbers) for numbers in itertools.product(*CANDIDATES[kernel])]
    found = list(dict.fromkeys([present, *grid]))
    if gpu.rehearsing():
        found = found[:3]
    # A child may not take hold of the GPU.
    before = os.environ.get("JAX_PLATFORMS")
    os.environ["JAX_PLATFORMS"] = "cpu"
    try:
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(min(16, os.cpu_count() or 1), spawn) as pool:
            states = list(pool.map(_state, *zip(*((kernel, row, b) for b in found), strict=True)))
    finally:
        os.environ.pop("JAX_PLATFORMS")
        if before is not None:
            os.environ["JAX_PLATFORMS"] = before
    for blocks, state in zip(found, states, strict=True):
        if state not in ("fits", "does not fit"):
            print(f"{kernel} {row} {tuple(blocks)}: {state}")
    return [blocks for blocks, state in zip(found, states, strict=True) if state == "fits"]


def _state(kernel: str, row: str, blocks: Blocks) -> str:
    try:
        resources = [compile_for_hopper(x) for x in entry(kernel, row, blocks).launches]
    except Exception as error:  # the compiler's own limits are its exceptions
        return f"does not compile, {type(error).__name__}"
    return "fits" if all(x.fits for x in resources) else "does not fit"


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


def contender(kernel: str, row: str, blocks: Blocks) -> gpu.Contender:
    problem = PROBLEMS[kernel](row, blocks, sizes())
    run, arrays = jax.jit(problem.function), arguments(kernel, problem.shapes)

    def results(result) -> list:
        return [gpu.sampled(x) for x in jax.tree.leaves(result)]

    return gpu.Contender(str(tuple(blocks)), lambda: run(*arrays), results=results)


def right_ones(contenders: list[gpu.Contender]) -> list[gpu.Contender]:
    """Those whose results are the first one's: the fastest may be one that a compiler got wrong."""
    right = contenders[:1]
    for candidate in contenders[1:]:
        try:
            gpu.compare([contenders[0], candidate], TOLERANCE)
            right.append(candidate)
        except (UserError, jax.errors.JaxRuntimeError) as error:
            print(f"left out: {str(error)[:300]}")
    return right


def tune(kernel: str, row: str, rounds: int) -> Blocks:
    """Times all candidates in turn and prints them; returns the fastest."""
    fitting = candidates(kernel, row)
    if not fitting:
        raise UserError(f"{kernel} {row}: none of the candidates fits the chip")
    contenders = right_ones([contender(kernel, row, blocks) for blocks in fitting])
    taken = gpu.seconds(contenders, rounds, 0.02)
    medians = {
        blocks: float(np.median(taken[str(tuple(blocks))]))
        for blocks in fitting
        if str(tuple(blocks)) in taken
    }
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
    gpu.define_flags(results=False)


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
    if FLAGS.rehearse and not FLAGS.dry_run:
        raise UserError("--rehearse times nothing real: give --dry_run, which keeps the table")
    with gpu.machine("--compile_only"):
        tune_all(rows)


def tune_all(rows: list[tuple[str, str]]) -> None:
    table = json.loads(json.dumps(tuning.table()))
    for kernel, row in rows:
        table["kernels"][kernel][row] = tune(kernel, row, FLAGS.rounds)._asdict()
        # What is measured stays, if a later row fails; "measured" waits for all of them.
        if not FLAGS.dry_run:
            write_text(tuning.TABLE, as_text(table))
    if set(FLAGS.kernel) == set(CANDIDATES):
        table["measured"] = gpu.about()
    if not FLAGS.dry_run:
        write_text(tuning.TABLE, as_text(table))
        print(f"written: {tuning.TABLE}")


if __name__ == "__main__":
    define_flags()
    cli.run(main)
