"""The average of a run's parameters over its last stage (Llama 3 paper, section 3.4.3)."""

from pathlib import Path

from llama3_jax.model.definition import Params
from llama3_jax.parallel import processes
from llama3_jax.recipe.prepare import Run, stage_model
from llama3_jax.recipe.resume import Start
from llama3_jax.recipe.timeline import average_steps
from llama3_jax.recipe.trainer import Trainer
from llama3_jax.training.averaging import RunningAverage
from llama3_jax.training.checkpoint import save_model

AVERAGED = "averaged"


class Average:
    """Adds the parameters to the average, where the timeline says."""

    def __init__(self, run: Run, start: Start):
        """Where the run has none, none is ever due."""
        self._running, average = None, run.timeline.stages[-1].average
        if average:
            weights = average.weights or (1.0,) * average.checkpoints
            seen = _places_passed(run, start.step)
            self._running = RunningAverage(weights, seen, start.average)

    @property
    def params(self) -> Params | None:
        """The average so far."""
        return self._running and self._running.params

    def due(self, trainer: Trainer) -> bool:
        running = self._running
        return running is not None and running.seen < _places_passed(trainer.run, trainer.step)

    def __call__(self, trainer: Trainer) -> None:
        self._running.add(trainer.state.params)

    def export(self, trainer: Trainer, workdir: Path) -> None:
        """Writes the averaged parameters as a model folder, once."""
        if self.params and not processes.of_first([(workdir / AVERAGED).exists()])[0]:
            run, params = trainer.run, trainer.canonical(self.params)
            tokenizer = next(iter(run.corpora.values())).info.tokenizer
            model = stage_model(run.config, run.timeline.stages[-1])
            length = max(stage.length for stage in run.timeline.stages)
            save_model(workdir / AVERAGED, model, params, tokenizer, length)


def _places_passed(run: Run, step: int) -> int:
    """How many of the average's places the first `step` steps hold."""
    return sum(at <= step for at in average_steps(run.timeline.stages[-1]))
