"""An experiment's report, without a browser: what its table of units holds."""

import json

import pytest
from test_report import measured, train_records

from llama3_jax.errors import UserError
from llama3_jax.reporting import records, run
from llama3_jax.reporting.experiment import UnitEntry, units_table, write_experiment
from llama3_jax.reporting.experiment import _read as read_unit


def entry(tmp_path, wid: int, mix: dict[str, float]) -> UnitEntry:
    workdir = tmp_path / f"u{wid}"
    workdir.mkdir()
    steps = [record | {"mix": mix} for record in train_records()]
    lines = [*steps, *measured(40, 30_720, 2.0, "x")]  # held-out: web 2.0, code 1.25
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (workdir / "config.json").write_text(json.dumps({"seed": wid}))
    return UnitEntry(wid, f"u{wid}", "done", 1, 1.0, workdir)


def held_out(entries) -> tuple[str, list[str]]:
    table = units_table([read_unit(entry) for entry in entries], entries[0].workdir.parent)
    (place,) = [i for i, name in enumerate(table.columns) if name.startswith("held-out")]
    return table.columns[place], [row[place] for row in table.rows]


def test_held_out_losses_are_weighted_alike_in_all_rows(tmp_path):
    first, second = (entry(tmp_path, wid, {"web": 0.8, "code": 0.2}) for wid in (1, 2))
    assert held_out([first, second]) == ("held-out, by mix", ["1.8500"] * 2)
    other = entry(tmp_path, 3, {"web": 0.2, "code": 0.8})
    assert held_out([first, second, other]) == ("held-out, mean", ["1.6250"] * 3)


def test_metrics_are_read_once(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(
        records, "read_metrics",
        lambda workdir, read=records.read_metrics: calls.append(workdir) or read(workdir),
    )  # fmt: skip
    one = entry(tmp_path, 1, {"web": 1.0})
    run.write_run_report(one.workdir)
    assert len(calls) == 1
    write_experiment(tmp_path / "report.html", "x", "", [one])
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"\xdd\xff\n", "line 1 is not JSON"),
        (b"null\n", "line 1 is not a record with a kind"),
        (b"[1, 2]\n", "line 1 is not a record with a kind"),
        (b'{"kind": {"a": 1}}\n', "line 1 is not a record with a kind"),
        (b'{"kind": "train", "step": 1}\n', "line 1: tokens: Field required"),
        (b'{"kind": "other"}\n', "no training step is recorded yet"),
    ],
)
def test_a_run_that_is_garbage_is_one_line(tmp_path, text, message):
    (tmp_path / "metrics.jsonl").write_bytes(text)
    with pytest.raises(UserError, match=message):
        run.write_run_report(tmp_path)
