"""Stage: knowledge classes, and down-sampling of those that the web over-represents.

Llama 3 paper, section 3.1.2: "we develop a classifier to categorize the types of information
contained in our web data ... use this classifier to downsample data categories that are
over-represented on the web, for example, arts and entertainment".
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import daft
import numpy as np
import pydantic
from daft import DataType, col

from llama3_jax.curation import classifiers
from llama3_jax.errors import UserError
from llama3_jax.schema import Config

VERSION = 1
_CLASS = DataType.struct({"classes_label": DataType.string(), "classes_score": DataType.float64()})
_CLASS_COLUMNS = ("classes_label", "classes_score")


class ClassesConfig(Config):
    """`model` is a classifier's folder; its labels are the classes.

    `keep` gives the share kept of the documents of a class, all unless named. With `max_share` no
    class keeps more than that share of the characters; it comes on top of `keep`. Which documents
    stay depends on their `doc` alone, and those kept at a share are among those kept at a larger
    one.
    """

    model: str
    keep: dict[str, float] = {}
    max_share: float | None = pydantic.Field(None, gt=0, le=1)

    @pydantic.field_validator("keep")
    @classmethod
    def _shares(cls, keep: dict[str, float]) -> dict[str, float]:
        for name, share in keep.items():
            if not 0 <= share <= 1:
                raise ValueError(f"the share of {name!r} is {share}; it must be from 0 to 1")
        return keep


def classes(frame: daft.DataFrame, config: ClassesConfig, scratch: Path) -> daft.DataFrame:
    """Adds `classes_label`, `classes_score` (its probability), `classes_kept_share`.

    Reasons: "class_downsampled" and "classes_failed".

    Raises:
      UserError: no classifier, a class that it does not know, or a max_share that cannot be kept.
    """
    labels = classifiers.load(config.model).labels
    for name in config.keep:
        classifiers.column_of(classifiers.load(config.model), name, config.model)
    keep = {label: config.keep.get(label, 1.0) for label in labels}
    frame = frame.select("*", _classify(col("text"), config.model))
    if config.max_share is not None:
        # Labels are counted before any is judged by the counts; on disk, for they are costly.
        found = scratch / "classes"
        found.mkdir(parents=True, exist_ok=True)
        sizes = frame.select("doc", *_CLASS_COLUMNS, col("text").length().alias("_size"))
        sizes.write_parquet(str(found), write_mode="overwrite")
        sizes = daft.read_parquet(str(found / "*.parquet"))
        frame = frame.exclude(*_CLASS_COLUMNS).join(sizes.exclude("_size"), on="doc")
        counted = sizes.groupby("classes_label").agg(col("_size").sum()).to_pydict()
        counts = dict(zip(counted["classes_label"], counted["_size"], strict=True))
        counts.pop(None, None)
        keep = capped(
            {label: keep[label] * counts.get(label, 0) for label in labels}, config.max_share, keep
        )
    return frame.select("*", _sample(col("doc"), col("classes_label"), keep))


def capped(
    sizes: Mapping[str, float], max_share: float, keep: Mapping[str, float]
) -> dict[str, float]:
    """`keep`, lowered so that no class is more than `max_share` of what is kept of `sizes`.

    Raises:
      UserError: fewer classes have text than a cap of `max_share` needs.
    """
    present = {name: size for name, size in sizes.items() if size > 0}
    if not present:
        return dict(keep)
    if len(present) * max_share < 1:
        raise UserError(
            f"classes.max_share={max_share}: {len(present)} classes have text, and together they "
            f"could be {len(present) * max_share:.0%} of what is kept; "
            f"{1 / len(present):.3g} or more would do"
        )
    # The largest are cut to a common size; how many, follows from the cap itself.
    ordered = sorted(present.values(), reverse=True)
    for cut in range(len(ordered) + 1):
        free = sum(ordered[cut:])
        rest = 1 - cut * max_share
        # With the classes before `cut` at the cap, the others make up the rest.
        total = free / rest if rest > 1e-12 else ordered[-1] / max_share
        if cut == len(ordered) or ordered[cut] <= max_share * total * (1 + 1e-12):
            break
    limit = max_share * total
    return {
        name: keep[name] * min(1.0, limit / sizes[name]) if sizes[name] > 0 else keep[name]
        for name in keep
    }


@daft.func.batch(return_dtype=_CLASS, unnest=True)
def _classify(text: daft.Series, model: str):
    classifier = classifiers.load(model)
    found = classifiers.probabilities(classifier, text.to_arrow())
    rows = []
    for row in found:
        if np.isnan(row[0]):
            rows.append({"classes_label": None, "classes_score": None})
            continue
        best = int(row.argmax())
        rows.append({"classes_label": classifier.labels[best], "classes_score": float(row[best])})
    return rows


@daft.func.batch(
    return_dtype=DataType.struct(
        {"classes_kept_share": DataType.float64(), "reason": DataType.string()}
    ),
    unnest=True,
)
def _sample(doc: daft.Series, label: daft.Series, keep: dict[str, float]):
    rows = []
    for name, of in zip(doc.to_arrow().to_pylist(), label.to_arrow().to_pylist(), strict=True):
        if of is None:
            rows.append({"classes_kept_share": None, "reason": "classes_failed"})
            continue
        dropped = uniform(name, "classes") >= keep[of]
        reason = "class_downsampled" if dropped else None
        rows.append({"classes_kept_share": keep[of], "reason": reason})
    return rows


def uniform(doc: str, use: str) -> float:
    """A number in [0, 1) that depends on `doc` alone, another for each `use`."""
    digest = hashlib.blake2b(doc.encode(), digest_size=8, person=use.encode()).digest()
    return int.from_bytes(digest, "big") / 2**64
