"""What a run measures of its model between steps: held-out losses, samples, the evaluation suite."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llama3_jax.data.tokenizer import Tokenizer
from llama3_jax.evaluation.metrics import bits_per_byte, held_out
from llama3_jax.evaluation.scoring import Scorer
from llama3_jax.evaluation.suite import needle_summary
from llama3_jax.model.config import ModelConfig
from llama3_jax.model.decoding import compute_params, generate
from llama3_jax.model.transformer import Params
from llama3_jax.parallel.mesh import Layout
from llama3_jax.parallel.processes import is_first, of_first
from llama3_jax.recipe.prepare import Run, needle_lengths, stage_model
from llama3_jax.recipe.timeline import ResolvedStage, Timeline
from llama3_jax.training.metrics import Metrics
from llama3_jax.training.progress import RunProgress

# Weights that several processes may gather on a single device to generate samples.
_GATHERED_SAMPLE_BYTES = 8e9


def recorded(records: Sequence[Mapping[str, Any]]) -> frozenset[str]:
    """What has been measured after a step, by its records on process 0: "validation", and
    "evaluation" with the model's name; the same on all processes."""
    kinds = ("validation", "evaluation/last", "evaluation/averaged")
    names = {f"{r['kind']}/{r['model']}" if "model" in r else r["kind"] for r in records}
    return frozenset(kinds[n] for n in of_first([n for n, k in enumerate(kinds) if k in names]))


def passed(timeline: Timeline, every_tokens: int | None, step: int) -> bool:
    """Whether a multiple of `every_tokens` was passed by the last of `step` steps, or it is the end."""
    if step == timeline.steps:
        return True
    if every_tokens is None or step == 0:
        return False
    return timeline.consumed(step) // every_tokens > timeline.consumed(step - 1) // every_tokens


def validate(
    run: Run, stage: ResolvedStage, params: Params, layout: Layout, step: int,
    metrics: Metrics, progress: RunProgress, between: Callable[[], None],
) -> None:  # fmt: skip
    """Records the loss of each source's held-out documents, in nats a token and bits a byte.

    `between` is called before each batch; what it raises ends the validation, and nothing is
    recorded.
    """
    config = run.config.validation
    length = config.length or stage.length
    model = stage_model(run.config, stage)
    scorer = Scorer(model, params, layout, stage.micro_batch_tokens, run.config.xla, between)
    losses, bits = {}, {}
    for name, corpus in run.validation.items():
        metric = held_out(scorer, corpus, length, config.tokens)
        losses[name], bits[name] = metric.value, bits_per_byte(metric, corpus, config.tokens)
    if losses:
        tokens = run.timeline.consumed(step)
        metrics.write(
            "validation", step, tokens, {"losses": losses, "bits_per_byte": bits, "length": length}
        )
        each = ", ".join(f"{name} {loss:.3f}" for name, loss in losses.items())
        progress.say(f"held-out loss after {tokens:,} tokens: {each}")


def suite_scorer(
    run: Run, stage: ResolvedStage, params: Params, layout: Layout, between: Callable[[], None]
) -> Scorer:
    """The model of a stage for the evaluation suite; `between` as in `validate`."""
    config = run.config
    tokens = config.evaluation.batch_tokens
    return Scorer(stage_model(config, stage), params, layout, tokens, config.xla, between)


def evaluate(
    run: Run, scorer: Scorer, name: str, step: int,
    metrics: Metrics, progress: RunProgress,
) -> None:  # fmt: skip
    """Records what the suite measures of a model: needles, too, after the last step."""
    suite, tokens = run.suite, run.timeline.consumed(step)
    scores = {}
    for part in suite.short_parts:
        scores |= {key: metric.value for key, metric in suite.short(part, scorer).items()}
    record = {"model": name, "scores": scores}
    if suite.config.needle and step == run.timeline.steps:
        lengths = needle_lengths(run.config, run.timeline)
        results = [result for n in lengths for result in suite.needle(n, scorer)]
        record["needle"] = needle_summary(results)
    metrics.write("evaluation", step, tokens, record)
    each = ", ".join(f"{key} {value:.4g}" for key, value in scores.items())
    if "needle" in record:
        each += f", needles {record['needle']['found']} of {record['needle']['asked']}"
    progress.say(f"{name} model after {tokens:,} tokens: {each}")


@functools.cache
def _gather(model: ModelConfig, mesh: Mesh):
    """Compiled: parameters to copies on all devices, in the dtypes of the forward pass."""
    everywhere = NamedSharding(mesh, PartitionSpec())
    return jax.jit(functools.partial(compute_params, model), out_shardings=everywhere)


def write_samples(
    run: Run, model: ModelConfig, params: Params, step: int, tokenizer: Tokenizer,
    metrics: Metrics, progress: RunProgress,
) -> None:  # fmt: skip
    """Greedy continuations of the config's prompts, for the report.

    With several processes, the first one generates with a copy of all weights on one device; a
    model that is too large for that writes none, and the log says so.
    """
    samples = run.config.samples
    if jax.process_count() > 1:
        size = model.parameter_count() * jnp.dtype(model.dtype).itemsize
        if size > _GATHERED_SAMPLE_BYTES:
            progress.say(f"no samples: {size / 1e9:.1f} GB of weights on a device are too many")
            return
        copies = _gather(model, jax.tree.leaves(params)[0].sharding.mesh)(params)
        if not is_first():
            return
        params = jax.tree.map(lambda x: x.addressable_data(0), copies)
    prompts = [[tokenizer.bos, *tokenizer.encode(prompt)] for prompt in samples.prompts]
    generated = generate(
        model,
        params,
        prompts,
        max_new_tokens=samples.max_new_tokens,
        stop_tokens=(tokenizer.eos,),
    )
    texts = [tokenizer.decode(tokens) for tokens in generated]
    pairs = [{"prompt": p, "text": t} for p, t in zip(samples.prompts, texts, strict=True)]
    metrics.write("sample", step, run.timeline.consumed(step), {"samples": pairs})
