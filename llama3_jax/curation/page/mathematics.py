"""Math as its TeX where the page holds it, else MathML written on a line; each formula once.

TeX comes from annotations of MathML (KaTeX and Wikipedia have them), from `alttext`, from scripts
of type math/tex (MathJax 2), from `alt` of images, or stands in the text between dollars or
`\\(...\\)`, which needs no work here.
"""

import re

from selectolax.lexbor import LexborHTMLParser, LexborNode

from llama3_jax.curation.page import markup

# An alt text is TeX if the image says so, or if it has a TeX command, or a sub- or superscript.
_IMAGE = re.compile(r"(?<![a-z])(?:math|tex|latex|equation|formula|mwe|ee_img|png-math)", re.I)
_TEX = re.compile(r"\\[a-zA-Z]{2,}|\\[\[({]|[\^_]\{|^\s*\$.+\$\s*$", re.S)
_HINTS = ("math", "tex", "equation", "formula", "mwe", "ee_img")  # of all that _IMAGE finds
_DELIMITED = re.compile(r"^\s*(?:\$|\\\(|\\\[|\\begin\{)")
_DISPLAYSTYLE = re.compile(r"^\{\\(?:displaystyle|textstyle)\s+(.*)\}$", re.S)
MAX_MATHML_NODES = 20_000
# Around the number of a formula that was taken out; no text of a page has them.
OPEN, CLOSE = "\x03", "\x04"
_FORMULAS = 'math, script[type^="math/" i]'
_WRAPPERS = ".katex, .mwe-math-element, mjx-container, [data-mathml]"


def take_out(root: LexborNode) -> list[str]:
    """Puts OPEN + number + CLOSE in place of each formula below `root`; the formulas by their number.

    Formulas of images: see of_image.
    """
    formulas: list[str] = []
    # What wraps formulas goes first: inside is the same formula again, drawn or as MathML.
    for selector in (_WRAPPERS, _FORMULAS):
        inside: set[int] = set()
        for node in root.css(selector):
            if (
                node.mem_id in inside
            ):  # nested in one that was read: it would be read again and again
                continue
            inside = {one.mem_id for one in node.css(selector)}
            formula = _of_node(node)
            if formula is not None:
                node.replace_with(f"{OPEN}{len(formulas)}{CLOSE}" if formula else "")
                formulas.append(formula)
    return formulas


def _of_node(node: LexborNode) -> str | None:
    """A formula's text, or None if the element is no formula that stands for its whole subtree."""
    tag, attributes = node.tag, node.attributes
    if tag == "math":
        return _mathml(node, attributes)
    if tag == "script":
        return _script(node, attributes)
    name = attributes.get("class") or ""
    if tag == "mjx-container" or "katex" in name.split() or "mwe-math-element" in name:
        return _wrapper(node, tag, attributes)
    if "MathJax" in name and attributes.get("data-mathml"):
        # MathJax 2 leaves its script beside what it draws; only without one is the drawing read.
        if _has_script(node):
            return ""
        return _parsed(attributes["data-mathml"] or "")
    return None


def _delimit(tex: str, display: bool) -> str:
    tex = " ".join(tex.split())
    inner = _DISPLAYSTYLE.match(tex)
    tex = inner[1].strip() if inner else tex
    if not tex or _DELIMITED.match(tex):
        return tex
    return f"$${tex}$$" if display else f"${tex}$"


def _mathml(node: LexborNode, attributes: dict[str, str | None]) -> str:
    display = attributes.get("display") == "block"
    for annotation in node.css("annotation"):
        if "tex" in (annotation.attributes.get("encoding") or "").lower():
            return _delimit(annotation.text(), display)
    alttext = attributes.get("alttext")
    if alttext and alttext.strip():
        return _delimit(alttext, display)
    return " ".join(_linear(node).split())


def is_script(node: LexborNode) -> bool:
    """Whether the element is a script that holds a formula."""
    return node.tag == "script" and (node.attributes.get("type") or "").lower().startswith("math/")


def of_image(attributes: str) -> str | None:
    """The formula that an image shows, if its start tag (as a parser wrote it) says so."""
    start = attributes.find('alt="') + 5
    end = attributes.find('"', start)
    if start < 5 or end == start or end - start > 20_000:
        return None
    alt = attributes[start:end]
    if "\\" not in alt and "$" not in alt and "{" not in alt:
        lowered = attributes.lower()
        if not any(hint in lowered for hint in _HINTS):
            return None
    alt = markup.unescaped(alt).strip()
    values = markup.parsed(attributes)
    name = f"{values.get('class', '')} {values.get('src', '')[:200]}"
    if alt and (_TEX.search(alt) or _IMAGE.search(name)):
        return _delimit(alt, "display" in name or "equation" in name)
    return None


def _script(node: LexborNode, attributes: dict[str, str | None]) -> str | None:
    kind = (attributes.get("type") or "").lower()
    if not kind.startswith("math/"):
        return None
    text = node.text()
    if kind.startswith("math/mml"):
        return _parsed(text)
    return _delimit(text, "display" in kind)


def _wrapper(node: LexborNode, tag: str, attributes: dict[str, str | None]) -> str | None:
    inner = node.css_first("math")
    if inner is not None:
        return _mathml(inner, inner.attributes)
    image = node.css_first("img")
    if image is not None:
        alt = (image.attributes.get("alt") or "").strip()
        return _delimit(alt, False)
    for key in ("data-tex", "data-latex", "aria-label"):
        if tag == "mjx-container" and attributes.get(key):
            return _delimit(attributes[key] or "", False)
    return None


def _has_script(node: LexborNode) -> bool:
    after = node
    for _ in range(4):
        after = after.next
        if after is None:
            break
        if after.tag == "script":
            return (after.attributes.get("type") or "").startswith("math/")
    parent = node.parent
    return parent is not None and parent.css_first('script[type^="math/"]') is not None


def _parsed(mathml: str) -> str:
    inner = LexborHTMLParser(mathml[:100_000]).css_first("math")
    return "" if inner is None else _mathml(inner, inner.attributes)


# How MathML's layout elements read on one line; {0} is the first child, and so on.
_LAYOUT = {
    "mfrac": "({0})/({1})", "msup": "{0}^{1}", "msub": "{0}_{1}", "msubsup": "{0}_{1}^{2}",
    "munder": "{0}_{1}", "mover": "{0}^{1}", "munderover": "{0}_{1}^{2}", "mroot": "root({1}, {0})",
}  # fmt: skip
_GROUPED = frozenset(("mrow", "mfrac", "msup", "msub", "msubsup", "mtable"))


def _linear(root: LexborNode) -> str:
    """MathML without TeX, on one line; without recursion, for a tree of any depth."""
    nodes = []
    for node in root.traverse(include_text=True):
        nodes.append(node)
        if len(nodes) > MAX_MATHML_NODES:
            return root.text()
    texts: dict[int, str] = {}
    for node in reversed(nodes):
        tag = node.tag
        if tag == "-text":
            texts[node.mem_id] = node.text_content.strip()
            continue
        children = [child for child in node.iter(include_text=True)]
        parts = [texts.get(child.mem_id, "") for child in children if child.tag != "annotation"]
        parts = [part for part in parts if part]
        layout = _LAYOUT.get(tag)
        if layout and len(parts) == layout.count("{"):
            elements = [child for child in children if child.tag != "-text"]
            grouped = [
                f"({part})" if tag != "mfrac" and len(part) > 1 and child.tag in _GROUPED else part
                for part, child in zip(parts, elements, strict=False)
            ]
            texts[node.mem_id] = layout.format(*(grouped if len(grouped) == len(parts) else parts))
        elif tag == "msqrt":
            texts[node.mem_id] = f"sqrt({' '.join(parts)})"
        elif tag == "mtr":
            texts[node.mem_id] = ", ".join(parts) + ";"
        elif tag == "annotation-xml":
            texts[node.mem_id] = ""
        else:
            texts[node.mem_id] = " ".join(parts)
    return texts.get(root.mem_id, "")
