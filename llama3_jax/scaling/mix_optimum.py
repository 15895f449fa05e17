"""The mix of least predicted loss on the simplex, within bounds and a cap on epochs.

Shapes: S sources, K candidates.
"""

from collections.abc import Callable

import numpy as np
import scipy.optimize
from jaxtyping import Float

from llama3_jax.errors import UserError

CANDIDATES, BEST = 20_000, 100


def epoch_caps(
    available_tokens_S: np.ndarray, total_tokens: float, max_epochs: float
) -> Float[np.ndarray, "S"]:
    """The largest weight of each source that reads it at most `max_epochs` times."""
    return np.minimum(max_epochs * np.asarray(available_tokens_S) / total_tokens, 1.0)


def optimum(
    loss: Callable[[Float[np.ndarray, "K S"]], Float[np.ndarray, "K"]],
    low_S: np.ndarray, high_S: np.ndarray, smooth: bool, seed: int = 0,
) -> tuple[Float[np.ndarray, "S"], float]:  # fmt: skip
    """(weights, predicted loss) of the best mix with low <= weights <= high.

    A smooth law is minimised by SLSQP from the best of random mixes; for trees the mean of the
    best mixes is taken, since their surface is steps.

    Raises:
      UserError: no mix satisfies the bounds.
    """
    low, high = np.asarray(low_S, float), np.asarray(high_S, float)
    if (low > high).any():
        at = int(np.flatnonzero(low > high)[0])
        raise UserError(f"source {at}: its least weight {low[at]:g} exceeds its cap {high[at]:g}")
    if not low.sum() <= 1 + 1e-9 <= high.sum() + 2e-9:
        raise UserError(
            f"no mix satisfies the bounds: least weights sum to {low.sum():.3g}, caps to "
            f"{high.sum():.3g}; more data, more epochs or fewer tokens would help"
        )
    rng = np.random.default_rng(seed)
    spread = rng.dirichlet(np.ones(len(low)), CANDIDATES // 2)
    sparse = rng.dirichlet(np.full(len(low), 0.3), CANDIDATES - len(spread))
    candidates = project(np.concatenate([spread, sparse]), low, high)
    values = loss(candidates)
    order = np.argsort(values)
    if not smooth:
        best = candidates[order[:BEST]].mean(axis=0)
        return best, float(loss(best[None])[0])
    best, value = candidates[order[0]], float(values[order[0]])
    for start in candidates[order[:4]]:
        found = scipy.optimize.minimize(
            lambda w: float(loss(w[None])[0]), start, method="SLSQP",
            bounds=list(zip(low, high, strict=True)),
            constraints={"type": "eq", "fun": lambda w: w.sum() - 1},
            options={"maxiter": 500, "ftol": 1e-12},
        )  # fmt: skip
        feasible = project(found.x[None], low, high)[0]
        if (reached := float(loss(feasible[None])[0])) < value:
            best, value = feasible, reached
    return best, value


def project(
    weights_KS: np.ndarray, low_S: np.ndarray, high_S: np.ndarray
) -> Float[np.ndarray, "K S"]:
    """The nearest mixes within the bounds: clip(w - shift), the shift found by bisection."""
    below = (weights_KS - high_S).min(axis=1, keepdims=True)
    above = (weights_KS - low_S).max(axis=1, keepdims=True)
    for _ in range(60):
        shift = (below + above) / 2
        too_much = np.clip(weights_KS - shift, low_S, high_S).sum(axis=1, keepdims=True) > 1
        below, above = np.where(too_much, shift, below), np.where(too_much, above, shift)
    return np.clip(weights_KS - (below + above) / 2, low_S, high_S)
