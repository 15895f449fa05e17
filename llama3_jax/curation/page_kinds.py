"""Stage: pages of code mixed with prose, of mathematical deduction, of reasoning in STEM.

Llama 3 paper, section 3.1.1: such pages are found by classifiers of their own (DistilRoberta,
trained on labels by a Llama model), since their token distribution is another than natural
language's. Rubrics for the labels: rubrics/code.txt, math.txt, stem.txt; features of text:
curation/page_features.py.
"""

from pathlib import Path

import daft
import numpy as np
import pydantic
from daft import DataType, col

from llama3_jax.curation import classifiers
from llama3_jax.errors import UserError
from llama3_jax.schema import Config

VERSION = 1


class PageKindsConfig(Config):
    """`models`: the classifier's folder for each kind, any name (`code`, `math`, `stem`).

    A page is of the kind whose classifier gives `label` the largest probability, if that is at
    least `threshold`; the threshold is ours, the paper names none. `keep` makes a source of its own
    of some kinds: all other pages are rejected. Without it none is.
    """

    models: dict[str, str]
    label: str = "yes"
    threshold: float = pydantic.Field(0.5, ge=0, le=1)
    keep: tuple[str, ...] = ()

    @pydantic.model_validator(mode="after")
    def _known(self) -> "PageKindsConfig":
        if not self.models:
            raise ValueError("models is empty: name a classifier for at least one kind of page")
        if unknown := sorted(set(self.keep) - set(self.models)):
            raise ValueError(f"keep: {unknown[0]!r} is none of {', '.join(self.models)}")
        return self


def page_kinds(frame: daft.DataFrame, config: PageKindsConfig, scratch: Path) -> daft.DataFrame:
    """Adds `page_kinds_<kind>` for each kind, a probability, and `page_kinds_kind`, "" for none.

    Reasons: "page_kind_not_kept" and "page_kinds_failed".

    Raises:
      UserError: no classifier where `models` says, or one without `label`.
    """
    for kind, folder in config.models.items():
        try:
            classifiers.column_of(classifiers.load(folder), config.label, folder)
        except UserError as error:
            raise UserError(f"page_kinds.models.{kind}: {error}") from None
    result = {f"page_kinds_{kind}": DataType.float64() for kind in config.models}
    result |= {"page_kinds_kind": DataType.string(), "reason": DataType.string()}
    judge = daft.func.batch(return_dtype=DataType.struct(result), unnest=True)(_judge)
    return frame.select("*", judge(col("text"), config))


def _judge(text: daft.Series, config: PageKindsConfig):
    array = text.to_arrow()
    columns = []
    for folder in config.models.values():
        classifier = classifiers.load(folder)
        place = classifiers.column_of(classifier, config.label, folder)
        columns.append(classifiers.probabilities(classifier, array)[:, place])
    rows = []
    for scores in np.stack(columns, axis=1).tolist():
        row = {f"page_kinds_{kind}": s for kind, s in zip(config.models, scores, strict=True)}
        if any(np.isnan(scores)):
            row = dict.fromkeys(row) | {"page_kinds_kind": "", "reason": "page_kinds_failed"}
            rows.append(row)
            continue
        best = int(np.argmax(scores))
        kind = list(config.models)[best] if scores[best] >= config.threshold else ""
        dropped = bool(config.keep) and kind not in config.keep
        reason = "page_kind_not_kept" if dropped else None
        rows.append(row | {"page_kinds_kind": kind, "reason": reason})
    return rows
