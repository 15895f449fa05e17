"""Pre-trains a Llama 3 along the timeline of a config file.

    python -m llama3_jax.train --config=experiments/demo/train.py --workdir=runs/demo
    python -m llama3_jax.train --config=… --workdir=… --config.model.layers=8    # another value
    python -m llama3_jax.train --config=… --check                    # print the timeline and stop
    python -m llama3_jax.train --config=… --documents_of_step=120     # what made that batch

The same command goes on where the run stopped. SIGTERM saves and exits with code 75 ("queue me
again"), Ctrl-C saves and exits with 130.
"""

import dataclasses
import json
import math
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags, logging
from rich.console import Console
from rich.table import Table

from llama3_jax import cli
from llama3_jax.data.batches import Batches, StageShape
from llama3_jax.data.corpus import Corpus
from llama3_jax.data.validation import validation_batches
from llama3_jax.errors import UserError
from llama3_jax.files import write_json
from llama3_jax.model.decoding import generate
from llama3_jax.model.flops import training_flops
from llama3_jax.parallel.mesh import make_mesh
from llama3_jax.parallel.sharding import put_batch
from llama3_jax.recipe.config import RunConfig
from llama3_jax.recipe.resume import check_same_run, run_metadata
from llama3_jax.recipe.timeline import ResolvedStage, Timeline
from llama3_jax.schema import parse
from llama3_jax.training.checkpoint import CHECKPOINTS, Checkpoints, restore_newest, state_bytes
from llama3_jax.training.hardware import peak_flops
from llama3_jax.training.metrics import MetricsWriter
from llama3_jax.training.progress import RunProgress
from llama3_jax.training.step import (
    StepMetrics,
    TrainState,
    abstract_state,
    compile_step,
    compile_validation,
    init_state,
    state_shardings,
)  # fmt: skip

FLAGS = flags.FLAGS


def define_flags() -> None:
    cli.define_config()
    flags.DEFINE_string("workdir", None, "Where checkpoints, metrics and the report go.")
    flags.DEFINE_bool("check", False, "Validate the config, print its timeline, and stop.")
    flags.DEFINE_integer("documents_of_step", None, "Print the documents of a step, and stop.")


def main(_) -> int:
    config = parse(RunConfig, cli.require_config(FLAGS.config))
    run = prepare(config)
    if FLAGS.check:
        print_timeline(run)
        return 0
    if FLAGS.documents_of_step is not None:
        for entry in run.batches.documents(FLAGS.documents_of_step):
            print(json.dumps(entry._asdict(), ensure_ascii=False))
        return 0
    if not FLAGS.workdir:
        raise UserError("--workdir is required: where checkpoints and metrics go")
    return train(run, Path(FLAGS.workdir))


# ---------------------------------------------------------------------------------- what is to run


@dataclasses.dataclass
class Run:
    """A config with everything that can be checked before compiling."""

    config: RunConfig
    timeline: Timeline
    corpora: dict[str, Corpus]
    validation: dict[str, Corpus]
    batches: Batches


def prepare(config: RunConfig) -> Run:
    """Opens the data and lays out the timeline.

    Raises:
      UserError: whatever cannot work, by key, before anything is compiled or written.
    """
    timeline = Timeline(config.stages, config.model.rope, config.mesh)
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
    shapes = [StageShape(s.steps, s.batch_rows, s.length, s.mix) for s in timeline.stages]
    batches = Batches(corpora, shapes, config.seed, config.data.packing)
    return Run(config, timeline, corpora, validation, batches)


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


# ------------------------------------------------------------------------------------ the training


def train(run: Run, workdir: Path) -> int:
    """Trains to the end of the timeline, or until a signal; returns the exit code."""
    config, timeline = run.config, run.timeline
    workdir.mkdir(parents=True, exist_ok=True)
    mesh_config = timeline.stages[0].mesh
    abstract = abstract_state(config.model, config.optimizer, make_mesh(mesh_config))
    check_space(workdir, abstract, config)

    # ---- state: the newest valid checkpoint, or a fresh one
    policy = config.checkpoint
    checkpoints = Checkpoints(workdir / CHECKPOINTS, policy.keep_last, policy.keep_every)
    restored = restore_newest(
        checkpoints,
        abstract.params,
        abstract.optimizer,
        lambda saved: check_same_run(
            saved, run_metadata(config, timeline, run.corpora, saved["step"], 0)
        ),
    )
    if restored:
        state, step = TrainState(restored.params, restored.optimizer), restored.step
        bad_steps = restored.metadata["bad_steps"]
    else:
        mesh = make_mesh(mesh_config)
        state, step, bad_steps = init_state(config.model, config.optimizer, mesh, config.seed), 0, 0
    write_json(workdir / "config.json", json.loads(config.model_dump_json()))
    (workdir / "tokenizer").mkdir(exist_ok=True)
    tokenizer = next(iter(run.corpora.values())).tokenizer()
    tokenizer.save(workdir / "tokenizer")

    # ---- log
    metrics = MetricsWriter(workdir, step)
    progress = RunProgress(timeline.tokens, timeline.consumed(step), config.log_every)
    peak, peak_source = peak_flops()
    progress.say(
        f"{config.model.parameter_count():,} parameters, attention={config.model.attention}, "
        f"{config.model.dtype}, {jax.device_count()} {jax.devices()[0].device_kind} device(s); "
        f"MFU against {peak:.3g} FLOP/s ({peak_source})"
    )
    if restored:
        progress.say(f"goes on after step {step} ({timeline.consumed(step):,} tokens)")
    log = StepLog(run, metrics, progress, peak * jax.device_count(), bad_steps)

    # ---- the loop: stage after stage, step after step
    stop = StopSignal()

    def save() -> None:
        log.flush()
        metrics.sync()
        metadata = run_metadata(config, timeline, run.corpora, step, log.bad_steps)
        checkpoints.save(step, state.params, state.optimizer, metadata)

    try:
        while step < timeline.steps and not stop.requested:
            index = timeline.stage_index(step)
            stage = timeline.stages[index]
            model = config.model.model_copy(update={"rope": stage.rope})
            mesh = make_mesh(stage.mesh)
            state = jax.device_put(state, state_shardings(model, config.optimizer, mesh))
            step_function = compile_step(
                model, config.optimizer, mesh, stage.micro_batches, len(run.batches.sources)
            )
            loader = run.batches.load(
                index,
                step - stage.first_step,
                host=jax.process_index(),
                hosts=jax.process_count(),
                workers=config.data.workers,
            )
            for batch in loader:
                rate = np.float32(timeline.step_learning_rate(step))
                state, step_metrics = step_function(state, put_batch(batch, mesh), rate)
                log.add(step, stage, float(rate), step_metrics)
                step += 1
                if due(config, timeline, step):
                    log.flush()
                    validate(run, model, mesh, stage, state, step, metrics, progress)
                    write_samples(run, model, state, step, tokenizer, metrics, progress)
                    log.restart_clock()
                if step % policy.every_steps == 0 or step == timeline.steps:
                    save()
                if stop.requested:
                    break
        save()
        log.flush()
        checkpoints.close()
    except Exception as error:
        if cli.is_disk_full(error):
            raise UserError(f"no space left on the disk that holds {workdir}") from error
        raise
    finally:
        progress.close()
        metrics.close()
    if step < timeline.steps:
        print(f"{stop.name} after step {step}: state saved; the same command goes on from here")
        return stop.exit_code
    print(f"finished: {step} steps, {timeline.consumed(step):,} tokens in {workdir}")
    return 0


def check_space(workdir: Path, abstract: TrainState, config: RunConfig) -> None:
    """Refuses to start where the checkpoints to be kept would not fit on the disk.

    Raises:
      UserError: names what is free and what is needed.
    """
    # One more than is kept: the new one is written before the oldest goes.
    need = state_bytes(abstract) * (config.checkpoint.keep_last + 1)
    present = sum(p.stat().st_size for p in (workdir / CHECKPOINTS).rglob("*") if p.is_file())
    free = shutil.disk_usage(workdir).free
    if free + present < need:
        raise UserError(
            f"{workdir}: {free / 1e9:.2f} GB are free, {config.checkpoint.keep_last + 1} "
            f"checkpoints need {need / 1e9:.2f} GB; free space or lower checkpoint.keep_last"
        )


class StopSignal:
    """SIGTERM (a scheduler wants the machine) and SIGINT (Ctrl-C) end the run after the step."""

    def __init__(self) -> None:
        self.requested, self.name, self.exit_code = False, "", 0
        for number, code in (
            (signal.SIGTERM, cli.EXIT_REQUEUE),
            (signal.SIGINT, cli.EXIT_INTERRUPTED),
        ):
            signal.signal(number, lambda n, _, code=code: self._request(n, code))

    def _request(self, number: int, code: int) -> None:
        self.requested, self.name, self.exit_code = True, signal.Signals(number).name, code
        signal.signal(number, signal.SIG_DFL)  # a second one ends the process at once


class StepLog:
    """Turns the step's metrics into records, one step late so that the device never waits."""

    def __init__(
        self, run: Run, metrics: MetricsWriter, progress: RunProgress, peak: float, bad_steps: int
    ):
        self._run, self._metrics, self._progress, self._peak = run, metrics, progress, peak
        self.bad_steps = bad_steps
        self._pending: tuple[int, ResolvedStage, float, StepMetrics] | None = None
        self._clock: float | None = None

    def restart_clock(self) -> None:
        """Leaves out of the next step's time what was not training."""
        self._clock = time.perf_counter()

    def add(self, step: int, stage: ResolvedStage, rate: float, metrics: StepMetrics) -> None:
        self.flush()
        self._pending = (step, stage, rate, metrics)

    def flush(self) -> None:
        """Waits for the pending step and records it.

        Raises:
          UserError: too many steps in a row were not finite.
        """
        if self._pending is None:
            return
        step, stage, rate, on_device = self._pending
        self._pending = None
        m: StepMetrics = jax.device_get(on_device)
        now = time.perf_counter()
        seconds = now - self._clock if self._clock is not None else None
        self._clock = now
        flops = training_flops(
            self._run.config.model, stage.batch_rows, stage.length, float(m.document_pairs)
        )
        rates = {"tokens_per_second": 0.0, "mfu": dict.fromkeys(flops, 0.0)}
        if seconds:  # the first step's time would be that of the compiler
            mfu = {name: count / seconds / self._peak for name, count in flops.items()}
            rates = {"tokens_per_second": stage.batch_tokens / seconds, "mfu": mfu}
        counts = zip(self._run.batches.sources, m.source_loss_sums, m.source_tokens, strict=True)
        record: dict[str, Any] = {
            "stage": stage.name,
            "loss": _json_number(m.loss),
            "losses": {name: float(total / n) for name, total, n in counts if n},
            "grad_norm": _json_number(m.grad_norm),
            "learning_rate": rate,
            "applied": bool(m.applied),
            "length": stage.length,
            "batch_tokens": stage.batch_tokens,
            "mix": stage.mix,
            "utilisation": float(m.real_tokens / stage.batch_tokens),
            "documents": int(m.documents),
            "cut_documents": int(m.cut_documents),
            "flops": flops,
            "seconds": seconds,
            **rates,
        }
        tokens = self._run.timeline.consumed(step) + stage.batch_tokens
        self._metrics.write("train", step + 1, tokens, record)
        record |= {"step": step + 1, "tokens": tokens, "loss": float(m.loss)}
        self._progress.step(record, last=step + 1 == self._run.timeline.steps)
        self._count_bad(step, bool(m.applied))

    def _count_bad(self, step: int, applied: bool) -> None:
        self.bad_steps = 0 if applied else self.bad_steps + 1
        if applied:
            return
        logging.warning("step %d: loss or gradients are not finite: not applied", step)
        if self.bad_steps >= self._run.config.max_bad_steps:
            entries = self._run.batches.documents(step)
            ids = sorted({f"{entry.source}:{entry.document}" for entry in entries})
            raise UserError(
                f"loss or gradients not finite for {self.bad_steps} steps in a row, the last being "
                f"step {step} with {len(ids)} documents: {', '.join(ids)}"
            )


def _json_number(value: np.ndarray) -> float | str:
    """JSON has no NaN or infinity: those are written as strings."""
    return float(value) if math.isfinite(value) else str(value)


# -------------------------------------------------------------------- validation and samples of it


def due(config: RunConfig, timeline: Timeline, step: int) -> bool:
    """Whether validation runs after `step` steps: a multiple of its tokens was passed, or the end."""
    if config.validation is None:
        return False
    every = config.validation.every_tokens
    passed = timeline.consumed(step) // every > timeline.consumed(step - 1) // every
    return passed or step == timeline.steps


def validate(
    run: Run, model: Any, mesh: Any, stage: ResolvedStage, state: TrainState, step: int,
    metrics: MetricsWriter, progress: RunProgress,
) -> None:  # fmt: skip
    """Loss of each source's held-out documents, in nats a token and bits a byte."""
    config = run.config.validation
    function = compile_validation(model, mesh)
    length = config.length or stage.length
    rows = max(stage.micro_batch_tokens // length, mesh.shape["data"])
    losses, bits = {}, {}
    for name, corpus in run.validation.items():
        total, count, positions = 0.0, 0, 0
        for batch in validation_batches(corpus, length, rows, config.tokens):
            batch_total, batch_count = function(state.params, put_batch(batch, mesh))
            total, count = total + float(batch_total), count + int(batch_count)
            positions += int((batch["segment_ids"] > 0).sum())
        losses[name] = total / count
        share = positions / corpus.info.tokens
        bits[name] = total / math.log(2) / (corpus.info.utf8_bytes * share)
    if losses:
        tokens = run.timeline.consumed(step)
        metrics.write(
            "validation", step, tokens, {"losses": losses, "bits_per_byte": bits, "length": length}
        )
        each = ", ".join(f"{name} {loss:.3f}" for name, loss in losses.items())
        progress.say(f"held-out loss after {tokens:,} tokens: {each}")


def write_samples(
    run: Run, model: Any, state: TrainState, step: int, tokenizer: Any,
    metrics: MetricsWriter, progress: RunProgress,
) -> None:  # fmt: skip
    """Greedy continuations of the config's prompts, for the report."""
    samples = run.config.samples
    if not samples.prompts:
        return
    prompts = [[tokenizer.bos, *tokenizer.encode(prompt)] for prompt in samples.prompts]
    generated = generate(
        model,
        state.params,
        prompts,
        max_new_tokens=samples.max_new_tokens,
        stop_tokens=(tokenizer.eos,),
    )
    texts = [tokenizer.decode(tokens) for tokens in generated]
    pairs = [{"prompt": p, "text": t} for p, t in zip(samples.prompts, texts, strict=True)]
    metrics.write("sample", step, run.timeline.consumed(step), {"samples": pairs})


if __name__ == "__main__":
    define_flags()
    cli.run(main)
