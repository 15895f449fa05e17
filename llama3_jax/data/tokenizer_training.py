"""Trains a tokenizer on documents, on top of a base: cl100k's 100K tokens and 28K more, say.

The base's ids stay as they are; new tokens get the next ones, the specials those after them
(Llama 3 paper, section 3.2). See `bpe` for what a merge is.
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from llama3_jax.data import bpe, pretokens
from llama3_jax.data.documents import Fields, plan_pieces
from llama3_jax.data.tokenizer import LLAMA3_SPECIALS, Tokenizer
from llama3_jax.errors import UserError
from llama3_jax.files import write_json

TRAINING_FILE = "training.json"
BYTES = {bytes([byte]): byte for byte in range(256)}


class Options(NamedTuple):
    """`weights`: by language, decimals that multiply the counts of its documents.

    `holdout`: share of documents left out, those that tokenising puts into validation.
    `covered`: pre-tokens that the base encodes with at least so many characters a token are left
    out. `max_pretokens`: how many different ones are kept (about 1 KB of memory each).
    """

    fields: Fields = Fields()
    weights: Mapping[str, str] = {}
    holdout: float = 0.0
    covered: float | None = None
    max_pretokens: int = 4_000_000
    specials: int = LLAMA3_SPECIALS


def train(
    inputs: list[Path],
    base: Mapping[bytes, int],
    new_tokens: int,
    options: Options,
    workers: int = 1,
) -> tuple[Tokenizer, dict[str, Any]]:
    """A tokenizer with the ranks of `base` and `new_tokens` more, and the record of its training.

    The result depends on the text, the base and the options alone, not on `workers`.

    Raises:
      UserError: bad options or input, no text, or more tokens than can be merged.
    """
    if new_tokens < 1:
        raise UserError(f"--new_tokens={new_tokens}: must be at least 1")
    if not 0 <= options.holdout < 1:
        raise UserError(f"--holdout={options.holdout}: must be at least 0 and below 1")
    if options.max_pretokens < 1:
        raise UserError(f"--max_pretokens={options.max_pretokens}: must be at least 1")
    if options.covered is not None and options.covered <= 0:
        raise UserError(f"--covered={options.covered}: must be above 0")
    if options.specials < 2:
        raise UserError(f"--specials={options.specials}: begin and end of text need 2")
    pieces = plan_pieces(inputs, pretokens.PIECE_BYTES)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, transient=True, disable=not sys.stderr.isatty()) as progress:
        reading = progress.add_task("counting pre-tokens", total=len(pieces))
        merging = progress.add_task("merging", total=new_tokens, start=False)
        counted = pretokens.count(
            pieces,
            options.fields,
            options.weights,
            options.holdout,
            options.max_pretokens,
            workers,
            lambda: progress.advance(reading),
        )
        counts, covered = counted.counts, 0
        if options.covered is not None:
            counts = _without_covered(base, counts, options.covered)
            covered = len(counted.counts) - len(counts)
        progress.start_task(merging)
        ranks = bpe.extend(
            base, counts, new_tokens, lambda done: progress.update(merging, completed=done)
        )
    trained = Tokenizer(ranks, options.specials)
    record = {
        "base_tokens": len(base),
        "new_tokens": new_tokens,
        "fingerprint": trained.fingerprint,
        "inputs": [str(path) for path in inputs],
        "languages": dict(sorted(counted.languages.items())),
        "weights": dict(options.weights),
        "holdout": options.holdout,
        "pretokens": counted.distinct,
        "rare_left_out": counted.left_out,
        "rare_left_out_share": counted.left_out_share,
        "covered": options.covered,
        "covered_left_out": covered,
    }
    return trained, record


def save(trained: Tokenizer, record: Mapping[str, Any], directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / TRAINING_FILE, record)
    trained.save(directory)


def _without_covered(
    base: Mapping[bytes, int], counts: dict[str, int], least: float
) -> dict[str, int]:
    """The pre-tokens of which a base's token holds fewer than `least` characters."""
    words = list(counts)
    _, tokens = bpe.split(base, words)
    characters = np.array([len(word) for word in words])
    poorly = characters < least * tokens
    return {words[i]: counts[words[i]] for i in np.flatnonzero(poorly).tolist()}
