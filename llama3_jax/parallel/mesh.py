"""The one device mesh: axes data, pipe, context, tensor, outer to inner.

The order is that of the Llama 3 paper (section 3.3.2): the axis that communicates most is innermost, on
the links inside a host.
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import jax
import numpy as np
import pydantic
from jax.sharding import Mesh

from llama3_jax.errors import UserError
from llama3_jax.schema import Config

AXES = ("data", "pipe", "context", "tensor")
# Parameters, gradients and optimizer state of a stage are spread over these (FSDP): all ranks that
# hold the same weights and see other tokens.
FSDP_AXES = ("data", "context")


class MeshConfig(Config):
    """Devices along each axis, and how the axes are used.

    reshard_after_forward: of FSDP. True gathers a layer's weights when it is computed, forward and
      backward, and reduces its gradient at once (ZeRO-3); False gathers all weights once a step,
      adds up gradients in float32 and reduces them once a step (as the Llama 3 paper, section
      3.3.2). Optimizer state is sharded in both.
    schedule: of the pipeline, see parallel/schedule.py. `virtual_stages` and `contiguous`
      (micro-batches in a row on one virtual stage, the paper's N; by default as many as there are
      stages) belong to `interleaved`, which with one virtual stage is 1F1B that holds nearly twice
      the micro-batches of `1f1b` and never waits for a neighbour.
    kv_heads: `replicated` lets several tensor ranks share a KV head, each with a copy.
    tensor_pieces: pieces of a rank's tokens in which the products of a layer run on several tensor
      ranks: the exchanges of one piece run under the products of another. As many of them as divide
      the tokens.
    """

    data: pydantic.PositiveInt = 1
    pipe: pydantic.PositiveInt = 1
    context: pydantic.PositiveInt = 1
    tensor: pydantic.PositiveInt = 1
    reshard_after_forward: bool = True
    schedule: Literal["gpipe", "1f1b", "interleaved"] = "interleaved"
    virtual_stages: pydantic.PositiveInt = 1
    contiguous: pydantic.PositiveInt | None = None
    kv_heads: Literal["sharded", "replicated"] = "sharded"
    tensor_pieces: pydantic.PositiveInt = 1

    @pydantic.model_validator(mode="after")
    def _check(self) -> "MeshConfig":
        if self.schedule != "interleaved":
            if self.virtual_stages > 1:
                raise ValueError(
                    f"virtual_stages={self.virtual_stages} needs schedule='interleaved', "
                    f"not {self.schedule!r}"
                )
            if self.contiguous is not None:
                raise ValueError(
                    f"contiguous={self.contiguous} needs schedule='interleaved', "
                    f"not {self.schedule!r}"
                )
        if self.virtual_stages > 1 and self.pipe == 1:
            raise ValueError(
                f"virtual_stages={self.virtual_stages} needs pipe of 2 or more, not {self.pipe}"
            )
        if self.contiguous is not None and self.virtual_stages == 1:
            raise ValueError(
                f"contiguous={self.contiguous} needs virtual_stages of 2 or more: with one, a rank "
                "takes its micro-batches in a row anyway"
            )
        return self

    @property
    def shape(self) -> dict[str, int]:
        return {axis: getattr(self, axis) for axis in AXES}

    def contiguous_or(self, micro_batches: int) -> int:
        """Micro-batches in a row on a virtual stage: as given, or as many as there are stages."""
        return min(self.contiguous or self.pipe, micro_batches)

    @property
    def devices(self) -> int:
        return self.data * self.pipe * self.context * self.tensor


@dataclasses.dataclass(frozen=True)
class Layout:
    """A mesh of devices and how its axes are used; hashable."""

    config: MeshConfig
    mesh: Mesh

    @property
    def shape(self) -> dict[str, int]:
        return self.config.shape

    @property
    def platform(self) -> str:
        """Of its devices: `gpu` or `cuda`, `cpu`."""
        return self.mesh.devices.flat[0].platform


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Layout:
    """The mesh over `devices`, by default all devices of the run.

    Raises:
      UserError: the axes do not multiply to the number of devices.
    """
    shape = tuple(config.shape.values())
    present = jax.device_count() if devices is None else len(devices)
    if config.devices != present:
        layout = " x ".join(f"{axis} {n}" for axis, n in config.shape.items())
        raise UserError(f"mesh {layout} needs {config.devices} devices, {present} are present")
    types = (jax.sharding.AxisType.Auto,) * len(AXES)
    if devices is not None:
        return Layout(config, Mesh(np.array(devices).reshape(shape), AXES, axis_types=types))
    return Layout(config, jax.make_mesh(shape, AXES, axis_types=types))
