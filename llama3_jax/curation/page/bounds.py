"""Pages that a parser would choke on are named before it sees them.

An HTML5 parser takes time with the square of three things: the depth of the tree (each <div> looks
up the open elements), the attributes of one tag (each is compared with those before it), and open
formatting elements times blocks (each block opens them anew). One linear scan bounds all three.
"""

import collections
import itertools
import re

import numpy as np

MAX_CHARACTERS = 10_000_000
MAX_DEPTH = 2_000
MAX_NODES = 250_000
MAX_BLOCKS = 50_000
MAX_ATTRIBUTES = 5_000
MAX_REOPENED = 500_000  # open formatting elements times tags
# Pages below all of these take no second whatever their markup, and are not scanned.
SAFE_ELEMENTS = 15_000
SAFE_FORMATTING = 250  # formatting elements
SAFE_EQUAL_SIGNS = 20_000  # a quoted ">" hides a long tag
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
_FORMATTING_TAG = re.compile(
    r"<(?:[bisu]|big|code|em|font|nobr|small|strike|strong|tt)[\s/][^>]{0,300}", re.I
)
_MAYBE_FORMATTING = np.zeros(1 << 16, bool)
for _start in ("bi", "co", "em", "fo", "no", "sm", "st", "tt"):
    _MAYBE_FORMATTING[ord(_start[0]) << 8 | ord(_start[1])] = True
for _name, _next in itertools.product("bisu", " /\t\n\f\r"):
    _MAYBE_FORMATTING[ord(_name) << 8 | ord(_next) | 32] = True
_TAG_START = re.compile(rb"<[a-zA-Z]")
_ATTRIBUTE = re.compile(r"""[^\s"'/=<>]+\s*(?:=\s*(?:"[^"]*+"?|'[^']*+'?|[^\s"'>]+))?""")
_FORMATTING = frozenset("a b big code em font i nobr s small strike strong tt u".split())
# Elements that end by themselves, or hold nothing: they do not nest.
_FLAT = frozenset(
    "p li dt dd tr td th tbody thead tfoot option optgroup rp rt br hr img input meta link area base"
    " col embed param source track wbr colgroup".split()
)


def refusal(html: str, data: bytes) -> str | None:
    """The name of the bound that this page breaks, or None; `data` is the page in UTF-8."""
    if len(html) > MAX_CHARACTERS:
        return "too_large"
    bytes_ = np.frombuffer(data + b"   ", np.uint8)
    starts = np.flatnonzero(bytes_ == 60)  # <
    following = bytes_[starts + 1]
    opened = len(starts) - int((following == 47).sum())  # /
    if opened > MAX_NODES:
        return "too_many_nodes"
    ends = np.flatnonzero(bytes_ == 62)  # >
    runs = np.diff(ends, prepend=0, append=len(data))
    if (
        opened > SAFE_ELEMENTS
        or data.count(b"=") > SAFE_EQUAL_SIGNS
        or any(_holds_long_tag(data, ends, run) for run in np.flatnonzero(runs > SAFE_RUN))
    ):
        return _scan(html)
    if opened > SAFE_FORMATTING:
        # b, i, s and u as whole names, and other names by their first two letters.
        pairs = (following.astype(np.int32) | 32) << 8 | bytes_[starts + 2] | 32
        if int(_MAYBE_FORMATTING[pairs].sum()) > SAFE_FORMATTING:
            distinct = len(set(_FORMATTING_TAG.findall(html)))
            if 3 * distinct * opened > MAX_REOPENED:  # of tags alike only three reopen
                return _scan(html)
    return None


def _holds_long_tag(data: bytes, ends: np.ndarray, run: int) -> bool:
    """Whether a tag of more than SAFE_RUN bytes begins in what stands before the end `run`."""
    start = int(ends[run - 1]) if run else 0
    end = int(ends[run]) if run < len(ends) else len(data)
    tag = _TAG_START.search(data, start, end)
    return tag is not None and end - tag.start() > SAFE_RUN


def _scan(html: str) -> str | None:
    depth = deepest = unclosed = tags = position = 0
    opened = collections.Counter()
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
            # One that nothing opened closes nothing, after a look at all that is open.
            if opened[name[1:]]:
                opened[name[1:]] -= 1
                depth -= 1
                unclosed -= name[1:] in _FORMATTING
        elif name not in _FLAT:
            opened[name] += 1
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
