"""Records are lines of JSON and events that TensorBoard reads; where they cannot be, an error at once."""

import json
import struct
from pathlib import Path

import pytest
from tensorboardX.proto.event_pb2 import Event

from llama3_jax.errors import UserError
from llama3_jax.training import json_log
from llama3_jax.training.metrics import MetricsWriter, read_metrics


def events(folder: Path) -> list[Event]:
    """Of all files: a length of 8 bytes and its checksum of 4, the event, its checksum."""
    found = []
    for file in sorted((folder / "tensorboard").iterdir()):
        content, at = file.read_bytes(), 0
        while at < len(content):
            (size,) = struct.unpack_from("<Q", content, at)
            found.append(Event.FromString(content[at + 12 : at + 12 + size]))
            at += 16 + size
    return found


def test_numbers_are_events_and_a_resumed_run_forgets_what_came_after(tmp_path):
    writer = MetricsWriter(tmp_path, 0)
    for step in (1, 2, 3):
        writer.write(
            "train", step, 10 * step, {"loss": 0.5 * step, "losses": {"a": 1.0}, "text": "x"}
        )
    # While the run goes on, too.
    assert [e.step for e in events(tmp_path) if e.HasField("summary")] == [1, 2, 3]
    writer.close()
    writer = MetricsWriter(tmp_path, 2)
    writer.close()
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2]
    found = [e for e in events(tmp_path) if e.HasField("summary")]
    values = {v.tag: v.simple_value for v in found[1].summary.value}
    assert values == {"train/loss": 1.0, "train/losses/a": 1.0}
    starts = [e.step for e in events(tmp_path) if e.HasField("session_log")]
    assert sorted(starts) == [1, 3]


def test_a_full_disk_is_an_error_and_no_hang(tmp_path, monkeypatch):
    writer = MetricsWriter(tmp_path, 0)
    with open("/dev/full", "wb", buffering=0) as full:
        monkeypatch.setattr(writer._board._py_recordio_writer, "_writer", full)
        with pytest.raises(OSError, match="No space left"):
            for step in range(100):  # more than a queue would hold
                writer.write("train", step, step, {"loss": 1.0})


@pytest.mark.parametrize("block", [16, 1 << 16])
@pytest.mark.parametrize("tail", ["", '{"kind": "train", "ste'])
def test_a_file_is_cut_from_its_end(tmp_path, monkeypatch, block, tail):
    """Without reading what stays: the first line is no record, and nobody finds out."""
    monkeypatch.setattr(json_log, "_BLOCK", block)
    kept = ["no record\n"]
    kept += [f'{{"kind": "train", "step": {step}, "tokens": 1}}\n' for step in range(1, 40)]
    kept += ['{"kind": "validation", "step": 39, "tokens": 1}\n']
    later = [f'{{"kind": "train", "step": {step}, "tokens": 1}}\n' for step in (40, 41, 41, 50)]
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(kept + later) + tail)
    writer = MetricsWriter(tmp_path, 39)
    assert path.read_text() == "".join(kept)
    assert [r["kind"] for r in writer.of_step] == ["train", "validation"]
    writer.close()
    writer = MetricsWriter(tmp_path, 39)
    assert path.read_text() == "".join(kept)
    writer.close()


def test_a_file_of_later_records_alone_becomes_empty(tmp_path):
    writer = MetricsWriter(tmp_path, 0)
    assert read_metrics(tmp_path) == []  # it is there before the first record
    writer.write("train", 1, 1, {"loss": 1.0})
    writer.close()
    writer = MetricsWriter(tmp_path, 0)
    writer.close()
    assert read_metrics(tmp_path) == [] and writer.of_step == []


def test_a_damaged_tail_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nnothing\n')
    with pytest.raises(UserError, match="metrics.jsonl: byte 12: not a record of metrics"):
        MetricsWriter(tmp_path, 5)


def test_opening_a_long_file_reads_its_end_alone(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    with open(path, "w") as file:
        for step in range(1, 50_000):
            file.write(f'{{"kind": "train", "step": {step}, "tokens": 1}}\n')
    parsed = []
    loads = json.loads
    monkeypatch.setattr(json_log.json, "loads", lambda line: parsed.append(1) or loads(line))
    MetricsWriter(tmp_path, 49_990).close()
    assert len(parsed) == 11
