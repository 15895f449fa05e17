"""What a block looks like, in numbers: the input of the classifier.

Legend: N blocks, F features. Features describe the block itself, the sections around it, its
neighbours and the page; none names a site or a language.
"""

import collections
import re

import numpy as np
from jaxtyping import Float

from llama3_jax.curation.page import markup
from llama3_jax.curation.page.blocks import Page

WORDS = 0  # the column that holds a block's words, counted in its sample
_WORD = re.compile(r"\w+")
_ENDS = tuple('.!?。！？…:;"”»')
_DIGIT = re.compile(r"\d")
_PRICE = re.compile(r"[$€£¥₹]\s?\d|\d\s?[$€£₹]")
_DATE = re.compile(r"\b(?:19|20)\d\d\b|\b\d{1,2}[:/.]\d\d\b")
_SPECIAL = re.compile(r"[|©›»•·→▼✓]|\.\.\.$|…$")
_TAGS = ("p", "li", "td", "th", "tr", "dt", "dd", "div", "span", "blockquote", "button", "pre",
         "figcaption", "label", "option", "section", "article", "table", "center")  # fmt: skip
_TAG_INDEX = {tag: index for index, tag in enumerate(_TAGS)}
_SAMPLE = 300  # characters of a block that are looked at word by word
_ANCESTORS = 6
_BITS = np.array([1 << index for index in range(len(markup.BITS))])
_LISTS = frozenset(("ul", "ol", "menu", "dl"))
_PAGE_TAGS = ("article", "main", "h1", "p", "li", "table", "form", "nav", "pre")


def words_in(text: str) -> int:
    return len(_WORD.findall(text))


def of_page(page: Page, title: str) -> Float[np.ndarray, "N F"]:
    """One row a block; `title` is the page's."""
    blocks, sections = page.blocks, page.sections
    count = len(blocks)
    title_words = set(_WORD.findall(title.lower()))
    seen = collections.Counter([block.text for block in blocks])
    rows, words_N, chars_N, linked_N = [], [], [], []
    for block in blocks:
        text = block.text
        chars = len(text)
        sample = text if chars <= _SAMPLE else text[:_SAMPLE]
        tokens = _WORD.findall(sample)
        sampled = len(tokens) + 1
        words = len(tokens) if chars <= _SAMPLE else len(tokens) * chars // _SAMPLE
        lowered = sum([token[0].islower() for token in tokens])
        capitals = sum([token.isupper() for token in tokens])
        stops = sample.count(". ") + sample.count(", ") + sample.count("。") + sample.count("，")
        tag = block.tag
        section = sections[block.section]
        overlap = len(title_words.intersection(map(str.lower, tokens))) if words < 40 else 0
        digits = _DIGIT.search(sample) is not None
        words_N.append(words)
        chars_N.append(chars)
        linked_N.append(block.linked)
        rows.append((
            words, chars, chars / (words + 1), block.linked / (chars + 1), block.links,
            lowered / sampled, capitals / sampled, stops, stops / sampled,
            text.endswith(_ENDS), text[0].islower(), text[0].isdigit(), text.count("\n"),
            (sum([token.isdigit() for token in tokens]) if digits else 0) / sampled,
            digits and bool(_PRICE.search(sample)), digits and bool(_DATE.search(sample)), len(_SPECIAL.findall(sample)),
            markup.HEADINGS.get(tag, 0), _TAG_INDEX.get(tag, -1),
            block.code, block.math, block.bold / (chars + 1), seen[text],
            overlap / (len(title_words) + 1), overlap / (words + 1), section.depth, "?" in sample,
        ))  # fmt: skip
    own = np.array(rows, np.float32)
    words_N = np.array(words_N, np.float64)
    chars_N, linked_N = np.array(chars_N, np.float64), np.array(linked_N, np.float64)
    index_N = np.arange(count)
    section_N = np.array([block.section for block in blocks])
    total = words_N.sum() + 1

    # The bits of the sections around, and how near the nearest section that sets each is: only
    # whether the innermost three do.
    bits_N = np.array([sections[block.section].bits for block in blocks])
    near_N = np.array([_near(sections, block.section) | block.classes for block in blocks])
    bits_NB = (bits_N[:, None] & _BITS) > 0
    near_NB = (near_N[:, None] & _BITS) > 0

    around = _around(page, section_N, words_N, chars_N, linked_N, index_N, own[:, 9], total)
    before = np.cumsum(words_N) - words_N
    h1_N = own[:, 17] == 1
    first_h1 = int(np.argmax(h1_N)) if h1_N.any() else -1
    position = np.stack([
        index_N / count, before / total, index_N, count - index_N,
        (index_N - first_h1) if first_h1 >= 0 else np.full(count, -999),
        _since(own[:, 17] > 0), _until(own[:, 17] > 0), _since(words_N >= 20), _until(words_N >= 20),
    ], axis=1)  # fmt: skip
    density = linked_N / (chars_N + 1)
    neighbours = [
        _shifted(column, step)
        for step in (-2, -1, 1, 2)
        for column in (words_N, density, own[:, 17], own[:, 9], own[:, 18])
    ]
    same = [(_shifted(section_N, step, -1) == section_N).astype(np.float32) for step in (-1, 1)]
    windows = [_window(words_N, 3), _window(words_N, 10), _window(linked_N, 3) / (_window(chars_N, 3) + 1),
               _window(linked_N, 10) / (_window(chars_N, 10) + 1)]  # fmt: skip

    tags = [section.tag for section in sections]
    in_p = sum(words for words, block in zip(words_N, blocks, strict=True) if block.tag == "p")
    page_row = [
        total, count, linked_N.sum() / (chars_N.sum() + 1), in_p / total, own[:, 14].mean(),
        own[:, 15].mean(), words_N[words_N >= 20].sum() / total, words_N.max(), own[:, 3].mean(),
        *(tags.count(tag) for tag in _PAGE_TAGS),
        *((bits_NB * words_N[:, None]).sum(0) / total),
    ]  # fmt: skip
    whole = np.tile(np.array(page_row, np.float32), (count, 1))
    return np.concatenate(
        [
            own,
            bits_NB,
            near_NB,
            around,
            position,
            np.stack([*neighbours, *same, *windows], 1),
            whole,
        ],
        axis=1,
    ).astype(np.float32)


def _near(sections, index: int) -> int:
    found = 0
    for _ in range(3):
        if index < 0:
            break
        found |= sections[index].own
        index = sections[index].parent
    return found


def _around(page, section_N, words_N, chars_N, linked_N, index_N, ends_N, total):
    """Sums over the sections around each block: the innermost six, and the outermost three."""
    sections = page.sections
    parents = np.array([section.parent for section in sections])
    first_S = np.array([section.first for section in sections])
    last_S = np.array([section.last for section in sections])
    columns = np.stack([words_N, chars_N, linked_N, np.ones_like(words_N), ends_N])
    sums = np.concatenate([np.zeros((5, 1)), columns.cumsum(axis=1)], axis=1)
    sums_S = (sums[:, last_S] - sums[:, first_S]).T
    children_S = np.array([section.children for section in sections])
    tag_S = np.array([_TAG_INDEX.get(section.tag, -1) for section in sections])
    alike_S = _alike(sections)
    list_S = np.array([section.tag in _LISTS for section in sections])
    columns = []
    at_N = section_N
    for level in range(_ANCESTORS):
        words, chars, linked, blocks, ends = sums_S[at_N].T
        columns += [words, linked / (chars + 1), blocks, words / (blocks + 1), words / total]
        columns += [ends / (blocks + 1), children_S[at_N], index_N - first_S[at_N]]
        if level < 4:
            columns += [tag_S[at_N], alike_S[at_N], list_S[at_N]]
        at_N = np.where(at_N > 0, parents[at_N], 0)
    return np.stack(columns, axis=1)


def _alike(sections) -> np.ndarray:
    """How many children of its parent share each section's tag and class."""
    keys = [(section.parent, section.tag, section.name) for section in sections]
    counts = collections.Counter(keys)
    return np.array([counts[key] for key in keys])


def _shifted(column, step: int, fill: float = -1):
    moved = np.full(len(column), fill, dtype=np.float32)
    if abs(step) < len(column):
        if step > 0:
            moved[:-step] = column[step:]
        else:
            moved[-step:] = column[:step]
    return moved


def _window(column, radius: int):
    sums = np.concatenate([[0], np.cumsum(column)])
    index = np.arange(len(column))
    return sums[np.minimum(index + radius + 1, len(column))] - sums[np.maximum(index - radius, 0)]


def _since(flags):
    """Blocks since the last that is flagged, -1 before the first."""
    index = np.arange(len(flags))
    last = np.maximum.accumulate(np.where(flags, index, -1))
    return np.where(last >= 0, index - last, -1)


def _until(flags):
    return _since(flags[::-1])[::-1]
