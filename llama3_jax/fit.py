"""Scaling laws from tables of runs: compute-optimal sizes, accuracies, mixes, probes, next runs.

    python -m llama3_jax.fit isoflop --data=runs.csv --target_flops=3.8e25 --json=out.json
    python -m llama3_jax.fit downstream --data=ladder.csv --target_params=4e11 --target_tokens=1.6e13
    python -m llama3_jax.fit mix --weights=weights.csv --losses=losses.csv
    python -m llama3_jax.fit probe --data=scores.csv
    python -m llama3_jax.fit plan --budget=1e20 --data=runs.csv --target_flops=3.8e25

`python -m llama3_jax.fit COMMAND --help` lists the options of a command. Each prints tables,
writes everything with --json; `isoflop` plots with --report.
"""

import os
import sys

# The fits are small: a GPU would only add its start-up. Must be set before jax is imported.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

from absl import flags

from llama3_jax import cli
from llama3_jax.scaling.commands import COMMANDS

FLAGS = flags.FLAGS


def main(arguments: list[str]) -> None:
    name = arguments[1] if len(arguments) > 1 else ""
    if name in cli.HELP:
        cli.run(lambda _: None, [arguments[0], "--help"], doc=__doc__)
    if name not in COMMANDS:
        known = ", ".join(COMMANDS)
        said = f"{name!r} is no command" if name else "a command is missing"
        sys.exit(cli.fail(f"{said}; known: {known}"))
    command = COMMANDS[name]
    command.define_flags()
    cli.run(lambda _: command.main(), [arguments[0], *arguments[2:]], doc=command.__doc__)


if __name__ == "__main__":
    main(sys.argv)
