"""The training program, run as a user runs it."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import REPOSITORY, command_environment, random_documents, write_jsonl

from llama3_jax.data.tokenizer import Tokenizer
from llama3_jax.data.tokenizing import Options, tokenize
from llama3_jax.folder_lock import LOCK_FILE, locked
from llama3_jax.training.metrics import read_metrics

CONFIG = '''
from llama3_jax.recipe.config import run_config


def get_config(corpora):
    """A length ramp at step 8, a batch ramp at step 14, annealing from step 18 to 22."""
    sources = {
        name: dict(train=f"{corpora}/{name}/train", validation=f"{corpora}/{name}/validation")
        for name in "ab"
    }
    return run_config(
        model=dict(
            vocab_size=272, dim=32, layers=2, heads=4, kv_heads=2, head_dim=8, ffn_dim=64,
            dtype="float32",
        ),
        data=dict(sources=sources),
        stages=[
            dict(name="short", tokens=8 * 256, length=32, batch_tokens=256, mix=dict(a=0.7, b=0.3),
                 lr=dict(shape="cosine", peak=3e-3, end=3e-4, warmup_tokens=500)),
            dict(name="long", tokens=6 * 256, length=64),
            dict(name="wide", tokens=4 * 512, batch_tokens=512, micro_batch_tokens=256),
            dict(name="annealing", tokens=4 * 512, mix=dict(a=0.2, b=0.8),
                 lr=dict(shape="linear", end=0.0)),
        ],
        checkpoint=dict(every_steps=4, keep_last=2),
        validation=dict(every_tokens=2_000, tokens=1_000),
        samples=dict(prompts=("the model",), max_new_tokens=8),
    )
'''
STEPS = 22


@pytest.fixture(scope="module")
def config(tmp_path_factory, corpora) -> str:
    path = tmp_path_factory.mktemp("config") / "tiny.py"
    path.write_text(CONFIG)
    return f"--config={path}:{corpora}"


@pytest.fixture(scope="module")
def start(config, compilation_cache):
    def start(workdir: Path, *arguments: str, **options) -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, "-m", "llama3_jax.train", config, f"--workdir={workdir}", *arguments],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=REPOSITORY,
            env=command_environment(compilation_cache), **options,
        )  # fmt: skip

    return start


def finish(child: subprocess.Popen) -> tuple[int, str, str]:
    out, error = child.communicate(timeout=300)
    return child.returncode, out, error


@pytest.fixture(scope="module")
def undisturbed(start, tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("undisturbed")
    code, out, error = finish(start(workdir))
    assert code == 0, error
    assert "finished: 22 steps" in out
    return workdir


def curve(workdir: Path) -> list[tuple]:
    """All that must be the same in an undisturbed and in a resumed run: everything but times."""
    keys = ("kind", "step", "tokens", "stage", "loss", "losses", "grad_norm", "learning_rate",
            "documents", "cut_documents", "bits_per_byte", "samples")  # fmt: skip
    return [tuple(record.get(key) for key in keys) for record in read_metrics(workdir)]


def signal_at_step(child: subprocess.Popen, workdir: Path, step: int, number: int) -> None:
    metrics = workdir / "metrics.jsonl"
    while child.poll() is None:
        if metrics.exists() and f'"step": {step},' in metrics.read_text():
            child.send_signal(number)
            return
        time.sleep(0.001)
    raise AssertionError(f"ended before step {step}: {child.communicate()}")


def test_every_step_is_recorded_and_learns(undisturbed):
    records = [r for r in read_metrics(undisturbed) if r["kind"] == "train"]
    assert [r["step"] for r in records] == list(range(1, STEPS + 1))
    assert records[-1]["tokens"] == 8 * 256 + 6 * 256 + 8 * 512
    assert records[-1]["loss"] < records[0]["loss"] - 1
    assert all(r["applied"] and 0 < r["utilisation"] <= 1 for r in records)
    assert all(r["mfu"] == {} and r["tokens_per_second"] > 0 for r in records[1:])
    held_out = [r for r in read_metrics(undisturbed) if r["kind"] == "validation"]
    assert [r["tokens"] for r in held_out] == [2048, 4096, 6144, 7680]
    assert held_out[-1]["losses"].keys() == {"a", "b"}
    assert list((undisturbed / "tensorboard").iterdir())


def test_kill_9_at_several_points_changes_nothing(start, undisturbed, tmp_path):
    # In the first stage, at the length ramp, in the batch ramp, in the annealing.
    for step in (3, 8, 15, 20):
        signal_at_step(start(tmp_path), tmp_path, step, signal.SIGKILL)
    code, out, error = finish(start(tmp_path))
    assert code == 0, error
    assert "goes on after step" in out
    assert curve(tmp_path) == curve(undisturbed)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)], ids=["SIGTERM", "Ctrl-C"]
)
def test_signals_save_at_once_and_the_same_command_goes_on(
    start, undisturbed, tmp_path, number, code
):
    child = start(tmp_path)
    signal_at_step(child, tmp_path, 10, number)
    returned, out, error = finish(child)
    assert returned == code, error
    stopped = max(int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit())
    assert f"after step {stopped}: state saved" in out and stopped >= 10
    returned, out, _ = finish(start(tmp_path))
    assert returned == 0 and f"goes on after step {stopped}" in out
    assert curve(tmp_path) == curve(undisturbed)


def test_a_damaged_checkpoint_is_named_and_costs_only_its_interval(start, undisturbed, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(undisturbed, workdir)
    data = max((workdir / "checkpoints/22").rglob("*"), key=lambda p: p.stat().st_size)
    data.write_bytes(data.read_bytes()[:1000])
    code, out, error = finish(start(workdir))
    assert code == 0
    assert "checkpoint of step 22 is damaged" in error and "goes on after step 20" in out
    assert curve(workdir) == curve(undisturbed)


def test_a_finished_run_is_left_as_it_is(start, undisturbed):
    before = curve(undisturbed)
    code, out, _ = finish(start(undisturbed))
    assert code == 0 and "finished: 22 steps" in out
    assert curve(undisturbed) == before


def test_losses_that_are_not_finite_stop_the_run_with_the_documents(
    forked_command, config, tmp_path
):
    arguments = ["--config.stages[0].lr.peak=1e30", "--config.max_bad_steps=3"]
    result = forked_command("train", config, f"--workdir={tmp_path}", *arguments)
    assert result.returncode == 2
    records = [r for r in read_metrics(tmp_path) if r["kind"] == "train"]
    assert [r["applied"] for r in records[-3:]] == [False] * 3
    assert "nan" in {records[-1]["loss"], records[-1]["grad_norm"]}
    last = result.stderr.strip().splitlines()[-1]
    assert "not finite for 3 steps in a row" in last
    step = records[-1]["step"] - 1
    ledger = forked_command("train", config, f"--documents_of_step={step}").stdout.splitlines()
    for entry in map(json.loads, ledger):
        assert f"{entry['source']}:{entry['document']}" in last


def test_a_full_disk_ends_the_run_with_one_line(config, tmp_path):
    """A disk that others fill: at the start there seemed to be room."""
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("mounting a small file system needs root")
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(tmp_path)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this container may not mount file systems")
    try:
        code = (
            "import shutil; real = shutil.disk_usage;"
            "shutil.disk_usage = lambda path: real(path)._replace(free=10**9);"
            "from llama3_jax import cli, train; train.define_flags(); cli.run(train.main)"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, config, f"--workdir={tmp_path / 'run'}",
             "--config.checkpoint.every_steps=1", "--config.checkpoint.keep_every=1"],
            capture_output=True, text=True, cwd=REPOSITORY, env=command_environment(tmp_path.parent),
        )  # fmt: skip
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)
    assert done.returncode == 2, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last == f"error: no space left on the disk that holds {tmp_path / 'run'}"


def test_too_little_space_is_seen_before_the_start(config, tmp_path):
    """In a process of its own, where the disk claims to have 1,000 bytes left."""
    code = (
        "import shutil, sys; real = shutil.disk_usage;"
        "shutil.disk_usage = lambda path: real(path)._replace(free=1000);"
        "from llama3_jax import cli, train; train.define_flags(); cli.run(train.main)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, config, f"--workdir={tmp_path}"],
        capture_output=True, text=True, cwd=REPOSITORY, env=command_environment(tmp_path),
    )  # fmt: skip
    assert result.returncode == 2
    assert "0.0 MB are free, 3 checkpoints need 1." in result.stderr


def test_a_second_run_in_a_workdir_is_refused(forked_command, config, tmp_path):
    with locked(tmp_path / "run"):
        result = forked_command("train", config, f"--workdir={tmp_path / 'run'}")
        assert [path.name for path in (tmp_path / "run").iterdir()] == [LOCK_FILE]
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert f"another process works in it (process {os.getpid()} on " in line


class TestBadInput:
    """Each gives one line on standard error, exit code 2, and leaves nothing behind."""

    @pytest.fixture
    def refused(self, forked_command, config, tmp_path):
        def run(*arguments: str, config: str = config) -> str:
            workdir = tmp_path / "run"
            result = forked_command("train", config, f"--workdir={workdir}", *arguments)
            assert result.returncode == 2, result.stderr
            assert not workdir.exists()
            (line,) = result.stderr.strip().splitlines()
            return line

        return run

    @pytest.mark.parametrize(
        ("argument", "message"),
        [
            ("--config.model.layrs=3", "--config.model.layrs=3: the config has no such key; "
             "nearest valid key: layers"),
            ("--config.model.layers=many", "invalid literal for int"),
            ("--config.model.kv_heads=3", "config.model: heads (4) must be a multiple of kv_heads"),
            ("--config.stages[1].batch_tokens=100", "config.stages.1.batch_tokens: 100 is not a "
             "multiple of length (64)"),
            ("--config.model.vocab_size=100", "config.model.vocab_size: 100 is smaller than the "
             "tokenizer's 272"),
            ("--config.mesh.data=3", "rows at a time are not divisible by mesh.data (3)"),
            ("--config.mesh.tensor=2", "mesh data 1 x pipe 1 x context 1 x tensor 2 needs 2 devices, "
             "1 are present"),
            ("--config.mesh.pipe=2", "mesh data 1 x pipe 2 x context 1 x tensor 1 needs 2 devices"),
            ("--config.mesh.context=3", "length 32 is not divisible by 6: mesh.context=3 cuts"),
            ("--config.data.sources.a.train=/nowhere", "/nowhere: not a tokenised corpus"),
            ("--config.model.attention=flash", "config.model.attention: Input should be"),
            ("--config.seed=4294967296", "config.seed: Input should be less than 4294967296, got"),
            ("--wrokdir=x", "Unknown command line flag 'wrokdir'. Did you mean: workdir"),
        ],
    )  # fmt: skip
    def test_one_line_that_names_it(self, refused, argument, message):
        assert message in refused(argument)

    def test_config_files(self, refused, tmp_path):
        assert "no_such.py" in refused(config=f"--config={tmp_path}/no_such.py")
        (tmp_path / "broken.py").write_text("def get_config(:\n")
        assert "SyntaxError" in refused(config=f"--config={tmp_path}/broken.py")
        (tmp_path / "typo.py").write_text(
            "from llama3_jax.recipe.config import run_config\n"
            "def get_config():\n    return run_config(modle=dict(dim=3))\n"
        )
        line = refused(config=f"--config={tmp_path}/typo.py")
        assert "config.modle: unknown key; nearest valid key: model" in line

    def test_a_shard_damaged_inside_ends_the_run_and_is_named(
        self, forked_command, config, corpora, tmp_path
    ):
        shutil.copytree(corpora / "a/train", tmp_path / "a")
        for shard in (tmp_path / "a").glob("*.arrayrecord"):
            data = bytearray(shard.read_bytes())
            data[200:-200] = bytes(len(data) - 400)
            shard.write_bytes(data)
        where = [f"--workdir={tmp_path}/run", f"--config.data.sources.a.train={tmp_path}/a"]
        result = forked_command("train", config, *where)
        assert result.returncode == 2
        assert "Traceback" not in result.stderr
        assert ".arrayrecord: damaged at record" in result.stderr.strip().splitlines()[-1]

    def test_corpora_of_two_tokenizers(self, refused, tmp_path):
        other_corpus(tmp_path)
        line = refused(f"--config.data.sources.b.train={tmp_path}/other/train")
        assert "was tokenised by another tokenizer" in line


def other_corpus(folder: Path) -> None:
    Tokenizer({bytes([i]): i for i in range(256)}, specials=8).save(folder)
    source = write_jsonl(folder / "other.jsonl", random_documents("o", 50, seed=9))
    tokenize([source], folder / "other", folder, Options(holdout=0.1))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config.seed=1"], "config.seed is 1, but the checkpoint of step 22 was made with 0"),
        (["--config.model.ffn_dim=32"], "config.model.ffn_dim is 32, but the checkpoint of"),
        (["--config.data.packing=concat"], "config.data.packing is 'concat', but"),
        (["--config.stages[0].length=64"], "config.stages.0.length is 64, but"),
        (["--config.stages[3].tokens=3072"], "the learning rate of step 18 is"),
    ],
)
def test_a_resume_with_another_config_is_refused(
    forked_command, config, undisturbed, arguments, message
):
    before = curve(undisturbed)
    result = forked_command("train", config, f"--workdir={undisturbed}", *arguments)
    assert result.returncode == 2 and message in result.stderr
    assert curve(undisturbed) == before


def test_a_resume_with_another_tokenizer_is_refused(forked_command, config, undisturbed, tmp_path):
    other_corpus(tmp_path)
    paths = [f"--config.data.sources.{name}.{split}={tmp_path}/other/{split}"
             for name in "ab" for split in ("train", "validation")]  # fmt: skip
    result = forked_command("train", config, f"--workdir={undisturbed}", *paths)
    assert result.returncode == 2 and "error: the tokenizer is" in result.stderr


def test_generate_continues_text_from_the_run(forked_command, undisturbed, tmp_path):
    arguments = [f"--model={undisturbed}", "--max_new_tokens=12"]
    result = forked_command("generate", *arguments, "--prompt=the model", "--prompt=data")
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0].startswith("the model") and len(lines[0]) > len("the model")
    other_corpus(tmp_path)
    wrong = forked_command("generate", *arguments, "--prompt=x", f"--tokenizer={tmp_path}")
    assert wrong.returncode == 2 and "trained with tokenizer" in wrong.stderr
    missing = forked_command("generate", f"--model={tmp_path}/none", "--prompt=x")
    assert missing.returncode == 2 and "no model here" in missing.stderr


def test_check_prints_the_timeline(forked_command, config):
    result = forked_command("train", config, "--check")
    assert result.returncode == 0
    for text in ("7,680 tokens in 22 steps", "annealing", "a 0.7, b 0.3", "epochs"):
        assert text in result.stdout
