"""The same experiment file under XManager itself, where it is installed."""

import importlib.util
import os
import subprocess
import sys

import pytest
from conftest import REPOSITORY

FILE = """
from llama3_jax.launching.experiment import WorkUnit


def sweep(code):
    say = "echo $0 >> {experiment}/ran; "
    return [WorkUnit(name="last", command=("sh", "-c", say, "last"), after=("fit",)),
            WorkUnit(name="fit", command=("sh", "-c", say + f"exit {code}", "fit"), after=("run",)),
            WorkUnit(name="run", command=("sh", "-c", say, "run"))]
"""


def launch(tmp_path, code):
    (tmp_path / "units.py").write_text(FILE)
    command = [sys.executable, "-m", "llama3_jax.launching.xmanager", f"--root={tmp_path / 'root'}"]
    return subprocess.run(
        [*command, f"--config={tmp_path / 'units.py'}:{code}"], cwd=REPOSITORY, text=True,
        capture_output=True, env=os.environ | {"HOME": str(tmp_path)}, timeout=120,
    )  # fmt: skip


def test_order_and_failure(tmp_path):
    if importlib.util.find_spec("xmanager") is None:
        pytest.skip("XManager is not installed (extra: xmanager)")
    for code, order in ((0, "run\nfit\nlast\n"), (3, "run\nfit\n")):
        done = launch(tmp_path, code)
        assert done.returncode == (1 if code else 0), done.stderr
        newest = max((tmp_path / "root").iterdir(), key=lambda p: int(p.name))
        assert (newest / "ran").read_text() == order
        assert ("last: done" in done.stdout) == (code == 0)


def test_without_xmanager_one_line_says_so(tmp_path):
    if importlib.util.find_spec("xmanager") is not None:
        pytest.skip("XManager is installed")
    done = launch(tmp_path, 0)
    assert done.returncode == 2
    message = "error: XManager is not installed: pip install -e '.[xmanager]'\n"
    assert done.stderr == message
