"""Divergence from the corpus: against sums over plain counters; outliers and only they are rejected."""

import collections
import math
import random
import statistics
import tracemalloc

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama3_jax.curation.divergence import DivergenceConfig, bucket_counts, divergence, word_buckets
from llama3_jax.curation.words import Pieces
from tests.curation import frames
from tests.curation.frames import document, run
from tests.curation.test_words import normalized

BUCKETS = 1 << 12


def bucket(word: str) -> int:
    return int(Pieces(pa.array([word])).hashes(np.array([0]), 1)[0]) % BUCKETS


def reference(rows: list[dict]) -> dict[str, float]:
    own = {
        row["doc"]: collections.Counter(map(bucket, normalized(row["text"]).split()))
        for row in rows
    }
    corpus = collections.defaultdict(collections.Counter)
    for row in rows:
        corpus[row["language"]].update(own[row["doc"]])
    out = {}
    for row in rows:
        counts, everything = own[row["doc"]], corpus[row["language"]]
        total = sum(counts.values())
        rest = sum(everything.values()) - total + BUCKETS
        out[row["doc"]] = math.fsum(
            n / total * math.log((n / total) / ((everything[word] - n + 1) / rest))
            for word, n in counts.items()
        )
    return out


@settings(max_examples=12, deadline=None)
@given(
    st.lists(st.tuples(frames.texts, st.sampled_from(["en", "de", ""])), min_size=1, max_size=12),
    st.integers(1, 3),
)
def test_divergences_are_those_of_plain_counters(tmp_path_factory, cases, files):
    rows = [
        document(text=text, language=language, title=str(number))
        for number, (text, language) in enumerate(cases)
    ]
    config = DivergenceConfig(buckets=BUCKETS)
    out = run(divergence, config, rows, tmp_path_factory.mktemp("kl"), files)
    expected = reference(rows)
    for row in rows:
        got = out[row["doc"]]
        length = len(normalized(row["text"]).split())
        assert got["divergence_kl"] == pytest.approx(expected[row["doc"]], abs=1e-9)
        assert got["divergence_length"] == (int(math.log2(length)) if length else -1)
        assert got["divergence_z"] == 0 and got["reason"] is None  # too few are alike


def test_outliers_of_their_length_and_language_are_rejected(tmp_path):
    rng = random.Random(3)
    common = [f"word{n}" for n in range(300)]
    rows = []
    for number in range(400):
        size = rng.choice([20, 200])
        language = rng.choice(["en", "de"])
        text = " ".join(language + rng.choice(common) for _ in range(size))
        rows.append(document(text=text, language=language, title=f"plain {number}"))
    odd = [f"{rng.getrandbits(64):x}" for _ in range(400)]
    rows += [
        document(text=" ".join(odd[:200]), title="odd"),
        document(text=" ".join(odd[200:]), title="odd", source="code"),
    ]
    config = DivergenceConfig(buckets=BUCKETS, documents=50, exempt_sources=("code",))
    out = run(divergence, config, rows, tmp_path / "a", files=3)
    rejected = [row for row in out.values() if row["reason"]]
    assert [(row["title"], row["source"]) for row in rejected] == [("odd", "web")]
    assert out[rows[-1]["doc"]]["divergence_z"] > config.deviations
    # The measure of deviation, by the statistics module.
    for language in ("en", "de"):
        group = [
            r for r in out.values() if r["language"] == language and r["divergence_length"] == 7
        ]
        values = [int(row["divergence_kl"] * 1000) / 1000 for row in group]
        median = statistics.median_low(values)
        spread = 1.4826 * statistics.median_low([round(abs(value - median), 9) for value in values])
        for row in group:
            assert row["divergence_z"] == pytest.approx((row["divergence_kl"] - median) / spread)
    assert out == run(divergence, config, rows, tmp_path / "b", files=1)


def test_counts_need_no_place_for_each_bucket_of_each_language():
    """150 languages of 131,072 buckets would take 157 MB."""
    rng = np.random.default_rng(3)
    texts = [" ".join(map(str, rng.integers(0, 500, 20))) for _ in range(300)]
    language = rng.integers(0, 150, 300).astype(np.int32)
    tracemalloc.start()
    try:
        found = bucket_counts(pa.array(texts), language, 1 << 17)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 10_000_000
    _, bucket = word_buckets(pa.array(texts), 1 << 17)
    pairs = collections.Counter(zip(np.repeat(language, 20).tolist(), bucket.tolist(), strict=True))
    assert list(zip(*(each.tolist() for each in found), strict=True)) == [
        (*pair, count) for pair, count in sorted(pairs.items())
    ]
