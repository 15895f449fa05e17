"""Tables of runs, read and checked: what cannot be fitted is named by file, row and column."""

import csv
import difflib
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from llama3_jax.errors import UserError


def read_columns(
    path: Path, numbers: Sequence[str], optional: Sequence[str] = (), texts: Sequence[str] = ()
) -> dict[str, np.ndarray | list[str]]:
    """Columns of a CSV file: float64 arrays, and lists for `texts`; `optional` ones may be absent.

    A text column that the file lacks is left out, too.

    Raises:
      UserError: no such file, no rows, an absent column, or a cell that is no finite number.
    """
    header, rows = read_rows(path)
    for name in numbers:
        if name not in header:
            near = difflib.get_close_matches(name, header, n=1, cutoff=0.5)
            hint = f"; is it {near[0]!r}?" if near else ""
            raise UserError(f"{path}: column {name!r} is absent; there: {', '.join(header)}{hint}")
    columns: dict[str, np.ndarray | list[str]] = {}
    for name in (*numbers, *(n for n in optional if n in header)):
        at = header.index(name)
        columns[name] = np.array(
            [number(row[at], path, line, name) for line, row in enumerate(rows, start=2)]
        )
    for name in texts:
        if name in header:
            columns[name] = [row[header.index(name)] for row in rows]
    return columns


def read_rows(path: Path) -> tuple[list[str], list[list[str]]]:
    """Header and rows, each as long as the header.

    Raises:
      UserError: no such file, not text, no rows, or a row of another length.
    """
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            lines = [row for row in csv.reader(file) if row]
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: not a CSV file: {error}") from None
    if len(lines) < 2:
        raise UserError(f"{path}: no rows under the header")
    header = [name.strip() for name in lines[0]]
    if repeated := [name for name in header if header.count(name) > 1]:
        raise UserError(f"{path}: column {repeated[0]!r} is there twice")
    for line, row in enumerate(lines[1:], start=2):
        if len(row) != len(header):
            raise UserError(f"{path}: row {line} has {len(row)} cells, the header {len(header)}")
    return header, lines[1:]


def number(cell: str, path: Path, line: int, column: str) -> float:
    """A cell as a finite number.

    Raises:
      UserError: it is not one; names file, row and column.
    """
    try:
        value = float(cell)
    except ValueError:
        raise UserError(f"{path}: row {line}: {column} is {cell!r}, not a number") from None
    if not math.isfinite(value):
        raise UserError(
            f"{path}: row {line}: {column} is {cell.strip()}; remove the run or fix the value"
        )
    return value


def require_positive(path: Path, **columns: np.ndarray) -> None:
    """
    Raises:
      UserError: a value is zero or negative; names its row.
    """
    for name, values in columns.items():
        if (bad := np.flatnonzero(values <= 0)).size:
            raise UserError(
                f"{path}: row {bad[0] + 2}: {name} is {values[bad[0]]:g}; it must be positive"
            )
