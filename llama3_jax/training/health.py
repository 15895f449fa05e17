"""Whether a step went well: its loss and gradient norm against a robust running band.

The band of a step is the median of the steps before it and their median absolute deviation, which
an outlier barely moves. The step just before does not count: it is still under way when the next
one, with its limits, goes to the device, so nobody waits. What is judged is what the device has
judged, and all of it follows from numbers that a checkpoint holds: a resumed run decides the same.
"""

import collections
import math
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

import numpy as np
import pydantic

from llama3_jax.schema import Config
from llama3_jax.training.step import NO_LIMITS, Limits

# Of least to most: a step with several findings is treated by the last of their actions.
ACTIONS = ("record", "skip", "rewind", "stop")
Action = Literal["record", "skip", "rewind", "stop"]
# A normal distribution's standard deviation over its median absolute deviation.
_SIGMA = 1.4826
# The least deviation that counts, relative: a flat stretch must not make every step a spike.
_LEAST_DEVIATION = 0.01


class HealthConfig(Config):
    """When a step is a spike, and what the run does about it.

    A loss or gradient norm is a spike when it is more than `deviations` standard deviations,
    robustly estimated, above the median of the last `window` steps of its stage (128 and 6 are
    those of OLMo-core's skip-step optimizers, there of mean and standard deviation); a stage's
    first `least` steps have no band. Gradient norms are compared by their logarithms.

    `record` notes the event and applies the update. `skip` leaves parameters and optimizer as they
    were. `rewind` goes back to the newest checkpoint at least `rewind_steps` before the spike and
    leaves the batches from there to the spike out (as PaLM did, arXiv 2204.02311, section 5.1), up
    to `max_rewinds` times in a run. `stop` ends the run, which a person then looks at.
    """

    window: pydantic.PositiveInt = 128
    least: pydantic.PositiveInt = 32
    deviations: pydantic.PositiveFloat = 6.0
    loss_spike: Action = "record"
    grad_norm_spike: Action = "record"
    not_finite: Literal["skip", "rewind", "stop"] = "skip"
    rewind_steps: pydantic.NonNegativeInt = 0
    max_rewinds: pydantic.NonNegativeInt = 10


class Band(NamedTuple):
    """Median, deviation (that of logarithms for gradient norms), and the value above which a step
    is a spike; of how many steps."""

    median: float
    deviation: float
    limit: float
    steps: int


class Finding(NamedTuple):
    """What is wrong with a step: `kinds` of "not_finite", "loss_spike" and "grad_norm_spike"."""

    kinds: tuple[str, ...]
    action: Action
    loss_band: Band | None
    grad_norm_band: Band | None


class _Seen(NamedTuple):
    step: int
    stage: int
    loss: float
    grad_norm: float


class Health:
    """Judges step after step; `state` goes into checkpoints and back into the constructor."""

    def __init__(self, config: HealthConfig, state: Iterable[Sequence[float]] = ()):
        self.config = config
        # One more than the window: the newest may be the step that does not count yet.
        self._seen = collections.deque((_Seen(*row) for row in state), maxlen=config.window + 1)

    def state(self) -> list[list[float]]:
        """What later judgements depend on, for JSON."""
        return [list(row) for row in self._seen]

    def limits(self, step: int, stage: int) -> Limits:
        """What step `step`, of stage number `stage`, may not exceed if it is to be applied."""
        loss, grad_norm = self._bands(step, stage)
        return Limits(
            NO_LIMITS.loss if loss is None or self.config.loss_spike == "record" else loss.limit,
            NO_LIMITS.grad_norm
            if grad_norm is None or self.config.grad_norm_spike == "record"
            else grad_norm.limit,
        )

    def judge(self, step: int, stage: int, loss: float, grad_norm: float) -> Finding | None:
        """What is wrong with a step, or None; steps come in order, each once."""
        loss_band, norm_band = self._bands(step, stage)
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            return Finding(("not_finite",), self.config.not_finite, loss_band, norm_band)
        actions = {}
        if loss_band and loss > loss_band.limit:
            actions["loss_spike"] = self.config.loss_spike
        if norm_band and grad_norm > norm_band.limit:
            actions["grad_norm_spike"] = self.config.grad_norm_spike
        action = max(actions.values(), key=ACTIONS.index, default="record")
        if action == "record":  # applied, so it is where the run now is
            self._seen.append(_Seen(step, stage, loss, grad_norm))
        return Finding(tuple(actions), action, loss_band, norm_band) if actions else None

    def _bands(self, step: int, stage: int) -> tuple[Band | None, Band | None]:
        past = [seen for seen in self._seen if seen.step < step - 1 and seen.stage == stage]
        past = past[-self.config.window :]
        if len(past) < self.config.least:
            return None, None
        deviations = self.config.deviations
        return (
            _band([seen.loss for seen in past], deviations),
            _log_band([seen.grad_norm for seen in past], deviations),
        )


def _band(values: Sequence[float], deviations: float) -> Band:
    median, deviation = _median_and_deviation(np.array(values))
    deviation = max(deviation, _LEAST_DEVIATION * abs(median))
    return Band(median, deviation, _float32(median + deviations * deviation), len(values))


def _log_band(values: Sequence[float], deviations: float) -> Band:
    median, deviation = _median_and_deviation(np.log(np.maximum(values, 1e-30)))
    deviation = max(deviation, _LEAST_DEVIATION)
    limit = _float32(math.exp(median + deviations * deviation))
    return Band(math.exp(median), deviation, limit, len(values))


def _median_and_deviation(values: np.ndarray) -> tuple[float, float]:
    median = float(np.median(values))
    return median, _SIGMA * float(np.median(np.abs(values - median)))


def _float32(value: float) -> float:
    """As the device compares it, so that both find the same."""
    return float(np.float32(value))
