"""What a block looks like, in numbers: the input of the classifier.

Legend: N blocks, S sections, C characters of all samples, F features. Features describe the block
itself, the sections around it, its neighbours and the page; none names a site or a language.
"""

import collections
import functools
import re

import numpy as np
from jaxtyping import Float, UInt16

from llama3_jax.curation.page import markup
from llama3_jax.curation.page.blocks import Block, Page, Sections

WORDS = 0  # the column that holds a block's words, counted in its sample
_SPLIT = re.compile(r"\W+")
_LONG_WORD = 4
_SAMPLE = 300  # characters of a block that are looked at
_ANCESTORS = 6
_TAGS = ("p", "li", "td", "th", "tr", "dt", "dd", "div", "span", "blockquote", "button", "pre",
         "figcaption", "label", "option", "section", "article", "table", "center")  # fmt: skip
_TAG_INDEX = {tag: index for index, tag in enumerate(_TAGS)}
_BITS = np.array([1 << index for index in range(len(markup.BITS))])
_LISTS = frozenset(("ul", "ol", "menu", "dl"))
_PAGE_TAGS = ("article", "main", "h1", "p", "li", "table", "form", "nav", "pre")

# What a character is, as bits; beyond the basic plane all characters count as letters.
(_WORD, _LOWER, _UPPER, _DIGIT, _PAUSE, _FULL_STOP, _END, _SPECIAL, _MONEY, _DIVIDER, _QUESTION) = (
    1 << bit for bit in range(11)
)
_SIGNS = {
    _PAUSE: ".,", _FULL_STOP: "。，", _END: '.!?。！？…:;"”»', _SPECIAL: "|©›»•·→▼✓…", _MONEY: "$€£¥₹",
    _DIVIDER: ":./", _QUESTION: "?",
}  # fmt: skip


@functools.cache
def _character_bits() -> UInt16[np.ndarray, "65537"]:
    bits = np.zeros((1 << 16) + 1, np.uint16)
    for code in range(1 << 16):
        character = chr(code)
        if character.isalnum() or character == "_":
            bits[code] = _WORD
            if character.islower():
                bits[code] |= _LOWER
            elif character.isupper():
                bits[code] |= _UPPER
            elif character.isdigit():
                bits[code] |= _DIGIT
    for bit, characters in _SIGNS.items():
        for character in characters:
            bits[ord(character)] |= bit
    bits[1 << 16] = _WORD
    return bits


def of_page(page: Page, title: str) -> Float[np.ndarray, "N F"]:
    """One row a block; `title` is the page's."""
    blocks, sections = page.blocks, page.sections
    count = len(blocks)
    index_N = np.arange(count)
    section_N = np.array([block.section for block in blocks])
    chars_N = np.array([len(block.text) for block in blocks], np.float64)
    linked_N = np.array([block.linked for block in blocks], np.float64)
    own, words_N = _own(blocks, chars_N, linked_N, title)
    heading_N, ends_N = np.array(own[_HEADING]), own[_ENDS_WELL]
    depth_S = np.array(sections.depth)
    total = words_N.sum() + 1

    # The bits of all sections around, and those that the innermost three or the text itself set.
    own_S, parent_S = np.array(sections.own), np.maximum(np.array(sections.parent), 0)
    near_S = own_S | own_S[parent_S] | own_S[parent_S[parent_S]]
    classes_N = np.array([block.classes for block in blocks])
    bits_BN = (np.array(sections.bits)[section_N] & _BITS[:, None]) > 0
    near_BN = ((near_S[section_N] | classes_N) & _BITS[:, None]) > 0

    before = np.cumsum(words_N) - words_N
    h1_N = heading_N == 1
    from_h1 = index_N - int(np.argmax(h1_N)) if h1_N.any() else np.full(count, -999)
    long_N = words_N >= 20
    position = [
        index_N / count, before / total, index_N, count - index_N, from_h1,
        _since(heading_N > 0), _until(heading_N > 0), _since(long_N), _until(long_N),
        depth_S[section_N],
    ]  # fmt: skip
    density = linked_N / (chars_N + 1)
    neighbours = _neighbours(np.stack([words_N, density, heading_N, ends_N, own[_TAG]]))
    same = [_shifted(section_N, step) == section_N for step in (-1, 1)]
    windows = []
    for radius in (3, 10):
        words, linked, chars = _window(np.stack([words_N, linked_N, chars_N]), radius)
        windows += [words, linked / (chars + 1)]

    tags = collections.Counter(sections.tag)
    in_p = words_N[[block.tag == "p" for block in blocks]].sum()
    of_page = [
        total, count, linked_N.sum() / (chars_N.sum() + 1), in_p / total, own[_PRICED].mean(),
        own[_DATED].mean(), words_N[long_N].sum() / total, words_N.max(), own[_LINKED_SHARE].mean(),
        *(tags[tag] for tag in _PAGE_TAGS), *(bits_BN @ words_N / total),
    ]  # fmt: skip
    around = _around(sections, parent_S, section_N, words_N, chars_N, linked_N, ends_N, total)
    parts = [
        own, bits_BN, near_BN, *around, position, *neighbours, same, windows,
        np.array(of_page)[:, None],
    ]  # fmt: skip
    features = np.empty((sum(map(len, parts)), count), np.float32)
    row = 0
    for part in parts:
        features[row : row + len(part)] = part
        row += len(part)
    return features.T


# Rows of _own.
_LINKED_SHARE, _ENDS_WELL, _PRICED, _DATED, _HEADING, _TAG = 3, 9, 14, 15, 17, 18


def _own(blocks: list[Block], chars_N, linked_N, title: str) -> tuple[list[np.ndarray], np.ndarray]:
    """Features of each block by itself, and its words."""
    count = len(blocks)
    texts = [block.text for block in blocks]
    samples = [text[:_SAMPLE] for text in texts]
    joined = "\n".join(samples) + "\n\n\n"
    code_C = np.frombuffer(joined.encode("utf-32-le", "replace"), np.uint32)
    bits_C = _character_bits().take(code_C, mode="clip")
    sizes_N = np.array([len(sample) for sample in samples]) + 1
    start_N = np.cumsum(sizes_N) - sizes_N
    block_C = np.repeat(np.arange(count), sizes_N)

    def counted(places) -> np.ndarray:
        return np.bincount(block_C[places], minlength=count)

    signs = np.flatnonzero(bits_C >= _PAUSE)
    bits_of_signs = bits_C[signs]

    def where(bit: int) -> np.ndarray:
        return signs[(bits_of_signs & bit) > 0]

    word_C = (bits_C & _WORD).astype(bool)
    begins_C = word_C.copy()
    begins_C[1:] &= ~word_C[:-1]
    begins = np.flatnonzero(begins_C)
    first, second = bits_C[begins], bits_C[begins + 1]
    tokens_N = counted(begins)
    sampled_N = tokens_N + 1
    words_N = np.where(chars_N <= _SAMPLE, tokens_N, tokens_N * chars_N // _SAMPLE)
    lowered_N = counted(begins[(first & _LOWER) > 0])
    capitals_N = counted(begins[((first & _UPPER) > 0) & ((second & _LOWER) == 0)])
    numbers = begins[(first & _DIGIT) > 0]
    pauses = where(_PAUSE)
    stops_N = counted(pauses[code_C[pauses + 1] == 32]) + counted(where(_FULL_STOP))

    # Prices: a sign of money and a digit beside it, or one further.
    digit_C = (bits_C & _DIGIT).astype(bool)
    money = where(_MONEY)
    priced = money[
        digit_C[money - 1] | digit_C[money - 2] | digit_C[money + 1] | digit_C[money + 2]
    ]
    # Dates and times: 12:30, 1/2020; a number of 19.. or 20...
    divider = where(_DIVIDER)
    dated = divider[digit_C[divider - 1] & digit_C[divider + 1] & digit_C[divider + 2]]
    years = numbers[
        digit_C[numbers + 1]
        & digit_C[numbers + 2]
        & digit_C[np.minimum(numbers + 3, len(code_C) - 1)]
    ]
    century = code_C[years] * 256 + code_C[years + 1]
    years = years[(century == 0x3139) | (century == 0x3230)]
    seen = collections.Counter(texts)
    last_N = _character_bits().take([ord(text[-1:] or " ") for text in texts], mode="clip")
    first_N = bits_C[start_N]
    overlap_N, title_words = _overlap(joined, title, word_C, start_N, words_N)

    bold_N = np.array([block.bold for block in blocks])
    rows = [
        words_N, chars_N, chars_N / (words_N + 1), linked_N / (chars_N + 1),
        [block.links for block in blocks],
        lowered_N / sampled_N, capitals_N / sampled_N, stops_N, stops_N / sampled_N,
        (last_N & _END) > 0, (first_N & _LOWER) > 0, (first_N & _DIGIT) > 0,
        counted(np.flatnonzero(code_C[: len(block_C)] == 10)) - 1, counted(numbers) / sampled_N,
        counted(priced) > 0, counted(dated) + counted(years) > 0, counted(where(_SPECIAL)),
        [markup.HEADINGS.get(block.tag, 0) for block in blocks],
        [_TAG_INDEX.get(block.tag, -1) for block in blocks],
        [block.code for block in blocks], [block.math for block in blocks],
        bold_N / (chars_N + 1), [seen[text] for text in texts],
        overlap_N / (title_words + 1), overlap_N / (words_N + 1), counted(where(_QUESTION)) > 0,
    ]  # fmt: skip
    return rows, words_N


def _overlap(joined: str, title: str, word_C, start_N, words_N) -> tuple[np.ndarray, int]:
    """How many of the title's long words each block of fewer than 40 words holds; their number."""
    overlap_N = np.zeros(len(start_N))
    lowered = joined.lower()
    if len(lowered) != len(joined):  # a few letters have a longer lower case
        lowered = joined
    words = {word for word in _SPLIT.split(title.lower()) if len(word) >= _LONG_WORD}
    for word in words:
        found = []
        at = lowered.find(word)
        while at >= 0:
            if not (at and word_C[at - 1]) and not word_C[at + len(word)]:
                found.append(at)
            at = lowered.find(word, at + len(word))
        if found:
            overlap_N[np.unique(np.searchsorted(start_N, found, side="right") - 1)] += 1
    overlap_N[words_N >= 40] = 0
    return overlap_N, len(words)


def _around(sections: Sections, parent_S, section_N, words_N, chars_N, linked_N, ends_N, total):
    """Sums over the sections around each block, from the innermost outwards."""
    first_S, last_S = np.array(sections.first), np.array(sections.last)
    summed = np.stack([words_N, chars_N, linked_N, ends_N])
    sums = np.concatenate([np.zeros((4, 1)), summed.cumsum(axis=1)], axis=1)
    words_S, chars_S, linked_S, ends_S = sums[:, last_S] - sums[:, first_S]
    blocks_S = last_S - first_S
    children_S = np.bincount(parent_S[1:], minlength=len(sections))
    kind_S = np.array(sections.kind)
    # How many children of its parent share each section's tag and class.
    _, group_S, sizes = np.unique(
        kind_S ^ (parent_S * _MIX), return_inverse=True, return_counts=True
    )
    tag_S = np.array([_TAG_INDEX.get(tag, -1) for tag in sections.tag])
    list_S = np.array([tag in _LISTS for tag in sections.tag])
    table = np.stack([
        words_S, linked_S / (chars_S + 1), blocks_S, words_S / (blocks_S + 1), words_S / total,
        ends_S / (blocks_S + 1), children_S, first_S, tag_S, sizes[group_S], list_S,
    ])  # fmt: skip
    index_N = np.arange(len(section_N))
    columns = []
    at_N = section_N
    for level in range(_ANCESTORS):
        found = table[:, at_N]
        found[7] = index_N - found[7]
        columns.append(found if level < 4 else found[:8])
        at_N = parent_S[at_N]
    return columns


_MIX = 0x9E3779B97F4A7C1 | 1  # spreads section numbers over 64 bits


def _shifted(column, step: int):
    """Each block's value is that of the block `step` further; -1 beyond the ends."""
    moved = np.full(column.shape, -1.0)
    if abs(step) < column.shape[-1]:
        if step > 0:
            moved[..., :-step] = column[..., step:]
        else:
            moved[..., -step:] = column[..., :step]
    return moved


def _neighbours(columns) -> list[np.ndarray]:
    return [_shifted(columns, step) for step in (-2, -1, 1, 2)]


def _window(columns, radius: int):
    """Sums over the blocks up to `radius` before and after."""
    count = columns.shape[1]
    sums = np.concatenate([np.zeros((len(columns), 1)), np.cumsum(columns, axis=1)], axis=1)
    index = np.arange(count)
    return sums[:, np.minimum(index + radius + 1, count)] - sums[:, np.maximum(index - radius, 0)]


def _since(flags):
    """Blocks since the last that is flagged, -1 before the first."""
    index = np.arange(len(flags))
    last = np.maximum.accumulate(np.where(flags, index, -1))
    return np.where(last >= 0, index - last, -1)


def _until(flags):
    return _since(flags[::-1])[::-1]
