"""SIGTERM while a run measures or saves: it ends at once, and the next start does what is owed."""

import json
import os
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY, command_environment

from llama3_jax.training.metrics import read_metrics

CONFIG = '''
from llama3_jax.recipe.config import run_config


def get_config(corpora):
    """A gate after step 4, validation and evaluation after steps 2, 4, 6, ..., an average."""
    return run_config(
        model=dict(
            vocab_size=272, dim=16, layers=1, heads=2, kv_heads=1, head_dim=8, ffn_dim=32,
            dtype="float32",
        ),
        data=dict(sources=dict(a=dict(train=f"{corpora}/a/train",
                                      validation=f"{corpora}/a/validation"))),
        stages=[
            dict(name="short", tokens=2 * 256, length=32, batch_tokens=256, mix=dict(a=1.0),
                 lr=dict(shape="constant", peak=1e-3)),
            dict(name="long", tokens=2 * 256, length=64,
                 gate=dict(every_tokens=512, max_tokens=4096, epsilon=100.0)),
            dict(name="annealing", tokens=4 * 256, average=dict(checkpoints=2),
                 lr=dict(shape="linear", end=0.0)),
        ],
        checkpoint=dict(every_steps=3),
        validation=dict(every_tokens=512, tokens=300),
        evaluation=dict(
            length=32, held_out_tokens=300, every_tokens=512,
            needle=dict(haystack=f"{corpora}/a/validation", depths=2, seeds=1,
                        statement=" {key}:{value}"),
        ),
    )
'''


@pytest.fixture(scope="module")
def train(tmp_path_factory, corpora, compilation_cache):
    """Runs the command with a fault; returns its exit code and what it printed."""
    path = tmp_path_factory.mktemp("config") / "measured.py"
    path.write_text(CONFIG)
    folder = tmp_path_factory.mktemp("output")

    def run(workdir: Path, fault: str = "none") -> tuple[int, str]:
        # As `command`, but with what both streams say in one.
        output = folder / "output.txt"
        child = os.posix_spawn(
            sys.executable,
            [sys.executable, "-m", "experiments.benchmarks.faults_program",
             f"--config={path}:{corpora}", f"--workdir={workdir}"],
            command_environment(compilation_cache)
            | {"FAULT": fault, "PYTHONPATH": str(REPOSITORY)},
            file_actions=[
                (os.POSIX_SPAWN_OPEN, 1, output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600),
                (os.POSIX_SPAWN_DUP2, 1, 2),
            ],
        )  # fmt: skip
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), output.read_text()

    return run


def curve(workdir: Path) -> list[dict]:
    clock = ("seconds", "tokens_per_second", "mfu")
    return [{k: v for k, v in r.items() if k not in clock} for r in read_metrics(workdir)]


def newest(workdir: Path) -> int:
    return max(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit())


@pytest.fixture(scope="module")
def undisturbed(train, tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("undisturbed")
    code, text = train(workdir)
    assert code == 0, text
    kinds = [(r["kind"], r["step"]) for r in read_metrics(workdir)]
    assert kinds.count(("validation", 2)) == 1 and kinds.count(("evaluation", 8)) == 2
    assert (workdir / "averaged").is_dir()
    return workdir


@pytest.mark.parametrize(
    "place",
    ["validation", pytest.param("evaluation", marks=pytest.mark.slow), "gate",
     pytest.param("save", marks=pytest.mark.slow)],
)  # fmt: skip
def test_a_signal_there_is_seen_at_once_and_nothing_is_lost_or_done_twice(
    train, undisturbed, tmp_path, place
):
    code, text = train(tmp_path / "run", f"terminate:{tmp_path}/once:{place}")
    assert code == 75, text
    stopped = newest(tmp_path / "run")
    assert f"SIGTERM after step {stopped}: state saved" in text
    kinds = [r["kind"] for r in read_metrics(tmp_path / "run") if r["step"] == stopped]
    if place in ("validation", "evaluation"):
        assert place not in kinds  # it was not gone through with
    if place == "gate":
        assert not (tmp_path / "run/gates.jsonl").exists()
    code, text = train(tmp_path / "run")
    assert code == 0, text
    assert f"goes on after step {stopped}" in text
    assert curve(tmp_path / "run") == curve(undisturbed)
    gates = [
        [json.loads(line) for line in (run / "gates.jsonl").read_text().splitlines()]
        for run in (tmp_path / "run", undisturbed)
    ]
    assert gates[0] == gates[1]
    assert (tmp_path / "run/averaged").is_dir()


def test_what_a_signal_kept_the_last_step_from_is_done_by_the_next_start(
    train, undisturbed, tmp_path
):
    """The evaluation of the end: the run is not done before it is."""
    code, text = train(tmp_path / "run", f"terminate:{tmp_path}/once:last_evaluation")
    assert code == 75 and newest(tmp_path / "run") == 8, text
    assert not (tmp_path / "run/averaged").exists()
    code, text = train(tmp_path / "run")
    assert code == 0 and "finished: 8 steps" in text, text
    assert curve(tmp_path / "run") == curve(undisturbed)
    assert (tmp_path / "run/averaged").is_dir()
