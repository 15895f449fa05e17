"""Labelled documents: what classifiers are trained and judged on.

A label comes from the file (`positive=wikipedia_references.parquet negative=web.parquet`) or from a
column `label`, as `curation/label.py` writes it.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from llama3_jax.data.documents import Fields, in_holdout, plan_pieces, read_piece
from llama3_jax.errors import UserError

_PIECE_BYTES = 64 * 2**20


class Labelled(NamedTuple):
    text: str
    label: str


class Split(NamedTuple):
    """Documents to train on and to judge by, and how many texts carried two labels (left out)."""

    train: list[Labelled]
    held_out: list[Labelled]
    contradictory: int

    @property
    def labels(self) -> tuple[str, ...]:
        return tuple(sorted({document.label for document in self.train}))


def read_files(files: Mapping[str, Sequence[Path]], characters: int) -> list[Labelled]:
    """Documents of each label's files (parquet, jsonl, text), the first `characters` of each.

    Raises:
      UserError: a file that is missing or damaged, or a label without documents.
    """
    documents = []
    for label, paths in files.items():
        before = len(documents)
        for piece in plan_pieces(list(map(Path, paths)), _PIECE_BYTES):
            documents += [Labelled(d.text[:characters], label) for d in read_piece(piece)]
        if len(documents) == before:
            raise UserError(
                f"label {label!r}: no document with text in {', '.join(map(str, paths))}"
            )
    return documents


def read_labels(paths: Sequence[Path], characters: int, column: str = "label") -> list[Labelled]:
    """Documents whose label stands beside them; those with an empty label are left out.

    Raises:
      UserError: a file that is missing or damaged, or no document with a label.
    """
    fields = Fields(language=column)
    documents = []
    for piece in plan_pieces(list(map(Path, paths)), _PIECE_BYTES):
        documents += [
            Labelled(d.text[:characters], d.language)
            for d in read_piece(piece, fields)
            if d.language
        ]
    if not documents:
        raise UserError(
            f"{', '.join(map(str, paths))}: no document has a label in column {column!r}"
        )
    return documents


def split(documents: Iterable[Labelled], holdout: float) -> Split:
    """Training and held-out documents, told apart and ordered by a hash of the text alone.

    So equal texts never lie on both sides, and neither the order of the input nor more of it moves
    a document. The same text with the same label counts once.

    Raises:
      UserError: fewer than two labels, or a label that lies on one side only.
    """
    labels: dict[str, set[str]] = {}
    for document in documents:
        labels.setdefault(document.text, set()).add(document.label)
    ordered = sorted(labels, key=_digest)
    sides: tuple[list[Labelled], list[Labelled]] = ([], [])
    for text in ordered:
        if len(labels[text]) == 1:
            (label,) = labels[text]
            sides[in_holdout(_digest(text), holdout)].append(Labelled(text, label))
    found = Split(*sides, contradictory=len(labels) - len(sides[0]) - len(sides[1]))
    _check(found)
    return found


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def _check(found: Split) -> None:
    held_out = {document.label for document in found.held_out}
    every = set(found.labels) | held_out
    if len(every) < 2:
        raise UserError(
            f"a classifier needs documents of two labels or more; found: {', '.join(every) or 'none'}"
        )
    for name, present in (("training", set(found.labels)), ("held-out", held_out)):
        if missing := sorted(every - present):
            raise UserError(
                f"label {missing[0]!r} has no {name} document ({len(found.train)} to train on, "
                f"{len(found.held_out)} held out): more documents or another holdout would help"
            )
