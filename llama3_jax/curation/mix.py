"""From the tokens of each source at hand to the mix of a training run.

Llama 3 paper, section 3.1.2: "roughly 50% of tokens corresponding to general knowledge, 25% of
mathematical and reasoning tokens, 17% code tokens, and 8% multilingual tokens"; section 3.1.3 on
annealing: small amounts of high-quality sources at the end of the run.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import pydantic

from llama3_jax.errors import UserError
from llama3_jax.files import write_json
from llama3_jax.schema import Config

DEFAULT_MIX = {"general": 0.50, "math": 0.25, "code": 0.17, "multilingual": 0.08}


class AnnealingConfig(Config):
    """`weights` of sources that the main mix leaves out, `share` of the last `tokens` of the run.

    The rest of those tokens keeps to the main mix: 30% against 70% are the paper's for judging a
    new source (section 3.1.3); what its final annealing has is not published.
    """

    weights: dict[str, pydantic.PositiveFloat]
    tokens: pydantic.PositiveInt
    share: float = pydantic.Field(0.3, gt=0, le=1)


class MixConfig(Config):
    """A run of `total_tokens`, annealing included.

    `weights` need not sum to 1; `weights_file` takes them from what `fit mix` wrote instead. No
    source is read more than `max_epochs` times: up to 4 cost next to nothing against fresh data
    (Muennighoff et al. 2023, arXiv 2305.16264).
    """

    total_tokens: pydantic.PositiveInt
    weights: dict[str, pydantic.NonNegativeFloat] = DEFAULT_MIX
    weights_file: str | None = None
    max_epochs: pydantic.PositiveFloat = 4.0
    annealing: AnnealingConfig | None = None


class Part(NamedTuple):
    """What a run takes of one source in one of its phases; `epochs` counts those before too."""

    phase: str
    source: str
    weight: float
    tokens: int
    available: int
    epochs: float


class MixPlan(NamedTuple):
    parts: tuple[Part, ...]

    def mix(self, phase: str = "main") -> dict[str, float]:
        """Weights for `mix` of a stage in a training config."""
        return {part.source: part.weight for part in self.parts if part.phase == phase}

    def __str__(self) -> str:
        width = max(len(part.source) for part in self.parts)
        lines = [f"{'phase':10}{'source':{width}}{'weight':>9}{'tokens':>20}{'available':>20}"
                 f"{'epochs':>9}"]  # fmt: skip
        for part in self.parts:
            lines.append(
                f"{part.phase:10}{part.source:{width}}{part.weight:9.4f}{part.tokens:20,}"
                f"{part.available:20,}{part.epochs:9.2f}"
            )
        return "\n".join(lines)


def plan_mix(config: MixConfig, available: Mapping[str, int]) -> MixPlan:
    """Weights, tokens and epochs of every source, in the main phase and in annealing.

    Tokens are whole and sum to the phase's exactly.

    Raises:
      UserError: a source without tokens, one that would be read more often than `max_epochs`, or an
        annealing that is longer than the run or shares a source with the main mix.
    """
    main = _normalised(_weights(config), "mix.weights")
    annealing = config.annealing
    last = annealing.tokens if annealing else 0
    if last >= config.total_tokens:
        raise UserError(
            f"mix.annealing.tokens={last}: the run has {config.total_tokens} in all; fewer would do"
        )
    phases = [("main", main, config.total_tokens - last)]
    if annealing:
        apart = _normalised(annealing.weights, "mix.annealing.weights")
        if shared := sorted(set(apart) & set(main)):
            raise UserError(
                f"mix.annealing.weights: source {shared[0]!r} is in the main mix as well; annealing "
                "sources are set apart"
            )
        weights = {source: (1 - annealing.share) * weight for source, weight in main.items()}
        weights |= {source: annealing.share * weight for source, weight in apart.items()}
        phases.append(("annealing", {s: w for s, w in weights.items() if w > 0}, last))
    parts, used = [], dict.fromkeys(available, 0)
    for phase, weights, tokens in phases:
        for source, amount in _whole(weights, tokens).items():
            if available.get(source, 0) <= 0:
                raise UserError(
                    f"source {source!r} has weight {weights[source]:.4g} in the {phase} mix and no "
                    f"tokens; sources with tokens: {', '.join(s for s in available if available[s])}"
                )
            used[source] += amount
            epochs = used[source] / available[source]
            parts.append(Part(phase, source, weights[source], amount, available[source], epochs))
    _check_epochs(parts, config)
    return MixPlan(tuple(parts))


def save_plan(path: Path, plan: MixPlan) -> None:
    """Writes the plan; `json.load(...)["main"]` is a mix for a training config."""
    phases = dict.fromkeys(part.phase for part in plan.parts)
    write_json(
        path,
        {phase: plan.mix(phase) for phase in phases}
        | {"parts": [part._asdict() for part in plan.parts]},
    )


def load_plan(path: Path) -> MixPlan:
    """What `save_plan` wrote.

    Raises:
      UserError: the file is absent or not a plan.
    """
    try:
        parts = json.loads(path.read_text(encoding="utf-8"))["parts"]
        return MixPlan(tuple(Part(**part) for part in parts))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a mix plan ({type(error).__name__}: {error})") from None


def _weights(config: MixConfig) -> dict[str, float]:
    if config.weights_file is None:
        return config.weights
    path = Path(config.weights_file)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["optimum"]
        return {str(source): float(weight) for source, weight in found.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"mix.weights_file={path}: not a result of `fit mix`, which has an optimum "
            f"({type(error).__name__}: {error})"
        ) from None


def _normalised(weights: Mapping[str, float], where: str) -> dict[str, float]:
    total = sum(weights.values())
    if not 0 < total < float("inf") or min(weights.values()) < 0:
        raise UserError(f"{where}: {dict(weights)}; weights are 0 or more, one of them is positive")
    return {source: weight / total for source, weight in weights.items() if weight > 0}


def _whole(weights: Mapping[str, float], total: int) -> dict[str, int]:
    """Whole tokens by largest remainder, so that they sum to `total`."""
    exact = {source: weight * total for source, weight in weights.items()}
    whole = {source: int(value) for source, value in exact.items()}
    by_remainder = sorted(exact, key=lambda source: whole[source] - exact[source])
    for source in by_remainder[: total - sum(whole.values())]:
        whole[source] += 1
    return whole


def _check_epochs(parts: list[Part], config: MixConfig) -> None:
    last = {part.source: part for part in parts}
    over = [part for part in last.values() if part.epochs > config.max_epochs * (1 + 1e-9)]
    if not over:
        return
    worst = max(over, key=lambda part: part.epochs)
    share = config.max_epochs / worst.epochs
    raise UserError(
        f"source {worst.source!r} would be read {worst.epochs:.3g} times, max_epochs is "
        f"{config.max_epochs:g}: it has {worst.available:,} tokens and needs "
        f"{worst.epochs * worst.available / config.max_epochs:,.0f}. With all phases shorter in "
        f"proportion this mix works up to {config.total_tokens * share:,.0f} tokens; or lower the "
        f"source's weight by {1 - share:.0%}, or raise max_epochs"
    )
