import json

import pytest

from llama3_jax.errors import UserError
from llama3_jax.training.goodput import CATEGORIES, Ledger, _read, summary


class Clock:
    def __init__(self, now: float):
        self.now = now

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def job(tmp_path):
    """Starts a process of the job at a time, with a clock of its own."""

    def start(now: float) -> tuple[Ledger, Clock]:
        clock = Clock(now)
        return Ledger(tmp_path / "goodput.json", clock, born=now - 10), clock

    return start


def train(ledger: Ledger, clock: Clock, first: int, last: int, compiles: bool = False) -> None:
    """Steps of 2 seconds, a second of waiting before each, 30 more where the first compiles."""

    def batches():
        for step in range(first, last):
            clock.now += 1
            yield step

    for step in ledger.fetched(batches()):
        with ledger.booking("compile"):
            clock.now += 30 if compiles and step == first else 0
        clock.now += 2
        ledger.stepped(step + 1)


def save(ledger: Ledger, clock: Clock, step: int) -> None:
    with ledger.booking("checkpoint"):
        ledger.mark(step)
        clock.now += 5


def content(tmp_path) -> dict:
    result = json.loads((tmp_path / "goodput.json").read_text())
    assert sum(result["seconds"].values()) == pytest.approx(result["elapsed"])
    assert result["elapsed"] == result["end"] - result["start"]
    assert result["seconds"].keys() == CATEGORIES.keys()
    for session in result["sessions"]:
        assert sum(session["seconds"].values()) == pytest.approx(session["end"] - session["start"])
    return result


def test_a_run_without_trouble(job, tmp_path):
    ledger, clock = job(1000)
    clock.now += 20
    ledger.begin(0)
    train(ledger, clock, 0, 10, compiles=True)
    save(ledger, clock, 10)
    with ledger.booking("evaluation"):
        clock.now += 7
    ledger.write()
    result = content(tmp_path)
    assert result["elapsed"] == 10 + 20 + 30 + 10 * 3 + 5 + 7
    assert {k: v for k, v in result["seconds"].items() if v} == {
        "setup": 30, "compile": 30, "step": 20, "data": 10, "checkpoint": 5, "evaluation": 7,
    }  # fmt: skip
    assert result["effective_training_time"] == 20 / result["elapsed"]


def test_a_kill_loses_what_was_done_after_the_checkpoint(job, tmp_path):
    ledger, clock = job(1000)
    ledger.begin(0)
    train(ledger, clock, 0, 4)
    save(ledger, clock, 4)
    train(ledger, clock, 4, 7)  # and no word more
    seen = clock.now
    ledger, clock = job(seen + 100 + 10)
    clock.now += 3
    ledger.begin(4)
    train(ledger, clock, 4, 10)
    ledger.write()
    result = content(tmp_path)
    assert result["seconds"]["step"] == 2 * 10
    assert result["seconds"]["lost_work"] == 3 * 3
    assert result["seconds"]["checkpoint"] == 5
    assert result["seconds"]["down"] == 100
    assert result["seconds"]["setup"] == 10 + 10 + 3


def test_lost_work_over_several_lives_when_the_newest_checkpoint_is_damaged(job, tmp_path):
    ledger, clock = job(1000)
    ledger.begin(0)
    for first in (0, 4):
        train(ledger, clock, first, first + 4)
        save(ledger, clock, first + 4)
    ledger, clock = job(2000)
    ledger.begin(8)
    train(ledger, clock, 8, 10)
    before = clock.now
    ledger, clock = job(before + 50)
    ledger.begin(4)  # 8 was damaged
    train(ledger, clock, 4, 10)
    ledger.write()
    result = content(tmp_path)
    assert result["seconds"]["step"] == 2 * 10
    assert [s["seconds"]["step"] for s in result["sessions"]] == [8, 0, 12]
    assert result["sessions"][1]["seconds"]["lost_work"] == 2 * 3


def test_a_rewind_in_the_same_process(job, tmp_path):
    ledger, clock = job(1000)
    ledger.begin(0)
    train(ledger, clock, 0, 4)
    save(ledger, clock, 4)
    train(ledger, clock, 4, 9)
    ledger.begin(4)
    train(ledger, clock, 4, 12)
    ledger.write()
    result = content(tmp_path)
    assert result["seconds"]["step"] == 2 * 12
    assert result["seconds"]["down"] == 0


def test_a_job_that_has_ended_is_not_prolonged_by_another_start(job, tmp_path):
    ledger, clock = job(1000)
    ledger.begin(0)
    train(ledger, clock, 0, 4)
    ledger.write()
    before = content(tmp_path)
    ledger, clock = job(9000)  # begins nothing
    save(ledger, clock, 4)
    ledger.write()
    assert content(tmp_path) == before


def test_processes_that_do_not_write(tmp_path):
    ledger = Ledger(None, Clock(5.0), born=1.0)
    ledger.begin(3)
    ledger.write()
    assert ledger.position()[:2] == (3, "setup")
    assert not list(tmp_path.iterdir())


def test_no_session_and_a_damaged_file(tmp_path):
    assert summary([])["effective_training_time"] is None
    path = tmp_path / "goodput.json"
    path.write_text("{")
    with pytest.raises(UserError, match="goodput.json: damaged"):
        _read(path)
