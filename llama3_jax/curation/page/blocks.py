"""A parsed page as a row of blocks (paragraph, item, table row, code), each under its sections.

A block is the text between two borders of block elements. A section is a block element: blocks know
the innermost section around them, sections know their parent.
"""

import dataclasses
import re

from selectolax.lexbor import LexborHTMLParser, LexborNode

from llama3_jax.curation.page import bounds, code, markdown, markup, mathematics

# Placeholders while white space is collapsed: a line break, a table cell's border.
_BREAK, _CELL = "\x01", "\x02"
_CONTROLS = dict.fromkeys([*range(0, 9), *range(14, 32), 0x7F, 0xFEFF, 0x200B, 0xAD])
_PERMALINKS = frozenset(("¶", "#", "§", "🔗", "Permalink", "[source]", "[edit]", "Copy", "link"))
_EXPONENT = re.compile(r"[-−+]?(?:\d{1,4}|[a-zA-Z])(?:[/+-]\w{1,3})?")
_NOT_POWERS = frozenset(("a", "b", "st", "nd", "rd", "th"))
_MATH_TAGS = frozenset(("math", "img", "script", "mjx-container", "span", "div"))
_MATH_PAGE = ("katex", "MathJax", "mjx-", "mwe-math")


@dataclasses.dataclass(slots=True)
class Section:
    """A block element: its parent's index, its name, bits of markup.WORDS here and above."""

    parent: int
    tag: str
    own: int
    bits: int
    depth: int
    name: str
    first: int  # its blocks, with those of sections inside: first to last - 1
    last: int = 0
    children: int = 0


@dataclasses.dataclass(slots=True)
class Block:
    """Text and what features.py needs to judge it."""

    text: str
    section: int
    tag: str  # of the innermost section, or td, th
    linked: int  # characters inside links
    links: int
    code: bool = False
    math: bool = False
    bold: int = 0  # characters inside bold text
    classes: int = 0  # bits of inline elements inside


@dataclasses.dataclass(slots=True)
class Page:
    blocks: list[Block]
    sections: list[Section]


class TooLarge(Exception):
    """The tree breaks a bound of bounds.py; the argument is its name."""


def read(tree: LexborHTMLParser, html: str) -> Page:
    """The page's blocks in the order of the document; raises TooLarge."""
    reader = _Reader(any(word in html for word in _MATH_PAGE))
    if tree.body is not None:
        reader.read(tree.body)
    return Page(reader.blocks, reader.sections)


class _Reader:
    def __init__(self, math_page: bool):
        self.math_page = math_page
        self.blocks: list[Block] = []
        self.sections = [Section(-1, "html", 0, 0, 0, "", 0)]
        self.section = 0
        self.pieces: list[str] = []
        self.literal: list[int] = []  # indices of pieces that are code or math
        self.linked = self.links = self.bold = self.classes = 0
        self.in_link = self.in_bold = 0
        self.cell = ""
        self.has_text = self.has_math = False

    def read(self, body: LexborNode) -> None:
        """Walks with a stack of open elements: what to tell leave(), and the node that follows."""
        stack = [(self.enter(body, "body"), self.section, None)]
        node = body.first_child
        nodes = 0
        while True:
            if node is None:
                if not stack:
                    break
                leaving, section, node = stack.pop()
                self.leave(leaving, section)
                continue
            nodes += 1
            tag = node.tag
            if tag == "-text":
                self.add_text(node.text_content)
                node = node.next
                continue
            entered = self.enter(node, tag)
            if entered is None:
                node = node.next
                continue
            stack.append((entered, self.section, node.next))
            node = node.first_child
            if len(stack) > bounds.MAX_DEPTH:
                raise TooLarge("too_deep")
            if nodes > bounds.MAX_NODES:
                raise TooLarge("too_many_nodes")
        self.flush()
        self.sections[0].last = len(self.blocks)

    def add_text(self, text: str | None) -> None:
        if not text:
            return
        if text.isspace():
            if self.has_text:
                self.pieces.append(" ")
            return
        stripped = text.strip()
        if self.in_link:
            if stripped in _PERMALINKS:
                return
            self.linked += len(stripped)
        if self.in_bold:
            self.bold += len(stripped)
        self.has_text = True
        self.pieces.append(text)

    def add_literal(self, text: str, math: bool) -> None:
        if text:
            self.literal.append(len(self.pieces))
            self.pieces.append(text)
            self.has_text = True
            self.has_math |= math

    def enter(self, node: LexborNode, tag: str) -> str | None:
        """Opens an element: what leave() must be told at its end, or None if it is done with."""
        if tag in _MATH_TAGS and (self.math_page or tag not in ("span", "div")):
            formula = mathematics.of_element(node, tag, node.attributes)
            if formula is not None:
                self.add_literal(formula, math=True)
                return None
        if tag in markup.BLOCKS:
            return self.enter_block(node, tag)
        if tag in markup.SKIPPED or tag == "img":
            return None
        if tag in markup.CELLS:
            attributes = node.attributes
            if markup.dropped(attributes):
                return None
            if self.has_text:
                self.pieces.append(_CELL)
            self.cell = tag
            return self.open_section(node, tag, attributes)
        if tag == "br":
            while self.pieces and self.pieces[-1] == " ":
                self.pieces.pop()
            if self.pieces and self.pieces[-1] == _BREAK:
                self.flush()
            elif self.has_text:
                self.pieces.append(_BREAK)
            return None
        if tag == "a":
            attributes = node.attributes
            if markup.dropped(attributes):
                return None
            self.in_link += 1
            self.links += 1
            return "a"
        if tag in ("b", "strong"):
            self.in_bold += 1
            return "b"
        if tag == "code" or tag == "kbd" or tag == "samp" or tag == "tt":
            self.add_inline_code(node)
            return None
        if tag in ("sup", "sub"):
            return self.enter_script(node, tag)
        if tag in ("i", "em", "u", "font", "small"):
            return "inline"
        attributes = node.attributes
        if attributes:
            if markup.dropped(attributes):
                return None
            self.classes |= markup.bits(tag, attributes)
        return "inline"

    def enter_block(self, node: LexborNode, tag: str) -> str | None:
        attributes = node.attributes
        if markup.dropped(attributes):
            return None
        self.flush()
        if tag == "pre" or (tag == "table" and _is_code_table(node, attributes)):
            opened = self.open_section(node, tag, attributes)
            self.add_code(node, tag)
            self.leave(opened, self.section)
            return None
        return self.open_section(node, tag, attributes)

    def open_section(self, node: LexborNode, tag: str, attributes: dict) -> str:
        parent = self.sections[self.section]
        own = markup.bits(tag, attributes)
        parent.children += 1
        self.sections.append(
            Section(
                self.section, tag, own, own | parent.bits, parent.depth + 1,
                attributes.get("class") or "",
                len(self.blocks),
            )
        )  # fmt: skip
        self.section = len(self.sections) - 1
        return tag

    def leave(self, tag: str, section: int) -> None:
        if tag == "a":
            self.in_link -= 1
        elif tag == "b":
            self.in_bold -= 1
        elif tag in ("sup", "sub", "inline"):
            pass
        else:
            if tag not in markup.CELLS:
                self.flush()
            left = self.sections[section]
            left.last = len(self.blocks)
            self.section = left.parent

    def enter_script(self, node: LexborNode, tag: str) -> str:
        """Powers and indices stay readable: 10^6 and x_i; H2O, 1st and notes as they are."""
        if node.css_first("a") is None:
            text = node.text().strip()
            before = self.pieces[-1][-1:] if self.pieces else ""
            if (before.isalnum() or before in (")", "]")) and text not in _NOT_POWERS:
                if tag == "sup" and _EXPONENT.fullmatch(text):
                    self.pieces.append("^")
                elif tag == "sub" and len(text) == 1 and text.isalpha():
                    self.pieces.append("_")
        return tag

    def add_inline_code(self, node: LexborNode) -> None:
        text = node.text()
        if not text:
            return
        if "\n" in text.strip("\n") and node.tag == "code" and len(text) > 40:
            # A block of code outside of pre; white space is the page's style to keep.
            self.flush()
            self.add_code(node, "code")
            return
        if self.in_link:
            self.linked += len(text)
        self.add_literal(text, math=False)

    def add_code(self, node: LexborNode, tag: str) -> None:
        text = code.text_of(node).translate(_CONTROLS)
        if text.strip():
            linked = len(text) if self.in_link else 0
            self.blocks.append(Block(text, self.section, tag, linked, self.in_link, code=True))

    def flush(self) -> None:
        """Ends the block that is being read."""
        if not self.has_text:
            if self.pieces or self.links or self.classes:
                self.reset()
            return
        text = markdown.strip(self.pieces, self.literal)
        text = " ".join(text.split())
        if not text.isprintable():
            text = text.translate(_CONTROLS_KEPT).strip()
        if _BREAK in text or _CELL in text:
            lines = [
                "\t".join(cell.strip() for cell in line.split(_CELL)).strip()
                for line in text.split(_BREAK)
            ]
            text = "\n".join(line for line in lines if line)
        if text:
            tag = self.cell or self.sections[self.section].tag
            self.blocks.append(
                Block(
                    text, self.section, tag, min(self.linked, len(text)), self.links,
                    math=self.has_math, bold=self.bold, classes=self.classes,
                )
            )  # fmt: skip
        self.reset()

    def reset(self) -> None:
        self.pieces.clear()
        self.literal.clear()
        self.linked = self.links = self.bold = self.classes = 0
        self.cell = ""
        self.has_text = self.has_math = False


# Control characters go; those that stand for breaks while a block is read do not.
_CONTROLS_KEPT = {key: value for key, value in _CONTROLS.items() if key not in (1, 2)}


def _is_code_table(node: LexborNode, attributes: dict) -> bool:
    """GitHub's blobs, Pygments', Rouge's and SyntaxHighlighter's tables: numbers beside code."""
    name = attributes.get("class") or ""
    if "hljs-ln" in name or "js-file-line-container" in name or "highlighttable" in name:
        return True
    if "rouge-table" in name or "crayon-table" in name:
        return True
    return bool(name == "" and node.css_first("td.code div.container, td.blob-code") is not None)
