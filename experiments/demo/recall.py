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
# Mean words between two statements of a document, least and most; words of a document.
GAPS, WORDS = (1, 30), (40, 260)


def documents(texts: Sequence[str], count: int) -> list[dict[str, str]]:
    """`count` documents with passages of `texts`."""
    draw = random.Random(SEED)
    words = [text.split(" ") for text in texts]
    made = []
    for number in range(count):
        keys = draw.sample(KEYS, draw.choice((1, 1, 1, 2, 3)))
        statements = [STATEMENT.format(key=key, value=draw.choice(VALUES)) for key in keys]
        gap, size = _between(draw, GAPS), _between(draw, WORDS)
        parts: list[str] = []
        length = 0.0
        while length < size:
            passage = _passage(draw, words, round(draw.expovariate(1 / gap)))
            parts += [passage, draw.choice(statements)] if passage else [draw.choice(statements)]
            length += len(passage.split(" ")) + 4
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


def write(corpus: Path, result: Path, count: int) -> None:
    """`count` documents with passages of a tokenised corpus, as JSON lines."""
    source = Corpus(corpus)
    tokenizer = source.tokenizer()
    texts = [tokenizer.decode(source.document(i).tokens[1:-1].tolist()) for i in range(len(source))]
    lines = (json.dumps(d, ensure_ascii=False) + "\n" for d in documents(texts, count))
    write_text(result, "".join(lines))
