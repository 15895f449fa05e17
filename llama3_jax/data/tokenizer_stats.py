"""What tokenizers do to the same documents: compression by source and language, use of their ids."""

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.progress import Progress

from llama3_jax.data import tokenizer as tokenizers
from llama3_jax.data.documents import (
    DEFAULT_FIELDS,
    SUFFIXES,
    Fields,
    Piece,
    plan_pieces,
    read_piece,
)
from llama3_jax.data.workers import run_jobs
from llama3_jax.errors import UserError
from llama3_jax.files import atomic_path, write_json

STATS_FILE = "stats.json"
LISTED = 20  # longest and most used tokens that are named
PIECE_BYTES = 16 * 2**20
_BATCH = 200_000  # ids counted at once


class Encoder(NamedTuple):
    """`tokens`: the bytes of each id, empty for those that stand for none."""

    encode: Callable[[str], list[int]]
    tokens: list[bytes]


def load_encoder(path: str) -> Encoder:
    """A tokenizer that `tokenizer.load` reads, or a SentencePiece model such as Llama 2's.

    Raises:
      UserError: no such file, damaged, or the package for SentencePiece is missing.
    """
    if Path(path).is_file() and Path(path).suffix == ".model":
        with open(path, "rb") as file:
            if file.read(1) == b"\n":  # a protocol buffer; a line of base64 never begins so
                return _sentencepiece(path)
    loaded = tokenizers.load(path)
    tokens = sorted(loaded.ranks, key=loaded.ranks.__getitem__)
    return Encoder(loaded.encode, tokens + [b""] * loaded.specials)


def _sentencepiece(path: str) -> Encoder:
    try:
        import sentencepiece
    except ModuleNotFoundError:
        raise UserError(f"{path}: needs the package: pip install sentencepiece") from None
    try:
        model = sentencepiece.SentencePieceProcessor(model_file=path)
    except (RuntimeError, OSError) as error:
        raise UserError(f"{path}: damaged SentencePiece model ({error})") from None
    tokens = []
    for number in range(model.vocab_size()):
        piece = model.id_to_piece(number)
        if model.is_byte(number):
            tokens.append(bytes([int(piece[1:-1], 16)]))
        elif model.is_control(number) or model.is_unknown(number):
            tokens.append(b"")
        else:
            tokens.append(piece.replace("\u2581", " ").encode())
    return Encoder(model.encode, tokens)


def measure(
    inputs: list[Path], paths: Mapping[str, str], fields: Fields = DEFAULT_FIELDS, workers: int = 1
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Statistics of tokenizers, by name, on documents; and how often each of their ids was used.

    The source of a document is the name of its file, or of the folder that holds part-00000 and so
    on. A word is what white space separates.

    Raises:
      UserError: an input or tokenizer that can't be read, or no text.
    """
    if not paths:
        raise UserError("no tokenizer: give --tokenizers=name=path,…")
    encoders = {name: load_encoder(path) for name, path in paths.items()}
    jobs = [(piece, dict(paths), fields) for piece in plan_pieces(inputs, PIECE_BYTES)]
    cells: dict[tuple[str, str], dict[str, Any]] = {}
    usage = {name: np.zeros(len(encoder.tokens), np.int64) for name, encoder in encoders.items()}
    with Progress(transient=True, disable=not sys.stderr.isatty()) as progress:
        results = run_jobs(_measure_piece, jobs, workers)
        for part, used in progress.track(results, total=len(jobs), description="measuring"):
            for key, cell in part.items():
                _add(cells.setdefault(key, _empty(paths)), cell)
            for name, counts in used.items():
                usage[name] += counts
    if not cells:
        raise UserError(f"{inputs[0]}: no document with text in the input")
    return {
        "tokenizers": {
            name: {"path": str(paths[name]), **_use(encoder.tokens, usage[name])}
            for name, encoder in encoders.items()
        },
        "texts": [
            {"source": source, "language": language, **_ratios(cell)}
            for (source, language), cell in sorted(cells.items())
        ],
        "all": _ratios(_total(list(cells.values()), paths)),
    }, usage


def save(stats: Mapping[str, Any], usage: Mapping[str, np.ndarray], directory: Path) -> None:
    """Writes stats.json, and usage_<name>.npy with the number of times that each id was used."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, counts in usage.items():
        path = directory / f"usage_{name}.npy"
        with atomic_path(path) as temporary, open(temporary, "wb") as file:
            np.save(file, counts)
    write_json(directory / STATS_FILE, stats)


def source_name(path: Path) -> str:
    name = next(path.name.removesuffix(s) for s in SUFFIXES if path.name.endswith(s))
    return path.parent.name if re.fullmatch(r"part-\d+", name) else name


def _measure_piece(job: tuple[Piece, dict[str, str], Fields]) -> tuple[dict, dict[str, np.ndarray]]:
    piece, paths, fields = job
    encoders = {name: load_encoder(path) for name, path in paths.items()}
    usage = {name: np.zeros(len(encoder.tokens), np.int64) for name, encoder in encoders.items()}
    waiting: dict[str, list[int]] = {name: [] for name in encoders}
    cells: dict[tuple[str, str], dict[str, Any]] = {}

    def count(name: str) -> None:
        usage[name] += np.bincount(np.array(waiting[name], np.int64), minlength=len(usage[name]))
        waiting[name].clear()

    for document in read_piece(piece, fields):
        key = source_name(piece.path), document.language
        cell = cells.setdefault(key, _empty(encoders))
        text = document.text
        counted = {
            "documents": 1,
            "characters": len(text),
            "bytes": len(text.encode()),
            "words": len(text.split()),
            "tokens": {},
        }
        for name, encoder in encoders.items():
            ids = encoder.encode(text)
            counted["tokens"][name] = len(ids)
            waiting[name] += ids
            if len(waiting[name]) > _BATCH:
                count(name)
        _add(cell, counted)
    for name in encoders:
        count(name)
    return cells, usage


def _empty(names: Mapping | Sequence) -> dict[str, Any]:
    numbers = dict.fromkeys(("documents", "characters", "bytes", "words"), 0)
    return {**numbers, "tokens": dict.fromkeys(names, 0)}


def _add(total: dict[str, Any], part: Mapping[str, Any]) -> None:
    for key, value in part.items():
        if isinstance(value, Mapping):
            _add(total[key], value)
        else:
            total[key] += value


def _total(cells: list[dict], names: Mapping) -> dict[str, Any]:
    total = _empty(names)
    for cell in cells:
        _add(total, cell)
    return total


def _ratios(cell: dict[str, Any]) -> dict[str, Any]:
    tokens = cell["tokens"]
    return cell | {
        "characters_per_token": {name: cell["characters"] / n for name, n in tokens.items()},
        "bytes_per_token": {name: cell["bytes"] / n for name, n in tokens.items()},
        "tokens_per_word": {name: n / cell["words"] for name, n in tokens.items()},
    }


def _use(tokens: list[bytes], counts: np.ndarray) -> dict[str, Any]:
    """How much of a vocabulary was used, its most used tokens with their shares, its longest."""
    longest = sorted(range(len(tokens)), key=lambda i: (-len(tokens[i]), i))[:LISTED]
    most = np.argsort(-counts, kind="stable")[:LISTED]
    total = max(int(counts.sum()), 1)
    return {
        "vocab_size": len(tokens),
        "used": int((counts > 0).sum()),
        "used_share": float((counts > 0).mean()),
        "most_used": [_token(tokens, i) | {"share": float(counts[i]) / total} for i in most],
        "longest": [
            _token(tokens, i) | {"bytes": len(tokens[i]), "share": float(counts[i]) / total}
            for i in longest
        ],
    }


def _token(tokens: list[bytes], number: int) -> dict[str, Any]:
    return {"id": int(number), "text": tokens[number].decode(errors="replace")}
