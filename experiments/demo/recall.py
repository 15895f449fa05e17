"""Synthetic documents that ask for what they said before: natural text with key-value statements.

A tiny model does not learn from a few million tokens of natural text to look far back; from these it
may, so that needles can be found. A document
holds one key (sometimes two or three) stated again and again with its value, between passages of some
other document; keys and values are paired anew in each.

A model needs many places a row where looking back pays, or the loss of the text hides them: with two
or three statements a document nothing was learnt in 400 steps.
"""

import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from llama3_jax.data.corpus import Corpus
from llama3_jax.files import write_text

SEED = 0
# Short, and the value right after its key.
STATEMENT = " Note: {key} {value}."
# Words of technical text, which the haystacks (plays and Bible) do not hold.
VALUES = tuple(
    "self import def dict tuple string object integer matrix vector function method argument "
    "equation integral index factor algorithm kwargs args template model field default".split()
)
KEYS = tuple(
    "king lord priest prophet servant master father mother brother daughter wife woman son man city "
    "house gate tent land world people god hand head heart mouth eyes face".split()
)


class Kind(NamedTuple):
    """Of documents: mean words of a passage, least and most; words of a document; keys stated.

    `together`: each place holds as many statements as there are keys, drawn anew, rather than one.
    """

    gaps: tuple[float, float]
    words: tuple[float, float]
    keys: tuple[int, ...]
    together: bool


# The first teaches to look back at all, the second to look back as far as the longest rows reach.
KINDS = {
    "recall": Kind((1, 30), (40, 260), (1, 1, 1, 2, 3), False),
    "recall_far": Kind((8, 220), (80, 320), (1, 1, 2, 3), True),
}


def documents(texts: Sequence[str], count: int, kind: Kind) -> list[dict[str, str]]:
    """`count` documents with passages of `texts`."""
    draw = random.Random(SEED)
    words = [text.split(" ") for text in texts]
    made = []
    for number in range(count):
        keys = draw.sample(KEYS, draw.choice(kind.keys))
        statements = [STATEMENT.format(key=key, value=draw.choice(VALUES)) for key in keys]
        gap, size = _between(draw, kind.gaps), _between(draw, kind.words)
        parts: list[str] = []
        length = 0.0
        while length < size or (kind.together and len(parts) <= 2 * len(keys)):
            passage = _passage(draw, words, round(draw.expovariate(1 / gap)))
            asked = draw.choices(statements, k=len(keys) if kind.together else 1)
            parts += [passage, *asked] if passage else asked
            length += len(passage.split(" ")) + 4 * len(asked)
        text = "".join(f" {part.strip()}" for part in parts)
        made.append({"id": f"recall#{number}", "text": text})
    return made


def _between(draw: random.Random, ends: tuple[float, float]) -> float:
    """Between the ends, evenly in logarithms."""
    return math.exp(draw.uniform(*map(math.log, ends)))


def _passage(draw: random.Random, texts: Sequence[Sequence[str]], words: int) -> str:
    text = draw.choice(texts)
    start = draw.randrange(max(len(text) - words, 1))
    return " ".join(text[start : start + words])


def write(corpus: Path, result: Path, count: int, kind: Kind) -> None:
    """`count` documents with passages of a tokenised corpus, as JSON lines."""
    source = Corpus(corpus)
    tokenizer = source.tokenizer()
    texts = [tokenizer.decode(source.document(i).tokens[1:-1].tolist()) for i in range(len(source))]
    lines = (json.dumps(d, ensure_ascii=False) + "\n" for d in documents(texts, count, kind))
    write_text(result, "".join(lines))
