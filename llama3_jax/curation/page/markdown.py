"""Markdown's markers, out of prose: they harm a model that is trained on web text.

Our own text never adds any; pages that hold unrendered markdown do. Code and math stay as they are, and
so do single * and _ and the pipes of tables, which text has for other reasons.
"""

import re

# Not names such as __init__, of which prose about programs is full.
_PAIRED = re.compile(
    r"(\*{2,3}|(?<![\w_])_{2,3}(?=\w)|~~)(?!(?<=__)[a-z][a-z0-9_]*__(?!\w))(?=\S)([^*~\n]{1,500}?)(?<=\S)\1(?![\w*])"
)
_QUOTED = re.compile(r"(?<!`)(`{1,2})(?!`)([^`\n]{1,500})\1(?!`)")
_FENCE = re.compile(r"`{3,}\w*")
_LINK = re.compile(r"!?\[([^\[\]\n]{0,300})\]\((?:https?:|/|#|\.|mailto:)[^()\s]{0,500}\)")
_START = re.compile(r"(?:#{1,6}|>|[*+-])[ \t]+(?=[^\W\d])")
_MARKERS = ("**", "__", "`", "~~", "](")
STARTS = frozenset("#>*+-")


def occur_in(text: str) -> bool:
    """Whether `strip` may change text other than at its start."""
    return any(marker in text for marker in _MARKERS)


def strip(text: str) -> str:
    """The text of a block without markers."""
    if occur_in(text):
        text = _FENCE.sub("", text)
        text = _LINK.sub(r"\1", text)
        text = _PAIRED.sub(r"\2", text)
        text = _QUOTED.sub(r"\2", text)
    return strip_start(text)


def strip_start(text: str) -> str:
    """Without the marker of a heading, quotation or item."""
    first = text.lstrip()
    if first[:1] in STARTS:
        found = _START.match(first)
        if found:
            return first[found.end() :]
    return text
