import re

import numpy as np
import pytest

from llama3_jax.errors import UserError
from llama3_jax.parallel.context import imbalance
from llama3_jax.recipe.config import RunConfig
from llama3_jax.recipe.prepare import context_balances, prepare, print_data
from llama3_jax.schema import parse


def config(corpora, validation=None, **mesh) -> RunConfig:
    model = dict(dim=8, layers=1, heads=2, kv_heads=1, head_dim=4, ffn_dim=16, vocab_size=272)
    stages = [
        dict(name="short", tokens=3_000, length=32, batch_tokens=512, mix={"a": 0.5, "b": 0.5},
             lr=dict(shape="constant", peak=1e-3)),
        dict(name="long", tokens=3_000, length=64, mesh=mesh),
    ]  # fmt: skip
    sources = {name: dict(train=str(corpora / name / "train")) for name in "ab"}
    values = dict(
        model=model, data=dict(sources=sources), stages=stages, checkpoint=dict(every_steps=1),
        validation=validation,
    )  # fmt: skip
    return parse(RunConfig, values)


def test_the_balance_of_context_ranks_is_that_of_the_stages_documents(corpora, capsys):
    run = prepare(config(corpora, context=4))
    (line,) = context_balances(run)
    rows = run.batches.rows(1, 0, 48)
    positions = np.where(rows["segment_ids"] > 0, rows["positions"], -1)
    expected = imbalance(positions, 4)
    assert expected > 1.01
    assert re.fullmatch(
        rf"stage long: .* of 4 context ranks .*: causal 1\.000, its documents {expected:.3f}", line
    )
    print_data(run)
    assert line in capsys.readouterr().out.replace("\n", " ")
    assert context_balances(prepare(config(corpora, data=2))) == []


def test_a_row_of_padding_has_a_balance_too(corpora, monkeypatch):
    run = prepare(config(corpora, context=4))
    (before,) = context_balances(run)
    spans = run.batches.spans
    monkeypatch.setattr(
        run.batches, "spans", lambda stage, row: spans(stage, row) if row else ("a", [])
    )
    (after,) = context_balances(run)
    assert after != before and "nan" not in after


def test_a_mesh_that_does_not_divide_the_rows_is_refused_before_anything_is_compiled(corpora):
    message = "config.stages.1: length 64 is not divisible by 24: mesh.context=12 cuts a row in"
    with pytest.raises(UserError, match=message):
        prepare(config(corpora, context=12))
    validation = dict(every_tokens=1000, tokens=1000, length=36)
    prepare(config(corpora, validation, context=2))
    message = "config.validation on the mesh of stage 1: length 36 is not divisible by 8"
    with pytest.raises(UserError, match=message):
        prepare(config(corpora, validation, context=4))


def test_the_tokens_of_a_source_are_those_of_its_rows(corpora, capsys):
    run = prepare(config(corpora))
    print_data(run)
    printed = dict(re.findall(r"^(\w+): ([\d,]+) tokens", capsys.readouterr().out, re.MULTILINE))
    counted = {name: int(text.replace(",", "")) for name, text in printed.items()}
    rows = [
        run.batches.rows(n, 0, s.steps * s.batch_rows) for n, s in enumerate(run.timeline.stages)
    ]
    for number, name in enumerate(run.batches.sources):
        real = sum(int((r["segment_ids"][r["source"] == number] > 0).sum()) for r in rows)
        # Rows are filled to an average over their window.
        assert counted[name] == pytest.approx(real, rel=0.05)
    assert sum(counted.values()) <= run.timeline.tokens < sum(run.batches.consumed.values())


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        (dict(tensor=4), "config.stages.1: mesh.tensor=4 does not divide the model's"),
        (
            dict(tensor=2),
            "mesh.tensor=2 does not divide the model's kv_heads .1.; mesh.kv_heads='rep",
        ),
        (dict(pipe=2), "config.stages.1: mesh.pipe=2 is too many for 1 layers"),
        (dict(pipe=2, virtual_stages=2), "mesh.pipe=2 x mesh.virtual_stages=2 is too many for 1"),
    ],
)
def test_a_mesh_that_does_not_divide_the_model_is_refused_by_name(corpora, mesh, message):
    with pytest.raises(UserError, match=message):
        prepare(config(corpora, **mesh))


def test_a_mesh_that_no_stage_uses_is_refused(corpora):
    values = config(corpora).model_dump()
    values["stages"][0]["mesh"] = dict(data=1)
    prepare(parse(RunConfig, values))
    with pytest.raises(UserError, match="config.mesh: no stage uses it, for the first sets config"):
        prepare(parse(RunConfig, values | {"mesh": dict(tensor=2)}))
