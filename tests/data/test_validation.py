import numpy as np
import pytest

from llama3_jax.data.corpus import Corpus
from llama3_jax.data.validation import validation_batches


@pytest.mark.parametrize("limit", [10**9, 777])
def test_each_held_out_token_is_there_once_in_order(corpora, limit):
    corpus = Corpus(corpora / "a" / "validation")
    whole = np.concatenate([corpus.document(i).tokens for i in range(len(corpus))])[:limit]
    batches = list(validation_batches(corpus, length=32, rows=4, tokens=limit))
    assert {batch["tokens"].shape for batch in batches} == {(4, 32)}
    tokens, real, mask, targets = (
        np.concatenate([batch[key].ravel() for batch in batches])
        for key in ("tokens", "segment_ids", "loss_mask", "targets")
    )
    np.testing.assert_array_equal(tokens[real > 0], whole)
    following = np.append(whole[1:], 0)
    inside = mask[real > 0]
    inside[-1] = False
    np.testing.assert_array_equal(targets[real > 0][inside], following[inside])
    if limit > len(whole):
        assert mask.sum() == len(whole) - len(corpus)


def test_hosts_share_each_batch(corpora):
    corpus = Corpus(corpora / "a" / "validation")
    whole = list(validation_batches(corpus, length=32, rows=4, tokens=777))
    parts = [
        list(validation_batches(corpus, length=32, rows=4, tokens=777, host=host, hosts=2))
        for host in (0, 1)
    ]
    for batch, *shares in zip(whole, *parts, strict=True):
        for key, rows in batch.items():
            np.testing.assert_array_equal(rows, np.concatenate([share[key] for share in shares]))
