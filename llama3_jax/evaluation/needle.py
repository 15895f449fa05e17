"""Needle in a haystack: a statement hidden at a depth of a long natural text, asked for at its end.

A cell of the grid is (length, depth, keys): haystacks of exactly `length` tokens, begin of text and
answer included, the needle at `depth` (0 the start, 1 the end) among `keys` - 1 others with other
keys at random places. The answer is teacher-forced: that each of its tokens is the likeliest equals
greedy exact match, and takes one forward pass and no cache. (Kamradt 2023, Needle In A Haystack;
several keys after Hsieh et al. 2024, RULER, arXiv 2404.06654.)
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pydantic
from jaxtyping import Int

from llama3_jax.data.tokenizer import Tokenizer
from llama3_jax.errors import UserError
from llama3_jax.evaluation.scoring import Request
from llama3_jax.schema import Config

STATEMENT = " The secret word of the {key} is {value}."
# What {key} and {value} may be: common words, and no word is both.
KEYS = tuple(
    "king lord priest prophet servant master father mother brother daughter wife woman son man city "
    "house gate tent land world people god hand head heart mouth eyes face".split()
)
VALUES = tuple(
    "gold bread fire sword crown sea earth heaven night day year month law peace death life blood "
    "soul spirit flesh voice power glory shame truth table evil faith".split()
)
# The needle goes to the end of a sentence at most so many tokens before its depth.
_SNAP = 64


class NeedleConfig(Config):
    """What is asked. `haystack` is a tokenised corpus, or a file of text.

    `depths` places from 0 to 1, `seeds` haystacks a cell, `keys` how many needles are in one; their
    keys and values are drawn from the words.
    `lengths` are those of the evaluation alone; a gate takes those of the stages so far.
    """

    haystack: str
    lengths: tuple[pydantic.PositiveInt, ...] = ()
    depths: pydantic.PositiveInt = 11
    seeds: pydantic.PositiveInt = 5
    keys: tuple[pydantic.PositiveInt, ...] = (1,)
    statement: str = STATEMENT
    key_words: tuple[str, ...] = KEYS
    value_words: tuple[str, ...] = VALUES

    @pydantic.model_validator(mode="after")
    def _check(self) -> "NeedleConfig":
        fields = self.statement.split("{key}")
        if len(fields) != 2 or fields[1].count("{value}") != 1 or "{value}" in fields[0]:
            raise ValueError("statement must hold {key} and, after it, {value}, each once")
        if self.depths < 2:
            raise ValueError("depths must be 2 or more: the start, the end and places between")
        names = min(len(self.key_words), len(self.value_words))
        if max(self.keys) > names:
            raise ValueError(f"keys: at most {names} needles have names")
        return self

    def depth_values(self) -> list[float]:
        return np.linspace(0, 1, self.depths).tolist()


class Cell(NamedTuple):
    """One question. `depth` 0 is right after begin of text, 1 right before the question."""

    length: int
    depth: float
    keys: int
    seed: int


def cells(config: NeedleConfig, lengths: Sequence[int]) -> list[Cell]:
    """Every question of the grid."""
    grid = itertools.product(lengths, config.depth_values(), config.keys, range(config.seeds))
    return [Cell(*cell) for cell in grid]


class Haystack:
    """Natural text as one long line of tokens, from which haystacks of any length are cut."""

    def __init__(self, tokens: Int[np.ndarray, "tokens"], tokenizer: Tokenizer):
        self.tokens, self.tokenizer = np.asarray(tokens, np.int32), tokenizer
        ends = {t for token, t in tokenizer.ranks.items() if token.rstrip().endswith(b".")}
        self._sentence_end = np.isin(self.tokens, sorted(ends))

    def cut(self, start: int, size: int) -> tuple[np.ndarray, np.ndarray]:
        """`size` tokens from `start` on, from the beginning again where the text ends.

        And where it may be parted: after the end of a sentence.
        """
        at = (start + np.arange(size)) % len(self.tokens)
        return self.tokens[at], self._sentence_end[at]


def request(config: NeedleConfig, cell: Cell, haystack: Haystack) -> Request:
    """The cell's haystack and question, and the answer's tokens.

    Raises:
      UserError: the length does not hold needles, question and answer.
    """
    # The same seed draws the same names, text and other needles at all depths and lengths.
    draw = np.random.default_rng([cell.seed, cell.keys])
    keys = draw.permutation(config.key_words)[: cell.keys].tolist()
    values = draw.permutation(config.value_words)[: cell.keys].tolist()
    start = int(draw.integers(len(haystack.tokens)))
    depths = [cell.depth, *draw.random(cell.keys - 1).tolist()]

    encode = haystack.tokenizer.encode
    statements = [
        encode(config.statement.format(key=key, value=value))
        for key, value in zip(keys, values, strict=True)
    ]
    before, after = config.statement.split("{value}")
    question = encode(before.format(key=keys[0]).rstrip(" "))
    gap = before[len(before.rstrip(" ")) :]
    answer = encode(gap + values[0])
    size = cell.length - 1 - sum(map(len, statements)) - len(question) - len(answer)
    if size < 0:
        raise UserError(
            f"needle length {cell.length} is too short for {cell.keys} needle(s), the question and "
            f"the answer: at least {cell.length - size} tokens"
        )
    text, ends = haystack.cut(start, size)
    places = [_place(depth, ends) for depth in depths]
    parts, at = [np.array([haystack.tokenizer.bos])], 0
    for place, statement in sorted(zip(places, statements, strict=True), key=lambda p: p[0]):
        parts += [text[at:place], statement]
        at = place
    parts += [text[at:], question]
    return Request(np.concatenate(parts).astype(np.int32), np.array(answer, np.int32))


def _place(depth: float, ends: np.ndarray) -> int:
    """The tokens before a depth, back to the end of a sentence where one is near."""
    place = round(depth * len(ends))
    if place in (0, len(ends)):
        return place
    near = np.flatnonzero(ends[max(place - _SNAP, 0) : place])
    return place if not len(near) else max(place - _SNAP, 0) + int(near[-1]) + 1
