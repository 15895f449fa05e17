"""Stage: the fast quality classifier (Llama 3 paper, section 3.1.1).

The paper's recognises "if a given text would be referenced by Wikipedia"; any labels will do.
"""

from pathlib import Path

import daft
import numpy as np
import pydantic
from daft import DataType, col

from llama3_jax.curation import classifiers
from llama3_jax.schema import Config

VERSION = 1
_RESULT = DataType.struct(
    {"quality_fasttext_score": DataType.float64(), "reason": DataType.string()}
)


class QualityFastTextConfig(Config):
    """`model` is a folder that `train_fasttext` wrote.

    The score is the probability of `label`; below `threshold` a document is rejected: 0.5 discards
    "pages not classified as references" (Touvron et al. 2023, arXiv 2302.13971, section 2.1).
    `thresholds` are those of single languages.
    """

    model: str
    label: str = "positive"
    threshold: float = pydantic.Field(0.5, ge=0, le=1)
    thresholds: dict[str, float] = {}


def quality_fasttext(
    frame: daft.DataFrame, config: QualityFastTextConfig, scratch: Path
) -> daft.DataFrame:
    """Adds `quality_fasttext_score` and the reasons "quality_fasttext_low" and "…_failed".

    Raises:
      UserError: no such classifier or label.
    """
    classifiers.column_of(classifiers.load(config.model), config.label, config.model)
    return frame.select("*", _judge(col("text"), col("language"), config))


@daft.func.batch(return_dtype=_RESULT, unnest=True)
def _judge(text: daft.Series, language: daft.Series, config: QualityFastTextConfig):
    return judged(
        "quality_fasttext", text, language, config.model, config.label, config.threshold,
        config.thresholds,
    )  # fmt: skip


def judged(
    stage: str, text: daft.Series, language: daft.Series, model: str, label: str,
    threshold: float, thresholds: dict[str, float],
) -> list[dict]:  # fmt: skip
    """Score and reason of each row, as a quality stage returns them."""
    classifier = classifiers.load(model)
    column = classifiers.column_of(classifier, label, model)
    scores = classifiers.probabilities(classifier, text.to_arrow())[:, column]
    rows = []
    for score, of in zip(scores.tolist(), language.to_arrow().to_pylist(), strict=True):
        if np.isnan(score):
            rows.append({f"{stage}_score": None, "reason": f"{stage}_failed"})
            continue
        low = score < thresholds.get(of, threshold)
        rows.append({f"{stage}_score": score, "reason": f"{stage}_low" if low else None})
    return rows
