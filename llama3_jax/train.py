"""Pre-trains a Llama 3 along the timeline of a config file.

    python -m llama3_jax.train --config=experiments/demo/train.py --workdir=runs/demo
    python -m llama3_jax.train --config=… --workdir=… --config.model.layers=8    # another value
    python -m llama3_jax.train --config=… --check                    # print the timeline and stop
    python -m llama3_jax.train --config=… --documents_of_step=120     # what made that batch

The same command goes on where the run stopped. SIGTERM saves and exits with code 75 ("queue me
again"), Ctrl-C saves and exits with 130.
"""

import json
import shutil
import signal
from pathlib import Path

import jax
import numpy as np
from absl import flags

from llama3_jax import cli
from llama3_jax.errors import UserError
from llama3_jax.files import write_json
from llama3_jax.parallel.mesh import make_mesh
from llama3_jax.parallel.sharding import put_batch
from llama3_jax.recipe.config import RunConfig
from llama3_jax.recipe.observe import StepLog, due, validate, write_samples
from llama3_jax.recipe.prepare import Run, prepare, print_timeline
from llama3_jax.recipe.resume import check_same_run, run_metadata
from llama3_jax.schema import parse
from llama3_jax.training.checkpoint import CHECKPOINTS, Checkpoints, restore_newest, state_bytes
from llama3_jax.training.hardware import peak_flops
from llama3_jax.training.metrics import MetricsWriter
from llama3_jax.training.progress import RunProgress
from llama3_jax.training.step import (
    TrainState,
    abstract_state,
    compile_step,
    init_state,
    state_shardings,
)

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


def train(run: Run, workdir: Path) -> int:
    """Trains to the end of the timeline, or until a signal; returns the exit code."""
    config, timeline = run.config, run.timeline
    meshes = [make_mesh(stage.mesh) for stage in timeline.stages]
    abstract, *_ = [abstract_state(config.model, config.optimizer, mesh) for mesh in meshes]
    workdir.mkdir(parents=True, exist_ok=True)
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
        state = init_state(config.model, config.optimizer, meshes[0], config.seed)
        step, bad_steps = 0, 0
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
            mesh = meshes[index]
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
                    validate(run, model, mesh, stage, state.params, step, metrics, progress)
                    write_samples(run, model, state.params, step, tokenizer, metrics, progress)
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
            f"{workdir}: {free / 1e6:,.1f} MB are free, {config.checkpoint.keep_last + 1} "
            f"checkpoints need {need / 1e6:,.1f} MB; free space or lower checkpoint.keep_last"
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


if __name__ == "__main__":
    define_flags()
    cli.run(main)
