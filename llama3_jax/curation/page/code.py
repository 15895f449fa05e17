"""Code with its lines and indentation, without line numbers and permalinks."""

import re
from collections.abc import Iterator

from llama3_jax.curation.page import markup

# Elements that stand for a line of code each.
_LINES = frozenset(("div", "p", "li", "tr"))
_NUMBER = re.compile(r"^\s*(\d+)[.:|]?(?=\s|$)")


def read(pieces: Iterator[str], name: str, text: str) -> tuple[str, str]:
    """The text of the element `name`, opened just before `text`, and the text after its end.

    `pieces` are those of blocks.py: each begins at a tag.
    """
    parts = [text]
    begun: list[int] = []  # how many parts there were where an open line element began
    end, depth = f"/{name}", 1
    skipped = ""  # the element whose end is awaited
    skipped_depth = 0
    rest = ""
    for piece in pieces:
        head, _, text = piece.partition(">")
        tag, _, attributes = head.partition(" ")
        if skipped:
            if tag == skipped:
                skipped_depth += 1
            elif tag[:1] == "/" and tag[1:] == skipped:
                skipped_depth -= 1
                if not skipped_depth:
                    skipped = ""
                    if text:
                        parts.append(text)
            continue
        if tag == end:
            depth -= 1
            if not depth:
                rest = text
                break
        elif tag == name:
            depth += 1
        if tag == "br":
            parts.append("\n")
        elif tag in _LINES:
            if not _ends_line(parts):
                parts.append("\n")
            begun.append(len(parts))
        elif tag[:1] == "/":
            if begun and tag[1:] in _LINES and (begun.pop() == len(parts) or not _ends_line(parts)):
                parts.append("\n")
        elif tag[:3] == "!--":
            text = ""
        if tag == "button" or (attributes and markup.marks(head).dropped):
            skipped, skipped_depth = tag, 1
            continue
        if text:
            parts.append(text)
    found = "".join(parts)
    if "&" in found:
        found = markup.unescaped(found)
    found = found.replace("\r\n", "\n")
    if name in ("pre", "table"):
        found = _without_numbers(found).strip("\n")
    return found, rest


def _ends_line(parts: list[str]) -> bool:
    """Whether what was read so far is empty or ends a line."""
    for part in reversed(parts):
        if part:
            return part[-1] == "\n"
    return True


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
