"""Checkpoints through orbax: asynchronous, atomic, verified, restored from the newest valid one.

One checkpoint holds two trees, `params` and `optimizer` (and `average`, see training/averaging.py,
where the run averages), and JSON metadata: the model's config, the tokenizer's fingerprint, the
position in the timeline, the run's config, a checksum of every array and a hash of the metadata. A
model directory (converted weights) is the same without `optimizer`. All use of orbax is in this
file.

Arrays are saved in their canonical shapes, so any mesh of any number of processes restores them.
All processes of a run save and restore together, each its own shards, in a directory that all see.
"""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from orbax.checkpoint import v1 as ocp

from llama3_jax.errors import UserError
from llama3_jax.model.config import ModelConfig
from llama3_jax.model.definition import Params, define
from llama3_jax.parallel import processes
from llama3_jax.training.damage import DamagedCheckpoint, brief, deepest, proof_of_damage

CHECKPOINTS = "checkpoints"
# Beside them: those that were proved damaged, and those that a rewind left behind.
DAMAGED, REWOUND = "damaged_checkpoints", "rewound_checkpoints"


class LoadedModel(NamedTuple):
    """Weights with what is needed to use them; `tokenizer` is a fingerprint, if known.

    `length` is that of the longest rows that they were trained on, in tokens, if known.
    """

    config: ModelConfig
    params: Params
    tokenizer: str | None
    length: int | None = None


class Restored(NamedTuple):
    step: int
    params: Params
    optimizer: Any
    metadata: dict[str, Any]
    average: Params | None = None


@jax.jit
def _sums(tree: Any) -> Any:
    def checksum(x: jax.Array) -> jax.Array:
        unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
        bits = jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)
        index = jnp.zeros((), jnp.uint32)
        for axis, size in enumerate(x.shape):
            index = index * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
        # Odd weights are invertible modulo 2^32: one flipped bit always changes the sum.
        return jnp.sum(bits * (2 * index + 1), dtype=jnp.uint32)

    return jax.tree.map(checksum, tree)


def checksums(tree: Any) -> dict[str, int]:
    """A 32-bit sum of each array's bits, weighted by place; the same on every mesh."""
    leaves = jax.tree_util.tree_leaves_with_path(_sums(tree))
    return {jax.tree_util.keystr(path): int(value) for path, value in leaves}


class Checkpoints:
    """The checkpoints of one run, in `directory/<step>`."""

    def __init__(self, directory: Path, keep_last: int, keep_every: int | None):
        """Keeps the newest `keep_last`, and for good those at multiples of `keep_every` steps."""
        self.directory = directory.absolute()
        self.directory.mkdir(parents=True, exist_ok=True)
        policies = ocp.training.preservation_policies
        keep = [policies.LatestN(keep_last)]
        if keep_every:
            keep.append(policies.EveryNSteps(keep_every))
        self._keep = policies.AnyPreservationPolicy(keep)
        self._manager: ocp.training.Checkpointer | None = None
        self._pending: Any = None
        self._present = set(self.steps())

    def _open(self) -> ocp.training.Checkpointer:
        if self._manager is None:
            self._manager = ocp.training.Checkpointer(
                self.directory, preservation_policy=self._keep, cleanup_tmp_directories=True
            )
        return self._manager

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending; the same on all processes."""
        return processes.of_first(_steps(self.directory))

    def save(
        self,
        step: int,
        params: Params,
        optimizer: Any,
        metadata: dict[str, Any],
        average: Params | None = None,
    ) -> None:
        """Starts a save and returns; waits for the one before it, and raises its error if any.

        A step that has been saved already is not saved again.
        """
        self.wait()
        # Not looked up on the disk: one process may see there what another does not see yet.
        if step in self._present:
            return
        self._present.add(step)
        trees = {"params": params, "optimizer": optimizer}
        if average is not None:
            trees["average"] = average
        metadata = _sealed(metadata | {"trees": sorted(trees), "checksums": checksums(trees)})
        self._pending = self._open().save_checkpointables_async(
            step, trees, force=True, custom_metadata=metadata
        )

    def wait(self) -> None:
        """Blocks until the last save is complete on disk."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        self.wait()
        if self._manager is not None:
            self._manager.close()
            self._manager = None  # it remembers what is there

    def metadata(self, step: int) -> dict[str, Any]:
        """The metadata of a checkpoint.

        Raises:
          DamagedCheckpoint: they are proved damaged.
          UserError: they cannot be read for another reason.
        """
        return _metadata(self.directory / str(step))

    def restore(self, step: int, abstract_params: Params, abstract_optimizer: Any) -> Restored:
        """Reads one checkpoint onto the shardings of the abstract trees and verifies it.

        Raises:
          DamagedCheckpoint: files are proved damaged, or an array differs from what was saved.
          UserError: it cannot be read for another reason, or holds other arrays than asked for.
        """
        path = self.directory / str(step)
        abstract = {"params": abstract_params, "optimizer": abstract_optimizer}
        metadata = _metadata(path)
        if "average" in metadata.get("trees", ()):
            abstract["average"] = abstract_params
        trees = _load(path, abstract, metadata)
        return Restored(
            step, trees["params"], trees["optimizer"], metadata, trees.get("average")
        )  # fmt: skip

    def set_aside(self, step: int) -> Path:
        """Moves a damaged checkpoint out of the way, so that its step can be saved again."""
        return self._move([step], DAMAGED)

    def go_back(self, step: int) -> tuple[int, Path | None]:
        """Moves all checkpoints after `step` aside: they are those of a past to be forgotten.

        All processes call it together.

        Returns:
          The newest checkpoint that is left (0 where there never was one), and where the others
          are now.

        Raises:
          UserError: none would be left; then nothing is moved.
        """
        self.close()
        present = self.steps()
        left = [s for s in present if s <= step]
        if present and not left:
            raise UserError(
                f"{self.directory}: no checkpoint of step {step} or before, the oldest is of step "
                f"{present[0]}"
            )
        # The newest first: after a crash in between, those that are left are still a run's past.
        later = [s for s in reversed(present) if s > step]
        place = self._move(later, REWOUND) if later else None
        return max(left, default=0), place and place.parent

    def _move(self, steps: list[int], folder: str) -> Path:
        """Moves checkpoints to a folder beside theirs; returns the last one's place."""
        target = self.directory.with_name(folder)
        names = [f"{step}-{len(list(target.glob(f'{step}-*')))}" for step in steps]
        # Nobody reads them any more, and nobody looks for their successors before they are moved.
        processes.all_agree(True)
        for step, name in zip(steps, names, strict=True):
            if processes.is_first():
                target.mkdir(exist_ok=True)
                shutil.move(self.directory / str(step), target / name)
            self._present.discard(step)
        processes.all_agree(True)
        return target / names[-1]


def _sealed(metadata: dict[str, Any]) -> dict[str, Any]:
    """The metadata with a hash of themselves, as they look after a way through JSON."""
    metadata = json.loads(json.dumps({k: v for k, v in metadata.items() if k != "hash"}))
    text = json.dumps(metadata, sort_keys=True)
    return metadata | {"hash": hashlib.blake2b(text.encode(), digest_size=16).hexdigest()}


def _steps(directory: Path) -> list[int]:
    """Steps of the complete checkpoints in a folder, ascending; a save under way has no number."""
    return sorted(int(path.name) for path in directory.iterdir() if path.name.isdigit())


def _metadata(path: Path) -> dict[str, Any]:
    metadata, error = {}, None
    try:
        # Where it cannot be read, orbax says no more than that it is empty.
        (path / "_CHECKPOINT_METADATA").read_bytes()
        metadata = ocp.checkpointables_metadata(path).custom_metadata
        if not metadata or metadata != _sealed(metadata):
            raise DamagedCheckpoint("metadata differ from what was saved")
    except Exception as raised:
        error = raised
    _agree(path, error)
    return metadata


def _load(path: Path, abstract: dict[str, Any], metadata: dict[str, Any]) -> dict[str, Any]:
    _check_arrays(path, abstract, metadata)
    # Each process loads as if it were alone: what is damaged may be the shard of one only, and
    # orbax would let the others wait for it.
    alone = ocp.Context()
    alone.multiprocessing.primary_host = jax.process_index()
    alone.multiprocessing.active_processes = {jax.process_index()}
    trees, error = {}, None
    try:
        for name in abstract:
            (path / name).stat()  # orbax has other words where all of one is gone
        with alone:
            trees = ocp.load_checkpointables(path, abstract)
    except Exception as raised:  # orbax's, tensorstore's and JAX's errors have no common base
        error = raised
    _agree(path, error)
    for key, value in checksums(trees).items():
        if metadata["checksums"][key] != value:
            raise DamagedCheckpoint(f"array {key} differs from what was saved")
    return trees


def _check_arrays(path: Path, abstract: dict[str, Any], metadata: dict[str, Any]) -> None:
    """Refuses to read other arrays than there are: those of another optimizer, say."""
    asked = {jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path(abstract)}
    wanted = tuple(f"['{name}']" for name in abstract)
    there = {key for key in metadata["checksums"] if key.startswith(wanted)}
    for found, keys in (("does not hold", asked - there), ("also holds", there - asked)):
        if keys:
            raise UserError(
                f"{path}: {found} {min(keys)}: it was saved with another model or optimizer; "
                "nothing was changed"
            )


_READ, _DAMAGED, _NOT_READ = range(3)


def _agree(path: Path, error: Exception | None) -> None:
    """Raises on all processes what is to be made of the errors that some of them met.

    Raises:
      DamagedCheckpoint: where one proves damage, and no process met anything else.
      UserError: any other error: nothing is known of the files, which stay where they are.
    """
    proof = str(error) if isinstance(error, DamagedCheckpoint) else error and proof_of_damage(error)
    mine = _READ if error is None else _DAMAGED if proof else _NOT_READ
    worst = processes.largest(mine)
    if worst == _DAMAGED:
        raise DamagedCheckpoint(proof or "another process found its part damaged") from error
    if worst == _NOT_READ:
        why = brief(deepest(error)) if mine == _NOT_READ else "another process could not read it"
        raise UserError(
            f"{path}: cannot be read: {why}; this does not say that it is damaged, nothing was "
            "changed"
        ) from error


def restore_newest(
    checkpoints: Checkpoints,
    abstract: Callable[[int], tuple[Params, Any]],
    check: Callable[[dict[str, Any]], None],
) -> Restored | None:
    """The newest valid checkpoint, or None if there is none at all.

    `abstract(step)` gives shapes and shardings of parameters and optimizer state after `step`
    steps. Checkpoints that are proved damaged are named in the log and passed over, and moved to
    `damaged_checkpoints` once an older one has been found whole.
    `check(metadata)` may raise UserError for a checkpoint that is whole but of another run.

    Raises:
      UserError: there are checkpoints, and every one is damaged; or one cannot be read, which says
        nothing about its files. Nothing is moved then.
    """
    steps = checkpoints.steps()
    damaged: list[int] = []
    for step in reversed(steps):
        try:
            check(checkpoints.metadata(step))
            restored = checkpoints.restore(step, *abstract(step))
        except DamagedCheckpoint as error:
            damaged.append(step)
            logging.warning("checkpoint of step %d is damaged (%s): passed over", step, error)
            continue
        for other in damaged:
            place = checkpoints.set_aside(other)
            logging.warning("checkpoint of step %d was moved to %s", other, place)
        return restored
    if steps:
        raise UserError(
            f"{checkpoints.directory}: all {len(steps)} checkpoints are damaged, and stay where "
            "they are; put whole copies in their place, or choose another --workdir"
        )
    return None


def save_model(
    directory: Path,
    config: ModelConfig,
    params: Params,
    tokenizer: str | None = None,
    length: int | None = None,
) -> None:
    """Writes weights alone as a model directory.

    Raises:
      UserError: `directory` exists and is not empty.
    """
    directory = Path(directory).absolute()
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UserError(f"{directory}: exists and is not empty; choose another place")
    if directory.exists():
        directory.rmdir()
    directory.parent.mkdir(parents=True, exist_ok=True)
    trees = {"params": params}
    metadata = _sealed(model_metadata(config, tokenizer, length) | {"checksums": checksums(trees)})
    ocp.save_checkpointables(directory, trees, custom_metadata=metadata)


def load_model(path: Path, abstract: Callable[[ModelConfig], Params] | None = None) -> LoadedModel:
    """Weights from a model directory, a checkpoint, or a run's workdir (its newest checkpoint).

    They are put where `abstract(config)` says (see `state.abstract_params`), by default on the
    first device.

    Raises:
      UserError: nothing there, it is damaged, or it cannot be read.
    """
    path = Path(path).absolute()
    if (path / CHECKPOINTS).is_dir():
        path = path / CHECKPOINTS
        steps = _steps(path)
        if not steps:
            raise UserError(f"{path}: no checkpoint yet")
        path = path / str(steps[-1])
    if not (path / "params").is_dir():
        raise UserError(f"{path}: no model here (neither a run, a checkpoint nor a model folder)")
    try:
        metadata = _metadata(path)
        config = ModelConfig.model_validate(metadata["model"])
        trees = {"params": (abstract or _on_first_device)(config)}
        params = _load(path, trees, metadata)["params"]
    except DamagedCheckpoint as error:
        raise UserError(f"{path}: damaged checkpoint: {error}") from None
    return LoadedModel(config, params, metadata.get("tokenizer"), metadata.get("length"))


def _on_first_device(config: ModelConfig) -> Params:
    first = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=first),
        define(config).abstract_params(),
    )


def model_metadata(
    config: ModelConfig, tokenizer: str | None, length: int | None = None
) -> dict[str, Any]:
    """What a checkpoint or model folder says of its weights; `length` as in `LoadedModel`."""
    values = json.loads(config.model_dump_json())
    return {"model": values, "tokenizer": tokenizer, "length": length}


def state_bytes(*trees: Any) -> int:
    """Bytes of all arrays of the trees."""
    return sum(int(np.prod(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(trees))
