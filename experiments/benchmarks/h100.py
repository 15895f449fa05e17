"""All that is to be checked and measured on one NVIDIA GPU, in one command.

    python -m experiments.benchmarks.h100                         # everything
    python -m experiments.benchmarks.h100 --parts=check,kernels --minutes=10
    python -m experiments.benchmarks.h100 --rehearse              # no GPU: every line at toy sizes

check: each kernel against float64. tune: block sizes, into the repository's table. kernels,
pointwise: each against its peers. step: a whole training step against torch, and what each pointwise
kernel gains in it. constants: what of it the planner takes.

Parts run in that order, each in a process of its own, and a failure does not stop those after it:
but nothing is timed of kernels whose check failed. `--minutes` starts no part after that time.
Results lie in `results/`, with date, chip and versions; commit them with the tuned table.
"""

import contextlib
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from absl import flags

from experiments.benchmarks import gpu
from llama3_jax import cli
from llama3_jax.errors import UserError

# Those with measured results say where they go; the others have no need to.
PARTS = {
    "check": ("check_kernels",),
    "tune": ("tune_kernels",),
    "kernels": ("kernels",),
    "pointwise": ("pointwise",),
    "step": ("step_h100", "--variant=norm=triton", "--variant=rotary=triton",
             "--variant=swiglu=triton"),
    "constants": ("planner_constants",),
}  # fmt: skip

FLAGS = flags.FLAGS


def command(part: str, results: Path) -> list[str]:
    module, *options = PARTS[part]
    if part not in ("check", "tune"):
        options.append(f"--results={results}")
    if FLAGS.rehearse and part != "constants":
        options.append("--rehearse")
        options += ["--dry_run"] if part == "tune" else []
        options += ["--rounds=1"] if part == "step" else []
    return [sys.executable, "-m", f"experiments.benchmarks.{module}", *options]


def main(_) -> int:
    if unknown := [part for part in FLAGS.parts if part not in PARTS]:
        raise UserError(f"--parts={unknown[0]} is unknown; known: {', '.join(PARTS)}")
    start, states = time.monotonic(), {}
    with contextlib.ExitStack() as stack:
        results = gpu.RESULTS
        if FLAGS.rehearse:
            results = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for part in (part for part in PARTS if part in FLAGS.parts):
            begun = time.monotonic()
            if begun - start > 60 * FLAGS.minutes:
                states[part] = "not begun: --minutes are over"
                continue
            if states.get("check", "passed").split()[0] != "passed":
                states[part] = "not begun: the check failed"
                continue
            print(f"== {part}", flush=True)
            done = subprocess.run(command(part, results))
            word = "passed" if done.returncode == 0 else f"FAILED with {done.returncode}"
            states[part] = f"{word} in {time.monotonic() - begun:.0f} s"
    for part, state in states.items():
        print(f"{part}: {state}")
    return 0 if all(state.startswith("passed") for state in states.values()) else 1


if __name__ == "__main__":
    flags.DEFINE_list("parts", list(PARTS), f"Of {', '.join(PARTS)}.")
    flags.DEFINE_float("minutes", float("inf"), "Begin no part after so many.")
    flags.DEFINE_bool("rehearse", False, "Without a GPU: every line of every part, at toy sizes.")
    cli.run(main)
