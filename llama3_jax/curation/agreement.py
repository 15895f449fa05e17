"""How far two judgements of the same documents agree: of a classifier, a labeller, a person."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from llama3_jax.errors import UserError


class Agreement(NamedTuple):
    """`confusion[i][j]` documents are labels[i] by the reference and labels[j] by the other.

    `kappa` is Cohen's (1960): agreement above what the two label frequencies give by chance, 1 at
    most; None where it is not defined, since both only ever gave one and the same label.
    """

    labels: tuple[str, ...]
    confusion: tuple[tuple[int, ...], ...]
    accuracy: float
    kappa: float | None
    precision: tuple[float, ...]
    recall: tuple[float, ...]

    @property
    def documents(self) -> int:
        return sum(map(sum, self.confusion))

    def as_dict(self) -> dict:
        return {"documents": self.documents} | self._asdict()

    def __str__(self) -> str:
        width = max(9, *map(len, self.labels)) + 2
        kappa = "undefined" if self.kappa is None else f"{self.kappa:.3f}"
        lines = [f"{self.documents} documents, accuracy {self.accuracy:.3f}, Cohen's kappa {kappa}"]
        header = ("reference", *self.labels, "precision", "recall")
        lines.append("".join(name.rjust(width) for name in header))
        for i, label in enumerate(self.labels):
            figures = (f"{self.precision[i]:.3f}", f"{self.recall[i]:.3f}")
            row = (label, *map(str, self.confusion[i]), *figures)
            lines.append("".join(cell.rjust(width) for cell in row))
        return "\n".join(lines)


def agreement(reference: Sequence[str], other: Sequence[str]) -> Agreement:
    """Compares two labels of each document.

    Precision of a label is 0 where `other` never gives it, recall 0 where `reference` never does.

    Raises:
      UserError: no document.
      ValueError: the lengths differ.
    """
    if len(reference) != len(other):
        raise ValueError(f"{len(reference)} labels against {len(other)}")
    if not len(reference):
        raise UserError("no document was judged by both: there is nothing to compare")
    labels = sorted({*reference, *other})
    place = {label: index for index, label in enumerate(labels)}
    confusion = np.zeros((len(labels), len(labels)), np.int64)
    np.add.at(confusion, ([place[r] for r in reference], [place[o] for o in other]), 1)
    right, given, said = np.diag(confusion), confusion.sum(axis=1), confusion.sum(axis=0)
    accuracy = right.sum() / len(reference)
    chance = given @ said / len(reference) ** 2
    return Agreement(
        tuple(labels),
        tuple(tuple(row) for row in confusion.tolist()),
        float(accuracy),
        float((accuracy - chance) / (1 - chance)) if chance < 1 else None,
        tuple((right / np.maximum(said, 1)).tolist()),
        tuple((right / np.maximum(given, 1)).tolist()),
    )
