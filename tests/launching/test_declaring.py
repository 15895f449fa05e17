"""Sweeps, work units and the checks before anything is queued."""

import pytest

from llama3_jax.errors import UserError
from llama3_jax.launching import prepare, sweeps
from llama3_jax.launching.experiment import Requirements, WorkUnit, work_units
from llama3_jax.launching.outcome import CHECKPOINTS, newest_checkpoint, outcome
from llama3_jax.training import checkpoint


def test_sweeps_combine():
    a, b = sweeps.sweep("a", [1, 2]), sweeps.sweep("b", "xy")
    assert sweeps.product(a, b) == [
        {"a": 1, "b": "x"}, {"a": 1, "b": "y"}, {"a": 2, "b": "x"}, {"a": 2, "b": "y"},
    ]  # fmt: skip
    assert sweeps.zipped(a, b) == [{"a": 1, "b": "x"}, {"a": 2, "b": "y"}]
    assert sweeps.chain(a, b) == [{"a": 1}, {"a": 2}, {"b": "x"}, {"b": "y"}]
    with pytest.raises(UserError, match="different lengths: 2, 3|different lengths: 3, 2"):
        sweeps.zipped(a, sweeps.sweep("b", range(3)))
    with pytest.raises(UserError, match="sets a twice"):
        sweeps.product(a, a)


def test_the_sweep_option():
    values = sweeps.parse("config.model.rope=(1,2),{'a': [3, 4]},x=1")
    assert [v["config.model.rope"] for v in values] == ["(1,2)", "{'a': [3, 4]}", "x=1"]
    for wrong in ("seed=1", "config.seed", "config.seed=", "config.seed=1,,2", "config.a=(1,2"):
        with pytest.raises(UserError, match="--sweep=config|--sweep=seed"):
            sweeps.parse(wrong)


def test_entries_become_units_with_directory_names():
    units = work_units(["6e18,124M", {"config.optimizer.b2": 0.9}, WorkUnit(program="fit")], "arg")
    assert [u.name for u in units] == ["6e18,124M", "b2=0.9", "3"]
    assert units[0].command_line("py", "f.py") == [
        "py", "-m", "llama3_jax.train", "--config=f.py:6e18,124M", "--workdir={workdir}",
    ]  # fmt: skip
    assert units[1].config_flags("f.py") == ["--config=f.py:arg", "--config.optimizer.b2=0.9"]
    assert units[2].command_line("py", "f.py") == ["py", "-m", "llama3_jax.fit"]


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([], "there is no work unit"),
        ([3], "entry 1 is a int"),
        (["a", "a"], "two work units are named 'a'"),
        ([WorkUnit(name="a/b")], "one directory's"),
        ([WorkUnit(name="logs")], "the experiment's own folder"),
        ([WorkUnit(program="trian")], "program 'trian' is none of train"),
        ([WorkUnit(name="a", after=("b",))], "'a' waits for 'b', which is none"),
        ([WorkUnit(name=n, after=(a,)) for n, a in ("ab", "bc", "ca")], "a, b, c wait for each"),
    ],
    ids=["none", "kind", "twice", "slash", "reserved", "program", "unknown", "circle"],
)
def test_declarations_that_cannot_be_run(entries, message):
    with pytest.raises(UserError, match=message):
        work_units(entries)


TRAINING = """
from llama3_jax.launching.experiment import Requirements
from llama3_jax.launching.sweeps import sweep as values
from llama3_jax.recipe.config import run_config

REQUIREMENTS = Requirements(cpus=2)


def get_config(corpora):
    return run_config(
        model=dict(vocab_size=272, dim=32, layers=1, heads=2, kv_heads=1, head_dim=16, ffn_dim=64),
        data=dict(sources=dict(a=dict(train=f"{corpora}/a/train"))),
        stages=[dict(name="s", tokens=256, length=32, batch_tokens=64, mix=dict(a=1.0),
                     lr=dict(shape="constant", peak=1e-3))],
        checkpoint=dict(every_steps=4),
    )
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "train.py"
    path.write_text(TRAINING)
    return path


def test_training_is_checked_as_the_program_would(file, corpora):
    def checked(*sweep: str, overrides=()):
        units = prepare.declared_units(f"{file}:{corpora}", sweep, overrides)
        return units, prepare.check(units, str(file), {"cpus": 2, "gpus": 0})

    units, remarks = checked("config.seed=1,2", "config.model.layers=1,3")
    assert len(units) == 4 and not remarks
    cases = {
        "config.model.layrs=3": "no such key; nearest valid key: layers; nothing was queued",
        "config.model.kv_heads=3": r"config.model: heads \(2\) must be a multiple of kv_heads",
        "config.data.sources.a.train=/nowhere": "/nowhere: not a tokenised corpus",
    }
    for sweep, message in cases.items():
        with pytest.raises(UserError, match=message):
            checked(sweep)
    with pytest.raises(UserError, match="work unit seed=2: .*no such key"):
        checked("config.seed=2,3", overrides=["--config.seeed=1"])


def test_what_a_unit_needs_must_be_there(file, corpora):
    def check(slots=None, **values):
        return prepare.check([WorkUnit(name="u", **values)], str(file), slots)

    one = {"cpus": 1, "gpus": 0}
    with pytest.raises(UserError, match="no program 'no_such'"):
        check(command=("no_such",))
    with pytest.raises(UserError, match="no module experiments.nothing"):
        check(program="experiments.nothing")
    with pytest.raises(UserError, match="needs 1 gpus, --gpus says 0"):
        check(one, command=("true",), requirements=Requirements(gpus=1))
    with pytest.raises(UserError, match="needs --executor=slurm"):
        check(one, command=("true",), requirements=Requirements(nodes=2))
    assert "checked when they start" in check(argument="x", after=("earlier",))[0]


def declared(tmp_path, text: str, sweep=()) -> list[WorkUnit]:
    (tmp_path / "needs.py").write_text(
        f"from llama3_jax.launching.experiment import Requirements, WorkUnit\n{text}"
    )
    return prepare.declared_units(f"{tmp_path}/needs.py", sweep, [])


def test_requirements_of_the_file_hold_for_units_that_say_none(tmp_path):
    own = "REQUIREMENTS = Requirements(gpus=8, cpus=16)\n"
    two = declared(tmp_path, own, ["config.seed=1,2"])
    assert [u.requirements for u in two] == [Requirements(gpus=8, cpus=16)] * 2
    sweep = "def sweep(): return [WorkUnit(), WorkUnit(requirements=Requirements()), {'seed': 1}]"
    units = declared(tmp_path, own + sweep)
    assert [u.requirements.gpus for u in units] == [8, 0, 8]
    assert [u.requirements for u in declared(tmp_path, sweep)] == [Requirements()] * 3
    with pytest.raises(UserError, match="REQUIREMENTS is no"):
        declared(tmp_path, "REQUIREMENTS = dict(gpus=8)", ["config.seed=1,2"])


def test_cpus_come_with_gpus(tmp_path):
    def cpus(slots, **needs):
        (row,) = prepare.rows([WorkUnit(name="u", requirements=needs)], "f.py", tmp_path, slots)
        return row["requirements"]["cpus"]

    assert cpus(None, gpus=8) == 64 and cpus(None) == 1 and cpus(None, gpus=8, cpus=3) == 3
    assert cpus({"cpus": 12, "gpus": 4}, gpus=2) == 6  # this machine has three for each
    assert cpus({"cpus": 2, "gpus": 4}, gpus=1) == 1
    prepare.check([WorkUnit(command=("true",), requirements=Requirements(gpus=2))], "f.py",
                  {"cpus": 12, "gpus": 4})  # fmt: skip


def test_directories_and_number_are_filled_in(tmp_path):
    said = "{root} {xid} {experiment} {workdir} {other}"
    units = work_units([WorkUnit(name="u", program="a.b", arguments=(said,)), "x"])
    first, second = prepare.rows(units, "f.py", tmp_path / "7", None)
    assert first["command"][1:] == [
        "-m", "a.b", f"{tmp_path} 7 {tmp_path}/7 {tmp_path}/7/u {{other}}",
    ]  # fmt: skip
    assert second["command"][-1] == f"--workdir={second['workdir']}" == f"--workdir={tmp_path}/7/x"


def test_the_same_declaration_has_the_same_fingerprint():
    units = work_units(["a", "b"])
    same = prepare.fingerprint(units, "f.py", "local")
    assert same == prepare.fingerprint(work_units(["a", "b"]), "f.py", "local")
    others = [
        (work_units(["a"]), "f.py", "local"), (units, "g.py", "local"), (units, "f.py", "slurm"),
        (work_units([WorkUnit(name=n, argument=n, retries=0) for n in "ab"]), "f.py", "local"),
    ]  # fmt: skip
    assert len({same, *(prepare.fingerprint(*other) for other in others)}) == 5


def test_the_content_is_that_of_the_values(file, corpora):
    def content():
        return prepare.content(prepare.declared_units(f"{file}:{corpora}", [], []), str(file))

    before = content()
    file.write_text(TRAINING + "# a comment\n")
    assert content() == before
    file.write_text(TRAINING.replace("1e-3", "2e-3"))
    assert content() != before
    # What waits for others is not loaded: its file counts as it is written.
    later = [WorkUnit(name="u", config=str(file), argument="/none", after=("x",))]
    said = prepare.content(later, "f.py")
    file.write_text(TRAINING)
    assert prepare.content(later, "f.py") != said


def test_outcomes():
    assert outcome(0, True, 1, 2) == ("done", 1)
    assert outcome(75, False, 1, 0) == ("queued", 1)
    assert outcome(75, True, 0, 2) == ("stopped", 0)
    assert outcome(130, False, 0, 2) == ("stopped", 0)
    assert outcome(2, False, 0, 2) == ("failed", 1)
    assert outcome(3, False, 1, 2) == ("queued", 2)
    assert outcome(137, False, 2, 2) == ("failed", 3)
    assert outcome(4, False, 2, 2, progressed=True) == ("queued", 1)


def test_progress_is_a_newer_checkpoint(tmp_path):
    assert newest_checkpoint(tmp_path) == 0
    for name in ("9", "10", "12.orbax-checkpoint-tmp", "lock"):
        (tmp_path / CHECKPOINTS / name).mkdir(parents=True)
    assert newest_checkpoint(tmp_path) == 10
    assert CHECKPOINTS == checkpoint.CHECKPOINTS
