"""How often each pre-token occurs in documents: in parallel, in bounded memory, exactly.

A pre-token is what the split pattern cuts text into before any merging. Counts that outgrow
memory go to sorted files on disk and are added up at the end; only if more different pre-tokens
exist than may be kept are the rarest left out, and how many is told.
"""

import heapq
import itertools
import pickle
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from fractions import Fraction
from math import lcm
from pathlib import Path
from typing import NamedTuple

import regex

from llama3_jax.data.documents import Fields, Piece, in_holdout, read_piece
from llama3_jax.data.tokenizer import LLAMA3_PATTERN
from llama3_jax.data.workers import run_jobs
from llama3_jax.errors import UserError

PIECE_BYTES = 4 * 2**20
_BLOCK = 10_000  # pre-tokens a read from a file on disk
_PATTERN = regex.compile(LLAMA3_PATTERN)

Count = tuple[str, int]


class Counted(NamedTuple):
    """Pre-tokens with their weighted counts, integers in units of 1/`unit`.

    `distinct`: different ones in the text; `left_out`: those of them, the rarest, that were not
    kept, and their share of all counts. `languages`: documents and bytes read of each.
    """

    counts: dict[str, int]
    unit: int
    distinct: int
    left_out: int
    left_out_share: float
    languages: dict[str, dict[str, int]]


def count(
    pieces: list[Piece],
    fields: Fields,
    weights: Mapping[str, str],
    holdout: float,
    keep: int,
    workers: int,
    on_progress: Callable[[], None] = lambda: None,
) -> Counted:
    """Counts the pre-tokens of all documents that are not held out.

    A language's `weights` entry is a decimal that multiplies its counts; others have 1. At most
    `keep` different pre-tokens, the most frequent, are kept.

    Raises:
      UserError: a weight that is none, or of a language that no document has; no text.
    """
    exact, unit = _integers(weights)
    with tempfile.TemporaryDirectory(prefix="pretokens-") as spill:
        jobs = [
            (piece, fields, exact, unit, holdout, max(keep // workers, 1), Path(spill))
            for piece in pieces
        ]
        tally, languages = _Tally(keep, Path(spill)), {}
        for counts, runs, read in run_jobs(_count_piece, jobs, workers):
            tally.add(counts)
            tally.runs += runs
            for language, (documents, size) in read.items():
                total = languages.setdefault(language, {"documents": 0, "bytes": 0})
                total["documents"] += documents
                total["bytes"] += size
            on_progress()
        if unknown := sorted(set(weights) - set(languages)):
            known = (
                ", ".join(sorted(filter(None, languages))) or f"none: no field {fields.language!r}"
            )
            raise UserError(
                f"--weights: no document is of language {unknown[0]!r}; languages: {known}"
            )
        kept, distinct, all_counts, kept_counts = _most_frequent(tally.items(), keep)
    if not kept:
        raise UserError("no text to train on: the documents are empty, held out or weigh 0")
    return Counted(
        dict(kept), unit, distinct, distinct - len(kept), 1 - kept_counts / all_counts, languages
    )  # fmt: skip


def _integers(weights: Mapping[str, str]) -> tuple[dict[str, int], int]:
    """The weights as multiples of 1/unit, so that sums and ties are exact."""
    fractions = {}
    for language, text in weights.items():
        try:
            fractions[language] = Fraction(text)
        except (ValueError, ZeroDivisionError):
            raise UserError(f"--weights={language}={text}: not a number") from None
        if fractions[language] < 0 or 1000 % fractions[language].denominator:
            raise UserError(
                f"--weights={language}={text}: must be 0 or more, with three decimals at most"
            )
    unit = lcm(*(fraction.denominator for fraction in fractions.values()))
    return {language: int(fraction * unit) for language, fraction in fractions.items()}, unit


def _count_piece(job: tuple) -> tuple[dict[str, int], list[Path], dict[str, tuple[int, int]]]:
    """Counts of one piece in memory, the files with the rest, and what was read by language."""
    piece, fields, weights, unit, holdout, limit, spill = job
    tally, counters, read = _Tally(limit, spill), {}, {}
    for document in read_piece(piece, fields):
        documents, size = read.get(document.language, (0, 0))
        if in_holdout(document.id, holdout):
            read[document.language] = documents, size
            continue
        read[document.language] = documents + 1, size + len(document.text.encode())
        if not (weight := weights.get(document.language, unit)):
            continue
        counter = counters.setdefault(weight, Counter())
        counter.update(_PATTERN.findall(document.text))
        if sum(map(len, counters.values())) > limit:
            _pour(counters, tally)
    _pour(counters, tally)
    return tally.counts, tally.runs, read


def _pour(counters: dict[int, Counter], tally: "_Tally") -> None:
    for weight, counter in counters.items():
        tally.add(counter, weight)
    counters.clear()


class _Tally:
    """Counts in memory up to a limit of different pre-tokens, then in sorted files."""

    def __init__(self, limit: int, spill: Path):
        self.counts: dict[str, int] = {}
        self.runs: list[Path] = []
        self._limit, self._spill = limit, spill

    def add(self, counts: Mapping[str, int], weight: int = 1) -> None:
        if not self.counts and weight == 1:
            self.counts = dict(counts)
        else:
            present, get = self.counts, self.counts.get
            for pretoken, number in counts.items():
                present[pretoken] = get(pretoken, 0) + number * weight
        if len(self.counts) > self._limit:
            self._write()

    def _write(self) -> None:
        with tempfile.NamedTemporaryFile(dir=self._spill, delete=False) as file:
            items = sorted(self.counts.items())
            for at in range(0, len(items), _BLOCK):
                pickle.dump(items[at : at + _BLOCK], file)
        self.runs.append(Path(file.name))
        self.counts = {}

    def items(self) -> Iterator[Count]:
        """All counts, sorted; needs the memory of a block a file."""
        streams = [_read_run(path) for path in self.runs]
        streams.append(iter(sorted(self.counts.items())))
        merged = heapq.merge(*streams)
        for pretoken, group in itertools.groupby(merged, key=lambda item: item[0]):
            yield pretoken, sum(number for _, number in group)


def _read_run(path: Path) -> Iterator[Count]:
    with open(path, "rb") as file:
        while True:
            try:
                yield from pickle.load(file)
            except EOFError:
                return


def _most_frequent(items: Iterable[Count], keep: int) -> tuple[list[Count], int, int, int]:
    """The `keep` most frequent (of equals the first by text); how many and how much there were."""
    kept, distinct, total = [], 0, 0
    for item in items:
        kept.append(item)
        distinct += 1
        total += item[1]
        if len(kept) >= 2 * keep:
            kept = _first(kept, keep)
    if len(kept) > keep:
        kept = _first(kept, keep)
    return kept, distinct, total, sum(number for _, number in kept)


def _first(items: list[Count], keep: int) -> list[Count]:
    return sorted(items, key=lambda item: (-item[1], item[0]))[:keep]
