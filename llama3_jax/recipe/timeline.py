"""The timeline of a run: everything that changes is a function of consumed tokens.

A run is a list of stages. A stage names only what changes; the rest goes on from the stage before.
The learning rate is declared in pieces, each of which may span several stages. How long a gated
stage lasts is decided as the run goes: its timeline is one of the verdicts given so far, too.
"""

import bisect
import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import pydantic

from llama3_jax.errors import UserError
from llama3_jax.model.config import RopeConfig
from llama3_jax.parallel.mesh import MeshConfig
from llama3_jax.schema import Config


class LearningRate(Config):
    """A piece of the learning rate, from the stage that declares it until the next one does.

    Linear warm-up from 0 to `peak` over `warmup_tokens`, then `shape` from `peak` to `end` over the
    rest of the piece (Llama 3 paper, sections 3.2.1 and 3.4). Without `peak` it starts at the value
    where the piece before ended. `tokens` is the piece's length where it is not that of its stages:
    a cosine cut off by a later stage, say.
    """

    shape: Literal["constant", "linear", "cosine"]
    peak: pydantic.NonNegativeFloat | None = None
    end: pydantic.NonNegativeFloat | None = None
    warmup_tokens: pydantic.NonNegativeInt = 0
    tokens: pydantic.PositiveInt | None = None

    @pydantic.model_validator(mode="after")
    def _check(self) -> "LearningRate":
        if self.shape == "constant" and self.end is not None:
            raise ValueError("a constant learning rate has no end; use shape='linear'")
        if self.shape != "constant" and self.end is None:
            raise ValueError(f"shape={self.shape!r} needs end")
        if self.warmup_tokens and self.peak is None:
            raise ValueError("warmup_tokens needs peak")
        return self


class Gate(Config):
    """What a stage must pass at its end (Llama 3 paper, section 3.4.2; see recipe/gate.py).

    Asked after the stage's `tokens`, and after each `every_tokens` more until it is passed; the run
    stops with `gate_failed` where it is not passed at `max_tokens` of the stage. A short-context
    metric may be worse than before the first increase by the larger of `epsilon` and one standard
    error.
    """

    every_tokens: pydantic.PositiveInt
    max_tokens: pydantic.PositiveInt
    epsilon: pydantic.NonNegativeFloat = 0.0


class Average(Config):
    """The mean of the parameters at `checkpoints` places of the last stage, the last its end.

    Evenly apart, in float32 (Llama 3 paper, section 3.4.3: Polyak averaging). `weights` are of the
    first to the last, and need not sum to 1; equal ones by default.
    """

    checkpoints: pydantic.PositiveInt
    weights: tuple[pydantic.NonNegativeFloat, ...] | None = None

    @pydantic.model_validator(mode="after")
    def _check(self) -> "Average":
        if self.weights is not None:
            if len(self.weights) != self.checkpoints:
                raise ValueError(f"weights: {len(self.weights)} for {self.checkpoints} checkpoints")
            if not self.weights[0] > 0:
                raise ValueError("weights: the first must be positive")
        return self


class Verdict(NamedTuple):
    """Of the gate of stage number `stage`, given after `step` steps of the run."""

    stage: int
    step: int
    passed: bool


class Stage(Config):
    """What is declared of a stage; None means: as in the stage before, but for gate and average.

    `tokens` is rounded up to whole steps. `batch_tokens` counts all positions of a batch;
    `micro_batch_tokens` of them are in memory at once (gradient accumulation). A stage with a gate
    takes at least `tokens`.
    """

    name: str
    tokens: pydantic.PositiveInt
    length: pydantic.PositiveInt | None = None
    batch_tokens: pydantic.PositiveInt | None = None
    micro_batch_tokens: pydantic.PositiveInt | None = None
    lr: LearningRate | None = None
    mix: dict[str, float] | None = None
    rope: RopeConfig | None = None
    mesh: MeshConfig | None = None
    gate: Gate | None = None
    average: Average | None = None


class ResolvedStage(NamedTuple):
    """A stage with everything filled in, and its place in the run."""

    name: str
    first_step: int
    steps: int
    start_tokens: int
    length: int
    batch_tokens: int
    micro_batch_tokens: int
    mix: dict[str, float]
    rope: RopeConfig
    mesh: MeshConfig
    gate: Gate | None = None
    average: Average | None = None

    @property
    def end_step(self) -> int:
        """The first step after the stage."""
        return self.first_step + self.steps

    @property
    def batch_rows(self) -> int:
        return self.batch_tokens // self.length

    @property
    def micro_batches(self) -> int:
        return self.batch_tokens // self.micro_batch_tokens

    @property
    def tokens(self) -> int:
        return self.steps * self.batch_tokens


class _Piece(NamedTuple):
    start: int
    tokens: int
    rate: LearningRate
    peak: float


class Timeline:
    """Resolved stages and the learning rate, by step or by consumed tokens."""

    def __init__(
        self,
        stages: tuple[Stage, ...],
        rope: RopeConfig,
        mesh: MeshConfig,
        verdicts: Sequence[Verdict] = (),
    ):
        """`rope` and `mesh` hold until a stage changes them; `verdicts` are those given so far.

        A gate not yet passed is taken to be passed when it is next asked.

        Raises:
          UserError: no stage, a first stage that leaves something open, or sizes that do not divide.
        """
        if not stages:
            raise UserError("config.stages: a run needs at least one stage")
        self.stages: list[ResolvedStage] = []
        current: dict[str, Any] = {"rope": rope, "mesh": mesh}
        for number, stage in enumerate(stages):
            failures = sum(v.stage == number and not v.passed for v in verdicts)
            where = f"config.stages.{number}"
            self.stages.append(self._resolve(where, stage, current, failures))
        if last_but := [n for n, s in enumerate(stages[:-1]) if s.average]:
            raise UserError(f"config.stages.{last_but[0]}.average: only the last stage averages")
        if stages[-1].average and self.stages[-1].steps < stages[-1].average.checkpoints:
            raise UserError(
                f"config.stages.{len(stages) - 1}.average.checkpoints: "
                f"{stages[-1].average.checkpoints} in {self.stages[-1].steps} steps"
            )
        last = self.stages[-1]
        self.steps = last.first_step + last.steps
        self.tokens = last.start_tokens + last.tokens
        self._first_steps = [stage.first_step for stage in self.stages]
        self._pieces = self._rate_pieces(stages)

    def _resolve(
        self, where: str, stage: Stage, current: dict[str, Any], failures: int
    ) -> ResolvedStage:
        for key in ("length", "batch_tokens", "mix", "rope", "mesh"):
            if (value := getattr(stage, key)) is not None:
                current[key] = value
            elif key not in current:
                raise UserError(f"{where}.{key}: the first stage must set it")
        length, batch_tokens = current["length"], current["batch_tokens"]
        # A micro-batch belongs to its batch size: a ramp that does not name one takes whole batches.
        micro = stage.micro_batch_tokens or (
            current.get("micro", batch_tokens) if stage.batch_tokens is None else batch_tokens
        )
        current["micro"] = micro
        for key, value, divisor, of in (
            ("batch_tokens", batch_tokens, length, "length"),
            ("micro_batch_tokens", micro, length, "length"),
            ("batch_tokens", batch_tokens, micro, "micro_batch_tokens"),
        ):
            if value % divisor:
                raise UserError(f"{where}.{key}: {value} is not a multiple of {of} ({divisor})")
        mesh = current["mesh"]
        if micro // length % mesh.data:
            raise UserError(
                f"{where}.batch_tokens: {micro // length} rows at a time are not divisible by "
                f"mesh.data ({mesh.data})"
            )
        before = self.stages[-1] if self.stages else None
        return ResolvedStage(
            name=stage.name,
            first_step=before.first_step + before.steps if before else 0,
            steps=_steps(where, stage, batch_tokens, failures),
            start_tokens=before.start_tokens + before.tokens if before else 0,
            length=length,
            batch_tokens=batch_tokens,
            micro_batch_tokens=micro,
            mix=current["mix"],
            rope=current["rope"],
            mesh=mesh,
            gate=stage.gate,
            average=stage.average,
        )

    def _rate_pieces(self, stages: tuple[Stage, ...]) -> list[_Piece]:
        if stages[0].lr is None:
            raise UserError("config.stages.0.lr: the first stage must set it")
        declared = [i for i, stage in enumerate(stages) if stage.lr is not None]
        pieces: list[_Piece] = []
        for number, following in zip(declared, [*declared[1:], len(stages)], strict=True):
            where, rate = f"config.stages.{number}.lr", stages[number].lr
            start = self.stages[number].start_tokens
            end = self.stages[following].start_tokens if following < len(stages) else self.tokens
            if rate.peak is None and not pieces:
                raise UserError(f"{where}.peak: the first learning rate must set it")
            gated = [self.stages[n].name for n in range(number, following) if stages[n].gate]
            if gated and rate.tokens is None and rate.shape != "constant":
                raise UserError(
                    f"{where}.tokens: must be given, for the piece holds the gated stage "
                    f"{gated[0]!r}, whose length is decided as the run goes"
                )
            peak = self._rate(pieces[-1], start) if rate.peak is None else rate.peak
            tokens = rate.tokens or end - start
            if rate.warmup_tokens > tokens:
                raise UserError(
                    f"{where}.warmup_tokens: {rate.warmup_tokens} is longer than the piece "
                    f"({tokens} tokens)"
                )
            pieces.append(_Piece(start, tokens, rate, peak))
        return pieces

    @staticmethod
    def _rate(piece: _Piece, tokens: float) -> float:
        at, warmup = tokens - piece.start, piece.rate.warmup_tokens
        if at < warmup:
            return piece.peak * at / warmup
        if piece.rate.shape == "constant":
            return piece.peak
        progress = min((at - warmup) / max(piece.tokens - warmup, 1), 1.0)
        if piece.rate.shape == "cosine":
            progress = (1 - math.cos(math.pi * progress)) / 2
        return piece.peak + (piece.rate.end - piece.peak) * progress

    def learning_rate(self, tokens: float) -> float:
        """The rate when `tokens` have been consumed."""
        starts = [piece.start for piece in self._pieces]
        return self._rate(self._pieces[bisect.bisect_right(starts, tokens) - 1], tokens)

    def step_learning_rate(self, step: int) -> float:
        """The rate of a step: that of the middle of its tokens.

        On linear pieces this is the mean over the step's tokens, whatever the batch size, so the
        first step of a warm-up and the last of an annealing are both small but not lost.
        """
        stage = self.stage(step)
        return self.learning_rate(self.consumed(step) + stage.batch_tokens / 2)

    def stage_index(self, step: int) -> int:
        """Which stage a step belongs to; the last one for the step after the end."""
        return bisect.bisect_right(self._first_steps, step) - 1

    def stage(self, step: int) -> ResolvedStage:
        return self.stages[self.stage_index(step)]

    def consumed(self, step: int) -> int:
        """Tokens consumed before `step`."""
        stage = self.stage(step)
        return stage.start_tokens + (step - stage.first_step) * stage.batch_tokens


def _steps(where: str, stage: Stage, batch_tokens: int, failures: int) -> int:
    """Steps of a stage whose gate was not passed `failures` times."""
    least = -(-stage.tokens // batch_tokens)
    if stage.gate is None:
        return least
    most = stage.gate.max_tokens // batch_tokens
    if most < least:
        raise UserError(
            f"{where}.gate.max_tokens: {stage.gate.max_tokens} is less than the stage's tokens "
            f"({stage.tokens}) in whole steps"
        )
    return min(least + failures * -(-stage.gate.every_tokens // batch_tokens), most)


def average_steps(stage: ResolvedStage) -> list[int]:
    """After which steps of the run its parameters enter the average."""
    count = stage.average.checkpoints
    return [stage.first_step + -(-stage.steps * n // count) for n in range(1, count + 1)]
