"""Rows of every input format: one for each record, with html, text or a reason."""

import datetime
import errno
import gzip
import json
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama3_jax.curation import documents
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


OPTIONS = Options("", "", {}, 2_000, 0)
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


class Short:
    """A stream that gives so many bytes a read."""

    def __init__(self, content: bytes, size: int):
        self.content, self.size, self.at = content, size, 0

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def read(self, _) -> bytes:
        self.at += self.size
        return self.content[self.at - self.size : self.at]


def lines_of(content: bytes, size: int, limit: int) -> list[tuple[int, bytes]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents.pa, "input_stream", lambda *_, **__: Short(content, size))
        return list(documents._lines("x.jsonl", limit))


@given(
    st.lists(st.binary(max_size=9) | st.just(b"\n"), max_size=30).map(b"".join), st.integers(1, 8)
)
def test_lines_are_those_of_the_file(content, size):
    numbered = enumerate(content.split(b"\n"), 1)
    expected = [(number, line) for number, line in numbered if line.strip()]
    assert lines_of(content, size, 10**6) == expected
    short = lines_of(content, size, 3)
    assert [number for number, _ in short] == [number for number, _ in expected]
    for (_, line), (_, beginning) in zip(expected, short, strict=True):
        assert line.startswith(beginning) and (line == beginning or len(beginning) > 3)


def test_a_line_of_many_parts_is_joined_once():
    """Joined at each part it would be copied 130,000 times and not end within this test run."""
    line = b"x" * 4_000_000
    assert lines_of(line + b"\nlast", 32, 10**9) == [(1, line), (2, b"last")]


@pytest.mark.parametrize("name", ["x.jsonl", "x.html", "x.parquet", "x.jsonl.gz"])
def test_a_file_that_may_not_be_read_is_not_damaged(tmp_path, monkeypatch, name):
    (tmp_path / name).write_bytes(b"x")

    def refused(*arguments, **options):
        raise PermissionError(errno.EACCES, "Permission denied", name)

    monkeypatch.setattr(documents.pa, "input_stream", refused)
    monkeypatch.setattr(documents.pq, "ParquetFile", refused)
    with pytest.raises(PermissionError):
        list(documents._rows(File(str(tmp_path / name), f"0/{name}", 1, 0), OPTIONS, Counter()))


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


def test_an_html_file_without_a_prefix_has_its_path_as_url(tmp_path):
    (tmp_path / "a b").mkdir()
    kept, _, _ = read(tmp_path, "a b/ü.html", HTML.encode())
    assert kept[0]["url"] == (tmp_path / "a b/ü.html").as_uri()


def test_text_of_common_crawl(tmp_path):
    whole = record(1, "Größe\n".encode(), kind="conversion")
    kept, _, _ = read(tmp_path, "x.warc.wet.gz", gzip.compress(whole))
    assert kept[0]["text"].endswith("Größe\n") and kept[0]["html"] is None


def test_json_lines_that_are_called_json(tmp_path):
    kept, _, _ = read(tmp_path, "c4.json.gz", gzip.compress(jsonl({"text": "a"}, {"text": "b"})))
    assert [row["text"] for row in kept] == ["a", "b"]


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
     (12, ""), ("0001-01-01T00:00:00+14:00", ""), ("Tue, 02 Jan 2024 03:04:05 GMT", "2024-01-02T03:04:05Z"),
     ("Tuesday, 02-Jan-24 03:04:05 GMT", "2024-01-02T03:04:05Z"), ("Tue Jan  2 03:04:05 2024", "2024-01-02T03:04:05Z"),
     ("Tue, 02 Jan 2024 03:04:05 +0200", "2024-01-02T01:04:05Z"), ("20240102030405", "2024-01-02T03:04:05Z"),
     (20240102030405, "2024-01-02T03:04:05Z"), ("20249902030405", ""), (1704164645, "2024-01-02T03:04:05Z"),
     ("1704164645", "2024-01-02T03:04:05Z"), (1704164645678, "2024-01-02T03:04:05Z"), (1704164645.5, "2024-01-02T03:04:05Z"),
     (1704164645678901, "2024-01-02T03:04:05Z"), (1704164645678901234, "2024-01-02T03:04:05Z"),
     ("20240102", "2024-01-02T00:00:00Z"), (datetime.date(2024, 1, 2), "2024-01-02T00:00:00Z"), (99999999999999999999, ""),
     (True, ""), (float("nan"), ""), ("0" * 4_000, ""), ("Tue, 02 Jan 20240 03:04:05 GMT", "")],
)  # fmt: skip
def test_times(value, expected):
    assert iso_time(value) == expected


@given(st.text(max_size=40) | st.from_regex(r"[A-Z][a-z]{2}, \d{1,2} [A-Z][a-z]{2} \d{2,5} .{0,9}"))
def test_any_text_is_a_time_or_none(text):
    assert len(iso_time(text)) in (0, 20)
