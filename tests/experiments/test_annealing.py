"""The probe on a base run made here: candidate and control arms start where the base stands."""

import json
import subprocess
import sys

import pytest
from conftest import REPOSITORY, command_environment
from test_train import CONFIG

from experiments.annealing import probe
from llama3_jax.errors import UserError
from llama3_jax.recipe.config import RunConfig
from llama3_jax.recipe.timeline import Timeline
from llama3_jax.schema import parse
from llama3_jax.training.metrics import read_metrics

pytestmark = pytest.mark.slow  # it trains the base, and the arms


@pytest.fixture(scope="module")
def base(tmp_path_factory, corpora, compilation_cache):
    folder = tmp_path_factory.mktemp("probe")
    (folder / "tiny.py").write_text(CONFIG
                                    .replace("every_steps=4", "every_steps=7"))  # fmt: skip
    command = [sys.executable, "-m", "llama3_jax.train", f"--config={folder / 'tiny.py'}:{corpora}",
               f"--workdir={folder / 'base'}", "--config.stages[2].tokens=512",
               "--config.stages[3].tokens=512", "--config.stages[3].lr.end=0.0001"]  # fmt: skip
    done = subprocess.run(command, cwd=REPOSITORY, env=command_environment(compilation_cache),
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder / "base"


@pytest.fixture
def arm(base, tmp_path):
    """A probe's config as a file, since half a percent of a tiny run is no step."""

    def write(candidate, seed=0):
        path = tmp_path / f"{seed}.py"
        path.write_text(
            "from experiments.annealing.probe import get_config as probe\n\n\n"
            f"def get_config():\n    return probe('{base},{candidate},{seed}', share=0.3)\n"
        )
        return path

    return write


def test_arms_differ_in_their_mix_alone(base, corpora):
    control = parse(RunConfig, probe.get_config(f"{base},control,1"))
    candidate = parse(RunConfig, probe.get_config(f"{base},{corpora}/b,1"))
    assert control.stages[0].tokens == candidate.stages[0].tokens
    assert control.stages[0].lr == candidate.stages[0].lr
    assert candidate.stages[0].mix["candidate"] == pytest.approx(0.3)
    for name, weight in control.stages[0].mix.items():
        assert candidate.stages[0].mix[name] == pytest.approx(0.7 * weight)
    timeline = Timeline(candidate.stages, candidate.model.rope, candidate.mesh)
    assert timeline.learning_rate(0) == pytest.approx(0.0001)
    assert timeline.learning_rate(timeline.tokens) == 0


def test_a_probe_starts_from_the_bases_weights(base, arm, command, corpora, tmp_path):
    workdir = tmp_path / "new-0"
    done = command("train", f"--config={arm(f'{corpora}/b')}", f"--workdir={workdir}")
    assert done.returncode == 0, done.stderr
    last = [r["loss"] for r in read_metrics(base) if r["kind"] == "train"]
    first = [r["loss"] for r in read_metrics(workdir) if r["kind"] == "train"]
    # A fresh model would stand at the loss where the base began.
    assert abs(first[0] - last[-1]) < 0.5 * abs(last[0] - last[-1])
    rows = probe.collect(tmp_path)
    assert {row[:2] for row in rows} == {("new", "0")} and len(rows) == 2
    assert json.loads((workdir / "config.json").read_text())["init_from"] == str(base)


def test_another_model_is_refused(base, arm, command, tmp_path):
    done = command("train", f"--config={arm('control')}", f"--workdir={tmp_path / 'w'}",
                "--config.model.ffn_dim=32")  # fmt: skip
    assert done.returncode == 2
    assert "config.model.ffn_dim is 32" in done.stderr


@pytest.mark.parametrize("argument", ["runs/none,control,0", "runs/base", "runs/base,control,x"])
def test_bad_arguments_are_refused(argument):
    with pytest.raises(UserError, match="argument"):
        probe.get_config(argument)
