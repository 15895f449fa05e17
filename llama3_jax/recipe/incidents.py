"""What a run does about a step that went wrong: notes it, skips it, rewinds, or stops.

The update of such a step is skipped on the device already (see `training/health.py`); here the
event is written down and a rewind is prepared: the checkpoints after the one to go back to are
moved aside, then the event names the batches to skip, and the run goes on as any resumed run
does.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from absl import logging

from llama3_jax.errors import UserError
from llama3_jax.parallel import processes
from llama3_jax.recipe.prepare import Run
from llama3_jax.training.checkpoint import Checkpoints
from llama3_jax.training.events import Events
from llama3_jax.training.health import Band, Finding, Health
from llama3_jax.training.metrics import json_number
from llama3_jax.training.step import Limits


class Incidents:
    """Judges the steps of a run; `bad_steps` counts those in a row that were not applied."""

    def __init__(
        self, run: Run, events: Events, state: Iterable[Sequence[float]] = (), bad_steps: int = 0
    ):
        self._run, self._events = run, events
        self._health = Health(run.config.health, state)
        self.bad_steps = bad_steps
        self.rewind_from: dict[str, Any] | None = None

    def limits(self, step: int) -> Limits:
        """For the step function (see `Health.limits`)."""
        return self._health.limits(step, self._run.timeline.stage_index(step))

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold for a resumed run to judge as this one."""
        left_out = {str(stage): numbers for stage, numbers in self._events.left_out().items()}
        return {
            "health": self._health.state(), "bad_steps": self.bad_steps, "left_out": left_out
        }  # fmt: skip

    def judge(self, step: int, loss: float, grad_norm: float) -> None:
        """Takes note of a step, in order; once a rewind is due, of none any more.

        Raises:
          UserError: the config says to stop, or too many steps in a row were not applied.
        """
        if self.rewind_from is not None:
            return
        stage = self._run.timeline.stage_index(step)
        finding = self._health.judge(step, stage, loss, grad_norm)
        if finding is None:
            self.bad_steps = 0
            return
        event = self._event(step, stage, loss, grad_norm, finding)
        level = logging.INFO if finding.action == "record" else logging.WARNING
        logging.log(level, "%s", _sentence(event))
        if finding.action == "rewind":
            if self._events.rewinds() >= self._run.config.health.max_rewinds:
                raise UserError(f"{_sentence(event)}; the run has been rewound "
                                f"{self._events.rewinds()} times (config.health.max_rewinds)")  # fmt: skip
            self.rewind_from = event
            return
        number = self._events.add(event)
        if finding.action == "stop":
            raise UserError(
                f"{_sentence(event)}; look at it with --replay_event={number}, "
                "or go on with another policy in config.health"
            )
        self.bad_steps = self.bad_steps + 1 if finding.action == "skip" else 0
        if self.bad_steps >= self._run.config.max_bad_steps:
            reason = "not finite" if "not_finite" in finding.kinds else "over the band"
            ids = event["documents"]
            raise UserError(
                f"loss or gradients {reason} for {self.bad_steps} steps in a row, the last being "
                f"step {step} with {len(ids)} documents: {', '.join(ids)}"
            )

    def rewind(self, checkpoints: Checkpoints) -> int:
        """Carries out the rewind that is due; returns the step to go on from.

        Raises:
          UserError: no checkpoint is old enough; then nothing is changed.
        """
        event, timeline = self.rewind_from, self._run.timeline
        back = self._run.config.health.rewind_steps
        try:
            target, place = checkpoints.go_back(max(event["step"] - back, 0))
        except UserError as error:
            raise UserError(
                f"{_sentence(event)}, but {error}: lower config.health.rewind_steps ({back}) or "
                "keep more checkpoints (config.checkpoint.keep_last, keep_every)"
            ) from None
        if place:
            logging.warning("later checkpoints were moved to %s", place)
        left_out: dict[int, list[int]] = {}
        for step in range(target, event["step"] + 1):
            index = timeline.stage_index(step)
            shape = self._run.batches.stages[index]
            number = shape.batch(step - timeline.stages[index].first_step)
            left_out.setdefault(index, []).append(number)
        # The event comes after the move: a crash in between repeats the spike, and then this.
        keys = {str(stage): numbers for stage, numbers in left_out.items()}
        self._events.add(event | {"rewound_to": target, "left_out": keys})
        processes.all_agree(True)
        return target

    def _event(
        self, step: int, stage: int, loss: float, grad_norm: float, finding: Finding
    ) -> dict[str, Any]:
        # Every document is read for its id: by the process that writes the event alone.
        entries = self._run.batches.documents(step) if processes.is_first() else []
        first = self._run.timeline.stages[stage].first_step
        return {
            "kinds": list(finding.kinds),
            "action": finding.action,
            "stage": self._run.timeline.stages[stage].name,
            "step": step,
            "batch": self._run.batches.stages[stage].batch(step - first),
            "tokens": self._run.timeline.consumed(step),
            "loss": json_number(loss),
            "grad_norm": json_number(grad_norm),
            "loss_band": _values(finding.loss_band),
            "grad_norm_band": _values(finding.grad_norm_band),
            "documents": sorted({f"{entry.source}:{entry.document}" for entry in entries}),
        }


def _values(band: Band | None) -> dict[str, float] | None:
    return band and band._asdict()


def _sentence(event: dict[str, Any]) -> str:
    """An event in a line."""
    parts = []
    for name in ("loss", "grad_norm"):
        band = event[f"{name}_band"]
        limit = f" (band {band['median']:.4g}, limit {band['limit']:.4g})" if band else ""
        parts.append(f"{name} {float(event[name]):.4g}{limit}")
    done = {"record": "applied all the same", "skip": "not applied", "rewind": "rewinding",
            "stop": "stopping"}[event["action"]]  # fmt: skip
    what = {"not_finite": "loss or gradients are not finite", "loss_spike": "loss spike",
            "grad_norm_spike": "gradient-norm spike"}  # fmt: skip
    kinds = ", ".join(what[kind] for kind in event["kinds"])
    return f"step {event['step']}: {kinds}: {done}; {', '.join(parts)}"
