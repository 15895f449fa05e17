"""Stage c4: rules for single lines that mark what is no text of the page (C4).

    text        without the lines that break a rule, the others in their order
    c4_lines    how many lines went
    reason      c4_empty where nothing is left

Raffel et al. 2020 (JMLR 21:140), sec. 2.2; the values are those of its program. Its rules for whole
pages (sentences, "lorem ipsum", curly brackets) are stage gopher's. Its three-sentence duplicates are
left to stages minhash and lines, as Llama 3 has them. The rules were made for English prose: a line
that looks like code stays as it is, and what harms other text is off unless asked for.
"""

import re
from pathlib import Path

import daft
import pyarrow as pa
import regex
from daft import col
from pydantic import Field

from llama3_jax.curation import lexing
from llama3_jax.curation.lines import without
from llama3_jax.schema import Config

VERSION = 1
POLICIES = (
    "terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies",
)  # fmt: skip
ENDS = (".", "!", "?", '"', "”", "。", "！", "？", "」", "।", "؟")
_CITATION = re.compile(r"\[(?:\d{1,3}|edit|citation needed)\]")
_WORDS = regex.compile(rf"[{lexing.UNSPACED}]|[^\s{lexing.UNSPACED}]+")
_CODE_ENDS = tuple("{};([=\\")


class C4Config(Config):
    """Which lines go. None switches a length off.

    javascript: lines with that word, which mostly ask to switch it on. C4's rule as published: prose
      about JavaScript loses lines to it, too; switch it off for sources that are about programs.
    policies: lines that speak of a site's terms, privacy or cookies.
    citations: the marks [1], [edit] and [citation needed] go, their lines stay. Off, since text about
      programs has x[1].
    terminal: lines that do not end as a sentence does. It was C4's strongest rule; FineWeb (Penedo et
      al. 2024, sec. 3.5) found that it drops some 30% of tokens, and left it out.
    min_words, max_word_length: words of a line (C4: 5), characters of one (C4: 1,000).
    """

    javascript: bool = True
    policies: bool = True
    citations: bool = False
    terminal: bool = False
    min_words: int | None = Field(None, ge=1)
    max_word_length: int | None = Field(1000, ge=1)
    exempt_sources: tuple[str, ...] = ()


def c4(frame: daft.DataFrame, config: C4Config, scratch: Path) -> daft.DataFrame:
    """Changes text, adds c4_lines and reason."""
    made = _Rules(config)(col("text"), col("source"))
    frame = frame.with_column("_c4", made)
    names = {"text": "text", "c4_lines": "lines", "reason": "reason"}
    return frame.with_columns({name: col("_c4").get(key) for name, key in names.items()}).exclude(
        "_c4"
    )


@daft.cls
class _Rules:
    def __init__(self, config: C4Config):
        self.config = config

    @daft.method.batch(
        return_dtype=daft.DataType.struct(
            {
                "text": daft.DataType.string(),
                "lines": daft.DataType.int64(),
                "reason": daft.DataType.string(),
            }
        ),
        batch_size=256,
    )
    def __call__(self, text: daft.Series, source: daft.Series) -> pa.Array:
        made = [
            (text, 0) if source in self.config.exempt_sources else self.kept(text)
            for text, source in zip(text.to_pylist(), source.to_pylist(), strict=True)
        ]
        reasons = ["c4_empty" if gone and not text else None for text, gone in made]
        columns = [
            pa.array([text for text, _ in made], pa.large_string()),
            pa.array([gone for _, gone in made], pa.int64()),
            pa.array(reasons, pa.large_string()),
        ]
        return pa.StructArray.from_arrays(columns, ["text", "lines", "reason"])

    def kept(self, text: str) -> tuple[str, int]:
        """What is left of a document, and how many lines went."""
        kept, gone = text.split("\n"), []
        for number, line in enumerate(kept):
            if not line.strip() or looks_like_code(line):
                continue
            if self.config.citations:  # first: a sentence may end in one
                kept[number] = line = _CITATION.sub("", line)
            if self.goes(line):
                gone.append(number)
        text = "\n".join(kept)
        return without(text, gone) if gone else text, len(gone)

    def goes(self, line: str) -> bool:
        config, lower = self.config, line.lower()
        return (
            (config.javascript and "javascript" in lower)
            or (config.policies and any(policy in lower for policy in POLICIES))
            or (config.terminal and not line.rstrip().endswith(ENDS))
            or (config.min_words is not None and len(_WORDS.findall(line)) < config.min_words)
            or (
                config.max_word_length is not None
                and len(line) > config.max_word_length
                and max(map(len, _WORDS.findall(line))) > config.max_word_length
            )
        )


def looks_like_code(line: str) -> bool:
    """Indented, a prompt, or with an end that no sentence has."""
    return line[0] <= " " or line.startswith(">>>") or line.rstrip().endswith(_CODE_ENDS)
