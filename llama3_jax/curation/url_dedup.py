"""Stage url_dedup: of the versions of a page, the newest stays (sec. 3.1.1 of the paper).

    url_dedup_survivor  of a rejected document: the `doc` that stays
    reason              url_dedup_older

Pages are the same when urls_canonical is; a page without URL is the same as none. Of versions with
the same time the longest stays, of equal ones that with the greatest `doc`. Maximum by group and
join: a window over the same rows takes ten times the time and memory.
"""

from pathlib import Path

import daft
from daft import col, lit
from daft import functions as F

from llama3_jax.curation import survivors
from llama3_jax.schema import Config

VERSION = 1


class UrlDedupConfig(Config):
    """Nothing to choose."""


def url_dedup(frame: daft.DataFrame, config: UrlDedupConfig, scratch: Path) -> daft.DataFrame:
    """Adds url_dedup_survivor and reason; needs urls_canonical of the stage urls."""
    frame = frame.with_column("_page", page())
    ranked = frame.where(F.length(col("urls_canonical")) > 0).select(
        "_page", survivors.rank("newest").alias("rank")
    )
    best = survivors.best(ranked, "_page")
    joined = survivors.join(frame, best, "_page", "url_dedup_survivor", "url_dedup_older")
    return joined.exclude("_page")


def page() -> daft.Expression:
    """What versions of a page share. Documents without URL share nothing: one partition of a

    cluster would get the text of them all.
    """
    known = F.length(col("urls_canonical")) > 0
    return F.when(known, col("urls_canonical")).otherwise(F.concat(lit(" "), col("doc")))
