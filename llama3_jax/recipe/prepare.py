"""A config with everything that can be checked before compiling."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from llama3_jax.data.batches import Batches, StageShape
from llama3_jax.data.corpus import Corpus
from llama3_jax.errors import UserError
from llama3_jax.evaluation.suite import Suite
from llama3_jax.model.config import ModelConfig
from llama3_jax.model.definition import define
from llama3_jax.parallel.context import imbalance
from llama3_jax.parallel.mesh import Layout, MeshConfig, make_mesh
from llama3_jax.parallel.processes import local_rows
from llama3_jax.parallel.sharding import check_batch, check_divisible
from llama3_jax.parallel.stages import check_stages
from llama3_jax.recipe.config import RunConfig
from llama3_jax.recipe.gate import check_gates, gate_lengths
from llama3_jax.recipe.timeline import ResolvedStage, Timeline, Verdict

_BALANCE_ROWS = 64


@dataclasses.dataclass
class Run:
    """A config, its timeline and its data; `apply_verdicts` changes the timeline as gates decide."""

    config: RunConfig
    timeline: Timeline
    corpora: dict[str, Corpus]
    validation: dict[str, Corpus]
    batches: Batches
    suite: Suite | None
    left_out: Mapping[int, Sequence[int]]


def prepare(config: RunConfig) -> Run:
    """Opens the data and resolves the timeline.

    Raises:
      UserError: whatever cannot work, by key, before anything is compiled or written.
    """
    timeline = lay_out(config)
    sources = config.data.sources
    corpora = {name: Corpus(source.train) for name, source in sources.items()}
    validation = {
        name: Corpus(source.validation)
        for name, source in sources.items()
        if source.validation
        and (config.validation or (config.evaluation and config.evaluation.held_out_tokens))
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
    suite = None
    if config.evaluation:
        suite = Suite(config.evaluation, validation, first.tokenizer())
        if config.evaluation.needle:
            suite.check_lengths({*gate_lengths(timeline), *needle_lengths(config, timeline)})
    batches = _batches(config, timeline, corpora, {})
    return Run(config, timeline, corpora, validation, batches, suite, left_out={})


def lay_out(config: RunConfig) -> Timeline:
    """The timeline as it is if every gate is passed when it is first asked; needs no data.

    Raises:
      UserError: what cannot work of stages, meshes, gates and evaluation, by key.
    """
    timeline = Timeline(config.stages, config.model.rope, config.mesh)
    check_gates(timeline, config.evaluation)
    for number, stage in enumerate(timeline.stages):
        if unknown := set(stage.mix) - set(config.data.sources):
            raise UserError(
                f"config.stages.{number}.mix: {min(unknown)!r} is no source; sources: "
                f"{', '.join(config.data.sources)}"
            )
    _check_meshes(config, timeline)
    return timeline


def apply_verdicts(run: Run, verdicts: Sequence[Verdict]) -> None:
    """Puts into the run the timeline, and so the batches, that its gates' verdicts make."""
    config = run.config
    run.timeline = Timeline(config.stages, config.model.rope, config.mesh, verdicts)
    run.batches = _batches(config, run.timeline, run.corpora, run.left_out)


def skip_batches(run: Run, left_out: Mapping[int, Sequence[int]]) -> Run:
    """The same run without some batches, by number of the stage: those after them move up."""
    batches = _batches(run.config, run.timeline, run.corpora, left_out)
    return dataclasses.replace(run, batches=batches, left_out=left_out)


def stage_model(config: RunConfig, stage: ResolvedStage) -> ModelConfig:
    """The model as a stage trains it: with its RoPE."""
    return config.model.model_copy(update={"rope": stage.rope})


def stage_layouts(run: Run) -> list[Layout]:
    """The mesh of each stage on the devices of all processes.

    Raises:
      UserError: other devices are present, or a process's part of the rows is no equal block.
    """
    layouts = [make_mesh(stage.mesh) for stage in run.timeline.stages]
    for layout in layouts:
        local_rows(layout.mesh)
    return layouts


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
    """Whether each stage's mesh divides the model, its rows, and those of validation and evaluation.

    Raises:
      UserError: names the stage, the size and the mesh axis.
    """
    if config.stages[0].mesh is not None and config.mesh != MeshConfig():
        raise UserError(
            "config.mesh: no stage uses it, for the first sets config.stages.0.mesh: set it there"
        )
    model = define(config.model)
    axes, arrays = model.axes(), model.abstract_params()
    for number, stage in enumerate(timeline.stages):
        shapes = {f"config.stages.{number}": (stage.batch_rows, stage.length, stage.micro_batches)}
        if config.validation:
            length = config.validation.length or stage.length
            shapes[f"config.validation on the mesh of stage {number}"] = stage.mesh.data, length, 1
        for length in _evaluated_lengths(config, timeline, number):
            where = f"config.evaluation at length {length} on the mesh of stage {number}"
            shapes[where] = stage.mesh.data, length, 1
        for where, shape in shapes.items():
            try:
                check_batch(*shape, stage.mesh)
            except UserError as error:
                raise UserError(f"{where}: {error}") from None
        try:
            check_divisible(axes, arrays, stage.mesh)
            check_stages(config.model.layers, stage.mesh)
        except UserError as error:
            raise UserError(f"config.stages.{number}: {error}") from None


def _evaluated_lengths(config: RunConfig, timeline: Timeline, number: int) -> set[int]:
    """Of rows that are scored on the mesh of a stage."""
    if not (evaluation := config.evaluation):
        return set()
    lengths = {evaluation.length}
    if timeline.stages[number].gate:
        lengths |= {stage.length for stage in timeline.stages[: number + 1]}
    if evaluation.needle and number == len(timeline.stages) - 1:
        lengths |= set(needle_lengths(config, timeline))
    return lengths


def needle_lengths(config: RunConfig, timeline: Timeline) -> list[int]:
    """Lengths at which needles are looked for at the end of the run: those given, or the stages'."""
    given = config.evaluation.needle.lengths
    return sorted(set(given) or {stage.length for stage in timeline.stages})


def print_data(run: Run) -> None:
    """How often each source is read, and how even the work of context ranks is."""
    batches = run.batches
    for name, epochs in batches.epochs().items():
        line = f"{name}: {batches.read[name]:,} tokens, {epochs:.2f} epochs"
        if (left := batches.consumed[name] - batches.read[name]) > batches.read[name] // 20:
            line += f"; {left:,} more are passed over where stages end within a window"
        print(line)
    for line in context_balances(run):
        print(line)


def context_balances(run: Run) -> list[str]:
    """A line for each stage with context ranks: how even their attention's FLOPs are.

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
            # A row may be all padding: documents that fit well leave best_fit one to spare.
            of_row = [np.arange(span.stop - span.start) for span in spans]
            if of_row:
                positions[row, : sum(map(len, of_row))] = np.concatenate(of_row)
        causal = imbalance(np.arange(stage.length)[None], ranks)
        lines.append(
            f"stage {stage.name}: attention FLOPs of the busiest of {ranks} context ranks over "
            f"their mean: causal {causal:.3f}, its documents {imbalance(positions, ranks):.3f}"
        )
    return lines
