"""Annealing as a judge of data (Llama 3 paper, section 3.1.3): a candidate against a control arm.

Both arms take the same half-trained checkpoint's learning rate to 0 over the same tokens; the
candidate's arm reads 30% of it, the control's none. Each arm is run with several seeds, and what a
benchmark differs by stands beside the smallest difference that the design could have seen: a gain
below that is no evidence, nor is its absence.
"""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import scipy.optimize
import scipy.stats

from llama3_jax.errors import UserError
from llama3_jax.scaling.tables import number, read_rows

CONTROL = "control"
POWER = 0.8


@dataclasses.dataclass(frozen=True)
class Probes:
    """Scores by (arm, benchmark): one a seed, seeds in ascending order."""

    scores: dict[tuple[str, str], dict[str, float]]

    @property
    def candidates(self) -> list[str]:
        return [arm for arm in dict.fromkeys(a for a, _ in self.scores) if arm != CONTROL]

    @property
    def benchmarks(self) -> list[str]:
        return list(dict.fromkeys(benchmark for _, benchmark in self.scores))


def read_probes(path: Path) -> Probes:
    """Reads columns arm ("control" or a candidate), seed, benchmark, score.

    Raises:
      UserError: an absent column, a bad cell, a run there twice, no control arm, fewer than two
        seeds of an arm.
    """
    header, rows = read_rows(path)
    for name in ("arm", "seed", "benchmark", "score"):
        if name not in header:
            raise UserError(f"{path}: column {name!r} is absent; there: {', '.join(header)}")
    scores: dict[tuple[str, str], dict[str, float]] = {}
    for line, row in enumerate(rows, start=2):
        cells = dict(zip(header, row, strict=True))
        own = scores.setdefault((cells["arm"], cells["benchmark"]), {})
        if cells["seed"] in own:
            raise UserError(f"{path}: row {line}: {cells['arm']}, seed {cells['seed']}, "
                            f"{cells['benchmark']} is there twice")  # fmt: skip
        own[cells["seed"]] = number(cells["score"], path, line, "score")
    probes = Probes(scores)
    if not probes.candidates:
        raise UserError(f"{path}: no candidate: every row's arm is {CONTROL!r}")
    for benchmark in probes.benchmarks:
        for arm in (CONTROL, *probes.candidates):
            count = len(scores.get((arm, benchmark), {}))
            if count == 0:
                raise UserError(f"{path}: {benchmark} has no runs of arm {arm!r}")
            if count < 2:
                raise UserError(f"{path}: {benchmark} has one seed of arm {arm!r}: without a second "
                                "its noise is unknown")  # fmt: skip
    return probes


def judge(probes: Probes, level: float = 0.9) -> dict[str, Any]:
    """Difference of each candidate from the control on each benchmark.

    Welch's interval; where all seeds are in both arms, the paired one. Intervals and detectable
    effects are corrected for the number of comparisons on a benchmark (Bonferroni over
    candidates), p-values by Holm's method.
    """
    count = len(probes.candidates)
    alpha = (1 - level) / count
    rows: list[dict[str, Any]] = []
    for benchmark in probes.benchmarks:
        control = probes.scores[CONTROL, benchmark]
        own = []
        for candidate in probes.candidates:
            scores = probes.scores[candidate, benchmark]
            own.append({"candidate": candidate, "benchmark": benchmark,
                        **_compare(scores, control, alpha)})  # fmt: skip
        for row, p in zip(own, _holm([row["p"] for row in own]), strict=True):
            row["p_corrected"] = p
            row["verdict"] = _verdict(row)
        rows += own
    return {"level": level, "candidates": count, "comparisons": rows, "power": POWER}


def _compare(scores: dict[str, float], control: dict[str, float], alpha: float) -> dict[str, Any]:
    paired = set(scores) == set(control) and len(scores) > 2
    a, b = np.array(list(scores.values())), np.array(list(control.values()))
    if paired:
        differences = np.array([scores[seed] - control[seed] for seed in control])
        error, freedom = differences.std(ddof=1) / np.sqrt(len(differences)), len(differences) - 1
    else:
        parts = np.array([a.var(ddof=1) / len(a), b.var(ddof=1) / len(b)])
        error = np.sqrt(parts.sum())
        below = (parts**2 / [len(a) - 1, len(b) - 1]).sum()
        freedom = parts.sum() ** 2 / below if below > 0 else len(a) + len(b) - 2
    difference = a.mean() - b.mean()
    critical = scipy.stats.t.ppf(1 - alpha / 2, freedom)
    if error > 0:
        p = 2 * scipy.stats.t.sf(abs(difference) / error, freedom)
    else:
        p = 0.0 if difference else 1.0
    return {
        "difference": float(difference),
        "ci": [float(difference - critical * error), float(difference + critical * error)],
        "p": float(p),
        "smallest_detectable": float(error * _detectable(critical, freedom)),
        "seeds": [len(a), len(b)],
        "paired": paired,
    }


def _detectable(critical: float, freedom: float) -> float:
    """The effect, in standard errors, that a two-sided t-test finds with probability POWER."""

    def missing(effect: float) -> float:
        return POWER - scipy.stats.nct.sf(critical, freedom, effect)

    return scipy.optimize.brentq(missing, 0.0, 10 * critical + 10)


def _holm(p: list[float]) -> list[float]:
    order = np.argsort(p)
    corrected, highest = np.empty(len(p)), 0.0
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, (len(p) - rank) * p[index]))
        corrected[index] = highest
    return [float(v) for v in corrected]


def _verdict(row: dict[str, Any]) -> str:
    low, high = row["ci"]
    if low > 0:
        return "better"
    if high < 0:
        return "worse"
    if max(-low, high) < row["smallest_detectable"]:
        return "no difference of a detectable size"
    return "undecided"
