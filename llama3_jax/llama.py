"""The network for notebooks: weights from anywhere, logits, generation, weights to anywhere.

    model = Llama.from_pretrained("path")        # Hugging Face weights, a run, a checkpoint
    logits = model(tokens)                       # positions and segment ids are optional
    optimizer = nnx.Optimizer(model, optax.adamw(1e-4), wrt=nnx.Param)

It is an NNX module like any other: its submodules can be replaced and wrapped, and `nnx.jit`,
`nnx.value_and_grad` and `nnx.capture` work on it. All that trains, evaluates, decodes or plans takes
it where it takes a model's config.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Self

import jax
from flax import nnx
from jaxtyping import Array, Int

from llama3_jax.files import check_output_folder
from llama3_jax.model import decoding, hf
from llama3_jax.model.config import ModelConfig
from llama3_jax.model.definition import Params, define
from llama3_jax.model.transformer import Transformer
from llama3_jax.parallel.mesh import Layout
from llama3_jax.schema import parse
from llama3_jax.training.checkpoint import save_model
from llama3_jax.training.loading import load
from llama3_jax.training.state import relayout

_PLAIN = ModelConfig.model_fields["model_module"].default


class Llama(Transformer):
    """Llama 3 (Llama 3 paper, section 3.2). `Llama(config, rngs=nnx.Rngs(0))` has fresh parameters."""

    @classmethod
    def from_pretrained(cls, path: str | Path, **overrides) -> Self:
        """The model of Hugging Face weights, a run (its newest checkpoint), a checkpoint or a model
        folder. `overrides` replace fields of its config that say how to compute (`dtype`, `attention`).

        Raises:
          UserError: no model there, it is damaged, or an override is no key of a model's config.
        """
        loaded = load(Path(path))
        config = parse(ModelConfig, loaded.config.model_dump() | overrides, where="from_pretrained")
        return cls.from_config(config, loaded.params)

    @classmethod
    def from_config(cls, config: ModelConfig, params: Params) -> Self:
        """The model of a config with these parameters."""
        if config.model_module == _PLAIN:
            config = config.model_copy(update={"model_module": f"{__name__}:Llama"})
        return define(config).bind(jax.tree.map(jax.numpy.asarray, params))

    def save_pretrained(
        self, path: str | Path, kind: str = "huggingface", overwrite: bool = False
    ) -> None:
        """As Hugging Face weights (bfloat16), or with kind="model" as a model folder (float32).

        Raises:
          UserError: `path` exists, or Hugging Face's Llama has no place for a part of the model.
        """
        folder = check_output_folder("path", Path(path), overwrite, []).absolute()
        if kind == "huggingface":
            hf.save(folder, self.plain_config, self.params)
        elif kind == "model":
            save_model(folder, self.plain_config, self.params)
        else:
            raise ValueError(f"kind={kind!r}: should be 'huggingface' or 'model'")

    @property
    def plain_config(self) -> ModelConfig:
        """The config as runs have it."""
        own = self.config.model_module == f"{__name__}:Llama"
        return self.config.model_copy(update={"model_module": _PLAIN}) if own else self.config

    @property
    def params(self) -> Params:
        """The parameters as a nested dict of arrays, which training and checkpoints work on."""
        return nnx.to_pure_dict(nnx.state(self, nnx.Param))

    def to_mesh(self, layout: Layout) -> Self:
        """A copy whose parameters are sharded over a mesh without pipeline stages.

        Raises:
          UserError: the mesh does not divide the model.
        """
        if layout.config.pipe > 1:
            raise ValueError(
                "a module has no pipeline stages: use compile_step of training/step.py"
            )
        return define(self).bind(relayout(self.params, self, None, layout))

    def generate(
        self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, **sampling
    ) -> list[list[int]]:
        """Continues every prompt of token ids; see `model.decoding.generate`."""
        return decoding.generate(
            self, self.params, prompts, max_new_tokens=max_new_tokens, **sampling
        )

    def attention_weights(
        self, tokens: Int[Array, "batch length"], *inputs: Int[Array, "batch length"]
    ) -> Array:
        """What each query takes of each key, [layers, batch, heads, length, length], float32."""
        _, captured = nnx.capture(self, nnx.Intermediate)(tokens, *inputs)
        return captured["blocks"]["attention"]["weights"].get_value()[0]
