"""Runs of an IsoFLOP sweep: what was spent, on how many tokens, and the loss it bought."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int

from llama3_jax.errors import UserError
from llama3_jax.scaling.tables import read_columns, require_positive

# FLOPs of one budget may differ this much (whole batches); budgets must differ more than APART.
SAME_BUDGET = 1.01
APART = 1.1
# C = 6 N D (Kaplan et al. 2020, arXiv 2001.08361): the figure of the Llama 3 paper, with N
# without embeddings.
FLOPS_PER_PAIR = 6.0


@dataclasses.dataclass(frozen=True)
class Runs:
    """Runs in the order of their budget, then tokens; `budget` indexes `budgets` (FLOPs)."""

    budgets: Float[np.ndarray, "C"]
    budget: Int[np.ndarray, "M"]
    flops: Float[np.ndarray, "M"]
    tokens: Float[np.ndarray, "M"]
    params: Float[np.ndarray, "M"]
    loss: Float[np.ndarray, "M"]
    label: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.loss)

    def of_budgets(self) -> Iterator[np.ndarray]:
        """Indices of the runs of each budget."""
        for index in range(len(self.budgets)):
            yield np.flatnonzero(self.budget == index)

    def only(self, kept: np.ndarray) -> "Runs":
        """The runs where `kept`; a budget of which none is kept vanishes."""
        left, budget = np.unique(self.budget[kept], return_inverse=True)
        arrays = {n: getattr(self, n)[kept] for n in ("flops", "tokens", "params", "loss")}
        label = tuple(np.array(self.label, dtype=object)[kept])
        return Runs(self.budgets[left], budget, label=label, **arrays)

    @property
    def flops_per_pair(self) -> float:
        """C / (N D), median: 6 unless FLOPs or parameters are counted otherwise."""
        return float(np.median(self.flops / self.params / self.tokens))

    def name(self, index: int) -> str:
        return (
            self.label[index] or f"{self.flops[index]:.3g} FLOPs on {self.tokens[index]:.3g} tokens"
        )


def read_runs(path: Path) -> Runs:
    """Reads columns flops, tokens, loss and, where there, params and label.

    Raises:
      UserError: what cannot be fitted, by row.
    """
    columns = read_columns(path, ("flops", "tokens", "loss"), ("params",), ("label",))
    numbers = {name: values for name, values in columns.items() if name != "label"}
    require_positive(path, **numbers)
    return make_runs(**columns, where=str(path))


def make_runs(
    flops: np.ndarray, tokens: np.ndarray, loss: np.ndarray, params: np.ndarray | None = None,
    label: list[str] | None = None, where: str = "runs",
) -> Runs:  # fmt: skip
    """Sorts runs into budgets.

    Raises:
      UserError: the same run twice, budgets that nearly coincide, or only one budget.
    """
    params = flops / FLOPS_PER_PAIR / tokens if params is None else params
    label = list(label) if label is not None else [""] * len(flops)
    seen: dict[tuple, int] = {}
    for row, run in enumerate(zip(flops, tokens, params, loss, strict=True), start=2):
        if run in seen:
            raise UserError(
                f"{where}: rows {seen[run]} and {row} are the same run "
                f"({run[0]:.3g} FLOPs, {run[1]:.3g} tokens, loss {run[3]:g}); remove one"
            )
        seen[run] = row
    order = np.lexsort((tokens, flops))
    ratios = flops[order][1:] / flops[order][:-1]
    if (near := np.flatnonzero((ratios > SAME_BUDGET) & (ratios < APART))).size:
        first, second = flops[order][near[0] : near[0] + 2]
        raise UserError(
            f"{where}: budgets {first:.6g} and {second:.6g} are {second / first - 1:.1%} apart: "
            f"neither one nor two; write the intended budget into column flops"
        )
    budget = np.concatenate([[0], np.cumsum(ratios >= APART)])
    budgets = np.array(
        [np.exp(np.log(flops[order][budget == i]).mean()) for i in range(budget[-1] + 1)]
    )
    if len(budgets) < 2:
        raise UserError(
            f"{where}: one budget only ({budgets[0]:.3g} FLOPs): a law over budgets needs two at "
            "least, and three for its spread"
        )
    # Tokens fall in order only inside a budget.
    inside = np.lexsort((tokens[order], budget))
    order, budget = order[inside], budget[inside]
    return Runs(
        budgets, budget, flops[order], tokens[order], params[order], loss[order],
        tuple(label[i] for i in order),
    )  # fmt: skip
