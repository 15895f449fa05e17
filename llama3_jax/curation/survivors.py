"""Which of several versions of a document stays: one total order, whatever the partitioning."""

from collections.abc import Sequence
from typing import Literal

import daft
from daft import col, lit
from daft import functions as F

Rule = Literal["newest", "longest"]
_DOC = 32  # hex digits of a document's name


def rank(rule: Rule, prefer: Sequence[str] = ()) -> daft.Expression:
    """A string that is greatest for the document to keep; ties fall to the other rule, then to `doc`.

    Of columns source, time, text and doc. Documents of the sources in `prefer`, in their order, come
    before all others. Times are compared as strings, so that a missing one is oldest.
    """
    # "…00Z" would sort after "…00.5Z".
    time = F.regexp_replace(F.replace(col("time"), " ", "T"), r"(?:Z|\+00:?00)$", "")
    length = F.lpad(F.length(col("text")).cast(daft.DataType.string()), 12, "0")
    parts = (time, length) if rule == "newest" else (length, time)
    # A space sorts before all that a time may hold.
    place = lit("0000 ")
    for number, source in enumerate(reversed(prefer), 1):
        place = F.when(col("source") == source, lit(f"{number:04} ")).otherwise(place)
    rest = F.concat(
        F.concat(F.concat(parts[0], lit(" ")), F.concat(parts[1], lit(" "))), col("doc")
    )
    return F.concat(place, rest)


def best(ranked: daft.DataFrame, group: str) -> daft.DataFrame:
    """(group, survivor) from rows of (group, rank)."""
    best = ranked.groupby(group).agg(col("rank").max().alias("best"))
    return best.select(group, F.right(col("best"), lit(_DOC)).alias("survivor"))


def join(
    frame: daft.DataFrame, survivors: daft.DataFrame, on: str, column: str, reason: str
) -> daft.DataFrame:
    """Adds `column` (the survivor) and reason to the rows that `survivors` (on, survivor) replace."""
    frame = frame.join(survivors, on=on, how="left")
    # A column of its own: daft's where(a != b) on parquet with statistics loses rows.
    stays = (col("survivor") == col("doc")).fill_null(True)
    return frame.with_columns(
        {
            column: F.when(stays, lit(None)).otherwise(col("survivor")),
            "reason": F.when(stays, lit(None)).otherwise(lit(reason)),
        }
    ).exclude("survivor")
