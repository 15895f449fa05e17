"""classifier.json, which every trained classifier's folder has, and how a classifier is judged."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
from jaxtyping import Float

from llama3_jax.curation.agreement import Agreement, agreement
from llama3_jax.curation.labelled import Labelled
from llama3_jax.errors import UserError
from llama3_jax.schema import Config, parse

CARD_FILE = "classifier.json"


class Card(Config):
    """`held_out` is the Agreement with the labels of documents that training never saw.

    `sha256` is of the file of weights.
    """

    kind: str
    labels: tuple[str, ...]
    sha256: str
    trained_on: int
    contradictory: int
    held_out: dict[str, Any] = {}


CardT = TypeVar("CardT", bound=Card)


class Classifier(Protocol):
    labels: tuple[str, ...]

    def probabilities(self, texts: Sequence[str]) -> Float[np.ndarray, "documents labels"]: ...


def read_json(folder: Path) -> dict[str, Any]:
    """The content of classifier.json.

    Raises:
      UserError: it is absent or damaged.
    """
    path = folder / CARD_FILE
    if not path.is_file():
        raise UserError(f"{folder}: no classifier here ({CARD_FILE} not found); train one first")
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError):
        raise UserError(f"{path}: damaged, not a JSON object; train the classifier again") from None


def read_card(folder: Path, cls: type[CardT]) -> CardT:
    return parse(cls, read_json(folder), where=str(folder / CARD_FILE))


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_weights(path: Path, card: Card) -> None:
    """Raises UserError unless `path` is the file that the card was written for."""
    if not path.is_file():
        raise UserError(f"{path}: file not found; train the classifier again")
    if file_sha256(path) != card.sha256:
        raise UserError(
            f"{path}: damaged, or of another training than {CARD_FILE} beside it; train the "
            "classifier again"
        )


def judge(classifier: Classifier, documents: Sequence[Labelled]) -> Agreement:
    """A classifier's likeliest labels against those given."""
    best = classifier.probabilities([document.text for document in documents]).argmax(axis=1)
    given = [document.label for document in documents]
    return agreement(given, [classifier.labels[i] for i in best])
