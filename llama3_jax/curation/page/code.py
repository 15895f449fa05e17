"""Code with its lines and indentation, without line numbers and permalinks."""

import re

from selectolax.lexbor import LexborNode

from llama3_jax.curation.page import markup

# Elements that stand for a line of code each.
_LINES = frozenset(("div", "p", "li", "tr"))
_NUMBER = re.compile(r"^\s*(\d+)[.:|]?(?=\s|$)")
_SKIPPED = frozenset(("script", "style", "button", "svg", "-comment", "template"))


def text_of(root: LexborNode) -> str:
    """The text of a `pre` or of a table of code lines; without recursion."""
    parts: list[str] = []
    # What comes next, and how many parts there were where its line began (-1: no line began).
    stack: list[tuple[LexborNode | None, int]] = [(root.first_child, -1)]
    while stack:
        node, began = stack.pop()
        if node is None:
            if began >= 0 and (began == len(parts) or not parts[-1].endswith("\n")):
                parts.append("\n")
            continue
        stack.append((node.next, began))
        tag = node.tag
        if tag == "-text":
            parts.append(node.text_content or "")
        elif tag == "br":
            parts.append("\n")
        elif tag not in _SKIPPED and not markup.dropped(node.attributes):
            starts_line = tag in _LINES
            if starts_line and parts and not parts[-1].endswith("\n"):
                parts.append("\n")
            stack.append((node.first_child, len(parts) if starts_line else -1))
    return _without_numbers("".join(parts).replace("\r\n", "\n")).strip("\n")


def _without_numbers(code: str) -> str:
    """Without line numbers 1, 2, 3, … that stand before every line."""
    if not _NUMBER.match(code):
        return code
    lines = code.rstrip("\n").split("\n")
    numbers = [_NUMBER.match(line) for line in lines]
    if len(lines) < 3 or not all(numbers):
        return code
    first = int(numbers[0][1])
    if [int(number[1]) for number in numbers] != list(range(first, first + len(lines))):
        return code
    rest = [line[number.end() :] for line, number in zip(lines, numbers, strict=True)]
    return "\n".join(line[1:] if line[:1] in (" ", "\t") else line for line in rest)
