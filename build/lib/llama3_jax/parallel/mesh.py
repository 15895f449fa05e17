"""The one device mesh: axes data, pipe, context, tensor, outer to inner."""

from typing import Literal

import jax
import numpy as np
import pydantic

from llama3_jax.errors import UserError
from llama3_jax.schema import Config

AXES = ("data", "pipe", "context", "tensor")


class MeshConfig(Config):
    """Devices along each axis; data shards batch, parameters and optimizer (FSDP)."""

    data: pydantic.PositiveInt = 1
    pipe: Literal[1] = 1
    context: Literal[1] = 1
    tensor: pydantic.PositiveInt = 1


def make_mesh(config: MeshConfig) -> jax.sharding.Mesh:
    """The mesh over all devices of the run.

    Raises:
      UserError: the axes do not multiply to the number of devices.
    """
    shape = tuple(getattr(config, axis) for axis in AXES)
    size, devices = int(np.prod(shape)), jax.device_count()
    if size != devices:
        layout = " x ".join(f"{axis} {n}" for axis, n in zip(AXES, shape, strict=True))
        raise UserError(f"mesh {layout} needs {size} devices, {devices} are present")
    types = (jax.sharding.AxisType.Auto,) * len(AXES)
    return jax.make_mesh(shape, AXES, axis_types=types)
