"""Everything that is measured of a model: tasks, held-out text, needles."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pydantic

from llama3_jax.data import documents
from llama3_jax.data.corpus import DATASET_FILE, Corpus
from llama3_jax.data.tokenizer import Tokenizer
from llama3_jax.errors import UserError
from llama3_jax.evaluation import metrics, needle, tasks
from llama3_jax.evaluation.metrics import Metric
from llama3_jax.evaluation.needle import Cell, Haystack, NeedleConfig
from llama3_jax.evaluation.scoring import Scorer
from llama3_jax.schema import Config


class EvaluationConfig(Config):
    """What is measured, every `every_tokens` and at the end (needles at the end and by gates).

    `tasks` maps names to places (see evaluation/tasks.py). Held-out text is that of the run's
    validation, `held_out_tokens` of each source. Both are short-context: rows of `length`.
    """

    length: pydantic.PositiveInt
    tasks: dict[str, str] = {}
    held_out_tokens: pydantic.PositiveInt | None = None
    needle: NeedleConfig | None = None
    every_tokens: pydantic.PositiveInt | None = None
    batch_tokens: pydantic.PositiveInt = 8192

    @pydantic.model_validator(mode="after")
    def _check(self) -> "EvaluationConfig":
        if not self.tasks and self.held_out_tokens is None and self.needle is None:
            raise ValueError("nothing to evaluate: tasks, held_out_tokens or needle")
        return self


class NeedleResult(NamedTuple):
    """Whether a cell's answer was the likeliest, token by token, and its -log p in nats."""

    cell: Cell
    found: bool
    nll: float


class Suite:
    """Tasks, held-out corpora and haystack, opened once."""

    def __init__(self, config: EvaluationConfig, held_out: dict[str, Corpus], tokenizer: Tokenizer):
        """Opens the data; no model yet.

        Raises:
          UserError: what is missing or damaged, by name.
        """
        self.config, self._tokenizer = config, tokenizer
        self._tasks = {name: tasks.load(name, place) for name, place in config.tasks.items()}
        self._held_out = held_out if config.held_out_tokens else {}
        if config.held_out_tokens and not held_out:
            raise UserError("evaluation.held_out_tokens: no source has held-out documents")
        self._haystack = None
        if config.needle:
            self._haystack = open_haystack(config.needle.haystack, tokenizer)

    @property
    def short_parts(self) -> list[str]:
        """The parts of the short-context evaluation, each measured at once."""
        return [*(f"task:{n}" for n in self._tasks), *(f"held_out:{n}" for n in self._held_out)]

    def short(self, part: str, scorer: Scorer) -> dict[str, Metric]:
        """The metrics of one part, named `<task>/acc` or `held_out/<source>`."""
        kind, name = part.split(":", 1)
        if kind == "task":
            found = metrics.answer(scorer, self._tokenizer, self._tasks[name], self.config.length)
            return {f"{name}/{key}": metric for key, metric in found.metrics().items()}
        tokens = self.config.held_out_tokens
        metric = metrics.held_out(scorer, self._held_out[name], self.config.length, tokens)
        return {f"held_out/{name}": metric}

    def needle(self, length: int, scorer: Scorer) -> list[NeedleResult]:
        """Every cell of the grid at one length."""
        config = self.config.needle
        grid = needle.cells(config, [length])
        requests = [needle.request(config, cell, self._haystack) for cell in grid]
        scores = scorer.score(requests, length)
        return [NeedleResult(c, s.greedy, s.nll) for c, s in zip(grid, scores, strict=True)]

    def check_lengths(self, lengths: Iterable[int]) -> None:
        """Refuses lengths that do not hold the needles.

        Raises:
          UserError: names the length.
        """
        for cell in needle.cells(self.config.needle, sorted(lengths)):
            needle.request(self.config.needle, cell, self._haystack)


def open_haystack(place: str, tokenizer: Tokenizer) -> Haystack:
    """A tokenised corpus's documents one after another, or the text of a file.

    Raises:
      UserError: neither, or of another tokenizer.
    """
    path = Path(place)
    if (path / DATASET_FILE).is_file():
        corpus = Corpus(path)
        if corpus.info.tokenizer != tokenizer.fingerprint:
            raise UserError(f"needle.haystack: {path} was made by another tokenizer")
        texts = [corpus.document(i).tokens[1:-1] for i in range(len(corpus))]
    elif path.is_file() and path.suffix == ".jsonl":
        pieces = documents.plan_pieces([path], 1 << 40)
        texts = [tokenizer.encode(d.text) for p in pieces for d in documents.read_piece(p)]
    elif path.is_file():
        texts = [tokenizer.encode(path.read_text(encoding="utf-8"))]
    else:
        raise UserError(f"needle.haystack: {path} is neither a tokenised corpus nor a text file")
    tokens = np.concatenate([np.zeros(0, np.int32), *(np.asarray(t, np.int32) for t in texts)])
    if not len(tokens):
        raise UserError(f"needle.haystack: {path} is empty")
    return Haystack(tokens, tokenizer)


def needle_summary(results: Sequence[NeedleResult]) -> dict[str, Any]:
    """Found and asked, in all and of each (keys, length, depth), as JSON."""
    grid: dict[tuple[int, int, float], list[bool]] = {}
    for cell, found, _ in results:
        grid.setdefault((cell.keys, cell.length, cell.depth), []).append(found)
    cells = [
        {"keys": k, "length": n, "depth": d, "found": sum(f), "asked": len(f)}
        for (k, n, d), f in grid.items()
    ]
    return {
        "found": sum(r.found for r in results),
        "asked": len(results),
        "nll": sum(r.nll for r in results) / len(results),
        "cells": cells,
    }
