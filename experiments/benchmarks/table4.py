"""The planner against published speeds on H100s: table 4 of the Llama 3 paper, and MaxText's 70B.

    python -m experiments.benchmarks.table4 --json=FILE

Each row compiles the whole training step for its H100s, by `python -m llama3_jax.plan`, on this
machine. No constant of the planner was set by these figures (planning/constants.py).
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from absl import flags
from rich.console import Console
from rich.progress import track
from rich.table import Table

from llama3_jax import cli
from llama3_jax.errors import UserError
from llama3_jax.files import write_json

# Config, published TFLOP/s a GPU, and how it counts attention where that is known.
ROWS = (
    ("experiments/production/llama3_405b.py:8k_8192", 430, ""),
    ("experiments/production/llama3_405b.py:8k_16384", 400, ""),
    ("experiments/production/llama3_405b.py:128k_16384", 380, ""),
    ("experiments/production/llama3_70b.py:fsdp_128", 506.6, "full"),
)
FLAGS = flags.FLAGS


def define_flags() -> None:
    flags.DEFINE_string("json", None, "Where all numbers go.")


def plan(config: str) -> dict:
    with tempfile.TemporaryDirectory() as directory:
        target = Path(directory, "plan.json")
        command = [
            sys.executable,
            "-m",
            "llama3_jax.plan",
            f"--config={config}",
            f"--json={target}",
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise UserError(f"{config}: {done.stderr.strip()}")
        return json.loads(target.read_text())["stages"][0]


def table_of(plans: list[dict]) -> Table:
    table = Table(title="Planned and published, per H100")
    for column in ("row", "GPUs", "GiB forecast", "GiB compiled", "bubble", "s/step",
                   "TFLOP/s", "range", "with cuDNN", "published", "compiled in"):  # fmt: skip
        table.add_column(column, justify="left" if column == "row" else "right")
    for (_, published, counting), stage in zip(ROWS, plans, strict=True):
        mesh, compiled = stage["mesh"], stage["memory_compiled"]
        gpus = mesh["data"] * mesh["pipe"] * mesh["context"] * mesh["tensor"]
        speed, ranges = stage["flops_per_gpu"], stage["ranges"]

        def range_of(kernel: str, ranges=ranges, how=counting or "causal") -> str:
            slow, _, fast = ranges[kernel]["flops_per_gpu"][how]
            return f"{slow / 1e12:.0f} to {fast / 1e12:.0f}"

        table.add_row(
            stage["stage"], f"{gpus:,}", f"{stage['memory_forecast']['total'] / 2**30:.1f}",
            f"{compiled['peak'] / 2**30:.1f}", f"{stage['bubble']:.1%}", f"{stage['seconds']:.2f}",
            f"{speed[counting or 'causal'] / 1e12:.0f}", range_of("triton"), range_of("cudnn"),
            f"{published:g} {counting}".strip(),
            f"{compiled['compile_seconds']:.0f} s, {compiled['compile_process_bytes'] / 1e9:.1f} GB",
        )  # fmt: skip
    return table


def main(_) -> None:
    plans = [plan(config) for config, *_ in track(ROWS, "Compiling", transient=True)]
    Console(width=None if Console().is_terminal else 130).print(table_of(plans))
    if FLAGS.json:
        write_json(Path(FLAGS.json), dict(zip([config for config, *_ in ROWS], plans, strict=True)))


if __name__ == "__main__":
    define_flags()
    cli.run(main)
