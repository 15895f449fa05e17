"""Computes a step of events.jsonl once more, from the newest checkpoint before it."""

import json
import math
from pathlib import Path
from typing import Any

from absl import logging

from llama3_jax.errors import UserError
from llama3_jax.recipe.gate import GateLog
from llama3_jax.recipe.incidents import Incidents
from llama3_jax.recipe.prepare import Run, apply_verdicts, skip_batches, stage_layouts
from llama3_jax.recipe.resume import Start, abstract_saved, start_of_checkpoint, start_of_run
from llama3_jax.recipe.trainer import Trainer
from llama3_jax.training.checkpoint import CHECKPOINTS, Checkpoints, DamagedCheckpoint
from llama3_jax.training.events import Events


def replay(run: Run, workdir: Path, number: int) -> str:
    """The steps from a checkpoint to an event's; writes nothing.

    The same bit for bit on CPUs, and on GPUs where XLA is deterministic: without that, small
    differences say nothing.

    Without a checkpoint that is old enough, from the run's first step.

    Returns:
      The event's loss and gradient norm as recorded and as computed now, in lines to print.

    Raises:
      UserError: there is no such event, or nothing to start from.
    """
    events = Events(workdir, writes=False)
    if not 0 <= number < len(events.events):
        raise UserError(
            f"--replay_event={number}: {workdir} has {len(events.events)} events, numbered from 0"
        )
    event, left_out = events.events[number], events.left_out(before=number)
    run, last = skip_batches(run, left_out), event["step"]
    apply_verdicts(run, [v for v in GateLog(workdir).verdicts if v.step <= last])
    start = _start(run, workdir, last, left_out)
    incidents = _OnlyJudged(run, events, start.saved.get("health", ()))
    trainer = Trainer(run, start, incidents=incidents)
    first = start.step
    del start  # or its arrays would stay
    for batch in trainer.batches():
        trainer.train_step(batch)
        if trainer.step > last:
            break
    trainer.log.flush()
    trainer.close()
    record = trainer.metrics.records[-1]
    return _table(event, first, float(record["loss"]), float(record["grad_norm"]))


class _OnlyJudged(Incidents):
    """Judges the steps, on which the limits of later ones depend, and does nothing about them."""

    def judge(self, step: int, loss: float, grad_norm: float) -> None:
        self._health.judge(step, self._run.timeline.stage_index(step), loss, grad_norm)


def _start(run: Run, workdir: Path, last: int, left_out: dict[int, list[int]]) -> Start:
    """The newest whole checkpoint up to step `last` that the event's run had come by, or its beginning.

    Raises:
      UserError: there is none, and the run began with another run's.
    """
    layouts, timeline = stage_layouts(run), run.timeline
    checkpoints, steps = None, []
    if (workdir / CHECKPOINTS).is_dir():
        checkpoints = Checkpoints(workdir / CHECKPOINTS, keep_last=1, keep_every=1)  # saves nothing
        steps = [step for step in checkpoints.steps() if step <= last]
    for step in reversed(steps):
        layout = layouts[timeline.stage_index(step)]
        try:
            if _same_batches(checkpoints.metadata(step), left_out, run, step):
                restored = checkpoints.restore(step, *abstract_saved(run.config, layout))
                return start_of_checkpoint(run, layout, restored)
        except DamagedCheckpoint as error:
            logging.warning("checkpoint of step %d is damaged (%s): passed over", step, error)
    if run.config.init_from:
        raise UserError(f"{workdir}: no checkpoint of step {last} or before, and the run began "
                        "with another run's (config.init_from)")  # fmt: skip
    return start_of_run(run, layouts[0])


def _same_batches(
    saved: dict[str, Any], left_out: dict[int, list[int]], run: Run, step: int
) -> bool:
    """Whether a checkpoint comes from the batches before `step`: later rewinds may differ."""
    before = {int(stage): numbers for stage, numbers in saved.get("left_out", {}).items()}
    for index in range(run.timeline.stage_index(step) + 1):
        stage = run.timeline.stages[index]
        ours, theirs = left_out.get(index, []), before.get(index, [])
        if step < stage.first_step + stage.steps:  # the stage is under way
            at = run.batches.stages[index].batch(step - stage.first_step)
            ours, theirs = ([n for n in numbers if n < at] for numbers in (ours, theirs))
        if list(ours) != list(theirs):
            return False
    return True


def _table(event: dict[str, Any], start: int, loss: float, grad_norm: float) -> str:
    lines = [
        f"event {event['event']}: {', '.join(event['kinds'])}, {event['action']}: step "
        f"{event['step']}, batch {event['batch']} of stage {event['stage']}; computed again from "
        f"step {start}",
    ]
    for name, now in (("loss", loss), ("grad_norm", grad_norm)):
        recorded = float(event[name])
        same = "the same" if now == recorded or math.isnan(now) and math.isnan(recorded) else (
            f"differs by {now - recorded:.3g}")  # fmt: skip
        band = event[f"{name}_band"]
        limit = f", band {band['median']!r}, limit {band['limit']!r}" if band else ", no band yet"
        lines.append(f"{name}: recorded {recorded!r}, now {now!r}: {same}{limit}")
    lines.append(f"documents: {json.dumps(event['documents'], ensure_ascii=False)}")
    return "\n".join(lines)
