"""Synthetic documents that ask for what they said before: natural text with key-value statements.

A tiny model does not learn from natural text alone to look far back; from these it does, so that it
can pass the needle gate by learning (a run without them is stopped there). Keys and values are those
of `llama3_jax.evaluation.needle`, but key, value and text are paired at random in each document, and
the gate's haystacks are held-out text.
"""

import json
import random
from collections.abc import Sequence
from pathlib import Path

from llama3_jax.evaluation.needle import KEYS, VALUES
from llama3_jax.files import write_text

SEED = 0
# Short, and the value right after its key: what a few million tokens can teach.
STATEMENT = " Note: {key} {value}."


def documents(texts: Sequence[str], count: int, longest: int) -> list[dict]:
    """`count` documents of up to `longest` characters of `texts`, which hold words with spaces.

    Half of them are short and hold little but statements: few keys to choose from are what a model
    learns to look back by. Each key is stated two to four times with the same value.
    """
    draw = random.Random(SEED)
    made = []
    for number in range(count):
        keys = draw.choice((1, 1, 2, 2, 3, 4))
        statements = []
        for key in draw.sample(KEYS, keys):
            statement = STATEMENT.format(key=key, value=draw.choice(VALUES))
            statements += [statement] * draw.randint(2, 4)
        draw.shuffle(statements)
        size = draw.randint(0, 100) if draw.random() < 0.5 else draw.randint(100, longest)
        words = _passage(draw, texts, max(size - sum(map(len, statements)), 0))
        places = sorted(draw.randint(0, len(words)) for _ in statements)
        if draw.random() < 0.5:
            places[-1] = len(words)  # as in the test: what is asked stands at the end
        parts, at = [], 0
        for place, statement in zip(places, statements, strict=True):
            parts += [" ".join(words[at:place]), statement.strip()]
            at = place
        parts.append(" ".join(words[at:]))
        made.append({"id": f"recall#{number}", "text": " ".join(filter(None, parts))})
    return made


def _passage(draw: random.Random, texts: Sequence[str], size: int) -> list[str]:
    """The words of about `size` characters in a row of some text."""
    text = draw.choice(texts)
    start = draw.randrange(max(len(text) - size, 1))
    return text[start : start + size].split(" ") if size else []


def write(path: Path, made: Sequence[dict]) -> None:
    write_text(path, "".join(json.dumps(d, ensure_ascii=False) + "\n" for d in made))
