"""LoRA: what is trained are low-rank updates of queries and values (Hu et al. 2021, arXiv 2106.09685).

    python -m llama3_jax.train --config=experiments/variants/lora.py --workdir=runs/lora

Starts from the demo's run, and needs the corpora that `make demo` prepares under runs/demo.
"""

import jax
import jax.numpy as jnp
import optax

from experiments.demo import train
from llama3_jax.model.config import ModelConfig
from llama3_jax.model.layers import Attention, parameter

NEW = ("query_in", "query_out", "value_in", "value_out")


class LoraAttention(Attention):
    def __init__(self, config: ModelConfig, *, rngs):
        super().__init__(config, rngs=rngs)
        M, D, rank = config.dim, config.head_dim, config.option("rank")
        for name, axis, heads in (
            ("query", "heads", config.heads),
            ("value", "kv_heads", config.kv_heads),
        ):
            inner = parameter(rngs, (M, rank), ("embed", None), M**-0.5)
            outer = parameter(rngs, (rank, heads, D), (None, axis, "head_dim"), std=0.0)
            setattr(self, f"{name}_in", inner)
            setattr(self, f"{name}_out", outer)

    def weights(self):
        query, key, value = super().weights()
        query += jnp.einsum("MR,RHD->MHD", self.query_in[...], self.query_out[...])
        value += jnp.einsum("MR,RKD->MKD", self.value_in[...], self.value_out[...])
        return query, key, value


def adamw_of_new(learning_rate, b1, b2, eps, weight_decay):
    """AdamW of the new parameters; the others stay."""

    def kinds(params):
        new = lambda path, _: "new" if path[-1].key in NEW else "old"  # noqa: E731
        return jax.tree_util.tree_map_with_path(new, params)

    adamw = optax.adamw(learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay)
    return optax.partition({"new": adamw, "old": optax.set_to_zero()}, kinds)


def get_config(argument: str = "runs/demo"):
    config = train.get_config(argument)
    config.model.attention_module = "experiments.variants.lora:LoraAttention"
    config.optimizer.name = "experiments.variants.lora:adamw_of_new"
    config.init_from, config.init_anew = argument.partition(",")[0], NEW
    with config.unlocked():
        config.model.options = {"rank": 8}
    return config
