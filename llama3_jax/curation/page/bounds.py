"""Pages that a parser would choke on are named before it sees them.

An HTML5 parser takes time with the square of three things: the depth of the tree (each <div> looks
up the open elements), the attributes of one tag (each is compared with those before it), and open
formatting elements times blocks (each block opens them anew). One linear scan bounds all three.
"""

import re

MAX_CHARACTERS = 10_000_000
MAX_DEPTH = 2_000
MAX_NODES = 500_000
MAX_ATTRIBUTES = 5_000
MAX_REOPENED = 500_000  # open formatting elements times tags
# Pages below all of these take no second whatever their markup, and are not scanned.
SAFE_ELEMENTS = 3_000
SAFE_FORMATTING = 250  # formatting elements with attributes: of those alike only three reopen
SAFE_EQUAL_SIGNS = 20_000
SAFE_RUN = 40_000  # characters between two ">"

_RAW = ("script", "style", "textarea", "title", "xmp", "noembed", "iframe")
_END = {name: re.compile(f"</(?i:{name})") for name in _RAW}
# Tags, comments and the inside of scripts. Possessive and never failing, so that a long tag, quote
# or comment without an end is read once.
_TOKEN = re.compile(
    r"""<(?i:
      !--(?:[^-]++|-(?!->))*+
    | (?P<raw>"""
    + "|".join(_RAW)
    + r""")\b(?P<rawtag>[^>]*+)
    | (?P<tag>/?[a-z][^\s/>]*+)
      (?P<attributes>(?:[^>"'=]++|=\s*+(?:"[^"]*+|'[^']*+)?+|["'])*+)
    )""",
    re.X,
)
# Flags inside groups leave "<" a literal, for which the search skips ahead.
_REOPENED = re.compile(r"<(?i:b|big|code|em|font|i|nobr|s|small|strike|strong|tt|u)[\s/]")
_TAG_START = re.compile(r"<[a-zA-Z]")
_ATTRIBUTE = re.compile(r"""[^\s"'/=<>]+\s*(?:=\s*(?:"[^"]*+"?|'[^']*+'?|[^\s"'>]+))?""")
_FORMATTING = frozenset("a b big code em font i nobr s small strike strong tt u".split())
# Elements that end by themselves, or hold nothing: they do not nest.
_FLAT = frozenset(
    "p li dt dd tr td th tbody thead tfoot option optgroup rp rt br hr img input meta link area base"
    " col embed param source track wbr colgroup".split()
)


def refusal(html: str) -> str | None:
    """The name of the bound that this page breaks, or None."""
    if len(html) > MAX_CHARACTERS:
        return "too_large"
    opened = html.count("<") - html.count("</")
    if opened > MAX_NODES:
        return "too_many_nodes"
    if (
        opened <= SAFE_ELEMENTS
        and html.count("=") <= SAFE_EQUAL_SIGNS
        and not _has_long_tag(html)
        and (opened <= SAFE_FORMATTING or len(_REOPENED.findall(html)) <= SAFE_FORMATTING)
    ):
        return None
    return _scan(html)


def _has_long_tag(html: str) -> bool:
    for run in html.split(">"):
        if len(run) > SAFE_RUN:
            start = _TAG_START.search(run)
            if start and len(run) - start.start() > SAFE_RUN:
                return True
    return False


def _scan(html: str) -> str | None:
    depth = deepest = unclosed = tags = position = 0
    while True:
        found = _TOKEN.search(html, position)
        if found is None:
            break
        position = found.end()
        raw = found["raw"]
        if raw:
            end = _END[raw.lower()].search(html, position)
            if end is None:  # it swallows the rest
                break
            position = end.start()
            continue
        tag = found["tag"]
        if tag is None:
            continue
        if len(found[0]) > MAX_ATTRIBUTES and _attributes(found["attributes"]) > MAX_ATTRIBUTES:
            return "too_many_attributes"
        tags += 1
        name = tag.lower()
        if name[0] == "/":
            if name[1:] not in _FLAT:
                depth = max(0, depth - 1)
                unclosed -= name[1:] in _FORMATTING
        elif name not in _FLAT:
            depth += 1
            deepest = max(deepest, depth)
            unclosed += name in _FORMATTING
    if deepest > MAX_DEPTH:
        return "too_deep"
    if max(0, unclosed) * tags > MAX_REOPENED:
        return "too_many_open_elements"
    return None


def _attributes(text: str) -> int:
    return sum(1 for _ in _ATTRIBUTE.finditer(text))
