"""A sweep's design, audited before anything runs.

The parabola's vertex is biased where a budget's curve is skewed, by an amount that depends on the
surface's exponents and the grid alone: with u = log(tokens / optimum), the loss at a fixed budget
is a constant plus a multiple of exp(-beta u) / beta + exp(alpha u) / alpha.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from llama3_jax.scaling.runs import Runs
from llama3_jax.scaling.surface import Surface
from llama3_jax.scaling.sweep import PlannedRun, optimal_tokens
from llama3_jax.scaling.synthetic import CHINCHILLA

FEWEST_SIZES = 5
WARMUP_SHARE = 0.1
# A bias of the vertex beyond this (in logs) is worth a narrower grid.
BIAS = 0.05
# Published exponents of the surface, for sweeps that have none of their own yet.
EXPONENTS = (float(CHINCHILLA.alpha), float(CHINCHILLA.beta))


def vertex_bias(alpha: float, beta: float, log_ratios: Float[np.ndarray, "m"]) -> float:
    """log(parabola's vertex / optimum) of a noise-free budget with runs at log(tokens / optimum).

    NaN where the parabola opens downwards.
    """
    u = np.asarray(log_ratios, dtype=float)
    loss = np.exp(-beta * u) / beta + np.exp(alpha * u) / alpha
    c2, c1, _ = np.polyfit(u, loss, 2)
    return float(-c1 / (2 * c2)) if c2 > 0 else float("nan")


def sweep_biases(runs: Runs, surface: Surface) -> list[float]:
    """The vertex's bias in each budget of runs, by a surface fitted to them."""
    exponent, coefficient = surface.tokens_law(runs.flops_per_pair)
    biases = []
    for budget, runs_m in zip(runs.budgets, runs.of_budgets(), strict=True):
        ratios = np.log(runs.tokens[runs_m] / (coefficient * budget**exponent))
        biases.append(vertex_bias(float(surface.alpha), float(surface.beta), ratios))
    return biases


def audit(
    runs: Sequence[PlannedRun], ranks: int = 1, exponents: tuple[float, float] = EXPONENTS
) -> list[str]:
    """What is wrong with a planned sweep, a line each; empty when nothing is."""
    notes = []
    for budget in dict.fromkeys(run.budget for run in runs):
        own = [run for run in runs if run.budget == budget]
        where = f"{budget:.3g} FLOPs"
        best = optimal_tokens(budget)
        ratios = np.log([run.tokens / best for run in own])
        if len(own) < FEWEST_SIZES:
            notes.append(f"few-points: {where} has {len(own)} sizes, fewer than {FEWEST_SIZES}")
        below, above = int((ratios < 0).sum()), int((ratios > 0).sum())
        if min(below, above) < 2:
            notes.append(f"not-bracketed: {where} has {below} sizes below the predicted optimum "
                         f"of {best:.3g} tokens and {above} above")  # fmt: skip
        for run in own:
            share = run.warmup_steps / run.steps
            if share > WARMUP_SHARE:
                notes.append(f"long-warm-up: {run.shape} at {where}: {run.warmup_steps:,} of "
                             f"{run.steps:,} steps warm up ({share:.0%})")  # fmt: skip
            if run.batch_tokens < run.length * ranks:
                notes.append(
                    f"small-batch: {run.shape} at {where}: {run.batch_tokens:,} tokens are less "
                    f"than a row of {run.length:,} for each of {ranks} ranks"
                )
            if not 0.9 < run.flops_6nd / run.budget < 1.1:
                notes.append(f"coarse-steps: {run.shape} at {where}: whole steps make it "
                             f"{run.flops_6nd / run.budget:.2f} of the budget")  # fmt: skip
        bias = vertex_bias(*exponents, ratios) if len(own) >= 3 else float("nan")
        if not abs(bias) <= BIAS:
            notes.append(f"vertex-bias: {where}: the parabola's minimum would be off by a factor "
                         f"of {np.exp(bias):.3f} on this grid")  # fmt: skip
    return notes
