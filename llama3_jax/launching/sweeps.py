"""Sweeps as lists of overrides, and how they combine.

product(sweep("optimizer.b2", [0.95, 0.98]), sweep("seed", range(3)))        # 6 units
zipped(sweep("model.dim", [64, 128]), sweep("model.layers", [2, 4]))         # 2 units
chain(product(…), zipped(…))                                                # one after the other
"""

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

from llama3_jax.errors import UserError

Overrides = dict[str, Any]


def sweep(key: str, values: Iterable[Any]) -> list[Overrides]:
    """One override for each value."""
    return [{key: value} for value in values]


def product(*sweeps: Sequence[Overrides]) -> list[Overrides]:
    """Every combination; the last sweep varies fastest."""
    return [_joined(parts) for parts in itertools.product(*sweeps)]


def zipped(*sweeps: Sequence[Overrides]) -> list[Overrides]:
    """The first of each together, then the second of each, …

    Raises:
      UserError: their lengths differ.
    """
    if len(lengths := {len(s) for s in sweeps}) > 1:
        raise UserError(f"zipped sweeps have different lengths: {', '.join(map(str, lengths))}")
    return [_joined(parts) for parts in zip(*sweeps, strict=True)]


def chain(*sweeps: Sequence[Overrides]) -> list[Overrides]:
    """One sweep after the other."""
    return [overrides for each in sweeps for overrides in each]


def parse(option: str) -> list[Overrides]:
    """`config.optimizer.b2=0.95,0.98`: commas inside brackets or quotes belong to a value.

    Raises:
      UserError: it has another form.
    """
    key, equals, values = option.partition("=")
    if not equals or not key.startswith("config.") or not values:
        raise UserError(f"--sweep={option}: config.KEY=VALUE,VALUE,… is expected")
    return sweep(key, _split(values, option))


def _split(values: str, option: str) -> list[str]:
    parts, depth, quote = [""], 0, ""
    for character in values:
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        elif character in "([{":
            depth += 1
        elif character in ")]}":
            depth -= 1
        if character == "," and not depth and not quote:
            parts.append("")
        else:
            parts[-1] += character
    if depth or quote or "" in parts:
        raise UserError(f"--sweep={option}: an empty value, or a bracket or quote left open")
    return parts


def _joined(parts: Iterable[Overrides]) -> Overrides:
    joined: Overrides = {}
    for part in parts:
        if twice := joined.keys() & part.keys():
            raise UserError(f"a product or zip sets {sorted(twice)[0]} twice")
        joined |= part
    return joined
