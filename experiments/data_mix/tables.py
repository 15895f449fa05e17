"""Weights and final losses of finished proxy runs, as the tables that `fit mix` reads.

    python -m experiments.data_mix.tables --workdir=runs/mix

Every directory under --workdir that has a metrics.jsonl is a run; its mix is that of its config.
"""

import json
from pathlib import Path

from absl import flags

from llama3_jax import cli
from llama3_jax.errors import UserError
from llama3_jax.files import write_text
from llama3_jax.training.metrics import METRICS_FILE, read_metrics

FLAGS = flags.FLAGS


def collect(workdir: Path) -> tuple[list[dict], list[dict]]:
    """Rows of weights and of held-out losses, by run.

    Raises:
      UserError: no runs, or one that never validated.
    """
    weights, losses = [], []
    for path in sorted(workdir.glob(f"*/{METRICS_FILE}")):
        run = path.parent
        config = json.loads((run / "config.json").read_text())
        found = [r for r in read_metrics(run) if r["kind"] == "validation"]
        if not found:
            raise UserError(f"{run}: has no validation loss yet; finish it or remove it")
        mix = config["stages"][-1]["mix"]
        names = config["data"]["sources"]
        weights.append({"run": run.name} | {name: mix.get(name, 0.0) for name in names})
        losses.append({"run": run.name} | found[-1]["losses"])
    if not weights:
        raise UserError(f"{workdir}: no runs (directories with {METRICS_FILE})")
    return weights, losses


def write_table(path: Path, rows: list[dict]) -> None:
    lines = [",".join(rows[0])]
    for row in rows:
        if list(row) != list(rows[0]):
            raise UserError(f"run {row['run']!r} has other columns than {rows[0]['run']!r}")
        lines.append(",".join(str(value) for value in row.values()))
    write_text(path, "\n".join(lines) + "\n")


def main(_) -> None:
    if not FLAGS.workdir:
        raise UserError("--workdir is required: the directory that holds the runs")
    workdir = Path(FLAGS.workdir)
    for name, rows in zip(("weights", "losses"), collect(workdir), strict=True):
        write_table(workdir / f"{name}.csv", rows)
        print(f"{workdir / name}.csv: {len(rows)} runs")


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "Directory of the runs' directories.")
    cli.run(main)
