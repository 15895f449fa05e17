"""The noise of a sweep's losses: residuals to resample, and runs that do not belong.

Each budget's curve is smoothed by a polynomial in log tokens whose degree leave-one-out
cross-validation chooses. Residuals are relative to the loss and corrected for leverage, so that
resampling them gives noise of the right size however few points a budget has.

Shapes: B resamples, M runs, m runs of one budget.
"""

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Float

from llama3_jax.scaling.runs import Runs

# A budget with fewer residual degrees of freedom borrows the residuals of all.
FREEDOM = 3
# An outlier's residual is this many robust standard deviations; below FLOOR (relative to the
# loss) even a clean curve departs from a polynomial.
OUTLIER = 5.0
FLOOR = 1e-3
# Not more of a sweep than this can be outliers.
OUTLIER_SHARE = 0.2


@dataclasses.dataclass(frozen=True)
class Smooth:
    """Smoothed losses, relative residuals (studentised), leverage; `free` degrees of freedom."""

    loss: Float[np.ndarray, "M"]
    residual: Float[np.ndarray, "M"]
    leverage: Float[np.ndarray, "M"]
    free: Float[np.ndarray, "M"]


def smooth(runs: Runs) -> Smooth:
    """Each budget's losses by the polynomial that predicts left-out runs best."""
    loss, residual, leverage, free = np.empty((4, len(runs)))
    for runs_m in runs.of_budgets():
        x, y = np.log(runs.tokens[runs_m]), runs.loss[runs_m]
        fits = []
        sizes = len(np.unique(x))
        highest = min(sizes - 1, 2) if sizes < 6 else min(sizes - 3, 6)
        for degree in range(min(sizes - 1, 2), highest + 1):
            basis = np.polynomial.chebyshev.chebvander(_to_unit(x), degree)
            q, _ = np.linalg.qr(basis)
            fitted, h = q @ (q.T @ y), (q**2).sum(axis=1)
            left_out = (y - fitted) / np.maximum(1 - h, 1e-9)
            fits.append(((left_out**2).sum() if len(y) > degree + 1 else 0.0, fitted, h, degree))
        _, fitted, h, degree = min(fits, key=lambda fit: fit[0])
        loss[runs_m], leverage[runs_m] = fitted, h
        free[runs_m] = len(y) - degree - 1
        residual[runs_m] = (y - fitted) / fitted / np.sqrt(np.maximum(1 - h, 1e-9))
    return Smooth(loss, np.where(free > 0, residual, 0.0), leverage, free)


def _to_unit(x: np.ndarray) -> np.ndarray:
    low, high = x.min(), x.max()
    return (2 * x - low - high) / (high - low) if high > low else np.zeros_like(x)


def resample(runs: Runs, fitted: np.ndarray, residual: np.ndarray, free: np.ndarray,
             count: int, seed: int) -> Float[np.ndarray, "B M"]:  # fmt: skip
    """Losses with each budget's relative residuals drawn anew, with replacement.

    A budget with fewer than FREEDOM degrees of freedom draws from those of all budgets that have
    any.
    """
    rng = np.random.default_rng(seed)
    losses = np.empty((count, len(runs)))
    everyone = residual[free > 0] if (free > 0).any() else np.zeros(1)
    for runs_m in runs.of_budgets():
        pool = residual[runs_m] if free[runs_m[0]] >= FREEDOM else everyone
        losses[:, runs_m] = fitted[runs_m] * (1 + draw(pool, (count, len(runs_m)), rng))
    return losses


def draw(residual: np.ndarray, shape: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Residuals drawn with replacement, without their mean but with all of their spread."""
    centred = residual - residual.mean()
    # Taking the mean off took some of the spread away.
    return rng.choice(centred * np.sqrt(len(centred) / max(len(centred) - 1, 1)), shape)


def _scale(fit: Smooth, runs: Runs, judged: np.ndarray) -> Float[np.ndarray, "M"]:
    """Robust standard deviation of each run's residual: its budget's or all budgets', the larger."""
    size = 1.4826 * np.abs(fit.residual)
    everyone = max(float(np.median(size[judged])), FLOOR)
    own = [max(everyone, float(np.median(size[runs_m]))) for runs_m in runs.of_budgets()]
    return np.array(own)[runs.budget]


@dataclasses.dataclass(frozen=True)
class Outlier:
    run: int
    reason: str

    def record(self, runs: Runs) -> dict[str, Any]:
        numbers = {n: float(getattr(runs, n)[self.run]) for n in ("flops", "tokens", "loss")}
        return {"label": runs.name(self.run), **numbers, "reason": self.reason}


def find_outliers(runs: Runs) -> list[Outlier]:
    """Runs far from their budget's curve, worst first, each with its reason."""
    kept = np.ones(len(runs), bool)
    found: list[Outlier] = []
    while len(found) < OUTLIER_SHARE * len(runs):
        indices = np.flatnonzero(kept)
        fit = smooth(runs.only(kept))
        judged = fit.free >= 2
        if not judged.any():
            break
        scale = _scale(fit, runs.only(kept), judged)
        size = np.where(judged, np.abs(fit.residual) / scale, 0.0)
        worst = int(size.argmax())
        if size[worst] < OUTLIER:
            break
        run = int(indices[worst])
        others = kept.copy()
        others[run] = False
        expected = _expected(runs, others, run)
        off = runs.loss[run] - expected
        reason = (
            f"loss {runs.loss[run]:.4f} is {abs(off):.4f} {'above' if off > 0 else 'below'} the "
            f"curve of its budget's other runs, {size[worst]:.0f} times the usual residual"
        )
        found.append(Outlier(run, reason))
        kept = others
    return found


def _expected(runs: Runs, others: np.ndarray, run: int) -> float:
    """The loss that the parabola of the budget's other runs gives."""
    same = others & (runs.budget == runs.budget[run])
    x, y = np.log(runs.tokens[same]), runs.loss[same]
    degree = min(2, len(np.unique(x)) - 1)
    return float(
        np.polyval(np.polyfit(x - x.mean(), y, degree), np.log(runs.tokens[run]) - x.mean())
    )
