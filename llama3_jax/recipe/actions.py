"""What a run does between steps beside measuring: it saves, asks its gates, collects garbage.

`due(trainer)` is asked after each step, and once where a run goes on from a checkpoint: for what a
signal kept the start before from doing.
"""

import gc

from llama3_jax.recipe.average import Average
from llama3_jax.recipe.gate import Gates
from llama3_jax.recipe.prepare import apply_verdicts
from llama3_jax.recipe.resume import run_metadata
from llama3_jax.recipe.trainer import Trainer
from llama3_jax.training.checkpoint import Checkpoints

COLLECT_EVERY = 1_000  # steps between collections of Python's garbage


class CollectGarbage:
    """Python's collections at the same steps on all processes, and not of what stays."""

    def __init__(self, first_step: int):
        self._freeze_at = first_step + 1

    def due(self, trainer: Trainer) -> bool:
        return trainer.step == self._freeze_at or trainer.step % COLLECT_EVERY == 0

    def __call__(self, trainer: Trainer) -> None:
        gc.collect()
        if trainer.step == self._freeze_at:
            gc.freeze()
            gc.disable()


class Save:
    """Checkpoints, every so many steps and at the end."""

    def __init__(self, checkpoints: Checkpoints, gates: Gates, average: Average, step: int):
        """`step` is that of the checkpoint from which the run goes on, or 0."""
        self.checkpoints, self.average = checkpoints, average
        self._gates, self._saved = gates, step

    def due(self, trainer: Trainer) -> bool:
        every, step = trainer.run.config.checkpoint.every_steps, trainer.step
        return step != self._saved and (step % every == 0 or step == trainer.run.timeline.steps)

    def __call__(self, trainer: Trainer) -> None:
        """Begins a save, once a step; none where a rewind is due."""
        trainer.log.flush()
        step, run = trainer.step, trainer.run
        if trainer.incidents.rewind_from or step == self._saved:
            return
        self._saved = step
        with trainer.ledger.booking("checkpoint"):
            trainer.metrics.sync()
            trainer.ledger.mark(step)
            incidents = trainer.incidents.state()
            metadata = run_metadata(run.config, run.timeline, run.corpora, step, incidents)
            metadata["gates"] = self._gates.log.verdict_records
            state, average = map(trainer.canonical, (trainer.state, self.average.params))
            self.checkpoints.save(step, state.params, state.optimizer, metadata, average)
            if run.config.checkpoint.wait:
                self.checkpoints.wait()


class AskGate:
    """Measures what a gate decides by; its verdict may lengthen the stage."""

    def __init__(self, gates: Gates, save: Save):
        self._gates, self._save = gates, save

    def due(self, trainer: Trainer) -> bool:
        return self._gates.due(trainer.run.timeline, trainer.step)

    def __call__(self, trainer: Trainer) -> None:
        self._save(trainer)
        if trainer.incidents.rewind_from:
            return
        with trainer.ledger.booking("checkpoint"):
            self._save.checkpoints.wait()  # a gate may take long, and may end the run
        run, gates = trainer.run, self._gates
        with trainer.measuring() as stage:  # the parts that are done are kept
            scorer = trainer.scorer(stage, run.config.evaluation.batch_tokens)
            gates.run(run.timeline, trainer.step, scorer, trainer.stop.check)
        apply_verdicts(run, gates.log.verdicts)
        trainer.progress.set_total(run.timeline.tokens)
