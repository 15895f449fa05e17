import pytest

from llama3_jax.data.corpus import Corpus
from llama3_jax.errors import UserError
from llama3_jax.model.config import ModelConfig
from llama3_jax.recipe.config import RunConfig
from llama3_jax.recipe.resume import check_same_run, run_metadata
from llama3_jax.recipe.timeline import Timeline
from llama3_jax.schema import parse

STAGES = [
    dict(name="one", tokens=400, length=10, batch_tokens=100, mix={"a": 1.0},
         lr=dict(shape="constant", peak=1e-3)),
    dict(name="two", tokens=400, length=20),
    dict(name="three", tokens=400, lr=dict(shape="linear", end=0.0)),
]  # fmt: skip


@pytest.fixture
def metadata(corpora):
    def metadata(step: int, stages=STAGES, **changes) -> dict:
        model = dict(dim=8, layers=1, heads=2, kv_heads=1, head_dim=4, ffn_dim=16, vocab_size=272)
        values = dict(
            model=model | changes.pop("model", {}),
            data=dict(sources=dict(a=dict(train=str(corpora / "a/train")))),
            stages=stages,
            checkpoint=dict(every_steps=1),
        )
        config = parse(RunConfig, values | changes)
        timeline = Timeline(config.stages, config.model.rope, config.mesh)
        sources = {name: Corpus(source.train) for name, source in config.data.sources.items()}
        return run_metadata(config, timeline, sources, step)

    return metadata


def test_the_batches_that_were_left_out_must_be_known(metadata):
    saved = metadata(3) | {"left_out": {"0": [1, 2]}}
    check_same_run(saved, metadata(3) | {"left_out": {"0": [1, 2, 7], "1": [0]}})
    for left_out in ({}, {"0": [2]}):
        with pytest.raises(UserError, match=r"made without batches \[1.*events.jsonl"):
            check_same_run(saved, metadata(3) | {"left_out": left_out})


def test_a_checkpoint_records_the_rope_and_the_length_of_the_stage_that_made_it(metadata):
    stages = changed(1, rope=dict(theta=8e6))
    for step, theta, length in ((0, 5e5, 10), (4, 5e5, 10), (5, 8e6, 20), (8, 8e6, 20)):
        saved = metadata(step, stages=stages)
        assert ModelConfig.model_validate(saved["model"]).rope.theta == theta, step
        assert saved["length"] == length


def changed(number: int, **changes) -> list[dict]:
    return [s | changes if i == number else s for i, s in enumerate(STAGES)]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"stages": changed(1, tokens=800)},  # the stage under way, at a constant rate
        {"stages": changed(2, tokens=100, length=50)},  # not yet begun
        {"stages": [*STAGES, dict(name="four", tokens=100)]},
        {"model": {"remat": "full", "attention": "chunked"}},
        {"stages": changed(1, micro_batch_tokens=20)},
        {"max_bad_steps": 3},
    ],
    ids=str,
)
def test_what_is_yet_to_come_may_change(metadata, changes):
    check_same_run(metadata(6), metadata(6, **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stages": changed(0, tokens=500)}, "config.stages.0.steps is 5"),
        ({"stages": changed(1, tokens=100)}, "config.stages.1.steps is 1"),
        ({"stages": changed(1, batch_tokens=200)}, "config.stages.1.batch_tokens is 200"),
        ({"stages": STAGES[:1]}, "lies in stage 1 .two., which is gone"),
        ({"stages": changed(0, lr=dict(shape="constant", peak=2e-3))}, "learning rate of step 0"),
        ({"model": {"dim": 16}}, "config.model.dim is 16"),
        ({"optimizer": {"b2": 0.99}}, "config.optimizer.b2 is 0.99, but .* was made with 0.95"),
        ({"seed": 3}, "config.seed is 3, but the checkpoint of step 6 was made with 0"),
    ],
    ids=str,
)
def test_what_has_been_may_not(metadata, changes, message):
    with pytest.raises(UserError, match=message):
        check_same_run(metadata(6), metadata(6, **changes))
