"""Title, date and language as the page states them."""

import re

from selectolax.lexbor import LexborHTMLParser

_DATE = re.compile(r"(?<!\d)((?:19|20)\d\d)[-/.](0?[1-9]|1[0-2])[-/.](0?[1-9]|[12]\d|3[01])(?!\d)")
_DATE_KEYS = (
    "article:published_time", "og:published_time", "datepublished", "date", "dc.date",
    "dc.date.issued", "dcterms.created", "dcterms.date", "citation_publication_date", "pubdate",
    "publishdate", "parsely-pub-date", "sailthru.date", "article:modified_time", "og:updated_time",
    "last-modified", "datemodified",
)  # fmt: skip
_JSON_DATE = re.compile(r'"(?:datePublished|dateCreated|uploadDate)"\s*:\s*"([^"]{8,40})"')
_LANGUAGE = re.compile(r"^[a-zA-Z]{2,3}(?:[-_][a-zA-Z0-9]{1,8})*$")
MAX_TITLE = 500


def title_of(tree: LexborHTMLParser) -> str:
    """The title element, else og:title, else the first h1; without line breaks."""
    for selector in ("head title", 'meta[property="og:title"]', "h1"):
        node = tree.css_first(selector)
        if node is not None:
            text = node.attributes.get("content") if node.tag == "meta" else node.text()
            text = " ".join((text or "").split())[:MAX_TITLE]
            if text:
                return text
    return ""


def date_of(tree: LexborHTMLParser, html: str, url: str | None) -> str | None:
    """ISO date (YYYY-MM-DD) of publication, else of the last change: meta, JSON-LD, time, URL."""
    found: dict[str, str] = {}
    for meta in tree.css("meta"):
        attributes = meta.attributes
        key = attributes.get("property") or attributes.get("name") or attributes.get("itemprop")
        if key and key.lower() in _DATE_KEYS:
            found.setdefault(key.lower(), attributes.get("content") or "")
    candidates = [found[key] for key in _DATE_KEYS if key in found]
    if "datePublished" in html or "dateCreated" in html or "uploadDate" in html:
        candidates += _JSON_DATE.findall(html)[:3]
    times = tree.css_first("time[datetime]")
    if times is not None:
        candidates.append(times.attributes.get("datetime") or "")
    candidates.append(url or "")
    for candidate in candidates:
        date = _DATE.search(candidate)
        if date:
            return f"{date[1]}-{int(date[2]):02}-{int(date[3]):02}"
    return None


def language_of(tree: LexborHTMLParser) -> str | None:
    """What the page says of its language (as "en" or "pt-br"): a hint only."""
    candidates = []
    if tree.root is not None:
        attributes = tree.root.attributes
        candidates += [attributes.get("lang"), attributes.get("xml:lang")]
    for selector in (
        'meta[http-equiv="content-language" i]', 'meta[name="language" i]', 'meta[property="og:locale"]'
    ):  # fmt: skip
        node = tree.css_first(selector)
        if node is not None:
            candidates.append(node.attributes.get("content"))
    for candidate in candidates:
        if candidate and _LANGUAGE.match(candidate.strip()):
            return candidate.strip().lower().replace("_", "-")
    return None
