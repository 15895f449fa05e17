"""What the rules of stage gopher are about, counted for a batch of texts at once.

Rae et al. 2021 (arXiv 2112.11446), sec. A.1.1, and Raffel et al. 2020, sec. 2.2. Where they leave
room, here: characters are those of words, without the space between; a duplicate is what occurred
before in the document, so the first of its kind is none; blank lines are no lines; a paragraph is a
run of lines between blank ones. A letter is a letter of ASCII or a character from U+00C0 on that is
not in the blocks of punctuation U+2000 to U+207F and U+3000 to U+303F.

Shapes: B bytes, D documents, W words, L lines that are not blank, P paragraphs, of a whole batch.
"""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Bool, Float, Int, UInt8, UInt64

from llama3_jax.curation.words import Pieces, slices, string_bytes, within

TOP = (2, 3, 4)
DUPLICATED = (5, 6, 7, 8, 9, 10)
STOP_WORDS = ("the", "be", "to", "of", "and", "that", "have", "with")
_BULLETS = ("•", "‣", "●", "◦", "▪", "∙", "■")  # three bytes each
_BYTES = np.arange(256)
_CODE_ENDS = np.isin(_BYTES, list(b"{};([=\\"))
_TERMINAL = np.isin(_BYTES, list(b".!?"))
_DASHES = np.isin(_BYTES, list(b"-*"))
_LETTER_BEGINS = (_BYTES >= 0xC3) | (((_BYTES | 0x20) >= ord("a")) & ((_BYTES | 0x20) <= ord("z")))
_TERMINAL_WIDE = ("。", "！", "？")
NAMES = (
    "words", "mean_length", "hash_ratio", "ellipsis_ratio", "alphabetic_share", "stop_words",
    *(f"top_{n}gram" for n in TOP), *(f"dup_{n}gram" for n in DUPLICATED),
    "bullet_share", "ellipsis_share", "terminal_share", "code_share", "dup_line", "dup_line_characters",
    "dup_paragraph", "dup_paragraph_characters", "sentences", "curly_brackets", "lorem_ipsum",
)  # fmt: skip


def scores(text: pa.Array, spaced: pa.Array) -> dict[str, Float[np.ndarray, "D"]]:
    """Every score of NAMES by document, from the texts and their words (`words.spaced`)."""
    parts = [_scores(text[one], spaced[one]) for one in slices(text)]
    return {name: np.concatenate([np.zeros(0), *(part[name] for part in parts)]) for name in NAMES}


def _scores(text: pa.Array, spaced: pa.Array) -> dict[str, np.ndarray]:
    found = _of_words(Pieces(spaced))
    words = np.maximum(found["words"], 1)
    for name, symbols in (("hash_ratio", ("#",)), ("ellipsis_ratio", ("...", "…"))):
        found[name] = sum(_count(text, symbol) for symbol in symbols) / words
    found |= _of_lines(Pieces(text, "\n"))
    found["sentences"] = _sentences(*string_bytes(text))
    found["curly_brackets"] = _count(text, "{") + _count(text, "}")
    found["lorem_ipsum"] = _count(text, "lorem ipsum", ignore_case=True)
    return found


def _count(text: pa.Array, what: str, ignore_case: bool = False) -> Int[np.ndarray, "D"]:
    counted = pc.count_substring(pc.ascii_lower(text) if ignore_case else text, what)
    return np.asarray(counted.fill_null(0))


def _of_words(words: Pieces) -> dict[str, np.ndarray]:
    count = np.diff(words.offsets)
    document, length = words.documents, words.lengths
    before = np.concatenate([[0], np.cumsum(length)])  # characters of all words before
    total = np.diff(before[words.offsets])
    found = {
        "words": count,
        "mean_length": _share(total, count),
        "alphabetic_share": _share(_sum(_has_letter(words), words.offsets), count),
        "stop_words": _stop_words(words, document),
    }
    # A run of n words is repeated only if the runs of n - 1 at its two ends are.
    repeated = np.ones(len(document), bool)
    for n in range(min(TOP), max(DUPLICATED) + 1):
        first = words.runs(n)
        first = first[repeated[first] & repeated[first + 1]] if n > min(TOP) else first
        runs = _Runs(words.hashes(first, n), first, document)
        repeated = np.zeros(len(document), bool)
        repeated[runs.repeated] = True
        if n in TOP:
            size = before[runs.first + n] - before[runs.first]
            found[f"top_{n}gram"] = np.minimum(_share(runs.top(size, len(count)), total), 1)
        else:
            covered = np.zeros(len(document), bool)
            for place in range(n):
                covered[runs.later + place] = True
            covered = np.flatnonzero(covered)
            characters = np.bincount(document[covered], length[covered], minlength=len(count))
            found[f"dup_{n}gram"] = _share(characters, total)
    return found


class _Runs:
    """The runs that a document repeats.

    Attributes:
      repeated, later: places of all of them, and of those that are not the first of their kind.
      first, count, document: of each kind, the first place, the number, the document.
    """

    def __init__(
        self, hashes: UInt64[np.ndarray, "n"], place: Int[np.ndarray, "n"], document: np.ndarray
    ):
        keys = within(hashes, document[place])
        order = np.argsort(keys)
        keys = keys[order]
        new = np.ones(len(keys), bool)
        new[1:] = keys[1:] != keys[:-1]
        kinds = np.flatnonzero(new)
        count = np.diff(np.append(kinds, len(keys)))
        many = np.repeat(count > 1, count)
        self.repeated = place[order[many]]
        kinds = np.flatnonzero(new[many])
        self.count = count[count > 1]
        self.first = np.minimum.reduceat(self.repeated, kinds) if len(kinds) else kinds
        self.document = document[self.first]
        later = np.repeat(self.first, self.count) != self.repeated
        self.later = self.repeated[later]

    def top(self, size: Int[np.ndarray, "kinds"], documents: int) -> Int[np.ndarray, "D"]:
        """Characters of the most frequent kind of each document, of equals the longest; or 0."""
        order = np.lexsort((size, self.count, self.document))
        out = np.zeros(documents, np.int64)
        out[self.document[order]] = (size * self.count)[order]  # the last of a document stays
        return out


def _stop_words(words: Pieces, document: np.ndarray) -> Int[np.ndarray, "D"]:
    known = Pieces(pa.array(STOP_WORDS))
    known = np.sort(known.hashes(np.arange(len(STOP_WORDS)), 1))
    short = np.flatnonzero(words.ends - words.starts <= max(map(len, STOP_WORDS)))
    hashes = words.hashes(short, 1)
    which = np.minimum(np.searchsorted(known, hashes), len(known) - 1)
    hits = known[which] == hashes
    seen = np.unique(document[short[hits]] * len(known) + which[hits])
    return np.bincount(seen // len(known), minlength=len(words.offsets) - 1)


def _of_lines(lines: Pieces) -> dict[str, np.ndarray]:
    data = np.concatenate([lines.data, np.zeros(3, np.uint8)])
    marks = np.flatnonzero(lines.data > ord(" "))
    begin, stop = np.searchsorted(marks, lines.starts), np.searchsorted(marks, lines.ends)
    full = np.flatnonzero(stop > begin)
    document = lines.documents[full]
    offsets = np.searchsorted(full, lines.offsets)
    count = np.diff(offsets)
    head, tail = marks[begin[full]], marks[stop[full] - 1]
    first, last = _three(data, head), _three(data, np.maximum(tail - 2, 0))
    listed = _DASHES[data[head]] & (data[head + 1] == ord(" "))
    bullet = listed | np.isin(first, _codes(_BULLETS))
    ellipsis = np.isin(last, _codes(("...", "…")))
    terminal = _TERMINAL[data[tail]] | np.isin(last, _codes(_TERMINAL_WIDE))
    code = (lines.starts[full] < head) | _CODE_ENDS[data[tail]] | (first == _codes((">>>",)))
    found = {
        f"{name}_share": _share(_sum(which, offsets), count)
        for name, which in (
            ("bullet", bullet), ("ellipsis", ellipsis), ("terminal", terminal), ("code", code)
        )
    }  # fmt: skip
    found |= _duplicates(lines, full, np.ones(len(full), np.int64), document, "line")
    # A paragraph begins where the line before is blank, or another document's.
    new = np.ones(len(full), bool)
    new[1:] = (np.diff(full) > 1) | (np.diff(document) > 0)
    begins = np.flatnonzero(new)
    sizes = np.diff(np.append(begins, len(full)))
    found |= _duplicates(lines, full[begins], sizes, document[begins], "paragraph")
    return found


def _duplicates(
    lines: Pieces, first: np.ndarray, size: np.ndarray, document: np.ndarray, name: str
) -> dict[str, np.ndarray]:
    """The share of pieces that occurred before in the document, and of their characters."""
    documents = len(lines.offsets) - 1
    before = np.concatenate([[0], np.cumsum(lines.lengths)])
    length = before[first + size] - before[first] + size - 1  # with the line breaks between
    runs = _Runs(lines.hashes(first, size), np.arange(len(first)), document)
    again = np.zeros(len(first), bool)
    again[runs.later] = True
    offsets = np.searchsorted(document, np.arange(documents + 1))
    return {
        f"dup_{name}": _share(_sum(again, offsets), np.diff(offsets)),
        f"dup_{name}_characters": _share(_sum(length * again, offsets), _sum(length, offsets)),
    }


def _sentences(data: UInt8[np.ndarray, "B"], bounds: Int[np.ndarray, "D+1"]) -> np.ndarray:
    """Signs that end a sentence: . ! ? before white space or the end, and the wide ones anywhere."""
    padded = np.concatenate([data, np.zeros(3, np.uint8)])
    place = np.flatnonzero(_TERMINAL[data])
    ends = np.zeros(len(data) + 1, bool)
    ends[bounds] = True
    place = place[(padded[place + 1] <= ord(" ")) | ends[place + 1]]
    wide = np.flatnonzero((data == 0xE3) | (data == 0xEF))
    wide = wide[np.isin(_three(padded, wide), _codes(_TERMINAL_WIDE))]
    return np.diff(np.searchsorted(place, bounds)) + np.diff(np.searchsorted(wide, bounds))


def _three(data: UInt8[np.ndarray, "B"], place: Int[np.ndarray, "n"]) -> Int[np.ndarray, "n"]:
    """The three bytes from `place` on, as one number."""
    return (
        (data[place].astype(np.int64) << 16)
        | (data[place + 1].astype(np.int64) << 8)
        | data[place + 2]
    )


def _codes(strings: tuple[str, ...]) -> Int[np.ndarray, "n"]:
    return np.array([int.from_bytes(one.encode(), "big") for one in strings])


def _has_letter(words: Pieces) -> Bool[np.ndarray, "W"]:
    data = words.data
    after = np.append(data[1:], np.uint8(0))
    punctuation = ((data == 0xE2) & (after < 0x82)) | ((data == 0xE3) & (after == 0x80))
    letter = _LETTER_BEGINS[data] & ~punctuation
    # A word and the space behind it, which is no letter.
    return np.logical_or.reduceat(letter, words.starts) if len(words.starts) else np.zeros(0, bool)


def _sum(values: np.ndarray, offsets: Int[np.ndarray, "D+1"]) -> Int[np.ndarray, "D"]:
    return np.diff(np.concatenate([[0], np.cumsum(values)])[offsets])


def _share(part: np.ndarray, whole: np.ndarray) -> Float[np.ndarray, "D"]:
    return part / np.maximum(whole, 1)
