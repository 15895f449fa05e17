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
import shutil
import signal
from pathlib import Path

import jax
import numpy as np
from absl import flags

from llama3_jax import cli, xla
from llama3_jax.errors import UserError
from llama3_jax.files import check_folder, write_json
from llama3_jax.folder_lock import locked
from llama3_jax.kernels import dispatch
from llama3_jax.model.definition import Params, define
from llama3_jax.parallel import processes
from llama3_jax.parallel.liveness import Watch
from llama3_jax.parallel.mesh import Layout, make_mesh
from llama3_jax.parallel.sharding import put_batch
from llama3_jax.planning.case import case_of
from llama3_jax.planning.check import check_run
from llama3_jax.planning.constants import load_constants
from llama3_jax.planning.memory import forecast
from llama3_jax.recipe.config import RunConfig
from llama3_jax.recipe.gate import GateLog, Gates
from llama3_jax.recipe.incidents import Incidents
from llama3_jax.recipe.measure import (
    averaged_now,
    evaluate,
    evaluation_due,
    recorded,
    scorer,
    start_average,
)
from llama3_jax.recipe.observe import StepLog, due, validate, write_samples
from llama3_jax.recipe.prepare import Run, context_balances, follow, leave_out, prepare
from llama3_jax.recipe.replay import replay
from llama3_jax.recipe.resume import check_same_run, first_state, run_metadata
from llama3_jax.recipe.timeline import average_steps
from llama3_jax.schema import parse
from llama3_jax.training import sinks
from llama3_jax.training.checkpoint import (
    CHECKPOINTS,
    Checkpoints,
    restore_newest,
    save_model,
    state_bytes,
)
from llama3_jax.training.events import Events
from llama3_jax.training.goodput import GOODPUT_FILE, Ledger
from llama3_jax.training.hardware import peak_flops
from llama3_jax.training.metrics import MetricsWriter, NoMetrics
from llama3_jax.training.progress import RunProgress
from llama3_jax.training.sinks import Sink
from llama3_jax.training.state import TrainState, abstract_state, relayout
from llama3_jax.training.step import compile_step
from llama3_jax.training.trace import Trace, parse_steps
from llama3_jax.training.watchdog import Watchdog

FLAGS = flags.FLAGS
AVERAGED = "averaged"
COLLECT_EVERY = 1_000  # steps between collections of Python's garbage


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
        if FLAGS.workdir:  # as that run went: without what it left out, by what its gates decided
            workdir = Path(FLAGS.workdir)
            run = leave_out(run, Events(workdir, writes=False).left_out())
            follow(run, GateLog(workdir).verdicts)
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
    watchdog.start()
    code = None
    try:
        while code is None:
            # A rewind is a resume: from an earlier checkpoint, without the batches of its event.
            part = leave_out(run, events.left_out())
            code = train_on(part, workdir, events, stop, ledger, profile)
    finally:
        watchdog.close()
    return code


def train_on(
    run: Run,
    workdir: Path,
    events: Events,
    stop: "StopSignal",
    ledger: Ledger,
    profile: tuple[int, int] | None = None,
) -> int | None:
    """As `train`, from the newest checkpoint; None after a rewind, which made an older one so."""
    config, timeline = run.config, run.timeline
    model, optimizer = config.model, config.optimizer
    dispatch.check(model.kernels(), jax.default_backend())
    sinks.check(config.sinks)
    layouts = [make_mesh(stage.mesh) for stage in timeline.stages]
    parts = [processes.local_rows(layout.mesh) for layout in layouts]
    abstract = [abstract_state(model, optimizer, layout, saved=True) for layout in layouts]
    workdir.mkdir(parents=True, exist_ok=True)
    check_space(workdir, abstract[0], run)
    cases = [case_of(config, stage) for stage in timeline.stages]
    xla.check_memory({case.name: forecast(case).total for case in cases}, config.xla)

    # ---- state: the newest valid checkpoint, or a fresh one
    policy = config.checkpoint
    checkpoints = Checkpoints(workdir / CHECKPOINTS, policy.keep_last, policy.keep_every)
    gate_log, so_far = GateLog(workdir), Incidents(run, events).state()

    def check(saved: dict) -> None:
        gate_log.back_to(saved["step"], saved.get("gates", ()))
        timeline = follow(run, gate_log.verdicts)
        check_same_run(saved, run_metadata(config, timeline, run.corpora, saved["step"], so_far))

    restored = restore_newest(
        checkpoints, lambda step: abstract[run.timeline.stage_index(step)], check
    )
    average = None
    if restored:
        timeline = run.timeline
        step, saved = restored.step, restored.metadata
        layout = layouts[timeline.stage_index(step)]
        state = TrainState(restored.params, restored.optimizer)
        state = relayout(state, model, None, layout, optimizer)
        if restored.average is not None:
            average = relayout(restored.average, model, None, layout)
        del restored  # or its arrays would stay as long as the run
    else:
        step, saved, layout = 0, {}, layouts[0]
        gate_log.back_to(0, ())
        state = first_state(config, run.corpora, layout)
    tokenizer = next(iter(run.corpora.values())).tokenizer()

    # ---- log
    writes = processes.is_first()
    if writes:
        values = json.loads(config.model_dump_json())
        write_json(workdir / "config.json", values)
        (workdir / "tokenizer").mkdir(exist_ok=True)
        tokenizer.save(workdir / "tokenizer")
        metrics = MetricsWriter(workdir, step, [Sink(s, workdir, values) for s in config.sinks])
    else:
        metrics = NoMetrics()
    progress = RunProgress(
        timeline.tokens, timeline.consumed(step), config.log_every, quiet=not writes
    )
    peak, peak_source = peak_flops()
    progress.say(
        f"{define(model).parameter_count():,} parameters, {model.dtype}, "
        f"{jax.device_count()} {jax.devices()[0].device_kind} device(s) of "
        f"{jax.process_count()} process(es); "
        + (f"MFU against {peak:.3g} FLOP/s ({peak_source})" if peak else f"no MFU: {peak_source}")
    )
    for line in context_balances(run) if writes else ():
        progress.say(line)
    progress.say(f"kernels: {dispatch.describe(model.kernels())}")
    progress.say(f"XLA: {xla.describe(config.xla, jax.default_backend())}")
    if step:
        progress.say(f"goes on after step {step} ({timeline.consumed(step):,} tokens)")
    incidents = Incidents(run, events, saved.get("health", ()), saved.get("bad_steps", 0))
    if step < timeline.steps:  # else the job ended earlier
        ledger.begin(step)
    log = StepLog(run, metrics, progress, peak and peak * jax.device_count(), incidents)
    gates = Gates(gate_log, run.suite, progress.say)
    average = start_average(run, step, average)

    # ---- the loop: stage after stage, step after step
    stop.listen()

    def save() -> None:
        if incidents.rewind_from:
            return
        metrics.sync()
        ledger.mark(step)
        metadata = run_metadata(config, timeline, run.corpora, step, incidents.state())
        metadata["gates"] = gate_log.verdict_records
        canonical = relayout(state, model, layout, None)
        averaged = average and average.params and relayout(average.params, model, layout, None)
        checkpoints.save(step, canonical.params, canonical.optimizer, metadata, averaged)
        if config.checkpoint.wait:
            checkpoints.wait()

    def lie_on(new: Layout) -> None:
        nonlocal state, layout
        if new != layout:
            canonical, layout = relayout(state, model, layout, None), new
            state = relayout(canonical, model, None, layout, optimizer)

    def interrupted() -> bool:
        stop.agree()
        return stop.agreed

    owed = False

    def measure(done: frozenset[str] = frozenset()) -> None:
        """Validation and evaluation, where they are due and not `done`; a signal ends them, and the
        next start does what is owed."""
        nonlocal owed
        held_out = due(config, timeline, step) and "validation" not in done
        models = {"last": None, AVERAGED: average} if step == timeline.steps else {"last": None}
        models = {n: a for n, a in models.items() if n == "last" or a}
        models = {n: a for n, a in models.items() if f"evaluation/{n}" not in done}
        if not evaluation_due(run, step):
            models = {}
        if not held_out and not models:
            return
        log.flush()
        index = timeline.stage_index(step - 1)
        stage = timeline.stages[index]
        stage_model = model.model_copy(update={"rope": stage.rope})
        lie_on(layouts[index])
        try:
            with ledger.booking("evaluation"):
                if held_out:
                    validate(run, stage_model, layout, stage, state.params, step, metrics, progress,
                             stop.check)  # fmt: skip
                    if config.samples.prompts:
                        params = relayout(state.params, model, layout, None)
                        write_samples(run, stage_model, params, step, tokenizer, metrics, progress)
                        del params
                for name, averaged in models.items():
                    params = averaged.params if averaged else state.params
                    scored = scorer(run, stage_model, params, layout, stop.check)
                    evaluate(run, scored, name, step, metrics, progress)
        except Interrupted:
            owed = True
        log.restart_clock()

    trace = Trace(profile if writes else None, workdir, progress.say)
    first_step = step

    def collect_garbage(step: int) -> None:
        """Python's collections at the same steps on all processes, and not of what stays."""
        if step == first_step + 1:
            gc.collect()
            gc.freeze()
            gc.disable()
        elif step % COLLECT_EVERY == 0:
            gc.collect()

    try:
        if step:  # a signal may have kept the start before from it
            measure(recorded(metrics.of_step))
        while (step < timeline.steps or gates.due(timeline, step)) and not (
            stop.agreed or incidents.rewind_from
        ):
            ledger.enter("setup")
            if gates.due(timeline, step):  # asked on the mesh of the stage that has ended
                log.flush()
                if incidents.rewind_from:
                    continue
                index = timeline.stage_index(step - 1)
                lie_on(layouts[index])
                with ledger.booking("checkpoint"):
                    save()
                    checkpoints.wait()  # it may take long, and may end the run
                stage_model = model.model_copy(update={"rope": timeline.stages[index].rope})
                with ledger.booking("evaluation"):
                    model_on_mesh = scorer(run, stage_model, state.params, layout, stop.check)
                    with contextlib.suppress(Interrupted):  # the parts that are done are kept
                        gates.run(timeline, step, model_on_mesh, interrupted)
                    del model_on_mesh
                timeline = follow(run, gate_log.verdicts)
                progress.set_total(timeline.tokens)
                log.restart_clock()
                continue
            index = timeline.stage_index(step)
            stage = timeline.stages[index]
            stage_model = model.model_copy(update={"rope": stage.rope})
            lie_on(layouts[index])
            step_function = compile_step(
                stage_model, optimizer, layout, stage.micro_batches, len(run.batches.sources),
                config.xla,
            )  # fmt: skip
            host, hosts = parts[index]
            loader = run.batches.load(
                index,
                step - stage.first_step,
                host=host,
                hosts=hosts,
                workers=config.data.workers,
            )
            for batch in ledger.fetched(loader):
                trace.before(step)
                rate = np.float32(timeline.step_learning_rate(step))
                with ledger.calling(step_function, stage.length, stage.batch_rows):
                    state, step_metrics = step_function(
                        state, put_batch(batch, layout), rate, incidents.limits(step)
                    )
                trace.after(step, step_metrics)
                log.add(step, stage, float(rate), step_metrics)
                step += 1
                collect_garbage(step)
                if averaged_now(run, step):
                    average.add(state.params)
                stop.agree()
                ledger.stepped(step)
                measure()
                if step % policy.every_steps == 0 or step == timeline.steps:
                    log.flush()
                    with ledger.booking("checkpoint"):
                        save()
                if stop.agreed or incidents.rewind_from:
                    break
        log.flush()
        with ledger.booking("checkpoint"):
            save()
            checkpoints.close()
            done = step == timeline.steps and not (owed or gates.due(timeline, step))
            if done and average and not incidents.rewind_from:
                export_average(workdir, run, relayout(average.params, model, layout, None))
        if incidents.rewind_from:
            target = incidents.rewind(checkpoints)
            progress.say(f"rewound to the checkpoint of step {target}")
    except Exception as error:
        if cli.is_disk_full(error):
            raise UserError(f"no space left on the disk that holds {workdir}") from error
        raise
    finally:
        trace.close()
        gc.enable()
        progress.close()
        with contextlib.suppress(OSError):  # a full disk is told of already
            metrics.close()
            ledger.write()
    if incidents.rewind_from and not stop.agreed:
        return None
    unfinished = not done or incidents.rewind_from
    if stop.agreed and unfinished:
        progress.say(
            f"{stop.name} after step {step}: state saved; the same command goes on from here"
        )
        return stop.exit_code
    progress.say(f"finished: {step} steps, {timeline.consumed(step):,} tokens in {workdir}")
    return 0


def export_average(workdir: Path, run: Run, params: Params) -> None:
    """Writes the averaged parameters as a model folder, once."""
    if not processes.of_first([(workdir / AVERAGED).exists()])[0]:
        tokenizer = next(iter(run.corpora.values())).info.tokenizer
        model = run.config.model.model_copy(update={"rope": run.timeline.stages[-1].rope})
        length = max(stage.length for stage in run.timeline.stages)
        save_model(workdir / AVERAGED, model, params, tokenizer, length)


def check_space(workdir: Path, abstract: TrainState, run: Run) -> None:
    """Refuses to start where the checkpoints to be kept would not fit on the disk.

    Raises:
      UserError: names what is free and what is needed.
    """
    if not processes.is_first():  # the folder may be shared, and hold many files
        return
    policy, steps = run.config.checkpoint, run.timeline.steps
    saves = sorted({*range(policy.every_steps, steps, policy.every_steps), steps})
    # One more than is kept: the new one is written before the oldest goes.
    kept = set(saves[-policy.keep_last - 1 :])
    if policy.keep_every:
        kept |= {step for step in saves if step % policy.keep_every == 0}
    need, last = state_bytes(abstract) * len(kept), run.timeline.stages[-1]
    if last.average:  # in the checkpoints after its first place, and in a folder of its own
        first = average_steps(last)[0]
        need += state_bytes(abstract.params) * (sum(step >= first for step in kept) + 1)
    present = sum(p.stat().st_size for p in (workdir / CHECKPOINTS).rglob("*") if p.is_file())
    free = shutil.disk_usage(workdir).free
    if free + present < need:
        raise UserError(
            f"{workdir}: {free / 1e6:,.1f} MB are free, {len(kept)} checkpoints need "
            f"{need / 1e6:,.1f} MB; free space or lower checkpoint.keep_last"
            + (" or raise checkpoint.keep_every" if policy.keep_every else "")
        )


class Interrupted(Exception):
    """A signal came while something was measured."""


class StopSignal:
    """SIGTERM (a scheduler wants the machine) and SIGINT (Ctrl-C) end the run after the step.

    With several processes, a signal to any one of them stops all after the same step.
    """

    EXIT_CODES = {signal.SIGINT: cli.EXIT_INTERRUPTED, signal.SIGTERM: cli.EXIT_REQUEUE}

    def __init__(self) -> None:
        self.agreed, self.name, self.exit_code = False, "", 0
        self._received = 0

    def listen(self) -> None:
        """Takes signals from now on; before, they end the process."""
        self._shared = processes.SharedNumber()
        for number in self.EXIT_CODES if not self._received else ():
            signal.signal(number, self._receive)

    def agree(self) -> None:
        """Called once a step by all processes: learns whether to stop, and by which signal."""
        if number := self._shared.exchange(self._received):
            self.agreed, self.name = True, signal.Signals(number).name
            self.exit_code = self.EXIT_CODES[number]

    def check(self) -> None:
        """As `agree`, where the step is over and something is measured.

        Raises:
          Interrupted: the run is to stop.
        """
        self.agree()
        if self.agreed:
            raise Interrupted

    def _receive(self, number: int, _) -> None:
        self._received = number
        signal.signal(number, signal.SIG_DFL)  # a second one ends the process at once


if __name__ == "__main__":
    define_flags()
    cli.run(main)
