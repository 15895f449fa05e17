"""The one sharding table: logical axis names of arrays to axes of the mesh."""

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llama3_jax.errors import UserError

# Parameters are spread over data along `embed` (FSDP) and over tensor along the width of a layer.
TABLE: dict[str, str | None] = {
    "batch": "data",
    "vocab": "tensor",
    "embed": "data",
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "mlp": "tensor",
    "layers": None,
}


def spec(axes: tuple[str, ...]) -> PartitionSpec:
    """The partition of an array whose dimensions have these logical names."""
    return PartitionSpec(*(TABLE[axis] for axis in axes))


def shardings(axes_tree: Any, mesh: Mesh) -> Any:
    """A tree of logical axes tuples to a tree of NamedShardings."""
    is_axes = lambda leaf: isinstance(leaf, tuple)  # noqa: E731
    return jax.tree.map(lambda axes: NamedSharding(mesh, spec(axes)), axes_tree, is_leaf=is_axes)


def check_divisible(axes_tree: Any, shapes_tree: Any, mesh: Mesh) -> None:
    """Refuses a mesh that does not divide the parameters.

    Raises:
      UserError: names the parameter's axis, its size and the mesh axis.
    """
    is_axes = lambda leaf: isinstance(leaf, tuple)  # noqa: E731
    all_axes = jax.tree.leaves(axes_tree, is_leaf=is_axes)
    for axes, array in zip(all_axes, jax.tree.leaves(shapes_tree), strict=True):
        for axis, size in zip(axes, array.shape, strict=True):
            mesh_axis = TABLE[axis]
            ranks = mesh.shape[mesh_axis] if mesh_axis else 1
            if size % ranks:
                raise UserError(
                    f"mesh.{mesh_axis}={ranks} does not divide the model's {axis} ({size})"
                )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over the data axis."""
    return NamedSharding(mesh, PartitionSpec(TABLE["batch"]))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def put_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This host's rows to its devices, as parts of the global batch."""
    sharding = batch_sharding(mesh)
    return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items()}
