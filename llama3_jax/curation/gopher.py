"""Stage gopher: repetition and quality by counting (sec. 3.1.1: duplicated n-gram coverage ratio).

    gopher_<score>  every score of gopher_scores.NAMES
    gopher_kind     "code" or "prose", by the share of lines that look like code
    reason          gopher_<the first rule that the document breaks>, as gopher_min_words

The rules are those of MassiveText (Rae et al. 2021, sec. A.1.1) and, off by default, of C4 (Raffel et
al. 2020; its rules for lines are stage c4's) and FineWeb. They were made for English prose: code and math pages repeat themselves, have
few stop words and many symbols, and a language without spaces has words of one character.
`overrides` changes or switches off rules by language, source or kind of page.
"""

from pathlib import Path
from typing import Literal

import daft
import numpy as np
import pyarrow as pa
import pydantic
from daft import col

from llama3_jax.curation import gopher_scores, words
from llama3_jax.schema import Config

VERSION = 1
Limit = float | None


class Rules(Config):
    """Least and greatest allowed values of scores; None switches a rule off."""

    min_words: Limit = 50
    max_words: Limit = 100_000
    min_mean_length: Limit = 3
    max_mean_length: Limit = 10
    max_hash_ratio: Limit = 0.1
    max_ellipsis_ratio: Limit = 0.1
    max_bullet_share: Limit = 0.9
    max_ellipsis_share: Limit = 0.3
    min_alphabetic_share: Limit = 0.8
    min_stop_words: Limit = 2
    max_dup_line: Limit = 0.3
    max_dup_paragraph: Limit = 0.3
    max_dup_line_characters: Limit = 0.2
    max_dup_paragraph_characters: Limit = 0.2
    max_top_2gram: Limit = 0.2
    max_top_3gram: Limit = 0.18
    max_top_4gram: Limit = 0.16
    max_dup_5gram: Limit = 0.15
    max_dup_6gram: Limit = 0.14
    max_dup_7gram: Limit = 0.13
    max_dup_8gram: Limit = 0.12
    max_dup_9gram: Limit = 0.11
    max_dup_10gram: Limit = 0.1
    max_lorem_ipsum: Limit = 0  # C4
    max_curly_brackets: Limit = None  # C4: 0, which drops every page with code
    min_sentences: Limit = None  # C4: 3
    min_terminal_share: Limit = None  # FineWeb: 0.12


class Override(Config):
    """Other limits for the documents that meet every condition given (an empty one is none)."""

    languages: tuple[str, ...] = ()
    not_languages: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()
    kinds: tuple[Literal["code", "prose"], ...] = ()
    rules: dict[str, Limit]

    @pydantic.field_validator("rules")
    @classmethod
    def _known(cls, rules: dict[str, Limit]) -> dict[str, Limit]:
        for name in rules:
            if name not in Rules.model_fields:
                raise ValueError(f"unknown rule {name!r}; known: {', '.join(Rules.model_fields)}")
        return rules

    def meets(self, language: str, source: str, kind: str) -> bool:
        return (
            (not self.languages or language in self.languages)
            and language not in self.not_languages
            and (not self.sources or source in self.sources)
            and (not self.kinds or kind in self.kinds)
        )


_REPEATED = {
    f"max_dup_{n}gram": 2 * Rules.model_fields[f"max_dup_{n}gram"].default for n in range(5, 11)
}
UNSPACED_LANGUAGES = ("zh", "wuu", "yue", "ja", "th", "lo", "km", "my")
_PROSE_ONLY = (
    "min_mean_length", "max_mean_length", "max_hash_ratio", "max_ellipsis_ratio", "max_bullet_share",
    "max_ellipsis_share", "min_alphabetic_share", "min_stop_words", "max_dup_line", "max_dup_line_characters",
)  # fmt: skip


class GopherConfig(Config):
    """A page is "code" where at least `code_share` of its lines look so. Later overrides win.

    Ours, from pages of documentation: in characters, and in code, twice as much is repeated as in
    English words before a page is boilerplate.
    """

    rules: Rules = Rules()
    code_share: float = 0.3
    overrides: tuple[Override, ...] = (
        Override(not_languages=("en",), rules={"min_stop_words": None}),
        Override(
            languages=UNSPACED_LANGUAGES,
            rules={"min_words": 100, "min_mean_length": None, "max_mean_length": None} | _REPEATED,
        ),
        Override(kinds=("code",), rules=dict.fromkeys(_PROSE_ONLY) | _REPEATED),
    )


def gopher(frame: daft.DataFrame, config: GopherConfig, scratch: Path) -> daft.DataFrame:
    """Adds the scores, gopher_kind and reason."""
    judged = _Judge(config)(col("text"), words.spaced(col("text")), col("language"), col("source"))
    frame = frame.with_column("_gopher", judged)
    names = {f"gopher_{name}": name for name in (*gopher_scores.NAMES, "kind")} | {
        "reason": "reason"
    }
    frame = frame.with_columns({name: col("_gopher").get(key) for name, key in names.items()})
    return frame.exclude("_gopher")


@daft.cls
class _Judge:
    def __init__(self, config: GopherConfig):
        self.config = config

    @daft.method.batch(
        return_dtype=daft.DataType.struct(
            dict.fromkeys(gopher_scores.NAMES, daft.DataType.float64())
            | dict.fromkeys(("kind", "reason"), daft.DataType.string())
        ),
        batch_size=256,
    )
    def __call__(self, text, spaced, language, source) -> pa.Array:
        scores = gopher_scores.scores(text.to_arrow(), spaced.to_arrow())
        kinds = np.where(scores["code_share"] >= self.config.code_share, "code", "prose").tolist()
        cases = list(zip(language.to_pylist(), source.to_pylist(), kinds, strict=True))
        reasons = np.full(len(cases), None, object)
        for case in set(cases):
            rows = np.flatnonzero([one == case for one in cases])
            for rule, limit in reversed(list(self.limits(*case))):
                if limit is None:
                    continue
                kind, score = rule.split("_", 1)
                values = scores[score][rows]
                reasons[rows[values < limit if kind == "min" else values > limit]] = (
                    f"gopher_{rule}"
                )
        columns = [pa.array(scores[name]) for name in gopher_scores.NAMES]
        columns += [pa.array(kinds, pa.string()), pa.array(reasons, pa.string())]
        return pa.StructArray.from_arrays(columns, [*gopher_scores.NAMES, "kind", "reason"])

    def limits(self, language: str, source: str, kind: str) -> Rules:
        changes = {}
        for override in self.config.overrides:
            if override.meets(language, source, kind):
                changes |= override.rules
        return self.config.rules.model_copy(update=changes)
