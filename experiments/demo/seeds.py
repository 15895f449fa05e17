"""Do the demo's gates open whatever the seed, and stay shut without the key-value documents?

    python -m llama3_jax.launch --config=experiments/demo/seeds.py --cpus=2 --wait
    python -m experiments.demo.seeds --experiment=DIRECTORY_OF_THE_LAUNCH

Four runs of experiments/demo/train.py with other seeds and one of `,without_recall`, which the gate
must stop, on the corpora that `make demo` prepared: half an hour on two cores. The second line prints a
table of the verdicts.
"""

import itertools
from pathlib import Path

from absl import flags
from rich.console import Console
from rich.table import Table

from llama3_jax import cli
from llama3_jax.errors import UserError
from llama3_jax.launching.experiment import WorkUnit
from llama3_jax.recipe.gate import GateLog
from llama3_jax.training.metrics import GATES_FILE

SEEDS = range(1, 5)
ENVIRONMENT = {"JAX_PLATFORMS": "cpu"}


def sweep(directory: str = "runs/demo") -> list[WorkUnit]:
    """The runs; `directory` holds the corpora and the ladder's plan."""
    arguments = {f"seed-{seed}": (directory, {"seed": seed}) for seed in SEEDS}
    arguments["without-recall"] = (f"{directory},without_recall", {})
    return [
        WorkUnit(
            name=name, config="experiments/demo/train.py", argument=argument, overrides=overrides,
            environment=ENVIRONMENT,
        )
        for name, (argument, overrides) in arguments.items()
    ]  # fmt: skip


def verdicts(experiment: Path) -> Table:
    """A row for each gate of each run: how many verdicts it took, and the last one.

    Raises:
      UserError: no run of the experiment has reached a gate.
    """
    table = Table(title="Verdicts")
    for column in ("run", "length", "verdicts", "the last", "needles by verdict"):
        table.add_column(column)
    for run in sorted(path.parent for path in experiment.glob(f"*/{GATES_FILE}")):
        records = GateLog(run).verdict_records
        for length, group in itertools.groupby(records, key=lambda record: record["length"]):
            of_gate = list(group)
            needles = ", ".join(f"{r['needles_found']}/{r['needles_asked']}" for r in of_gate)
            table.add_row(run.name, str(length), str(len(of_gate)), of_gate[-1]["verdict"], needles)
    if not table.row_count:
        raise UserError(f"--experiment={experiment}: no run with verdicts there")
    return table


def main(_) -> None:
    if not flags.FLAGS.experiment:
        raise UserError("--experiment is required: the experiment's directory")
    Console(soft_wrap=True).print(verdicts(Path(flags.FLAGS.experiment)))


if __name__ == "__main__":
    flags.DEFINE_string("experiment", None, "The experiment's directory.")
    cli.run(main)
