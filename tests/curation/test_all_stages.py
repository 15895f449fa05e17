"""What holds for every stage: nothing lost on an empty corpus, on poisoned rows, on any partitioning."""

import random

import daft
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llama3_jax.curation import (
    c4,
    divergence,
    gopher,
    languages,
    lines,
    minhash,
    pii,
    safety,
    url_dedup,
    urls,
)
from tests.curation.frames import document, run

STAGES = {
    "urls": (urls.urls, urls.UrlsConfig()),
    "url_dedup": (url_dedup.url_dedup, url_dedup.UrlDedupConfig()),
    "languages": (languages.languages, languages.LanguagesConfig()),
    "minhash": (minhash.minhash, minhash.MinhashConfig()),
    "lines": (lines.lines, lines.LinesConfig(most=1)),
    "c4": (c4.c4, c4.C4Config(terminal=True, min_words=3)),
    "gopher": (gopher.gopher, gopher.GopherConfig()),
    "divergence": (divergence.divergence, divergence.DivergenceConfig(buckets=512, documents=5)),
    "safety": (safety.safety, safety.SafetyConfig()),
    "pii": (pii.pii, pii.PiiConfig()),
}
POISON = ["\0" * 50, "\x85\u2028\u2029", "\U0010ffff", "a" * 300_000, "\n" * 5_000, "( " * 5_000, "@" * 3_000, "\u0301" * 900, "‮‮", "　", "1.1.1.1" * 900]  # fmt: skip


def corpus() -> list[dict]:
    rng = random.Random(11)
    common = [f"word{number}" for number in range(80)]
    rows = []
    for number in range(60):
        text = "\n".join(" ".join(rng.choices(common, k=9)) for _ in range(rng.randrange(9)))
        rows.append(
            document(
                text=text,
                url=f"http://a{number % 7}.b/?utm_x={number}",
                time=f"20{number:02}",
                title=str(number),
            )
        )
    rows += [
        document(text=rows[5]["text"], title="twin"),
        *(document(text=one, title="poison") for one in POISON),
    ]
    for row in rows:
        row["urls_canonical"] = row["url"].split("?")[0]
    return rows


@pytest.mark.parametrize("name", STAGES)
def test_rows_and_reasons_do_not_depend_on_partitions_or_order(tmp_path, name):
    stage, config = STAGES[name]
    rows = corpus()
    once = run(stage, config, rows, tmp_path / "one")
    assert all(row["reason"] is None or row["reason"].startswith(name) for row in once.values())
    random.Random(0).shuffle(rows)
    assert once == run(stage, config, rows, tmp_path / "four", files=4)


@pytest.mark.parametrize("name", STAGES)
def test_an_empty_corpus_stays_one(tmp_path, name):
    stage, config = STAGES[name]
    empty = pa.Table.from_pylist(corpus()).slice(0, 0)
    pq.write_table(empty, tmp_path / "empty.parquet")
    frame = daft.read_parquet(str(tmp_path / "empty.parquet"))
    out = stage(frame, config, tmp_path / "scratch").collect()
    assert len(out) == 0
    assert {*empty.column_names, "reason"} <= set(out.column_names)
