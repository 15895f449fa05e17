"""`train --check`: a run's timeline as a table with what the planner foresees, and its validation."""

from pathlib import Path

from rich.console import Console
from rich.table import Table

from llama3_jax.data.corpus import DATASET_FILE
from llama3_jax.errors import UserError
from llama3_jax.model.definition import define
from llama3_jax.planning.case import case_of
from llama3_jax.planning.constants import Constants
from llama3_jax.planning.plans import Plan, make_plan
from llama3_jax.planning.tables import layout_text
from llama3_jax.recipe.config import RunConfig
from llama3_jax.recipe.prepare import lay_out, prepare, print_data
from llama3_jax.recipe.timeline import ResolvedStage, Timeline


def check_run(config: RunConfig, constants: Constants) -> None:
    """Prints the timeline and validates it; with the data, where they are.

    Days and GiB are the planner's closed forms for H100s, without interruptions; gated stages are
    taken to pass at once.

    Raises:
      UserError: what cannot work, by key; a stage that does not fit a GPU; some, but not all,
        corpora are there.
    """
    timeline = lay_out(config)
    plans = [make_plan(case_of(config, stage), constants, False) for stage in timeline.stages]
    Console(width=None if Console().is_terminal else 200).print(_table(timeline, plans))
    matmuls = 6 * define(config.model).parameter_count() * timeline.tokens
    exact = sum(plan.case.steps * plan.cost.flops["causal"] for plan in plans)
    print(
        f"{timeline.tokens:,} tokens in {timeline.steps:,} steps; {matmuls:.3g} FLOPs as 6 x "
        f"parameters x tokens, {exact:.3g} counted with causal attention; "
        f"{sum(plan.days for plan in plans):,.1f} days of H100s"
    )
    for plan in plans:
        if not plan.fits:
            raise UserError(
                f"stage {plan.case.name!r} needs {plan.used / 2**30:.1f} GiB of a GPU's "
                f"{plan.memory_limit / 2**30:.1f}"
            )
    places = [place for s in config.data.sources.values() for place in (s.train, s.validation)]
    absent = [p for p in filter(None, places) if not (Path(p) / DATASET_FILE).is_file()]
    if len(absent) == len([p for p in places if p]):
        print(f"checked without data: none of the corpora is here ({absent[0]}, …)")
    else:
        print_data(prepare(config))


def _table(timeline: Timeline, plans: list[Plan]) -> Table:
    table = Table(title=f"{timeline.tokens:,} tokens in {timeline.steps:,} steps")
    words = ("stage", "mix", "mesh")
    for column in (
        "stage", "from token", "tokens", "steps", "length", "batch", "rate", "mix", "mesh", "GiB",
        "days",
    ):  # fmt: skip
        table.add_column(column, justify="left" if column in words else "right")
    for stage, plan in zip(timeline.stages, plans, strict=True):
        first, last = stage.start_tokens, stage.start_tokens + stage.tokens
        rates = [timeline.learning_rate(at) for at in (first, last - 1)]
        table.add_row(
            stage.name, f"{first:,}", f"{stage.tokens:,}{_extra(stage)}", f"{stage.steps:,}",
            f"{stage.length:,}", f"{stage.batch_tokens:,}",
            " to ".join(f"{rate:.3g}" for rate in rates),
            ", ".join(f"{name} {weight:g}" for name, weight in stage.mix.items()),
            layout_text(plan.case), f"{plan.used / 2**30:.1f}", f"{plan.days:,.2f}",
        )  # fmt: skip
    return table


def _extra(stage: ResolvedStage) -> str:
    """What a stage has beside its tokens."""
    if stage.gate:
        return f"\ngate, to {stage.gate.max_tokens:,}"
    if stage.average:
        return f"\naverages {stage.average.checkpoints}"
    return ""
