"""The local executor: what happens to units when anybody is killed at any point."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from conftest import REPOSITORY

from llama3_jax.launching import look
from llama3_jax.launching.store import ENDED, Store

# A unit's command leaves a line for each time it really ran.
UNITS = """
from llama3_jax.launching.experiment import WorkUnit


def sweep(argument):
    seconds, *codes = argument.split(",")
    script = "echo $LLAMA3_JAX_UNIT >> {{experiment}}/ran; sleep %s; exit %s"
    return [
        WorkUnit(name=f"u{{i}}", command=("sh", "-c", script % (seconds, code)), {more})
        for i, code in enumerate(codes)
    ]
"""


@pytest.fixture
def launch(tmp_path):
    """Runs the launcher on a file of units (exit codes as its argument), in a root of its own."""
    started = []

    def run(*arguments: str, units: str = UNITS, more: str = "", wait: bool = True):
        (tmp_path / "units.py").write_text(units.format(more=more))
        arguments = [a.replace("UNITS", str(tmp_path / "units.py")) for a in arguments]
        command = [sys.executable, "-m", "llama3_jax.launch", *arguments]
        child = subprocess.Popen(
            [*command, f"--root={tmp_path / 'root'}"], cwd=REPOSITORY, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env=os.environ | {"COLUMNS": "200", "TEST_ROOT": str(tmp_path)},
        )  # fmt: skip
        started.append(child)
        if not wait:
            return child
        out, error = child.communicate(timeout=120)
        return child.returncode, out, error

    yield run
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("TEST_ROOT") == str(tmp_path):
                process.kill()
    for child in started:
        child.wait()


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "root")


def until(condition, seconds: float = 40):
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end
        time.sleep(0.02)
    return value


def supervisors(root: Path) -> list[psutil.Process]:
    name = "llama3_jax.launching.supervisor"
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.cmdline()[2:] == [name, str(root)] and process.status() != "zombie":
                found.append(process)
    return found


def ran(tmp_path: Path) -> list[str]:
    return sorted((tmp_path / "root/1/ran").read_text().split(), key=lambda w: int(w.split("/")[1]))


def check_killed_supervisors(launch, store, tmp_path, count: int) -> None:
    """Kills launcher and supervisor on the way; every unit is done once."""
    argument = "--config=UNITS:0.05," + ",".join(["0"] * count)
    launcher = launch(argument, "--cpus=2", "--wait", wait=False)
    for share in (0.2, 0.4, 0.6):
        done = lambda: sum(u.state == "done" for u in store.units(1)) > share * count  # noqa: E731, B023
        until(done, 90)
        launcher.kill()
        for process in until(lambda: supervisors(tmp_path / "root")):
            process.kill()
        launcher = launch(argument, "--wait", wait=False)  # the same command goes on
    until(lambda: all(u.state == "done" for u in store.units(1)), 90)
    assert [e.xid for e in store.experiments()] == [1]
    assert ran(tmp_path) == [f"1/{wid}" for wid in range(1, count + 1)]
    assert all(unit.exit_code == 0 for unit in store.units(1))


def test_killing_launcher_and_supervisor_loses_and_repeats_nothing(launch, store, tmp_path):
    check_killed_supervisors(launch, store, tmp_path, 24)


@pytest.mark.slow
def test_two_hundred_units_with_three_kills(launch, store, tmp_path):
    check_killed_supervisors(launch, store, tmp_path, 200)


def test_units_that_run_bring_a_killed_supervisor_back(launch, store, tmp_path):
    launch("--config=UNITS:1,0,0", "--cpus=1")
    until(lambda: store.units(1)[0].state == "running")
    (killed,) = until(lambda: supervisors(tmp_path / "root"))
    killed.kill()
    until(lambda: all(u.state == "done" for u in store.units(1)))
    assert ran(tmp_path) == ["1/1", "1/2"]


def test_outcomes_by_exit_code(launch, store, tmp_path):
    code, out, _ = launch("--config=UNITS:0,0,2,1", "--cpus=2", "--wait", more="retries=1")
    assert code == 1
    assert [u.state for u in store.units(1)] == ["done", "failed", "failed"]
    assert [u.attempt for u in store.units(1)] == [1, 1, 2]  # a user's error is not tried again
    assert "unit 1/2 (u1) ended with code 2" in out
    # The same command is the same experiment; only what failed is queued again.
    code, out, _ = launch("--config=UNITS:0,0,2,1", "--wait", more="retries=1")
    assert "experiment 1: known already; 2 units queued again" in out and code == 1
    assert ran(tmp_path) == ["1/1", *["1/2"] * 2, *["1/3"] * 4]
    _, out, _ = launch("--config=UNITS:0,0,2,1", "--new", more="retries=1")
    assert "experiment 2: 3 work units" in out


def test_a_unit_that_asks_to_be_queued_again_is_and_counts_no_failure(launch, store):
    script = "test -e {{workdir}}/saved && exit 0; touch {{workdir}}/saved; exit 75"
    file = f'''
from llama3_jax.launching.experiment import WorkUnit


def sweep():
    return [WorkUnit(name="u", retries=0, command=("sh", "-c", "{script}"))]
'''
    assert launch("--config=UNITS", "--wait", units=file)[0] == 0
    (unit,) = store.units(1)
    assert (unit.state, unit.attempt, unit.failures) == ("done", 2, 0)


def test_dependencies_wait_and_are_blocked_by_a_failure(launch, store, tmp_path):
    file = """
from llama3_jax.launching.experiment import WorkUnit


def sweep():
    script = "echo $LLAMA3_JAX_UNIT >> {{experiment}}/ran; test -e {{experiment}}/mended || exit 2"
    shell = ("sh", "-c")
    return [
        WorkUnit(name="last", command=(*shell, "test $(wc -l < {{experiment}}/ran) = 3"),
                 after=("fit",)),
        WorkUnit(name="fit", command=(*shell, "echo fit >> {{experiment}}/ran"), after=("run",)),
        WorkUnit(name="run", command=(*shell, script)),
    ]
"""
    code, out, _ = launch("--config=UNITS", "--cpus=3", "--wait", units=file)
    assert code == 1 and out.count("blocked") == 2
    assert [u.state for u in store.units(1)] == ["queued", "queued", "failed"]
    (tmp_path / "root/1/mended").touch()
    code, out, _ = launch("resume", "1", "--wait")
    assert code == 0, out
    assert (tmp_path / "root/1/ran").read_text() == "1/3\n1/3\nfit\n"


def test_a_killed_unit_is_started_again_and_leaves_nothing_behind(launch, store, tmp_path):
    launch("--config=UNITS:30,0")
    unit = until(lambda: [u for u in store.units(1) if u.state == "running"])[0]
    sleeper = until(lambda: psutil.Process(unit.pid).children(recursive=True))[0]
    os.kill(unit.pid, signal.SIGKILL)  # the runner alone: its program lives on
    again = until(lambda: [u for u in store.units(1) if u.state == "running" and u.attempt == 2])[0]
    assert again.failures == 1 and not psutil.pid_exists(sleeper.pid)
    # Asked to stop, the unit has SIGTERM; then it is not started again.
    until(lambda: psutil.Process(again.pid).children(recursive=True))
    launch("stop", "1/1")
    until(lambda: store.units(1)[0].state in ENDED)
    assert store.units(1)[0].state == "stopped"
    assert ran(tmp_path) == ["1/1", "1/1"]


def test_two_launchers_at_once(launch, store, tmp_path):
    first = [launch("--config=UNITS:0,0,0,0", "--cpus=2", wait=False) for _ in range(2)]
    other = launch("--config=UNITS:0.01,0,0", wait=False)
    for child in (*first, other):
        assert child.wait(60) == 0, child.communicate()
    assert sorted(len(store.units(e.xid)) for e in store.experiments()) == [2, 3]
    until(lambda: all(u.state == "done" for e in (1, 2) for u in store.units(e)))
    assert all(u.attempt == 1 for e in (1, 2) for u in store.units(e))


def test_slots(launch, store):
    more = "requirements=dict(cpus=2, gpus=1)"
    code, _, error = launch("--config=UNITS:0,0", "--cpus=1", "--gpus=1", more=more)
    assert (code, error) == (2, "error: needs 2 cpus, --cpus says 1; nothing was queued\n")
    launch("--config=UNITS:0.2,0,0,0", "--cpus=4", "--gpus=2", "--wait", more=more)
    spans = [(u.started, u.ended, u.gpus) for u in store.units(1)]
    for moment, _, _ in spans:
        busy = [gpus for start, end, gpus in spans if start <= moment < end]
        assert len(busy) <= 2 and len({g for gpus in busy for g in gpus}) == len(busy)


def test_looking(launch, store):
    launch("--config=UNITS:0,2,0", "--wait", more="environment=dict(WORD='seen')")
    assert "1 done, 1 failed" in launch("list")[1]
    _, out, _ = launch("status", "1/1")
    assert "ended with code 2" in out and "attempt 1" in out and "u1" not in out
    assert launch("logs", "1/1")[1].startswith("--- attempt 1, ")
    followed = launch("logs", "1/1", "-f")
    assert followed[0] == 0 and "--- attempt 1, " in followed[1]
    assert look.duration(store.units(1)[0]).startswith("0:00:0")


def test_an_edited_config_is_not_known_already(launch, store, tmp_path):
    def config(lr):
        return f"""
import ml_collections


def get_config():
    return ml_collections.ConfigDict(dict(lr={lr}))


def sweep():
    from llama3_jax.launching.experiment import WorkUnit

    return [WorkUnit(name="first", command=("true",)),
            WorkUnit(name="u", program="curate", after=("first",), retries=0)]
"""

    assert launch("--config=UNITS", "--wait", units=config("1"))[0] == 1  # no curation's config
    code, _, error = launch("--config=UNITS", units=config("2"))
    assert code == 2 and "edited since experiment 1 was launched" in error
    assert len(store.experiments()) == 1
    code, out, _ = launch("resume", "1", units=config("2"))
    assert "1 units queued again" in out
    first, second = store.launches(1)
    assert first.command[0].startswith("--config=") and second.command[:2] == ["resume", "1"]
    assert "lr=1" in (tmp_path / "root/1/launches/1/1-units.py").read_text()
    assert "lr=2" in (tmp_path / "root/1/launches/2/1-units.py").read_text()
    shown = launch("status", "1")[1]
    assert f"launch 2, {look.clock(second.created)} on " in shown and "resume 1" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["status", "9"], "there is no experiment 9"),
        (["status", "1/9"], "experiment 1 has no work unit 9"),
        (["status", "one"], "XID or XID/WID is expected"),
        (["logs", "1"], "name one, as 1/1"),
        (["stop"], "stop: XID or XID/WID is required"),
        (["statsu", "1"], "'statsu' is no command; known: list, status"),
        (["--config=/nowhere.py"], "--config=/nowhere.py: there is no such file"),
        (["--config=UNITS"], "missing a required argument: 'argument'"),
        (["--confg=UNITS:0,0"], "Unknown command line flag 'confg'. Did you mean: config"),
        (
            ["--config=UNITS:0,0", "--config.seed"],
            "--config.seed: a value is missing; --config.seed=V",
        ),
        (["status", "1", "2"], "unexpected argument '2' after status 1"),
        (["list", "1"], "list: unexpected argument '1'"),
        (["status", "1", "--config.seed=1"], "--config.seed=1: status takes no config"),
        (["--config=UNITS:0,0", "--executor=slurm"], "there is no Slurm here (no sbatch)"),
    ],
)
def test_one_line_that_names_the_mistake(launch, store, monkeypatch, arguments, message):
    monkeypatch.setenv("PATH", os.path.dirname(sys.executable) + ":/bin")
    if "slurm" in arguments[-1]:
        monkeypatch.setenv("PATH", "")
    store.add("x", "", "local", "/", {}, lambda d: [row(wid) for wid in (1, 2)], False)
    before = store.experiments()
    code, _, error = launch(*arguments)
    assert code == 2 and message in error and error.count("\n") == 1
    assert store.experiments() == before


def test_options_and_words_come_in_any_order(launch, store, tmp_path):
    out = launch("--config=UNITS:0,0", "--wait")[1]
    assert "look:" not in out
    root = f"--root={tmp_path / 'root'}"
    for words in ([root, "list"], ["--root", str(tmp_path / "root"), "list"], ["list", root]):
        assert "1 done" in launch(*words)[1]
    for words in (["-f", "logs", "1/1"], ["logs", "-f", "1/1"], [root, "logs", "1/1", "--follow"]):
        assert "--- attempt 1, " in launch(*words)[1]
    out = launch("--config=UNITS:0,0", "--new")[1]
    assert f"look: python -m llama3_jax.launch status 2 {root} (or logs 2/1 -f, stop 2" in out


def row(wid: int) -> dict:
    return {
        "wid": wid, "name": str(wid), "command": ["true"], "workdir": "/", "environment": {},
        "after": [], "requirements": {"cpus": 1, "gpus": 0}, "retries": 0,
    }  # fmt: skip
