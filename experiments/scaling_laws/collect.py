"""Finished runs of a sweep as the table that `fit isoflop` reads, and as full records.

    python -m experiments.scaling_laws.collect --workdir=runs/isoflop      # runs.csv and runs.jsonl

Every directory under --workdir that has a metrics.jsonl is a run. The loss is that of the last
held-out measurement, sources weighted by the mix. Column flops is the budget where the directory is
named BUDGET,SHAPE (as `sweep()` names runs), else 6 N D without embeddings; flops_matmul adds the
head, flops_causal the attention. runs.jsonl also holds the learning curve and each source's losses.
"""

import json
from pathlib import Path
from typing import Any

from absl import flags

from llama3_jax import cli
from llama3_jax.errors import UserError
from llama3_jax.files import write_text
from llama3_jax.model.flops import matmul_parameters, training_flops
from llama3_jax.recipe.config import RunConfig
from llama3_jax.recipe.timeline import Timeline
from llama3_jax.scaling.runs import FLOPS_PER_PAIR
from llama3_jax.schema import parse
from llama3_jax.training.metrics import METRICS_FILE, read_metrics

COLUMNS = (
    "label", "flops", "tokens", "loss", "params", "params_with_embeddings", "flops_6nd",
    "flops_matmul", "flops_causal", "learning_rate", "batch_tokens", "seed",
)  # fmt: skip


def record(run: Path) -> dict[str, Any]:
    """What one run was, and what it reached.

    Raises:
      UserError: it is not finished or never validated.
    """
    config = parse(RunConfig, json.loads((run / "config.json").read_text()), str(run))
    timeline = Timeline(config.stages, config.model.rope, config.mesh)
    records = read_metrics(run)
    steps = [r for r in records if r["kind"] == "train"]
    measured = [r for r in records if r["kind"] == "validation"]
    if not steps or steps[-1]["step"] < timeline.steps or not measured:
        raise UserError(f"{run}: not finished; its loss would be that of a shorter run")
    model, stage = config.model, timeline.stages[-1]
    tokens, params = steps[-1]["tokens"], model.parameter_count(embeddings=False)
    final = measured[-1]["losses"]
    weights = {name: stage.mix.get(name, 0.0) for name in final}
    if not sum(weights.values()) > 0:
        raise UserError(f"{run}: no source of its mix has a held-out loss")
    causal = training_flops(model, 1, stage.length, 0)["causal"] / stage.length
    nominal = FLOPS_PER_PAIR * params * tokens
    return {
        "label": run.name.replace(",", " "),
        "flops": _budget(run.name, nominal),
        "tokens": tokens,
        "loss": sum(weights[n] * final[n] for n in final) / sum(weights.values()),
        "params": params,
        "params_with_embeddings": model.parameter_count(),
        "flops_6nd": nominal,
        "flops_matmul": 6.0 * matmul_parameters(model) * tokens,
        "flops_causal": causal * tokens,
        "learning_rate": max(r["learning_rate"] for r in steps),
        "batch_tokens": stage.batch_tokens,
        "seed": config.seed,
        "losses": final,
        "learning_curve": [[r["tokens"], r["losses"]] for r in measured],
    }


def _budget(name: str, nominal: float) -> float:
    """The budget that a directory's name states, where it is near to what was spent."""
    try:
        budget = float(name.split(",")[0])
    except ValueError:
        return nominal
    return budget if 0.8 < nominal / budget < 1.25 else nominal


def main(_) -> None:
    if not flags.FLAGS.workdir:
        raise UserError("--workdir is required: the directory that holds the runs")
    workdir = Path(flags.FLAGS.workdir)
    runs = [record(path.parent) for path in sorted(workdir.glob(f"*/{METRICS_FILE}"))]
    if not runs:
        raise UserError(f"{workdir}: no runs (directories with {METRICS_FILE})")
    lines = [COLUMNS, *([run[c] for c in COLUMNS] for run in runs)]
    write_text(workdir / "runs.csv", "".join(",".join(map(str, row)) + "\n" for row in lines))
    write_text(workdir / "runs.jsonl", "".join(json.dumps(run) + "\n" for run in runs))
    print(f"{workdir / 'runs.csv'}, {workdir / 'runs.jsonl'}: {len(runs)} runs")


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "Directory of the runs' directories.")
    cli.run(main)
