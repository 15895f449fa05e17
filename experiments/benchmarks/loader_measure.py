"""What one process of loader.py measures, chosen by name and arguments:

    python -m experiments.benchmarks.loader_measure '["index", {"position": 0.5}]'

Prints the result as JSON.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import grain
import numpy as np

from llama3_jax.data import corpus as corpora
from llama3_jax.data.batches import Batches, StageShape
from llama3_jax.data.packing import Stream

MIX = {"general": 0.50, "math": 0.25, "code": 0.17, "multilingual": 0.08}
ROWS, SHORT, LONG = 16, 256, 8192
SIMULATED = 20_000_000


def ours(
    folder: str, packing: str, length: int, mix: dict = MIX, position: float = 0.0
) -> Iterator[dict[str, np.ndarray]]:
    opened = {name: corpora.Corpus(Path(folder, name)) for name in mix}
    steps = sum(source.info.tokens for source in opened.values()) // (ROWS * length)
    # Speed may take more than an epoch, the position is a share of one.
    shape = StageShape(100 * steps, ROWS, length, mix)
    return Batches(opened, [shape], 0, packing).load(0, int(position * steps))


class Cut(grain.experimental.FlatMapTransform):
    """Documents to pieces that fit a row, as grain's whole-document packing requires."""

    max_fan_out = 2**20

    def __init__(self, length: int):
        self.length = length

    def flat_map(self, element: dict[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
        tokens, length = element["tokens"], self.length
        return [{"tokens": tokens[i : i + length]} for i in range(0, len(tokens), length)]


def grains(folder: str, packing: str, length: int) -> Iterator[dict[str, np.ndarray]]:
    def decode(record: bytes) -> dict[str, np.ndarray]:
        return {"tokens": corpora.decode_record(record).tokens.astype(np.int32)}

    def source(name: str) -> grain.MapDataset:
        files = sorted(str(path) for path in Path(folder, name).glob("*.arrayrecord"))
        records = grain.MapDataset.source(grain.sources.ArrayRecordDataSource(files))
        return records.seed(0).shuffle().repeat().map(decode)

    mixed = grain.MapDataset.mix([source(name) for name in MIX], list(MIX.values()))
    stream = mixed.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=ROWS))
    shape = {"tokens": length}
    if packing == "concat":
        rows = grain.experimental.ConcatThenSplitIterDataset(stream, length_struct=shape)
    else:
        pieces = grain.experimental.FlatMapIterDataset(stream, Cut(length))
        rows = grain.experimental.BestFitPackIterDataset(
            pieces, length_struct=shape, num_packing_bins=64
        )
    return iter(rows.batch(ROWS).map(lambda b: b | {"segment_ids": b["tokens_segment_ids"]}))


def speed(side: str, seconds: float, **setup) -> dict[str, float]:
    batches = {"ours": ours, "grain": grains}[side](**setup)
    for _ in range(4):
        next(batches)
    begun, tokens, slots = time.process_time(), 0, 0
    while (spent := time.process_time() - begun) < seconds:
        segment_ids = next(batches)["segment_ids"]
        tokens, slots = tokens + int(np.count_nonzero(segment_ids)), slots + segment_ids.size
    return {"tokens_per_second": tokens / spent, "padding": 1 - tokens / slots}


def start_up(folder: str, position: float) -> dict[str, float]:
    mix = dict.fromkeys(MIX, 1.0)
    return timed(lambda: next(ours(folder, "best_fit", SHORT, mix, position)))


def index(position: float) -> dict[str, float]:
    class Simulated(SimpleNamespace):
        def __len__(self) -> int:
            return SIMULATED

    lengths = np.random.default_rng(0).lognormal(np.log(600), 1.2, SIMULATED).astype(np.uint32)
    tokens = int(lengths.sum(dtype=np.int64))
    corpus = Simulated(lengths=lengths, info=SimpleNamespace(tokens=tokens))
    start = int(position * tokens)
    # The fastest of three: most of the time goes to fresh memory, which the system may page slowly.
    runs = [timed(lambda: Stream(corpus, "", 0).spans(start, start + 64 * LONG)) for _ in range(3)]
    return min(runs, key=lambda run: run["cpu"])


def timed(function: Callable) -> dict[str, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    function()
    return {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}


def train_step() -> dict[str, float]:
    """Of the demo, on every core; the fastest of many steps, which a busy machine slows least."""
    import jax

    from experiments.demo.train import get_config
    from llama3_jax.parallel.mesh import make_mesh
    from llama3_jax.parallel.sharding import put_batch
    from llama3_jax.recipe.config import RunConfig
    from llama3_jax.schema import parse
    from llama3_jax.training.state import init_state
    from llama3_jax.training.step import compile_step

    config = parse(RunConfig, get_config())
    mesh = make_mesh(config.mesh)
    state = init_state(config.model, config.optimizer, mesh, seed=0)
    step = compile_step(config.model, config.optimizer, mesh, 1, len(MIX))
    ones = np.ones((ROWS, SHORT), np.int32)
    batch = dict(
        tokens=ones, targets=ones, segment_ids=ones, positions=np.cumsum(ones, 1, np.int32) - 1,
        loss_mask=ones > 0, source=ones[:, 0], cut=ones[:, 0],
    )  # fmt: skip
    batch, seconds = put_batch(batch, mesh), []
    for _ in range(30):
        begun = time.perf_counter()
        state, _ = jax.block_until_ready(step(state, batch, np.float32(1e-3)))
        seconds.append(time.perf_counter() - begun)
    return {"tokens_per_second": ROWS * SHORT / min(seconds)}


def main(name: str, setup: dict) -> None:
    if name != "train_step":
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    print(json.dumps(globals()[name](**setup)))


if __name__ == "__main__":
    main(*json.loads(sys.argv[1]))
