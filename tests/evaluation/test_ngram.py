import math
from collections import Counter

import numpy as np
import pytest

from llama3_jax.evaluation.ngram import NgramModel


def documents(seed, count=40, vocab_size=6):
    random = np.random.default_rng(seed)
    return [random.integers(0, vocab_size, random.integers(2, 30)) for _ in range(count)]


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_probabilities_sum_to_one_after_any_context(order):
    model = NgramModel(documents(0), 6, order)
    for context in ([1], [1, 2], [5, 0, 3, 3, 1], [2] * 7):
        losses = [model.losses([np.array([*context, token])])[-1] for token in range(6)]
        assert np.exp(-np.array(losses)).sum() == pytest.approx(1, abs=1e-9)


def test_bigram_equals_interpolated_kneser_ney_by_dictionaries():
    train, held_out = documents(1), documents(2)
    padded = [[6, *document] for document in train]
    bigrams = Counter(pair for d in padded for pair in zip(d, d[1:], strict=False))
    continuations = Counter(token for _, token in bigrams)
    contexts, types = Counter(), Counter()
    for (context, _), count in bigrams.items():
        contexts[context] += count
        types[context] += 1

    def discount(counts):
        once, twice = (sum(c == n for c in counts) for n in (1, 2))
        return once / (once + 2 * twice) if once and twice else 0.5

    d1, d2 = discount(continuations.values()), discount(bigrams.values())
    total = sum(continuations.values())

    def probability(context, token):
        lower = max(continuations[token] - d1, 0) / total + d1 * len(continuations) / total / 6
        if not contexts[context]:
            return lower
        direct = max(bigrams[context, token] - d2, 0) / contexts[context]
        return direct + d2 * types[context] / contexts[context] * lower

    expected = [-math.log(probability(*pair)) for d in held_out
                for pair in zip(d, d[1:], strict=False)]  # fmt: skip
    np.testing.assert_allclose(NgramModel(train, 6, 2).losses(held_out), expected, rtol=1e-9)


def test_longer_contexts_help_where_text_repeats():
    text = [np.tile(np.arange(6), 20), np.tile([0, 2, 4, 1], 30)]
    unigram, bigram, trigram = (NgramModel(text, 6, n).losses(text).mean() for n in (1, 2, 3))
    assert unigram > 1.5 > bigram > trigram
