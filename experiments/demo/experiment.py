"""The demo's scaling laws as an experiment of the launcher: sweep, fit, main run, report.

    python -m llama3_jax.launch --config=experiments/demo/experiment.py --cpus=2 --wait

The same runs as `make demo`'s ladder, which trains them one after the other in its own process; here
each is a work unit of its own, as larger ones would be. The corpora are those of `make demo`, made
first where they are missing. `fit` writes runs.csv and plan.json into the experiment's directory,
`main` trains the model that the plan chose, `forecast` compares what was foreseen with what came of
it, and `report` makes report.html of all.
"""

import json
from pathlib import Path

from absl import flags

from experiments.demo import ladder
from llama3_jax import cli
from llama3_jax.errors import UserError
from llama3_jax.files import write_json, write_text
from llama3_jax.launching.experiment import EXPERIMENT, ROOT, XID, WorkUnit
from llama3_jax.launching.report import SECTIONS
from llama3_jax.model.definition import define
from llama3_jax.recipe.config import RunConfig
from llama3_jax.schema import parse
from llama3_jax.training.metrics import read_metrics

DEMO = "runs/demo"
MAIN, ENVIRONMENT = "main", {"JAX_PLATFORMS": "cpu"}


def sweep(directory: str = DEMO) -> list[WorkUnit]:
    """The work units; `directory` holds the corpora, or will."""
    this = "experiments.demo.experiment"
    prepare = WorkUnit(
        name="prepare", program="experiments.demo.run",
        arguments=(f"--workdir={directory}", "--prepare"),
    )  # fmt: skip
    runs = [
        WorkUnit(
            name=f"{layers}x{dim},{budget:g}", argument=f"{layers},{dim},{budget:g},{directory}",
            environment=ENVIRONMENT, after=("prepare",),
        )
        for layers, dim in ladder.SIZES for budget in ladder.BUDGETS
    ]  # fmt: skip
    after = tuple(run.name for run in runs)
    return [
        prepare,
        *runs,
        WorkUnit(name="fit", program=this, arguments=("--fit", f"--experiment={EXPERIMENT}"),
                 after=after),
        WorkUnit(name=MAIN, config="experiments/demo/train.py", environment=ENVIRONMENT,
                 argument=f"{directory},{EXPERIMENT}/{ladder.PLAN_FILE}", after=("fit",)),
        WorkUnit(name="forecast", program=this, arguments=("--nofit", f"--experiment={EXPERIMENT}"),
                 after=(MAIN,)),
        WorkUnit(name="report", program="llama3_jax.launch", after=("forecast",),
                 arguments=("report", XID, f"--root={ROOT}")),
    ]  # fmt: skip


def get_config(argument: str = f"2,16,6e10,{DEMO}"):
    """`argument`: layers, width, budget in FLOPs, directory of the corpora."""
    parts = argument.split(",")
    if len(parts) != 4:
        raise UserError(f"argument {argument!r}: LAYERS,DIM,BUDGET,DIRECTORY is expected")
    return ladder.config(parts[3], int(parts[0]), int(parts[1]), float(parts[2]))


def fit(experiment: Path) -> None:
    """The finished runs as a table, and the main model that follows from them."""
    rows = []
    for layers, dim in ladder.SIZES:
        for budget in ladder.BUDGETS:
            run = experiment / f"{layers}x{dim},{budget:g}"
            found = [r for r in read_metrics(run) if r["kind"] == "validation"]
            model = parse(RunConfig, json.loads((run / "config.json").read_text())).model
            rows.append(dict(
                flops=budget, tokens=found[-1]["tokens"], params=define(model).matmul_parameters(),
                loss=ladder.mixed(found[-1]["losses"]), label=run.name.replace(",", " "),
            ))  # fmt: skip
    ladder.write_rows(experiment / ladder.RUNS_FILE, rows)
    write_json(experiment / ladder.PLAN_FILE, ladder.plan(rows))


def forecast(experiment: Path) -> None:
    """The section of the experiment's report that compares the forecast with the main run."""
    section = ladder.section(experiment / MAIN, experiment, plots=False)
    (experiment / SECTIONS).mkdir(exist_ok=True)
    write_text(experiment / SECTIONS / f"{section.title}.html", section.html)


def main(_) -> None:
    if not flags.FLAGS.experiment:
        raise UserError("--experiment is required: the experiment's directory")
    (fit if flags.FLAGS.fit else forecast)(Path(flags.FLAGS.experiment))


if __name__ == "__main__":
    flags.DEFINE_string("experiment", None, "The experiment's directory.")
    flags.DEFINE_bool("fit", True, "Fit the finished runs; else compare with the main run.")
    cli.run(main)
