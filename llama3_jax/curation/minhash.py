"""Stage minhash: near-duplicate documents by MinHash and LSH over the whole corpus (sec. 3.1.1).

    minhash_survivor  of a rejected document: the `doc` that stays
    reason            minhash_near_duplicate

1. Signature: `bands` × `rows` least hashes of the document's shingles, runs of `ngram` words
   (words.py). Broder 1997: two signatures agree in a share of places that is about the Jaccard
   similarity J of the sets of shingles.
2. Bands: documents whose `rows` hashes of a band agree are candidates, which happens to a pair with
   probability 1 - (1 - J^rows)^bands: 1/2 near J = (1/bands)^(1/rows). Only within a language.
3. Edges: documents with the same signature are tied to the least `doc` of them, which alone goes on.
   In each band each document is tied to the least `doc` that shares it; with `verify`, only if their
   true Jaccard similarity is at least `similarity`.
   Pages of one template share many bands, and the least of them is like none of the others: so
   buckets of up to PAIRED documents are compared pair by pair. Those of larger buckets get
   SECOND_ROWS hashes more, and are compared, as above, with those that share a single one: a shingle
   of the template is the least for too many to be told apart by it, one of the content for twins
   only. Each document is in at most `bands` + SECOND_ROWS buckets and has at most PAIRED candidates
   of each: the cost is linear in the number of documents, whatever they are.
4. Components of the graph of edges (components.py); of each, one survivor by `survivor`.

A document without any word (punctuation, pictures) has no duplicate.
"""

import itertools
from pathlib import Path

import daft
import numpy as np
import pyarrow as pa
from daft import col, lit
from daft import functions as F
from pydantic import Field

from llama3_jax.curation import components, survivors, words
from llama3_jax.schema import Config

VERSION = 2
PAIRED, SECOND_ROWS, _ROWS_AT_ONCE = 8, 128, 16


class MinhashConfig(Config):
    """25 bands of 5 rows make candidates of 99% of the pairs with J = 0.7 and 21% of those with 0.4;

    those under `similarity` are then told apart. The paper gives no numbers. Others: 14 × 8 without
    verification (FineWeb, Penedo et al. 2024) finds half at 0.72; 42 × 3 with similarity 0.35 finds
    a page of which every tenth word was changed (J = 0.42 with shingles of 5).
    Documents of the sources in `prefer` survive those of others.
    `edges_in_memory` is the number of edges above which components are found by rounds.
    """

    ngram: int = Field(5, ge=1)
    bands: int = Field(25, ge=1)
    rows: int = Field(5, ge=1)
    verify: bool = True
    similarity: float = Field(0.7, gt=0, le=1)
    survivor: survivors.Rule = "newest"
    prefer: tuple[str, ...] = ()
    within_language: bool = True
    seed: int = Field(1, ge=0)
    edges_in_memory: int = Field(50_000_000, ge=0)


def minhash(frame: daft.DataFrame, config: MinhashConfig, scratch: Path) -> daft.DataFrame:
    """Adds minhash_survivor and reason."""
    write_bands(frame, config, components.fresh(scratch / "bands"))
    edges = find_edges(frame, config, scratch)
    if edges.count_rows() <= config.edges_in_memory:
        nodes = daft.from_arrow(components.in_memory(edges.to_arrow()))
    else:
        nodes = components.by_rounds(edges, scratch)
    nodes = nodes.select(col("node").alias("doc"), "component")
    ranked = frame.select("doc", survivors.rank(config.survivor, config.prefer).alias("rank")).join(
        nodes, on="doc"
    )
    ranked = ranked.collect()
    best = survivors.best(ranked, "component")
    chosen = ranked.select("doc", "component").join(best, on="component").select("doc", "survivor")
    return survivors.join(frame, chosen, "doc", "minhash_survivor", "minhash_near_duplicate")


def write_bands(frame: daft.DataFrame, config: MinhashConfig, folder: Path) -> None:
    """Writes doc, a key of the whole signature and one of each band, of documents that have words."""
    rows = config.bands * config.rows
    frame = _signatures(frame, config, rows, config.seed)
    language = col("language") if config.within_language else lit("")

    def key(start: int, stop: int) -> daft.Expression:
        return F.hash(*(F.get(col("hash"), row) for row in range(start, stop)), language)

    keys = {
        f"band_{band}": key(band * config.rows, (band + 1) * config.rows)
        for band in range(config.bands)
    }
    keys["signature"] = key(0, rows)
    frame = frame.select("doc", *(key.alias(name) for name, key in keys.items()))
    frame.write_parquet(str(folder))


def _signatures(
    frame: daft.DataFrame, config: MinhashConfig, rows: int, seed: int
) -> daft.DataFrame:
    """doc, language and `rows` hashes, of documents that have words."""
    signature = F.minhash(
        col("words"),
        num_hashes=rows,
        ngram_size=config.ngram,
        seed=seed,
        hash_function="xxhash3_64",
    )
    frame = frame.select("doc", "language", words.normalized(col("text")).alias("words"))
    return frame.where(F.length(col("words")) > 0).select(
        "doc", "language", signature.alias("hash")
    )


def find_edges(frame: daft.DataFrame, config: MinhashConfig, scratch: Path) -> daft.DataFrame:
    """Distinct (low, high) of doc."""
    pairs = find_candidates(frame, config, scratch)
    if not config.verify:
        return pairs.collect()
    docs = pairs.select(col("low").alias("doc")).concat(pairs.select(col("high").alias("doc")))
    sets = frame.join(docs.distinct(), on="doc", how="semi")
    shingles = _Shingles(config.ngram)(words.normalized(col("text")))
    folder = components.fresh(scratch / "shingles")
    sets.select("doc", shingles.alias("shingles")).write_parquet(str(folder))
    sets = daft.read_parquet(str(folder / "*.parquet"))
    for end in ("low", "high"):
        side = sets.select(col("doc").alias(end), col("shingles").alias(f"{end}_shingles"))
        pairs = pairs.join(side, on=end)
    similarity = _jaccard(col("low_shingles"), col("high_shingles"))
    pairs = pairs.select("low", "high", similarity.alias("similarity"))
    return pairs.where(col("similarity") >= config.similarity).select("low", "high").collect()


def find_candidates(frame: daft.DataFrame, config: MinhashConfig, scratch: Path) -> daft.DataFrame:
    """Distinct (low, high) to compare, one band at a time: memory is that of one band."""
    folder = components.fresh(scratch / "candidates")
    bands = daft.read_parquet(str(scratch / "bands" / "*.parquet"))
    copies = _buckets(bands, "signature")
    _with_least(copies).write_parquet(str(folder / "copies"))
    first = components.fresh(scratch / "first")
    own = copies.with_column("is_first", col("doc") == col("low")).where(col("is_first"))
    single = bands.join(copies.select("doc"), on="doc", how="anti")
    single.concat(bands.join(own.select("doc"), on="doc", how="semi")).write_parquet(str(first))
    bands = daft.read_parquet(str(first / "*.parquet"))
    crowded = components.fresh(scratch / "crowded")
    for band in range(config.bands):
        buckets = _buckets(bands, f"band_{band}")
        if config.verify:
            _write_pairs(buckets, folder / f"band_{band}")
            large = buckets.where(col("n") > PAIRED).select("doc")
            large.write_parquet(str(crowded / f"{band}"))
        else:
            _with_least(buckets).write_parquet(str(folder / f"band_{band}"))
    if config.verify:
        docs = daft.read_parquet(str(crowded / "**" / "*.parquet")).distinct().collect()
        if docs.count_rows():
            _write_second(frame.join(docs, on="doc", how="semi"), config, scratch, folder)
    return daft.read_parquet(str(folder / "**" / "*.parquet")).distinct()


def _write_second(
    frame: daft.DataFrame, config: MinhashConfig, scratch: Path, folder: Path
) -> None:
    """Candidates among documents of crowded buckets: by single hashes that no band has."""
    hashes = components.fresh(scratch / "hashes")
    _signatures(frame, config, SECOND_ROWS, config.seed + 1).write_parquet(str(hashes))
    frame = daft.read_parquet(str(hashes / "*.parquet"))
    language = col("language") if config.within_language else lit("")
    for start in range(0, SECOND_ROWS, _ROWS_AT_ONCE):
        rows = F.slice(col("hash"), start, start + _ROWS_AT_ONCE)
        own = frame.select("doc", language.alias("language"), rows.alias("hash")).explode("hash")
        keys = own.select("doc", F.hash(col("hash"), col("language")).alias("key"))
        _write_pairs(_buckets(keys, "key"), folder / f"second_{start}")


def _buckets(frame: daft.DataFrame, key: str) -> daft.DataFrame:
    """(doc, key, low, n) of the documents that share a key: with the least of them, and how many."""
    docs = frame.select("doc", col(key).alias("key"))
    shared = docs.groupby("key").agg(col("doc").min().alias("low"), col("doc").count().alias("n"))
    shared = shared.where(col("n") > 1)
    return docs.join(shared, on="key").collect()


def _with_least(buckets: daft.DataFrame) -> daft.DataFrame:
    # A column of its own: daft's where(a != b) on parquet with statistics loses rows.
    pairs = buckets.with_column("apart", col("doc") > col("low")).where(col("apart"))
    return pairs.select("low", col("doc").alias("high"))


def _write_pairs(buckets: daft.DataFrame, folder: Path) -> None:
    """All pairs of small buckets; of large ones each document with the least."""
    small = buckets.where(col("n") <= PAIRED).select("key", "doc")
    pairs = small.select("key", col("doc").alias("low")).join(
        small.select("key", col("doc").alias("high")), on="key"
    )
    pairs = pairs.with_column("apart", col("high") > col("low")).where(col("apart"))
    pairs = pairs.select("low", "high")
    pairs.write_parquet(str(folder / "small"))
    _with_least(buckets.where(col("n") > PAIRED)).write_parquet(str(folder / "large"))


@daft.cls
class _Shingles:
    """Sorted hashes of a text's shingles; one shorter than a shingle is a single one."""

    def __init__(self, ngram: int):
        self.ngram = ngram

    @daft.method.batch(return_dtype=daft.DataType.list(daft.DataType.uint64()), batch_size=512)
    def __call__(self, text: daft.Series) -> pa.Array:
        text = text.to_arrow()
        sets = [one for part in words.slices(text) for one in self.sets(text[part])]
        offsets = np.cumsum([0, *(len(one) for one in sets)])
        return pa.LargeListArray.from_arrays(
            offsets, np.concatenate([np.zeros(0, np.uint64), *sets])
        )

    def sets(self, text: pa.Array) -> list[np.ndarray]:
        batch = words.Pieces(text)
        runs = batch.runs(self.ngram)
        hashes = batch.hashes(runs, self.ngram)
        bounds = np.searchsorted(runs, batch.offsets)
        sets = []
        for number, (start, stop) in enumerate(itertools.pairwise(batch.offsets)):
            own = hashes[bounds[number] : bounds[number + 1]]
            if not len(own) and start < stop:
                own = batch.hashes(np.array([start]), stop - start)
            sets.append(np.unique(own))
        return sets


@daft.func.batch(return_dtype=daft.DataType.float64())
def _jaccard(low: daft.Series, high: daft.Series) -> pa.Array:
    similarities = []
    for one, other in zip(low.to_arrow(), high.to_arrow(), strict=True):
        one, other = one.values.to_numpy(), other.values.to_numpy()
        both = np.sort(np.concatenate([one, other]), kind="stable")
        common = np.count_nonzero(both[1:] == both[:-1])
        similarities.append(common / (len(both) - common))
    return pa.array(similarities, pa.float64())
