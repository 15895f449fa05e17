"""Linear bag-of-n-grams classifiers (Joulin et al. 2016, arXiv 1607.01759), by the fastText library.

A classifier is a folder: model.bin, and classifier.json with its labels, how text is prepared and
how it did on held-out documents.
"""

import itertools
import os
import tempfile
import zlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import fasttext
import numpy as np
import pydantic
from jaxtyping import Float

from llama3_jax.curation.agreement import Agreement
from llama3_jax.curation.classifier_card import (
    CARD_FILE,
    Card,
    check_weights,
    file_sha256,
    judge,
    read_card,
)
from llama3_jax.curation.labelled import Labelled, split
from llama3_jax.curation.lexing import pieces
from llama3_jax.curation.page_features import feature_words
from llama3_jax.errors import UserError
from llama3_jax.files import atomic_path, write_json
from llama3_jax.schema import Config

MODEL_FILE = "model.bin"
_PREFIX, _END_OF_LINE = "__label__", "</s>"
_PAIR = "\N{SYMBOL FOR UNIT SEPARATOR}"  # begins the name of a bucket


class FastTextConfig(Config):
    """How to train.

    Features are words and pairs of neighbours, the pairs hashed into `pair_buckets` (0: words
    alone), those that occur `min_count` times or more. `characters` of a document are read, in
    training and after. `page_features` adds words that tell the page's kind
    (curation/page_features.py). One thread trains, since more race and give another model each
    time.
    """

    dim: pydantic.PositiveInt = 64
    epochs: pydantic.PositiveInt = 5
    learning_rate: pydantic.PositiveFloat = 0.1
    pair_buckets: pydantic.NonNegativeInt = 200_000
    min_count: pydantic.PositiveInt = 2
    characters: pydantic.PositiveInt = 10_000
    page_features: bool = False
    holdout: float = pydantic.Field(0.1, gt=0, lt=1)
    seed: pydantic.NonNegativeInt = 0


class FastTextCard(Card):
    kind: Literal["fasttext"] = "fasttext"
    characters: int
    page_features: bool
    pair_buckets: int


class FastTextClassifier:
    def __init__(self, card: FastTextCard, model):
        self._card, self._model = card, model
        self.labels = card.labels

    def probabilities(self, texts: Sequence[str]) -> Float[np.ndarray, "documents labels"]:
        """Of each label for each document; rows sum to 1."""
        found = np.zeros((len(texts), len(self.labels)))
        lines = [_line(text, self._card) for text in texts]
        if not lines:
            return found
        for row, (names, values) in enumerate(zip(*self._model.predict(lines, k=-1), strict=True)):
            for name, value in zip(names, values, strict=True):
                found[row, int(name[len(_PREFIX) :])] = value
        return found / found.sum(axis=1, keepdims=True)  # fastText's sum to 1 within 1e-5


def load_fasttext(folder: Path) -> FastTextClassifier:
    """The classifier in `folder`.

    Raises:
      UserError: there is none, or it is damaged.
    """
    card = read_card(folder, FastTextCard)
    check_weights(folder / MODEL_FILE, card)  # fastText reads a damaged file for ever
    return FastTextClassifier(card, fasttext.load_model(str(folder / MODEL_FILE)))


def train_fasttext(
    documents: Sequence[Labelled], folder: Path, config: FastTextConfig
) -> Agreement:
    """Trains on part of `documents`, writes the classifier; returns how it does on the rest.

    The same documents, whatever their order, and config give the same bytes.

    Raises:
      UserError: fewer than two labels, too few documents of one, or training diverged.
    """
    found = split(documents, config.holdout)
    card = FastTextCard(
        sha256="", labels=found.labels, characters=config.characters, page_features=config.page_features,
        pair_buckets=config.pair_buckets, trained_on=len(found.train),
        contradictory=found.contradictory,
    )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        model = _train(found.train, card, config, Path(temporary))
    with atomic_path(folder / MODEL_FILE) as temporary:
        model.save_model(os.fspath(temporary))
    result = judge(FastTextClassifier(card, model), found.held_out)
    card = card.model_copy(
        update={"sha256": file_sha256(folder / MODEL_FILE), "held_out": result.as_dict()}
    )
    write_json(folder / CARD_FILE, card.model_dump())
    return result


def _train(
    documents: Sequence[Labelled], card: FastTextCard, config: FastTextConfig, scratch: Path
):
    lines, vectors = scratch / "lines.txt", scratch / "vectors.txt"
    counts: Counter[str] = Counter()
    with lines.open("w", encoding="utf-8") as file:
        for document in documents:
            line = _line(document.text, card)
            counts.update(line.split(" "))
            file.write(f"{_PREFIX}{card.labels.index(document.label)} {line}\n")
    _write_vectors(vectors, counts, config)
    try:
        return fasttext.train_supervised(
            input=str(lines), pretrainedVectors=str(vectors), dim=config.dim, epoch=config.epochs,
            lr=config.learning_rate, wordNgrams=1, bucket=0, minCount=config.min_count,
            loss="softmax", thread=1, seed=config.seed, verbose=0,
        )  # fmt: skip
    except RuntimeError as error:
        raise UserError(
            f"fastText stopped: {error}; a learning_rate below {config.learning_rate} or a "
            f"min_count below {config.min_count} may help"
        ) from None


def _write_vectors(path: Path, counts: Counter[str], config: FastTextConfig) -> None:
    """What training starts from: all of it, since with one thread the library itself fills only a
    tenth of its matrix and leaves what was in memory in the rest, other numbers or NaN each time.

    Uniform in +-1/dim as the library means it; 0 for pairs, to which words lend a gradient.
    """
    kept = sorted(word for word, count in counts.items() if count >= config.min_count and word)
    words = [word for word in kept if word[0] != _PAIR]
    pairs = [word for word in kept if word[0] == _PAIR]
    random = np.random.default_rng(config.seed)
    zeros = " 0" * config.dim
    with path.open("w", encoding="utf-8") as file:
        file.write(f"{len(kept) + 1} {config.dim}\n")
        for word in [_END_OF_LINE, *words]:
            row = random.uniform(-1 / config.dim, 1 / config.dim, config.dim)
            file.write(word + "".join(f" {value:.5f}" for value in row) + "\n")
        file.writelines(f"{pair}{zeros}\n" for pair in pairs)


def _line(text: str, card: FastTextCard) -> str:
    """The features of a document, as fastText reads them: words with a space between."""
    text = text[: card.characters]
    found = pieces(text)
    pairs = []
    if buckets := card.pair_buckets:
        pairs = [
            f"{_PAIR}{zlib.crc32(f'{left} {right}'.encode()) % buckets}"
            for left, right in itertools.pairwise(found)
        ]
    return " ".join(found + pairs + (feature_words(text) if card.page_features else []))
