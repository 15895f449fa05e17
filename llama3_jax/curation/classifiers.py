"""Any trained classifier by its folder, and its probabilities as columns of documents."""

import functools
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow
from jaxtyping import Float

from llama3_jax.curation.classifier_card import CARD_FILE, Classifier, read_json
from llama3_jax.curation.fasttext_classifier import load_fasttext
from llama3_jax.errors import UserError


def _fasttext(folder: Path) -> Classifier:
    return load_fasttext(folder)


def _roberta(folder: Path) -> Classifier:
    # Here, so that workers which need fastText alone do not start JAX.
    from llama3_jax.curation.roberta_classifier import load_roberta

    return load_roberta(folder)


KINDS: dict[str, Callable[[Path], Classifier]] = {"fasttext": _fasttext, "roberta": _roberta}


def load(folder: str | Path) -> Classifier:
    """The classifier in `folder`, of whatever kind; loaded once in a process.

    Raises:
      UserError: none is there, or it is damaged.
    """
    folder = Path(folder)
    read_json(folder)
    return _load(folder, (folder / CARD_FILE).stat().st_mtime_ns)


@functools.lru_cache(maxsize=16)
def _load(folder: Path, _changed: int) -> Classifier:
    kind = read_json(folder).get("kind")
    if kind not in KINDS:
        raise UserError(f"{folder / CARD_FILE}: kind is {kind!r}; known: {', '.join(KINDS)}")
    return KINDS[kind](folder)


def column_of(classifier: Classifier, label: str, folder: str) -> int:
    """Where `label` stands among the probabilities.

    Raises:
      UserError: the classifier knows no such label.
    """
    if label not in classifier.labels:
        raise UserError(
            f"label {label!r} is unknown to the classifier in {folder}; it has "
            f"{', '.join(classifier.labels)}"
        )
    return classifier.labels.index(label)


def probabilities(classifier: Classifier, texts: pyarrow.Array) -> Float[np.ndarray, "rows labels"]:
    """Of every row; NaN where the text is null, not Unicode, or fails the classifier."""
    found = np.full((len(texts), len(classifier.labels)), np.nan)
    readable: dict[int, str] = {}
    for row in range(len(texts)):
        try:
            if (text := texts[row].as_py()) is not None:
                readable[row] = text
        except UnicodeDecodeError:
            continue
    try:
        found[list(readable)] = classifier.probabilities(list(readable.values()))
    except Exception:  # one row's fault: find it, and keep the others
        for row, text in readable.items():
            try:
                found[row] = classifier.probabilities([text])[0]
            except Exception:
                logging.exception("classifier failed on a document of %d characters", len(text))
    return found
