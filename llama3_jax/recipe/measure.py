"""What a run measures of its model between steps: held-out losses, samples, the evaluation suite."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llama3_jax.data.tokenizer import Tokenizer
from llama3_jax.evaluation.metrics import bits_per_byte, held_out
from llama3_jax.evaluation.suite import needle_summary
from llama3_jax.model.config import ModelConfig
from llama3_jax.model.decoding import compute_params, generate
from llama3_jax.model.definition import define
from llama3_jax.parallel.processes import is_first
from llama3_jax.recipe.average import AVERAGED, Average
from llama3_jax.recipe.prepare import needle_lengths, stage_model
from llama3_jax.recipe.timeline import ResolvedStage
from llama3_jax.recipe.trainer import Trainer

# Weights that several processes may gather on a single device to generate samples.
_GATHERED_SAMPLE_BYTES = 8e9


def _passed(trainer: Trainer, every_tokens: int | None) -> bool:
    """Whether the last step passed a multiple of `every_tokens`, or was the run's last."""
    timeline, step = trainer.run.timeline, trainer.step
    if step == timeline.steps or every_tokens is None:
        return step == timeline.steps
    return timeline.consumed(step) // every_tokens > timeline.consumed(step - 1) // every_tokens


class Validate:
    """Loss of each source's held-out documents, in nats a token and bits a byte; samples."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer

    def due(self, trainer: Trainer) -> bool:
        config = trainer.run.config.validation
        if config is None or trainer.recorded("validation"):
            return False
        return _passed(trainer, config.every_tokens)

    def __call__(self, trainer: Trainer) -> None:
        with trainer.measuring() as stage:
            self._losses(trainer, stage)
            if trainer.run.config.samples.prompts:
                self._samples(trainer, stage)

    def _losses(self, trainer: Trainer, stage: ResolvedStage) -> None:
        config, corpora = trainer.run.config.validation, trainer.run.validation
        length = config.length or stage.length
        scorer = trainer.scorer(stage, stage.micro_batch_tokens)
        found = {n: held_out(scorer, c, length, config.tokens) for n, c in corpora.items()}
        if not found:
            return
        losses = {name: metric.value for name, metric in found.items()}
        bits = {n: bits_per_byte(m, corpora[n], config.tokens) for n, m in found.items()}
        trainer.record("validation", {"losses": losses, "bits_per_byte": bits, "length": length})
        each = ", ".join(f"{name} {loss:.3f}" for name, loss in losses.items())
        trainer.progress.say(f"held-out loss after {trainer.tokens:,} tokens: {each}")

    def _samples(self, trainer: Trainer, stage: ResolvedStage) -> None:
        """Greedy continuations of the config's prompts, for the report.

        With several processes, the first one generates with a copy of all weights on one device; a
        model that is too large for that writes none, and the log says so.
        """
        samples, tokenizer = trainer.run.config.samples, self._tokenizer
        model = stage_model(trainer.run.config, stage)
        params = trainer.canonical(trainer.state.params)
        if jax.process_count() > 1:
            size = define(model).parameter_count() * jnp.dtype(model.dtype).itemsize
            if size > _GATHERED_SAMPLE_BYTES:
                trainer.progress.say(
                    f"no samples: {size / 1e9:.1f} GB of weights on a device are too many"
                )
                return
            copies = _gather(model, jax.tree.leaves(params)[0].sharding.mesh)(params)
            if not is_first():
                return
            params = jax.tree.map(lambda x: x.addressable_data(0), copies)
        prompts = [[tokenizer.bos, *tokenizer.encode(prompt)] for prompt in samples.prompts]
        count, stop = samples.max_new_tokens, (tokenizer.eos,)
        generated = generate(model, params, prompts, max_new_tokens=count, stop_tokens=stop)
        texts = [tokenizer.decode(tokens) for tokens in generated]
        pairs = [{"prompt": p, "text": t} for p, t in zip(samples.prompts, texts, strict=True)]
        trainer.record("sample", {"samples": pairs})


class Evaluate:
    """The evaluation suite, at the run's end with needles, and of the averaged model, too."""

    def __init__(self, average: Average):
        self._average = average

    def due(self, trainer: Trainer) -> bool:
        config = trainer.run.config.evaluation
        if config is None or not _passed(trainer, config.every_tokens):
            return False
        return bool(self._models(trainer))

    def __call__(self, trainer: Trainer) -> None:
        with trainer.measuring() as stage:
            for name in self._models(trainer):
                self._evaluate(trainer, stage, name)

    def _models(self, trainer: Trainer) -> list[str]:
        at_end = trainer.step == trainer.run.timeline.steps
        names = ["last", AVERAGED] if self._average.params and at_end else ["last"]
        return [name for name in names if not trainer.recorded("evaluation", name)]

    def _evaluate(self, trainer: Trainer, stage: ResolvedStage, name: str) -> None:
        run, suite, scores = trainer.run, trainer.run.suite, {}
        params = self._average.params if name == AVERAGED else trainer.state.params
        scorer = trainer.scorer(stage, run.config.evaluation.batch_tokens, params)
        for part in suite.short_parts:
            scores |= {key: metric.value for key, metric in suite.short(part, scorer).items()}
        record = {"model": name, "scores": scores}
        each = ", ".join(f"{key} {value:.4g}" for key, value in scores.items())
        if suite.config.needle and trainer.step == run.timeline.steps:
            lengths = needle_lengths(run.config, run.timeline)
            results = [result for n in lengths for result in suite.needle(n, scorer)]
            record["needle"] = found = needle_summary(results)
            each += f", needles {found['found']} of {found['asked']}"
        trainer.record("evaluation", record)
        trainer.progress.say(f"{name} model after {trainer.tokens:,} tokens: {each}")


@functools.cache
def _gather(model: ModelConfig, mesh: Mesh):
    """Compiled: parameters to copies on all devices, in the dtypes of the forward pass."""
    everywhere = NamedSharding(mesh, PartitionSpec())
    return jax.jit(functools.partial(compute_params, model), out_shardings=everywhere)
