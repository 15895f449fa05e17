"""The average of a run's parameters over its last stage (Llama 3 paper, section 3.4.3)."""

from pathlib import Path

from llama3_jax.model.transformer import Params
from llama3_jax.parallel import processes
from llama3_jax.recipe.prepare import Run, stage_model
from llama3_jax.recipe.timeline import average_steps
from llama3_jax.training.averaging import RunningAverage
from llama3_jax.training.checkpoint import save_model

AVERAGED = "averaged"


def start_average(run: Run, step: int, params: Params | None) -> RunningAverage | None:
    """The run's average after `step` steps, whose parameters so far are `params`; None: it has none.

    The timeline must be decided up to `step`.
    """
    stage = run.timeline.stages[-1]
    if stage.average is None:
        return None
    weights = stage.average.weights or (1.0,) * stage.average.checkpoints
    return RunningAverage(weights, places_passed(run, step), params)


def places_passed(run: Run, step: int) -> int:
    """How many of the average's places the first `step` steps hold."""
    return sum(at <= step for at in average_steps(run.timeline.stages[-1]))


def export_average(workdir: Path, run: Run, params: Params) -> None:
    """Writes the averaged parameters as a model folder, once."""
    if not processes.of_first([(workdir / AVERAGED).exists()])[0]:
        tokenizer = next(iter(run.corpora.values())).info.tokenizer
        model = stage_model(run.config, run.timeline.stages[-1])
        length = max(stage.length for stage in run.timeline.stages)
        save_model(workdir / AVERAGED, model, params, tokenizer, length)
