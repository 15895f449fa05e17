"""The mean of a run's parameters at several steps, in float32 (Polyak averaging).

Online it is one more copy of the parameters, however many checkpoints enter it; offline it reads
checkpoints one after another.
"""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from llama3_jax.errors import UserError
from llama3_jax.model.definition import Params
from llama3_jax.training.checkpoint import LoadedModel, load_model


@functools.partial(jax.jit, donate_argnums=0)
def _moved(average: Params, params: Params, share: jax.Array) -> Params:
    return jax.tree.map(lambda a, p: a + share * (p.astype(jnp.float32) - a), average, params)


@jax.jit
def _copied(params: Params) -> Params:
    # The step donates the parameters: without an addition the output could be the input's buffer.
    return jax.tree.map(lambda p: p.astype(jnp.float32) + 0.0, params)


class RunningAverage:
    """sum(w_i p_i) / sum(w_i) over the parameters seen so far; `params` is None before the first."""

    def __init__(self, weights: Sequence[float], seen: int = 0, params: Params | None = None):
        """Of as many parameters as there are `weights`; `seen` of them are in `params` already."""
        self._weights, self.seen, self.params = list(weights), seen, params

    def add(self, params: Params) -> None:
        """Parameters with the next weight, on the mesh of those before."""
        weight = self._weights[self.seen]
        self.seen += 1
        if self.params is None:
            self.params = _copied(params)
            return
        share = jnp.float32(weight / sum(self._weights[: self.seen]))
        self.params = _moved(self.params, params, share)


def average_models(paths: Sequence[Path], weights: Sequence[float] | None) -> LoadedModel:
    """The mean of several models of one shape (checkpoints, runs, model folders).

    Raises:
      UserError: fewer than two, weights that do not fit them, or models of different shapes,
        tokenizers or RoPE.
    """
    if len(paths) < 2:
        raise UserError("an average needs at least two models")
    weights = [1.0] * len(paths) if weights is None else list(weights)
    if len(weights) != len(paths):
        raise UserError(f"{len(weights)} weights for {len(paths)} models")
    if min(weights) < 0 or not weights[0] > 0:
        raise UserError("weights must be 0 or more, the first one positive")
    average, first = RunningAverage(weights), None
    for path in paths:
        loaded = load_model(path)
        first = first or loaded._replace(params={})
        for what, mine, other in (
            ("shape", _shape(loaded.config), _shape(first.config)),
            ("tokenizer", loaded.tokenizer, first.tokenizer),
            ("RoPE", loaded.config.rope, first.config.rope),
        ):
            if mine != other:
                raise UserError(f"{path} is of another {what} than {paths[0]}")
        average.add(loaded.params)
    return first._replace(params=average.params)


def _shape(config: Any) -> dict[str, Any]:
    keys = ("vocab_size", "dim", "layers", "heads", "kv_heads", "head_dim", "ffn_dim", "tied_head")
    return {key: getattr(config, key) for key in keys}
