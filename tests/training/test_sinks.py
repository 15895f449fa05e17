"""Metrics at the services: what a run sends, and what happens without their packages."""

import importlib.util
import os
import sqlite3
import subprocess
import sys

import pytest
from conftest import REPOSITORY

from llama3_jax.errors import UserError
from llama3_jax.training import sinks
from llama3_jax.training.metrics import MetricsWriter

# In a process of its own: a service may keep threads and processes.
CODE = """
from pathlib import Path
from llama3_jax.training.metrics import MetricsWriter
from llama3_jax.training.sinks import Sink
for start in (0, 2):  # a run, and its resume after step 2
    writer = MetricsWriter(Path("{workdir}"), start, [Sink("{name}", Path("{workdir}"), dict(seed=7))])
    for step in range(start + 1, start + 4):
        writer.write("train", step, 100 * step, dict(loss=5.0 / step, losses=dict(a=1.0), stage="x"))
    writer.close()
"""


def test_what_is_sent(tmp_path):
    class Recorder:
        sent, closed = [], False

        def write(self, values, step):
            self.sent.append((step, values))

        def close(self):
            self.closed = True

    recorder = Recorder()
    writer = MetricsWriter(tmp_path, 0, [recorder])
    writer.write(
        "train", 3, 99, {"loss": 2.5, "losses": {"a": 1.5}, "stage": "x", "mix": {"b": "c"}}
    )
    writer.close()
    assert recorder.sent == [(3, {"train/loss": 2.5, "train/losses/a": 1.5, "tokens": 99})]
    assert recorder.closed


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_missing_package_is_named_with_the_way_to_install_it(name):
    if importlib.util.find_spec(name):
        pytest.skip(f"{name} is installed")
    with pytest.raises(
        UserError, match=rf"config.sinks: {name} is not .*pip install -e '\.\[{name}\]'"
    ):
        sinks.check([name])


def send(name, tmp_path):
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed (extra: {name})")
    workdir = tmp_path / "sweep" / "run"
    workdir.mkdir(parents=True)
    done = subprocess.run(
        [sys.executable, "-c", CODE.format(workdir=workdir, name=name)], cwd=REPOSITORY,
        capture_output=True, text=True, timeout=200,
        env=os.environ | {"TRACKIO_DIR": str(tmp_path / "trackio"), "WANDB_MODE": "offline",
                          "HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return workdir


def test_trackio_offline(tmp_path):
    send("trackio", tmp_path)
    (database,) = (tmp_path / "trackio").glob("*.db")
    rows = (
        sqlite3.connect(database).execute("SELECT run_name, step, metrics FROM metrics").fetchall()
    )
    assert {row[0] for row in rows} == {"sweep/run"}
    assert {row[1] for row in rows} == {1, 2, 3, 4, 5}
    assert all("train/loss" in str(row[2]) and "tokens" in str(row[2]) for row in rows)


def test_wandb_offline(tmp_path):
    workdir = send("wandb", tmp_path)
    assert len(list((workdir / "wandb").glob("offline-run-*"))) == 2
