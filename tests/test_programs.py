"""How every program ends: one line and the right exit code, nothing lost and nothing half written."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import REPOSITORY, command_environment

from tests import program_runs
from tests.file_systems import full_disk, read_only

NAMES = list(program_runs.commands(Path()))
WITH_OUTPUT = [name for name in NAMES if name not in ("generate", "report")]


@pytest.fixture(scope="session")
def inputs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("programs")
    program_runs.make_inputs(folder)
    return folder


@pytest.fixture
def program(inputs, forked_command):
    """Runs the small case of a program, with its output at a path and more options."""

    def run(name: str, out: Path, *options: str) -> subprocess.CompletedProcess:
        return forked_command(*program_runs.commands(inputs)[name](out), *options)

    return run


def one_line(done: subprocess.CompletedProcess) -> str:
    assert re.fullmatch("error: .*\n", done.stderr), done.stderr
    return done.stderr


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


# ---- outputs


@pytest.mark.parametrize("name", ["fit", "fit plan", "plan", "evaluate", "convert", "average"])
def test_an_output_that_exists_is_replaced_only_when_told_so(name, program, tmp_path):
    quick = {"plan": ["--nocompile"], "fit": ["--resamples=50", "--methods=parabola"]}
    options = quick.get(name, [])
    done = program(name, tmp_path / "out", *options)
    assert done.returncode == 0, done.stderr
    for path in tmp_path.rglob("*"):
        if path.suffix == ".json":
            path.write_text("precious")
    before = contents(tmp_path)
    done = program(name, tmp_path / "out", *options)
    assert done.returncode == 2
    assert re.search("exists.*--overwrite", one_line(done))
    assert contents(tmp_path) == before
    done = program(name, tmp_path / "out", *options, "--overwrite")
    assert done.returncode == 0, done.stderr
    assert b"precious" not in contents(tmp_path).values()
    # orbax names some of its files by chance
    assert {name.split("/ocdbt")[0].split("/d/")[0] for name in contents(tmp_path)} == {
        name.split("/ocdbt")[0].split("/d/")[0] for name in before
    }


def test_an_input_is_no_output(inputs, program, forked_command, tmp_path):
    runs = f"--json={inputs}/runs.csv"
    for done in (
        forked_command("fit", "plan", f"--data={inputs}/runs.csv", "--target_flops=1e24",
                    "--budget=1e20", runs, "--overwrite"),
        forked_command("convert", f"--from={inputs}/hf", f"--to={inputs}/hf", "--overwrite"),
        forked_command("convert", "average", f"--from={inputs}/model", f"--from={inputs}/other",
                    f"--to={inputs}/other", "--overwrite"),
    ):  # fmt: skip
        assert done.returncode == 2 and "is also an input" in one_line(done)
    assert (inputs / "runs.csv").read_text().startswith("flops")


@pytest.mark.parametrize("name", WITH_OUTPUT)
def test_an_output_that_cannot_be_written_is_refused_first(name, program, tmp_path):
    with read_only(tmp_path / "locked") as folder:
        done = program(name, folder / "sub" / "out")
    assert done.returncode == 2, done.stderr
    line = one_line(done)
    assert f"{folder}/sub" in line and re.search("Read-only|ermission", line)
    assert done.stdout == ""


def test_a_report_that_cannot_be_written_is_refused(program, inputs):
    with read_only(inputs / "run") as folder:
        done = program("report", Path())
    assert done.returncode == 2 and f"{folder}/report.html cannot be written" in one_line(done)


@pytest.mark.parametrize("name", ["curate", "tokenize encode", "evaluate", "convert", "fit"])
def test_a_full_disk_is_named_by_the_output(name, program, tmp_path):
    with full_disk(tmp_path / "full", kilobytes=4) as folder:
        (folder / "filler").write_bytes(b"x" * 4096) if name in ("fit", "evaluate") else None
        done = program(name, folder / "out")
        left = [path.name for path in folder.rglob("*.tmp*")]
    assert done.returncode == 2, done.stderr
    assert f"no space left on the disk that holds {folder}/out" in one_line(done)
    assert left == []


def test_hugging_face_weights_are_evaluated_as_the_same_model_folder(inputs, program, tmp_path):
    for name, model in (("theirs", "hf"), ("ours", "other")):
        done = program("evaluate", tmp_path / name, f"--model={inputs}/{model}")
        assert done.returncode == 0, done.stderr
    theirs, ours = (json.loads((tmp_path / name / "results.json").read_text())
                    for name in ("theirs", "ours"))  # fmt: skip
    assert theirs["model"] == f"{inputs}/hf"
    assert theirs["scores"] == pytest.approx(ours["scores"], rel=0.01)  # they are in bfloat16


# ---- config files


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def get_config(a):\n    x = {}\n    return x['lr']\n", "line 3: KeyError: 'lr'"),
        ("import numpy as np\n\ndef get_config(a):\n    return np.zeros(3).lenght\n",
         "line 4: AttributeError: 'numpy.ndarray' object has no attribute 'lenght'"),
        ("def get_config(a):\n    return open('/no/data').read()\n",
         "line 2: FileNotFoundError: [Errno 2] No such file or directory: '/no/data'"),
        ("def get_config(a):\n    return int('many')\n", "line 2: ValueError: invalid literal"),
        ("def get_config(a:\n", "line 1: SyntaxError: '(' was never closed"),
        ("import nothing_like_it\n", "line 1: ModuleNotFoundError: No module named"),
        ("x = 1\n", "has no function get_config()"),
        ("def get_config(a):\n    pass\n", "get_config() returned a NoneType, not an ml_coll"),
        ("def get_config():\n    pass\n", "TypeError: get_config() takes 0 positional arguments"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", ["train", "plan", "curate"])
def test_an_error_in_a_config_file_is_told_with_its_line(
    name, text, message, forked_command, tmp_path
):
    path = tmp_path / "mine.py"
    path.write_text(text)
    done = forked_command(name, f"--config={path}:a", "--config.lr=3", f"--workdir={tmp_path}/run"
                       if name != "plan" else "--nocompile")  # fmt: skip
    assert done.returncode == 2
    line = one_line(done)
    assert line.startswith(f"error: --config={path}: ") and message in line


# ---- options


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        (["train"], ["--config", "--distributed", "--workdir", "--[no]check"]),
        (["plan"], ["--config", "--json", "--[no]overwrite"]),
        (["curate"], ["--config", "--workdir", "--sample"]),
        (["curate", "label"], ["--model", "--input", "--rubric", "--[no]chat"]),
        (["fit", "isoflop"], ["--data", "--report", "--resamples", "--json"]),
        (["fit", "mix"], ["--weights", "--losses"]),
        (["tokenize", "encode"], ["--input", "--holdout"]),
        (["convert", "average"], ["--from", "--weights"]),
        (["evaluate"], ["--model", "--distributed", "--haystack"]),
        (["generate"], ["--prompt"]),
        (["report"], ["--workdir"]),
        (["launch"], ["--root", "--sweep", "--slurm"]),
    ],
)
def test_help_lists_the_options(arguments, options, forked_command):
    done = forked_command(*arguments, "--help")
    assert done.returncode == 0 and done.stderr == ""
    for option in options:
        assert f"\n  {option}" in done.stdout
    assert "absl" not in done.stdout and len(done.stdout.splitlines()) < 80


def test_the_package_lists_its_programs():
    done = subprocess.run(
        [sys.executable, "-m", "llama3_jax"], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert done.returncode == 0
    programs = {path.stem for path in (REPOSITORY / "llama3_jax").glob("*.py")
                if 'if __name__ == "__main__"' in path.read_text()}  # fmt: skip
    listed = re.findall(r"^  python -m llama3_jax\.(\w+) ", done.stdout, re.M)
    assert set(listed) == programs - {"__main__"}


def test_a_reader_that_goes_away_ends_it_quietly(inputs, compilation_cache):
    readable, writable = os.pipe()
    os.close(readable)
    for arguments in (["--help"], ["plan", f"--data={inputs}/runs.csv", "--target_flops=1e24",
                                   "--budget=1e20"]):  # fmt: skip
        command = [sys.executable, "-m", "llama3_jax.fit", *arguments]
        done = subprocess.run(command, stdout=writable, stderr=subprocess.PIPE, text=True,
                              cwd=REPOSITORY, env=command_environment(compilation_cache))  # fmt: skip
        assert (done.returncode, done.stderr) == (141, "")
    os.close(writable)


# ---- Ctrl-C


class Started:
    """A program in a session of its own, which gets a signal as from a terminal."""

    def __init__(self, arguments: list[str], compilation_cache: Path):
        self.process = subprocess.Popen(
            [sys.executable, "-m", f"llama3_jax.{arguments[0]}", *arguments[1:]],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=REPOSITORY,
            env=command_environment(compilation_cache), start_new_session=True,
        )  # fmt: skip
        # From its second thread on it listens: a fraction of a second after Python has started.
        while self.process.poll() is None and len(self._tasks()) < 2:
            time.sleep(0.01)

    def _tasks(self) -> list[str]:
        return os.listdir(f"/proc/{self.process.pid}/task")

    def end(self) -> tuple[int, str]:
        error = self.process.communicate(timeout=300)[1]
        return self.process.returncode, error

    def interrupt(self) -> tuple[int, str]:
        os.killpg(self.process.pid, signal.SIGINT)
        return self.end()


def test_ctrl_c_while_it_is_imported(inputs, compilation_cache, tmp_path):
    for name in ("generate", "fit"):
        arguments = program_runs.commands(inputs)[name](tmp_path / "out")
        assert Started(arguments, compilation_cache).interrupt() == (130, "interrupted\n")


WORK = """
import sys, time
from llama3_jax import cli, files
from llama3_jax.data.workers import run_jobs
from pathlib import Path


def main(_):
    with files.atomic_path(Path(sys.argv[0]).with_suffix(".out")) as path:
        path.write_text("half")
        if KIND == "native":
            import numpy as np
            print("working", flush=True)
            a = np.ones((6000, 6000))
            while True:
                a = a @ a
        list(run_jobs(work, range(9), 2))


def work(number):
    print("working", flush=True)
    time.sleep(60)


KIND = sys.argv.pop(1)
if __name__ == "__main__":
    cli.run(main)
"""


@pytest.mark.parametrize("kind", ["native", "workers"])
def test_ctrl_c_in_native_code_and_with_workers(kind, tmp_path):
    path = tmp_path / "llama3_jax_program.py"
    path.write_text(WORK.replace("KIND = sys.argv.pop(1)", f"KIND = {kind!r}"))
    process = subprocess.Popen(
        [sys.executable, str(path)], cwd=REPOSITORY, start_new_session=True, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
    )  # fmt: skip
    assert process.stdout.readline() == "working\n"
    process.send_signal(signal.SIGINT)
    out, error = process.communicate(timeout=60)  # not while a worker has the pipe open
    assert (process.returncode, error) == (130, "interrupted\n")
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_ctrl_c_at_any_moment(name, inputs, compilation_cache, tmp_path):
    def start(out: Path) -> Started:
        return Started(program_runs.commands(inputs)[name](out), compilation_cache)

    start(tmp_path / "first").end()  # compiles
    begun = time.monotonic()
    code, error = start(tmp_path / "second").end()
    whole = time.monotonic() - begun
    assert code == 0, error
    interrupted = 0
    for part in (0.02, 0.3, 0.5, 0.7, 0.9):
        out = tmp_path / f"out{part}"
        started = start(out)
        time.sleep(part * whole)
        code, error = started.interrupt()
        if code == 0:
            continue  # it had ended
        interrupted += 1
        assert code == 130
        if name == "train" and "interrupted" not in error:
            assert error == ""  # its state is saved
        else:
            assert error == "interrupted\n"
        assert not list(tmp_path.rglob(".*.tmp"))
        if name not in ("train", "curate", "launch", "tokenize encode"):  # they can go on
            assert not [p for p in tmp_path.iterdir() if p.name.startswith(out.name)]
    assert interrupted >= 3
