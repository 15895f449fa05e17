"""Merging, compared with the definition carried out step by step through tiktoken itself."""

import heapq
from collections import Counter

import pytest
import regex
import tiktoken
from conftest import REPOSITORY
from hypothesis import example, given, settings
from hypothesis import strategies as st

from experiments.demo import corpus
from llama3_jax.data import bpe
from llama3_jax.data.tokenizer import LLAMA3_PATTERN
from llama3_jax.errors import UserError

BYTES = {bytes([byte]): byte for byte in range(256)}


def naive(ranks: dict[bytes, int], counts: dict[str, int], new_tokens: int) -> dict[bytes, int]:
    """The definition: split all, count all pairs, add the first of the most frequent, again."""
    ranks = dict(ranks)
    for _ in range(new_tokens):
        encoding = tiktoken.Encoding(
            "naive", pat_str=r"(?s:.+)", mergeable_ranks=ranks, special_tokens={}
        )
        pairs = Counter()
        for pretoken, count in counts.items():
            tokens = encoding.encode_ordinary(pretoken)
            for pair in zip(tokens, tokens[1:], strict=False):
                pairs[pair] += count
        if not pairs:
            raise UserError("nothing left")
        left, right = min(pairs, key=lambda pair: (-pairs[pair], pair))
        joined = b"".join(map(encoding.decode_single_token_bytes, (left, right)))
        assert joined not in ranks
        ranks[joined] = len(ranks)
    return ranks


def odd_base(tokens: list[str]) -> dict[bytes, int]:
    """A base with tokens that no merge of lower ranks may reach, as Meta's has."""
    ranks = dict(BYTES)
    for token in tokens:
        ranks.setdefault(token.encode(), len(ranks))
    return ranks


words = st.text("abcé ", min_size=1, max_size=12) | st.text("ab", min_size=1, max_size=30)
corpora = st.dictionaries(words, st.integers(1, 5), min_size=1, max_size=40)
bases = st.lists(st.text("abcé", min_size=1, max_size=6), max_size=8).map(odd_base)


@settings(max_examples=250, deadline=None)
@given(base=bases, counts=corpora, new_tokens=st.integers(0, 40))
# A new token meets, before its neighbour is merged too, what it makes a token of the base with.
@example(base=odd_base(["ba", "baaaba", "aa"]), counts={"baaa": 10, "baaabaaaa": 1}, new_tokens=3)
def test_the_result_is_that_of_the_definition(base, counts, new_tokens):
    try:
        expected = naive(base, counts, new_tokens)
    except UserError:
        with pytest.raises(UserError, match="can be merged"):
            bpe.extend(base, counts, new_tokens)
        return
    assert bpe.extend(base, counts, new_tokens) == expected


@settings(max_examples=50, deadline=None)
@given(base=bases, counts=corpora, first=st.integers(0, 15), second=st.integers(0, 15))
def test_going_on_from_a_result_is_the_same_as_going_on(base, counts, first, second):
    try:
        whole = bpe.extend(base, counts, first + second)
    except UserError:
        return
    part = bpe.extend(base, counts, first)
    assert bpe.extend(part, counts, second) == whole
    assert {token: part[token] for token in base} == base


def test_text_whose_words_are_as_uneven_as_words_are():
    text = "".join((REPOSITORY / name).read_text() for name in ("README.md", "setup.py"))
    counts = Counter(regex.findall(LLAMA3_PATTERN, text))
    assert bpe.extend(BYTES, counts, 400) == naive(BYTES, counts, 400)


def one_by_one(ranks: dict[bytes, int], counts: dict[str, int], new_tokens: int):
    """The same, kept up to date instead of counted anew; where bytes never become a rank twice."""
    ranks, names = dict(ranks), sorted(ranks, key=ranks.get)
    encoding = tiktoken.Encoding("", pat_str=r"(?s:.+)", mergeable_ranks=ranks, special_tokens={})
    words = [(encoding.encode_ordinary(word), count) for word, count in counts.items()]
    pairs, places = Counter(), {}
    for i, (tokens, count) in enumerate(words):
        for pair in zip(tokens, tokens[1:], strict=False):
            pairs[pair] += count
            places.setdefault(pair, set()).add(i)
    heap = [(-count, pair) for pair, count in pairs.items()]
    heapq.heapify(heap)
    while new_tokens:
        count, best = heapq.heappop(heap)
        if -count != pairs[best]:  # an old entry
            if pairs[best]:
                heapq.heappush(heap, (-pairs[best], best))
            continue
        joined = names[best[0]] + names[best[1]]
        same = {best}
        for cut in range(1, len(joined)):
            if joined[:cut] in ranks and joined[cut:] in ranks:
                same.add((ranks[joined[:cut]], ranks[joined[cut:]]))
        ranks[joined] = new = len(names)
        names.append(joined)
        new_tokens -= 1
        changed = set()
        for i in set().union(*(places.pop(pair, ()) for pair in same)):
            old, count = words[i]
            tokens, at = [], 0
            while at < len(old):
                found = tuple(old[at : at + 2]) in same
                tokens.append(new if found else old[at])
                at += 1 + found
            words[i] = tokens, count
            for pair in zip(old, old[1:], strict=False):
                pairs[pair] -= count
            for pair in zip(tokens, tokens[1:], strict=False):
                assert names[pair[0]] + names[pair[1]] not in ranks
                pairs[pair] += count
                places.setdefault(pair, set()).add(i)
                changed.add(pair)
        for pair in changed:
            heapq.heappush(heap, (-pairs[pair], pair))
    return ranks


@pytest.mark.slow
def test_thousands_of_merges_on_real_text_in_many_languages():
    counts = Counter()
    for document in corpus.multilingual():
        counts.update(regex.findall(LLAMA3_PATTERN, document["text"]))
    base = one_by_one(BYTES, counts, 3_000)
    assert bpe.extend(BYTES, counts, 3_000) == base
    weighted = {word: count * (1 + 4 * (word > "\u0370")) for word, count in counts.items()}
    assert bpe.extend(base, weighted, 5_000) == one_by_one(base, weighted, 5_000)


def test_what_is_left_to_merge_is_told():
    with pytest.raises(UserError, match="only 2 of 3 new tokens can be merged"):
        bpe.extend(BYTES, {"abc": 4, "x": 9}, 3)


def test_progress_counts_up_to_the_end():
    told = []
    bpe.extend(BYTES, {"abcdefgh": 1, "stuvw": 2}, 9, told.append)
    assert told == sorted(told) and told[-1] == 9
