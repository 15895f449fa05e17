"""Evaluation inside a run: at token counts, at the end, and of the averaged model beside the last."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from llama3_jax.evaluation.scoring import Scorer
from llama3_jax.evaluation.suite import needle_summary
from llama3_jax.model.config import ModelConfig
from llama3_jax.model.definition import Params
from llama3_jax.parallel.mesh import Layout
from llama3_jax.parallel.processes import of_first
from llama3_jax.recipe.prepare import Run, needle_lengths
from llama3_jax.recipe.timeline import average_steps
from llama3_jax.training.averaging import RunningAverage
from llama3_jax.training.metrics import MetricsWriter
from llama3_jax.training.progress import RunProgress


def scorer(
    run: Run, model: ModelConfig, params: Params, layout: Layout, between: Callable[[], None]
) -> Scorer:
    tokens = run.config.evaluation.batch_tokens
    return Scorer(model, params, layout, tokens, run.config.xla, between)


def recorded(records: Sequence[Mapping[str, Any]]) -> frozenset[str]:
    """What has been measured after a step, by its records on process 0: "validation", and
    "evaluation" with the model's name; the same on all processes."""
    kinds = ("validation", "evaluation/last", "evaluation/averaged")
    names = {f"{r['kind']}/{r['model']}" if "model" in r else r["kind"] for r in records}
    return frozenset(kinds[n] for n in of_first([n for n, k in enumerate(kinds) if k in names]))


def evaluation_due(run: Run, step: int) -> bool:
    """Whether the evaluation runs after `step` steps: its tokens were passed, or the end."""
    if run.config.evaluation is None:
        return False
    if step == run.timeline.steps:
        return True
    every = run.config.evaluation.every_tokens
    passed = run.timeline.consumed
    return every is not None and passed(step) // every > passed(step - 1) // every


def evaluate(
    run: Run, scored: Scorer, name: str, step: int, metrics: MetricsWriter, progress: RunProgress
) -> None:
    """Records what the suite measures of a model: needles, too, after the last step."""
    suite, tokens = run.suite, run.timeline.consumed(step)
    scores = {}
    for part in suite.short_parts:
        scores |= {key: metric.value for key, metric in suite.short(part, scored).items()}
    record = {"model": name, "scores": scores}
    if suite.config.needle and step == run.timeline.steps:
        lengths = needle_lengths(run.config, run.timeline)
        results = [result for n in lengths for result in suite.needle(n, scored)]
        record["needle"] = needle_summary(results)
    metrics.write("evaluation", step, tokens, record)
    each = ", ".join(f"{key} {value:.4g}" for key, value in scores.items())
    if "needle" in record:
        each += f", needles {record['needle']['found']} of {record['needle']['asked']}"
    progress.say(f"{name} model after {tokens:,} tokens: {each}")


def start_average(run: Run, step: int, params: Params | None) -> RunningAverage | None:
    """The run's average after `step` steps, whose parameters so far are `params`; None: it has none.

    The timeline must be decided up to `step`.
    """
    stage = run.timeline.stages[-1]
    if stage.average is None:
        return None
    weights = stage.average.weights or (1.0,) * stage.average.checkpoints
    seen = sum(at <= step for at in average_steps(stage))
    return RunningAverage(weights, seen, params)


def averaged_now(run: Run, step: int) -> bool:
    """Whether the parameters after `step` steps enter the average."""
    stage = run.timeline.stages[-1]
    return stage.average is not None and step in average_steps(stage)
