"""Synthetic documents that ask for what they said before: natural text with key-value statements.

A tiny model does not learn from a few million tokens of natural text to look far back; from these it
may, so that needles can be found. A document holds one key (sometimes two or three) stated again and
again with its value, between passages of some other document; keys and values are paired anew in each.

A model needs many places a row where looking back pays, or the loss of the text hides them: with two
or three statements a document nothing was learnt in 400 steps. So documents of few statements come
after a stage of the others.
"""

import bisect
import itertools
import json
import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from llama3_jax.data.corpus import Corpus
from llama3_jax.files import write_text

SEED = 0
# Short, and the value right after its key.
STATEMENT = " Note: {key} {value}."
# Words of technical text, which the haystacks (plays and Bible) do not hold: of keys that plays are full
# of (master, son, king) more needles were lost. Few values, and rare ones: of 26, with "string", "object"
# and "import" among them, the right one was often no likelier than its neighbours.
KEYS = tuple(
    "matrix integer polynomial module session password cursor column query cache label context series "
    "dictionary database precision".split()
)
VALUES = tuple("vector equation tuple template argument default".split())


class Kind(NamedTuple):
    """Of documents, in tokens: mean of a passage, least and most; a document, least and most. Keys stated.

    `once`: share of the documents that are made as needles are: one statement, which the document's end
    repeats; half of them begin with it, the others have it anywhere. Of others, few begin with a
    statement or are as long as a row, and a needle right after begin of text was lost.
    """

    gaps: tuple[float, float]
    size: tuple[float, float]
    keys: tuple[int, ...]
    once: float = 0.0


# The first teaches to look back at all, the second to look back as far as the longest rows reach.
KINDS = {
    "recall": Kind((2, 54), (72, 470), (1, 1, 1, 2, 3)),
    "recall_far": Kind((14, 400), (180, 430), (1, 1, 1, 2), once=0.7),
}
# The demo's rows behind gates, in tokens, and the proportions of the documents with one statement that
# are made for each: they fill three quarters of a row or more, but no more than it, lest they be cut.
ROWS, ROW_WEIGHTS = (192, 256, 320), (1, 2, 4)
LEAST_FILLED = 0.75
# A statement's tokens; begin and end of text.
STATED, ENDS = 6, 2


class Text(NamedTuple):
    """Its words, parted at blanks, and how many tokens lie before each and, at last, in all."""

    words: list[str]
    before: list[int]


def split(text: str, tokens: Callable[[str], int]) -> Text:
    words = text.split(" ")
    return Text(words, [0, *itertools.accumulate(tokens(f" {word}") for word in words)])


def documents(
    texts: Sequence[str], count: int, kind: Kind, tokens: Callable[[str], int]
) -> list[dict[str, str]]:
    """`count` documents with passages of `texts`; `tokens` counts those of a piece of text."""
    draw = random.Random(SEED)
    sources = [split(text, tokens) for text in texts]
    made = []
    for number in range(count):
        once = draw.random() < kind.once
        keys = draw.sample(KEYS, 1 if once else draw.choice(kind.keys))
        statements = [STATEMENT.format(key=key, value=draw.choice(VALUES)) for key in keys]
        parts: list[str] = []
        for gap in _once_gaps(draw) if once else _gaps(draw, kind):
            parts += [_passage(draw, sources, gap), draw.choice(statements)]
        text = "".join(f" {part.strip()}" for part in parts if part)
        made.append({"id": f"recall#{number}", "text": text})
    return made


def _gaps(draw: random.Random, kind: Kind) -> list[int]:
    """Tokens of the passages before each statement."""
    gap, size = _between(draw, kind.gaps), _between(draw, kind.size)
    gaps: list[int] = []
    while sum(gaps) + STATED * len(gaps) < size:
        gaps.append(round(draw.expovariate(1 / gap)))
    return gaps


def _once_gaps(draw: random.Random) -> list[int]:
    (row,) = draw.choices(ROWS, ROW_WEIGHTS)
    size = round(row * draw.uniform(LEAST_FILLED, 1)) - ENDS - 2 * STATED
    before = draw.choice((0, draw.randrange(size)))
    return [before, size - before]


def _between(draw: random.Random, ends: tuple[float, float]) -> float:
    """Between the ends, evenly in logarithms."""
    return math.exp(draw.uniform(*map(math.log, ends)))


def _passage(draw: random.Random, texts: Sequence[Text], tokens: int) -> str:
    """So many tokens at most, of whole words."""
    words, before = draw.choice(texts)
    start = draw.randrange(max(bisect.bisect_left(before, before[-1] - tokens), 1))
    end = bisect.bisect_right(before, before[start] + tokens) - 1
    return " ".join(words[start:end])


def write(corpus: Path, result: Path, count: int, kind: Kind) -> None:
    """`count` documents with passages of a tokenised corpus, as JSON lines."""
    source = Corpus(corpus)
    tokenizer = source.tokenizer()
    texts = [tokenizer.decode(source.document(i).tokens[1:-1].tolist()) for i in range(len(source))]
    made = documents(texts, count, kind, lambda text: len(tokenizer.encode(text)))
    write_text(result, "".join(json.dumps(d, ensure_ascii=False) + "\n" for d in made))
