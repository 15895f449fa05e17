"""Every byte of a WARC file ends in a record or in a named damage."""

import gzip
import random
import tracemalloc
import zlib

import pyarrow as pa
import pytest

from llama3_jax.curation import http, warc

COUNT, DAMAGED = 20, 7


def record(number: int, body: bytes | None = None, headers: str = "", kind: str = "response"):
    words = random.Random(number).choices("alpha beta gamma delta".split(), k=400)
    body = f"<p>{number} {' '.join(words)}".encode() if body is None else body
    message = f"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n{headers}\r\n".encode() + body
    head = (
        f"WARC/1.0\r\nWARC-Type: {kind}\r\nWARC-Target-URI: http://x.org/{number}\r\n"
        f"WARC-Date: 2024-01-01T00:00:00Z\r\nContent-Length: {len(message)}\r\n\r\n"
    )
    return head.encode() + message + b"\r\n\r\n"


RECORDS = [record(number) for number in range(COUNT)]
MEMBERS = [gzip.compress(each, mtime=0) for each in RECORDS]
START = sum(map(len, MEMBERS[:DAMAGED]))
LENGTH = len(MEMBERS[DAMAGED])
WHOLE = b"".join(MEMBERS)
ENDS = {sum(map(len, each[:n])) for each in (MEMBERS, RECORDS) for n in range(COUNT + 1)}


def patched(at: int, new: bytes) -> bytes:
    return WHOLE[:at] + new + WHOLE[at + len(new) :]


def read(tmp_path, content: bytes, name: str = "x.warc.gz"):
    path = tmp_path / name
    path.write_bytes(content)
    found = list(warc.read(path, 1 << 20))
    records = [each for each in found if isinstance(each, warc.Record)]
    return records, [each for each in found if isinstance(each, warc.Damage)]


@pytest.mark.parametrize(
    ("content", "lost", "damaged"),
    [
        (WHOLE, set(), []),
        (patched(START + LENGTH // 2, bytes(20)), {DAMAGED}, [(START, LENGTH)]),
        (patched(START, b"\0"), {DAMAGED}, [(START, LENGTH)]),
        (patched(START + LENGTH - 6, b"\0\0\0"), {DAMAGED}, [(START, LENGTH)]),
        (patched(0, bytes(10)), {0}, [(0, len(MEMBERS[0]))]),
        (WHOLE[:START] + b"garbage" + WHOLE[START:], set(), [(START, 7)]),
        (WHOLE[:START] + bytes(100) + WHOLE[START:], set(), [(START, 100)]),
        (WHOLE[: START + 5], set(range(DAMAGED, COUNT)), [(START, 5)]),
        (WHOLE + b"\0\0", set(), [(len(WHOLE), 2)]),
        (b"".join(RECORDS), set(), []),
        (gzip.compress(b"".join(RECORDS)), set(), []),
        (b"", set(range(COUNT)), []),
        (b"<html>" * 99, set(range(COUNT)), [(0, 594)]),
    ],
    ids=["whole", "inside", "magic", "checksum", "first", "garbage", "zeros", "header only",
         "behind", "plain", "one member", "empty", "no WARC"],
)  # fmt: skip
def test_damage_is_named_and_what_follows_is_read(tmp_path, content, lost, damaged):
    records, damage = read(tmp_path, content)
    assert [r.url for r in records] == [f"http://x.org/{i}" for i in range(COUNT) if i not in lost]
    assert [(d.offset, d.bytes) for d in damage] == damaged
    assert not any(r.cut for r in records)
    for r in records:
        message = RECORDS[int(r.url.rsplit("/", 1)[1])].split(b"\r\n\r\n", 1)[1][:-4]
        assert r.body == message and r.time == "2024-01-01T00:00:00Z"


@pytest.mark.parametrize("content", [WHOLE, b"".join(RECORDS), gzip.compress(b"".join(RECORDS))],
                         ids=["members", "plain", "one member"])  # fmt: skip
def test_a_cut_file_is_named_wherever_it_ends(tmp_path, content):
    for end in range(len(content) // 2, len(content) - 4, len(content) // 40):
        records, damage = read(tmp_path, content[:end])
        assert len(records) > 5 and not any(r.cut for r in records[:-1])
        if end not in ENDS:
            assert len(damage) == 1
            assert damage[0].what.startswith("ends inside") or damage[0].bytes < 3
            assert damage[0].offset + damage[0].bytes == end


def test_several_damages_in_one_file(tmp_path):
    at = [sum(map(len, MEMBERS[:n])) + 40 for n in (3, 4, 11, COUNT - 1)]
    content = WHOLE
    for position in at:
        content = content[:position] + b"\xff\0\xff\0\xff" + content[position + 5 :]
    records, damage = read(tmp_path, content)
    assert len(records) == COUNT - 4
    assert sum(d.bytes for d in damage) == sum(len(MEMBERS[n]) for n in (3, 4, 11, COUNT - 1))


def test_random_damage_never_loses_more_than_the_members_it_hits(tmp_path):
    random_ = random.Random(1)
    ends = [sum(map(len, MEMBERS[: n + 1])) for n in range(COUNT)]
    for _ in range(60):
        content, hit = bytearray(WHOLE), set()
        for _ in range(random_.randint(1, 4)):
            at = random_.randrange(len(WHOLE))
            content[at] ^= random_.randint(1, 255)
            hit.add(next(n for n, end in enumerate(ends) if at < end))
        records, damage = read(tmp_path, bytes(content))
        urls = {r.url for r in records if not r.cut}
        assert urls >= {f"http://x.org/{n}" for n in range(COUNT) if n not in hit}
        missing = {n for n in range(COUNT) if f"http://x.org/{n}" not in urls}
        # Some flips are harmless (the header's time, say); a lost record is always named.
        assert not missing or damage or any(r.cut for r in records)


def test_a_body_longer_than_asked_for_is_not_read(tmp_path):
    path = tmp_path / "x.warc.gz"
    path.write_bytes(MEMBERS[0] + gzip.compress(record(1, bytes(50_000))) + MEMBERS[2])
    bodies = [each.body for each in warc.read(path, 10_000)]
    assert bodies[1] is None and bodies[0] and bodies[2]


# -------------------------------------------------------------------------------------------- HTTP

BODY = b"<html>" + b"words " * 1_000


def compressed(codec: str) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, codec) as stream:
        stream.write(BODY)
    return sink.getvalue().to_pybytes()


CHUNKED = (
    b"".join(b"%x;ext=1\r\n%s\r\n" % (len(p), p) for p in (BODY[:100], BODY[100:])) + b"0\r\n\r\n"
)


@pytest.mark.parametrize(
    ("headers", "body"),
    [
        ("", BODY),
        ("Content-Encoding: gzip\r\n", gzip.compress(BODY)),
        ("Content-Encoding: br\r\n", compressed("brotli")),
        ("Content-Encoding: zstd\r\n", compressed("zstd")),
        ("Content-Encoding: deflate\r\n", zlib.compress(BODY)),
        ("Content-Encoding: deflate\r\n", zlib.compress(BODY)[2:-4]),
        ("Content-Encoding: identity\r\nTransfer-Encoding: chunked\r\n", CHUNKED),
        # Decoded by the crawler, with the headers of before.
        ("Content-Encoding: gzip\r\nTransfer-Encoding: chunked\r\n", BODY),
        ("Content-Encoding: br\r\n", BODY),
        ("content-encoding: deflate\r\n", BODY),
    ],
    ids=["none", "gzip", "br", "zstd", "zlib", "deflate", "chunked", "done gzip", "done br", "done deflate"],
)  # fmt: skip
def test_encodings_are_undone(headers, body):
    message = f"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n{headers}\r\n".encode() + body
    response = http.parse(message)
    assert (response.status, response.content_type) == (200, "text/html")
    assert http.decoded(response, 1 << 20) == BODY


@pytest.mark.parametrize("codec", ["gzip", "br", "zstd", "deflate"])
def test_a_bomb_is_too_large(codec):
    zeros = bytes(1 << 24)
    if codec == "gzip":
        bomb = gzip.compress(zeros)
    elif codec == "deflate":
        bomb = zlib.compress(zeros)
    else:
        sink = pa.BufferOutputStream()
        with pa.CompressedOutputStream(sink, {"br": "brotli"}.get(codec, codec)) as stream:
            stream.write(zeros)
        bomb = sink.getvalue().to_pybytes()
    response = http.Response(200, "text/html", "", codec, bomb)
    with pytest.raises(http.Undecodable, match="too_large"):
        http.decoded(response, 1 << 20)


@pytest.mark.parametrize("codec", ["gzip", "br", "zstd"])
def test_damaged_bodies_leave_nothing_in_memory(codec):
    body = pa.compress(random.randbytes(50_000), {"br": "brotli"}.get(codec, codec), asbytes=True)
    cut = http.Response(200, "text/html", "", codec, body[:-9_000])
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        for _ in range(10):
            with pytest.raises(http.Undecodable, match="bad_encoding"):
                http.decoded(cut, 1 << 20)
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert after - before < 1 << 20


def test_what_is_no_response_or_cannot_be_decoded_is_named():
    assert http.parse(b"\x16\x03\x01 not http") is None
    assert http.parse(b"HTTP/1.1 abc\r\n\r\n") is None
    for codec, body, name in (
        ("br", b"\xff\0" * 50, "bad_encoding"),
        ("x", b"", "unknown_encoding"),
    ):
        with pytest.raises(http.Undecodable, match=name):
            http.decoded(http.Response(200, "", "", codec, body), 100)
