"""Annealing as a judge on the demo's text: is a source worth up-sampling at the end?

    make demo
    python -m experiments.demo.probe                   # runs/demo/probe/scores.csv
    python -m llama3_jax.fit probe --data=runs/demo/probe/scores.csv

What experiments/annealing does at full size. A base of 3 layers of 48 trains at a constant rate for
300,000 tokens; from its checkpoint each arm takes the rate to 0 on another 60,000, on 30% of one
source of the demo and 70% of the mix, or on the mix alone (control), with three seeds each. The same
command goes on where it stopped.
"""

import os

os.environ["JAX_PLATFORMS"] = "cpu"  # meant for any machine's CPU; before jax is imported

import subprocess
import sys
from pathlib import Path

from absl import flags
from rich.console import Console

from experiments.annealing import probe
from experiments.data_mix.tables import write_table
from experiments.demo.ladder import BATCH_TOKENS, small_run
from experiments.demo.train import SOURCES
from llama3_jax import cli
from llama3_jax.errors import UserError

LAYERS, DIM, BASE_TOKENS, SHARE, SEEDS = 3, 48, 300_000, 0.2, 3
CONFIG = Path(__file__)

FLAGS = flags.FLAGS


def get_config(argument: str):
    """`argument`: the demo's directory, then an arm ("base", "control" or a source) and a seed."""
    directory, arm, seed = (*argument.split(","), "", "")[:3]
    if arm == "base":
        config = small_run(directory, LAYERS, DIM, BASE_TOKENS // BATCH_TOKENS)
        config.stages[0]["lr"] = dict(shape="constant", peak=5e-3, warmup_tokens=30_000)
        return config
    candidate = arm if arm == probe.CONTROL else f"{directory}/tokens/{arm}"
    return probe.get_config(f"{directory}/probe_base,{candidate},{seed}", SHARE)


def arms() -> list[tuple[str, int]]:
    return [(arm, seed) for arm in (probe.CONTROL, *SOURCES) for seed in range(SEEDS)]


def main(_) -> int:
    demo = Path(FLAGS.workdir)
    if not (demo / "tokens").is_dir():
        raise UserError(f"{demo / 'tokens'}: no tokenised corpora; run `make demo` first")
    runs = [("probe_base", "base,0")]
    runs += [(f"probe/{arm}-{seed}", f"{arm},{seed}") for arm, seed in arms()]
    for name, argument in runs:
        command = [sys.executable, "-m", "llama3_jax.train", f"--workdir={demo / name}"]
        if code := subprocess.call([*command, f"--config={CONFIG}:{demo},{argument}"]):
            return code
    names = ("arm", "seed", "benchmark", "score")
    scores = [dict(zip(names, row, strict=True)) for row in probe.collect(demo / "probe")]
    path = demo / "probe" / "scores.csv"
    write_table(path, scores)
    Console(soft_wrap=True).print(f"{path}: {len(scores)} scores")
    return 0


if __name__ == "__main__":
    flags.DEFINE_string("workdir", "runs/demo", "Where `make demo` left its corpora.")
    cli.run(main)
