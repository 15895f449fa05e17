"""Stage url_dedup: of the versions of a page, the newest stays (sec. 3.1.1 of the paper).

    url_dedup_survivor  of a rejected document: the `doc` that stays
    reason              url_dedup_older

Pages are the same when urls_canonical is; a page without URL is the same as none. Of versions with
the same time the longest stays, of equal ones that with the greatest `doc`. Maximum by group and
join: a window over the same rows takes ten times the time and memory.
"""

from pathlib import Path

import daft
from daft import col
from daft import functions as F

from llama3_jax.curation import survivors
from llama3_jax.schema import Config

VERSION = 1


class UrlDedupConfig(Config):
    """Nothing to choose."""


def url_dedup(frame: daft.DataFrame, config: UrlDedupConfig, scratch: Path) -> daft.DataFrame:
    """Adds url_dedup_survivor and reason; needs urls_canonical of the stage urls."""
    ranked = frame.where(F.length(col("urls_canonical")) > 0).select(
        "urls_canonical", survivors.rank("newest").alias("rank")
    )
    best = survivors.best(ranked, "urls_canonical")
    return survivors.join(frame, best, "urls_canonical", "url_dedup_survivor", "url_dedup_older")
