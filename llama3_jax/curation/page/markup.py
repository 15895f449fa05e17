"""What an element's name, class and id say of it."""

import functools
import re

BLOCKS = frozenset(
    "html body address article aside blockquote button center dd details dialog dir div dl dt fieldset "
    "figcaption figure footer form h1 h2 h3 h4 h5 h6 header hgroup hr legend li main menu nav ol "
    "option p pre search section summary table tbody tfoot thead tr caption ul".split()
)
CELLS = frozenset(("td", "th"))
SKIPPED = frozenset(
    "head script style template noscript iframe svg canvas object embed audio video map input "
    "select textarea datalist meter progress -comment link meta base param source track area".split()
)
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
_LETTERS = re.compile(r"[a-z]+")
_FIRST_OF_PAIR = frozenset(("log", "sign", "sr", "screen", "visually", "d", "no"))
_CAMEL = re.compile(r"(?<=[a-z])(?=[A-Z])")

# Never text of the page: line numbers, permalinks, edit links, prompts, math drawn a second time.
_DROPPED = re.compile(
    r"(?<![\w-])(?:linenos?|linenumber|line-?numbers(?:-rows)?|linenodiv|blob-num|gutter|rouge-gutter|"
    r"hljs-ln-numbers|crayon-nums|crayon-num|CodeMirror-linenumber|ln-num|lnt|headerlink|anchorjs-link|"
    r"mw-editsection|sd-copybtn|copybtn|MathJax_Preview|MathJax_Display|MathJax|MathJax_SVG|MathJax_CHTML|"
    r"katex-html|mwe-math-fallback-image-(?:inline|display)|goog-gt-tt)(?![\w-])"
)

TAG_BITS = {
    "nav": "nav", "header": "header", "footer": "footer", "aside": "side", "form": "account",
    "button": "account", "label": "account", "main": "content", "article": "content",
    "time": "byline", "figure": "caption", "figcaption": "caption", "dialog": "overlay",
    "option": "account", "menu": "nav",
}  # fmt: skip
_ROLES = {
    "navigation": "nav", "banner": "header", "contentinfo": "footer", "complementary": "side",
    "main": "content", "article": "content", "dialog": "overlay", "search": "account",
}  # fmt: skip


@functools.lru_cache(maxsize=1 << 16)
def _bits_of(name: str) -> int:
    """Bits of all words of a class or id, and of pairs of neighbours (as sign-in)."""
    words = _LETTERS.findall(_CAMEL.sub("-", name[:300]).lower())
    found = 0
    before = ""
    for word in words:
        found |= _bits_of_word(word)
        if before in _FIRST_OF_PAIR:
            found |= _bits_of_word(f"{before}-{word}")
        before = word
    return found


@functools.lru_cache(maxsize=1 << 16)
def _bits_of_word(word: str) -> int:
    return sum(bit for bit, pattern in _PATTERNS if pattern.search(word))


@functools.lru_cache(maxsize=1 << 16)
def _is_dropped(name: str) -> bool:
    return _DROPPED.search(name[:300]) is not None


def bits(tag: str, attributes: dict[str, str | None]) -> int:
    """Bits of WORDS that the element's tag, class, id, role and style set."""
    found = BITS[TAG_BITS[tag]] if tag in TAG_BITS else 0
    if not attributes:
        return found
    if len(attributes) == 1:
        name = attributes.get("class")
        if name:
            return found | _bits_of(name)
    for key in ("class", "id", "itemprop"):
        value = attributes.get(key)
        if value:
            found |= _bits_of(value)
    role = attributes.get("role")
    if role in _ROLES:
        found |= BITS[_ROLES[role]]
    style = attributes.get("style")
    if "hidden" in attributes or (style and "none" in style and "display" in style):
        found |= BITS["hidden"]
    if attributes.get("aria-hidden") == "true":
        found |= BITS["hidden"]
    return found


def dropped(attributes: dict[str, str | None]) -> bool:
    """Whether the element's text repeats or decorates other text."""
    name = attributes.get("class")
    return bool(name) and _is_dropped(name)
