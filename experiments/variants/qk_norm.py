"""QK-norm: queries and keys normed per head before RoPE (Dehghani et al. 2023, arXiv 2302.05442).

    python -m llama3_jax.train --config=experiments/variants/qk_norm.py --workdir=runs/qk_norm

Needs the corpora that `make demo` prepares under runs/demo.
"""

from experiments.demo import train
from llama3_jax.model.config import ModelConfig
from llama3_jax.model.layers import Attention, RMSNorm


class QKNormAttention(Attention):
    def __init__(self, config: ModelConfig, *, rngs):
        super().__init__(config, rngs=rngs)
        self.query_norm = RMSNorm(config, rngs=rngs, dim=config.head_dim)
        self.key_norm = RMSNorm(config, rngs=rngs, dim=config.head_dim)

    def before_rope(self, q, k, context):
        return self.query_norm(q), self.key_norm(k)


def get_config(argument: str = "runs/demo"):
    config = train.get_config(argument)
    config.model.attention_module = "experiments.variants.qk_norm:QKNormAttention"
    return config
