"""The planning program as a user runs it."""

import json
import re

import pytest

from llama3_jax.errors import UserError
from llama3_jax.planning import compiler

ROW = "--config=experiments/production/llama3_405b.py:8k_16384"


def test_closed_forms_alone_are_quick_and_whole(command, tmp_path):
    target = tmp_path / "plan.json"
    done = command("plan", ROW, "--nocompile", f"--json={target}")
    assert done.returncode == 0, done.stderr
    assert "16,384 H100s" in done.stdout and "days" in done.stdout
    plan = json.loads(target.read_text())
    (stage,) = plan["stages"]
    assert stage["fits"] and stage["memory_compiled"] is None
    # Each GPU reads its part; all read a little more than there is, for norms are not split.
    assert 1 <= stage["checkpoint"]["read"] / stage["checkpoint"]["size"] < 1.02
    assert stage["seconds"] == pytest.approx(sum(stage["parts"].values()))
    assert all(entry["source"] for entry in plan["constants"].values())


def test_all_stages_are_a_line_each(command):
    done = command(
        "plan", "--config=experiments/demo/train.py", "--all_stages", "--nocompile",
        "--config.mesh.data=1",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for stage in ("short", "longer", "bigger batch", "annealing"):
        assert stage in done.stdout


def test_the_schedule_as_a_chart(command):
    done = command(
        "plan",
        ROW,
        "--show_schedule",
        "--config.mesh.pipe=2",
        "--config.mesh.virtual_stages=2",
    )
    assert done.returncode == 0, done.stderr
    assert "rank 0" in done.stdout and "rank 1" in done.stdout and "bubble" in done.stdout


def test_search_without_compiling(command):
    done = command("plan", ROW, "--search", "--gpus=8192", "--nocompile", "--best=2")
    assert done.returncode == 0, done.stderr
    assert "fit by the closed form" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--config is required"),
        (("--config=experiments/production/llama3_405b.py:9k",), "is no row of table 4"),
        ((ROW, "--stage=late"), "--stage=late: the stages are 8k_16384"),
        ((ROW, "--nocompile", "--constants=none.json"), "--constants=none.json"),
        ((ROW, "--config.mesh.tensr=4"), "nearest valid key: tensor"),
        ((ROW, "--config.mesh.data=100"), "not divisible"),
        (("--config=experiments/demo/train.py", "--show_schedule"), "has no pipeline"),
        ((ROW, "--nocompile", "--config.model.remat=none"), "needs .* GiB of a GPU's 72.8"),
        ((ROW, "--search", "--gpus=8"), "none of .* layouts fits"),
        ((ROW, "--gpus=8"), "--gpus is for --search"),
        (
            (ROW, "--nocompile", "--config.mesh.pipe=200"),
            "mesh.pipe=200 .*is too many for 126 layers",
        ),
        (
            ("--config=experiments/production/llama3_405b.py", "--config.mesh.tensor=7"),
            "config.mesh: no stage uses it, for the first sets config.stages.0.mesh",
        ),
    ],
)
def test_one_line_for_what_cannot_be(command, arguments, message):
    done = command("plan", *arguments)
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: ")
    assert re.search(message, line)


def test_a_machine_without_the_compiler_is_told_how_to_get_it(monkeypatch):
    monkeypatch.setattr(compiler, "_PLUGINS", ("jax_plugins.absent",))
    with pytest.raises(UserError, match=r"pip install -e '\.\[plan\]'"):
        compiler.h100s(8)


def test_gpus_fill_hosts():
    with pytest.raises(UserError, match="12 GPUs does not fill hosts of 8"):
        compiler.h100s(12)
