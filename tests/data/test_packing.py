import pytest
from conftest import write_jsonl
from hypothesis import given, settings
from hypothesis import strategies as st

from llama3_jax.data.corpus import Corpus
from llama3_jax.data.packing import PackedRows, Span, Stream, best_fit, build_row
from llama3_jax.data.tokenizing import Options, tokenize

sizes = st.lists(st.integers(1, 90), min_size=1, max_size=60)


@given(sizes, st.integers(8, 40))
@settings(max_examples=100, deadline=None)
def test_best_fit_places_every_token_once_within_the_rows(lengths, length):
    spans = [Span(i, 3, 3 + size) for i, size in enumerate(lengths)]
    rows = -(-sum(lengths) // length)
    packed = best_fit(spans, length, rows)
    assert len(packed) == rows
    assert all(sum(s.stop - s.start for s in row) <= length for row in packed)
    placed = sorted((s.document, token) for row in packed for s in row
                    for token in range(s.start, s.stop))  # fmt: skip
    assert placed == [(i, 3 + t) for i, size in enumerate(lengths) for t in range(size)]


@given(sizes)
@settings(max_examples=50, deadline=None)
def test_best_fit_cuts_nothing_where_everything_fits(lengths):
    length = max(lengths)
    spans = [Span(i, 0, size) for i, size in enumerate(lengths)]
    packed = best_fit(spans, length, rows=len(lengths))
    assert sorted(span for row in packed for span in row) == sorted(spans)


@pytest.fixture(params=[2**22, 7], ids=["by document", "by block"])
def stream(request, corpora):
    return Stream(Corpus(corpora / "a" / "train"), "a", seed=1, max_blocks=request.param)


def test_an_epoch_reads_every_token_once_in_another_order_than_the_next(stream):
    size = stream.epoch_tokens
    for epoch in (0, 1):
        spans = stream.spans(epoch * size, (epoch + 1) * size)
        assert sorted(span.document for span in spans) == list(range(len(stream.corpus)))
        assert all(s.start == 0 and s.stop == stream.corpus.lengths[s.document] for s in spans)
    assert stream.spans(0, size) != stream.spans(size, 2 * size)


@given(data=st.data())
@settings(max_examples=50, deadline=None)
def test_any_part_of_the_stream_equals_the_same_part_of_the_whole(corpora, data):
    stream = Stream(Corpus(corpora / "a" / "train"), "a", seed=1, max_blocks=7)
    total = 2 * stream.epoch_tokens
    start = data.draw(st.integers(0, total - 1))
    stop = data.draw(st.integers(start + 1, min(total, start + 5000)))

    def tokens(spans):
        return [(s.document, t) for s in spans for t in range(s.start, s.stop)]

    assert tokens(stream.spans(start, stop)) == tokens(stream.spans(0, total))[start:stop]


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_windows_read_the_stream_once(stream, packing):
    rows = PackedRows(stream, origin=100, length=32, packing=packing)
    count = 2 * rows.window_rows
    read = [(s.document, t) for i in range(count) for s in rows.row(i)
            for t in range(s.start, s.stop)]  # fmt: skip
    expected = [(s.document, t) for s in stream.spans(100, rows.end(count))
                for t in range(s.start, s.stop)]  # fmt: skip
    assert sorted(read) == sorted(expected)
    assert rows.end(count) - 100 > 0.98 * count * 32
    assert rows.end(count - 5) == rows.end(count)


def test_neighbouring_rows_come_from_many_documents(tmp_path, byte_tokenizer):
    """Documents a hundred times longer than a row, read a batch of 8 rows at a time."""
    documents = {f"d{i}": "x" * 3_200 for i in range(200)}
    source = write_jsonl(tmp_path / "long.jsonl", documents)
    tokenize([source], tmp_path / "long", byte_tokenizer, Options())
    stream = Stream(Corpus(tmp_path / "long/train"), "long", seed=0)
    for packing in ("concat", "best_fit"):
        rows = PackedRows(stream, 0, length=32, packing=packing)
        batches = [
            {span.document for i in range(start, start + 8) for span in rows.row(i)}
            for start in range(0, rows.window_rows, 8)
        ]
        assert sum(map(len, batches)) / len(batches) > 5


def test_best_fit_cuts_fewer_documents_than_concat(stream):
    def cut(packing):
        rows = PackedRows(stream, 0, length=256, packing=packing)
        return sum(build_row(stream.corpus, rows.row(i), 256)["cut"] for i in range(64))

    assert cut("best_fit") < 0.5 * cut("concat")


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_a_row_predicts_each_next_token_of_its_documents(stream, packing):
    rows = PackedRows(stream, 0, length=128, packing=packing)
    for index in range(64):
        row, at = build_row(stream.corpus, rows.row(index), 128), 0
        for segment, (document, start, stop) in enumerate(rows.row(index), start=1):
            text = stream.corpus.document(document).tokens
            for token in range(start, stop):
                assert row["tokens"][at] == text[token]
                assert row["segment_ids"][at] == segment
                assert row["positions"][at] == token - start
                assert row["loss_mask"][at] == (token + 1 < len(text))
                if token + 1 < len(text):
                    assert row["targets"][at] == text[token + 1]
                at += 1
        assert not row["segment_ids"][at:].any() and not row["loss_mask"][at:].any()


def test_every_token_is_a_target_once(stream):
    rows = PackedRows(stream, 0, length=50, packing="concat")
    masks = [
        build_row(stream.corpus, rows.row(i), 50)["loss_mask"] for i in range(rows.window_rows)
    ]
    read = stream.spans(0, rows.end(rows.window_rows))
    ended = sum(span.stop == stream.corpus.lengths[span.document] for span in read)
    assert sum(int(mask.sum()) for mask in masks) == rows.window_rows * 50 - ended


def test_the_seed_changes_the_order(corpora):
    corpus = Corpus(corpora / "a" / "train")
    first, again, other = (Stream(corpus, "a", seed).spans(0, 2000) for seed in (1, 1, 2))
    assert first == again != other
    assert Stream(corpus, "b", 1).spans(0, 2000) != first
