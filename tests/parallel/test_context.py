"""Where the tokens of a row lie over context ranks, and how even the work is."""

import numpy as np
import pytest

from llama3_jax.parallel.context import balanced_columns, imbalance, natural_order, rank_chunks
from tests.parallel.equivalence import packed_batch


@pytest.mark.parametrize("context", [1, 2, 4, 8])
def test_a_rank_holds_a_chunk_from_the_front_and_one_from_the_back(context):
    columns = balanced_columns(16 * context, context)
    assert sorted(columns) == list(range(16 * context))
    for rank, own in enumerate(columns.reshape(context, 2, -1)):
        if context > 1:
            assert own[0].tolist() == list(range(rank * 8, rank * 8 + 8))
            mirrored = 2 * context - 1 - rank
            assert own[1].tolist() == list(range(mirrored * 8, mirrored * 8 + 8))
            assert rank_chunks(context)[rank].tolist() == [rank, mirrored]


@pytest.mark.parametrize("context", [2, 4])
def test_natural_order_undoes_it(context):
    x = np.random.default_rng().normal(size=(3, 8 * context, 2))
    np.testing.assert_array_equal(
        natural_order(x[:, balanced_columns(8 * context, context)], context), x
    )


def work_by_rank(segment_ids: np.ndarray, context: int) -> np.ndarray:
    """(query, key) pairs inside documents, counted one by one: [rows, context]."""
    rows, length = segment_ids.shape
    work = np.zeros((rows, context))
    for row in range(rows):
        for place, query in enumerate(balanced_columns(length, context)):
            rank = place // (length // context)
            for key in range(query + 1):
                same = segment_ids[row, key] == segment_ids[row, query]
                work[row, rank] += same and segment_ids[row, query] > 0
    return work


def positions_of(batch: dict[str, np.ndarray]) -> np.ndarray:
    return np.where(batch["segment_ids"] > 0, batch["positions"], -1)


@pytest.mark.parametrize("context", [1, 2, 4, 8])
def test_one_causal_document_is_exactly_even(context):
    for length in (16, 48, 1008):
        positions = np.tile(np.arange(length), (3, 1))
        assert imbalance(positions, context) == 1.0
    work = work_by_rank(np.ones((1, 48), int), context)
    assert (work == 48 * 49 / 2 / context).all()


@pytest.mark.parametrize("context", [2, 4])
def test_imbalance_of_documents_is_that_of_all_pairs_counted_one_by_one(context):
    batch = packed_batch(seed=int(np.random.default_rng().integers(1 << 30)), rows=6, length=32)
    batch["segment_ids"][0, -5:] = 0  # padding
    work = work_by_rank(batch["segment_ids"], context)
    # Ranks wait for each other in every row.
    expected = work.max(1).sum() / work.mean(1).sum()
    assert expected > 1
    assert imbalance(positions_of(batch), context) == pytest.approx(expected, rel=1e-12)


def test_the_least_even_row_by_hand():
    # Two documents of half a row: the second half of each is on the middle chunks' rank or not.
    positions = np.tile(np.arange(4), 2)[None]
    # Chunks of two: pairs 3, 7, 3, 7; rank 0 has the first and the last, rank 1 the others.
    assert imbalance(positions, 2) == 1.0
    positions = np.array([[0, 0, 0, 1, 2, 3, 0, 0]])
    # Pairs 2, 3, 7, 2: 4 for rank 0 and 10 for rank 1.
    assert imbalance(positions, 2) == pytest.approx(10 / 7)
