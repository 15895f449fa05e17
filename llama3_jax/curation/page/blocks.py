"""A parsed page as a row of blocks (paragraph, item, table row, code), each under its sections.

A block is the text between two borders of block elements. A section is a block element: blocks know
the innermost section around them, sections know their parent.

The tree is not walked: every look at a node from Python costs more than its parse. It is written out
again, now well-formed and with "<" and ">" in text and values escaped, and split at "<".
"""

import dataclasses
import re
from collections.abc import Iterator

from selectolax.lexbor import LexborHTMLParser

from llama3_jax.curation.page import bounds, code, markdown, markup, mathematics
from llama3_jax.curation.page.markup import (
    BLOCK_START,
    BLOCK_STOP,
    BOLD_START,
    BOLD_STOP,
    CELL_START,
    CELL_STOP,
    COMMENT,
    IMAGE,
    INLINE,
    INLINE_CODE,
    LINE_BREAK,
    LINK_START,
    LINK_STOP,
    PLAIN,
    SCRIPT_START,
    SCRIPT_STOP,
    Marks,
)  # fmt: skip

# Placeholders while white space is collapsed: a line break, a table cell's border.
_BREAK, _CELL = "\x01", "\x02"
# Before and after the number of a text that markdown's markers are not stripped from.
_MATH, _CODE, _END = mathematics.OPEN, "\x05", mathematics.CLOSE
_LITERAL = re.compile(f"[{_MATH}{_CODE}](\\d{{1,6}}){_END}")
_CONTROLS = dict.fromkeys([*range(0, 9), *range(14, 32), 0x7F, 0xFEFF, 0x200B, 0xAD])
_PERMALINKS = frozenset(("¶", "#", "§", "🔗", "Permalink", "[source]", "[edit]", "Copy", "link"))
_EXPONENT = re.compile(r"[-−+]?(?:\d{1,4}|[a-zA-Z])(?:[/+-]\w{1,3})?")
_NOT_POWERS = frozenset(("a", "b", "st", "nd", "rd", "th"))
_BLOCK_OF_CODE = 40  # characters of a code element with line breaks that make it a block


@dataclasses.dataclass(slots=True)
class Sections:
    """Block elements, in the order of their start tags; 0 stands for the page. One list a field.

    `own` and `bits` are bits of markup.WORDS, of the element and of all above it too; `kind` numbers
    its tag and class; its blocks, with those of sections inside, are `first` to `last` - 1.
    """

    parent: list[int]
    tag: list[str]
    own: list[int]
    bits: list[int]
    depth: list[int]
    kind: list[int]
    first: list[int]
    last: list[int]

    def __len__(self) -> int:
        return len(self.parent)


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
    sections: Sections


class TooLarge(Exception):
    """The tree breaks a bound of bounds.py; the argument is its name."""


# Navigation and footers are a quarter of the markup and, in pages with known content, a thousandth of
# the content. One that holds what a page is about was left open by mistake.
_ASIDE = ("nav", "footer")
_NOT_ASIDE = "main, article, h1, pre"
_MAX_ASIDE = 100  # in a page: each is looked through, and they may be nested
_LOOKED_AT = ", ".join(("math", *_ASIDE, *sorted(markup.TAKEN_OUT)))


def read(tree: LexborHTMLParser) -> Page:
    """The page's blocks in the order of the document; takes the tree apart; raises TooLarge."""
    body = tree.body
    if body is None:
        return _Reader([]).page()
    skipped, has_math, asides = [], False, 0
    for node in body.css(_LOOKED_AT):
        if node.tag == "math" or mathematics.is_script(node):
            has_math = True
        elif node.tag not in _ASIDE:
            skipped.append(node)
        elif asides < _MAX_ASIDE:
            asides += 1
            if node.css_first(_NOT_ASIDE) is None:
                skipped.append(node)
    reader = _Reader(mathematics.take_out(body) if has_math else [])
    for node in skipped:
        node.decompose()
    pieces = (body.html or "").split("<")
    if len(pieces) > 2 * bounds.MAX_NODES:
        raise TooLarge("too_many_nodes")
    reader.read(iter(pieces))
    return reader.page()


class _Reader:
    def __init__(self, literals: list[str]):
        self.literals = literals
        self.plain: list[Block] = []  # prose that holds no code or math
        self.blocks: list[Block] = []
        self.sections = Sections([-1], ["html"], [0], [0], [0], [0], [0], [0])
        self.section = 0
        self.pieces: list[str] = []
        self.linked = self.links = self.bold = self.classes = 0
        self.in_link = self.in_bold = 0
        self.script = -1  # where in pieces a sub- or superscript began
        self.script_links = 0
        self.cell = ""
        self.has_text = False

    def page(self) -> Page:
        section = self.section
        while section >= 0:  # what is still open: the page, and what badly written tags left so
            self.sections.last[section] = len(self.blocks)
            section = self.sections.parent[section]
        if markdown.occur_in("\n".join([block.text for block in self.plain])):
            for block in self.plain:
                block.text = markdown.strip(block.text)
        return Page(self.blocks, self.sections)

    def read(self, pieces: Iterator[str]) -> None:
        """One piece is what follows a "<": a tag, ">", and the text up to the next tag."""
        met = markup.MET.get
        for piece in pieces:
            head, _, text = piece.partition(">")
            marks = met(head)
            if marks is None:
                marks = markup.marks(head)
            does = marks.does
            if does == PLAIN:
                pass
            elif does == BLOCK_STOP or does == CELL_STOP:
                self.stop(marks.tag)
            elif marks.dropped:
                text = skip(pieces, marks.tag)
            elif does == BLOCK_START:
                text = self.start_block(marks, text, pieces)
            elif does == INLINE:
                self.classes |= marks.own
            elif does == LINK_START:
                self.in_link += 1
                self.links += 1
            elif does == LINK_STOP:
                if self.in_link:
                    self.in_link -= 1
            elif does == CELL_START:
                if self.has_text:
                    self.pieces.append(_CELL)
                self.cell = marks.tag
                self.start(marks)
            elif does == BOLD_START:
                self.in_bold += 1
            elif does == BOLD_STOP:
                if self.in_bold:
                    self.in_bold -= 1
            elif does == IMAGE:
                if 'alt="' in head:
                    self.add_literal(mathematics.of_image(head), _MATH)
            elif does == LINE_BREAK:
                self.break_line()
            elif does == INLINE_CODE:
                text = self.read_inline_code(marks.tag, text, pieces)
            elif does == SCRIPT_START:
                self.script, self.script_links = len(self.pieces), self.links
                self.pieces.append("")
            elif does == SCRIPT_STOP:
                self.stop_script(marks.tag)
            elif does == COMMENT:
                text = _after_comment(piece, pieces)
            if not text:
                continue
            if text.isspace():
                if self.has_text:
                    self.pieces.append(" ")
                continue
            if self.in_link:
                stripped = text.strip()
                if stripped in _PERMALINKS:
                    continue
                self.linked += len(stripped)
            if self.in_bold:
                self.bold += len(text)
            self.has_text = True
            self.pieces.append(text)
        self.flush()

    def add_literal(self, text: str | None, mark: str) -> None:
        if text:
            self.pieces.append(f"{mark}{len(self.literals)}{_END}")
            self.literals.append(text)
            self.has_text = True

    def start_block(self, marks: Marks, text: str, pieces: Iterator[str]) -> str:
        """Opens a section, or reads it to its end if it is code; the text that follows."""
        name = marks.tag
        if self.has_text or self.links or self.classes:
            self.flush()
        if name == "hr":
            return text
        self.start(marks)
        if name != "pre" and not marks.code:
            return text
        found, text = code.read(pieces, name, text)
        self.add_code(found, name)
        self.stop(name)
        return text

    def start(self, marks: Marks) -> None:
        sections, parent = self.sections, self.section
        self.section = len(sections.parent)
        depth = sections.depth[parent] + 1
        if depth > bounds.MAX_DEPTH:
            raise TooLarge("too_deep")
        sections.parent.append(parent)
        sections.tag.append(marks.tag)
        sections.own.append(marks.own)
        sections.bits.append(marks.own | sections.bits[parent])
        sections.depth.append(depth)
        sections.kind.append(marks.kind)
        sections.first.append(len(self.blocks))
        sections.last.append(0)

    def stop(self, name: str) -> None:
        sections, section = self.sections, self.section
        if sections.tag[section] != name:  # hr, or a tag whose name holds odd characters
            return
        if name not in markup.CELLS and (self.has_text or self.links or self.classes):
            self.flush()
        sections.last[section] = len(self.blocks)
        self.section = sections.parent[section]

    def break_line(self) -> None:
        pieces = self.pieces
        while pieces and pieces[-1] == " ":
            pieces.pop()
        if pieces and pieces[-1] == _BREAK:
            self.flush()
        elif self.has_text:
            pieces.append(_BREAK)

    def stop_script(self, name: str) -> None:
        """Powers and indices stay readable: 10^6 and x_i; H2O, 1st and notes as they are."""
        start, self.script = self.script, -1
        if start < 1 or start >= len(self.pieces) or self.links != self.script_links:
            return
        before = self.pieces[start - 1][-1:]
        if not before.isalnum() and before not in (")", "]"):
            return
        text = "".join(self.pieces[start:]).strip()
        if name == "sup":
            if text not in _NOT_POWERS and _EXPONENT.fullmatch(text):
                self.pieces[start] = "^"
        elif len(text) == 1 and text.isalpha() and text not in _NOT_POWERS:
            self.pieces[start] = "_"

    def read_inline_code(self, name: str, text: str, pieces: Iterator[str]) -> str:
        found, rest = code.read(pieces, name, text)
        found = self.with_literals(found)
        if "\n" in found and len(found) > _BLOCK_OF_CODE and name == "code":
            # A block of code outside of pre; white space is the page's style to keep.
            self.flush()
            self.add_code(found, name)
        elif found:
            if self.in_link:
                self.linked += len(found)
            # White space at the borders belongs to the sentence.
            before, after = found[0].isspace(), found[-1].isspace()
            if before:
                self.pieces.append(" ")
            self.add_literal(" ".join(found.split()), _CODE)
            if after:
                self.pieces.append(" ")
        return rest

    def add_code(self, text: str, tag: str) -> None:
        text = self.with_literals(text).translate(_CONTROLS)
        if text.strip():
            linked = len(text) if self.in_link else 0
            self.blocks.append(Block(text, self.section, tag, linked, self.in_link, code=True))

    def with_literals(self, text: str) -> str:
        if _END not in text:
            return text
        return _LITERAL.sub(self.literal, text)

    def literal(self, found: re.Match) -> str:
        number = int(found[1])
        return self.literals[number] if number < len(self.literals) else ""

    def flush(self) -> None:
        """Ends the block that is being read."""
        if not self.has_text:
            if self.pieces or self.links or self.classes:
                self.reset()
            return
        text = "".join(self.pieces)
        if "&" in text:
            text = markup.unescaped(text)
        text = " ".join(text.split())
        if text[:1] in markdown.STARTS:
            text = markdown.strip_start(text)
        math = literal = False
        if not text.isprintable():
            if _END in text:
                math, literal = _MATH in text, True
                text = self.with_literals(markdown.strip(text))
            text = text.translate(_CONTROLS_KEPT).strip()
            if _BREAK in text or _CELL in text:
                lines = [
                    "\t".join(cell.strip() for cell in line.split(_CELL)).strip()
                    for line in text.split(_BREAK)
                ]
                text = "\n".join(line for line in lines if line)
        if text:
            tag = self.cell or self.sections.tag[self.section]
            block = Block(
                text, self.section, tag, min(self.linked, len(text)), self.links,
                False, math, min(self.bold, len(text)), self.classes,
            )  # fmt: skip
            self.blocks.append(block)
            if len(self.blocks) > bounds.MAX_BLOCKS:
                raise TooLarge("too_many_blocks")
            if not literal:
                self.plain.append(block)
        self.reset()

    def reset(self) -> None:
        self.pieces.clear()
        self.linked = self.links = self.bold = self.classes = 0
        self.script = -1
        self.cell = ""
        self.has_text = False


# Control characters go; those that stand for breaks while a block is read do not.
_CONTROLS_KEPT = {key: value for key, value in _CONTROLS.items() if key not in (1, 2)}


def skip(pieces: Iterator[str], name: str) -> str:
    """Reads on to the end of the element `name` that was just opened; the text that follows."""
    if name in markup.VOID:
        return ""
    end, with_attributes = f"/{name}", f"{name} "
    depth = 1
    for piece in pieces:
        head, _, text = piece.partition(">")
        if head == end:
            depth -= 1
            if not depth:
                return text
        elif head == name or head.startswith(with_attributes):
            depth += 1
    return ""


def _after_comment(text: str, pieces: Iterator[str]) -> str:
    while True:
        _, end, rest = text.partition("-->")
        if end:
            return rest
        text = next(pieces, "-->")
