"""Haystacks of exact length with the needle where it should be."""

import numpy as np
import pytest

from llama3_jax.data.tokenizer import Tokenizer
from llama3_jax.errors import UserError
from llama3_jax.evaluation.needle import KEYS, VALUES, Haystack, NeedleConfig, cells, request
from llama3_jax.schema import parse

TOKENIZER = Tokenizer({bytes([byte]): byte for byte in range(256)}, specials=2)
TEXT = "It was a dark night. The rain fell in torrents, and the wind blew. " * 40


@pytest.fixture(scope="module")
def haystack() -> Haystack:
    return Haystack(np.array(TOKENIZER.encode(TEXT)), TOKENIZER)


def config(**changes) -> NeedleConfig:
    return NeedleConfig(haystack="unused", depths=11, seeds=2, **changes)


@pytest.mark.parametrize("keys", [1, 4])
def test_every_cell_has_its_length_its_needles_and_one_question(haystack, keys):
    made = config(keys=(keys,))
    places = {}
    for cell in cells(made, [300, 1024]):
        found = request(made, cell, haystack)
        assert len(found.context) + len(found.continuation) == cell.length
        assert found.context[0] == TOKENIZER.bos
        text = TOKENIZER.decode(found.context[1:].tolist())
        answer = TOKENIZER.decode(found.continuation.tolist())
        assert text.count("The secret word of the") == keys + 1
        question = text[text.rindex(" The secret word") :]
        assert text.endswith(question) and f"{question}{answer}." in text
        assert question.removeprefix(" The secret word of the ").removesuffix(" is") in KEYS
        assert answer.removeprefix(" ") in VALUES
        places.setdefault((cell.length, cell.seed), []).append(text.index(question + answer))
    for found in places.values():  # deeper and deeper, from the start to the end
        assert found == sorted(found) and len(set(found)) > 5


def test_single_needles_stand_between_sentences_at_both_ends_and_near_their_depth(haystack):
    made = config(keys=(1,))
    for cell in cells(made, [1024]):
        found = request(made, cell, haystack)
        text = TOKENIZER.decode(found.context[1:].tolist())
        at = text.index(" The secret word")
        needle = text[at : text.index(".", at) + 1]
        if cell.depth == 0:
            assert at == 0
        elif cell.depth == 1:
            assert text.endswith(needle + text[text.rindex(" The secret word") :])
        else:
            assert text[at - 1] == "."
            assert abs(at - cell.depth * (1024 - 2 * len(needle))) < 80


def test_depth_changes_nothing_but_the_place(haystack):
    made = config(keys=(3,))
    rows = [request(made, cell, haystack) for cell in cells(made, [600]) if cell.seed == 1]
    assert len({row.continuation.tobytes() for row in rows}) == 1
    assert len({np.sort(row.context).tobytes() for row in rows}) == 1
    assert len({row.context.tobytes() for row in rows}) > 5


def test_too_short_a_length_says_what_would_do(haystack):
    cell = cells(config(), [40])[0]
    with pytest.raises(UserError, match="needle length 40 is too short.*at least") as error:
        request(config(), cell, haystack)
    least = int(str(error.value).split("at least ")[1].split()[0])
    assert len(request(config(), cell._replace(length=least), haystack).context) < least


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (dict(statement="The word is {value}"), "must hold"),
        (dict(statement="{value} of {key}"), "must hold"),
        (dict(keys=[99]), "at most 28"),
        (dict(depths=1), "2 or more"),
    ],
    ids=["no-key", "order", "keys", "depths"],
)
def test_bad_values_are_refused(values, message):
    with pytest.raises(UserError, match=message):
        parse(NeedleConfig, dict(haystack="unused") | values)
