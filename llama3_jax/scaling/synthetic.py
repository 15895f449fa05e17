"""Sweeps of a known surface: what a design or a method would say where the truth is known."""

from collections.abc import Sequence

import numpy as np

from llama3_jax.scaling.runs import FLOPS_PER_PAIR, Runs, make_runs
from llama3_jax.scaling.surface import Surface

# Besiroglu et al. 2024 (arXiv 2404.10102): Hoffmann et al.'s runs, fitted again.
CHINCHILLA = Surface(E=1.8172, A=482.01, B=2085.43, alpha=0.3478, beta=0.3658)


def optimal_tokens(surface: Surface, flops: np.ndarray | float) -> np.ndarray:
    """Tokens of least loss under C = 6 N D."""
    alpha, coefficient = surface.tokens_law(FLOPS_PER_PAIR)
    return coefficient * np.asarray(flops) ** alpha


def isoflop_runs(
    surface: Surface, budgets: Sequence[float], sizes: int = 9, width: float = 4.0,
    noise: float = 0.0, seed: int = 0, shift: float = 1.0,
) -> Runs:  # fmt: skip
    """Runs of each budget, `sizes` of them over tokens from optimum / width to optimum x width.

    `noise` is the standard deviation of the log loss; `shift` moves the grid off the optimum.
    """
    flops = np.repeat(np.asarray(budgets, float), sizes)
    ratios = np.tile(np.geomspace(1 / width, width, sizes), len(budgets))
    tokens = optimal_tokens(surface, flops) * ratios * shift
    loss = surface.loss(flops / FLOPS_PER_PAIR / tokens, tokens)
    loss = loss * np.exp(noise * np.random.default_rng(seed).normal(size=len(loss)))
    return make_runs(flops, tokens, loss)
