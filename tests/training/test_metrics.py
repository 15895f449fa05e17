"""Records are lines of JSON and events that TensorBoard reads; where they cannot be, an error at once."""

import struct
from pathlib import Path

import pytest
from tensorboardX.proto.event_pb2 import Event

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
