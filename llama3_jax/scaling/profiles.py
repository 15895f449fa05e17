"""Peak learning rate and batch by named profile, each as its source gives it.

N: parameters without embeddings; D: tokens of the run; C = 6 N D.
"""

import dataclasses
from collections.abc import Callable

from llama3_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Profile:
    """Functions (N, D, C) -> peak learning rate, and -> batch in tokens."""

    source: str
    learning_rate: Callable[[float, float, float], float]
    batch_tokens: Callable[[float, float, float], float]


def _clip(value: float, low: float, high: float) -> float:
    return min(max(value, low), high)


PROFILES = {
    # The paper's section 3.2.1 gives ranges only: 2e-4 to 4e-4 by size, 250K to 4M tokens by budget.
    # Both power laws are our interpolation between their ends.
    "llama3": Profile(
        "Llama 3 paper, section 3.2.1, interpolated",
        lambda N, D, C: _clip(4e-4 * (N / 40e6) ** -0.1157, 2e-4, 4e-4),
        lambda N, D, C: _clip(250e3 * (C / 6e18) ** 0.3737, 250e3, 4e6),
    ),
    "steplaw": Profile(
        "Li et al. 2025, arXiv 2503.04715",
        lambda N, D, C: 1.79 * N**-0.713 * D**0.307,
        lambda N, D, C: 0.58 * D**0.571,
    ),
    "deepseek": Profile(
        "DeepSeek LLM, Bi et al. 2024, arXiv 2401.02954",
        lambda N, D, C: 0.3118 * C**-0.125,
        lambda N, D, C: 0.2920 * C**0.3271,
    ),
    # Rounded fits of their sweep at 20 tokens a parameter; batch of rows of 2,048 tokens.
    "porian": Profile(
        "Porian et al. 2024, arXiv 2406.19146, section 3.5",
        lambda N, D, C: 0.0047 * (N / 108e6) ** (-1 / 3),
        lambda N, D, C: 160 * 2048 * (N / 108e6) ** (2 / 3),
    ),
}


def profile(name: str) -> Profile:
    """
    Raises:
      UserError: no such profile.
    """
    if name not in PROFILES:
        raise UserError(f"profile {name!r} is unknown; known: {', '.join(PROFILES)}")
    return PROFILES[name]
