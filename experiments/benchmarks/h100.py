"""All that is to be checked and measured on one NVIDIA GPU, in one command.

    python -m experiments.benchmarks.h100 --minutes=8 --results=DIR
    python -m experiments.benchmarks.h100 --parts=products,tune --minutes=3 --results=DIR   # the rest
    python -m experiments.benchmarks.h100 --rehearse      # no GPU: every line at toy sizes

check: the kernels in bfloat16 at head dim 128 against float64, and cuDNN's packed mode. attention: 8K
tokens of one and of several documents, against cuDNN, FlexAttention, SDPA. loss: against XLA and
torch. step: a training step of 8 layers against torch's. products: those of a layer. tune: a
shortlist of block sizes, into the repository's table.

Parts run in that order. Each is a process that is ended, with all that it started, when its own time
is over or --minutes are; what it had measured by then is in --results, for each part writes as it
measures, and the last lines say which parts ran partly. A part is not begun where less than half of
its time is left, and nothing is timed of kernels whose check failed. A rehearsal tells what each part
would take on a GPU, from what it counts: processes, compilations, kernels, timed runs.

It imports absl, array_record, flax, jax, jax_triton, jaxtyping, ml_collections, numpy, optax, psutil,
pyarrow, pydantic (pydantic_core, annotated_types, typing_inspection), rich, tiktoken and triton; torch
where it is installed.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import psutil
from absl import flags
from rich.console import Console
from rich.table import Table

from experiments.benchmarks import gpu
from llama3_jax import cli
from llama3_jax.errors import UserError
from llama3_jax.files import write_json


class Part(NamedTuple):
    """`seconds` that it may take on a GPU, and the program."""

    seconds: int
    module: str
    options: tuple[str, ...] = ()


PARTS = {
    "check": Part(110, "check_kernels", ("--dtype=bfloat16", "--head_dim=128")),
    "attention": Part(180, "kernel_speed", ("--only=attention", "--lengths=8192")),
    "loss": Part(110, "kernel_speed", ("--only=loss",)),
    "step": Part(200, "step_h100", ("--rounds=1",)),
    "products": Part(60, "kernel_speed", ("--only=products",)),
    "tune": Part(110, "tune_kernels"),
}
# What a rehearsal holds its estimates against: seconds for the first parts, and for the others.
CALLS = {("check", "attention", "loss", "step"): 480, ("products", "tune"): 180}
# prctl: processes whose parent has ended become children of this one.
_SUBREAPER = 36

FLAGS = flags.FLAGS


def command(part: str, results: Path) -> list[str]:
    _, module, options = PARTS[part]
    cache = FLAGS.cache or (results / "cache" if FLAGS.rehearse else gpu.CACHE)
    options = [*options, f"--results={results}", f"--cache={cache}"]
    if FLAGS.rehearse:
        options += ["--rehearse", *(["--dry_run"] if part == "tune" else [])]
    return [sys.executable, "-m", f"experiments.benchmarks.{module}", *options]


def run_part(command: list[str], log: Path, seconds: float) -> int | None:
    """The exit code of a program that shows and logs what it prints; None: `seconds` were over.

    Nothing that it started is left running.
    """
    with log.open("wb") as written, log.open("rb") as shown:
        process = subprocess.Popen(
            command, stdout=written, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            end, code = time.monotonic() + seconds, None
            while code is None and time.monotonic() < end:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    code = process.wait(0.2)
                _show(shown.read())
            return code
        finally:
            end_descendants()
            process.wait()
            _show(shown.read())


def _show(text: bytes) -> None:
    sys.stdout.write(text.decode(errors="replace"))
    sys.stdout.flush()


def end_descendants() -> None:
    """Kills all that this process has started, and what that has, until none is left."""
    while found := psutil.Process().children(recursive=True):
        for process in found:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(found, timeout=1)


def _end(*_) -> None:
    # A second one, as `timeout` sends, must not stop the ending of what runs.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit("ended by SIGTERM")


def main(_) -> int:
    if unknown := [part for part in FLAGS.parts if part not in PARTS]:
        raise UserError(f"--parts={unknown[0]} is unknown; known: {', '.join(PARTS)}")
    ctypes.CDLL(None).prctl(_SUBREAPER, 1, 0, 0, 0)
    signal.signal(signal.SIGTERM, _end)
    # The sizes are chosen to fill a card, of which JAX would take three quarters.
    os.environ.setdefault("XLA_CLIENT_MEM_FRACTION", "0.92")
    with contextlib.ExitStack() as stack:
        results = Path(FLAGS.results) if FLAGS.results else gpu.RESULTS
        if FLAGS.rehearse and not FLAGS.results:
            results = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        results.mkdir(parents=True, exist_ok=True)
        states, expected = run_parts(results)
    for part, state in states.items():
        print(f"{part}: {state}")
    if expected:
        print_expected(expected)
    return 0 if all(state.startswith("passed") for state in states.values()) else 1


def run_parts(results: Path) -> tuple[dict[str, str], dict[str, dict[str, float]]]:
    """What became of each part, and in a rehearsal what it would take on a GPU, by kind."""
    start, states, expected = time.monotonic(), {}, {}
    for part in (part for part in PARTS if part in FLAGS.parts):
        begun = time.monotonic()
        left = 60 * FLAGS.minutes - (begun - start)
        seconds = left if FLAGS.rehearse else min(PARTS[part].seconds, left)
        if states.get("check", "passed").startswith("FAILED"):
            states[part] = "not begun: the check failed"
        elif left < PARTS[part].seconds / 2:
            states[part] = f"not begun: {left:.0f} s of --minutes={FLAGS.minutes:g} are left"
        else:
            print(f"== {part}, {seconds:.0f} s at most", flush=True)
            counts = results / gpu.EXPECTED
            counts.unlink(missing_ok=True)
            code = run_part(command(part, results), results / f"{part}.log", seconds)
            word = "passed" if code == 0 else f"FAILED with {code}"
            if code is None:
                word = "ran PARTLY: ended when its time was over; what it measured is written"
            states[part] = f"{word} in {time.monotonic() - begun:.0f} s"
            if FLAGS.rehearse and code == 0:
                expected[part] = gpu.expected_seconds(counts)
            counts.unlink(missing_ok=True)
        write_json(results / "parts.json", states)
    return states, expected


def print_expected(expected: dict[str, dict[str, float]]) -> None:
    table = Table(title="Seconds on a GPU, by what was counted (assumptions: gpu.py, step_h100.py)")
    table.add_column("part")
    kinds = sorted({kind for counts in expected.values() for kind in counts})
    for column in (*kinds, "all", "may take"):
        table.add_column(column, justify="right")
    for part, counts in expected.items():
        cells = (
            *(counts.get(kind, 0.0) for kind in kinds),
            sum(counts.values()),
            PARTS[part].seconds,
        )
        table.add_row(part, *(f"{cell:.0f}" for cell in cells))
    Console(width=130).print(table)
    for parts, most in CALLS.items():
        if parts := [part for part in parts if part in expected]:
            taken = sum(sum(expected[part].values()) for part in parts)
            print(f"{', '.join(parts)}: about {taken:.0f} s of {most}")


if __name__ == "__main__":
    flags.DEFINE_list("parts", list(PARTS), f"Of {', '.join(PARTS)}.")
    flags.DEFINE_float("minutes", 12.0, "When they are over, the running part is ended.")
    gpu.define_flags()
    cli.run(main)
