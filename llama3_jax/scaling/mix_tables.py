"""Tables of mixes and losses, joined by their first column."""

from pathlib import Path

import numpy as np

from llama3_jax.errors import UserError
from llama3_jax.scaling.mix import MixRuns
from llama3_jax.scaling.tables import number, read_rows

PARAMS = "params"


def read_mix(weights: Path, losses: Path) -> MixRuns:
    """Reads a table of weights per source (and params) and one of losses per target.

    Raises:
      UserError: bad cells, weights that do not sum to 1 within 2%, runs that are in one file only.
    """
    sources, weight_rows = _by_run(weights)
    targets, loss_rows = _by_run(losses)
    missing = [
        run for run in (*weight_rows, *loss_rows) if (run in weight_rows) != (run in loss_rows)
    ]
    if missing:
        raise UserError(f"run {missing[0]!r} is in one of {weights} and {losses} only")
    runs = list(weight_rows)
    table = np.array([weight_rows[run] for run in runs])
    params = np.ones(len(runs))
    if PARAMS in sources:
        at = sources.index(PARAMS)
        params = table[:, at]
        table, sources = np.delete(table, at, axis=1), [s for s in sources if s != PARAMS]
    for row, (mix, size) in enumerate(zip(table, params, strict=True), start=2):
        if (mix < 0).any():
            raise UserError(f"{weights}: row {row}: weight {mix.min():g} is negative")
        if abs(mix.sum() - 1) > 0.02:
            raise UserError(f"{weights}: row {row}: weights sum to {mix.sum():.3f}, not to 1")
        if size <= 0:
            raise UserError(f"{weights}: row {row}: params is {size:g}; it must be positive")
    table = table / table.sum(axis=1, keepdims=True)
    values = np.array([loss_rows[run] for run in runs])
    if (values <= 0).any():
        row, column = np.argwhere(values <= 0)[0]
        raise UserError(f"{losses}: run {runs[row]!r}: {targets[column]} is {values[row, column]:g}; "
                        "a loss must be positive")  # fmt: skip
    return MixRuns(tuple(sources), tuple(targets), table, params, values)


def _by_run(path: Path) -> tuple[list[str], dict[str, list[float]]]:
    header, rows = read_rows(path)
    if len(header) < 2:
        raise UserError(f"{path}: one column only; the first names runs, the others hold numbers")
    found: dict[str, list[float]] = {}
    for line, row in enumerate(rows, start=2):
        if row[0] in found:
            raise UserError(f"{path}: row {line}: run {row[0]!r} is there twice")
        cells = zip(row[1:], header[1:], strict=True)
        found[row[0]] = [number(cell, path, line, name) for cell, name in cells]
    return header[1:], found
