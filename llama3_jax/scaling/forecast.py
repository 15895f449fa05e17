"""Forecasts of accuracy with their interval, their coverage test and their back-test.

Shapes as in downstream.py.
"""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from llama3_jax.errors import UserError
from llama3_jax.scaling.downstream import (
    COEFFICIENTS,
    FORMS,
    Checkpoints,
    Ladder,
    Target,
    accuracy_at,
    fit_sigmoid,
    predict_accuracy,
    predict_nll,
)
from llama3_jax.scaling.isoflop import interval
from llama3_jax.scaling.runs import FLOPS_PER_PAIR
from llama3_jax.scaling.tables import number, read_rows

EXTERNAL = "external"


@dataclasses.dataclass(frozen=True)
class Options:
    """`average` checkpoints make a run's end; `skip` is the share of its start that stage 2 omits;
    `at_zero_loss` is the accuracy at an NLL of 0, or None."""

    forms: tuple[str, ...] = FORMS
    resamples: int = 500
    level: float = 0.9
    seed: int = 0
    average: int = 1
    skip: float = 0.1
    at_zero_loss: float | None = 1.0


def read_task(path: Path, task: str | None, options: Options) -> tuple[Ladder, Checkpoints]:
    """Reads columns run, params, tokens, nll, accuracy and, where there, flops, task, role.

    A row is a checkpoint. Rows whose role is "external" need no params and tokens: they are models
    of others, and count in stage 2 only.

    Raises:
      UserError: an absent column or a bad cell, by row; a task that is not there, or none named of
        several.
    """
    header, rows = read_rows(path)
    for name in ("run", "params", "tokens", "nll", "accuracy"):
        if name not in header:
            raise UserError(f"{path}: column {name!r} is absent; there: {', '.join(header)}")
    cells = [dict(zip(header, row, strict=True)) for row in rows]
    tasks = list(dict.fromkeys(row.get("task", "") for row in cells))
    if task is None and len(tasks) > 1:
        raise UserError(f"{path} holds {len(tasks)} tasks ({', '.join(tasks[:8])}); name one")
    if task is not None and task not in tasks:
        raise UserError(f"{path}: no task {task!r}; there: {', '.join(tasks)}")
    by_run: dict[str, list[tuple[int, dict[str, str]]]] = {}
    for line, row in enumerate(cells, start=2):
        if task in (None, row.get("task", "")):
            by_run.setdefault(row["run"], []).append((line, row))

    def value(line: int, row: dict[str, str], name: str, positive: bool = True) -> float:
        found = number(row[name], path, line, name)
        if positive and found <= 0:
            raise UserError(f"{path}: row {line}: {name} is {found:g}; it must be positive")
        return found

    ladder, pairs = [], []
    for run, own in by_run.items():
        nll = np.array([value(line, row, "nll") for line, row in own])
        accuracy = np.array([value(line, row, "accuracy", False) for line, row in own])
        if ((accuracy < 0) | (accuracy > 1)).any():
            at = int(np.flatnonzero((accuracy < 0) | (accuracy > 1))[0])
            raise UserError(f"{path}: row {own[at][0]}: accuracy is {accuracy[at]:g}; 0 to 1")
        skipped = 0
        if own[-1][1].get("role") != EXTERNAL:
            tokens = np.array([value(line, row, "tokens") for line, row in own])
            order = np.argsort(tokens, kind="stable")
            nll, accuracy = nll[order], accuracy[order]
            line, row = own[order[-1]]
            params = value(line, row, "params")
            flops = (
                value(line, row, "flops")
                if row.get("flops", "").strip()
                else FLOPS_PER_PAIR * params * tokens.max()
            )
            ladder.append((run, params, tokens.max(), flops, nll[-options.average :].mean()))
            skipped = int(np.ceil(options.skip * len(own))) if len(own) > 1 else 0
        pairs += [(run, x, y) for x, y in zip(nll[skipped:], accuracy[skipped:], strict=True)]
    if len(ladder) < 3:
        raise UserError(f"{path}: {len(ladder)} ladder runs; a forecast needs three at least")
    names, *columns = zip(*ladder, strict=True)
    runs, xs, ys = zip(*pairs, strict=True)
    return (
        Ladder(names, *map(np.array, columns)),
        Checkpoints(runs, np.array(xs), np.array(ys)),
    )


def forecast(
    ladder: Ladder, checkpoints: Checkpoints, target: Target, options: Options
) -> dict[str, Any]:
    """NLL and accuracy of the target by each form, with intervals through both stages.

    An interval is of what the target run will show, its own noise included.

    Each form carries its own back-test: the largest model left out of both stages and predicted.
    """
    warnings: list[str] = []
    sigmoids, sigmoid = fit_sigmoid(
        checkpoints, options.resamples, options.seed, options.at_zero_loss
    )
    forms = {}
    for form in options.forms:
        if len(ladder.run) <= COEFFICIENTS[form]:
            warnings.append(f"too-few-runs: {form} has {COEFFICIENTS[form]} coefficients, the "
                            f"ladder {len(ladder.run)} runs")  # fmt: skip
            continue
        nll, fitted = predict_nll(form, ladder, target, options.resamples, options.seed + 1)
        accuracy = predict_accuracy(sigmoids, nll, sigmoid, options.seed + 2)
        bounds = interval(nll[1:], options.level)
        covered = bool(checkpoints.nll.min() <= nll[0])
        if not covered:
            warnings.append(
                f"not-covered: {form}: stage 2 has no model below an NLL of "
                f"{checkpoints.nll.min():.4f}, the target's is {nll[0]:.4f}: its accuracy "
                "extrapolates the sigmoid, which no interval here accounts for"
            )
        if "certificate" in fitted and not fitted["certificate"]["certified"]:
            warnings.append(f"not-certified: {form}: few starts reached the best minimum")
        forms[form] = {
            "nll": float(nll[0]),
            "nll_ci": bounds,
            "accuracy": float(accuracy[0]),
            "accuracy_ci": interval(accuracy[1:], options.level),
            "covered": covered,
            "coefficients": fitted,
            "back_test": back_test(form, ladder, checkpoints, options),
        }
    if len(forms) > 1:
        values = [form["accuracy"] for form in forms.values()]
        warnings.append(f"spread: accuracy by form ranges from {min(values):.3f} to "
                        f"{max(values):.3f}")  # fmt: skip
    return {
        "target": dataclasses.asdict(target),
        "level": options.level,
        "forms": forms,
        "sigmoid": sigmoid,
        "stage2_least_nll": float(checkpoints.nll.min()),
        "warnings": warnings,
    }


def back_test(
    form: str, ladder: Ladder, checkpoints: Checkpoints, options: Options
) -> dict[str, Any] | None:
    """The largest model's longest run, predicted from all smaller ones; None if they are too few."""
    largest = ladder.params == ladder.params.max()
    rest = ladder.only(~largest)
    if len(rest.run) < COEFFICIENTS[form]:
        return None
    at = int(np.argmax(np.where(largest, ladder.flops, 0)))
    run = ladder.run[at]
    target = Target(ladder.params[at], ladder.tokens[at], ladder.flops[at])
    held_out = {name for name, out in zip(ladder.run, largest, strict=True) if out}
    fewer = checkpoints.without(held_out)
    nll, _ = predict_nll(form, rest, target, 50, options.seed)
    sigmoids, _ = fit_sigmoid(fewer, 50, options.seed, options.at_zero_loss)
    predicted = float(accuracy_at(sigmoids[:1], nll[:1])[0])
    own = [a for name, a in zip(checkpoints.run, checkpoints.accuracy, strict=True) if name == run]
    actual = float(own[-1])
    return {
        "run": run,
        "nll": float(nll[0]),
        "nll_actual": float(ladder.nll[at]),
        "nll_error": float(nll[0] / ladder.nll[at] - 1),
        "accuracy": predicted,
        "accuracy_actual": actual,
        "accuracy_error": predicted - actual,
    }
