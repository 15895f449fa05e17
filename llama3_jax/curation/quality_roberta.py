"""Stage: the slow quality classifier, DistilRoberta trained on a Llama's judgements.

Llama 3 paper, section 3.1.1: "DistilRoberta to generate quality scores for each document", trained on
documents that a chat model judged against written requirements (curation/label.py).
"""

from pathlib import Path

import daft
from daft import DataType, col

from llama3_jax.curation import classifiers
from llama3_jax.curation.quality_fasttext import QualityFastTextConfig, judged

VERSION = 1
_RESULT = DataType.struct(
    {"quality_roberta_score": DataType.float64(), "reason": DataType.string()}
)


class QualityRobertaConfig(QualityFastTextConfig):
    """`model` is a folder that `train_roberta` wrote; otherwise as QualityFastTextConfig.

    The label is that of rubrics/quality.txt for a page that meets the requirements.
    """

    label: str = "yes"


def quality_roberta(
    frame: daft.DataFrame, config: QualityRobertaConfig, scratch: Path
) -> daft.DataFrame:
    """Adds `quality_roberta_score` and the reasons "quality_roberta_low" and "…_failed".

    Raises:
      UserError: no such classifier or label.
    """
    classifiers.column_of(classifiers.load(config.model), config.label, config.model)
    return frame.select("*", _judge(col("text"), col("language"), config))


@daft.func.batch(return_dtype=_RESULT, unnest=True)
def _judge(text: daft.Series, language: daft.Series, config: QualityRobertaConfig):
    return judged(
        "quality_roberta", text, language, config.model, config.label, config.threshold,
        config.thresholds,
    )  # fmt: skip
