"""Title, date and language as the page states them."""

import dataclasses
import re

from selectolax.lexbor import LexborHTMLParser

from llama3_jax.curation.page import markup

_DATE = re.compile(r"(?<!\d)((?:19|20)\d\d)[-/.](0?[1-9]|1[0-2])[-/.](0?[1-9]|[12]\d|3[01])(?!\d)")
_DATE_KEYS = (
    "article:published_time", "og:published_time", "datepublished", "date", "dc.date",
    "dc.date.issued", "dcterms.created", "dcterms.date", "citation_publication_date", "pubdate",
    "publishdate", "parsely-pub-date", "sailthru.date", "article:modified_time", "og:updated_time",
    "last-modified", "datemodified",
)  # fmt: skip
_JSON_DATE = re.compile(r'"datePublished"\s*:\s*"([^"]{8,40})"')
_LANGUAGE = re.compile(r"^[a-zA-Z]{2,3}(?:[-_][a-zA-Z0-9]{1,8})*$")
_META = re.compile(r"<meta ([^<>]*)>")
_TITLE = re.compile(r"<title[^<>]*>(.*?)</title>", re.S)
MAX_TITLE = 500


@dataclasses.dataclass(frozen=True, slots=True)
class Metadata:
    """`date` is ISO (YYYY-MM-DD), of publication, else of the last change; `language` a hint."""

    title: str
    date: str | None
    language: str | None


def read(tree: LexborHTMLParser, html: str, url: str | None) -> Metadata:
    """What the page `html`, parsed to `tree`, states of itself."""
    found: dict[str, str] = {}
    head = (tree.head.html or "") if tree.head is not None else ""
    for written in _META.findall(head):
        attributes = markup.parsed(written)
        for kind in ("property", "name", "itemprop", "http-equiv"):
            if kind in attributes:
                found.setdefault(attributes[kind].lower(), attributes.get("content", ""))
    return Metadata(
        _title(tree, head, found), _date(tree, html, url, found), _language(tree, found)
    )  # fmt: skip


def _title(tree: LexborHTMLParser, head: str, found: dict[str, str]) -> str:
    """The title element, else og:title, else the first h1; without line breaks."""
    written = _TITLE.search(head)
    title = _clean(markup.unescaped(written[1])) if written else ""
    title = title or _clean(found.get("og:title", ""))
    if not title:
        node = tree.css_first("h1")
        title = _clean(node.text()) if node is not None else ""
    return title


def _clean(text: str) -> str:
    return " ".join(text.split())[:MAX_TITLE]


def _date(tree: LexborHTMLParser, html: str, url: str | None, found: dict[str, str]) -> str | None:
    """Of the head's meta elements, else of JSON-LD, of a time element, of the URL."""
    for key in _DATE_KEYS:
        if date := _iso(found.get(key, "")):
            return date
    if "datePublished" in html:
        for written in _JSON_DATE.findall(html)[:3]:
            if date := _iso(written):
                return date
    if "<time" in html:
        node = tree.css_first("time[datetime]")
        if node is not None and (date := _iso(node.attributes.get("datetime") or "")):
            return date
    return _iso(url or "")


def _iso(text: str) -> str | None:
    date = _DATE.search(text)
    return f"{date[1]}-{int(date[2]):02}-{int(date[3]):02}" if date else None


def _language(tree: LexborHTMLParser, found: dict[str, str]) -> str | None:
    """As "en" or "pt-br"."""
    attributes = tree.root.attributes if tree.root is not None else {}
    candidates = [attributes.get("lang"), attributes.get("xml:lang")]
    candidates += [found.get(key) for key in ("content-language", "language", "og:locale")]
    for candidate in candidates:
        if candidate and _LANGUAGE.match(candidate.strip()):
            return candidate.strip().lower().replace("_", "-")
    return None
