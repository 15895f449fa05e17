"""An HTTP response as a WARC record holds it: status, content type, and the body decoded."""

import dataclasses
import zlib

import pyarrow

# Names of Content-Encoding and what pyarrow calls them; deflate is zlib's.
_CODECS = {"gzip": "gzip", "x-gzip": "gzip", "br": "brotli", "zstd": "zstd"}
_GZIP = b"\x1f\x8b"
_PIECE = 1 << 20


@dataclasses.dataclass(frozen=True)
class Response:
    """`body` is as sent: `decoded` undoes the transfer and content encodings."""

    status: int
    content_type: str
    transfer_encoding: str
    content_encoding: str
    body: bytes


class Undecodable(Exception):
    """The name of what is wrong with a body: bad_encoding, unknown_encoding or too_large."""


def parse(message: bytes) -> Response | None:
    """The response in `message`, or None where it is none."""
    end, gap = message.find(b"\r\n\r\n"), 4
    if end < 0:
        end, gap = message.find(b"\n\n"), 2
    if end < 0 or not message.startswith(b"HTTP/"):
        return None
    status, *lines = message[:end].decode("latin-1").splitlines()
    words = status.split(None, 2)
    if len(words) < 2 or not words[1].isdigit():
        return None
    headers: dict[str, str] = {}
    for line in lines:
        name, _, value = line.partition(":")
        headers.setdefault(name.strip().lower(), value.strip())
    return Response(
        int(words[1]),
        headers.get("content-type", ""),
        headers.get("transfer-encoding", "").lower(),
        headers.get("content-encoding", "").lower(),
        message[end + gap :],
    )


def decoded(response: Response, max_bytes: int) -> bytes:
    """The body without its encodings.

    Crawlers often decode and leave the headers as they were: what does not look encoded is taken
    as it is.

    Raises:
      Undecodable: by name; what would be longer than `max_bytes` is not decoded any further.
    """
    body = response.body
    if "chunked" in response.transfer_encoding:
        body = _unchunked(body)
    for name in reversed([n.strip() for n in response.content_encoding.split(",")]):
        if name in ("", "identity", "none", "utf-8"):
            continue
        if name == "deflate":
            body = _inflated(body, max_bytes)
        elif name not in _CODECS:
            raise Undecodable("unknown_encoding")
        elif _CODECS[name] != "gzip" or body.startswith(_GZIP):
            body = _decompressed(body, _CODECS[name], max_bytes)
    if len(body) > max_bytes:
        raise Undecodable("too_large")
    return body


def _unchunked(body: bytes) -> bytes:
    parts, position = [], 0
    while True:
        end = body.find(b"\r\n", position)
        try:
            size = int(body[position:end].split(b";")[0], 16)
        except ValueError:
            # Decoded already, unless some chunks were right.
            return body if not parts else b"".join(parts)
        if end < 0 or size <= 0:
            return b"".join(parts)
        parts.append(body[end + 2 : end + 2 + size])
        position = end + 2 + size + 2


def _decompressed(body: bytes, codec: str, max_bytes: int) -> bytes:
    found, piece = bytearray(), memoryview(bytearray(_PIECE))
    try:
        with pyarrow.CompressedInputStream(pyarrow.BufferReader(body), codec) as stream:
            # Into a buffer of ours: `read` never frees its own when the data turn out to be damaged.
            while len(found) <= max_bytes and (size := stream.readinto(piece)):
                found += piece[:size]
    except (OSError, pyarrow.ArrowException):
        if body.lstrip()[:1] == b"<":
            return body
        raise Undecodable("bad_encoding") from None
    if len(found) > max_bytes:
        raise Undecodable("too_large")
    return bytes(found)


def _inflated(body: bytes, max_bytes: int) -> bytes:
    for window in (zlib.MAX_WBITS, -zlib.MAX_WBITS):
        unzip = zlib.decompressobj(window)
        try:
            found = unzip.decompress(body, max_bytes + 1)
        except zlib.error:
            continue
        if len(found) > max_bytes:
            raise Undecodable("too_large")
        return found
    if body.lstrip()[:1] == b"<":
        return body
    raise Undecodable("bad_encoding")
