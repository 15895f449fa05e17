import numpy as np
import pytest

from llama3_jax.data.batches import Batches, StageShape
from llama3_jax.data.corpus import Corpus
from llama3_jax.errors import UserError

STAGES = [
    StageShape(steps=10, batch_rows=8, length=64, mix={"a": 0.7, "b": 0.3}),
    StageShape(steps=6, batch_rows=4, length=128, mix={"a": 0.2, "b": 0.8}),
]


def make(corpora, packing="best_fit", stages=STAGES, seed=0) -> Batches:
    sources = {name: Corpus(corpora / name / "train") for name in "ab"}
    return Batches(sources, stages, seed, packing)


def assert_equal(left: dict, right: dict):
    assert left.keys() == right.keys()
    for key in left:
        np.testing.assert_array_equal(left[key], right[key])


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_resume_at_any_step_gives_the_same_batches(corpora, packing):
    batches = make(corpora, packing)
    for stage, shape in enumerate(STAGES):
        whole = list(batches.load(stage))
        assert len(whole) == shape.steps
        for first in (1, shape.steps // 2, shape.steps - 1):
            for left, right in zip(
                make(corpora, packing).load(stage, first), whole[first:], strict=True
            ):
                assert_equal(left, right)


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_together_load_the_same_global_batch(corpora, hosts):
    batches = make(corpora)
    whole = list(batches.load(0, 3))
    parts = [list(batches.load(0, 3, host=host, hosts=hosts)) for host in range(hosts)]
    for step, expected in enumerate(whole):
        joined = {key: np.concatenate([part[step][key] for part in parts]) for key in expected}
        assert_equal(joined, expected)


def test_worker_processes_load_the_same_batches(corpora):
    batches = make(corpora)
    for left, right in zip(batches.load(0, 2, workers=2), batches.load(0, 2), strict=True):
        assert_equal(left, right)


def test_stages_go_on_in_the_stream_without_repeating(corpora):
    batches = make(corpora, "concat")
    seen = {"a": [], "b": []}
    for step in range(16):
        for entry in batches.documents(step):
            seen[entry.source] += [
                (entry.document, token) for token in range(entry.start, entry.stop)
            ]
    for name, tokens in seen.items():
        assert len(tokens) == len(set(tokens)) <= batches.consumed[name]


def test_the_ledger_names_what_is_in_the_batch(corpora):
    batches = make(corpora)
    batch = list(batches.load(1))[2]
    for row in range(4):
        entries = [entry for entry in batches.documents(12) if entry.row == row]
        assert len(entries) == batch["segment_ids"][row].max()
        source = batches.corpora[entries[0].source]
        texts = {source.document(i).id: source.document(i).tokens for i in range(len(source))}
        tokens = np.concatenate([texts[e.document][e.start : e.stop] for e in entries])
        np.testing.assert_array_equal(batch["tokens"][row][: len(tokens)], tokens)


def test_the_mix_changes_with_the_stage(corpora):
    batches = make(corpora)
    shares = [np.mean([batch["source"] == 0 for batch in batches.load(stage)]) for stage in (0, 1)]
    assert abs(shares[0] - 0.7) < 0.02 and abs(shares[1] - 0.2) < 0.05


def test_another_seed_gives_other_batches(corpora):
    first, other = (next(iter(make(corpora, seed=seed).load(0))) for seed in (0, 1))
    assert (first["tokens"] != other["tokens"]).any()


def test_what_cannot_be_is_refused(corpora):
    with pytest.raises(UserError, match=r"stages.0.mix: 'c' is no source; sources: a, b"):
        make(corpora, stages=[StageShape(1, 1, 8, {"c": 1.0})])
    with pytest.raises(UserError, match="8 rows cannot be divided among 3 hosts"):
        make(corpora).load(0, hosts=3)
    with pytest.raises(UserError, match="step 16 is outside the run: steps 0 to 15"):
        make(corpora).documents(16)


def test_batches_left_out_are_never_read_and_the_rest_keep_their_order(corpora):
    """The stage's steps go on with the batches after, and the next stage with other documents."""
    cut = [STAGES[0]._replace(left_out=(2, 3, 9)), STAGES[1]]
    whole = make(corpora, stages=[STAGES[0]._replace(steps=13), STAGES[1]])
    batches = make(corpora, stages=cut)
    expected = [0, 1, 4, 5, 6, 7, 8, 10, 11, 12]
    assert [cut[0].batch(step) for step in range(10)] == expected
    read = list(batches.load(0))
    numbered = list(whole.load(0))
    assert len(read) == 10
    for batch, number in zip(read, expected, strict=True):
        np.testing.assert_array_equal(batch["tokens"], numbered[number]["tokens"])
    for ours, theirs in zip(batches.load(0, 7), numbered[10:], strict=True):
        np.testing.assert_array_equal(ours["tokens"], theirs["tokens"])
    assert batches.documents(7) == whole.documents(10)
    for ours, theirs in zip(batches.load(1), whole.load(1), strict=True):
        np.testing.assert_array_equal(ours["tokens"], theirs["tokens"])
