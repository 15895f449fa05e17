"""What an element's name, class and id say of it."""

import dataclasses
import functools
import re

from llama3_jax.curation.page import rules

BLOCKS = frozenset(
    "html body address article aside blockquote button center dd details dialog dir div dl dt fieldset "
    "figcaption figure footer form h1 h2 h3 h4 h5 h6 header hgroup hr legend li main menu nav ol "
    "option p pre search section summary table tbody tfoot thead tr caption ul".split()
)
CELLS = frozenset(("td", "th"))
# No text of the page. The first kind may hold "<" as it stands, or are long: they are taken out of
# the tree (scripts that hold math are read before).
TAKEN_OUT = frozenset("script style iframe xmp noembed noframes plaintext svg".split())
SKIPPED = frozenset(
    "template noscript canvas object audio video map select textarea datalist meter progress".split()
)
VOID = frozenset("br hr img wbr input link meta area base col embed param source track".split())
HEADINGS = {f"h{level}": level for level in range(1, 7)}

# Bits of what an element is for, taken from its tag, class, id, role and itemprop. A block's bits
# are those of all elements around it.
WORDS = {
    "nav": r"nav(bar|igation)?|menu|breadcrumbs?|toc|tabs?|skip|pagination|pager?|prev|next",
    "header": r"header|masthead|banner|topbar|hero|logo|branding",
    "footer": r"footer|foot|copyright|colophon|legal|disclaimer|bottom",
    "side": r"side(bar|nav|menu)?|aside|rail|widgets?|secondary|column|right|left",
    "related": r"related|recommend\w*|similar|more|trending|popular|latest|recent|also|upsell|"
    r"cross|suggest\w*|featured|carousel|slider|swiper|teaser",
    "share": r"share|sharing|social|follow|facebook|twitter|linkedin|pinterest|addtoany",
    "promo": r"ad|ads|advert\w*|promo\w*|sponsor\w*|cta|newsletter|subscribe|subscription|signup|"
    r"optin|offer|donate|campaign",
    "overlay": r"cookies?|consent|gdpr|modal|popup|overlay|dialog|drawer|offcanvas|lightbox|toast|"
    r"tooltip|alert|notice|dropdown|flyout",
    "account": r"log-?in|sign-?in|account|cart|checkout|basket|wishlist|search\w*|filters?|facets?|"
    r"sort|toolbar|actions?|controls?|buttons?|btn|form|input|label",
    "byline": r"author|byline|bio|avatar|meta|date|time|timestamp|published|posted|tags?|"
    r"category|categories|rating|vote|votes|stats?|user\w*|profile|signature|sig",
    "comment": r"comments?|replies|reply|respond|disqus|discussion",
    "post": r"posts?|messages?|topic|thread|forum|bbp|question|answer",
    "content": r"content|main|body|entry|article\w*|story|text|prose|page|copy|rich|rte|wysiwyg|"
    r"markdown|document|description|desc|summary|details?|overview|section|richtext",
    "product": r"products?|item|items|card|cards|price|prices?|sku|spec|specs|specifications?|"
    r"features?|gallery|variant|options?|review|reviews|grid|collection|listing|list|results?|tile",
    "title": r"title|heading|headline|name|subtitle|lead|intro|dek|excerpt",
    "caption": r"caption|credit|figure|image|media|photo|thumb\w*",
    "faq": r"faqs?|accordion|collapse|toggle|panel|question|answer",
    "code": r"code|highlight|source|snippet|syntax\w*",
    "hidden": r"hidden|hide|sr-only|screen-reader\w*|visually-hidden|visuallyhidden|invisible|"
    r"d-none|collapsed|closed|no-?print|offscreen",
}  # fmt: skip
BITS = {name: 1 << index for index, name in enumerate(WORDS)}
_PATTERNS = [
    (BITS[name], re.compile(rf"(?<![a-z])(?:{words})(?![a-z])")) for name, words in WORDS.items()
]
_ANY = re.compile("|".join(f"(?:{words})" for words in WORDS.values()))
_LETTERS = re.compile(r"[A-Z]*[a-z]+|[A-Z]+")
_FIRST_OF_PAIR = frozenset(("log", "sign", "sr", "screen", "visually", "d", "no"))

_LOOKED_AT = 200  # characters of a class or id
# Where none of these is, only the class and the id tell anything.
_RARE = ("hidden", "role", "itemprop", "none")
_NOT_SHOWN = re.compile(r"display\s*:\s*none")
_ATTRIBUTE = re.compile(r'([^\s=]+)="([^"]*)"')
_ENTITIES = (("&lt;", "<"), ("&gt;", ">"), ("&nbsp;", " "), ("&quot;", '"'), ("&amp;", "&"))

TAG_BITS = {
    "nav": "nav", "header": "header", "footer": "footer", "aside": "side", "form": "account",
    "button": "account", "label": "account", "main": "content", "article": "content",
    "time": "byline", "figure": "caption", "figcaption": "caption", "dialog": "overlay",
    "option": "account", "menu": "nav",
}  # fmt: skip
_BITS_OF_TAG = {tag: BITS[name] for tag, name in TAG_BITS.items()}
_ROLES = {
    "navigation": "nav", "banner": "header", "contentinfo": "footer", "complementary": "side",
    "main": "content", "article": "content", "dialog": "overlay", "search": "account",
}  # fmt: skip


@functools.lru_cache(maxsize=1 << 17)
def _word(name: str) -> int:
    """Bits of one of the names in a class, or of an id, those of the rules too."""
    found, before = 0, ""
    for word in _LETTERS.findall(name):
        found |= _bits_of(word)
        if before in _FIRST_OF_PAIR:
            found |= _bits_of(f"{before}-{word}")
        before = word
    return found | _RULED.get(name, 0)


@functools.lru_cache(maxsize=1 << 16)
def _bits_of(word: str) -> int:
    word = word.lower()
    if not _ANY.fullmatch(word):
        return 0
    return sum(bit for bit, pattern in _PATTERNS if pattern.search(word))


# The bits of rules.py come after those of WORDS; an element's own two kinds are not handed down.
CONTENT, BOILERPLATE, _DROP, _CODE = (
    bit << len(WORDS) for bit in (rules.CONTENT, rules.BOILERPLATE, rules.DROPPED, rules.CODE)
)
_RULED = {name: bits << len(WORDS) for name, bits in rules.by_name().items()}
_HANDED_DOWN = ~(_DROP | _CODE)


# What a reader does at a tag.
(BLOCK_START, BLOCK_STOP, CELL_START, CELL_STOP, LINK_START, LINK_STOP, BOLD_START, BOLD_STOP,
 INLINE_CODE, SCRIPT_START, SCRIPT_STOP, LINE_BREAK, IMAGE, PLAIN, INLINE, COMMENT) = range(16)  # fmt: skip
_DOES = {
    **dict.fromkeys(BLOCKS, BLOCK_START), **{f"/{name}": BLOCK_STOP for name in BLOCKS},
    **dict.fromkeys(CELLS, CELL_START), **{f"/{name}": CELL_STOP for name in CELLS},
    "a": LINK_START, "/a": LINK_STOP, "b": BOLD_START, "strong": BOLD_START, "/b": BOLD_STOP,
    "/strong": BOLD_STOP, "code": INLINE_CODE, "kbd": INLINE_CODE, "samp": INLINE_CODE,
    "tt": INLINE_CODE, "sup": SCRIPT_START, "sub": SCRIPT_START, "/sup": SCRIPT_STOP,
    "/sub": SCRIPT_STOP, "br": LINE_BREAK, "img": IMAGE,
}  # fmt: skip


@dataclasses.dataclass(slots=True)
class Marks:
    """What is known of an element from its start tag; of an end tag, only `does` and `tag`."""

    does: int
    tag: str
    own: int = 0  # bits of WORDS, set by its tag, class, id, itemprop, role and style
    dropped: bool = False  # its text repeats or decorates other text
    code: bool = False
    kind: int = 0  # equal where tag and class are


MET: dict[str, Marks] = {}  # of tags met before; a reader looks here before it calls marks()


def marks(head: str) -> Marks:
    """`head` is a tag as a parser wrote it, without "<" and ">"."""
    if head[:2] == "a ":
        return _link(head)
    if head[:4] == "img ":
        return _PICTURE
    tag, _, attributes = head.partition(" ")
    does = _DOES.get(tag)
    if tag[:1] == "/":
        return _keep(head, Marks(PLAIN if does is None else does, tag[1:]))
    if does is None:
        if tag[:3] == "!--":
            return Marks(COMMENT, tag)
        if tag in SKIPPED:
            return Marks(INLINE, tag, dropped=True)
        if tag in VOID:
            return _NOTHING
        does = INLINE if attributes or tag in _BITS_OF_TAG else PLAIN
    if not attributes or (
        attributes.startswith('class="') and attributes.find('"', 7) == len(attributes) - 1
    ):
        own, kind = _of_class(attributes[7 : 7 + _LOOKED_AT].rstrip('"'))
        return _keep(head, _made(does, tag, own, kind))
    if does == INLINE:  # text inside a block: only what its class says
        return _keep(head, _made(does, tag, *_of_class(_value(attributes, 'class="'))))
    for sign in _RARE:
        if sign in attributes:
            return _keep(head, _of_all(does, tag, attributes))
    own, kind = _of_class(_value(attributes, 'class="'))
    identity = _value(attributes, 'id="').rstrip("0123456789")
    if identity:  # hardly ever met again as a whole
        return _made(does, tag, own | _word(identity), kind)
    return _keep(head, _made(does, tag, own, kind))


def _made(does: int, tag: str, own: int, kind: int) -> Marks:
    own |= _BITS_OF_TAG.get(tag, 0)
    code = (own & _CODE) > 0 and tag in ("div", "table")
    return Marks(does, tag, own & _HANDED_DOWN, (own & _DROP) > 0, code, kind ^ hash(tag))


def _keep(head: str, marks: Marks) -> Marks:
    if len(MET) > 1 << 16:
        MET.clear()
    if len(head) < _LOOKED_AT:
        MET[head] = marks
    return marks


_LINK, _DROPPED_LINK = Marks(LINK_START, "a"), Marks(LINK_START, "a", dropped=True)
_PICTURE, _NOTHING = Marks(IMAGE, "img"), Marks(PLAIN, "")


def _link(head: str) -> Marks:
    if "-link" in head or "headerlink" in head:
        for name in _value(head, 'class="').split():
            if _RULED.get(name, 0) & _DROP:
                return _DROPPED_LINK
    return _LINK


def _value(attributes: str, key: str) -> str:
    """Up to _LOOKED_AT characters of an attribute, or ""."""
    start = attributes.find(key)
    while start > 0 and attributes[start - 1] != " ":  # the end of another key
        start = attributes.find(key, start + 1)
    if start < 0:
        return ""
    start += len(key)
    return attributes[start : min(attributes.find('"', start), start + _LOOKED_AT)]


@functools.lru_cache(maxsize=1 << 15)
def _of_class(name: str) -> tuple[int, int]:
    """Bits of a class, and a number that is equal where the class is."""
    found = 0
    for one in name.split():
        found |= _word(one)
    return found, hash(name)


def _of_all(does: int, tag: str, attributes: str) -> Marks:
    values = dict(one.partition('="')[::2] for one in attributes[:-1].split('" '))
    own, kind = _of_class(values.get("class", "")[:_LOOKED_AT])
    for key in ("id", "itemprop"):
        if key in values:
            own |= _word(values[key][:_LOOKED_AT])
    if values.get("role") in _ROLES:
        own |= BITS[_ROLES[values["role"]]]
    if (
        "hidden" in values
        or values.get("aria-hidden") == "true"
        or _NOT_SHOWN.search(values.get("style", ""))
    ):
        own |= BITS["hidden"]
    return _made(does, tag, own, kind)


def parsed(attributes: str) -> dict[str, str]:
    """The attributes of a start tag that a parser wrote, by name."""
    return {key: unescaped(value) for key, value in _ATTRIBUTE.findall(attributes)}


def unescaped(text: str) -> str:
    """Text or a value as it was before a parser wrote it out."""
    for entity, character in _ENTITIES:
        if entity in text:
            text = text.replace(entity, character)
    return text
