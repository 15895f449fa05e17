"""Pre-trains a Llama 3 along the timeline of a config file.

    python -m llama3_jax.train --config=experiments/demo/train.py --workdir=runs/demo
    python -m llama3_jax.train --config=… --workdir=… --config.model.layers=8    # another value
    python -m llama3_jax.train --config=… --check                    # print the timeline and stop
    python -m llama3_jax.train --config=… --documents_of_step=120     # what made that batch
    python -m llama3_jax.train --config=… --workdir=… --replay_event=0    # a spike once more
    python -m llama3_jax.train --config=… --workdir=… --profile=100:5     # where five steps' time goes
    srun python -m llama3_jax.train --config=… --workdir=…           # a process a task

The same command goes on where the run stopped, with as many processes as it then has. SIGTERM saves
and exits with code 75 ("queue me again"), Ctrl-C saves and exits with 130; one process's signal
stops all. When a process is lost the others exit with code 3; a hang ends all with code 4.
"""

import contextlib
import gc
import json
from pathlib import Path

import jax
from absl import flags

from llama3_jax import cli, xla
from llama3_jax.errors import UserError
from llama3_jax.files import check_folder, write_json
from llama3_jax.folder_lock import locked
from llama3_jax.kernels import dispatch
from llama3_jax.model.definition import define
from llama3_jax.parallel import processes
from llama3_jax.parallel.liveness import Watch
from llama3_jax.planning.case import case_of
from llama3_jax.planning.check import check_run
from llama3_jax.planning.constants import load_constants
from llama3_jax.planning.memory import forecast
from llama3_jax.recipe.actions import AskGate, CollectGarbage, Save
from llama3_jax.recipe.average import Average
from llama3_jax.recipe.config import RunConfig
from llama3_jax.recipe.gate import GateLog, Gates
from llama3_jax.recipe.incidents import Incidents
from llama3_jax.recipe.measure import Evaluate, Validate
from llama3_jax.recipe.prepare import (
    Run,
    apply_verdicts,
    context_balances,
    prepare,
    skip_batches,
    stage_layouts,
)
from llama3_jax.recipe.replay import replay
from llama3_jax.recipe.resume import abstract_saved, start_of
from llama3_jax.recipe.space import check_space
from llama3_jax.recipe.trainer import Outcome, Trainer
from llama3_jax.schema import parse
from llama3_jax.training import sinks
from llama3_jax.training.checkpoint import CHECKPOINTS, Checkpoints
from llama3_jax.training.events import Events
from llama3_jax.training.goodput import GOODPUT_FILE, Ledger
from llama3_jax.training.hardware import peak_flops
from llama3_jax.training.metrics import Metrics, MetricsWriter
from llama3_jax.training.progress import RunProgress
from llama3_jax.training.sinks import Sink
from llama3_jax.training.stop import StopSignal
from llama3_jax.training.trace import Trace, parse_steps
from llama3_jax.training.watchdog import Watchdog

FLAGS = flags.FLAGS


def define_flags() -> None:
    cli.define_config()
    processes.define_flags()
    flags.DEFINE_string("workdir", None, "Where checkpoints, metrics and the report go.")
    flags.DEFINE_bool("check", False, "Validate the config, print its timeline, and stop.")
    flags.DEFINE_string("profile", None, "STEP:COUNT: a trace of these steps in --workdir/profile.")
    flags.DEFINE_integer("documents_of_step", None, "Print the documents of a step, and stop.")
    flags.DEFINE_integer(
        "replay_event", None, "Compute the step of this event of --workdir again, and stop."
    )


def main(_) -> int:
    config = parse(RunConfig, cli.require_config(FLAGS.config))
    if FLAGS.check:
        check_run(config, load_constants())
        return 0
    if FLAGS.documents_of_step is not None:
        run = prepare(config)
        if FLAGS.workdir:  # as that run went: without what it skipped, by what its gates decided
            workdir = Path(FLAGS.workdir)
            run = skip_batches(run, Events(workdir, writes=False).left_out())
            apply_verdicts(run, GateLog(workdir).verdicts)
        for entry in run.batches.documents(FLAGS.documents_of_step):
            print(json.dumps(entry._asdict(), ensure_ascii=False))
        return 0
    if not FLAGS.workdir:
        raise UserError("--workdir is required: where checkpoints and metrics go")
    xla.start(config.xla)
    profile = parse_steps(FLAGS.profile) if FLAGS.profile else None
    if FLAGS.replay_event is not None:
        print(replay(prepare(config), Path(FLAGS.workdir), FLAGS.replay_event))
        return 0
    workdir = check_folder("--workdir", FLAGS.workdir)
    with processes.joined(processes.from_flags()) as watch:
        run = prepare(config)
        with locked(workdir) if processes.is_first() else contextlib.nullcontext():
            return train(run, workdir, watch, profile)


def train(
    run: Run, workdir: Path, watch: Watch | None = None, profile: tuple[int, int] | None = None
) -> int:
    """Trains to the end of the timeline, or until a signal; returns the exit code.

    `profile` is the first step to trace and how many (training/trace.py).
    """
    processes.check_same("config", run.config.model_dump_json())
    writes = processes.is_first()
    ledger = Ledger(workdir / GOODPUT_FILE if writes else None)
    watchdog = Watchdog(run.config.watchdog, ledger, workdir, jax.process_index(), watch)
    events, stop = Events(workdir, writes), StopSignal()
    outcome = Outcome.REWOUND
    watchdog.start()
    try:
        while outcome is Outcome.REWOUND:
            # A rewind is a resume: from an earlier checkpoint, without the batches of its event.
            part = skip_batches(run, events.left_out())
            outcome = train_part(part, workdir, events, stop, ledger, profile)
    finally:
        watchdog.close()
    return stop.exit_code if outcome is Outcome.STOPPED else 0


def train_part(
    run: Run, workdir: Path, events: Events, stop: StopSignal, ledger: Ledger,
    profile: tuple[int, int] | None = None,
) -> Outcome:  # fmt: skip
    """Trains from the newest checkpoint to the end, a signal, or a rewind."""
    check(run, workdir)
    trainer, save = open_trainer(run, workdir, events, stop, ledger, profile)
    stop.listen()
    try:
        if trainer.step:
            trainer.act()  # what a signal kept the start before from doing
        for batch in trainer.batches():
            trainer.train_step(batch)
            trainer.act()
        return finish(trainer, save, workdir)
    except Exception as error:
        if cli.is_disk_full(error):
            raise UserError(f"no space left on the disk that holds {workdir}") from error
        raise
    finally:
        gc.enable()
        with contextlib.suppress(OSError):  # a full disk is told of already
            trainer.close()


def check(run: Run, workdir: Path) -> None:
    """Refuses what cannot work on this machine, before anything is restored or compiled.

    Raises:
      UserError: a kernel, a sink's package, devices, disk or device memory that is not there.
    """
    config = run.config
    dispatch.check(config.model.kernels(), jax.default_backend())
    sinks.check(config.sinks)
    layouts = stage_layouts(run)
    workdir.mkdir(parents=True, exist_ok=True)
    check_space(workdir, abstract_saved(config, layouts[0]), run)
    cases = [case_of(config, stage) for stage in run.timeline.stages]
    xla.check_memory({case.name: forecast(case).total for case in cases}, config.xla)


def open_trainer(
    run: Run, workdir: Path, events: Events, stop: StopSignal, ledger: Ledger,
    profile: tuple[int, int] | None,
) -> tuple[Trainer, Save]:  # fmt: skip
    """The run as its newest checkpoint left it, with all that it writes to the workdir."""
    config, writes = run.config, processes.is_first()
    policy = config.checkpoint
    checkpoints = Checkpoints(workdir / CHECKPOINTS, policy.keep_last, policy.keep_every)
    gate_log = GateLog(workdir)
    start = start_of(run, checkpoints, gate_log, events)
    timeline, step = run.timeline, start.step
    tokenizer = next(iter(run.corpora.values())).tokenizer()
    metrics = Metrics()
    if writes:
        values = json.loads(config.model_dump_json())
        write_json(workdir / "config.json", values)
        (workdir / "tokenizer").mkdir(exist_ok=True)
        tokenizer.save(workdir / "tokenizer")
        metrics = MetricsWriter(workdir, step, [Sink(s, workdir, values) for s in config.sinks])
    progress = RunProgress(
        timeline.tokens, timeline.consumed(step), config.log_every, quiet=not writes
    )
    for line in (*describe(run), *(context_balances(run) if writes else ())):
        progress.say(line)
    if step:
        progress.say(f"goes on after step {step} ({timeline.consumed(step):,} tokens)")
    gates = Gates(gate_log, run.suite, progress.say)
    average = Average(run, start)
    save = Save(checkpoints, gates, average, step)
    saved = start.saved
    incidents = Incidents(run, events, saved.get("health", ()), saved.get("bad_steps", 0))
    trainer = Trainer(
        run, start, metrics=metrics, progress=progress, incidents=incidents, ledger=ledger,
        stop=stop, trace=Trace(profile if writes else None, workdir, progress.say),
        actions=(CollectGarbage(step), average, Validate(tokenizer), Evaluate(average), save,
                 AskGate(gates, save)),
    )  # fmt: skip
    return trainer, save


def describe(run: Run) -> list[str]:
    """Model, devices, kernels and compiler options, for the log."""
    config = run.config
    peak, source = peak_flops()
    return [
        f"{define(config.model).parameter_count():,} parameters, {config.model.dtype}, "
        f"{jax.device_count()} {jax.devices()[0].device_kind} device(s) of "
        f"{jax.process_count()} process(es); "
        + (f"MFU against {peak:.3g} FLOP/s ({source})" if peak else f"no MFU: {source}"),
        f"kernels: {dispatch.describe(config.model.kernels())}",
        f"XLA: {xla.describe(config.xla, jax.default_backend())}",
    ]


def finish(trainer: Trainer, save: Save, workdir: Path) -> Outcome:
    """Saves, carries out a rewind that is due, and says how training ended."""
    run, step, say = trainer.run, trainer.step, trainer.progress.say
    save(trainer)
    outcome = trainer.outcome
    with trainer.ledger.booking("checkpoint"):
        save.checkpoints.close()
        if outcome is Outcome.DONE:
            save.average.export(trainer, workdir)
    if outcome is Outcome.REWOUND:
        target = trainer.incidents.rewind(save.checkpoints)
        say(f"rewound to the checkpoint of step {target}")
        outcome = Outcome.STOPPED if trainer.stop.agreed else outcome
    if outcome is Outcome.STOPPED:
        name = trainer.stop.name
        say(f"{name} after step {step}: state saved; the same command goes on from here")
    if outcome is Outcome.DONE:
        say(f"finished: {step} steps, {run.timeline.consumed(step):,} tokens in {workdir}")
    return outcome


if __name__ == "__main__":
    define_flags()
    cli.run(main)
