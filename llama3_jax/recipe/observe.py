"""What a run tells of itself: a record of each step, held-out losses, samples."""

import functools
import itertools
import math
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llama3_jax.data.tokenizer import Tokenizer
from llama3_jax.data.validation import validation_batches
from llama3_jax.data.workers import ahead
from llama3_jax.model.config import ModelConfig
from llama3_jax.model.decoding import compute_params, generate
from llama3_jax.model.definition import Params, define
from llama3_jax.model.flops import training_flops
from llama3_jax.parallel.mesh import Layout
from llama3_jax.parallel.processes import is_first, local_rows
from llama3_jax.parallel.sharding import put_batch
from llama3_jax.recipe.config import RunConfig
from llama3_jax.recipe.incidents import Incidents
from llama3_jax.recipe.prepare import Run
from llama3_jax.recipe.timeline import ResolvedStage, Timeline
from llama3_jax.training.metrics import MetricsWriter, json_number
from llama3_jax.training.progress import RunProgress
from llama3_jax.training.step import StepMetrics, compile_validation

# Weights that several processes may gather on a single device to generate samples.
_GATHERED_SAMPLE_BYTES = 8e9


class StepLog:
    """Turns the step's metrics into records, one step late so that the device never waits."""

    def __init__(
        self, run: Run, metrics: MetricsWriter, progress: RunProgress, peak: float | None,
        incidents: Incidents,
    ):  # fmt: skip
        """`peak` is the FLOP/s of all devices; without one there is no MFU."""
        self._run, self._metrics, self._progress, self._peak = run, metrics, progress, peak
        self._incidents = incidents
        self._pending: tuple[int, ResolvedStage, float, StepMetrics] | None = None
        self._clock: float | None = None

    def restart_clock(self) -> None:
        """Leaves out of the next step's time what was not training."""
        self._clock = time.perf_counter()

    def add(self, step: int, stage: ResolvedStage, rate: float, metrics: StepMetrics) -> None:
        self.flush()
        self._pending = (step, stage, rate, metrics)

    def flush(self) -> None:
        """Waits for the pending step and records it.

        Raises:
          UserError: the step went wrong, and the run is to stop (see `Incidents.judge`).
        """
        if self._pending is None:
            return
        step, stage, rate, on_device = self._pending
        self._pending = None
        m: StepMetrics = jax.device_get(on_device)
        now = time.perf_counter()
        seconds = now - self._clock if self._clock is not None else None
        self._clock = now
        flops = training_flops(
            self._run.config.model, stage.batch_rows, stage.length, float(m.document_pairs)
        )
        per_second = 1 / seconds if seconds else 0.0  # the first step's would be the compiler's
        mfu = {n: f * per_second / self._peak for n, f in flops.items()} if self._peak else {}
        rates = {"tokens_per_second": stage.batch_tokens * per_second, "mfu": mfu}
        counts = zip(self._run.batches.sources, m.source_loss_sums, m.source_tokens, strict=True)
        record: dict[str, Any] = {
            "stage": stage.name,
            "loss": json_number(m.loss),
            "losses": {name: float(total / n) for name, total, n in counts if n},
            "grad_norm": json_number(m.grad_norm),
            "learning_rate": rate,
            "applied": bool(m.applied),
            "length": stage.length,
            "batch_tokens": stage.batch_tokens,
            "mix": stage.mix,
            "utilisation": float(m.real_tokens / stage.batch_tokens),
            "documents": int(m.documents),
            "cut_documents": int(m.cut_documents),
            "flops": flops,
            "seconds": seconds,
            **rates,
        }
        tokens = self._run.timeline.consumed(step) + stage.batch_tokens
        self._metrics.write("train", step + 1, tokens, record)
        record |= {"step": step + 1, "tokens": tokens, "loss": float(m.loss)}
        self._progress.step(record, last=step + 1 == self._run.timeline.steps)
        self._incidents.judge(step, float(m.loss), float(m.grad_norm))


def due(config: RunConfig, timeline: Timeline, step: int) -> bool:
    """Whether validation runs after `step` steps: a multiple of its tokens was passed, or the end."""
    if config.validation is None:
        return False
    every = config.validation.every_tokens
    passed = timeline.consumed(step) // every > timeline.consumed(step - 1) // every
    return passed or step == timeline.steps


def validate(
    run: Run, model: ModelConfig, layout: Layout, stage: ResolvedStage, params: Params, step: int,
    metrics: MetricsWriter, progress: RunProgress, between: Callable[[], None] = lambda: None,
) -> None:  # fmt: skip
    """Loss of each source's held-out documents, in nats a token and bits a byte.

    Batches are built in a thread, and the device computes one while the next is sent. `between` is
    called before each; what it raises ends the validation, and nothing is recorded.
    """
    config = run.config.validation
    function = compile_validation(model, layout, run.config.xla)
    length = config.length or stage.length
    ranks = layout.shape["data"]
    rows = max(stage.micro_batch_tokens // length // ranks, 1) * ranks
    host, hosts = local_rows(layout.mesh)
    losses, bits = {}, {}
    for name, corpus in run.validation.items():
        total, count = 0.0, 0
        batches = validation_batches(corpus, length, rows, config.tokens, host=host, hosts=hosts)
        under_way: list[tuple[jax.Array, jax.Array]] = []
        for batch in itertools.chain(ahead(batches), [None]):
            if batch is not None:
                between()
                under_way.append(function(params, put_batch(batch, layout)))
            while len(under_way) > (0 if batch is None else 1):
                batch_total, batch_count = under_way.pop(0)
                total, count = total + float(batch_total), count + int(batch_count)
        losses[name] = total / count
        share = min(config.tokens, corpus.info.tokens) / corpus.info.tokens
        bits[name] = total / math.log(2) / (corpus.info.utf8_bytes * share)
    if losses:
        tokens = run.timeline.consumed(step)
        metrics.write(
            "validation", step, tokens, {"losses": losses, "bits_per_byte": bits, "length": length}
        )
        each = ", ".join(f"{name} {loss:.3f}" for name, loss in losses.items())
        progress.say(f"held-out loss after {tokens:,} tokens: {each}")


@functools.cache
def _gather(model: ModelConfig, mesh: Mesh):
    """Compiled: parameters to copies on all devices, in the dtypes of the forward pass."""
    everywhere = NamedSharding(mesh, PartitionSpec())
    return jax.jit(functools.partial(compute_params, model), out_shardings=everywhere)


def write_samples(
    run: Run, model: ModelConfig, params: Params, step: int, tokenizer: Tokenizer,
    metrics: MetricsWriter, progress: RunProgress,
) -> None:  # fmt: skip
    """Greedy continuations of the config's prompts, for the report.

    With several processes, the first one generates with a copy of all weights on one device; a
    model that is too large for that writes none, and the log says so.
    """
    samples = run.config.samples
    if not samples.prompts:
        return
    if jax.process_count() > 1:
        size = define(model).parameter_count() * jnp.dtype(model.dtype).itemsize
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
