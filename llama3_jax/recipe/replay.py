"""Computes a step of events.jsonl once more, from the newest checkpoint before it."""

import json
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging

from llama3_jax.errors import UserError
from llama3_jax.parallel.mesh import make_mesh
from llama3_jax.parallel.sharding import put_batch
from llama3_jax.recipe.gate import GateLog
from llama3_jax.recipe.prepare import Run, follow, leave_out
from llama3_jax.training.checkpoint import CHECKPOINTS, Checkpoints, DamagedCheckpoint, Restored
from llama3_jax.training.events import Events
from llama3_jax.training.health import Health
from llama3_jax.training.state import TrainState, abstract_state, init_state, relayout
from llama3_jax.training.step import compile_step


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
    run, last = leave_out(run, left_out), event["step"]
    timeline = follow(run, [v for v in GateLog(workdir).verdicts if v.step <= last])
    config = run.config
    layouts = [make_mesh(stage.mesh) for stage in timeline.stages]
    restored = _restore(run, workdir, layouts, last, left_out)
    if restored:
        step = restored.step
        layout = layouts[timeline.stage_index(step)]
        state = TrainState(restored.params, restored.optimizer)
        state = relayout(state, config.model, None, layout, config.optimizer)
        health = Health(config.health, restored.metadata.get("health", ()))
    elif config.init_from:
        raise UserError(f"{workdir}: no checkpoint of step {last} or before, and the run began "
                        "with another run's (config.init_from)")  # fmt: skip
    else:
        step, layout = 0, layouts[0]
        state = init_state(config.model, config.optimizer, layout, config.seed)
        health = Health(config.health)
    start = step
    while step <= last:
        index = timeline.stage_index(step)
        stage = timeline.stages[index]
        if layouts[index] != layout:
            state = relayout(state, config.model, layout, None)
            layout = layouts[index]
            state = relayout(state, config.model, None, layout, config.optimizer)
        model = config.model.model_copy(update={"rope": stage.rope})
        step_function = compile_step(
            model, config.optimizer, layout, stage.micro_batches, len(run.batches.sources),
            config.xla,
        )  # fmt: skip
        for batch in run.batches.load(index, step - stage.first_step):
            rate = np.float32(timeline.step_learning_rate(step))
            limits = health.limits(step, index)
            state, on_device = step_function(state, put_batch(batch, layout), rate, limits)
            metrics = jax.device_get(on_device)
            health.judge(step, index, float(metrics.loss), float(metrics.grad_norm))
            step += 1
            if step > last:
                break
    return _table(event, start, float(metrics.loss), float(metrics.grad_norm))


def _restore(
    run: Run, workdir: Path, layouts: list, last: int, left_out: dict[int, list[int]]
) -> Restored | None:
    """The newest whole checkpoint up to step `last` that the event's run had come by."""
    config, timeline = run.config, run.timeline
    if not (workdir / CHECKPOINTS).is_dir():
        return None
    checkpoints = Checkpoints(workdir / CHECKPOINTS, keep_last=1, keep_every=1)  # none is saved
    for step in reversed([s for s in checkpoints.steps() if s <= last]):
        abstract = abstract_state(
            config.model, config.optimizer, layouts[timeline.stage_index(step)], saved=True
        )
        try:
            if _same_batches(checkpoints.metadata(step), left_out, run, step):
                return checkpoints.restore(step, *abstract)
        except DamagedCheckpoint as error:
            logging.warning("checkpoint of step %d is damaged (%s): passed over", step, error)
    return None


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
