"""What a run does between steps: averages, measures, saves and asks its gates, in this order.

`due(trainer)` is asked after each step, and once where a run goes on from a checkpoint: for what a
signal kept the start before from doing.
"""

import gc

from llama3_jax.data.tokenizer import Tokenizer
from llama3_jax.recipe.average import AVERAGED, places_passed
from llama3_jax.recipe.gate import Gates
from llama3_jax.recipe.measure import evaluate, passed, validate, write_samples
from llama3_jax.recipe.prepare import apply_verdicts, stage_model
from llama3_jax.recipe.resume import run_metadata
from llama3_jax.recipe.trainer import Trainer
from llama3_jax.training.averaging import RunningAverage
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


class Average:
    """Adds the parameters to the run's average."""

    def due(self, trainer: Trainer) -> bool:
        average = trainer.average
        return average is not None and average.seen < places_passed(trainer.run, trainer.step)

    def __call__(self, trainer: Trainer) -> None:
        trainer.average.add(trainer.state.params)


class Validate:
    """Held-out losses, and samples."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer

    def due(self, trainer: Trainer) -> bool:
        config, timeline = trainer.run.config.validation, trainer.run.timeline
        if config is None or "validation" in trainer.recorded:
            return False
        return passed(timeline, config.every_tokens, trainer.step)

    def __call__(self, trainer: Trainer) -> None:
        run, step, log = trainer.run, trainer.step, (trainer.metrics, trainer.progress)
        with trainer.measuring() as stage:
            params, between = trainer.state.params, trainer.stop.check
            validate(run, stage, params, trainer.layout, step, *log, between)
            if run.config.samples.prompts:
                model = stage_model(run.config, stage)
                write_samples(run, model, trainer.canonical(params), step, self._tokenizer, *log)


class Evaluate:
    """The evaluation suite; after the last step of the averaged model, too."""

    def due(self, trainer: Trainer) -> bool:
        config, timeline = trainer.run.config.evaluation, trainer.run.timeline
        if config is None or not passed(timeline, config.every_tokens, trainer.step):
            return False
        return bool(self._models(trainer))

    def __call__(self, trainer: Trainer) -> None:
        with trainer.measuring() as stage:
            for name, average in self._models(trainer).items():
                scorer = trainer.scorer(stage, average and average.params)
                evaluate(trainer.run, scorer, name, trainer.step, trainer.metrics, trainer.progress)

    def _models(self, trainer: Trainer) -> dict[str, RunningAverage | None]:
        models = {"last": None}
        if trainer.average and trainer.step == trainer.run.timeline.steps:
            models[AVERAGED] = trainer.average
        return {n: a for n, a in models.items() if f"evaluation/{n}" not in trainer.recorded}


class Save:
    """Checkpoints, every so many steps and at the end."""

    def __init__(self, checkpoints: Checkpoints, gates: Gates, step: int):
        """`step` is that of the checkpoint from which the run goes on, or 0."""
        self.checkpoints, self._gates, self._saved = checkpoints, gates, step

    def due(self, trainer: Trainer) -> bool:
        every, step = trainer.run.config.checkpoint.every_steps, trainer.step
        return step != self._saved and (step % every == 0 or step == trainer.run.timeline.steps)

    def __call__(self, trainer: Trainer) -> None:
        trainer.log.flush()
        with trainer.ledger.booking("checkpoint"):
            self.save(trainer)

    def save(self, trainer: Trainer) -> None:
        """Begins a save, once a step; none where a rewind is due."""
        step, run = trainer.step, trainer.run
        if trainer.incidents.rewind_from or step == self._saved:
            return
        self._saved = step
        trainer.metrics.sync()
        trainer.ledger.mark(step)
        incidents = trainer.incidents.state()
        metadata = run_metadata(run.config, run.timeline, run.corpora, step, incidents)
        metadata["gates"] = self._gates.log.verdict_records
        state, average = trainer.canonical(trainer.state), None
        if trainer.average and trainer.average.params:
            average = trainer.canonical(trainer.average.params)
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
            gates.run(run.timeline, trainer.step, trainer.scorer(stage), trainer.stop.check)
        apply_verdicts(run, gates.log.verdicts)
        trainer.progress.set_total(run.timeline.tokens)
