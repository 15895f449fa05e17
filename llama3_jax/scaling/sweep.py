"""The IsoFLOP sweep before it runs: which shapes of the ladder get how many tokens at each budget.

Llama 3 paper, section 3.2.1: budgets from 6e18 to 1e22 FLOPs, models from 40M to 16B, warm-up of
2,000 steps, cosine to a tenth of the peak, one batch for each budget.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from llama3_jax.errors import UserError
from llama3_jax.model.config import PRESETS
from llama3_jax.model.definition import define
from llama3_jax.model.flops import training_flops
from llama3_jax.scaling.profiles import profile
from llama3_jax.scaling.runs import FLOPS_PER_PAIR

LADDER = (
    "42M", "62M", "124M", "227M", "380M", "621M", "1.02B", "1.47B", "2.03B", "3.23B", "4.6B",
    "7.0B", "10.8B", "16.2B",
)  # fmt: skip
BUDGETS = (6e18, 1e19, 3e19, 6e19, 1e20, 3e20, 6e20, 1e21, 3e21, 1e22)
# tokens = A C^alpha: a refit of the paper's figure 2 (its printed 0.29 C^0.53 is truncated).
LLAMA3_TOKENS_LAW = (0.537, 0.299)
WARMUP_STEPS = 2_000
SIZES, WIDTH = 7, 4.0


@dataclasses.dataclass(frozen=True)
class PlannedRun:
    """A run of the sweep. Tokens are whole steps; FLOPs stand there by three conventions.

    `flops_6nd` is 6 N D without embeddings, as the paper's figure counts; `flops_matmul` adds the
    head, `flops_causal` the attention scores of pairs that are not in the future.
    """

    budget: float
    shape: str
    params: int
    params_with_embeddings: int
    tokens: int
    steps: int
    batch_tokens: int
    length: int
    learning_rate: float
    warmup_steps: int
    flops_6nd: float
    flops_matmul: float
    flops_causal: float

    @property
    def name(self) -> str:
        return f"{self.budget:g},{self.shape}"


def optimal_tokens(budget: float, law: tuple[float, float] = LLAMA3_TOKENS_LAW) -> float:
    """Predicted compute-optimal tokens; `law` is (exponent, coefficient)."""
    return law[1] * budget ** law[0]


def plan_run(
    budget: float, shape: str, profile_name: str = "llama3", length: int = 8192, ranks: int = 1
) -> PlannedRun:
    """One shape at one budget; its batch is a multiple of `length` x `ranks`.

    The profile's batch is taken at the budget's optimum, so that a budget has one batch.

    Raises:
      UserError: an unknown shape or profile.
    """
    if shape not in PRESETS:
        raise UserError(f"shape {shape!r} is unknown; the ladder: {', '.join(LADDER)}")
    model, rule = PRESETS[shape], profile(profile_name)
    params = define(model).parameter_count(embeddings=False)
    best = optimal_tokens(budget)
    unit = length * ranks
    wanted = rule.batch_tokens(budget / FLOPS_PER_PAIR / best, best, budget)
    batch = max(round(wanted / unit), 1) * unit
    steps = max(round(budget / FLOPS_PER_PAIR / params / batch), 1)
    tokens = steps * batch
    counted = training_flops(model, 1, length, 0)
    return PlannedRun(
        budget=budget, shape=shape, params=params, params_with_embeddings=define(model).parameter_count(),
        tokens=tokens, steps=steps, batch_tokens=batch, length=length,
        learning_rate=rule.learning_rate(params, tokens, budget), warmup_steps=WARMUP_STEPS,
        flops_6nd=FLOPS_PER_PAIR * params * tokens,
        flops_matmul=6.0 * define(model).matmul_parameters() * tokens,
        flops_causal=counted["causal"] / length * tokens,
    )  # fmt: skip


def isoflop_sweep(
    budgets: Sequence[float] = BUDGETS, sizes: int = SIZES, profile_name: str = "llama3",
    length: int = 8192, ranks: int = 1,
) -> list[PlannedRun]:  # fmt: skip
    """`sizes` shapes of the ladder a budget: those nearest to the optimum on either side.

    Raises:
      UserError: fewer shapes than asked for lie within reach, or an unknown profile.
    """
    if not 3 <= sizes <= len(LADDER):
        raise UserError(f"sizes is {sizes}; the ladder has {len(LADDER)}, a parabola needs 3")
    runs = []
    for budget in budgets:
        planned = [plan_run(budget, shape, profile_name, length, ranks) for shape in LADDER]
        off = np.array([abs(np.log(run.tokens / optimal_tokens(budget))) for run in planned])
        nearest = np.sort(np.argsort(off, kind="stable")[:sizes])
        runs += [planned[i] for i in nearest]
    return runs
