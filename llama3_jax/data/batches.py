"""Packed, mixed batches over all stages of a run, as a pure function of (seed, step).

The stream of each source goes on from stage to stage: a change of length, batch or mix repeats no
document, and may leave the rest of one window of each source (see `PackedRows`) behind.
"""

import bisect
from collections.abc import Iterator
from typing import NamedTuple

import grain
import numpy as np

from llama3_jax.data.corpus import Corpus
from llama3_jax.data.mixing import Mix
from llama3_jax.data.packing import PackedRows, Packing, Span, Stream, build_rows
from llama3_jax.errors import UserError

# Enough to even out the batches that begin a best_fit window; each is held in memory.
_BATCHES_AHEAD = 8


class StageShape(NamedTuple):
    """What the data need to know of a stage. `mix` maps sources to weights.

    `left_out` are batches, by their number in the stage and in order, that no step reads: the
    stage's data hold as many more.
    """

    steps: int
    batch_rows: int
    length: int
    mix: dict[str, float]
    left_out: tuple[int, ...] = ()

    def batch(self, step: int) -> int:
        """Which of the stage's batches its step `step` reads."""
        for number in self.left_out:
            if number > step:
                break
            step += 1
        return step


class LedgerEntry(NamedTuple):
    """One span of a batch: where it lies, and tokens [start, stop) of which document."""

    row: int
    source: str
    document: str
    start: int
    stop: int


class Batches:
    """The batches of a whole run."""

    def __init__(
        self, corpora: dict[str, Corpus], stages: list[StageShape], seed: int, packing: Packing
    ):
        """Cheap: no document is read.

        Raises:
          UserError: a mix names a source that has no corpus, or bad weights.
        """
        self.corpora = corpora
        self.sources = tuple(corpora)
        self.stages = stages
        self._streams = {name: Stream(corpus, name, seed) for name, corpus in corpora.items()}
        self._mixes, self._rows = [], []
        origins = dict.fromkeys(corpora, 0)
        # Tokens in the rows of each source: less than its stream has moved on, where the last
        # window of a stage was not used up.
        self.read = dict.fromkeys(corpora, 0)
        for number, stage in enumerate(stages):
            if unknown := set(stage.mix) - set(corpora):
                raise UserError(
                    f"stages.{number}.mix: {min(unknown)!r} is no source; sources: "
                    f"{', '.join(corpora)}"
                )
            mix = Mix(stage.mix)
            rows = {
                name: PackedRows(self._streams[name], origins[name], stage.length, packing)
                for name in mix.sources
            }
            batches = stage.steps + len(stage.left_out)
            for name, count in mix.counts(batches * stage.batch_rows).items():
                origins[name] = rows[name].end(count)
                self.read[name] += rows[name].tokens(count)
            self._mixes.append(mix)
            self._rows.append(rows)
        self.consumed = origins
        self._first_steps = np.cumsum([0, *(stage.steps for stage in stages)]).tolist()

    def epochs(self) -> dict[str, float]:
        """How often each source's corpus is read over the whole run."""
        return {
            name: self.read[name] / stream.epoch_tokens for name, stream in self._streams.items()
        }

    def spans(self, stage: int, row: int) -> tuple[str, list[Span]]:
        """Source and spans of a row, numbered from the stage's start."""
        source, index = self._mixes[stage].row(row)
        return source, self._rows[stage][source].row(index)

    def row(self, stage: int, row: int) -> dict[str, np.ndarray]:
        """The arrays of a row (see `build_rows`) and `source`, its index in `sources`."""
        return {name: array[0] for name, array in self.rows(stage, row, row + 1).items()}

    def rows(self, stage: int, start: int, stop: int) -> dict[str, np.ndarray]:
        """As `row`, for rows [start, stop)."""
        drawn = [self.spans(stage, row) for row in range(start, stop)]
        pieces = [(self.corpora[source], spans) for source, spans in drawn]
        arrays = build_rows(pieces, self.stages[stage].length)
        sources = [self.sources.index(source) for source, _ in drawn]
        return arrays | {"source": np.array(sources, np.int32)}

    def documents(self, step: int) -> list[LedgerEntry]:
        """Which documents made the batch of `step` (from 0): the ledger.

        Raises:
          UserError: the run has no such step.
        """
        if not 0 <= step < self._first_steps[-1]:
            raise UserError(
                f"step {step} is outside the run: steps 0 to {self._first_steps[-1] - 1}"
            )
        stage = bisect.bisect_right(self._first_steps, step) - 1
        batch_rows = self.stages[stage].batch_rows
        first = self.stages[stage].batch(step - self._first_steps[stage]) * batch_rows
        entries = []
        for row in range(batch_rows):
            source, spans = self.spans(stage, first + row)
            for span in spans:
                identifier = self.corpora[source].document(span.document).id
                entries.append(LedgerEntry(row, source, identifier, span.start, span.stop))
        return entries

    def load(
        self, stage: int, first_step: int = 0, *, host: int = 0, hosts: int = 1, workers: int = 0
    ) -> Iterator[dict[str, np.ndarray]]:
        """This host's part of the batches of a stage, from its step `first_step` on.

        The global batch does not depend on `hosts`: host h gets its h-th contiguous part. Batches
        are built ahead of use in a thread, or in `workers` processes.

        Raises:
          UserError: the batch cannot be divided among the hosts.
        """
        shape = self.stages[stage]
        if shape.batch_rows % hosts:
            raise UserError(
                f"a batch of {shape.batch_rows} rows cannot be divided among {hosts} hosts"
            )
        dataset = grain.MapDataset.source(_HostBatches(self, stage, host, hosts))[first_step:]
        read = grain.ReadOptions(num_threads=1, prefetch_buffer_size=_BATCHES_AHEAD)
        iterator = dataset.to_iter_dataset(read)
        if workers:
            iterator = iterator.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers))
        return iter(iterator)


class _HostBatches(grain.sources.RandomAccessDataSource):
    """One host's part of each batch of a stage, as a grain source."""

    def __init__(self, batches: Batches, stage: int, host: int, hosts: int):
        self._batches, self._stage, self._host = batches, stage, host
        self._shape = batches.stages[stage]
        self._per_host = self._shape.batch_rows // hosts

    def __len__(self) -> int:
        return self._shape.steps

    def __getitem__(self, step: int) -> dict[str, np.ndarray]:
        first = self._shape.batch(int(step)) * self._shape.batch_rows
        first += self._host * self._per_host
        return self._batches.rows(self._stage, first, first + self._per_host)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(stage={self._stage}, host={self._host})"
