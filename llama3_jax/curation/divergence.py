"""Stage divergence: documents with "excessive numbers of outlier tokens compared with the training
corpus distribution" (sec. 3.1.1), by the Kullback-Leibler divergence of their words from the corpus's.

    divergence_kl      nats a word
    divergence_length  log2 of the number of words, rounded down; -1 for none
    divergence_z       how many deviations divergence_kl lies above the median, of documents of the
                       same language and divergence_length; 0 where these are too few to say
    reason             divergence_outlier

1. Corpus: the count of every word of a language, words of `words.normalized` hashed to `buckets`.
2. Document: the sum over its words of p log(p / q), with p from the document and q from all other
   documents, one added to each bucket's count: q without the document itself, or a document of
   outliers would in part be compared with itself.
3. A short document diverges more by its length alone, hence the comparison with its like. The
   deviation is 1.4826 times the median distance from the median, which outliers do not move.

The paper gives neither tokens nor threshold: both are ours.
"""

import uuid
from pathlib import Path

import daft
import numpy as np
import pyarrow as pa
from daft import col, lit
from daft import functions as F
from jaxtyping import Float, Int
from pydantic import Field

from llama3_jax.curation import components, words
from llama3_jax.schema import Config

VERSION = 1
_STEP = 1000  # divergences are compared in thousandths of a nat


class DivergenceConfig(Config):
    """Rejected are documents more than `deviations` above the median of their like.

    Where fewer than `documents` are alike nothing is rejected, nor in `exempt_sources`.
    """

    buckets: int = Field(1 << 17, ge=2)
    deviations: float = Field(6.0, gt=0)
    documents: int = Field(100, ge=1)
    exempt_sources: tuple[str, ...] = ()


def divergence(frame: daft.DataFrame, config: DivergenceConfig, scratch: Path) -> daft.DataFrame:
    """Adds divergence_kl, divergence_length, divergence_z and reason."""
    text = words.normalized(col("text"))
    corpus = components.fresh(scratch / "corpus") / f"{uuid.uuid4().hex}.npz"
    counts = frame.select(_Counts(config.buckets)(text, col("language")).alias("counts"))
    # A prefix, since "" and "file" may not name an array.
    np.savez(corpus, **{f"of {k}": v for k, v in count_words(counts, config.buckets).items()})
    scored = frame.with_column(
        "_kl", _Divergence(str(corpus), config.buckets)(text, col("language"))
    )
    names = {"divergence_kl": "kl", "divergence_length": "length"}
    scores = scored.select(
        "doc", "language", *(col("_kl").get(k).alias(n) for n, k in names.items())
    )
    folder = components.fresh(scratch / "scores")
    scores.write_parquet(str(folder))
    scores = daft.read_parquet(str(folder / "*.parquet"))
    alike = daft.from_arrow(spreads(scores, config))
    scores = scores.join(alike, on=["language", "divergence_length"], how="left")
    z = (col("divergence_kl") - col("median")) / col("deviation")
    scores = scores.select("doc", *names, F.coalesce(z, lit(0.0)).alias("divergence_z"))
    frame = frame.join(scores, on="doc")
    outlier = col("divergence_z") > config.deviations
    if config.exempt_sources:
        outlier = outlier & ~col("source").is_in(list(config.exempt_sources))
    return frame.with_column(
        "reason", F.when(outlier, lit("divergence_outlier")).otherwise(lit(None))
    )


def count_words(batches: daft.DataFrame, buckets: int) -> dict[str, Int[np.ndarray, "buckets"]]:
    """Sums what `_Counts` counted of each batch, by language."""
    parts = [col("counts").get(key).alias(key) for key in ("language", "bucket", "count")]
    table = batches.select(*parts).explode("language", "bucket", "count")
    table = table.where(col("bucket").not_null())
    table = table.groupby("language", "bucket").agg(col("count").sum()).to_arrow()
    language = table["language"].combine_chunks().dictionary_encode()
    index, bucket = language.indices.to_numpy(), table["bucket"].to_numpy()
    out = {}
    for number, name in enumerate(language.dictionary.to_pylist()):
        own = index == number
        out[name] = np.zeros(buckets, np.int64)
        out[name][bucket[own]] = table["count"].to_numpy()[own]
    return out


def spreads(scores: daft.DataFrame, config: DivergenceConfig) -> pa.Table:
    """Median and deviation of the divergence by (language, divergence_length), of groups large enough."""
    step = (col("divergence_kl") * _STEP).cast(daft.DataType.int64()).alias("step")
    group = ["language", "divergence_length"]
    table = scores.select(*group, step).groupby(*group, "step").agg(col("step").count().alias("n"))
    rows: dict[tuple, list] = {}
    for row in table.to_pylist():
        rows.setdefault((row["language"], row["divergence_length"]), []).append(
            (row["step"], row["n"])
        )
    out = []
    for (language, length), counts in sorted(rows.items()):
        values, n = np.array(sorted(counts)).T
        if n.sum() < config.documents or length < 0:
            continue
        median = _median(values, n)
        deviation = 1.4826 * max(_median(np.abs(values - median), n), 1) / _STEP
        out.append((language, length, median / _STEP, deviation))
    types = {"language": pa.large_string(), "divergence_length": pa.int64(), "median": pa.float64(), "deviation": pa.float64()}  # fmt: skip
    return pa.table(
        {
            name: pa.array([row[i] for row in out], kind)
            for i, (name, kind) in enumerate(types.items())
        }
    )


def _median(values: Int[np.ndarray, "n"], counts: Int[np.ndarray, "n"]) -> int:
    """The lower median of values that occur `counts` times."""
    order = np.argsort(values, kind="stable")
    total = np.cumsum(counts[order])
    return int(values[order][np.searchsorted(total, (total[-1] + 1) // 2)])


def word_buckets(text: pa.Array, buckets: int) -> tuple[words.Pieces, Int[np.ndarray, "W"]]:
    pieces = words.Pieces(text)
    hashes = pieces.hashes(np.arange(len(pieces.starts)), 1)
    return pieces, (hashes % np.uint64(buckets)).astype(np.int64)


def bucket_counts(
    text: pa.Array, language: Int[np.ndarray, "D"], buckets: int
) -> tuple[Int[np.ndarray, "n"], Int[np.ndarray, "n"], Int[np.ndarray, "n"]]:
    """Language, bucket and count of what occurs, in order: no array has a place for all buckets."""
    keys, counts = [], []
    for part in words.slices(text):
        pieces, bucket = word_buckets(text[part], buckets)
        key = language[part][pieces.documents].astype(np.int64) * buckets + bucket
        for found, values in zip((keys, counts), np.unique(key, return_counts=True), strict=True):
            found.append(values)
    key, place = np.unique(np.concatenate(keys), return_inverse=True)
    count = np.zeros(len(key), np.int64)
    np.add.at(count, place.reshape(-1), np.concatenate(counts))
    return key // buckets, key % buckets, count


@daft.cls
class _Counts:
    """Of a batch, the count of each (language, bucket), all in the batch's first row."""

    def __init__(self, buckets: int):
        self.buckets = buckets

    @daft.method.batch(
        return_dtype=daft.DataType.struct(
            {
                "language": daft.DataType.list(daft.DataType.string()),
                "bucket": daft.DataType.list(daft.DataType.int64()),
                "count": daft.DataType.list(daft.DataType.int64()),
            }
        ),
        batch_size=2048,
    )
    def __call__(self, text: daft.Series, language: daft.Series) -> pa.Array:
        text, languages = text.to_arrow(), language.to_arrow().dictionary_encode()
        which, bucket, count = bucket_counts(text, languages.indices.to_numpy(), self.buckets)
        columns = (languages.dictionary.take(pa.array(which)), pa.array(bucket), pa.array(count))
        offsets = np.full(len(text) + 1, len(which))
        offsets[0] = 0
        lists = [pa.LargeListArray.from_arrays(offsets, column) for column in columns]
        return pa.StructArray.from_arrays(lists, ["language", "bucket", "count"])


@daft.cls
class _Divergence:
    def __init__(self, corpus: str, buckets: int):
        with np.load(corpus) as counts:
            self.counts = {name.removeprefix("of "): counts[name] for name in counts.files}
        self.totals = {name: int(counts.sum()) for name, counts in self.counts.items()}
        self.buckets = buckets

    @daft.method.batch(
        return_dtype=daft.DataType.struct(
            {"kl": daft.DataType.float64(), "length": daft.DataType.int64()}
        ),
        batch_size=2048,
    )
    def __call__(self, text: daft.Series, language: daft.Series) -> pa.Array:
        text, languages = text.to_arrow(), np.array(language.to_pylist(), object)
        parts = [self.divergences(text[part], languages[part]) for part in words.slices(text)]
        kl, length = (np.concatenate(columns) for columns in zip(*parts, strict=True))
        return pa.StructArray.from_arrays([pa.array(kl), pa.array(length)], ["kl", "length"])

    def divergences(
        self, text: pa.Array, languages: np.ndarray
    ) -> tuple[Float[np.ndarray, "D"], Int[np.ndarray, "D"]]:
        pieces, bucket = word_buckets(text, self.buckets)
        documents = len(languages)
        key, count = np.unique(pieces.documents * self.buckets + bucket, return_counts=True)
        document, bucket = key // self.buckets, key % self.buckets
        total = np.diff(pieces.offsets)
        corpus, corpus_total = np.zeros(len(key), np.int64), np.zeros(documents, np.int64)
        for name in set(languages[np.unique(document)]):
            mine = languages == name
            corpus_total[mine] = self.totals[name]
            mine = mine[document]
            corpus[mine] = self.counts[name][bucket[mine]]
        rest = corpus_total - total + self.buckets
        p, q = count / total[document], (corpus - count + 1) / rest[document]
        kl = np.bincount(document, p * np.log(p / q), minlength=documents)
        length = np.where(total > 0, np.frexp(total)[1] - 1, -1)
        return kl, length.astype(np.int64)
