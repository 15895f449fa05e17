"""Stage: documents that hold parts of evaluation sets, by n-grams of words.

As GPT-3 did it (Brown et al. 2020, arXiv 2005.14165, appendix C): words in lower case without
punctuation, 13 in a row. The Llama 3 paper (section 5.1.4) takes 8 tokens in a row to ask how much of
an evaluation set the corpus holds: `report` answers that, by the same n as the stage, and n = 8 is
one setting. Words of scripts without spaces are characters (curation/lexing.py).
"""

import functools
import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import daft
import numpy as np
import pydantic
from daft import DataType, col
from jaxtyping import Int

from llama3_jax.curation.lexing import words
from llama3_jax.errors import UserError
from llama3_jax.files import write_json
from llama3_jax.schema import Config

VERSION = 1
_RESULT = DataType.struct(
    {
        "contamination_grams": DataType.list(DataType.int64()),
        "contamination_benchmarks": DataType.list(DataType.string()),
        "reason": DataType.string(),
    }
)
_FACTOR = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio, odd


class Benchmark(Config):
    """A jsonl of an evaluation set, an example a line; without `fields` all its text is taken."""

    path: str
    fields: tuple[str, ...] = ()


class ContaminationConfig(Config):
    """Evaluation sets by name.

    A document with `min_grams` different `ngram`-word sequences of them is rejected, if `remove`
    says so. An example of fewer words than `ngram` cannot be found and is counted as such.
    """

    benchmarks: dict[str, Benchmark]
    ngram: int = pydantic.Field(13, ge=2, le=64)
    min_grams: pydantic.PositiveInt = 1
    remove: bool = True


def contamination(
    frame: daft.DataFrame, config: ContaminationConfig, scratch: Path
) -> daft.DataFrame:
    """Adds `contamination_grams` (numbers of the n-grams found) and `contamination_benchmarks`.

    Reasons: "contaminated" and "contamination_failed".

    Raises:
      UserError: an evaluation set that is missing, damaged, or holds no n-gram.
    """
    index_of(config)
    return frame.select("*", _search(col("text"), config))


def report(frame: daft.DataFrame, config: ContaminationConfig) -> dict[str, dict[str, Any]]:
    """What a frame that went through the stage holds of each evaluation set.

    For each: `examples`; `too_short` of them; `touched`, with an n-gram in a document; `covered`,
    the mean over the others of the share of their words that lie in n-grams found (the Llama 3
    paper's measure); `documents` that hold any.
    """
    index = index_of(config)
    found = frame.select("contamination_grams").explode("contamination_grams").distinct()
    grams = [gram for gram in found.to_pydict()["contamination_grams"] if gram is not None]
    hit = np.zeros(len(index.hashes), bool)
    hit[grams] = True
    benchmarks = frame.select("contamination_benchmarks").explode("contamination_benchmarks")
    counted = benchmarks.groupby("contamination_benchmarks").agg(
        col("contamination_benchmarks").count().alias("n")
    )
    counted = counted.to_pydict()
    documents = dict(zip(counted["contamination_benchmarks"], counted["n"], strict=True))
    result = {}
    for name in config.benchmarks:
        shares = [
            _covered(hit[example.grams], config.ngram)
            for example in index.examples
            if example.benchmark == name and len(example.grams)
        ]
        examples = sum(example.benchmark == name for example in index.examples)
        result[name] = {
            "examples": examples,
            "too_short": examples - len(shares),
            "touched": sum(share > 0 for share in shares),
            "covered": float(np.mean(shares)) if shares else 0.0,
            "documents": int(documents.get(name, 0)),
        }
    return result


def write_report(path: Path, frame: daft.DataFrame, config: ContaminationConfig) -> None:
    write_json(path, {"ngram": config.ngram, "benchmarks": report(frame, config)})


def _covered(hit: np.ndarray, n: int) -> float:
    """The share of words that lie in an n-gram that was found; `hit` says of each n-gram."""
    edges = np.zeros(len(hit) + n, np.int64)
    edges[: len(hit)] += hit
    edges[n:] -= hit
    return float(np.mean(np.cumsum(edges)[:-1] > 0)) if len(hit) > 0 else 0.0


# ------------------------------------------------------------ the evaluation sets


class Example(NamedTuple):
    """Which n-grams of the index an example consists of, in order; none if it is too short."""

    benchmark: str
    grams: Int[np.ndarray, " grams"]


class Index(NamedTuple):
    """All n-grams of all evaluation sets, by number.

    `vocabulary` numbers their words from 0; `order` sorts `hashes`, which has one entry an n-gram;
    `rows` hold its words' numbers; `benchmarks` the sets that have it.
    """

    vocabulary: dict[str, int]
    hashes: np.ndarray
    rows: Int[np.ndarray, "grams n"]
    benchmarks: tuple[frozenset[str], ...]
    examples: tuple[Example, ...]


def index_of(config: ContaminationConfig) -> Index:
    """The index, built once in a process while the files stay as they are.

    Raises:
      UserError: an evaluation set that is missing, damaged, or holds no n-gram.
    """
    if not config.benchmarks:
        raise UserError("contamination.benchmarks is empty: name at least one evaluation set")
    for name, benchmark in config.benchmarks.items():
        if not Path(benchmark.path).is_file():
            raise UserError(f"contamination.benchmarks.{name}: {benchmark.path} not found")
    changed = tuple(Path(b.path).stat().st_mtime_ns for b in config.benchmarks.values())
    return _index(config.model_dump_json(), changed)


@functools.lru_cache(maxsize=2)
def _index(values: str, _changed: tuple[int, ...]) -> Index:
    config = ContaminationConfig.model_validate_json(values)
    vocabulary: dict[str, int] = {}
    texts: list[tuple[str, np.ndarray]] = []
    for name, benchmark in config.benchmarks.items():
        before = len(texts)
        for text in _examples(name, benchmark):
            numbers = [vocabulary.setdefault(word, len(vocabulary)) for word in words(text)]
            texts.append((name, np.array(numbers, np.int64)))
        if not any(len(numbers) >= config.ngram for _, numbers in texts[before:]):
            raise UserError(
                f"contamination.benchmarks.{name}: none of the {len(texts) - before} examples in "
                f"{benchmark.path} has {config.ngram} words; a smaller ngram would do"
            )
    windows = [_windows(numbers, config.ngram) for _, numbers in texts]
    rows, inverse = np.unique(np.concatenate(windows), axis=0, return_inverse=True)
    hashes = _hashes(rows)
    order = np.argsort(hashes, kind="stable")
    if (hashes[order][1:] == hashes[order][:-1]).any():
        raise UserError("contamination: two n-grams have one hash; another ngram would do")
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    numbers = place[inverse.reshape(-1)]
    ends = list(itertools.accumulate(map(len, windows)))
    examples = tuple(
        Example(name, numbers[end - len(window) : end])
        for (name, _), window, end in zip(texts, windows, ends, strict=True)
    )
    benchmarks: list[set[str]] = [set() for _ in range(len(rows))]
    for example in examples:
        for gram in example.grams.tolist():
            benchmarks[gram].add(example.benchmark)
    return Index(
        vocabulary, hashes[order], rows[order], tuple(map(frozenset, benchmarks)), examples
    )


def _examples(name: str, benchmark: Benchmark) -> Iterator[str]:
    path = Path(benchmark.path)
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        where = f"contamination.benchmarks.{name}: {path}:{number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{where}: not a line of JSON ({error})") from None
        if benchmark.fields:
            given = row if isinstance(row, dict) else {}
            if missing := sorted(set(benchmark.fields) - set(given)):
                raise UserError(
                    f"{where}: no field {missing[0]!r}; it has {', '.join(given) or 'none'}"
                )
            row = [row[field] for field in benchmark.fields]
        yield " ".join(_strings(row))


def _strings(value: Any) -> Iterator[str]:
    """All text in a JSON value, in order."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from itertools.chain.from_iterable(map(_strings, value.values()))
    elif isinstance(value, list):
        yield from itertools.chain.from_iterable(map(_strings, value))


# ------------------------------------------------------------ the search


def _windows(numbers: np.ndarray, n: int) -> Int[np.ndarray, "windows n"]:
    if len(numbers) < n:
        return np.zeros((0, n), np.int64)
    return np.lib.stride_tricks.sliding_window_view(numbers, n)


def _hashes(rows: np.ndarray) -> np.ndarray:
    """Polynomial hashes modulo 2^64 of rows of numbers."""
    found = np.zeros(len(rows), np.uint64)
    for column in rows.T:
        found = found * _FACTOR + column.astype(np.uint64) + np.uint64(1)
    return found


def _found(index: Index, texts: Iterable[str]) -> list[np.ndarray]:
    """The numbers of the index's n-grams in each text, each once, in order.

    A word that no evaluation set has is -1, and so is a gap between texts: all are searched at
    once. Hashes only propose; the words are compared.
    """
    n = index.rows.shape[1]
    get, numbers, ends = index.vocabulary.get, [], []
    for text in texts:
        numbers += [get(word, -1) for word in words(text)]
        numbers.append(-1)
        ends.append(len(numbers))
    flat = np.array(numbers, np.int64)
    known = np.cumsum(np.concatenate([[0], flat >= 0]))
    starts = np.flatnonzero(known[n:] - known[:-n] == n) if len(flat) >= n else np.zeros(0, int)
    candidates = flat[starts[:, None] + np.arange(n)]
    hashes = _hashes(candidates)
    place = np.minimum(np.searchsorted(index.hashes, hashes), len(index.hashes) - 1)
    hit = index.hashes[place] == hashes
    hit[hit] = (index.rows[place[hit]] == candidates[hit]).all(axis=1)
    starts, place = starts[hit], place[hit]
    cuts = np.searchsorted(starts, [0, *ends])
    return [np.unique(place[a:b]) for a, b in itertools.pairwise(cuts)]


@daft.func.batch(return_dtype=_RESULT, unnest=True)
def _search(text: daft.Series, config: ContaminationConfig):
    index = index_of(config)
    array = text.to_arrow()
    readable: dict[int, str] = {}
    for row in range(len(array)):
        try:
            if (value := array[row].as_py()) is not None:
                readable[row] = value
        except UnicodeDecodeError:
            continue
    found = dict(zip(readable, _found(index, readable.values()), strict=True))
    rows = []
    for row in range(len(array)):
        if row not in found:
            rows.append({"contamination_grams": [], "contamination_benchmarks": [],
                         "reason": "contamination_failed"})  # fmt: skip
            continue
        grams = found[row].tolist()
        named = sorted(set().union(*(index.benchmarks[gram] for gram in grams)))
        rejected = config.remove and len(grams) >= config.min_grams
        rows.append({"contamination_grams": grams, "contamination_benchmarks": named,
                     "reason": "contaminated" if rejected else None})  # fmt: skip
    return rows
