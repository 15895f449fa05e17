"""The trainer as a loop of one's own, and the next stage, which is ready before it begins."""

import collections
import multiprocessing
import threading

import jax
import optax
import pytest

from llama3_jax.errors import UserError
from llama3_jax.recipe import stage_ahead
from llama3_jax.recipe.config import RunConfig
from llama3_jax.recipe.prepare import apply_verdicts, prepare
from llama3_jax.recipe.timeline import Verdict
from llama3_jax.recipe.trainer import Outcome, Trainer
from llama3_jax.schema import parse

STEPS = 4  # of a stage


def make_run(corpora, **changes):
    """Three stages: another length and mesh, then another batch size."""
    sources = {name: dict(train=f"{corpora}/{name}/train", validation=f"{corpora}/{name}/validation")
               for name in "ab"}  # fmt: skip
    needle = dict(haystack=f"{corpora}/a/validation", depths=2, seeds=1, statement=" {key}:{value}")
    values = dict(
        model=dict(
            vocab_size=272, dim=32, layers=2, heads=4, kv_heads=2, head_dim=8, ffn_dim=64,
            dtype="float32",
        ),
        data=dict(sources=sources), checkpoint=dict(every_steps=100),
        evaluation=dict(length=32, held_out_tokens=500, needle=needle),
        stages=[
            dict(name="short", tokens=STEPS * 512, length=32, batch_tokens=512,
                 mix=dict(a=0.7, b=0.3), mesh=dict(data=8), lr=dict(shape="constant", peak=3e-3)),
            dict(name="long", tokens=STEPS * 512, length=64, mesh=dict(data=4, context=2),
                 gate=dict(every_tokens=1024, max_tokens=20 * 512)),
            dict(name="wide", tokens=STEPS * 1024, batch_tokens=1024, micro_batch_tokens=512),
        ],
    ) | changes  # fmt: skip
    return prepare(parse(RunConfig, values))


def same(batch, other) -> bool:
    return all((batch[name] == other[name]).all() for name in {*batch, *other})


class Norms:
    """Every second step, the norm of all parameters."""

    def __init__(self):
        self.norms = {}

    def due(self, trainer):
        return trainer.step % 2 == 0

    def __call__(self, trainer):
        self.norms[trainer.step] = float(optax.tree.norm(trainer.state.params))


def test_a_loop_of_ones_own_with_an_action_and_metrics_in_memory(corpora):
    norms = Norms()
    trainer = Trainer(make_run(corpora), actions=[norms])
    for batch in trainer.batches():
        trainer.train_step(batch)
        trainer.act()
        if trainer.step == STEPS + 3:  # in the second stage
            break
    trainer.log.flush()
    trainer.close()
    records = trainer.metrics.records
    assert [r["step"] for r in records] == list(range(1, STEPS + 4))
    assert [r["stage"] for r in records[-4:]] == ["short", "long", "long", "long"]
    assert records[-1]["loss"] < records[0]["loss"]
    assert list(norms.norms) == [2, 4, 6] and norms.norms[6] != norms.norms[2]


@pytest.fixture
def compilations(monkeypatch):
    """Which thread compiled the train step of which length and rows."""
    for thread in threading.enumerate():  # of an earlier test
        if thread.name.startswith("next-stage"):
            thread.join(60)
    stage_ahead.compiled_step.cache_clear()
    found, compile = [], jax.stages.Lowered.compile

    def counted(lowered, *arguments, **options):
        batch = lowered.in_avals[0][1]
        found.append((threading.current_thread() is threading.main_thread(), batch["tokens"].shape))
        return compile(lowered, *arguments, **options)

    monkeypatch.setattr(jax.stages.Lowered, "compile", counted)
    return found


def test_a_stage_is_compiled_before_it_begins_and_its_batches_are_the_same(corpora, compilations):
    run, read, entered = make_run(corpora), collections.defaultdict(list), {}
    trainer = Trainer(run)
    for batch in trainer.batches():
        index = run.timeline.stage_index(trainer.step)
        read[index].append(batch)
        if index not in entered:
            if index:
                trainer._ahead._compiling[1].result()  # it may still be under way
            entered[index] = list(compilations)
        trainer.train_step(batch)
    trainer.close()
    assert trainer.outcome is Outcome.DONE
    shapes = (16, 32), (8, 64), (16, 64)
    assert entered[0] == [] and entered[1] == [(True, shapes[0]), (False, shapes[1])]
    assert entered[2] == compilations == entered[1] + [(False, shapes[2])]
    for index in range(3):
        alone = list(make_run(corpora).batches.load(index))
        assert len(alone) == STEPS
        assert all(same(*pair) for pair in zip(read[index], alone, strict=True))


def test_a_longer_stage_reads_its_own_batches_and_then_the_next_ones(corpora):
    """The gate of the second stage is not passed at first: the open loader is of other batches."""
    run, read = make_run(corpora), []
    verdicts = [Verdict(1, 2 * STEPS, False)]
    trainer = Trainer(run)
    for batch in trainer.batches():
        read.append(batch)
        trainer.train_step(batch)
        if trainer.step == 2 * STEPS:
            loader = trainer._ahead._loader[1]
            apply_verdicts(run, verdicts)
        if trainer.step == 2 * STEPS + 1:
            assert loader._closed
    trainer.close()
    longer = make_run(corpora)
    apply_verdicts(longer, verdicts)
    expected = [batch for index in range(3) for batch in longer.batches.load(index)]
    assert len(expected) == 3 * STEPS + 2
    assert all(same(*pair) for pair in zip(read, expected, strict=True))


def test_what_fails_in_the_thread_fails_when_the_stage_is_entered(corpora, monkeypatch):
    compiled = stage_ahead.compiled_step

    def refuse(*arguments):
        if "(16, 64)" in str(arguments):
            raise UserError("no such kernel")
        return compiled(*arguments)

    monkeypatch.setattr(stage_ahead, "compiled_step", refuse)
    trainer = Trainer(make_run(corpora))
    with pytest.raises(UserError, match="no such kernel"):
        for batch in trainer.batches():
            trainer.train_step(batch)
    trainer.close()
    assert trainer.step == 2 * STEPS


def test_compiling_ahead_allocates_no_arrays(corpora):
    run = make_run(corpora)
    trainer = Trainer(run)
    stage_ahead.compiled_step.cache_clear()
    before = [id(array) for array in jax.live_arrays()]
    batch = next(run.batches.load(0))
    stage_ahead.compiled_step(*stage_ahead.step_arguments(run, 2, trainer.layouts[2], batch))
    assert [id(array) for array in jax.live_arrays()] == before
    trainer.close()


def test_worker_processes_are_opened_ahead_and_end(corpora):
    run = make_run(corpora)
    run.config = run.config.model_copy(
        update={"data": run.config.data.model_copy(update={"workers": 1})}
    )
    trainer, read = Trainer(run), []
    for batch in trainer.batches():
        read.append(batch)
        trainer.train_step(batch)
        if trainer.step == STEPS + 2:  # with the third stage's loader open
            break
    trainer.close()
    assert not multiprocessing.active_children()
    expected = [batch for index in range(2) for batch in make_run(corpora).batches.load(index)]
    assert all(same(*pair) for pair in zip(read, expected, strict=False))


def test_compiling_ahead_can_be_switched_off(corpora, compilations):
    trainer = Trainer(make_run(corpora, xla=dict(compile_ahead=False)))
    for batch in trainer.batches():
        trainer.train_step(batch)
    trainer.close()
    assert trainer._ahead._compiling is None
    # A thread of an earlier test may still be at work: its own are not counted.
    assert sum(in_main for in_main, _ in compilations) == 3


def test_statistics_of_each_layer_every_so_many_steps(corpora):
    trainer = Trainer(make_run(corpora, statistics=dict(every_steps=3)))
    for batch in trainer.batches():
        trainer.train_step(batch)
        if trainer.step == STEPS + 2:
            break
    trainer.log.flush()
    trainer.close()
    found = {r["step"]: r["layers"] for r in trainer.metrics.records if "layers" in r}
    assert set(found) == {3, 6}
    for layers in found.values():
        assert {"output", "attention/logits", "ffn/up/gradient", "ffn/up/update"} <= set(layers)
        for name, values in layers.items():
            assert len(values["rms"]) == len(values["largest"]) == 2, name
            assert all(0 < r <= m for r, m in zip(values["rms"], values["largest"], strict=True))
