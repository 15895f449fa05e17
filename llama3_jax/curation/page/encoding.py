"""From a page's bytes to text: which encoding, and how sure.

The order is that of browsers, save that bytes which decode as UTF-8 and are not plain ASCII are
UTF-8 whatever the page declares: text in another encoding hardly ever does by chance.
"""

import codecs
import dataclasses
import re

import charset_normalizer

SNIFFED_BYTES = 4_096  # of the page's start, for a meta element; a browser looks at 1,024
DETECTED_BYTES = 32_768  # of the page, for the statistical detector
WRONG_SHARE = 0.002  # of replaced characters, above which a declaration is disbelieved

_META = re.compile(rb"""<meta[^>]{0,500}?charset\s*=\s*["']?\s*([a-zA-Z0-9_.:-]{2,40})""", re.I)
_XML = re.compile(rb"""^\s*<\?xml[^>]{0,200}?encoding\s*=\s*["']([a-zA-Z0-9_.:-]{2,40})""", re.I)
_HEADER = re.compile(r"""charset\s*=\s*["']?\s*([a-zA-Z0-9_.:-]{2,40})""", re.I)
_BOMS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
# Names that stand for a larger encoding on the web, as browsers read them.
_AS_BROWSERS = {
    "ascii": "cp1252", "iso8859-1": "cp1252", "iso8859-9": "cp1254", "tis-620": "cp874",
    "iso8859-11": "cp874", "gb2312": "gb18030", "gbk": "gb18030", "shift_jis": "cp932",
    "euc_kr": "cp949", "big5": "big5hkscs",
}  # fmt: skip
_SEVEN_BIT = ("iso2022", "hz")
# Python's other codecs are none of the web's (idna, punycode, unicode_escape, …).
_OF_THE_WEB = ("ascii", "big5", "cp", "euc_", "gb", "hz", "iso2022", "iso8859", "johab", "koi8",
               "kz1048", "mac", "ptcp", "shift_jis", "tis-620", "utf-8")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Decoded:
    """Text, the encoding's name in Python, and how it was found: bom, utf-8, declared, detected."""

    text: str
    encoding: str
    found: str


def decode(page: bytes, content_type: str | None = None) -> Decoded:
    """Decodes a page; never fails: what cannot be decoded becomes U+FFFD.

    `content_type` is the HTTP header of that name, where there was one.
    """
    for bom, name in _BOMS:
        if page.startswith(bom):
            return Decoded(page[len(bom) :].decode(name, "replace"), name, "bom")
    declared = _declared(page, content_type)
    if not (declared or "").startswith(_SEVEN_BIT):
        # A page cut inside a character is still UTF-8: final=False leaves the torn end out.
        try:
            text = codecs.getincrementaldecoder("utf-8")().decode(page)
        except UnicodeDecodeError:
            pass
        else:
            if "\0" not in text[:SNIFFED_BYTES]:
                return Decoded(text, "utf-8", "utf-8")
    wide = _wide(page)
    if wide:
        return Decoded(page.decode(wide, "replace"), wide, "detected")
    if declared:
        text = page.decode(declared, "replace")
        if text.count("\ufffd") <= WRONG_SHARE * len(text):
            return Decoded(text, declared, "declared")
    name = _detected(page) or declared or "utf-8"
    return Decoded(page.decode(name, "replace"), name, "detected")


def _declared(page: bytes, content_type: str | None) -> str | None:
    start = page[:SNIFFED_BYTES]
    header = _HEADER.search(content_type or "")
    names = [header[1]] if header else []
    names += [
        found[1].decode("ascii") for found in (_META.search(start), _XML.search(start)) if found
    ]
    for name in names:
        try:
            known = codecs.lookup(name)
        except LookupError:
            continue
        if known.name.startswith(_OF_THE_WEB):
            return _AS_BROWSERS.get(known.name, known.name)
    return None


def _wide(page: bytes) -> str | None:
    """UTF-16 without a mark: nearly every other byte of markup is null."""
    start = page[:SNIFFED_BYTES]
    even, odd = start[::2].count(0), start[1::2].count(0)
    if max(even, odd) < 0.3 * len(start) or min(even, odd) > 0.02 * len(start):
        return None
    return "utf-16-le" if odd > even else "utf-16-be"


def _detected(page: bytes) -> str | None:
    """The statistical guess from the non-ASCII middle of the page."""
    first = re.search(rb"[\x80-\xff]", page)
    start = max(0, first.start() - 1_000) if first else 0
    best = charset_normalizer.from_bytes(
        page[start : start + DETECTED_BYTES], steps=5, chunk_size=512
    ).best()
    if best is None:
        return None
    name = codecs.lookup(best.encoding).name
    return _AS_BROWSERS.get(name, name)
