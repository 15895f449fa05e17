"""The model's shape as data, and the presets (Llama 3 paper, section 3.2, table 3).

`42M` to `16.2B` are the scaling-law ladder, named by their parameters without embeddings.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import pydantic

from llama3_jax.errors import UserError
from llama3_jax.kernels.attention import Implementation
from llama3_jax.kernels.cross_entropy import Implementation as LossImplementation
from llama3_jax.kernels.dispatch import KERNELS
from llama3_jax.kernels.pointwise import Implementation as PointwiseImplementation
from llama3_jax.schema import Config


class RopeScaling(Config):
    """Llama 3.1's "llama3" frequency scaling; off in pre-training."""

    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_length: int = 8192


class RopeConfig(Config):
    theta: float = 500_000.0
    scaling: RopeScaling | None = None


# A class by name, and options for such classes as a mapping (held as pairs, to be hashable).
ModuleName = Annotated[str, pydantic.Field(pattern=r"^[\w.]+:\w+$")]
Options = Annotated[
    tuple[tuple[str, Any], ...],
    pydantic.BeforeValidator(lambda x: sorted(x.items()) if isinstance(x, Mapping) else x),
    pydantic.PlainSerializer(dict),
]


class ModelConfig(Config):
    """Shapes of a dense Llama 3 transformer, and how it is computed.

    `dtype` is that of matrix products and activations; parameters, norms, softmax and loss are
    float32 whatever it is. `layer_unroll` layers are unrolled in each iteration of the scan over
    layers: 1 compiles quickest, all of them runs quickest on CPU. `remat` is what the backward pass
    computes again: nothing; all of a layer; all but attention's result; all but the results of
    products (what is gathered over ranks is gathered again); or as `save_attention`, kept in the
    host's memory.

    `attention_module`, `ffn_module` and `norm_module` name the classes of a layer's submodules as
    `package.module:Class`, `model_module` that of the whole network; what they take of `options`
    is theirs to say (`config.option`). See model/layers.py for how they are called.
    """

    vocab_size: pydantic.PositiveInt = 128_256
    dim: pydantic.PositiveInt
    layers: pydantic.PositiveInt
    heads: pydantic.PositiveInt
    kv_heads: pydantic.PositiveInt
    head_dim: pydantic.PositiveInt
    ffn_dim: pydantic.PositiveInt
    norm_eps: float = 1e-5
    tied_head: bool = False
    rope: RopeConfig = RopeConfig()
    init_std: float = 0.02
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    attention: Implementation = "reference"
    loss: LossImplementation = "reference"
    norm: PointwiseImplementation = "reference"
    rotary: PointwiseImplementation = "reference"
    swiglu: PointwiseImplementation = "reference"
    remat: Literal["none", "full", "save_attention", "save_dots", "offload"] = "none"
    layer_unroll: pydantic.PositiveInt = 1
    attention_module: ModuleName = "llama3_jax.model.layers:Attention"
    ffn_module: ModuleName = "llama3_jax.model.layers:FeedForward"
    norm_module: ModuleName = "llama3_jax.model.layers:RMSNorm"
    model_module: ModuleName = "llama3_jax.model.transformer:Transformer"
    options: Options = ()

    @pydantic.model_validator(mode="after")
    def _check(self) -> "ModelConfig":
        if self.heads % self.kv_heads:
            raise ValueError(
                f"heads ({self.heads}) must be a multiple of kv_heads ({self.kv_heads})"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim ({self.head_dim}) must be even: RoPE rotates pairs")
        return self

    def option(self, name: str) -> Any:
        """One of `options`.

        Raises:
          UserError: it is not set.
        """
        if name not in (options := dict(self.options)):
            raise UserError(f"model.options.{name} is not set, and a module of the model needs it")
        return options[name]

    def kernels(self) -> dict[str, str]:
        """Which implementation computes each operation that has several."""
        return {operation: getattr(self, operation) for operation in KERNELS}


def _shape(layers: int, dim: int, heads: str, head_dim: int, ffn_dim: int, **rest) -> ModelConfig:
    query_heads, kv_heads = map(int, heads.split("/"))
    return ModelConfig(
        layers=layers, dim=dim, heads=query_heads, kv_heads=kv_heads,
        head_dim=head_dim, ffn_dim=ffn_dim, **rest,
    )  # fmt: skip


_ROPE_3_1 = RopeConfig(scaling=RopeScaling())
_ROPE_3_2 = RopeConfig(scaling=RopeScaling(factor=32.0))

PRESETS: dict[str, ModelConfig] = {
    "8B": _shape(32, 4096, "32/8", 128, 14336),
    "70B": _shape(80, 8192, "64/8", 128, 28672),
    "405B": _shape(126, 16384, "128/8", 128, 53248),
    # As released: 3.1 adds RoPE scaling, 3.2's small models tie the head to the embedding.
    "3.1-8B": _shape(32, 4096, "32/8", 128, 14336, rope=_ROPE_3_1),
    "3.2-1B": _shape(16, 2048, "32/8", 64, 8192, rope=_ROPE_3_2, tied_head=True),
    "3.2-3B": _shape(28, 3072, "24/8", 128, 8192, rope=_ROPE_3_2, tied_head=True),
    # The scaling-law ladder.
    "42M": _shape(12, 512, "8/4", 64, 1792),
    "62M": _shape(8, 768, "12/4", 64, 2688),
    "124M": _shape(16, 768, "12/4", 64, 2688),
    "227M": _shape(16, 1024, "16/8", 64, 3584),
    "380M": _shape(18, 1280, "20/4", 64, 4480),
    "621M": _shape(20, 1536, "12/4", 128, 5376),
    "1.02B": _shape(18, 2048, "16/8", 128, 7168),
    "1.47B": _shape(26, 2048, "16/8", 128, 7168),
    "2.03B": _shape(24, 2560, "20/4", 128, 8960),
    "3.23B": _shape(26, 3072, "24/8", 128, 10752),
    "4.6B": _shape(28, 3584, "28/4", 128, 12544),
    "7.0B": _shape(32, 4096, "32/8", 128, 14336),
    "10.8B": _shape(32, 5120, "40/8", 128, 17920),
    "16.2B": _shape(48, 5120, "40/8", 128, 17920),
}


def preset(name: str, **overrides) -> ModelConfig:
    """A preset by name, with fields replaced.

    Raises:
      UserError: no such preset.
    """
    if name not in PRESETS:
        raise UserError(f"model preset {name!r} is unknown; known: {', '.join(PRESETS)}")
    return ModelConfig.model_validate(PRESETS[name].model_dump() | overrides)
