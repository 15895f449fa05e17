"""Which run to buy next: the one that narrows the target's optimum most per FLOP.

To first order the interval of log tokens at the target is g' I^-1 g, where I is the information
that the runs hold about the surface's coefficients and g how the optimum depends on them; a further
run adds one outer product to I, whatever its outcome. So every candidate can be judged before any
is run (c-optimal design).

Shapes: M runs, K candidates; the five coefficients are log E, log A, log B, log alpha, log beta.
"""

import dataclasses

import numpy as np
from jaxtyping import Float

from llama3_jax.errors import UserError
from llama3_jax.model.config import PRESETS
from llama3_jax.model.definition import define
from llama3_jax.scaling.profiles import profile
from llama3_jax.scaling.runs import FLOPS_PER_PAIR, Runs
from llama3_jax.scaling.surface import Points, Surface, fit_huber
from llama3_jax.scaling.sweep import LADDER, WARMUP_STEPS

# Tokens a parameter of the candidates, from under- to over-trained.
RATIOS = np.geomspace(2.5, 320, 15)
# A run of fewer warm-ups than this is no sample of the surface.
LEAST_STEPS = 2 * WARMUP_STEPS


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A run that could come next, and what it would do to the interval."""

    shape: str
    params: float
    tokens: float
    batch_tokens: float
    learning_rate: float
    flops: float
    width_ratio: float  # interval after / before, in log tokens
    gain_per_flop: float  # share of the width that goes, per FLOP


@dataclasses.dataclass(frozen=True)
class Plan:
    surface: Surface
    noise: float  # standard deviation of a log loss
    target_tokens: float
    deviation: float  # of log tokens at the target, now
    candidates: list[Candidate]  # best gain per FLOP first


def sensitivities(
    surface: Surface, params: np.ndarray, tokens: np.ndarray
) -> Float[np.ndarray, "M 5"]:
    """Derivatives of log loss by the log coefficients at each run."""
    size, data = surface.A * params**-surface.alpha, surface.B * tokens**-surface.beta
    loss = surface.E + size + data
    parts = (
        np.full_like(loss, surface.E), size, data,
        -surface.alpha * np.log(params) * size, -surface.beta * np.log(tokens) * data,
    )  # fmt: skip
    return np.stack(parts, axis=-1) / loss[..., None]


def optimum_gradient(surface: Surface, target_flops: float, flops_per_pair: float) -> np.ndarray:
    """Derivatives of the target's log optimal tokens by the log coefficients."""
    logs = np.log([float(v) for v in surface.coefficients().values()])

    def log_tokens(at: np.ndarray) -> float:
        alpha, coefficient = Surface(*np.exp(at)).tokens_law(flops_per_pair)
        return float(np.log(coefficient) + alpha * np.log(target_flops))

    step = 1e-5
    return np.array([
        (log_tokens(logs + step * unit) - log_tokens(logs - step * unit)) / (2 * step)
        for unit in np.eye(5)
    ])  # fmt: skip


def width_ratios(
    surface: Surface, runs: Runs, noise: float, target_flops: float,
    params_K: np.ndarray, tokens_K: np.ndarray,
) -> tuple[float, Float[np.ndarray, "K"]]:  # fmt: skip
    """(deviation of log tokens at the target now, its ratio after each candidate).

    Raises:
      UserError: the runs do not determine the surface.
    """
    J = sensitivities(surface, runs.params, runs.tokens) / noise
    information = J.T @ J
    scale = 1 / np.sqrt(np.diag(information))
    if np.linalg.cond(information * scale * scale[:, None]) > 1e14:
        raise UserError(
            "the runs do not determine the surface: more budgets or a wider grid needed"
        )
    covariance = np.linalg.inv(information * scale * scale[:, None]) * scale * scale[:, None]
    g = optimum_gradient(surface, target_flops, runs.flops_per_pair)
    now = g @ covariance @ g
    new = sensitivities(surface, params_K, tokens_K) / noise
    seen = new @ covariance
    gone = (seen @ g) ** 2 / (1 + (seen * new).sum(axis=1))
    return float(np.sqrt(now)), np.sqrt(np.maximum(1 - gone / now, 0.0))


def plan_next(runs: Runs, target_flops: float, budget: float, profile_name: str = "llama3") -> Plan:
    """Candidates on the ladder that cost at most `budget` FLOPs (6 N D).

    Raises:
      UserError: no candidate fits the budget, or the runs do not determine the surface.
    """
    if len(runs) < 7:
        raise UserError(f"{len(runs)} runs do not determine the five coefficients of a surface")
    surface, _ = fit_huber(Points(runs.params, runs.tokens, runs.loss, np.ones(len(runs))))
    residual = np.log(runs.loss / surface.loss(runs.params, runs.tokens))
    noise = max(float(np.sqrt((residual**2).sum() / (len(runs) - 5))), 1e-6)
    rule = profile(profile_name)
    found = []
    for shape in LADDER:
        params = float(define(PRESETS[shape]).parameter_count(embeddings=False))
        for tokens in params * RATIOS:
            flops = FLOPS_PER_PAIR * params * tokens
            batch = rule.batch_tokens(params, tokens, flops)
            if flops <= budget and tokens / batch >= LEAST_STEPS:
                rate = rule.learning_rate(params, tokens, flops)
                found.append((shape, params, tokens, batch, rate, flops))
    if not found:
        least = min(define(PRESETS[shape]).parameter_count(embeddings=False) for shape in LADDER)
        raise UserError(
            f"--budget {budget:.3g} FLOPs buys no run of the ladder: {LADDER[0]} for "
            f"{LEAST_STEPS:,} steps costs {FLOPS_PER_PAIR * least * LEAST_STEPS * 250e3:.2g}"
        )
    params, tokens = (np.array([row[i] for row in found]) for i in (1, 2))
    deviation, ratios = width_ratios(surface, runs, noise, target_flops, params, tokens)
    candidates = [
        Candidate(*row, float(ratio), float((1 - ratio) / row[5]))
        for row, ratio in zip(found, ratios, strict=True)
    ]
    candidates.sort(key=lambda c: -c.gain_per_flop)
    alpha, coefficient = surface.tokens_law(runs.flops_per_pair)
    return Plan(surface, noise, float(coefficient * target_flops**alpha), deviation, candidates)
