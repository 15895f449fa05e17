"""A config with everything that can be checked before compiling."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from rich.console import Console
from rich.table import Table

from llama3_jax.data.batches import Batches, StageShape
from llama3_jax.data.corpus import Corpus
from llama3_jax.errors import UserError
from llama3_jax.parallel.context import imbalance
from llama3_jax.parallel.sharding import check_batch
from llama3_jax.recipe.config import RunConfig
from llama3_jax.recipe.timeline import Timeline

_BALANCE_ROWS = 64


@dataclasses.dataclass
class Run:
    """A config, its timeline and its data."""

    config: RunConfig
    timeline: Timeline
    corpora: dict[str, Corpus]
    validation: dict[str, Corpus]
    batches: Batches


def prepare(config: RunConfig, left_out: Mapping[int, Sequence[int]] | None = None) -> Run:
    """Opens the data and lays out the timeline; `left_out` are batches of stages, by number.

    Raises:
      UserError: whatever cannot work, by key, before anything is compiled or written.
    """
    timeline = Timeline(config.stages, config.model.rope, config.mesh)
    _check_meshes(config, timeline)
    sources = config.data.sources
    corpora = {name: Corpus(source.train) for name, source in sources.items()}
    validation = {
        name: Corpus(source.validation)
        for name, source in sources.items()
        if config.validation and source.validation
    }
    first = next(iter(corpora.values()))
    for corpus in (*corpora.values(), *validation.values()):
        if corpus.info.tokenizer != first.info.tokenizer:
            raise UserError(
                f"{corpus.directory} was tokenised by another tokenizer "
                f"({corpus.info.tokenizer}) than {first.directory} ({first.info.tokenizer})"
            )
    if first.info.vocab_size > config.model.vocab_size:
        raise UserError(
            f"config.model.vocab_size: {config.model.vocab_size} is smaller than the tokenizer's "
            f"{first.info.vocab_size}"
        )
    batches = _batches(config, timeline, corpora, left_out or {})
    return Run(config, timeline, corpora, validation, batches)


def leave_out(run: Run, left_out: Mapping[int, Sequence[int]]) -> Run:
    """The same run without some batches, by stage: those after them move up."""
    batches = _batches(run.config, run.timeline, run.corpora, left_out)
    return dataclasses.replace(run, batches=batches)


def _batches(
    config: RunConfig,
    timeline: Timeline,
    corpora: dict[str, Corpus],
    left_out: Mapping[int, Sequence[int]],
) -> Batches:
    shapes = [
        StageShape(s.steps, s.batch_rows, s.length, s.mix, tuple(sorted(left_out.get(number, ()))))
        for number, s in enumerate(timeline.stages)
    ]
    return Batches(corpora, shapes, config.seed, config.data.packing)


def _check_meshes(config: RunConfig, timeline: Timeline) -> None:
    """Whether each stage's mesh divides its rows, and those of validation."""
    for number, stage in enumerate(timeline.stages):
        shapes = {f"config.stages.{number}": (stage.batch_rows, stage.length, stage.micro_batches)}
        if config.validation:
            length = config.validation.length or stage.length
            shapes[f"config.validation on the mesh of stage {number}"] = stage.mesh.data, length, 1
        for where, shape in shapes.items():
            try:
                check_batch(*shape, stage.mesh)
            except UserError as error:
                raise UserError(f"{where}: {error}") from None


def print_timeline(run: Run) -> None:
    """The timeline as a table, and how often each source is read."""
    table = Table(title=f"{run.timeline.tokens:,} tokens in {run.timeline.steps:,} steps")
    for column in ("stage", "from token", "tokens", "steps", "length", "batch", "rate", "mix"):
        table.add_column(column, justify="left" if column in ("stage", "mix") else "right")
    for stage in run.timeline.stages:
        first, last = stage.start_tokens, stage.start_tokens + stage.tokens
        rates = [run.timeline.learning_rate(at) for at in (first, last - 1)]
        table.add_row(
            stage.name, f"{first:,}", f"{stage.tokens:,}", f"{stage.steps:,}", f"{stage.length:,}",
            f"{stage.batch_tokens:,}", " to ".join(f"{rate:.3g}" for rate in rates),
            ", ".join(f"{name} {weight:g}" for name, weight in stage.mix.items()),
        )  # fmt: skip
    console = Console(width=None if Console().is_terminal else 160)
    console.print(table)
    for name, epochs in run.batches.epochs().items():
        console.print(f"{name}: {run.batches.consumed[name]:,} tokens, {epochs:.2f} epochs")
    for line in context_balances(run):
        console.print(line)


def context_balances(run: Run) -> list[str]:
    """A line for each stage with context ranks: how evenly attention's FLOPs lie over them.

    For documents as long as the row, and for the documents of the stage's first rows.
    """
    lines = []
    for number, stage in enumerate(run.timeline.stages):
        if (ranks := stage.mesh.context) == 1:
            continue
        rows = min(stage.steps * stage.batch_rows, _BALANCE_ROWS)
        positions = np.full((rows, stage.length), -1)
        for row in range(rows):
            _, spans = run.batches.spans(number, row)
            of_row = np.concatenate([np.arange(span.stop - span.start) for span in spans])
            positions[row, : len(of_row)] = of_row
        causal = imbalance(np.arange(stage.length)[None], ranks)
        lines.append(
            f"stage {stage.name}: attention FLOPs of the busiest of {ranks} context ranks over "
            f"their mean: causal {causal:.3f}, its documents {imbalance(positions, ranks):.3f}"
        )
    return lines
