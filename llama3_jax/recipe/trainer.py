"""Training as a loop that anyone can write: the state of a run, a step, and what is due between steps.

    trainer = Trainer(prepare(config))
    for batch in trainer.batches():        # stage after stage
        trainer.train_step(batch)
        trainer.act()                      # whatever of `trainer.actions` is due

Without more arguments it writes nothing: its metrics are in `trainer.metrics.records`. A gate that no
action asks counts as passed. All processes of a run make the same calls in the same order.
"""

import contextlib
import enum
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

from llama3_jax.evaluation.scoring import Scorer
from llama3_jax.model.definition import Params
from llama3_jax.parallel.mesh import Layout
from llama3_jax.parallel.processes import of_first
from llama3_jax.parallel.sharding import put_batch
from llama3_jax.recipe.config import RunConfig
from llama3_jax.recipe.incidents import Incidents
from llama3_jax.recipe.prepare import Run, stage_layouts, stage_model
from llama3_jax.recipe.resume import Start, start_of_run
from llama3_jax.recipe.stage_ahead import StageAhead, step_arguments
from llama3_jax.recipe.step_log import StepLog
from llama3_jax.recipe.timeline import ResolvedStage
from llama3_jax.training.events import Events
from llama3_jax.training.goodput import Ledger
from llama3_jax.training.hardware import peak_flops
from llama3_jax.training.metrics import MemoryMetrics, Metrics
from llama3_jax.training.progress import RunProgress
from llama3_jax.training.state import relayout
from llama3_jax.training.stop import Interrupted, StopSignal
from llama3_jax.training.trace import Trace


class Outcome(enum.Enum):
    """Why training ended: all done, a signal, or a rewind, after which it goes on from before."""

    DONE = enum.auto()
    STOPPED = enum.auto()
    REWOUND = enum.auto()


class Action(Protocol):
    """What is done between steps, when it is due."""

    def due(self, trainer: "Trainer") -> bool: ...
    def __call__(self, trainer: "Trainer") -> Any: ...


class Trainer:
    """A run under way: `state` after `step` steps, on the mesh `layout`."""

    def __init__(
        self, run: Run, start: Start | None = None, *, actions: Sequence[Action] = (),
        metrics: Metrics | None = None, progress: RunProgress | None = None,
        incidents: Incidents | None = None, ledger: Ledger | None = None,
        stop: StopSignal | None = None, trace: Trace | None = None,
    ):  # fmt: skip
        """By default from the run's first step; without a workdir, events are in memory alone."""
        self.run, self.actions = run, list(actions)
        self.layouts = stage_layouts(run)
        start = start or start_of_run(run, self.layouts[0])
        self.step, self.state = start.step, start.state
        self.layout = self.layouts[run.timeline.stage_index(self.step)]
        self.metrics = metrics or MemoryMetrics()
        self.progress = progress or RunProgress(run.timeline.tokens, 0, 1, quiet=True)
        self.incidents = incidents or Incidents(run, Events(None, writes=False))
        self.ledger, self.stop = ledger or Ledger(None), stop or StopSignal()
        self._trace = trace or Trace(None, Path(), print)
        peak, _ = peak_flops()
        devices_peak = peak and peak * jax.device_count()
        self.log = StepLog(run, self.metrics, self.progress, devices_peak, self.incidents)
        self._first_step, self._recorded = self.step, _recorded(self.metrics.of_step)
        self._owed = False  # whether a signal kept something from being measured
        self._ahead, self._stage = StageAhead(), None
        self._step_functions: dict[bool, jax.stages.Compiled] = {}  # with statistics and without
        if self.step < run.timeline.steps:  # else the job ended earlier
            self.ledger.begin(self.step)

    # ---- the loop's parts

    def batches(self) -> Iterator[dict[str, np.ndarray]]:
        """This process's batches, stage after stage, to the end, a signal or a rewind."""
        while self.outcome is None:
            timeline = self.run.timeline  # which a gate may have changed
            index = timeline.stage_index(self.step)
            self._enter(index)
            with self.ledger.booking("setup"):
                first = self.step - timeline.stages[index].first_step
                loader = self._ahead.loader(self.run, index, first, self.layout)
            try:
                for batch in self.ledger.fetched(loader):
                    yield batch
                    if self.outcome is not None:
                        return
            finally:
                loader.close()

    def train_step(self, batch: dict[str, np.ndarray]) -> None:
        """Computes a step, and logs the one before: so the device never waits."""
        step = self.step
        index = self.run.timeline.stage_index(step)
        stage = self.run.timeline.stages[index]
        self._enter(index)
        statistics = statistics_due(self.run.config, step)
        if statistics not in self._step_functions:
            with self.ledger.booking("compile"):
                arguments = step_arguments(self.run, index, self.layout, batch, statistics)
                self._step_functions[statistics] = self._ahead.compiled_step(*arguments)
        rate = np.float32(self.run.timeline.step_learning_rate(step))
        self._trace.before(step)
        self.state, metrics = self._step_functions[statistics](
            self.state, put_batch(batch, self.layout), rate, self.incidents.limits(step)
        )
        self._trace.after(step, metrics)
        self.log.add(step, stage, float(rate), metrics)
        self.step += 1
        self.stop.agree()
        self.ledger.stepped(self.step)
        self._ahead.prepare(self.run, self.layouts, self.step, batch)

    def act(self) -> None:
        """Does what is due after the steps so far."""
        for action in self.actions:
            if self.outcome is not Outcome.REWOUND and action.due(self):
                action(self)

    @property
    def outcome(self) -> Outcome | None:
        """Why training ends now, if it does, once what is due has been done."""
        if self.incidents.rewind_from is not None:
            return Outcome.REWOUND
        if self.step == self.run.timeline.steps and not self._owed:
            return Outcome.DONE
        return Outcome.STOPPED if self.stop.agreed else None

    def close(self) -> None:
        self._ahead.close()
        self._trace.close()
        self.progress.close()
        self.metrics.close()
        self.ledger.write()

    # ---- what actions use

    @contextlib.contextmanager
    def measuring(self) -> Iterator[ResolvedStage]:
        """A pause to measure the parameters, on the mesh of the stage that made them.

        A signal ends the block (see `scorer` and `StopSignal.check`); what it did not do is owed.
        """
        self.log.flush()
        index = self.run.timeline.stage_index(self.step - 1)
        self._reshard(self.layouts[index])
        try:
            with self.ledger.booking("evaluation"):
                yield self.run.timeline.stages[index]
        except Interrupted:
            self._owed = True
        self.log.restart_clock()

    @property
    def tokens(self) -> int:
        """Consumed so far."""
        return self.run.timeline.consumed(self.step)

    def record(self, kind: str, values: dict[str, Any]) -> None:
        """Something that was measured after the steps so far."""
        self.metrics.write(kind, self.step, self.tokens, values)

    def recorded(self, kind: str, model: str | None = None) -> bool:
        """Whether that was measured before the run was interrupted after this step."""
        return self.step == self._first_step and (kind, model) in self._recorded

    def scorer(self, stage: ResolvedStage, tokens: int, params: Params | None = None) -> Scorer:
        """A stage's model with its parameters as they are, or others; `tokens` computed at once."""
        params = self.state.params if params is None else params
        model, xla = stage_model(self.run.config, stage), self.run.config.xla
        return Scorer(model, params, self.layout, tokens, xla, self.stop.check)

    def canonical(self, tree: Any) -> Any:
        """Parameters or the state as checkpoints hold them; None stays None."""
        return None if tree is None else relayout(tree, self.run.config.model, self.layout, None)

    def _enter(self, index: int) -> None:
        """Stage number `index` begins, unless it is under way."""
        if index != self._stage:
            self._stage, self._step_functions = index, {}
        self._reshard(self.layouts[index])

    def _reshard(self, layout: Layout) -> None:
        if layout != self.layout:
            with self.ledger.booking("setup"):
                before, self.layout = self.layout, layout
                config = self.run.config
                self.state = relayout(self.state, config.model, before, layout, config.optimizer)


def statistics_due(config: RunConfig, step: int) -> bool:
    """Whether the step after `step` steps gives statistics of its layers."""
    every = config.statistics.every_steps
    return every is not None and (step + 1) % every == 0


def _recorded(records: Sequence[Mapping[str, Any]]) -> set[tuple[str, str | None]]:
    """Kind and model of process 0's records of a step, on all processes."""
    text = json.dumps([(r["kind"], r.get("model")) for r in records])
    return set(map(tuple, json.loads(bytes(of_first(text.encode())))))
