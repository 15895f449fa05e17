"""A run that meets a spike, or hangs, through the training program."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import REPOSITORY, command_environment, random_documents, write_jsonl

from llama3_jax.data import tokenizing
from llama3_jax.training.metrics import read_metrics

CONFIG = '''
from llama3_jax.recipe.config import run_config


def get_config(corpora):
    """45 steps, at number 35 of which a document of noise is met."""
    return run_config(
        seed=2,
        model=dict(
            vocab_size=272, dim=32, layers=1, heads=4, kv_heads=2, head_dim=8, ffn_dim=64,
            dtype="float32",
        ),
        data=dict(sources=dict(a=dict(train=f"{corpora}/a/train"))),
        stages=[
            dict(name="one", tokens=5 * 256, length=128, batch_tokens=256, mix=dict(a=1.0),
                 lr=dict(shape="constant", peak=1e-2, warmup_tokens=500)),
            dict(name="two", tokens=40 * 256, mix=dict(a=1.0)),
        ],
        checkpoint=dict(every_steps=4, keep_last=20),
        health=dict(least=8, window=12, loss_spike="rewind", deviations=5.0),
        watchdog=dict(floor_seconds=2.0, other_seconds=200.0),
    )
'''


@pytest.fixture(scope="module")
def config(tmp_path_factory, byte_tokenizer) -> str:
    folder = tmp_path_factory.mktemp("spike")
    noise = np.random.default_rng(0).integers(33, 127, 120)
    documents = random_documents("a", 300, seed=0) | {"noise": "".join(map(chr, noise))}
    options = tokenizing.Options(piece_bytes=8_000)
    tokenizing.tokenize([write_jsonl(folder / "a.jsonl", documents)], folder / "a", byte_tokenizer,
                        options)  # fmt: skip
    (folder / "config.py").write_text(CONFIG)
    return f"--config={folder}/config.py:{folder}"


@pytest.fixture(scope="module")
def train(config, compilation_cache):
    def run(workdir: Path, *arguments: str, module: str = "llama3_jax.train", fault: str = ""):
        return subprocess.run(
            [sys.executable, "-m", module, config, f"--workdir={workdir}", *arguments],
            capture_output=True, text=True, cwd=REPOSITORY, timeout=300,
            env=command_environment(compilation_cache) | {"FAULT": fault},
        )  # fmt: skip

    return run


@pytest.fixture(scope="module")
def rewound(train, tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("rewound")
    result = train(workdir)
    assert result.returncode == 0, result.stderr
    assert "step 35: loss spike" in result.stderr and "rewound to" in result.stdout
    return workdir


def events(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "events.jsonl").read_text().splitlines()]


def curve(workdir: Path) -> list[tuple]:
    keys = ("kind", "step", "tokens", "loss", "grad_norm", "applied", "documents")
    return [tuple(record[key] for key in keys) for record in read_metrics(workdir)]


def first_rewind(workdir: Path) -> dict:
    return next(event for event in events(workdir) if event["action"] == "rewind")


def test_a_spike_is_rewound_and_its_batches_are_left_out(rewound):
    event = first_rewind(rewound)
    assert event["kinds"][0] == "loss_spike" and "a:noise" in event["documents"]
    assert event["loss"] > event["loss_band"]["limit"]
    assert (event["step"], event["batch"], event["rewound_to"]) == (35, 30, 32)
    assert event["left_out"] == {"1": [27, 28, 29, 30]}
    records = curve(rewound)
    assert [record[1] for record in records] == list(range(1, 46))
    assert all(record[5] for record in records)


def test_the_time_of_the_run_is_booked_to_the_last_second(rewound):
    goodput = json.loads((rewound / "goodput.json").read_text())
    seconds = goodput["seconds"]
    assert sum(seconds.values()) == pytest.approx(goodput["elapsed"], abs=1e-3)
    assert len(goodput["sessions"]) == 1 + sum(e["action"] == "rewind" for e in events(rewound))
    for category in ("step", "data", "compile", "checkpoint", "setup", "lost_work"):
        assert seconds[category] > 0, category
    assert goodput["effective_training_time"] == seconds["step"] / goodput["elapsed"]


def test_a_run_killed_right_after_the_rewind_leaves_the_same_batches_out(rewound, train, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(rewound, workdir)
    event = first_rewind(workdir)
    for path in (workdir / "checkpoints").iterdir():
        if path.name.isdigit() and int(path.name) > event["rewound_to"]:
            shutil.rmtree(path)
    kept = events(workdir)[: event["event"] + 1]
    lines = (workdir / "events.jsonl").read_text().splitlines(keepends=True)
    (workdir / "events.jsonl").write_text("".join(lines[: len(kept)]) + '{"event": 9, "ki')
    result = train(workdir)
    assert result.returncode == 0, result.stderr
    assert curve(workdir) == curve(rewound) and events(workdir) == events(rewound)


def test_an_event_is_computed_again(rewound, forked_command, config):
    event = first_rewind(rewound)
    before = sorted(rewound.rglob("*"))
    replay = f"--replay_event={event['event']}"
    result = forked_command("train", config, f"--workdir={rewound}", replay)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0].endswith(f"computed again from step {event['rewound_to']}")
    for name, line in zip(("loss", "grad_norm"), lines[1:], strict=False):
        assert f"{name}: recorded {event[name]!r}, now {event[name]!r}: the same" in line
    assert "a:noise" in lines[-1]
    assert sorted(rewound.rglob("*")) == before


def test_a_loader_that_hangs_ends_the_run_with_stacks_and_a_code_of_its_own(train, tmp_path):
    result = train(
        tmp_path / "run", module="experiments.benchmarks.faults_program",
        fault=f"stuck:{tmp_path}/once:1:6",
    )  # fmt: skip
    assert result.returncode == 4, result.stderr
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("error: hang after step 11: data has taken ")
    assert f"stacks are in {tmp_path}/run/hangs/process-0.txt" in last
    assert "in stuck" in (tmp_path / "run/hangs/process-0.txt").read_text()
