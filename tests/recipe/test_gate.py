"""Gates in a run: what they decide, and that an interrupted one goes on as if it had not been.

The suite is a stand-in that finds needles by a rule; what it measures is tested in tests/evaluation.
"""

import dataclasses
import json
import shutil

import jax
import pytest

from llama3_jax import train as program
from llama3_jax.errors import UserError
from llama3_jax.evaluation.metrics import Metric
from llama3_jax.evaluation.needle import Cell
from llama3_jax.evaluation.suite import NeedleResult
from llama3_jax.recipe.config import RunConfig
from llama3_jax.recipe.gate import GateLog, Gates
from llama3_jax.recipe.prepare import lay_out, prepare
from llama3_jax.recipe.timeline import Timeline, Verdict, average_steps
from llama3_jax.schema import parse
from llama3_jax.training.checkpoint import load_model
from llama3_jax.training.metrics import read_metrics

EVALUATION = dict(length=32, held_out_tokens=500)
MESH = dict(data=8)


def values(corpora, **changes):
    sources = {
        name: dict(train=f"{corpora}/{name}/train", validation=f"{corpora}/{name}/validation")
        for name in "ab"
    }
    needle = dict(haystack=f"{corpora}/a/validation", depths=2, seeds=1, statement=" {key}:{value}")
    stages = [
        dict(name="short", tokens=4 * 512, length=32, batch_tokens=512, mix=dict(a=0.7, b=0.3),
             lr=dict(shape="constant", peak=3e-3, warmup_tokens=500), mesh=MESH),
        dict(name="long", tokens=2 * 512, length=64, mesh=dict(data=4, context=2),
             gate=dict(every_tokens=512, max_tokens=5 * 512)),
        dict(name="annealing", tokens=4 * 512, mix=dict(a=0.2, b=0.8),
             lr=dict(shape="linear", end=0.0), average=dict(checkpoints=2)),
    ]  # fmt: skip
    return dict(
        model=dict(
            vocab_size=272, dim=32, layers=2, heads=4, kv_heads=2, head_dim=8, ffn_dim=64,
            dtype="float32",
        ),
        data=dict(sources=sources), stages=stages, checkpoint=dict(every_steps=3, keep_last=9),
        evaluation=EVALUATION | dict(needle=needle),
    ) | changes  # fmt: skip


class Stopped(Exception):
    pass


@dataclasses.dataclass
class StandIn:
    """Finds all needles from the third time on that the longest length is asked for.

    `calls` counts what is measured over all attempts at the run; `break_at` is the call that a
    crash interrupts, once.
    """

    config: object
    passes_at: int = 3
    break_at: int = -1
    calls: list = dataclasses.field(default_factory=list)
    short_parts: tuple = ("task:x", "held_out:a")

    def _count(self, what):
        if len(self.calls) == self.break_at:
            self.break_at = -1
            raise Stopped
        self.calls.append(what)

    def short(self, part, scorer):
        self._count(part)
        return {f"{part}/m": Metric((1.0, 2.0), (1.0, 1.0), False)}

    def needle(self, length, scorer):
        self._count(f"needle:{length}")
        found = self.calls.count("needle:64") >= self.passes_at or length == 32
        return [NeedleResult(Cell(length, depth, 1, 0), found, 1.0) for depth in (0.0, 1.0)]


def run_to_the_end(corpora, workdir, stand_in, **changes):
    while True:
        run = prepare(parse(RunConfig, values(corpora, **changes)))
        run.suite = dataclasses.replace(stand_in, config=run.suite.config)
        run.suite.calls = stand_in.calls
        try:
            return program.train(run, workdir)
        except Stopped:
            stand_in.break_at = -1


def gates(workdir) -> list[dict]:
    return [json.loads(line) for line in (workdir / "gates.jsonl").read_text().splitlines()]


def curve(workdir) -> list[tuple]:
    keys = ("kind", "step", "tokens", "stage", "loss", "grad_norm", "learning_rate", "documents",
            "scores")  # fmt: skip
    return [tuple(map(str, map(r.get, keys))) for r in read_metrics(workdir)]


@pytest.fixture(scope="module")
def undisturbed(corpora, tmp_path_factory):
    workdir, stand_in = tmp_path_factory.mktemp("gated"), StandIn(None)
    assert run_to_the_end(corpora, workdir, stand_in) == 0
    return workdir, stand_in.calls


def test_a_gate_lengthens_its_stage_until_it_is_passed(undisturbed):
    workdir, _ = undisturbed
    verdicts = [r for r in gates(workdir) if r["kind"] == "verdict"]
    assert [(v["step"], v["verdict"]) for v in verdicts] == [
        (6, "not_yet"), (7, "not_yet"), (8, "passed"),
    ]  # fmt: skip
    assert [v["needles_found"] for v in verdicts] == [2, 2, 4]
    stages = [r["stage"] for r in read_metrics(workdir) if r["kind"] == "train"]
    assert stages == ["short"] * 4 + ["long"] * 4 + ["annealing"] * 4
    rates = [r["learning_rate"] for r in read_metrics(workdir) if r["kind"] == "train"]
    assert rates[4:8] == pytest.approx([3e-3] * 4) and rates[8:] == sorted(rates[8:], reverse=True)
    assert rates[-1] == pytest.approx(3e-3 / 8)


# In the baseline, in the first gate, in the second and in the last one.
@pytest.mark.parametrize("number", [1, 4, 9, 12])
def test_a_crash_in_a_gate_repeats_nothing_and_skips_nothing(
    corpora, undisturbed, tmp_path, number
):
    workdir, calls = undisturbed
    stand_in = StandIn(None, break_at=number)
    assert run_to_the_end(corpora, tmp_path, stand_in) == 0
    assert stand_in.calls == calls
    assert gates(tmp_path) == gates(workdir)
    assert curve(tmp_path) == curve(workdir)


def test_a_finished_run_asks_nothing_again(corpora, undisturbed):
    workdir, calls = undisturbed
    stand_in, before = StandIn(None), curve(workdir)
    assert run_to_the_end(corpora, workdir, stand_in) == 0
    assert stand_in.calls == [] and curve(workdir) == before


def test_a_lost_gates_file_is_made_of_the_checkpoints_verdicts(corpora, undisturbed, tmp_path):
    workdir, _ = undisturbed
    shutil.copytree(workdir, tmp_path / "run")
    (tmp_path / "run" / "gates.jsonl").unlink()
    assert run_to_the_end(corpora, tmp_path / "run", StandIn(None)) == 0
    verdicts = [r for r in gates(workdir) if r["kind"] == "verdict"]
    assert gates(tmp_path / "run") == verdicts


def test_what_is_not_passed_at_the_cap_stops_the_run_and_does_so_again(corpora, tmp_path):
    stand_in = StandIn(None, passes_at=99)
    for _ in range(2):
        with pytest.raises(UserError, match="gate_failed: stage 'long'.*needles 2 of 4"):
            run_to_the_end(corpora, tmp_path, stand_in)
    assert [r["verdict"] for r in gates(tmp_path) if r["kind"] == "verdict"] == [
        "not_yet", "not_yet", "not_yet", "gate_failed",
    ]  # fmt: skip
    assert len(stand_in.calls) == 2 + 4 * 4  # the second attempt measured nothing
    longer = values(corpora)["stages"]
    longer[1] = longer[1] | dict(gate=dict(every_tokens=512, max_tokens=20 * 512))
    stand_in.passes_at = 0
    assert run_to_the_end(corpora, tmp_path, stand_in, stages=longer) == 0


def test_the_average_is_that_of_the_checkpoints(undisturbed, corpora):
    workdir, _ = undisturbed
    run = prepare(parse(RunConfig, values(corpora)))
    verdicts = [Verdict(1, 6, False), Verdict(1, 7, False), Verdict(1, 8, True)]
    timeline = Timeline(run.config.stages, run.config.model.rope, run.config.mesh, verdicts)
    steps = average_steps(timeline.stages[-1])
    assert steps == [10, 12]
    averaged = jax.tree.leaves(load_model(workdir / "averaged").params)
    last = jax.tree.leaves(load_model(workdir).params)
    assert any((a != b).any() for a, b in zip(averaged, last, strict=True))
    kinds = [r["model"] for r in read_metrics(workdir) if r["kind"] == "evaluation"]
    assert kinds == ["last", "averaged"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.pop("evaluation"), r"stages.1.gate: needs config.evaluation with needle"),
        (lambda v: v["stages"][0].update(gate=v["stages"][1]["gate"]), "the first stage"),
        (lambda v: v["stages"][1]["gate"].update(max_tokens=512), "gate.max_tokens: 512 is less"),
        (lambda v: v["stages"][0].update(lr=dict(shape="linear", peak=1.0, end=0.0)),
         "lr.tokens: must be given.*'long'"),
        (lambda v: v["stages"][1].update(average=dict(checkpoints=1)), "only the last stage"),
        (lambda v: v["stages"][2].update(average=dict(checkpoints=9)), "9 in 4 steps"),
        (lambda v: v["evaluation"].update(length=33), "length 33 on the mesh of stage 1"),
        (lambda v: v["evaluation"]["needle"].update(statement=" the word of {key} was {value}."),
         "needle length 32 is too short"),
    ],
    ids=["no-evals", "first", "cap", "rate", "average", "too-many", "mesh", "short"],
)  # fmt: skip
def test_gates_that_cannot_work_are_refused_by_key(corpora, change, message):
    changed = values(corpora)
    change(changed)
    with pytest.raises(UserError, match=message):
        prepare(parse(RunConfig, changed))


def test_a_metric_that_is_no_longer_measured_is_named(corpora, tmp_path):
    """Of a task that was there before the first increase."""
    config = parse(RunConfig, values(corpora))
    timeline, log = lay_out(config), GateLog(tmp_path)
    number = next(n for n, stage in enumerate(timeline.stages) if stage.gate)
    metric = Metric((1.0,), (1.0,), True).as_json()
    first, end = timeline.stages[number].first_step, timeline.stages[number].end_step
    log.add({"kind": "baseline", "step": first, "part": "task:x", "metrics": {"x/acc": metric}})
    log.add({"kind": "part", "step": end, "part": "held_out:a", "metrics": {}})
    with pytest.raises(UserError, match="config.evaluation lacks x/acc, which was measured before"):
        Gates(log, None, print)._verdict(timeline, number, {"step": end, "tokens": 1}, [32])
