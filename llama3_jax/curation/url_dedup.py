"""Stage url_dedup: of the versions of a page, the newest stays (sec. 3.1.1 of the paper).

    url_dedup_survivor  of a rejected document: the `doc` that stays
    reason              url_dedup_older

Pages are the same when urls_canonical is; a page without URL is the same as none. Of two versions
with the same time, the one with the greater `doc` stays. Maximum by group and join: a window
over the same rows takes ten times the time and memory.
"""

from pathlib import Path

import daft
from daft import col, lit
from daft import functions as F

from llama3_jax.schema import Config

VERSION = 1
_DOC = 32  # hex digits


class UrlDedupConfig(Config):
    """Nothing to choose."""


def url_dedup(frame: daft.DataFrame, config: UrlDedupConfig, scratch: Path) -> daft.DataFrame:
    """Adds url_dedup_survivor and reason; needs urls_canonical of the stage urls."""
    # Times are compared as strings: "…00Z" would sort after "…00.5Z".
    time = F.regexp_replace(F.replace(col("time"), " ", "T"), r"(?:Z|\+00:?00)$", "")
    rank = F.concat(time, col("doc"))
    newest = (
        frame.where(F.length(col("urls_canonical")) > 0)
        .select(col("urls_canonical"), rank.alias("_rank"))
        .groupby("urls_canonical")
        .agg(col("_rank").max().alias("_newest"))
        .select("urls_canonical", F.right(col("_newest"), lit(_DOC)).alias("_survivor"))
    )
    frame = frame.join(newest, on="urls_canonical", how="left")
    # A column of its own: daft's where(a != b) on parquet with statistics loses rows.
    older = (col("_survivor") == col("doc")).fill_null(True)
    return frame.with_columns(
        {
            "url_dedup_survivor": F.when(older, lit(None)).otherwise(col("_survivor")),
            "reason": F.when(older, lit(None)).otherwise(lit("url_dedup_older")),
        }
    ).exclude("_survivor")
