"""Frames of documents for the tests of stages: from parquet in several files, so as a run reads them."""

import hashlib
import os

os.environ.setdefault("DO_NOT_TRACK", "true")
os.environ.setdefault("DAFT_ANALYTICS_ENABLED", "0")

import daft
import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import strategies as st

COLUMNS = {"url": "", "time": "", "source": "web", "text": "", "title": "", "language": "en"}

# Text as pages have it: words, repeated lines, scripts without spaces, odd characters.
WORDS = "the of Model café İstanbul ΣΊΣΥΦΟΣ naïve 12 3.5 x_y } --- हिन्दी 語 中文 ไทย a\u0301 \ufb01n \0".split(
    " "
)
# Characters without a name yet (Cn) get one in some library before the others.
words = st.sampled_from(WORDS) | st.text(
    st.characters(exclude_categories=["Cs", "Cn"], exclude_characters="\n"), max_size=6
)
line = st.lists(words, max_size=12).map(" ".join)
texts = st.lists(line, max_size=12).map("\n".join)


def document(**columns) -> dict[str, str]:
    row = COLUMNS | columns
    row.setdefault("doc", hashlib.md5(repr(sorted(row.items())).encode()).hexdigest())
    return row


def frame(rows: list[dict], folder, files: int = 1) -> daft.DataFrame:
    """The rows in parquet with statistics; `files` makes as many partitions."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(files):
        part = pa.Table.from_pylist(rows[number::files], pa.Table.from_pylist(rows).schema)
        pq.write_table(part, folder / f"{number}.parquet")
    return daft.read_parquet(str(folder / "*.parquet"))


def run(stage, config, rows: list[dict], folder, files: int = 1) -> dict[str, dict]:
    """The stage's rows by doc; checks that it neither lost, made nor doubled any."""
    out = stage(frame(rows, folder / "in", files), config, folder / "scratch").to_pylist()
    by_doc = {row["doc"]: row for row in out}
    assert sorted(row["doc"] for row in out) == sorted(row["doc"] for row in rows)
    for row in rows:
        assert set(row) <= set(by_doc[row["doc"]])
    return by_doc
