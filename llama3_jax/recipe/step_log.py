"""A record of each step in the run's metrics, and a line or bar of progress."""

import time
from typing import Any

import jax
import numpy as np

from llama3_jax.model.flops import training_flops
from llama3_jax.recipe.incidents import Incidents
from llama3_jax.recipe.prepare import Run
from llama3_jax.recipe.timeline import ResolvedStage
from llama3_jax.training.metrics import Metrics, json_number
from llama3_jax.training.progress import RunProgress
from llama3_jax.training.step import StepMetrics


class StepLog:
    """Turns the step's metrics into records, one step late so that the device never waits."""

    def __init__(
        self, run: Run, metrics: Metrics, progress: RunProgress, peak: float | None,
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
        if m.auxiliary_loss:
            record["auxiliary_loss"] = json_number(m.auxiliary_loss)
        if m.statistics:  # [layers] each
            record["layers"] = {
                name: {"rms": _numbers(found.rms), "largest": _numbers(found.largest)}
                for name, found in m.statistics.items()
            }
        tokens = self._run.timeline.consumed(step) + stage.batch_tokens
        self._metrics.write("train", step + 1, tokens, record)
        record |= {"step": step + 1, "tokens": tokens, "loss": float(m.loss)}
        self._progress.step(record, last=step + 1 == self._run.timeline.steps)
        self._incidents.judge(step, float(m.loss), float(m.grad_norm))


def _numbers(values: np.ndarray) -> list[float | str]:
    return [json_number(value) for value in np.asarray(values)]
