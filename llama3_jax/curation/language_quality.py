"""Stage: the best documents of each language, by the rank of their quality within it.

Llama 3 paper, section 3.1.1: "We perform a quality ranking of multilingual documents ... to ensure
that high-quality content is prioritized". A score means another thing in every language, a rank
does not.
"""

from pathlib import Path
from typing import NamedTuple

import daft
import numpy as np
import pyarrow
import pydantic
from daft import DataType, col

from llama3_jax.errors import UserError
from llama3_jax.schema import Config

VERSION = 1
_RESULT = DataType.struct(
    {"language_quality_rank": DataType.float64(), "reason": DataType.string()}
)


class LanguageQualityConfig(Config):
    """Keeps the best `keep` of each language by the column `score` (`keep_of`: single languages).

    Which share the paper keeps is not published: all is kept unless said. A language with fewer
    than `min_documents` is not cut, since so few say little of what is good in it.
    """

    score: str = "quality_fasttext_score"
    keep: float = pydantic.Field(1.0, ge=0, le=1)
    keep_of: dict[str, float] = {}
    min_documents: pydantic.NonNegativeInt = 100


def language_quality(
    frame: daft.DataFrame, config: LanguageQualityConfig, scratch: Path
) -> daft.DataFrame:
    """Adds `language_quality_rank`: the share of its language's documents with a lower score.

    Of n documents the floor(n (1 - keep)) lowest, by score and then by `doc`, get the reason
    "language_quality_low"; without a score it is "language_quality_unscored". For the rank, scores
    within 0.05% of each other count as equal: so only bins are counted, and one bin a language, at
    its cut, is read document by document. Memory does not grow with the corpus.

    Raises:
      UserError: the frame has no such column, or it holds no numbers.
    """
    types = {field.name: field.dtype for field in frame.schema()}
    if config.score not in types:
        raise UserError(
            f"language_quality.score={config.score}: there is no such column; a stage before must "
            f"add it. Columns: {', '.join(types)}"
        )
    if not types[config.score].is_numeric():
        raise UserError(
            f"language_quality.score={config.score}: of type {types[config.score]}, not a number"
        )
    frame = frame.with_column("_bin", _bins(col(config.score)))
    counted = frame.groupby("language", "_bin").agg(col("doc").count()).to_pydict()
    cuts = _cuts(counted["language"], counted["_bin"], counted["doc"], config)
    at_cut = frame.where(_at_cut(col("language"), col("_bin"), cuts))
    at_cut = at_cut.select("doc", "language", col(config.score).alias("_score")).to_pydict()
    low = _lowest(cuts, **at_cut)
    frame = frame.select("*", _decide(col("doc"), col("language"), col("_bin"), cuts, low))
    return frame.exclude("_bin")


class _Cut(NamedTuple):
    """Of one language: its bins in order, the share of documents below each, and the cut.

    Bins below `bin` go, and the `partly` lowest documents of that bin.
    """

    bins: np.ndarray
    below: np.ndarray
    bin: int
    partly: int


def _cuts(languages, bins, counts, config: LanguageQualityConfig) -> dict[str, _Cut]:
    grouped: dict[str, list[tuple[int, int]]] = {}
    for language, of, count in zip(languages, bins, counts, strict=True):
        if of is not None:
            grouped.setdefault(language or "", []).append((of, count))
    cuts = {}
    for language, pairs in grouped.items():
        ordered, counted = np.array(sorted(pairs), np.int64).T
        ends = np.cumsum(counted)
        total = int(ends[-1])
        keep = config.keep_of.get(language, config.keep)
        # Rounded before the floor: 10 (1 - 0.9) is 0.99999… in binary.
        lost = int(round(total * (1 - keep), 6)) if total >= config.min_documents else 0
        at = min(int(np.searchsorted(ends, lost, side="right")), len(ends) - 1)
        starts = ends - counted
        cuts[language] = _Cut(ordered, starts / total, int(ordered[at]), lost - int(starts[at]))
    return cuts


def _lowest(cuts: dict[str, _Cut], doc, language, _score) -> frozenset[str]:
    """The documents of the bins at the cuts that lie below them."""
    grouped: dict[str, list[tuple[float, str]]] = {}
    for name, of, score in zip(doc, language, _score, strict=True):
        grouped.setdefault(of or "", []).append((score, name))
    return frozenset(
        name for of, pairs in grouped.items() for _, name in sorted(pairs)[: cuts[of].partly]
    )


@daft.func.batch(return_dtype=DataType.int64())
def _bins(score: daft.Series):
    """Numbers of bins that order as the scores do: the first 20 bits of a float32, as it happens."""
    values = score.to_arrow().to_numpy(zero_copy_only=False).astype(np.float32)
    values = np.where(values == 0, np.float32(0), values)  # -0 is 0
    bits = values.view(np.int32).astype(np.int64)
    ordered = np.where(bits >= 0, bits, -(bits & 0x7FFFFFFF)) >> 12
    return pyarrow.array(ordered, mask=np.isnan(values))


@daft.func.batch(return_dtype=DataType.bool())
def _at_cut(language: daft.Series, bins: daft.Series, cuts: dict[str, _Cut]):
    pairs = zip(language.to_arrow().to_pylist(), bins.to_arrow().to_pylist(), strict=True)
    return [of is not None and cuts[name or ""].bin == of for name, of in pairs]


@daft.func.batch(return_dtype=_RESULT, unnest=True)
def _decide(
    doc: daft.Series, language: daft.Series, bins: daft.Series, cuts: dict[str, _Cut],
    low: frozenset[str],
):  # fmt: skip
    columns = (series.to_arrow().to_pylist() for series in (doc, language, bins))
    rows = []
    for name, of, place in zip(*columns, strict=True):
        if place is None:
            rows.append({"language_quality_rank": None, "reason": "language_quality_unscored"})
            continue
        cut = cuts[of or ""]
        below = float(cut.below[np.searchsorted(cut.bins, place)])
        lost = place < cut.bin or (place == cut.bin and name in low)
        reason = "language_quality_low" if lost else None
        rows.append({"language_quality_rank": below, "reason": reason})
    return rows
