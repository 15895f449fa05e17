"""The one sharding table: logical axis names of arrays to axes of the mesh."""

from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from llama3_jax.errors import UserError
from llama3_jax.parallel.context import balanced_columns
from llama3_jax.parallel.mesh import FSDP_AXES, Layout, MeshConfig

# Parameters are spread over the FSDP axes along `embed`, over tensor along the width of a layer,
# over pipe by layer. Norms are too small to be worth a gather.
TABLE: dict[str, str | tuple[str, ...] | None] = {
    "rows": "data",
    "length": "context",
    "vocab": "tensor",
    "embed": FSDP_AXES,
    "norm": None,
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "mlp": "tensor",
    "layers": "pipe",
}


def is_axes(leaf: Any) -> bool:
    """Whether it is a tuple of logical names; None stands for a dimension that is never split."""
    return isinstance(leaf, tuple) and all(name is None or isinstance(name, str) for name in leaf)


def mesh_axes(axis: str | None, layout: Layout | MeshConfig) -> tuple[str, ...]:
    """The mesh axes of more than one rank over which a logical axis is split.

    Raises:
      UserError: no such logical axis.
    """
    if axis is None:
        return ()
    if axis not in TABLE:
        raise UserError(
            f"logical axis {axis!r} of a parameter is unknown; known: {', '.join(TABLE)}"
        )
    mesh = getattr(layout, "config", layout)
    if axis == "kv_heads" and mesh.kv_heads == "replicated":
        return ()
    entry = TABLE[axis]
    names = (entry,) if isinstance(entry, str) else entry or ()
    return tuple(name for name in names if mesh.shape[name] > 1)


def spec(axes: tuple[str | None, ...], layout: Layout) -> PartitionSpec:
    """The partition of an array whose dimensions have these logical names."""
    split = [mesh_axes(axis, layout) for axis in axes]
    return PartitionSpec(*(names[0] if len(names) == 1 else names or None for names in split))


def specs(axes_tree: Any, layout: Layout) -> Any:
    """A tree of logical axes tuples to a tree of PartitionSpecs."""
    return jax.tree.map(lambda axes: spec(axes, layout), axes_tree, is_leaf=is_axes)


def shardings(axes_tree: Any, layout: Layout) -> Any:
    """A tree of logical axes tuples to a tree of NamedShardings."""
    return jax.tree.map(
        lambda axes: NamedSharding(layout.mesh, spec(axes, layout)), axes_tree, is_leaf=is_axes
    )


def check_divisible(axes_tree: Any, shapes_tree: Any, layout: Layout | MeshConfig) -> None:
    """Refuses a mesh that does not divide the parameters. Layers need not divide: see pipeline.

    Raises:
      UserError: names the parameter's axis, its size and the mesh axis.
    """
    all_axes = jax.tree.leaves(axes_tree, is_leaf=is_axes)
    for axes, array in zip(all_axes, jax.tree.leaves(shapes_tree), strict=True):
        for axis, size in zip(axes, array.shape, strict=True):
            names = () if axis == "layers" else mesh_axes(axis, layout)
            ranks = int(np.prod([layout.shape[name] for name in names]))
            if size % ranks:
                product = " x ".join(f"mesh.{name}={layout.shape[name]}" for name in names)
                hint = ""
                if axis == "kv_heads" and ranks % size == 0:
                    hint = "; mesh.kv_heads='replicated' lets tensor ranks share KV heads"
                raise UserError(f"{product} does not divide the model's {axis} ({size}){hint}")
    mesh = getattr(layout, "config", layout)
    if mesh.kv_heads == "replicated":
        _check_replicated(axes_tree, shapes_tree, mesh.tensor)


def _check_replicated(axes_tree: Any, shapes_tree: Any, tensor: int) -> None:
    all_axes = jax.tree.leaves(axes_tree, is_leaf=is_axes)
    for axes, array in zip(all_axes, jax.tree.leaves(shapes_tree), strict=True):
        size = array.shape[axes.index("kv_heads")] if "kv_heads" in axes else tensor
        if tensor % size:
            raise UserError(
                f"mesh.kv_heads='replicated' needs mesh.tensor ({tensor}) to be a multiple of the "
                f"model's kv_heads ({size}); mesh.kv_heads='sharded' is for more KV heads than ranks"
            )


def batch_spec(array: Any, layout: Layout) -> PartitionSpec:
    """Rows over data, columns over context."""
    return spec(("rows", "length")[: array.ndim], layout)


def replicated(layout: Layout) -> NamedSharding:
    return NamedSharding(layout.mesh, PartitionSpec())


def check_batch(rows: int, length: int, micro_batches: int, mesh: Layout | MeshConfig) -> None:
    """Refuses a batch that the mesh does not divide.

    Raises:
      UserError: names the size and the mesh axis.
    """
    data, context, tensor = (mesh.shape[axis] for axis in ("data", "context", "tensor"))
    if rows % (data * micro_batches):
        raise UserError(
            f"a batch of {rows} rows is not divisible by mesh.data={data} x {micro_batches} "
            "micro-batches"
        )
    pieces = (2 * context if context > 1 else 1) * tensor
    if length % pieces:
        raise UserError(
            f"length {length} is not divisible by {pieces}: mesh.context={context} cuts a row in "
            f"2 x context chunks, mesh.tensor={tensor} each rank's part once more"
        )


def put_batch(batch: dict[str, np.ndarray], layout: Layout) -> dict[str, jax.Array]:
    """This process's rows to its devices, as parts of the global batch.

    `batch` holds the whole rows of the data ranks that this process has devices of, in order (see
    parallel/processes.py). Columns go to the context ranks in balanced order.
    """
    data = layout.shape["data"]
    own = sorted({index[0] for index in _own_places(layout)})
    put = {}
    for name, array in batch.items():
        per_rank = len(array) // len(own)
        global_shape = (per_rank * data, *array.shape[1:])
        if array.ndim > 1:
            array = array[:, balanced_columns(array.shape[1], layout.shape["context"])]
        first = own[0] * per_rank

        def part(index, array=array, first=first):
            start, stop, _ = index[0].indices(global_shape[0])  # noqa: B023
            return array[(slice(start - first, stop - first), *index[1:])]

        sharding = NamedSharding(layout.mesh, batch_spec(array, layout))
        put[name] = jax.make_array_from_callback(global_shape, sharding, part)
    return put


def _own_places(layout: Layout) -> list[tuple[int, ...]]:
    """Mesh coordinates of this process's devices."""
    process = jax.process_index()
    return [i for i, d in np.ndenumerate(layout.mesh.devices) if d.process_index == process]
