"""The Slurm executor, on a real Slurm of this machine (tests/launching/slurm.sh starts it)."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import QUICK, REPOSITORY, command_environment

from llama3_jax.launching import slurm as slurm_executor
from llama3_jax.launching.slurm import sbatch_options
from llama3_jax.launching.store import ENDED, Store
from llama3_jax.training.metrics import read_metrics

SCRIPT = Path(__file__).with_name("slurm.sh")
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged")

TRAINING = '''
from llama3_jax.launching.experiment import Requirements
from llama3_jax.recipe.config import run_config


def get_config(argument):
    """`argument`: corpora, data ranks, steps."""
    corpora, ranks, steps = argument.split(",")
    return run_config(
        model=dict(vocab_size=272, dim=32, layers=2, heads=4, kv_heads=2, head_dim=8, ffn_dim=64,
                   dtype="float32"),
        data=dict(sources={n: dict(train=f"{corpora}/{n}/train") for n in "ab"}),
        stages=[dict(name="only", tokens=int(steps) * 256, length=32, batch_tokens=256,
                     mix=dict(a=0.7, b=0.3), mesh=dict(data=int(ranks)),
                     lr=dict(shape="cosine", peak=3e-3, end=3e-4, warmup_tokens=500))],
        checkpoint=dict(every_steps=1000),
    )
'''
SWEEP = """

def sweep(argument):
    from llama3_jax.launching.experiment import WorkUnit

    units = [WorkUnit(name=f"s{s}", argument=argument, overrides={"seed": s}) for s in range(6)]
    count = ("sh", "-c", "cat {experiment}/*/metrics.jsonl | wc -l > {experiment}/lines")
    return [*units, WorkUnit(name="count", command=count, after=tuple(u.name for u in units))]
"""
PROCESSES = """
REQUIREMENTS = Requirements(tasks_per_node=2)


def sweep(argument):
    return [argument]
"""


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """SLURM_CONF of a running Slurm."""
    if missing := [name for name in PROGRAMS if not shutil.which(name)]:
        pytest.skip(f"no Slurm here ({', '.join(missing)} missing); .ci/run installs it")
    if os.geteuid() != 0:
        pytest.skip("starting Slurm needs root")
    folder = tmp_path_factory.mktemp("slurm")
    started = subprocess.run([SCRIPT, "start", folder], capture_output=True, text=True)
    if started.returncode:
        pytest.skip(f"Slurm does not start here: {started.stderr.strip()}")
    yield started.stdout.strip()
    subprocess.run([SCRIPT, "stop", folder], check=True)


@pytest.fixture
def launch(slurm, tmp_path, compilation_cache):
    environment = command_environment(compilation_cache) | {"SLURM_CONF": slurm}

    def run(*arguments: str, file: str = "", extra: dict[str, str] | None = None) -> str:
        if file:
            (tmp_path / "file.py").write_text(file)
        arguments = [a.replace("FILE", str(tmp_path / "file.py")) for a in arguments]
        command = [sys.executable, "-m", "llama3_jax.launch", *arguments]
        done = subprocess.run(
            [*command, f"--root={tmp_path / 'root'}"], cwd=REPOSITORY, capture_output=True,
            text=True, env=environment | {"COLUMNS": "200"} | (extra or {}), timeout=300,
        )  # fmt: skip
        assert done.returncode in (0, 1), done.stderr
        return done.stdout

    run.slurm = lambda *command: (
        subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    )
    run.conf = slurm
    return run


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "root")


def until(condition, seconds: float = 240):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def curve(workdir: Path) -> list[tuple]:
    keys = ("step", "tokens", "loss", "losses", "grad_norm", "documents")
    return [tuple(r[k] for k in keys) for r in read_metrics(workdir) if r["kind"] == "train"]


COMMANDS = """
from llama3_jax.launching.experiment import WorkUnit


def sweep():
    say = "echo $LLAMA3_JAX_UNIT $SLURM_NTASKS >> {experiment}/ran; "
    crash = say + "test -e {workdir}/again && exit 0; touch {workdir}/again; exit 9"
    codes = {"a": "exit 0", "b": "exit 0", "c": "sleep 0.2", "wrong": "exit 2"}
    units = [WorkUnit(name=n, command=("sh", "-c", say + c)) for n, c in codes.items()]
    return [
        WorkUnit(name="after", command=("sh", "-c", say), after=("a", "b", "c")),
        WorkUnit(name="blocked", command=("true",), after=("wrong", "a")),
        *units,
    ]
"""


def test_an_array_with_dependencies_and_a_failure(launch, store, tmp_path):
    out = launch("--config=FILE", "--executor=slurm", "--wait", file=COMMANDS)
    states = {u.name: u.state for u in store.units(1)}
    assert states == {"after": "done", "blocked": "queued", "a": "done", "b": "done", "c": "done",
                      "wrong": "failed"}  # fmt: skip
    assert "blocked" in out and "unit 1/6 (wrong) ended with code 2" in out
    lines = (tmp_path / "root/1/ran").read_text().splitlines()
    assert sorted(lines) == ["1/1 1", *(f"1/{wid} 1" for wid in (3, 4, 5, 6))]
    assert lines[-1] == "1/1 1" or lines[-2] == "1/1 1"
    # The four that wait for nothing are one array job.
    jobs = {u.name: u.job for u in store.units(1)}
    assert len({jobs[name].split("_")[0] for name in ("a", "b", "c", "wrong")}) == 1
    # The launcher again: no unit that is done runs another time, and no new experiment.
    again = launch("--config=FILE", "--executor=slurm", "--wait", file=COMMANDS)
    assert "experiment 1: known already; 1 units queued again" in again
    assert sorted((tmp_path / "root/1/ran").read_text().splitlines()) == sorted([*lines, "1/6 1"])


def test_each_resume_runs_it_again(launch, store, tmp_path):
    file = """
from llama3_jax.launching.experiment import WorkUnit


def sweep():
    return [WorkUnit(name="u", command=("sh", "-c", "echo ran >> {experiment}/ran; exit 2"))]
"""
    launch("--config=FILE", "--executor=slurm", "--wait", file=file)
    for runs in (2, 3, 4):
        assert "1 units queued again" in launch("resume", "1", "--wait")
        assert (tmp_path / "root/1/ran").read_text() == "ran\n" * runs


@pytest.mark.slow  # races a job against the launcher: wants a quiet machine
def test_a_launcher_killed_before_it_noted_the_job_finds_it_again(launch, store):
    file = COMMANDS.replace("sleep 0.2", "sleep 15")
    launch("--config=FILE", "--executor=slurm", file=file)
    jobs = {u.id: u.job for u in store.units(1)}
    for note in (store.directory(1) / "slurm").glob("*.job"):
        note.unlink()
    for unit in store.units(1):
        store.observed(unit.id, job=None, attempt=0, submissions=0, state="queued")
    launch("resume", "1", "--wait")
    assert {
        u.id: u.job for u in store.units(1) if u.name not in ("blocked",)
    }.items() <= jobs.items()
    assert {u.attempt for u in store.units(1) if u.state == "done"} == {1}


def test_stopping_and_a_crash(launch, store, tmp_path):
    file = """
from llama3_jax.launching.experiment import WorkUnit


def sweep():
    again = "test -e {workdir}/again && exit 0; touch {workdir}/again; exit 9"
    return [WorkUnit(name="runs", command=("sh", "-c", "touch {experiment}/on; exec sleep 60")),
            WorkUnit(name="waits", command=("true",), after=("runs",)),
            WorkUnit(name="crashes", command=("sh", "-c", again))]
"""
    launch("--config=FILE", "--executor=slurm", file=file)
    until(lambda: (tmp_path / "root/1/on").exists())
    launch("stop", "1/1")
    launch("stop", "1/2")
    until(lambda: release(launch, store) or launch("status", "1").count(" stopped ") == 2)
    assert [u.state for u in store.units(1)][:2] == ["stopped", "stopped"]

    def ended() -> bool:
        release(launch, store)
        launch("status", "1")
        return store.units(1)[2].state in ENDED

    until(ended)
    crashed = store.units(1)[2]
    assert (crashed.state, crashed.attempt) == ("done", 2)


def test_more_units_than_an_array_may_have(launch, store, monkeypatch):
    file = """
from llama3_jax.launching.experiment import Requirements, WorkUnit

REQUIREMENTS = Requirements(at_once=2)


def sweep():
    return [WorkUnit(name=f"u{i}", command=("sleep", "0.1")) for i in range(7)]
"""
    launch("--config=FILE", "--executor=slurm", "--wait", file=file)
    units = store.units(1)
    assert {unit.state for unit in units} == {"done"}
    arrays = [unit.job.partition("_")[0] for unit in units]
    assert len(set(arrays)) == 2 and len(set(arrays[:5])) == 1
    for moment in (unit.started for unit in units):
        assert sum(unit.started <= moment < unit.ended for unit in units) <= 2
    # squeue tells of the jobs that are asked for, and of none where there is none.
    other = launch.slurm("sbatch", "--parsable", "--array=0-1", "--wrap=sleep 20").strip()
    monkeypatch.setenv("SLURM_CONF", launch.conf)
    assert set(slurm_executor._jobs({other})) == {f"{other}_0", f"{other}_1"}
    assert slurm_executor._jobs({"987654"}) == {}
    assert set(slurm_executor._jobs({"987654", other})) == {f"{other}_0", f"{other}_1"}
    launch.slurm("scancel", other)


def test_each_task_of_a_node_has_its_own_gpus(launch, store, tmp_path):
    file = """
from llama3_jax.launching.experiment import Requirements, WorkUnit


def sweep():
    say = ("sh", "-c", "echo $SLURM_LOCALID $CUDA_VISIBLE_DEVICES $JAX_LOCAL_DEVICE_IDS >> {experiment}/$0")
    one = dict(gpus=2, cpus=1)
    return [
        WorkUnit(name="two", command=(*say, "two.txt"), requirements=one | dict(tasks_per_node=2)),
        WorkUnit(name="one", command=(*say, "one.txt"), requirements=one),
        WorkUnit(name="none", command=(*say, "none.txt")),
    ]
"""
    launch("--config=FILE", "--executor=slurm", "--wait", file=file)
    folder = tmp_path / "root/1"
    assert {unit.state for unit in store.units(1)} == {"done"}, store.units(1)[0].log.read_text()
    two = sorted((folder / "two.txt").read_text().splitlines())
    assert two == ["0 0,1 0,1", "1 2,3 0,1"]
    rank, devices, local = (folder / "one.txt").read_text().split()
    assert rank == "0" and devices in ("0,1", "2,3") and local == "0,1"
    assert (folder / "none.txt").read_text().split() == ["0"]


PREEMPTED = """
from llama3_jax.launching.experiment import WorkUnit


def sweep():
    script = (
        "echo $LLAMA3_JAX_UNIT >> {experiment}/ran; test -e {workdir}/saved && exit 0; "
        "trap 'touch {workdir}/saved; exit 75' TERM; touch {workdir}/on; "
        "until test -e {experiment}/go; do sleep 0.2; done"
    )
    return [WorkUnit(name=f"u{i}", command=("sh", "-c", script), retries=0) for i in range(4)]
"""


def test_of_an_array_one_task_is_preempted_and_the_others_run_on(launch, store, tmp_path):
    folder = tmp_path / "root/1"
    launch("--config=FILE", "--executor=slurm", file=PREEMPTED)
    until(lambda: all((folder / f"u{i}/on").exists() for i in range(4)))
    array = store.units(1)[0].job.partition("_")[0]
    ids = launch.slurm("squeue", "-h", "--array", "-o", "%F_%K %A").splitlines()
    assert f"{array}_3 {array}" in [line.strip() for line in ids]  # the last task has its id
    # The signal of a preemption for the last task, then a preemption of whichever Slurm chooses.
    launch.slurm("scancel", "--signal=TERM", f"{array}_3")
    until(lambda: (folder / "u3/saved").exists())
    until(lambda: release(launch, store) or (folder / "ran").read_text().count("1/4") == 2)
    until(lambda: launch("status", "1").count(" done ") == 1)
    assert sorted((folder / "ran").read_text().split()) == ["1/1", "1/2", "1/3", "1/4", "1/4"]
    more = launch.slurm("sbatch", "--parsable", "--partition=high", "--ntasks=2", "--wrap=sleep 1")
    until(lambda: sum((folder / f"u{i}/saved").exists() for i in range(3)) == 1)
    until(lambda: more.strip() not in launch.slurm("squeue", "-h", "-o", "%A"))
    until(lambda: release(launch, store) or launch("status", "1").count(" done ") == 2)
    (folder / "go").touch()
    until(lambda: launch("status", "1").count(" done ") == 4)
    assert sorted(unit.attempt for unit in store.units(1)) == [1, 1, 2, 2]
    assert all(unit.failures == 0 for unit in store.units(1))


def release(launch, store) -> None:
    """Lets requeued jobs start at once: Slurm makes them wait two minutes."""
    for line in launch.slurm("squeue", "-h", "--array", "-o", "%A %T %r").splitlines():
        number, state, reason = line.split(maxsplit=2)
        if state == "PENDING" and reason == "BeginTime":
            # slurmd revokes what was signed in the second of the requeue, and the job would fail.
            time.sleep(2)
            subprocess.run(  # it may have begun by now
                ["scontrol", "update", f"jobid={number}", "StartTime=now"],
                env=os.environ | {"SLURM_CONF": launch.conf}, capture_output=True,
            )  # fmt: skip


@pytest.mark.slow  # the run must outlast what Slurm takes to preempt it
def test_a_preempted_run_ends_as_the_undisturbed_one(launch, store, tmp_path, corpora, command):
    config = f"--config=FILE:{corpora},1,1500"
    (tmp_path / "file.py").write_text(TRAINING)
    undisturbed = tmp_path / "undisturbed"
    assert command("train", config.replace("FILE", str(tmp_path / "file.py")),
                f"--workdir={undisturbed}").returncode == 0  # fmt: skip
    launch(config, "--executor=slurm", "--slurm=--partition=low", file=TRAINING)
    (unit,) = store.units(1)
    metrics = Path(unit.workdir) / "metrics.jsonl"
    until(lambda: metrics.exists() and '"step": 3,' in metrics.read_text())
    # A job of more priority wants all CPUs: Slurm sends SIGTERM, and the run makes room.
    more = launch.slurm("sbatch", "--parsable", "--partition=high", "--ntasks=4", "--wrap=sleep 1")
    until(lambda: "state saved" in unit.log.read_text())
    until(lambda: more.strip() not in launch.slurm("squeue", "-h", "-o", "%A"))

    def ended() -> bool:
        release(launch, store)
        launch("status", "1")
        return store.units(1)[0].state in ENDED

    until(ended)
    (unit,) = store.units(1)
    assert (unit.state, unit.attempt, unit.failures) == ("done", 2, 0), unit.log.read_text()
    assert "goes on after step" in unit.log.read_text()
    assert curve(Path(unit.workdir)) == curve(undisturbed)


@pytest.mark.slow
def test_a_sweep_of_six_runs(launch, store, tmp_path, corpora):
    argument = f"{corpora},1,6"
    launch(f"--config=FILE:{argument}", "--executor=slurm", "--wait", file=TRAINING + SWEEP)
    units = store.units(1)
    assert {u.state for u in units} == {"done"}
    curves = [curve(Path(u.workdir)) for u in units[:6]]
    assert all(len(c) == 6 for c in curves) and len({str(c) for c in curves}) == 6
    assert (tmp_path / "root/1/lines").read_text().strip() == "36"


@pytest.mark.slow
def test_two_processes_are_one_run(launch, store, tmp_path, corpora, command):
    config = f"--config=FILE:{corpora},2,6"
    launch(config, "--executor=slurm", "--wait", file=TRAINING + PROCESSES)
    (unit,) = store.units(1)
    assert unit.state == "done", unit.log.read_text()
    assert "2 cpu device(s) of 2 process(es)" in unit.log.read_text()
    done = subprocess.run(
        [sys.executable, "-m", "llama3_jax.train",
         config.replace("FILE", str(tmp_path / "file.py")), f"--workdir={tmp_path / 'one'}"],
        cwd=REPOSITORY, capture_output=True, text=True,
        env=command_environment(tmp_path) | {"XLA_FLAGS": f"--xla_force_host_platform_device_count=2 {QUICK}"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert curve(Path(unit.workdir)) == curve(tmp_path / "one")


def test_what_sbatch_is_told(store, tmp_path):
    needs = dict(cpus=8, gpus=8, nodes=4, tasks_per_node=1, memory_gb=100, minutes=60,
                 slurm=["--partition=h100"])  # fmt: skip
    row = {
        "wid": 1, "name": "u", "command": ["true"], "workdir": "/w", "environment": {},
        "after": [], "requirements": needs, "retries": 0,
    }  # fmt: skip
    xid, _ = store.add("x", "", "slurm", "/here", {}, lambda d: [row], False)
    units = store.units(xid)
    options = sbatch_options(store.experiment(xid), tmp_path, "name", units, {1: units[0]})
    assert {
        "--array=0-0", "--nodes=4", "--ntasks-per-node=1", "--gpus-per-node=8", "--mem=100G",
        "--time=60", "--requeue", "--signal=TERM@120", "--chdir=/here",
    } <= set(options)  # fmt: skip
    assert options[-1] == "--partition=h100"
