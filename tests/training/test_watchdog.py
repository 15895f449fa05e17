import threading

import pytest

from llama3_jax.parallel.liveness import missing
from llama3_jax.training.goodput import Ledger
from llama3_jax.training.watchdog import Watchdog, WatchdogConfig, limit

CONFIG = WatchdogConfig(multiple=10.0, floor_seconds=5.0, other_seconds=100.0)


def test_limits_follow_the_median_and_not_the_outliers():
    assert limit(CONFIG, "step", [1.0] * 4) == 100  # too few to tell
    assert limit(CONFIG, "step", [1.0] * 4 + [1000.0]) == 10
    assert limit(CONFIG, "data", [2.0] * 9) == 20
    assert limit(CONFIG, "step", [0.01] * 9) == 5
    for category in ("compile", "checkpoint", "evaluation", "setup"):
        assert limit(CONFIG, category, [1.0] * 9) == 100


@pytest.fixture
def watched(tmp_path):
    now = [0.0]
    ledger = Ledger(None, lambda: now[0], born=0.0)
    ledger.begin(0)
    for step in range(8):
        ledger.enter("step")
        now[0] += 1.0
        ledger.stepped(step + 1)
    return ledger, Watchdog(CONFIG, ledger, tmp_path, 0, None)


def looks(watchdog: Watchdog, start: float, seconds: float) -> list[str]:
    ticks = int(seconds / 0.5) + 1
    found = [watchdog.look(start + 0.5 * tick) for tick in range(ticks)]
    return [message for message in found if message]


def test_a_step_that_takes_far_longer_than_its_fellows(watched):
    ledger, watchdog = watched
    assert not looks(watchdog, 0, 9)
    (message, *_) = looks(watchdog, 9, 3)
    assert "hang after step 8: step has taken 10 s, allowed are 10 s, a step takes 1 s" in message


def test_any_sign_of_life_starts_the_wait_anew(watched):
    ledger, watchdog = watched
    for second in range(60):
        ledger.enter("data" if second % 2 else "step")
        assert not looks(watchdog, second, 1)


def test_compiling_and_saving_have_their_own_limit(watched):
    ledger, watchdog = watched
    for start, category in ((0, "compile"), (200, "checkpoint"), (400, "evaluation")):
        with ledger.booking(category):
            assert not looks(watchdog, start, 99)
            assert looks(watchdog, start + 99, 3)


def test_a_process_that_was_stopped_and_goes_on_did_not_hang(watched):
    _, watchdog = watched
    assert not looks(watchdog, 0, 5)
    assert watchdog.look(5000.0) is None


def test_stacks_of_all_threads_are_written(watched, tmp_path):
    _, watchdog = watched
    release = threading.Event()

    def stuck_in_a_loader():
        release.wait()

    thread = threading.Thread(target=stuck_in_a_loader)
    thread.start()
    text = watchdog.write_stacks().read_text()
    release.set()
    thread.join()
    assert "after step 8: step" in text
    assert "stuck_in_a_loader" in text and "test_stacks_of_all_threads" in text


def test_stacks_that_find_no_place_go_to_standard_error(watched, tmp_path, capfd):
    """As on a full disk, which may be what the process hangs at: it must end all the same."""
    _, watchdog = watched
    watchdog._path.parent.parent.mkdir(exist_ok=True)
    watchdog._path.parent.write_text("no folder")
    assert watchdog.write_stacks() == "standard error"
    error = capfd.readouterr().err
    assert "after step 8: step" in error and "test_stacks_that_find_no_place" in error


def test_who_is_missing():
    waiting = (True, 7, "step", 40.0)
    behind = {"a": waiting, "b": (True, 6, "data", 41.0), "c": waiting}
    assert missing(behind) == "missing: b (after step 6: data for 41 s)"
    same_step = {"a": waiting, "b": (True, 7, "checkpoint", 41.0), "c": waiting}
    assert missing(same_step) == "missing: b (after step 7: checkpoint for 41 s)"
    dead = {"a": (True, 6, "data", 41.0), "b": waiting, "c": (False, *waiting[1:])}
    assert missing(dead) == "missing: c: no sign of life"
    everywhere = dict.fromkeys("abc", waiting)
    assert missing(everywhere) == "all processes are at the same place, after step 7"


class Others:
    """Stands for the watch over several processes, one of which is busy for the first ten looks."""

    looks, messages = 0, ()

    def someone_is_busy(self) -> bool:
        self.looks += 1
        return self.looks <= 10

    def hang(self, message: str) -> None:
        self.messages += (message,)


def test_a_step_may_wait_for_a_process_that_compiles(watched, tmp_path):
    ledger, _ = watched
    others, config = Others(), WatchdogConfig(multiple=1e-9, floor_seconds=0.02)
    watchdog = Watchdog(config, ledger, tmp_path, 0, others)
    watchdog._run()
    (message,) = others.messages
    assert others.looks == 11 and "hang after step 8: step has taken" in message
