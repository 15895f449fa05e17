"""A stage's frame as parquet: what is kept and what is rejected, sorted by document.

Documents go to parts by the first digits of `doc`, which are a hash: parts are alike in size, each
is sorted in memory by itself, and the result does not depend on how the frame was partitioned.
"""

import functools
import json
from pathlib import Path
from typing import Any

import daft
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from daft import DataType, col

from llama3_jax.curation import engine
from llama3_jax.curation.documents import GROUP_BYTES, parquet_writer
from llama3_jax.curation.layout import COUNTS
from llama3_jax.data import tokenizer as tokenizers

PART_BYTES = 128 << 20
MAX_PARTS = 4_096
_KEYS = ["source", "language", "reason"]


def number_of_parts(content_bytes: int) -> int:
    return min(max(-(-content_bytes // PART_BYTES), 1), MAX_PARTS)


def part_of(doc: str, parts: int) -> int:
    return int(doc[:6], 16) * parts >> 24


def part_name(number: int) -> str:
    return f"part-{number:05d}.parquet"


def write(
    frame: daft.DataFrame, stage: str, folder: Path, parts: int, tokenizer: str | None
) -> list[dict[str, Any]]:
    """Writes `folder`/kept and `folder`/rejected; the counts by source, language and reason.

    `characters` and, with a tokenizer, `tokens` are brought up to date where a stage changed the
    length of the text; a text on which the tokenizer fails is rejected as not_tokenized. Raises
    ValueError where a stage's frame is not what it has to be.
    """
    names = frame.column_names
    if missing := {"doc", "source", "language", "text", "reason"} - set(names):
        raise ValueError(f"stage {stage}: its frame lacks the column {min(missing)}")
    for name in ("kept", "rejected"):
        (folder / name).mkdir(exist_ok=True)
    unsorted = folder / "unsorted"
    frame.with_column("part", _part_of(col("doc"), parts=parts)).write_parquet(
        str(unsorted), partition_cols=["part"], compression="lz4", write_mode="overwrite"
    )
    numbers = sorted(int(path.name.split("=")[1]) for path in unsorted.glob("part=*"))
    jobs = daft.from_pydict({"part": numbers or pa.array([], pa.int64())})
    jobs = engine.spread(jobs, len(numbers))
    sort = _sort_part(col("part"), stage=stage, folder=str(folder), tokenizer=tokenizer or "")
    done = jobs.select(sort.alias("counts")).to_pydict()["counts"]
    return sum_counts([row for counts in done for row in json.loads(counts)])


def sum_counts(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each source, language and reason, in order."""
    sums: dict[tuple, dict[str, int]] = {}
    for row in rows:
        of_key = sums.setdefault(tuple(row[key] or "" for key in _KEYS), {})
        for name in COUNTS:
            if row.get(name) is not None:
                of_key[name] = of_key.get(name, 0) + row[name]
    return [dict(zip(_KEYS, key, strict=True)) | sums[key] for key in sorted(sums)]


def count(table: pa.Table) -> list[dict[str, Any]]:
    """Documents, bytes, characters and tokens, by source, language and, if it has one, reason."""
    if "reason" not in table.column_names:
        table = table.append_column("reason", pa.nulls(len(table), pa.string()))
    names = [name for name in COUNTS if name in table.column_names]
    aggregates = [([], "count_all"), *((name, "sum") for name in names)]
    grouped = table.group_by(_KEYS).aggregate(aggregates).to_pylist()
    return [
        {key: row[key] for key in _KEYS}
        | {"documents": row["count_all"]}
        | {name: row[f"{name}_sum"] for name in names}
        for row in grouped
    ]


@daft.func.batch(return_dtype=DataType.int64(), use_process=False)
def _part_of(doc, *, parts):
    return pa.array([part_of(d, parts) for d in doc.to_pylist()], pa.int64())


@daft.func.batch(return_dtype=DataType.string(), batch_size=1, use_process=False)
def _sort_part(part, *, stage, folder, tokenizer):
    counts = [_sorted(n, stage, Path(folder), tokenizer) for n in part.to_pylist()]
    return pa.array([json.dumps(each) for each in counts], pa.string())


def _sorted(number: int, stage: str, folder: Path, tokenizer: str) -> list[dict[str, Any]]:
    found = sorted((folder / "unsorted" / f"part={number}").glob("*.parquet"))
    tables = [pq.ParquetFile(path).read() for path in found]
    table = pa.concat_tables(tables, promote_options="permissive").sort_by("doc")
    docs = table["doc"].combine_chunks()
    if len(docs) > 1 and pc.any(pc.equal(docs[1:], docs[:-1])).as_py():
        raise ValueError(f"stage {stage}: its frame has a document twice")
    table = _measured(table, tokenizer)
    rejected = pc.is_valid(table["reason"])
    for name, rows in (
        ("kept", table.filter(pc.invert(rejected))),
        ("rejected", table.filter(rejected)),
    ):
        if name == "kept":
            rows = rows.drop_columns("reason")
        else:
            rows = rows.append_column("stage", pa.array([stage] * len(rows), pa.string()))
        if len(rows):
            _write(rows, folder / name / part_name(number))
    return count(table)


def _measured(table: pa.Table, tokenizer: str) -> pa.Table:
    """With `bytes`, `characters` and `tokens` as the text has them now."""
    if table.schema.field("reason").type == pa.null():
        at = table.schema.get_field_index("reason")
        table = table.set_column(at, "reason", table["reason"].cast(pa.large_string()))
    characters = pc.cast(pc.utf8_length(table["text"]), pa.int64())
    columns: dict[str, pa.ChunkedArray | pa.Array] = {
        "bytes": pc.cast(pc.binary_length(table["text"]), pa.int64()),
        "characters": characters,
    }
    if tokenizer:
        columns["tokens"], failed = _tokens(table, characters, tokenizer)
        if failed:
            own = np.full(len(table), None, object)
            own[failed] = "not_tokenized"
            columns["reason"] = pc.coalesce(table["reason"], pa.array(own, pa.string()))
    for name, values in columns.items():
        if name in table.column_names:
            table = table.set_column(table.schema.get_field_index(name), name, values)
        else:
            table = table.append_column(name, values)
    return table


def _tokens(
    table: pa.Table, characters: pa.ChunkedArray, tokenizer: str
) -> tuple[pa.Array, list[int]]:
    """Token counts, taken over for texts of unchanged length; the rows that cannot be counted."""
    if "tokens" in table.column_names:
        stale = pc.fill_null(pc.not_equal(characters, table["characters"]), True)
        counts = table["tokens"].to_numpy().copy()
    else:
        stale = pa.chunked_array([pa.array([True] * len(table))])
        counts = pa.array([0] * len(table), pa.int64()).to_numpy().copy()
    rows, failed = pc.indices_nonzero(stale).to_numpy(), []
    if len(rows):
        encoder = _tokenizer(tokenizer)
        for row, text in zip(rows, table["text"].take(rows).to_pylist(), strict=True):
            try:
                counts[row] = len(encoder.encode(text))
            except ValueError:
                failed.append(row)
    return pa.array(counts, pa.int64()), failed


@functools.lru_cache(maxsize=2)
def _tokenizer(path: str) -> tokenizers.Tokenizer:
    return tokenizers.load(Path(path))


def _write(table: pa.Table, path: Path) -> None:
    rows = max(1, len(table) * GROUP_BYTES // max(table.nbytes, 1))
    with parquet_writer(path, table.schema) as writer:
        writer.write_table(table.combine_chunks(), row_group_size=rows)
