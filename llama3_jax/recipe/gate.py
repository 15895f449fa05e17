"""The gate between context lengths (Llama 3 paper, section 3.4.2).

A stage with a gate ends when two things hold. `recovered`: every short-context metric is at least
what it was before the first increase, less the larger of epsilon and one standard error of the
difference by a paired bootstrap. `needle`: the needle is found at all lengths so far, at each depth,
with every seed. Else the stage goes on, and where it may not, the run stops with `gate_failed`.

Everything measured is written to gates.jsonl as soon as it is known, so that a run which was
interrupted in a gate goes on after the last part. A verdict is a function of the parameters at its
step; records of later steps than the checkpoint that a run goes on from are forgotten, as in
metrics.jsonl, for they will be made again.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from llama3_jax.errors import UserError
from llama3_jax.evaluation.metrics import Metric, recovered
from llama3_jax.evaluation.scoring import Scorer
from llama3_jax.evaluation.suite import EvaluationConfig, Suite, needle_summary
from llama3_jax.parallel import processes
from llama3_jax.recipe.timeline import Timeline, Verdict
from llama3_jax.training.json_log import JsonLog
from llama3_jax.training.metrics import GATES_FILE

PASSED, NOT_YET, FAILED = "passed", "not_yet", "gate_failed"


class GateLog:
    """gates.jsonl: `baseline` and `part` records hold what was measured, `verdict` what it decided."""

    def __init__(self, workdir: Path):
        """All processes hold what the first one reads, which alone writes."""
        self._log = JsonLog(workdir / GATES_FILE)
        self.records: list[dict[str, Any]] = self._log.read()

    def back_to(self, step: int, saved: Sequence[Mapping[str, Any]]) -> None:
        """Forgets records of steps after `step`; adds the checkpoint's verdicts, should one be lost."""
        kept = [record for record in self.records if record["step"] <= step]
        known = [(r["stage_number"], r["step"]) for r in kept if r["kind"] == "verdict"]
        lost = [dict(r) for r in saved if (r["stage_number"], r["step"]) not in known]
        self.records = sorted(kept + lost, key=lambda record: record["step"])
        if processes.is_first():
            if lost:
                self._log.replace(self.records)
            else:
                self._log.cut_after(step)

    def add(self, record: dict[str, Any]) -> dict[str, Any]:
        self.records.append(record)
        if processes.is_first():
            self._log.append(record, sync=True)
        return record

    def of(self, kind: str, step: int) -> list[dict[str, Any]]:
        return [r for r in self.records if r["kind"] == kind and r["step"] == step]

    @property
    def verdict_records(self) -> list[dict[str, Any]]:
        return [r for r in self.records if r["kind"] == "verdict"]

    @property
    def verdicts(self) -> list[Verdict]:
        return [
            Verdict(r["stage_number"], r["step"], r["verdict"] == PASSED)
            for r in self.verdict_records
        ]


class Gates:
    """What the gates of a run are to do after a step, given what they have decided."""

    def __init__(self, log: GateLog, suite: Suite | None, say: Callable[[str], None]):
        self.log, self._suite, self._say = log, suite, say

    def baseline_due(self, timeline: Timeline, step: int) -> bool:
        """Whether the short-context metrics before the first increase are to be measured now."""
        first = next((s for s in timeline.stages if s.gate), None)
        if first is None or step != first.first_step:
            return False
        done = {record["part"] for record in self.log.of("baseline", step)}
        return not done.issuperset(self._suite.short_parts)

    def stage_due(self, timeline: Timeline, step: int) -> int | None:
        """The number of the stage whose gate is to be asked now."""
        passed = {verdict.stage for verdict in self.log.verdicts if verdict.passed}
        for number, stage in enumerate(timeline.stages):
            if stage.gate and number not in passed and stage.end_step == step:
                return number
        return None

    def due(self, timeline: Timeline, step: int) -> bool:
        return self.baseline_due(timeline, step) or self.stage_due(timeline, step) is not None

    def run(
        self, timeline: Timeline, step: int, scorer: Scorer, between: Callable[[], None]
    ) -> None:
        """Measures what is missing of the gate at `step` and records the verdict.

        `between` is called before each part; what it raises ends the gate, and what was measured is
        kept.

        Raises:
          UserError: gate_failed: not passed, and the stage may not go on.
        """
        number = self.stage_due(timeline, step)
        where = {"step": step, "tokens": timeline.consumed(step)}
        if number is None:
            self._say(f"short-context metrics before the first increase of length, step {step}")
            self._measure("baseline", self._suite.short_parts, where, scorer, between)
            return
        stage = timeline.stages[number]
        given = [r for r in self.log.of("verdict", step) if r["stage_number"] == number]
        if not given:
            lengths = sorted({s.length for s in timeline.stages[: number + 1]})
            parts = [*self._suite.short_parts, *(f"needle:{length}" for length in lengths)]
            self._say(f"gate of stage {stage.name!r} after {where['tokens']:,} tokens")
            self._measure("part", parts, where, scorer, between)
            given = [self.log.add(self._verdict(timeline, number, where, lengths))]
        record = given[-1]
        self._say(describe(record))
        if record["verdict"] != PASSED and _no_more(timeline, number):
            raise UserError(
                f"gate_failed: {describe(record)}; it may not go on beyond "
                f"config.stages.{number}.gate.max_tokens={stage.gate.max_tokens}"
            )

    def _measure(self, kind, parts, where, scorer, between) -> None:
        done = {record["part"] for record in self.log.of(kind, where["step"])}
        for part in parts:
            if part in done:
                continue
            between()
            record = {"kind": kind, **where, "part": part}
            if part.startswith("needle:"):
                results = self._suite.needle(int(part.removeprefix("needle:")), scorer)
                record |= needle_summary(results)
            else:
                measured = self._suite.short(part, scorer)
                record["metrics"] = {name: m.as_json() for name, m in measured.items()}
            self.log.add(record)

    def _verdict(self, timeline: Timeline, number: int, where, lengths) -> dict[str, Any]:
        stage = timeline.stages[number]
        first = next(s for s in timeline.stages if s.gate)
        before = _metrics(self.log.of("baseline", first.first_step))
        after = _metrics(self.log.of("part", where["step"]))
        if missing := sorted(set(after) - set(before)):
            raise UserError(
                f"{GATES_FILE} lacks {missing[0]} before the first increase (step "
                f"{first.first_step}): the file was lost or evaluation.tasks changed since; restore "
                f"it, or go on from a checkpoint of that step"
            )
        if missing := sorted(set(before) - set(after)):
            raise UserError(
                f"config.evaluation lacks {missing[0]}, which was measured before the first increase: "
                "restore it, or the gate cannot compare"
            )
        rows = recovered(before, after, stage.gate.epsilon)
        needles = [r for r in self.log.of("part", where["step"]) if "cells" in r]
        found, asked = (sum(r[key] for r in needles) for key in ("found", "asked"))
        all_recovered, all_found = all(row["recovered"] for row in rows), found == asked
        verdict = PASSED if all_recovered and all_found else NOT_YET
        if verdict == NOT_YET and _no_more(timeline, number):
            verdict = FAILED
        return {
            "kind": "verdict", **where, "stage": stage.name, "stage_number": number,
            "length": stage.length, "verdict": verdict, "recovered": all_recovered,
            "needle": all_found, "needles_found": found, "needles_asked": asked,
            "lengths": lengths, "metrics": rows,
        }  # fmt: skip


def _metrics(records: list[dict[str, Any]]) -> dict[str, Metric]:
    return {
        name: Metric.of_json(values)
        for record in records
        for name, values in record.get("metrics", {}).items()
    }


def _no_more(timeline: Timeline, number: int) -> bool:
    """Whether the stage has as many steps as its gate allows."""
    stage = timeline.stages[number]
    return stage.steps >= stage.gate.max_tokens // stage.batch_tokens


def describe(record: Mapping[str, Any]) -> str:
    """A verdict in a line."""
    worse = [row["metric"] for row in record["metrics"] if not row["recovered"]]
    short = "recovered" if record["recovered"] else f"not recovered: {', '.join(worse)}"
    return (
        f"stage {record['stage']!r} (length {record['length']:,}) after {record['tokens']:,} tokens: "
        f"{record['verdict']}; needles {record['needles_found']} of {record['needles_asked']}, "
        f"short context {short}"
    )


def check_gates(timeline: Timeline, evaluation: EvaluationConfig | None) -> None:
    """Refuses gates that have nothing to decide by.

    Raises:
      UserError: names the key.
    """
    gated = [number for number, stage in enumerate(timeline.stages) if stage.gate]
    if not gated:
        return
    where = f"config.stages.{gated[0]}.gate"
    if gated[0] == 0:
        raise UserError(f"{where}: the first stage has nothing before it to recover")
    asks = evaluation and evaluation.needle and (evaluation.tasks or evaluation.held_out_tokens)
    if not asks:
        raise UserError(
            f"{where}: needs config.evaluation with needle, and tasks or held_out_tokens"
        )


def gate_lengths(timeline: Timeline) -> list[int]:
    """All lengths at which some gate looks for needles."""
    gated = [number for number, stage in enumerate(timeline.stages) if stage.gate]
    return sorted({s.length for s in timeline.stages[: gated[-1] + 1]}) if gated else []
