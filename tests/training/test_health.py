import json

import numpy as np
import pytest

from llama3_jax.errors import UserError
from llama3_jax.training.events import Events
from llama3_jax.training.health import Health, HealthConfig
from llama3_jax.training.step import NO_LIMITS


def config(**changes) -> HealthConfig:
    return HealthConfig(**dict(window=16, least=8, loss_spike="skip") | changes)


def judged(health: Health, losses, norms=None, first: int = 0, stage: int = 0) -> list:
    """Findings of steps in a row, each judged after the limits of the next one are asked for."""
    norms = [1.0] * len(losses) if norms is None else norms
    findings = []
    for step, (loss, norm) in enumerate(zip(losses, norms, strict=True), start=first):
        health.limits(step + 1, stage)
        findings.append(health.judge(step, stage, float(loss), float(norm)))
    return findings


def reference_limit(values, deviations: float) -> float:
    """The band by its definition, in float64."""
    values = np.sort(np.asarray(values, np.float64))
    median = np.median(values)
    deviation = 1.4826 * np.median(np.abs(values - median))
    return median + deviations * max(deviation, 0.01 * abs(median))


def test_the_limits_are_those_of_the_definition():
    random = np.random.default_rng()
    losses = 2.5 + 0.1 * random.standard_normal(40)
    norms = np.exp(0.3 * random.standard_normal(40))
    health = Health(config(grad_norm_spike="skip", deviations=50.0))
    assert judged(health, losses, norms) == [None] * 40
    limits = health.limits(40, 0)  # step 39 does not count yet
    assert limits.loss == pytest.approx(reference_limit(losses[23:39], 50), rel=1e-6)
    logs = np.log(norms[23:39])
    deviation = 1.4826 * np.median(np.abs(logs - np.median(logs)))
    assert limits.grad_norm == pytest.approx(np.exp(np.median(logs) + 50 * deviation), rel=1e-5)


def test_noise_is_no_spike_and_spikes_do_not_widen_the_band():
    random = np.random.default_rng(0)
    losses = 2.0 + 0.05 * random.standard_normal(4000)
    spikes = [500, 501, 502, 1700, 3999]
    losses[spikes] += 1.0
    findings = judged(Health(HealthConfig(loss_spike="record")), losses)
    assert [step for step, finding in enumerate(findings) if finding] == spikes


def test_a_fall_is_no_spike_and_a_new_stage_starts_anew():
    health = Health(config())
    assert not any(judged(health, np.linspace(8, 3, 30)))
    assert health.limits(30, stage=0) != NO_LIMITS
    assert health.limits(30, stage=1) == NO_LIMITS
    assert not any(judged(health, [6.0] * 8, first=30, stage=1))
    assert judged(health, [6.0, 9.0], first=38, stage=1)[1].kinds == ("loss_spike",)


def test_each_kind_has_its_action_and_the_strictest_counts():
    health = Health(config(loss_spike="skip", grad_norm_spike="stop", not_finite="rewind"))
    judged(health, [2.0] * 12)
    spike = health.judge(12, 0, 5.0, 50.0)
    assert (spike.kinds, spike.action) == (("loss_spike", "grad_norm_spike"), "stop")
    assert health.judge(13, 0, 5.0, 1.0).action == "skip"
    assert health.judge(14, 0, 2.0, float("nan")).action == "rewind"
    assert health.judge(15, 0, float("inf"), 1.0).kinds == ("not_finite",)


def test_only_what_is_to_be_skipped_has_a_limit_on_the_device():
    health = Health(config(loss_spike="record", grad_norm_spike="skip"))
    judged(health, [2.0] * 12)
    assert health.limits(12, 0).loss == float("inf")
    assert 1 < health.limits(12, 0).grad_norm < 2


def test_a_level_that_was_applied_becomes_the_band_and_one_that_was_skipped_does_not():
    for action, expected in (("record", 8), ("skip", 16)):
        health = Health(config(loss_spike=action))
        judged(health, [2.0] * 16)
        assert sum(map(bool, judged(health, [4.0] * 16, first=16))) in range(expected, expected + 3)


def test_the_state_goes_through_json_and_decides_the_same():
    random = np.random.default_rng()
    losses = (2 + 0.3 * random.standard_normal(200)).astype(np.float32)
    norms = np.exp(random.standard_normal(200)).astype(np.float32)
    settings = config(deviations=2.0, grad_norm_spike="skip")
    whole = judged(Health(settings), losses, norms)
    cut = int(random.integers(1, 199))
    health = Health(settings)
    first = judged(health, losses[:cut], norms[:cut])
    health = Health(settings, json.loads(json.dumps(health.state())))
    assert first + judged(health, losses[cut:], norms[cut:], first=cut) == whole


EVENT = {"stage": "one", "step": 3, "batch": 3, "kinds": ["loss_spike"], "action": "skip"}


def test_events_are_written_once_and_keep_their_number(tmp_path):
    events = Events(tmp_path, writes=True)
    assert events.add(EVENT) == 0
    assert events.add(EVENT | {"step": 4, "batch": 4}) == 1
    with open(tmp_path / "events.jsonl", "a") as file:
        file.write('{"event": 2, "sta')  # killed while it wrote
    events = Events(tmp_path, writes=True)
    assert events.add(EVENT) == 0  # met again after a resume
    assert events.add(EVENT | {"step": 5, "batch": 5, "left_out": {"1": [4, 5]}}) == 2
    assert events.add(EVENT | {"step": 5, "batch": 6, "left_out": {"1": [6], "2": [0]}}) == 3
    for again in (events, Events(tmp_path, writes=False)):
        assert [event["event"] for event in again.events] == [0, 1, 2, 3]
        assert again.left_out() == {1: [4, 5, 6], 2: [0]}
        assert again.left_out(before=3) == {1: [4, 5]} and again.rewinds() == 2
    (tmp_path / "events.jsonl").write_text("{}\nnonsense\n")
    with pytest.raises(UserError, match=r"events.jsonl: line 2 is not JSON"):
        Events(tmp_path, writes=False)


def test_processes_that_do_not_write_hold_the_same(tmp_path):
    events = Events(tmp_path, writes=False)
    assert events.add(EVENT) == 0 and events.events and not list(tmp_path.iterdir())
