"""What the launcher asks of Slurm, by a stand-in for its programs that notes each call."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY

from llama3_jax.errors import UserError
from llama3_jax.launching import slurm, slurm_job, slurm_task
from llama3_jax.launching.store import Store


class StandIn:
    """Numbers jobs and answers squeue with `jobs`; `calls` are the command lines."""

    def __init__(self):
        self.calls, self.jobs, self.config = [], {}, "MaxArraySize            = 1001"

    def __call__(self, *command, environment=None):
        self.calls.append(command)
        if command[0] == "sbatch":
            return str(100 + len(self.submitted()))
        if command[:2] == ("scontrol", "show"):
            return self.config
        if command[0] == "squeue" and not any(o.startswith("--name=") for o in command):
            return "".join(f"{job} {state}\n" for job, state in self.jobs.items())
        return ""

    def submitted(self):
        return [command for command in self.calls if command[0] == "sbatch"]


@pytest.fixture
def faked(monkeypatch):
    stand_in = StandIn()
    monkeypatch.setattr(slurm, "_slurm", stand_in)
    return stand_in


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "root")


def row(wid: int, **values) -> dict:
    needs = {"cpus": 1, "gpus": 0, "nodes": 1, "tasks_per_node": 1, "memory_gb": None,
             "minutes": None, "slurm": []}  # fmt: skip
    return {
        "wid": wid, "name": f"u{wid}", "command": ["true"], "workdir": f"/none/{wid}",
        "environment": {}, "after": [], "requirements": needs, "retries": 0, **values,
    }  # fmt: skip


def added(store, rows):
    xid, _ = store.add("x", "", "slurm", "/here", {}, lambda _: rows, False)
    return store.experiment(xid)


def write_end(store, unit, state, starts=1, **values):
    """What a job leaves that started `starts` times."""
    record = {"job": unit.job, "state": state, "starts": starts, "failures": 1, "started": 1.0,
              "ended": 2.0, "exit_code": 1, **values}  # fmt: skip
    slurm_job.write_record(store.directory(unit.xid) / "slurm", unit.wid, record)


def test_every_resume_submits(faked, store):
    experiment = added(store, [row(1)])
    for submission in range(1, 6):
        slurm.submit(store, experiment)
        assert len(faked.submitted()) == submission
        (unit,) = store.units(1)
        assert unit.job == f"{100 + submission}_0"
        write_end(store, unit, "failed")
        slurm.refresh(store, experiment)
        assert store.units(1)[0].state == "failed"
        assert store.resume(1) == 1


def test_a_submission_whose_note_was_lost_is_not_repeated(faked, store, monkeypatch):
    experiment = added(store, [row(1), row(2)])
    slurm.submit(store, experiment)
    folder = store.directory(1) / "slurm"
    (units_file,) = folder.glob("*.units.json")
    # The launcher is killed after sbatch: no note, and the queue knows nothing of the job.
    slurm_job.job_note(units_file).unlink()
    store._db.execute("UPDATE units SET job = NULL, attempt = 0, submissions = 0")
    # The job runs meanwhile, and is over before anybody looks.
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "1")
    slurm_job.note_job(units_file, "101")
    slurm.submit(store, experiment)
    assert len(faked.submitted()) == 1
    assert [unit.job for unit in store.units(1)] == ["101_0", "101_1"]


def run_job(monkeypatch, units_file, number, task, code, scontrol):
    """A task of an array whose unit ends with `code`; `scontrol` gives the answers, in order."""
    asked, answers = [], iter(scontrol)

    def run(command, **_):
        asked.append(command)
        return subprocess.CompletedProcess(command, *next(answers))

    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", str(number))
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", str(task))
    monkeypatch.setenv("SLURM_JOB_ID", str(number))  # as the last task of an array has it
    monkeypatch.setattr(slurm_job, "run", lambda unit, start: code)
    monkeypatch.setattr(slurm_job.subprocess, "run", run)
    monkeypatch.setattr(slurm_job.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(slurm_job.signal, "signal", lambda *_: None)
    return slurm_job.main(units_file), asked


def logged(folder, units: int = 4) -> list[dict]:
    (folder / "logs").mkdir()
    return [row(wid, workdir=str(folder / f"u{wid}")) for wid in range(1, units + 1)]


def test_a_requeue_names_one_task_of_the_array(faked, store, tmp_path, monkeypatch):
    experiment = added(store, logged(tmp_path))
    slurm.submit(store, experiment)
    (units_file,) = (store.directory(1) / "slurm").glob("*.units.json")
    code, asked = run_job(monkeypatch, units_file, 101, 3, 75, [(0, "", "")])
    assert asked == [["scontrol", "requeue", "101_3"]] and code == 1


def test_a_refused_requeue_leaves_the_unit_queued_and_is_submitted_anew(
    faked, store, tmp_path, monkeypatch
):
    experiment = added(store, logged(tmp_path))
    slurm.submit(store, experiment)
    (units_file,) = (store.directory(1) / "slurm").glob("*.units.json")
    refused = (1, "", "slurm_update error: Requeue is disabled")
    code, asked = run_job(monkeypatch, units_file, 101, 3, 75, [refused] * 9)
    assert code == 1 and len(asked) == slurm_job.REQUEUE_TRIES
    faked.jobs = {f"101_{task}": "RUNNING" for task in range(3)}  # the fourth is gone
    slurm.refresh(store, experiment)
    unit = store.units(1)[3]
    assert (unit.state, unit.job, unit.failures) == ("queued", None, 0)
    assert "Requeue is disabled" in Path(unit.log).read_text()
    assert slurm.unsubmitted(store.units(1)) == 1
    slurm.submit(store, experiment)
    assert len(faked.submitted()) == 2 and store.units(1)[3].job == "102_0"
    assert json.loads(units_file.read_text())[3]["failures"] == 0


def test_a_new_job_that_is_cancelled_before_it_begins_is_seen(faked, store, tmp_path):
    experiment = added(store, logged(tmp_path, 1))
    slurm.submit(store, experiment)
    write_end(store, store.units(1)[0], "failed")
    slurm.refresh(store, experiment)
    store.resume(1)
    slurm.submit(store, experiment)
    slurm.refresh(store, experiment)  # Slurm has no job 102 any more, and 101 left its record
    assert store.units(1)[0].state == "failed"


def test_arrays_keep_to_the_clusters_limit_and_to_the_units(faked, store):
    needs = row(1)["requirements"] | {"at_once": 3}
    experiment = added(store, [row(wid, requirements=needs) for wid in range(1, 12)])
    faked.config = "MaxArraySize            = 1001\nSchedulerParameters = a=1,max_array_tasks=5"
    slurm.submit(store, experiment)
    told = [" ".join(command) for command in faked.submitted()]
    assert ["--array=0-4%3", "--array=0-4%3", "--array=0-0%3"] == [
        option for line in told for option in line.split() if option.startswith("--array")]  # fmt: skip
    # One array after the other: together they would be more than three at once.
    assert "--dependency" not in told[0] and "--dependency=afterany:101" in told[1]
    assert "--dependency=afterany:102" in told[2]
    assert [unit.job for unit in store.units(1)][4:6] == ["101_4", "102_0"]
    assert slurm.array_limit("MaxArraySize = 7\nSchedulerParameters = (null)") == 7
    with pytest.raises(UserError, match="no array jobs"):
        slurm.array_limit("MaxArraySize            = 0")


def test_who_waits_asks_slurm_seldom_and_for_the_experiments_jobs(faked, store, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(slurm.time, "monotonic", lambda: clock[0])
    experiment = added(store, [row(wid) for wid in (1, 2)])
    slurm.submit(store, experiment)
    faked.jobs, faked.calls = {"101_0": "RUNNING", "101_1": "PENDING"}, []
    look = slurm.watcher(store, experiment)
    for _ in range(200):  # of half a second
        look()
        clock[0] += 0.5
    assert len(faked.calls) == 4
    assert all("--jobs=101" in command for command in faked.calls)
    assert [unit.state for unit in store.units(1)] == ["running", "queued"]
    # The end that a job writes is seen without squeue.
    write_end(store, store.units(1)[1], "done", exit_code=0)
    clock[0] = 91.0  # the last squeue was at 90
    look()
    assert len(faked.calls) == 4 and store.units(1)[1].state == "done"


def test_a_controller_that_does_not_answer_is_asked_again(faked, store, monkeypatch, capsys):
    experiment = added(store, [row(1)])
    slurm.submit(store, experiment)

    def down(*command, environment=None):
        raise UserError("squeue: Unable to contact slurm controller (connect failure)")

    monkeypatch.setattr(slurm, "_slurm", down)
    slurm.watcher(store, experiment)()
    assert "warning: squeue: Unable to contact" in capsys.readouterr().err
    assert store.units(1)[0].state == "queued"


def test_the_share_of_a_nodes_gpus():
    def share(gpus, rank, visible, tasks="2(x3)", node=1):
        own = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
        place = {"SLURM_LOCALID": str(rank), "SLURM_NODEID": str(node)}
        return slurm_task.device_environment(
            gpus, own | place | {"SLURM_STEP_TASKS_PER_NODE": tasks}
        )

    assert share(4, 1, "0,1,2,3,4,5,6,7") == {
        "CUDA_VISIBLE_DEVICES": "4,5,6,7", "JAX_LOCAL_DEVICE_IDS": "0,1,2,3",
    }  # fmt: skip
    assert share(1, 0, "GPU-a,GPU-b")["CUDA_VISIBLE_DEVICES"] == "GPU-a"
    assert share(2, 1, "5,6")["CUDA_VISIBLE_DEVICES"] == "5,6"  # bound by Slurm already
    assert share(2, 1, None)["CUDA_VISIBLE_DEVICES"] == "2,3"
    assert share(8, 0, "0,1,2,3,4,5,6,7", "1(x16)", 15)["JAX_LOCAL_DEVICE_IDS"] == "0,1,2,3,4,5,6,7"
    assert slurm_task.tasks_here({"SLURM_STEP_TASKS_PER_NODE": "2(x2),1", "SLURM_NODEID": "2"}) == 1
    with pytest.raises(ValueError, match="2 tasks of 2 GPUs are on this node, which shows 3"):
        share(2, 0, "0,1,2")


SUBMITTING = """
import sys, time
from llama3_jax.launching import slurm
from llama3_jax.launching.store import Store

def stand_in(*command, environment=None):
    if command[0] == "sbatch":
        time.sleep(0.3)
        print("submitted", flush=True)
        return "7"
    return "MaxArraySize = 9" if command[0] == "scontrol" else ""

slurm._slurm = stand_in
store = Store(sys.argv[1])
slurm.submit(store, store.experiment(1))
"""


def test_two_launchers_submit_a_unit_once(store):
    added(store, [row(1), row(2, after=[1])])
    command = [sys.executable, "-c", SUBMITTING, str(store.root)]
    both = [
        subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    assert sum(child.communicate()[0].count("submitted") for child in both) == 2  # one a unit
