import errno
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from llama3_jax.errors import UserError
from llama3_jax.model.config import ModelConfig
from llama3_jax.parallel.mesh import MeshConfig, make_mesh
from llama3_jax.parallel.saved import compile_from_stages, compile_to_stages
from llama3_jax.parallel.stages import make_stages
from llama3_jax.planning.case import Case
from llama3_jax.planning.checkpointing import checkpoint_bytes
from llama3_jax.training import checkpoint
from llama3_jax.training.checkpoint import Checkpoints, load_model, restore_newest, save_model
from llama3_jax.training.optimizer import OptimizerConfig
from llama3_jax.training.state import TrainState, abstract_state, init_state, relayout

MODEL = ModelConfig(
    vocab_size=64, dim=32, layers=6, heads=4, kv_heads=2, head_dim=8, ffn_dim=64, dtype="float32"
)
OPTIMIZER = OptimizerConfig()
MESH = MeshConfig(data=8)


def state_of(seed: int):
    return init_state(MODEL, OPTIMIZER, make_mesh(MESH), seed)


@pytest.fixture
def saved(tmp_path) -> Path:
    """A run with checkpoints of steps 1, 2 and 3, whose states come from those seeds."""
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep_last=3, keep_every=None)
    for step in (1, 2, 3):
        state = state_of(step)
        metadata = checkpoint.model_metadata(MODEL, "fingerprint") | {"step": step}
        checkpoints.save(step, state.params, state.optimizer, metadata)
    checkpoints.close()
    return tmp_path


def restore(workdir: Path, mesh: MeshConfig = MESH):
    abstract = abstract_state(MODEL, OPTIMIZER, make_mesh(mesh), saved=True)
    checkpoints = Checkpoints(workdir / "checkpoints", keep_last=3, keep_every=None)
    restored = restore_newest(checkpoints, lambda _: abstract, lambda _: None)
    checkpoints.close()
    return restored


def assert_state(restored, seed: int):
    expected = jax.device_get(state_of(seed))
    jax.tree.map(
        np.testing.assert_array_equal,
        jax.device_get((restored.params, restored.optimizer)),
        tuple(expected),
    )


MESHES = {
    "data": MESH,
    "data-tensor": MeshConfig(data=4, tensor=2),
    "context-tensor": MeshConfig(data=2, context=2, tensor=2),
    "uneven-pipe": MeshConfig(pipe=4, tensor=2),
    "interleaved": MeshConfig(
        data=2,
        pipe=2,
        context=2,
        schedule="interleaved",
        virtual_stages=2,
        reshard_after_forward=False,
    ),
}


@pytest.mark.parametrize("mesh", MESHES.values(), ids=MESHES.keys())
def test_the_whole_state_comes_back_bit_for_bit_on_any_mesh(saved, mesh):
    restored = restore(saved, mesh)
    assert restored.step == 3 and restored.metadata["step"] == 3
    assert_state(restored, 3)
    leaves = jax.tree.leaves(restored.params)
    assert all(x.sharding.mesh.shape["data"] == mesh.data for x in leaves)


@pytest.mark.parametrize("name", ["uneven-pipe", "interleaved"])
def test_a_state_laid_out_for_a_mesh_is_saved_as_if_there_were_none(tmp_path, name):
    """Layers spread over pipeline stages, some of them empty, come back in the network's order."""
    layout = make_mesh(MESHES[name])
    state = relayout(init_state(MODEL, OPTIMIZER, layout, seed=1), MODEL, layout, None)
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep_last=1, keep_every=None)
    checkpoints.save(1, state.params, state.optimizer, {"step": 1})
    checkpoints.close()
    restored = restore(tmp_path)
    assert_state(restored, 1)
    canonical = TrainState(restored.params, restored.optimizer)
    placed = relayout(canonical, MODEL, None, layout, OPTIMIZER)
    again = relayout(placed, MODEL, layout, None)
    assert checkpoint.checksums(again) == checkpoint.checksums(canonical)


@pytest.mark.parametrize("name", ["uneven-pipe", "interleaved"])
def test_no_pipeline_rank_holds_or_reads_the_whole_of_a_checkpoint(name):
    layout = make_mesh(MESHES[name])
    state = relayout(init_state(MODEL, OPTIMIZER, layout, seed=1), MODEL, layout, None)
    abstract = abstract_state(MODEL, OPTIMIZER, layout, saved=True)
    for x, a in zip(jax.tree.leaves(state), jax.tree.leaves(abstract), strict=True):
        assert x.sharding.is_equivalent_to(a.sharding, x.ndim)
        assert x.ndim == 0 or "pipe" in str(x.sharding.spec)
    total = sum(x.nbytes for x in jax.tree.leaves(state) if x.ndim > 2)
    held = sum(s.data.nbytes for x in jax.tree.leaves(state) if x.ndim > 2
               for s in x.addressable_shards)  # fmt: skip
    assert held == total  # no matrix is there twice
    case = Case("one", MODEL, OPTIMIZER, MESHES[name], 8, 32, 1, 1)
    read = sum(s.data.nbytes for x in jax.tree.leaves(state) for s in x.addressable_shards)
    planned = checkpoint_bytes(case)
    assert (planned.size, planned.read) == (checkpoint.state_bytes(state), read)
    assert planned.held == read // 8


def test_layers_go_to_their_place_in_a_checkpoint_by_one_exchange():
    """No rank gathers an array on the way, however layers lie over the stages."""
    layout = make_mesh(MESHES["uneven-pipe"])
    stages = make_stages(MODEL.layers, layout.config)
    there, back = (
        abstract_state(MODEL, OPTIMIZER, layout, saved).params["blocks"]["ffn"]["up"]
        for saved in (False, True)
    )
    for compiled, x in (
        (compile_from_stages(stages, back.shape, there.sharding), there),
        (compile_to_stages(stages, back.shape, there.sharding), back),
    ):
        text = compiled.lower(x).compile().as_text()
        assert "all-to-all" in text and "all-gather" not in text and "all-reduce" not in text


def largest(folder: Path) -> Path:
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def truncate(folder: Path):
    path = largest(folder)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_bit(folder: Path):
    path = largest(folder)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def lose_metadata(folder: Path):
    (folder / "_CHECKPOINT_METADATA").unlink()


def lose_optimizer(folder: Path):
    shutil.rmtree(folder / "optimizer")


@pytest.mark.parametrize("damage", [truncate, flip_bit, lose_metadata, lose_optimizer])
def test_a_damaged_checkpoint_is_named_and_passed_over(saved, damage, caplog):
    damage(saved / "checkpoints/3")
    damage(saved / "checkpoints/2")
    restored = restore(saved)
    assert restored.step == 1
    assert_state(restored, 1)
    for step in (2, 3):
        assert f"checkpoint of step {step} is damaged" in caplog.text
        assert (saved / f"damaged_checkpoints/{step}-0").is_dir()


def test_a_value_changed_behind_valid_compression_is_found(saved):
    """Damage that decompresses well: only the checksums can tell."""
    state = state_of(9)
    checkpoints = Checkpoints(saved / "checkpoints", keep_last=9, keep_every=None)
    metadata = checkpoints.metadata(3)
    checkpoints.save(4, state.params, state.optimizer, {"step": 4})
    checkpoints.close()
    other = (saved / "checkpoints/3/_CHECKPOINT_METADATA").read_text()
    (saved / "checkpoints/4/_CHECKPOINT_METADATA").write_text(other)
    assert metadata["checksums"]
    assert restore(saved).step == 3


def test_one_flipped_bit_always_changes_the_checksum():
    random = np.random.default_rng()
    x = random.normal(size=(7, 5)).astype(np.float32)
    before = checkpoint.checksums({"x": x})
    for _ in range(50):
        y = x.copy().view(np.uint32)
        y.flat[random.integers(y.size)] ^= np.uint32(1 << int(random.integers(32)))
        assert checkpoint.checksums({"x": y.view(np.float32)}) != before
    swapped = x.copy()
    swapped[[0, 1]] = swapped[[1, 0]]
    assert checkpoint.checksums({"x": swapped}) != before


def test_when_all_are_damaged_the_run_stops(saved):
    for step in (1, 2, 3):
        truncate(saved / f"checkpoints/{step}")
    assert_stops_and_touches_nothing(
        saved, "all 3 checkpoints are damaged, and stay where they are"
    )


def test_no_checkpoint_is_a_fresh_start(tmp_path):
    assert restore(tmp_path) is None


def test_keeps_the_newest_and_every_nth(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep_last=2, keep_every=4)
    state = state_of(0)
    for step in range(1, 11):
        checkpoints.save(step, state.params, state.optimizer, {})
    checkpoints.close()
    assert checkpoints.steps() == [4, 8, 9, 10]


def test_an_unfinished_save_is_no_checkpoint(saved):
    unfinished = saved / "checkpoints/4.orbax-checkpoint-tmp"
    shutil.copytree(saved / "checkpoints/3", unfinished)
    assert restore(saved).step == 3


def test_models_round_trip_and_load_from_runs(saved, tmp_path):
    loaded = load_model(saved)
    assert (loaded.config, loaded.tokenizer) == (MODEL, "fingerprint")
    save_model(tmp_path / "model", loaded.config, loaded.params)
    again = load_model(tmp_path / "model")
    jax.tree.map(np.testing.assert_array_equal, again.params, loaded.params)
    jax.tree.map(np.testing.assert_array_equal, loaded.params, jax.device_get(state_of(3).params))
    assert load_model(saved / "checkpoints/1").config == MODEL


def test_models_that_cannot_be_loaded_or_written(saved, tmp_path):
    with pytest.raises(UserError, match="no model here"):
        load_model(tmp_path / "nothing")
    with pytest.raises(UserError, match="exists and is not empty"):
        save_model(saved, MODEL, state_of(0).params)
    flip_bit(saved / "checkpoints/3/params")
    with pytest.raises(UserError, match="checkpoints/3: damaged checkpoint"):
        load_model(saved)


def test_a_flipped_bit_anywhere_is_found_or_does_no_harm(tmp_path):
    """In a file of the checkpoint drawn at random, for files hold much or little of it."""
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep_last=1, keep_every=None)
    state = state_of(1)
    health = {"step": 1, "health": [[step, 0, 2.5, 1.0] for step in range(50)]}
    checkpoints.save(1, state.params, state.optimizer, health)
    checkpoints.close()
    abstract = abstract_state(MODEL, OPTIMIZER, make_mesh(MESH), saved=True)
    files = sorted(p for p in (tmp_path / "checkpoints/1").rglob("*") if p.is_file())
    random, found = np.random.default_rng(), 0
    for _ in range(24):
        path = files[random.integers(len(files))]
        content = path.read_bytes()
        at, bit = int(random.integers(len(content))), int(random.integers(8))
        path.write_bytes(content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1 :])
        try:
            restored = checkpoints.restore(1, *abstract)
        except checkpoint.DamagedCheckpoint:
            found += 1
        else:
            assert_state(restored, 1)
            assert restored.metadata.items() >= health.items(), f"{path} byte {at} bit {bit}"
        path.write_bytes(content)
    assert found


def out_of_memory(*_, **__):
    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes.")


def storage_error(*_, **__):
    raise OSError(errno.EIO, "Input/output error")


def tensorstore_error(*_, **__):
    raise ValueError(
        'UNKNOWN: Error reading local file "d/1": [OS error 5: EIO Input/output error]'
    )


def files(workdir: Path) -> set[Path]:
    return {path for path in workdir.rglob("*") if path.is_file()}


def assert_stops_and_touches_nothing(workdir: Path, message: str, restore=restore):
    before = files(workdir)
    with pytest.raises(UserError, match=message) as caught:
        restore(workdir)
    assert "\n" not in str(caught.value)
    assert files(workdir) == before


@pytest.mark.parametrize(
    ("fail", "message"),
    [
        (out_of_memory, "checkpoints/3: cannot be read: .*Out of memory"),
        (storage_error, "checkpoints/3: cannot be read: .*Input/output error"),
        (tensorstore_error, "checkpoints/3: cannot be read: .*EIO"),
    ],
)
@pytest.mark.parametrize("where", ["load_checkpointables", "checkpointables_metadata"])
def test_what_does_not_prove_damage_stops_and_touches_nothing(
    saved, monkeypatch, fail, message, where
):
    monkeypatch.setattr(checkpoint.ocp, where, fail)
    assert_stops_and_touches_nothing(saved, message)
    if where == "load_checkpointables":
        assert_stops_and_touches_nothing(saved, message, load_model)


def test_metadata_that_the_storage_does_not_give_are_not_damaged(saved, monkeypatch):
    read = Path.read_bytes

    def read_bytes(path: Path) -> bytes:
        return storage_error() if path.name == "_CHECKPOINT_METADATA" else read(path)

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    assert_stops_and_touches_nothing(saved, "checkpoints/3: cannot be read: .*Input/output error")


def test_a_smaller_mesh_restores_and_one_that_does_not_fit_touches_nothing(saved):
    layout = make_mesh(MeshConfig(data=2), jax.devices()[:2])

    def on(abstract):
        def restore(workdir: Path):
            checkpoints = Checkpoints(workdir / "checkpoints", keep_last=3, keep_every=None)
            return restore_newest(checkpoints, lambda _: abstract, lambda _: None)

        return restore

    abstract = abstract_state(MODEL, OPTIMIZER, layout, saved=True)
    assert_state(on(abstract)(saved), 3)
    # As of a model that is narrower than the one that was saved.
    narrow = MODEL.model_copy(update={"dim": 16})
    other = abstract_state(narrow, OPTIMIZER, layout, saved=True)
    assert_stops_and_touches_nothing(saved, "checkpoints/3: cannot be read", on(other))


def test_another_optimizer_is_named_and_touches_nothing(saved):
    abstract = abstract_state(MODEL, OPTIMIZER, make_mesh(MESH), saved=True)
    checkpoints = Checkpoints(saved / "checkpoints", keep_last=3, keep_every=None)
    for optimizer, message in (
        ((abstract.optimizer, abstract.params), "does not hold .'optimizer'..0..1..0..count"),
        (abstract.optimizer[:1], "also holds .'optimizer'..1..0..count"),
    ):
        other = (abstract.params, optimizer)
        assert_stops_and_touches_nothing(
            saved,
            message,
            lambda _, other=other: restore_newest(checkpoints, lambda _: other, lambda _: None),
        )


def test_going_back_moves_checkpoints_aside_and_never_takes_the_last_one(saved):
    checkpoints = Checkpoints(saved / "checkpoints", keep_last=3, keep_every=None)
    whole = files(saved / "checkpoints/3")
    assert checkpoints.go_back(2) == (2, saved / "rewound_checkpoints")
    assert checkpoints.steps() == [1, 2]
    assert len(files(saved / "rewound_checkpoints/3-0")) == len(whole)
    with pytest.raises(UserError, match="no checkpoint of step 0 or before, the oldest is of st"):
        checkpoints.go_back(0)
    assert checkpoints.steps() == [1, 2]
    state = state_of(5)
    checkpoints.save(3, state.params, state.optimizer, {"step": 3})
    assert checkpoints.go_back(2)[0] == 2
    assert sorted(p.name for p in (saved / "rewound_checkpoints").iterdir()) == ["3-0", "3-1"]
    assert restore(saved).step == 2


def test_going_back_before_the_first_checkpoint_is_the_start(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep_last=3, keep_every=None)
    assert checkpoints.go_back(5) == (0, None)
