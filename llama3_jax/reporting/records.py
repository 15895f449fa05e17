"""What a report reads of a run, checked: metrics.jsonl, baselines.json and config.json."""

import dataclasses
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pydantic

from llama3_jax.errors import UserError
from llama3_jax.training.metrics import METRICS_FILE, read_metrics

BASELINES_FILE = "baselines.json"
CONFIG_FILE = "config.json"


class Record(pydantic.BaseModel):
    """After `step` steps, when `tokens` tokens were consumed. Other keys are ignored."""

    step: pydantic.NonNegativeInt
    tokens: pydantic.NonNegativeInt


class TrainRecord(Record):
    """A step. Its numbers may be NaN or infinite, written as strings, where it was not applied."""

    stage: str
    loss: float
    losses: dict[str, float]
    grad_norm: float
    learning_rate: float
    applied: bool
    length: pydantic.PositiveInt
    batch_tokens: pydantic.PositiveInt
    mix: dict[str, float]
    utilisation: float
    documents: pydantic.NonNegativeInt
    cut_documents: pydantic.NonNegativeInt
    seconds: float | None
    tokens_per_second: float
    mfu: dict[str, float]


class ValidationRecord(Record):
    """Losses in nats a token and bits a byte, by source."""

    losses: dict[str, float]
    bits_per_byte: dict[str, float]
    length: pydantic.PositiveInt


class Sample(pydantic.BaseModel):
    prompt: str
    text: str


class SampleRecord(Record):
    samples: list[Sample]


@dataclasses.dataclass(frozen=True)
class RunRecords:
    """A run in the order of its steps; `train` has at least one record."""

    name: str
    train: list[TrainRecord]
    validation: list[ValidationRecord]
    samples: list[SampleRecord]
    baselines: dict[str, dict[str, float]]
    config: Any

    @property
    def start(self) -> int:
        """Tokens consumed before the first recorded step."""
        return max(self.train[0].tokens - self.train[0].batch_tokens, 0)

    def stages(self) -> list[list[TrainRecord]]:
        """The steps of each stage."""
        return [list(steps) for _, steps in itertools.groupby(self.train, lambda r: r.stage)]

    def sources(self) -> list[str]:
        """Names of all sources, in the order in which they appear."""
        mixes = (record.mix for record in self.train)
        losses = (record.losses for record in (*self.train, *self.validation))
        return list(dict.fromkeys(itertools.chain(*mixes, *losses)))


def require_run(workdir: Path) -> None:
    """Raises UserError where `workdir` isn't the directory of a run."""
    if not workdir.is_dir():
        raise UserError(f"{workdir}: no such directory")
    if not (workdir / METRICS_FILE).is_file():
        raise UserError(f"{workdir}: not the directory of a run: it has no {METRICS_FILE}")


def read_records(workdir: Path) -> list[dict[str, Any]]:
    """All records of metrics.jsonl, each with its kind; none where there is no such file.

    Raises:
      UserError: a line is damaged.
    """
    path = workdir / METRICS_FILE
    try:
        records = read_metrics(workdir)
    except FileNotFoundError:
        return []
    except ValueError:
        raise UserError(f"{path}: line {_first_bad_line(path)} is not JSON") from None
    for number, record in enumerate(records, start=1):
        if not isinstance(record, dict) or not isinstance(record.get("kind"), str):
            raise UserError(f"{path}: line {number} is not a record with a kind")
    return records


def load(workdir: Path, records: Sequence[dict[str, Any]] | None = None) -> RunRecords:
    """Reads a run's directory; `records` are those of its metrics.jsonl, where they are read.

    Raises:
      UserError: it isn't that of a run, it has no step yet, or a file in it is damaged.
    """
    require_run(workdir)
    if (run := load_if_trained(workdir, records)) is None:
        raise UserError(f"{workdir / METRICS_FILE}: no training step is recorded yet")
    return run


def load_if_trained(
    workdir: Path, records: Sequence[dict[str, Any]] | None = None
) -> RunRecords | None:
    """The same for any program's directory; None where no training step is recorded.

    Raises:
      UserError: a file in it is damaged.
    """
    path = workdir / METRICS_FILE
    kinds: dict[str, list] = {"train": [], "validation": [], "sample": []}
    types = {"train": TrainRecord, "validation": ValidationRecord, "sample": SampleRecord}
    records = read_records(workdir) if records is None else records
    for number, record in enumerate(records, start=1):
        if record["kind"] not in types:  # other parts may record what this page does not show
            continue
        try:
            kinds[record["kind"]].append(types[record["kind"]].model_validate(record))
        except pydantic.ValidationError as error:
            raise UserError(f"{path}: line {number}: {_reason(error)}") from None
    if not kinds["train"]:
        return None
    return RunRecords(
        name=workdir.resolve().name,
        train=kinds["train"],
        validation=kinds["validation"],
        samples=kinds["sample"],
        baselines=_baselines(workdir / BASELINES_FILE),
        config=read_config(workdir),
    )


def _baselines(path: Path) -> dict[str, dict[str, float]]:
    if not path.exists():
        return {}
    schema = pydantic.TypeAdapter(dict[str, dict[str, pydantic.FiniteFloat]])
    try:
        return schema.validate_json(path.read_bytes())
    except pydantic.ValidationError as error:
        raise UserError(f"{path}: {_reason(error)}") from None


def read_config(workdir: Path) -> Any:
    """What config.json holds; None where there is none.

    Raises:
      UserError: it is not JSON.
    """
    path = workdir / CONFIG_FILE
    if not path.exists():
        return None
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path}: not JSON: {error}") from None


def _reason(error: pydantic.ValidationError) -> str:
    first = error.errors()[0]
    return ": ".join(filter(None, [".".join(map(str, first["loc"])), first["msg"]]))


def _first_bad_line(path: Path) -> int:
    lines = path.read_bytes().splitlines()
    return next(number for number, line in enumerate(lines, start=1) if not _is_json(line))


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line.decode())
    except ValueError:
        return False
    return True
