"""Read and Extract: one page's bytes or text to a document, or to a named rejection.

Sec. 3.1.1 of the Llama 3 paper: an HTML parser of our own, precise on boilerplate and complete on
content, that keeps math and code, and no markdown. Parse once (selectolax), cut the page into
blocks, judge each block by its looks (classifier.py), join those that stay.

    outcome = extract(page_bytes, url="https://…", content_type="text/html; charset=utf-8")
    if isinstance(outcome, Rejection): outcome.reason, outcome.detail
    else: outcome.text, outcome.title, outcome.date, outcome.language, outcome.reasons
"""

import dataclasses

import numpy as np
from selectolax.lexbor import LexborHTMLParser, SelectolaxError

from llama3_jax.curation.page import (
    blocks,
    bounds,
    classifier,
    encoding,
    features,
    markup,
    metadata,
)

MAX_BYTES = 4 * bounds.MAX_CHARACTERS
_LISTS = frozenset(("ul", "ol", "menu", "dl", "table"))
_MEMBERS = frozenset("li dt dd tr td th tbody thead tfoot caption".split())
NULL_SHARE = 0.01  # more null characters than this are no text
_MAGIC = (
    (b"%PDF", "pdf"), (b"\x89PNG", "png"), (b"\xff\xd8\xff", "jpeg"), (b"GIF8", "gif"),
    (b"PK\x03\x04", "zip"), (b"\x1f\x8b", "gzip"), (b"RIFF", "riff"), (b"\x7fELF", "elf"),
    (b"OggS", "ogg"), (b"ID3", "mp3"),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Document:
    """A page's content as plain text.

    Paragraphs are divided by a blank line, items and table rows by a line break, cells by a tab.
    `date` is ISO (YYYY-MM-DD); `language` is what the page says of itself, a hint. `reasons` say how
    the text came to be, as "encoding:utf-8:declared" and "dropped:boilerplate:37" (blocks).
    """

    text: str
    title: str
    date: str | None
    language: str | None
    url: str | None
    reasons: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Rejection:
    """Why a page gave no document: a name that can be counted, and a detail for a reader.

    Names: empty, not_html, too_large, too_deep, too_many_nodes, too_many_attributes,
    too_many_open_elements, too_many_blocks, unparsable, no_text.
    """

    reason: str
    detail: str
    url: str | None


def extract(
    page: bytes | str, url: str | None = None, content_type: str | None = None
) -> Document | Rejection:
    """The main content of one HTML page.

    Bytes are decoded by what `content_type` (the HTTP header) and the page declare. Pure: the same
    page gives the same outcome. Never raises on any content: what cannot be read is a Rejection.
    """
    how = "given"
    if isinstance(page, bytes):
        if len(page) > MAX_BYTES:
            return Rejection("too_large", f"{len(page)} bytes, at most {MAX_BYTES}", url)
        for magic, kind in _MAGIC:
            if page.startswith(magic):
                return Rejection("not_html", f"starts as a {kind} file", url)
        decoded = encoding.decode(page, content_type)
        html, how = decoded.text, f"{decoded.encoding}:{decoded.found}"
    else:
        html = page.encode("utf-8", "replace").decode("utf-8")  # no lone surrogates
    if not html.strip("\0 \t\r\n\f\ufeff"):
        return Rejection("empty", "no character but white space", url)
    nulls = html.count("\0")
    if nulls:
        if nulls > NULL_SHARE * len(html):
            return Rejection("not_html", f"{nulls} null characters", url)
        html = html.replace("\0", "")
    same = how == "utf-8:utf-8" and not nulls
    data = page if same else html.encode()
    broken = bounds.refusal(html, data)
    if broken:
        return Rejection(broken, f"{len(html)} characters of markup", url)
    try:
        tree = LexborHTMLParser(data)
    except SelectolaxError as error:
        return Rejection("unparsable", str(error), url)
    known = metadata.read(tree, html, url)  # before the tree is taken apart
    try:
        found = blocks.read(tree)
    except blocks.TooLarge as error:
        return Rejection(str(error), "once parsed", url)
    if not found.blocks:
        return Rejection("no_text", "no visible text", url)
    kept = _kept(found, known.title)
    text = _join(found, kept)
    if not text:
        return Rejection("no_text", "nothing but boilerplate", url)
    reasons = (f"encoding:{how}", f"dropped:boilerplate:{len(kept) - int(kept.sum())}")
    return Document(text, known.title, known.date, known.language, url, reasons)


def _kept(page: blocks.Page, title: str) -> np.ndarray:
    rows = features.of_page(page, title)
    words = rows[:, features.WORDS].astype(np.float64)
    kept = classifier.keep(classifier.content_forest().probability(rows), words)
    # Code and math are rare in boilerplate and dear in a document: they stay.
    kept |= np.array([block.code or block.math for block in page.blocks])
    bits = np.array([page.sections.bits[block.section] for block in page.blocks])
    return (kept | (bits & markup.CONTENT > 0)) & (bits & markup.BOILERPLATE == 0)


def _join(page: blocks.Page, kept: np.ndarray) -> str:
    """Items of one list and rows of one table on lines of their own, all else in paragraphs."""
    parts: list[str] = []
    last = None
    for block, keep in zip(page.blocks, kept, strict=True):
        if not keep or not block.text:  # nothing but markers of markdown
            continue
        group = _group(page.sections, block)
        if parts:
            parts.append("\n" if group is not None and group == last else "\n\n")
        parts.append(block.text)
        last = group
    return "".join(parts)


def _group(sections: blocks.Sections, block: blocks.Block) -> int | None:
    """The list or table that an item or row belongs to."""
    if block.code:
        return None
    index = block.section
    for _ in range(4):
        tag = sections.tag[index]
        if tag in _LISTS:
            return index
        if tag not in _MEMBERS:
            return None
        index = sections.parent[index]
    return None
