"""Markdown's markers, out of prose: they harm a model that is trained on web text.

Our own text never adds any; pages that hold unrendered markdown do. Code and math stay as they are.
"""

import re

_PAIRED = re.compile(
    r"(\*{2,3}|(?<![\w_])_{2,3}(?=\w)|~~)(?=\S)([^*~\n]{1,500}?)(?<=\S)\1(?![\w*])"
)
_QUOTED = re.compile(r"(?<!`)(`{1,2})(?!`)([^`\n]{1,500})\1(?!`)")
_FENCE = re.compile(r"`{3,}\w*")
_LINK = re.compile(r"!?\[([^\[\]\n]{0,300})\]\((?:https?:|/|#|\.|mailto:)[^()\s]{0,500}\)")
_START = re.compile(r"(?:#{1,6}|>|[*+-])[ \t]+(?=[^\W\d])")
_MARKERS = ("**", "__", "`", "~~", "](")


def strip(pieces: list[str], literal: list[int]) -> str:
    """The pieces of a block joined, without markers in those that are not `literal`."""
    if not literal:
        return _strip_text("".join(pieces))
    kept = set(literal)
    parts: list[str] = []
    run: list[str] = []
    for index, piece in enumerate(pieces):
        if index in kept:
            parts += [_strip_text("".join(run), start=not parts), piece]
            run = []
        else:
            run.append(piece)
    parts.append(_strip_text("".join(run), start=not parts))
    return "".join(parts)


def _strip_text(text: str, start: bool = True) -> str:
    for marker in _MARKERS:
        if marker in text:
            text = _FENCE.sub("", text)
            text = _LINK.sub(r"\1", text)
            text = _PAIRED.sub(r"\2", text)
            text = _QUOTED.sub(r"\2", text)
            break
    if start:
        first = text.lstrip()
        if first[:1] in ("#", ">", "*", "+", "-"):
            found = _START.match(first)
            if found:
                return first[found.end() :]
    return text
