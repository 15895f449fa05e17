"""Stage lines: lines that a bucket of documents holds too often go (sec. 3.1.1, as ccNet).

    text           without these lines, the others in their order
    lines_removed  how many went
    reason         lines_empty where nothing is left

Two lines are the same when they are so in lower case, with every digit read as 0, and without
anything but letters, marks and digits (Wenzek et al. 2020, sec. 3.1, who drop accents too). A line
of which that leaves nothing (a bracket, a rule, an empty line) is not counted and stays: without
these no code would be whole. Blank lines around a line that went are joined.
"""

import math
from pathlib import Path
from typing import Literal

import daft
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from daft import col, lit
from daft import functions as F
from pydantic import Field

from llama3_jax.curation import components, words
from llama3_jax.schema import Config

VERSION = 1
_LINE = ("index", "hash", "first")


class LinesConfig(Config):
    """A line seen more than `most` times in a bucket of `bucket_documents` goes, each time (the paper).

    `count` says whether a line that a document repeats counts each time or once. Documents of
    `exempt_sources` lose no line, but theirs are counted.
    """

    most: int = Field(6, ge=1)
    bucket_documents: int = Field(30_000_000, ge=1)
    count: Literal["occurrences", "documents"] = "occurrences"
    within_language: bool = True
    exempt_sources: tuple[str, ...] = ()


def lines(frame: daft.DataFrame, config: LinesConfig, scratch: Path) -> daft.DataFrame:
    """Changes text, adds lines_removed and reason."""
    language = col("language") if config.within_language else lit("")
    table = frame.with_column("bucket", bucket(frame, config)).with_column("group", language)
    table = table.with_column("lines", _Hashes()(normalized(col("text"))))
    parts = [col("lines").get(key).alias(key) for key in _LINE]
    table = table.select("doc", "source", "group", "bucket", *parts).explode(*_LINE)
    table = table.where(col("index").not_null())
    line = F.hash(col("hash"), col("group"), col("bucket"))
    folder = components.fresh(scratch / "lines")
    table = table.select("doc", "source", "index", "first", line.alias("line"))
    table.write_parquet(str(folder))
    table = daft.read_parquet(str(folder / "*.parquet"))

    counted = table if config.count == "occurrences" else table.where(col("first"))
    often = (
        counted.groupby("line").agg(col("line").count().alias("n")).where(col("n") > config.most)
    )
    gone = table.join(often.select("line"), on="line", how="semi")
    if config.exempt_sources:
        gone = gone.where(~col("source").is_in(list(config.exempt_sources)))
    gone = gone.groupby("doc").agg(col("index").list_agg().alias("gone"))
    frame = frame.join(gone, on="doc", how="left")
    removed = F.coalesce(F.list_count(col("gone")), lit(0)).cast(daft.DataType.int64())
    frame = frame.with_columns(
        {"text": _without(col("text"), col("gone")), "lines_removed": removed}
    )
    empty = (col("lines_removed") > 0) & (F.length(col("text")) == 0)
    return frame.with_column(
        "reason", F.when(empty, lit("lines_empty")).otherwise(lit(None))
    ).exclude("gone")


def normalized(text: daft.Expression) -> daft.Expression:
    """What is compared of each line; as many lines as before."""
    text = F.regexp_replace(F.lower(text), r"[^\p{L}\p{M}\p{N}\n]+", "")
    return F.regexp_replace(text, r"\p{N}", "0")


def bucket(frame: daft.DataFrame, config: LinesConfig) -> daft.Expression:
    """A document's bucket in its language, by its name: as even as may be, whatever the order."""
    names = "language" if config.within_language else lit("").alias("language")
    counts = (
        frame.select(names)
        .groupby("language")
        .agg(col("language").count("all").alias("n"))
        .to_pydict()
    )
    number = lit(0).cast(daft.DataType.uint64())
    for language, count in sorted(zip(counts["language"], counts["n"], strict=True)):
        buckets = math.ceil(count / config.bucket_documents)
        if buckets > 1:
            own = F.hash(col("doc")) % lit(buckets)
            mine = col("language") == language if config.within_language else lit(True)
            number = F.when(mine, own).otherwise(number)
    return number


@daft.cls
class _Hashes:
    """Of each line that is not empty: its place, its hash, and whether it is the first of its kind."""

    @daft.method.batch(
        return_dtype=daft.DataType.struct(
            {
                "index": daft.DataType.list(daft.DataType.int64()),
                "hash": daft.DataType.list(daft.DataType.uint64()),
                "first": daft.DataType.list(daft.DataType.bool()),
            }
        ),
        batch_size=1024,
    )
    def __call__(self, text: daft.Series) -> pa.Array:
        text = text.to_arrow()
        parts = [self.lines(text[part]) for part in words.slices(text)]
        counts, *columns = (np.concatenate(part) for part in zip(*parts, strict=True))
        offsets = np.concatenate([[0], np.cumsum(counts)])
        lists = [pa.LargeListArray.from_arrays(offsets, column) for column in columns]
        return pa.StructArray.from_arrays(lists, _LINE)

    @staticmethod
    def lines(text: pa.Array) -> tuple[np.ndarray, ...]:
        """How many lines each document has that are not empty; of these index, hash, first."""
        pieces = words.Pieces(text, "\n")
        full = np.flatnonzero(pieces.ends > pieces.starts)
        hashes, document = pieces.hashes(full, 1), pieces.documents[full]
        first = np.zeros(len(full), bool)
        first[np.unique(words.within(hashes, document), return_index=True)[1]] = True
        counts = np.diff(np.searchsorted(full, pieces.offsets))
        return counts, full - pieces.offsets[document], hashes, first


@daft.func.batch(return_dtype=daft.DataType.string())
def _without(text: daft.Series, gone: daft.Series) -> pa.Array:
    text, gone = text.to_arrow().cast(pa.large_string()), gone.to_arrow()
    mask = gone.is_valid()
    pairs = zip(text.filter(mask).to_pylist(), gone.filter(mask).to_pylist(), strict=True)
    return pc.replace_with_mask(
        text, mask, pa.array([without(*pair) for pair in pairs], pa.large_string())
    )


def without(text: str, gone: list[int]) -> str:
    """`text` without the lines at `gone`; a blank line that so comes to follow another goes too."""
    removed, kept, joined = set(gone), [], True
    for number, line in enumerate(text.split("\n")):
        if number in removed:
            joined = True
        elif line or not joined or (kept and kept[-1]):
            kept.append(line)
            joined = joined and not line
    return "\n".join(kept).strip("\n")
