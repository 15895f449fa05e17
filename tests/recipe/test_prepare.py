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
