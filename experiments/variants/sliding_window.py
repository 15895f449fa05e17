"""Sliding windows: all layers but every `period`-th see only the last `window` tokens.

    python -m llama3_jax.train --config=experiments/variants/sliding_window.py --workdir=runs/window

As in Gemma 3 (arXiv 2503.19786, section 2). Needs the corpora that `make demo` prepares under
runs/demo.
"""

import jax.numpy as jnp

from experiments.demo import train
from llama3_jax.model.config import ModelConfig
from llama3_jax.model.layers import Attention, Context, see_from


class SlidingWindowAttention(Attention):
    def __init__(self, config: ModelConfig, *, rngs):
        super().__init__(config, rngs=rngs)
        self.window, self.period = config.option("window"), config.option("period")

    def visible(self, context: Context) -> Context:
        full = context.layer % self.period == self.period - 1
        earliest = context.queries.positions - self.window + 1
        return see_from(context, jnp.where(full, 0, earliest))


def get_config(argument: str = "runs/demo"):
    config = train.get_config(argument)
    config.model.attention_module = "experiments.variants.sliding_window:SlidingWindowAttention"
    with config.unlocked():
        config.model.options = {"window": 64, "period": 4}
    return config
