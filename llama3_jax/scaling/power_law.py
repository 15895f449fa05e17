"""y = A C^alpha by least squares of logs, for many resamples at once (B of them, C budgets)."""

import dataclasses

import numpy as np
from jaxtyping import Float


@dataclasses.dataclass(frozen=True)
class PowerLaw:
    """Exponents and log coefficients; NaN where fewer than two points were there."""

    alpha: Float[np.ndarray, "B"]
    log_A: Float[np.ndarray, "B"]

    def __call__(self, flops: float) -> Float[np.ndarray, "B"]:
        with np.errstate(over="ignore"):
            return np.exp(self.log_A + self.alpha * np.log(flops))


def fit_power_law(flops_C: np.ndarray, values_BC: np.ndarray) -> PowerLaw:
    """Least squares of log values on log FLOPs; values that are NaN are left out."""
    there = np.isfinite(values_BC)
    count = there.sum(axis=1)
    x = np.where(there, np.log(flops_C), 0.0)
    y = np.log(np.where(there, values_BC, 1.0))
    with np.errstate(divide="ignore", invalid="ignore"):
        mean_x, mean_y = x.sum(axis=1) / count, y.sum(axis=1) / count
        dx = np.where(there, x - mean_x[:, None], 0.0)
        alpha = (dx * y).sum(axis=1) / (dx**2).sum(axis=1)
    alpha = np.where(count >= 2, alpha, np.nan)
    return PowerLaw(alpha, mean_y - alpha * mean_x)
