"""Block sizes, warps and pipeline stages of every kernel, read from tuning.json beside this file.

`python -m experiments.benchmarks.tune_kernels` writes the table on a GPU; nothing is tuned while a
run starts. Where "measured" is null the rows are a first choice that was never timed: all that is
known of them is that they compile for sm_90 without spilling.
"""

import functools
import json
from pathlib import Path
from typing import Any, NamedTuple

from llama3_jax.errors import UserError

TABLE = Path(__file__).with_name("tuning.json")


class Blocks(NamedTuple):
    """A kernel's tile, M rows by N columns, and how it is compiled."""

    M: int
    N: int
    num_warps: int
    num_stages: int


@functools.cache
def table() -> dict[str, Any]:
    return json.loads(TABLE.read_text(encoding="utf-8"))


def blocks_for(kernel: str, row: str) -> Blocks:
    """The row of a kernel's table, such as "128 bfloat16".

    Raises:
      UserError: the kernel has no such row.
    """
    rows = table()["kernels"][kernel]
    if row not in rows:
        raise UserError(f"no tuned sizes for {kernel} on {row!r} in {TABLE}; it has {list(rows)}")
    return Blocks(**rows[row])
