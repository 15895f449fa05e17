import pytest
from rich.console import Console

from experiments.demo import seeds, train
from llama3_jax.errors import UserError
from llama3_jax.recipe.gate import GateLog


def test_a_row_for_each_gate_of_each_run(tmp_path):
    for run, found in {"seed-1": (150, 165), "seed-2": (165,)}.items():
        (tmp_path / run).mkdir()
        log = GateLog(tmp_path / run)
        log.add({"kind": "part", "step": 1, "stage_number": 3, "found": 150})
        for step, needles in enumerate(found):
            log.add(dict(
                kind="verdict", step=step, stage_number=3, length=192, needles_found=needles,
                needles_asked=165, verdict="passed" if needles == 165 else "not_yet",
            ))  # fmt: skip
    console = Console(width=200, record=True)
    console.print(seeds.verdicts(tmp_path))
    rows = [line.split() for line in console.export_text().splitlines() if "seed-" in line]
    assert [[part for part in row if part != "│"] for row in rows] == [
        ["seed-1", "192", "2", "passed", "150/165,", "165/165"],
        ["seed-2", "192", "1", "passed", "165/165"],
    ]


def test_a_directory_without_verdicts_is_named(tmp_path):
    with pytest.raises(UserError, match=str(tmp_path)):
        seeds.verdicts(tmp_path)


def test_the_sweep_is_four_seeds_and_one_that_must_fail():
    units = seeds.sweep("there")
    assert [unit.overrides.get("seed") for unit in units] == [1, 2, 3, 4, None]
    assert {unit.config for unit in units} == {"experiments/demo/train.py"}
    assert units[-1].argument == "there,without_recall"
    assert train.get_config("there,without_recall").stages[3].mix.get("recall_far") == 0
