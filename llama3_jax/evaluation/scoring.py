"""Log-likelihoods of continuations after their contexts, packed in rows of a few lengths.

Requests are sorted by length and packed whole, a segment each, so that padding costs little and no
request sees another. Rows are `length` tokens, or twice, four times, … that for longer requests: a
compiled program each.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import jax
import numpy as np
import psutil
from jax.sharding import NamedSharding
from jaxtyping import Float, Int

from llama3_jax.errors import UserError
from llama3_jax.model.definition import Definition, ModelLike, Params, define
from llama3_jax.parallel import sharding
from llama3_jax.parallel.context import balanced_columns
from llama3_jax.parallel.mesh import Layout
from llama3_jax.parallel.processes import local_rows
from llama3_jax.training.gradients import make_scores
from llama3_jax.training.state import param_shardings
from llama3_jax.xla import DEFAULT, XlaConfig


class Request(NamedTuple):
    """`continuation` is scored, `context` (at least begin of text) is given."""

    context: Int[np.ndarray, "tokens"]
    continuation: Int[np.ndarray, "tokens"]

    @property
    def inputs(self) -> int:
        """Tokens that the model reads: the last one is only predicted."""
        return len(self.context) + len(self.continuation) - 1


class Score(NamedTuple):
    """Sum of -log p over the continuation in nats, and whether greedy decoding would give it."""

    nll: float
    greedy: bool


class Scorer:
    """A model on a mesh, made to score. `params` are sharded on the mesh (see training/step.py).

    Every process gets all results.
    """

    def __init__(
        self, model: ModelLike, params: Params, layout: Layout, batch_tokens: int,
        xla: XlaConfig = DEFAULT, between: Callable[[], None] = lambda: None,
    ):  # fmt: skip
        """At most about `batch_tokens` tokens are computed at once, but a row a data rank at least.

        `between` is called before each batch, and may raise to end the scoring.
        """
        self.model, self.params, self.layout, self.xla = define(model), params, layout, xla
        self._batch_tokens, self._between = batch_tokens, between

    def score(self, requests: Sequence[Request], length: int) -> list[Score]:
        """The score of each request, in order; rows of `length` tokens or a power of two times that.

        Raises:
          UserError: an empty context or continuation, or a length that the mesh doesn't divide.
        """
        for number, request in enumerate(requests):
            if not len(request.context) or not len(request.continuation):
                raise UserError(f"request {number}: context and continuation need a token each")
        buckets: dict[int, list[int]] = {}
        for number, request in enumerate(requests):
            size = length
            while size < request.inputs:
                size *= 2
            buckets.setdefault(size, []).append(number)
        scores: dict[int, Score] = {}
        for size, members in sorted(buckets.items()):
            rows = _packed(members, [requests[n].inputs for n in members], size)
            for batch_rows, losses, is_argmax in self._run(rows, requests, size):
                for row, row_losses, row_is_argmax in zip(
                    batch_rows, losses, is_argmax, strict=True
                ):
                    at = 0
                    for number in row:
                        request = requests[number]
                        stop = at + request.inputs
                        scored = slice(stop - len(request.continuation), stop)
                        nll = float(row_losses[scored].astype(np.float64).sum())
                        scores[number] = Score(nll, bool(row_is_argmax[scored].all()))
                        at = stop
        return [scores[number] for number in range(len(requests))]

    def _run(self, rows: list[list[int]], requests: Sequence[Request], length: int):
        for start in range(0, len(rows), size := self.batch_rows(length)):
            chosen = rows[start : start + size]
            padded = chosen + [[]] * (size - len(chosen))
            losses, is_argmax = self.tokens(_arrays(padded, requests, length))
            yield chosen, losses[: len(chosen)], is_argmax[: len(chosen)]

    def batch_rows(self, length: int) -> int:
        """Rows of that length that are computed at once."""
        ranks = self.layout.shape["data"]
        return max(self._batch_tokens // length // ranks, 1) * ranks

    def check_memory(self, length: int) -> None:
        """Refuses rows that a device has no memory for: by the compiler's figure, before any is made.

        Raises:
          UserError: names the length, what it takes and what is free.
        """
        rows = self.batch_rows(length)
        sharding.check_batch(rows, length, 1, self.layout)
        placed = NamedSharding(self.layout.mesh, sharding.spec(("rows", "length"), self.layout))
        dtypes = dict.fromkeys(("tokens", "targets", "segment_ids", "positions"), np.int32)
        batch = {
            name: jax.ShapeDtypeStruct((rows, length), dtype, sharding=placed)
            for name, dtype in (dtypes | {"loss_mask": np.bool_}).items()
        }
        compiled = _compile(self.model, self.layout, self.xla).lower(self.params, batch).compile()
        need = compiled.memory_analysis().temp_size_in_bytes
        if stats := jax.local_devices()[0].memory_stats():
            free = stats["bytes_limit"] - stats["bytes_in_use"]
        else:  # CPU devices share the host's
            free = psutil.virtual_memory().available // len(jax.local_devices())
        if need > free:
            raise UserError(
                f"length {length:,}: {rows} row(s) of it take {need / 2**30:,.1f} GiB of a device "
                f"with {free / 2**30:,.1f} GiB free: shorter rows, more context ranks, or a model "
                "with attention='chunked' or 'triton'"
            )

    def tokens(
        self, batch: dict[str, np.ndarray]
    ) -> tuple[Float[np.ndarray, "rows length"], np.ndarray]:
        """Loss of each token of the loss mask in nats, and whether it is the likeliest one.

        `batch` holds all rows, on every process.

        Raises:
          UserError: the mesh does not divide it.
        """
        rows, length = batch["tokens"].shape
        sharding.check_batch(rows, length, 1, self.layout)
        self._between()
        host, hosts = local_rows(self.layout.mesh)
        part = slice(host * rows // hosts, (host + 1) * rows // hosts)
        own = {name: array[part] for name, array in batch.items()}
        function = _compile(self.model, self.layout, self.xla)
        scores = jax.device_get(function(self.params, sharding.put_batch(own, self.layout)))
        natural = np.argsort(balanced_columns(length, self.layout.shape["context"]))
        return scores.losses[:, natural], scores.is_argmax[:, natural]


@functools.cache
def _compile(model: Definition, layout: Layout, xla: XlaConfig):
    return jax.jit(
        make_scores(model, layout),
        in_shardings=(param_shardings(model, layout), None),
        out_shardings=sharding.replicated(layout),
        compiler_options=xla.compiler_options(layout.platform, layout.config.tensor_pieces),
    )


def _packed(members: list[int], sizes: list[int], length: int) -> list[list[int]]:
    """Members in rows whose sizes sum to at most `length`: longest first, each in the first row."""
    rows: list[list[int]] = []
    free: list[int] = []
    open_from = 0
    for size, member in sorted(zip(sizes, members, strict=True), key=lambda p: (-p[0], p[1])):
        while open_from < len(free) and free[open_from] < min(sizes):
            open_from += 1  # nothing fits there any more
        for row in range(open_from, len(rows)):
            if free[row] >= size:
                break
        else:
            row = len(rows)
            rows.append([])
            free.append(length)
        rows[row].append(member)
        free[row] -= size
    return rows


def _arrays(
    rows: Iterable[list[int]], requests: Sequence[Request], length: int
) -> dict[str, np.ndarray]:
    """Packed rows as a batch; the mask holds the continuations alone."""
    rows = list(rows)
    names = ("tokens", "targets", "segment_ids", "positions")
    arrays = {name: np.zeros((len(rows), length), np.int32) for name in names}
    arrays["loss_mask"] = np.zeros((len(rows), length), bool)
    for row, members in enumerate(rows):
        at = 0
        for segment, number in enumerate(members, start=1):
            request = requests[number]
            text = np.concatenate([request.context, request.continuation])
            stop = at + request.inputs
            arrays["tokens"][row, at:stop] = text[:-1]
            arrays["targets"][row, at:stop] = text[1:]
            arrays["segment_ids"][row, at:stop] = segment
            arrays["positions"][row, at:stop] = np.arange(stop - at)
            arrays["loss_mask"][row, stop - len(request.continuation) : stop] = True
            at = stop
    return arrays
