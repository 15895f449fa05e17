"""Finished runs of a sweep as the table that `fit isoflop` reads, and as full records.

    python -m experiments.scaling_laws.collect --workdir=runs/isoflop      # runs.csv and runs.jsonl

Every directory under --workdir that has a metrics.jsonl or config.json is a run; those that are not
finished are named and left out. The loss is that of the last held-out measurement, its sources
weighted alike for all runs: by the mix that they share at their end, or by --mix. Column flops is the budget where the directory is
named BUDGET,SHAPE (as `sweep()` names runs), else 6 N D without embeddings; flops_matmul adds the
head, flops_causal the attention. runs.jsonl also holds the learning curve and each source's losses.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from llama3_jax import cli
from llama3_jax.errors import UserError
from llama3_jax.files import write_text
from llama3_jax.model.definition import define
from llama3_jax.model.flops import training_flops
from llama3_jax.recipe.config import RunConfig
from llama3_jax.recipe.timeline import Timeline
from llama3_jax.reporting.experiment import common_mix, weighted
from llama3_jax.scaling.runs import FLOPS_PER_PAIR
from llama3_jax.schema import parse
from llama3_jax.training.metrics import METRICS_FILE, read_metrics

COLUMNS = (
    "label", "flops", "tokens", "loss", "params", "params_with_embeddings", "flops_6nd",
    "flops_matmul", "flops_causal", "learning_rate", "batch_tokens", "seed",
)  # fmt: skip


class Unfinished(Exception):
    """Says how far a run is."""


def record(run: Path) -> dict[str, Any]:
    """What one run was, and what it reached; `weigh` adds its loss.

    Raises:
      Unfinished: its loss would be that of a shorter run.
      UserError: it never validated, or its config is wrong.
    """
    if not (run / "config.json").exists() or not (run / METRICS_FILE).exists():
        raise Unfinished("not begun")
    config = parse(RunConfig, json.loads((run / "config.json").read_text()), str(run))
    timeline = Timeline(config.stages, config.model.rope, config.mesh)
    records = read_metrics(run)
    steps = [r for r in records if r["kind"] == "train"]
    measured = [r for r in records if r["kind"] == "validation"]
    reached = steps[-1]["step"] if steps else 0
    if reached < timeline.steps:
        raise Unfinished(f"step {reached:,} of {timeline.steps:,}")
    if not measured:
        raise UserError(f"{run}: it has no held-out loss")
    model, stage = config.model, timeline.stages[-1]
    tokens, params = steps[-1]["tokens"], define(model).parameter_count(embeddings=False)
    causal = training_flops(model, 1, stage.length, 0)["causal"] / stage.length
    nominal = FLOPS_PER_PAIR * params * tokens
    return {
        "label": run.name.replace(",", " "),
        "flops": _budget(run.name, nominal),
        "tokens": tokens,
        "params": params,
        "params_with_embeddings": define(model).parameter_count(),
        "flops_6nd": nominal,
        "flops_matmul": 6.0 * define(model).matmul_parameters() * tokens,
        "flops_causal": causal * tokens,
        "learning_rate": max(r["learning_rate"] for r in steps),
        "batch_tokens": stage.batch_tokens,
        "seed": config.seed,
        "mix": dict(stage.mix),
        "losses": measured[-1]["losses"],
        "learning_curve": [[r["tokens"], r["losses"]] for r in measured],
    }


def weigh(runs: Sequence[dict[str, Any]], mix: dict[str, float] | None) -> list[dict[str, Any]]:
    """The runs with a `loss` each: the mean of their held-out losses by one mix.

    Raises:
      UserError: no mix is given and theirs differ, or a run lacks the loss of a source.
    """
    if mix is None:
        mix = common_mix([run["mix"] for run in runs])
    if mix is None:
        raise UserError("the runs' mixes differ, and by its own each loss would be of another "
                        "text; --mix=NAME=WEIGHT,… says by which to weigh all")  # fmt: skip
    for run in runs:
        if missing := [name for name in mix if name not in run["losses"]]:
            raise UserError(f"{run['label']}: no held-out loss of {missing[0]}; --mix=NAME=WEIGHT,… "
                            f"of {', '.join(run['losses'])} weighs all runs")  # fmt: skip
    return [run | {"loss": weighted(run["losses"], mix)} for run in runs]


def read_mix(option: Sequence[str]) -> dict[str, float] | None:
    """`NAME=WEIGHT` of each part; None without parts."""
    try:
        mix = {name: float(weight) for name, weight in (part.split("=") for part in option)}
    except ValueError:
        mix = {"": -1.0}
    if any(not 0 < weight < math.inf for weight in mix.values()):
        raise UserError(f"--mix={','.join(option)}: NAME=WEIGHT,… is expected, weights positive")
    return mix or None


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
    mix = read_mix(flags.FLAGS.mix)
    runs, left_out = [], []
    for folder in sorted(
        {p.parent for n in (METRICS_FILE, "config.json") for p in workdir.glob(f"*/{n}")}
    ):
        try:
            runs.append(record(folder))
        except Unfinished as reason:
            left_out.append(f"{folder.name} ({reason})")
    if left_out:
        print(f"left out, not finished: {'; '.join(left_out)}")
    if not runs:
        raise UserError(f"{workdir}: no finished runs (directories with {METRICS_FILE})")
    runs = weigh(runs, mix)
    lines = [COLUMNS, *([run[c] for c in COLUMNS] for run in runs)]
    write_text(workdir / "runs.csv", "".join(",".join(map(str, row)) + "\n" for row in lines))
    write_text(workdir / "runs.jsonl", "".join(json.dumps(run) + "\n" for run in runs))
    print(f"{workdir / 'runs.csv'}, {workdir / 'runs.jsonl'}: {len(runs)} runs")


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "Directory of the runs' directories.")
    flags.DEFINE_list("mix", [], "NAME=WEIGHT,… by which held-out losses are weighed.")
    cli.run(main)
