"""What a checkpoint of a stage is, and what restoring and saving it move; from shardings alone."""

from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType

from llama3_jax.parallel.mesh import AXES, Layout
from llama3_jax.planning.case import Case
from llama3_jax.training.state import abstract_state


class CheckpointBytes(NamedTuple):
    """`size` of the checkpoint, and what all GPUs together `read` of it at a restore.

    A GPU `holds` so much of it beside its state while it is converted: with a pipeline, at a restore
    and at a save; and it `exchanges` so much with the other pipeline ranks.
    """

    size: int
    read: int
    held: int
    exchanged: int


def checkpoint_bytes(case: Case) -> CheckpointBytes:
    shape = tuple(case.mesh.shape.values())
    mesh = AbstractMesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES))
    layout = Layout(case.mesh, mesh)
    saved = abstract_state(case.model, case.optimizer, layout, saved=True)
    held = _local_bytes(saved)
    pipe = case.mesh.pipe
    exchanged = 0
    if pipe > 1:
        blocks = [x for x in _leaves(abstract_state(case.model, case.optimizer, layout), "blocks")]
        exchanged = _local_bytes(blocks) * (pipe - 1) // pipe
    return CheckpointBytes(
        size=sum(_bytes(x.shape, x.dtype) for x in jax.tree.leaves(saved)),
        read=held * case.mesh.devices,
        held=held if pipe > 1 else 0,
        exchanged=exchanged,
    )


def _leaves(tree: Any, key: str) -> list[Any]:
    flat = jax.tree_util.tree_leaves_with_path(tree)
    return [x for path, x in flat if any(getattr(entry, "key", None) == key for entry in path)]


def _local_bytes(tree: Any) -> int:
    return sum(_bytes(x.sharding.shard_shape(x.shape), x.dtype) for x in jax.tree.leaves(tree))


def _bytes(shape: tuple[int, ...], dtype: np.dtype) -> int:
    return int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
