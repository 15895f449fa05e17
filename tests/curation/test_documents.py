"""Rows of every input format: one for each record, with html, text or a reason."""

import datetime
import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llama3_jax.curation.documents import File, Options, Piece, iso_time, read_piece
from tests.curation.test_warc import record

HTML = "<p>Größe</p>"


def read(tmp_path, name: str, content: bytes | None = None, limit: int = 0, **options):
    """(kept rows, {url or detail: reason}, the file's account)"""
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    given = {"url_prefix": "", "time": "", "fields": {}, "max_bytes": 2_000} | options
    piece = Piece("web", (File(str(path), f"0/{name}", path.stat().st_size, 0),))
    kept, rejected = tmp_path / "kept.parquet", tmp_path / "rejected.parquet"
    account = read_piece(piece, Options(**given, limit=limit), kept, rejected)
    rows = pq.read_table(kept).to_pylist() + pq.read_table(rejected).to_pylist()
    assert len({row["doc"] for row in rows}) == len(rows) == account[f"0/{name}"]["rows"]
    assert all(len(row["doc"]) == 32 and row["source"] == "web" for row in rows)
    reasons = [(row["reason"], row["read_detail"]) for row in rows if row.get("reason")]
    return [row for row in rows if not row.get("reason")], reasons, account[f"0/{name}"]


def jsonl(*rows) -> bytes:
    return "\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows).encode()


LINES = jsonl(
    {"url": "http://a/1", "time": "2024-02-03T04:05:06+02:00", "html": HTML, "language": "de"},
    "",
    {"url": "http://a/2", "text": "plain", "title": "Title"},
    "{broken",
    [1, 2],
    {"url": "http://a/3"},
    '{"text": "half \\ud800"}',
    {"text": "x" * 2_001},
    "[" * 10_000,
    {"url": None, "text": "last", "time": 7},
)


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_json_lines(tmp_path, suffix):
    content = LINES
    if suffix == ".gz":
        content = gzip.compress(LINES)
    elif suffix == ".zst":
        content = pa.compress(LINES, "zstd", asbytes=True)
    kept, rejected, account = read(tmp_path, f"x.jsonl{suffix}", content)
    assert [row["url"] for row in kept] == ["http://a/1", "http://a/2", ""]
    assert kept[0]["html"] == HTML.encode() and kept[0]["text"] is None
    assert kept[0]["time"] == "2024-02-03T02:05:06Z" and kept[0]["language_hint"] == "de"
    assert kept[1]["text"] == "plain" and kept[1]["title"] == "Title" and kept[1]["html"] is None
    assert [reason for reason, _ in rejected] == [
        "not_json", "not_json", "no_content", "not_unicode", "too_large", "not_json",
    ]  # fmt: skip
    assert "line 4" in rejected[0][1] and "line 5: a list" in rejected[1][1]


def test_a_line_without_end_is_not_held_in_memory(tmp_path):
    content = b'{"text": "first"}\n{"text": "' + b"x" * 5_000_000 + b'"}\n{"text": "after"}\n'
    kept, rejected, _ = read(tmp_path, "x.jsonl", content)
    assert [row["text"] for row in kept] == ["first", "after"]
    assert [reason for reason, _ in rejected] == ["too_large"]


def test_json_lines_before_damage_are_read(tmp_path):
    lines = jsonl(*({"text": f"{n} " + str(hash(str(n)))} for n in range(40_000)))
    content = gzip.compress(lines)
    kept, rejected, account = read(tmp_path, "x.jsonl.gz", content[: len(content) // 2])
    assert len(kept) > 1_000 and kept[0]["text"].startswith("0 ")
    assert len(rejected) <= 1 and len(account["damaged"]) == 1
    assert account["damaged"][0]["where"].startswith("line ")


def test_parquet(tmp_path):
    time = datetime.datetime(2024, 1, 1, 12, tzinfo=datetime.UTC)
    columns = {
        "link": [f"http://a/{n}" for n in range(4)],
        "html": [HTML.encode(), None, None, b"y" * 2_001],
        "content": [None, "text", None, None],
        "time": [time] * 4,
        "unused": [1, 2, 3, 4],
    }
    pq.write_table(pa.table(columns), tmp_path / "x.parquet")
    fields = {"url": "link", "text": "content"}
    kept, rejected, _ = read(tmp_path, "x.parquet", fields=fields)
    assert [row["url"] for row in kept] == ["http://a/0", "http://a/1"]
    assert kept[0]["html"] == HTML.encode() and kept[1]["text"] == "text"
    assert kept[0]["time"] == "2024-01-01T12:00:00Z"
    assert [reason for reason, _ in rejected] == ["no_content", "too_large"]


def test_a_damaged_row_group_of_parquet_is_named_and_the_others_are_read(tmp_path):
    path = tmp_path / "x.parquet"
    texts = [f"{n} {'word ' * 50}" for n in range(300)]
    pq.write_table(pa.table({"text": texts}), path, row_group_size=100, compression="zstd")
    start = pq.ParquetFile(path).metadata.row_group(1).column(0).data_page_offset
    content = bytearray(path.read_bytes())
    content[start + 20 : start + 60] = b"\xff" * 40
    kept, _, account = read(tmp_path, "x.parquet", bytes(content))
    assert [row["text"] for row in kept] == texts[:100] + texts[200:]
    assert account["damaged"][0]["where"] == "rows 100 to 199"
    _, _, account = read(tmp_path, "y.parquet", bytes(content[:-100]))
    assert account["damaged"][0]["where"] == "whole file"


@pytest.mark.parametrize("name", ["a/b.html", "a/b.html.gz"])
def test_html_files(tmp_path, name):
    (tmp_path / "a").mkdir()
    content = gzip.compress(HTML.encode()) if name.endswith("gz") else HTML.encode()
    kept, rejected, _ = read(tmp_path, name, content, url_prefix="http://docs/", time="2023-05-06")
    assert kept[0]["html"] == HTML.encode() and not rejected
    assert kept[0]["url"] == f"http://docs/{name}" and kept[0]["time"] == "2023-05-06T00:00:00Z"


def test_html_that_is_too_large_or_a_bomb_or_damaged(tmp_path):
    assert read(tmp_path, "x.html", b"x" * 2_001)[1][0][0] == "too_large"
    assert read(tmp_path, "y.html.gz", gzip.compress(bytes(1 << 24)))[1][0][0] == "too_large"
    assert (
        read(tmp_path, "z.html.gz", gzip.compress(b"<p>hello" * 99)[:-20])[1][0][0]
        == "bad_encoding"
    )


def test_warc_records(tmp_path):
    page = HTML.encode()
    records = [
        record(0, page, kind="warcinfo"),
        record(1, page),
        record(2, page).replace(b"200 OK", b"404 No"),
        record(3, page).replace(b"text/html", b"image/png"),
        record(4, page).replace(b"HTTP/1.1 ", b"GARBAGE1 "),
        record(5, b"x" * 3_000),
        record(6, gzip.compress(page * 10), "Content-Encoding: gzip\r\n"),
        record(7, gzip.compress(bytes(100_000)), "Content-Encoding: gzip\r\n"),
        record(8, page, kind="request"),
        record(9, page),
    ]
    content = b"".join(map(gzip.compress, records[:-1])) + gzip.compress(records[-1])[:100]
    kept, rejected, account = read(tmp_path, "x.warc.gz", content)
    assert [row["url"] for row in kept] == ["http://x.org/1", "http://x.org/6"]
    assert [row["html"] for row in kept] == [page, page * 10]
    assert {row["content_type"] for row in kept} == {"text/html"}
    names = ["http_status", "content_type", "not_http", "too_large", "too_large"]
    assert [reason for reason, _ in rejected][:5] == names
    assert account["other_records"] == {"request": 1, "warcinfo": 1}
    assert account["damaged"][0]["what"] == "ends inside a member"


def test_a_limit_takes_the_first(tmp_path):
    kept, _, account = read(tmp_path, "x.jsonl", jsonl(*({"text": str(n)} for n in range(9))), 3)
    assert [row["text"] for row in kept] == ["0", "1", "2"]


@pytest.mark.parametrize(
    ("value", "expected"),
    [("2024-01-02T03:04:05Z", "2024-01-02T03:04:05Z"), ("2024-01-02", "2024-01-02T00:00:00Z"),
     ("2024-01-02T03:04:05.678-05:00", "2024-01-02T08:04:05Z"), ("yesterday", ""), (None, ""),
     (12, ""), ("0001-01-01T00:00:00+14:00", "")],
)  # fmt: skip
def test_times(value, expected):
    assert iso_time(value) == expected
