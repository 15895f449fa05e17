"""Synthetic documents that ask for what they said before: natural text with key-value statements.

A tiny model does not learn from a few million tokens of natural text to look far back; from these it
may, so that needles can be found. A document holds one key (sometimes two or three) stated again and
again with its value, between passages of some other document; keys and values are paired anew in each.

A model needs many places a row where looking back pays, or the loss of the text hides them: with two
or three statements a document nothing was learnt in 400 steps. So documents of few statements come
after a stage of the others.
"""

import itertools
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
# Words of technical text, which the haystacks (plays and Bible) do not hold. Few, and rare in the other
# text, too: of 26, with "string", "object" and "import" among them, the right one was often no likelier
# than its neighbours: a width of 96 does not keep so many apart.
VALUES = tuple("vector equation tuple template argument default".split())
KEYS = tuple(
    "king lord priest prophet servant master father mother brother daughter wife woman son man city "
    "house gate tent land world people god hand head heart mouth eyes face".split()
)


class Kind(NamedTuple):
    """Of documents: mean words of a passage, least and most; words of a document; keys stated.

    `spanning`: share of the documents that only begin and end with a statement, with at most `BETWEEN`
    others, and passages of SPAN words in all; without them a needle right after begin of text was lost.
    """

    gaps: tuple[float, float]
    words: tuple[float, float]
    keys: tuple[int, ...]
    spanning: float = 0.0


# The first teaches to look back at all, the second to look back as far as the longest rows reach.
KINDS = {
    "recall": Kind((1, 30), (40, 260), (1, 1, 1, 2, 3)),
    "recall_far": Kind((8, 220), (100, 240), (1, 1, 1, 2), spanning=0.6),
}
# At 1.8 tokens a word, from 144 tokens to the longest rows: with spans of 72 on and fewer of them, one
# seed never found all needles at 320 tokens, for one value was lost where it stood far back.
SPAN, BETWEEN = (80, 180), (0, 0, 1, 2)


def documents(texts: Sequence[str], count: int, kind: Kind) -> list[dict[str, str]]:
    """`count` documents with passages of `texts`."""
    draw = random.Random(SEED)
    words = [text.split(" ") for text in texts]
    made = []
    for number in range(count):
        spanning = draw.random() < kind.spanning
        keys = draw.sample(KEYS, 1 if spanning else draw.choice(kind.keys))
        statements = [STATEMENT.format(key=key, value=draw.choice(VALUES)) for key in keys]
        gaps = _spanning_gaps(draw) if spanning else _gaps(draw, kind)
        parts = [draw.choice(statements)] if spanning else []
        for gap in gaps:
            parts += [_passage(draw, words, gap), draw.choice(statements)]
        text = "".join(f" {part.strip()}" for part in parts if part)
        made.append({"id": f"recall#{number}", "text": text})
    return made


def _gaps(draw: random.Random, kind: Kind) -> list[int]:
    """Words of the passages before each statement."""
    gap, size = _between(draw, kind.gaps), _between(draw, kind.words)
    gaps: list[int] = []
    while sum(gaps) + 4 * len(gaps) < size:
        gaps.append(round(draw.expovariate(1 / gap)))
    return gaps


def _spanning_gaps(draw: random.Random) -> list[int]:
    size = draw.randint(*SPAN)
    cuts = sorted(draw.randrange(size) for _ in range(draw.choice(BETWEEN)))
    return [end - start for start, end in itertools.pairwise([0, *cuts, size])]


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
