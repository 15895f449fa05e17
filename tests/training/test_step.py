import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llama3_jax.errors import UserError
from llama3_jax.model.config import ModelConfig
from llama3_jax.model.definition import define, init_params
from llama3_jax.model.flops import training_flops
from llama3_jax.parallel.mesh import MeshConfig, make_mesh
from llama3_jax.parallel.sharding import check_batch, put_batch
from llama3_jax.training.gradients import make_gradients
from llama3_jax.training.optimizer import OptimizerConfig, is_matrix
from llama3_jax.training.state import abstract_state, init_state, relayout, shardings
from llama3_jax.training.step import (
    NO_LIMITS,
    Limits,
    StepMetrics,
    compile_step,
    compile_validation,
)

MODEL = ModelConfig(
    vocab_size=64, dim=32, layers=2, heads=4, kv_heads=2, head_dim=8, ffn_dim=64, dtype="float32",
    init_std=0.1,
)  # fmt: skip
OPTIMIZER = OptimizerConfig()
DATA8 = MeshConfig(data=8)


def make_batch(rows=8, length=24, seed=0):
    random = np.random.default_rng(seed)
    cut = random.integers(4, length - 4, rows)
    index = np.arange(length)
    segments = 1 + (index[None] >= cut[:, None])
    positions = np.where(segments == 1, index[None], index[None] - cut[:, None])
    mask = np.ones((rows, length), bool)
    mask[np.arange(rows), cut - 1] = False
    arrays = {
        "tokens": random.integers(0, 64, (rows, length)),
        "targets": random.integers(0, 64, (rows, length)),
        "positions": positions,
        "segment_ids": segments,
        "cut": np.zeros(rows, int),
        "source": np.arange(rows) % 2,
    }
    return {k: v.astype(np.int32) for k, v in arrays.items()} | {"loss_mask": mask}


def one_device():
    return make_mesh(MeshConfig(), jax.devices()[:1])


def gradients(params, batch, micro_batches=1):
    """Mean loss, sums by source, gradients of the mean: on one device."""
    function = make_gradients(MODEL, one_device(), micro_batches, 2)
    sums, grads = jax.jit(function)(params, put_batch(batch, one_device()))
    tokens = batch["loss_mask"].sum()
    return (
        sums.total / tokens,
        (sums.by_source, sums.tokens_by_source),
        jax.tree.map(lambda g: g / tokens, grads),
    )


def run_steps(mesh_config, micro_batches=1, steps=3):
    mesh = make_mesh(mesh_config)
    state = init_state(MODEL, OPTIMIZER, mesh, 0)
    step = compile_step(MODEL, OPTIMIZER, mesh, micro_batches, 2)
    for i in range(steps):
        batch = put_batch(make_batch(seed=i), mesh)
        state, metrics = step(state, batch, np.float32(1e-2), NO_LIMITS)
    return jax.device_get(state), jax.device_get(metrics)


def test_the_loss_is_the_mean_over_the_mask_and_splits_by_source():
    batch = make_batch()
    params = init_params(MODEL, 0)
    loss, (sums, counts), _ = gradients(params, batch)
    logits = np.asarray(
        define(MODEL).bind(params)(batch["tokens"], batch["positions"], batch["segment_ids"]),
        np.float64,
    )
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    losses = -np.take_along_axis(log_p, batch["targets"][..., None], -1)[..., 0]
    assert loss == pytest.approx(losses[batch["loss_mask"]].mean(), rel=1e-5)
    for source in (0, 1):
        mask = batch["loss_mask"] & (batch["source"] == source)[:, None]
        assert counts[source] == mask.sum()
        assert sums[source] == pytest.approx(losses[mask].sum(), rel=1e-5)


def test_accumulation_over_micro_batches_gives_the_gradients_of_the_whole_batch():
    batch, params = make_batch(), init_params(MODEL, 0)
    # Uneven masks: a mean of the micro-batches' means would be another number.
    batch["loss_mask"][:3, 5:] = False
    whole = gradients(params, batch)
    for micro_batches in (2, 4, 8):
        split = gradients(params, batch, micro_batches)
        for ours, reference in zip(jax.tree.leaves(split), jax.tree.leaves(whole), strict=True):
            np.testing.assert_allclose(ours, reference, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "mesh",
    [pytest.param(MeshConfig(data=8), marks=pytest.mark.slow), MeshConfig(data=4, tensor=2)],
    ids=str,
)
def test_three_steps_are_the_same_on_every_mesh(mesh):
    one, one_metrics = run_steps_on_one_device()
    many, metrics = run_steps(mesh)
    assert metrics.loss == pytest.approx(one_metrics.loss, rel=1e-5)
    for ours, reference in zip(jax.tree.leaves(many), jax.tree.leaves(one), strict=True):
        np.testing.assert_allclose(ours, reference, atol=2e-4, rtol=2e-3)


def run_steps_on_one_device(steps=3):
    """The same steps on one device."""
    state = init_state(MODEL, OPTIMIZER, one_device(), 0)
    step = compile_step(MODEL, OPTIMIZER, one_device(), 1, 2)
    for i in range(steps):
        batch = put_batch(make_batch(seed=i), one_device())
        state, metrics = step(state, batch, np.float32(1e-2))
    return jax.device_get(state), jax.device_get(metrics)


def test_parameters_and_moments_are_sharded_over_data():
    mesh = make_mesh(DATA8)
    state = init_state(MODEL, OPTIMIZER, mesh, 0)
    matrices = [
        array for path, array in jax.tree_util.tree_leaves_with_path(state)
        if array.ndim and "scale" not in jax.tree_util.keystr(path)
    ]  # fmt: skip
    assert len(matrices) == 3 * 9
    for array in matrices:
        assert array.addressable_shards[0].data.size * 8 == array.size


def test_chunks_and_tensor_ranks_begin_with_values_of_their_own():
    """Those of one device: no two layers alike, nor two ranks' parts of a layer."""
    model = MODEL.model_copy(update={"layers": 4})
    layout = make_mesh(MeshConfig(data=2, pipe=2, tensor=2, virtual_stages=2))
    state = init_state(model, OPTIMIZER, layout, 7)
    alone = jax.device_get(jax.jit(lambda: init_params(model, 7))())
    on_mesh = jax.device_get(relayout(state.params, model, layout, None))
    jax.tree.map(np.testing.assert_array_equal, on_mesh, alone)
    for name, weight in jax.tree_util.tree_leaves_with_path(state.params):
        if "scale" in jax.tree_util.keystr(name):
            continue
        # Each shard, layer by layer where it holds several; the same index is held by replicas.
        shards = {str(s.index): np.asarray(s.data) for s in weight.addressable_shards}
        stacked = "blocks" in jax.tree_util.keystr(name)
        parts = [part for data in shards.values() for part in (data if stacked else [data])]
        assert len(parts) == (16 if stacked else 4)
        assert len({part.tobytes() for part in parts}) == len(parts)


def test_the_update_is_adamw_with_decay_on_matrices_only():
    batch, rate = make_batch(), 1e-2
    params = init_params(MODEL, 0)
    _, _, grads = gradients(params, batch)
    norm = float(optax.tree.norm(grads))
    state, metrics = run_steps(DATA8, steps=1)
    assert metrics.grad_norm == pytest.approx(norm, rel=1e-4)
    decayed = is_matrix(params)
    for before, after, grad, matrix in zip(
        *map(jax.tree.leaves, (params, state.params, grads, decayed)), strict=True
    ):
        g = np.asarray(grad, np.float64) * min(1.0, OPTIMIZER.clip / norm)
        # The first step of Adam: bias-corrected moments are g and g^2.
        update = g / (np.abs(g) + OPTIMIZER.eps) + 0.1 * matrix * np.asarray(before)
        large = np.abs(g) > 1e-5
        np.testing.assert_allclose(after[large], (before - rate * update)[large], atol=2e-5)
    names = {jax.tree_util.keystr(path): flag
             for path, flag in jax.tree_util.tree_leaves_with_path(decayed)}  # fmt: skip
    assert [name for name, flag in names.items() if not flag] == [
        "['blocks']['attention_norm']['scale']", "['blocks']['ffn_norm']['scale']",
        "['final_norm']['scale']",
    ]  # fmt: skip


def test_a_step_that_is_not_finite_is_not_applied():
    mesh = make_mesh(DATA8)
    state = init_state(MODEL, OPTIMIZER, mesh, 0)
    state.params["embedding"] = state.params["embedding"].at[0, 0].set(jnp.nan)
    before = jax.device_get(state)
    step = compile_step(MODEL, OPTIMIZER, mesh, 1, 2)
    batch = make_batch()
    batch["tokens"][0, 0] = 0
    after, metrics = step(state, put_batch(batch, mesh), np.float32(1e-2), NO_LIMITS)
    assert not metrics.applied and not np.isfinite(metrics.loss)
    jax.tree.map(np.testing.assert_array_equal, before, jax.device_get(after))


def test_a_step_over_its_limits_is_not_applied():
    mesh = make_mesh(DATA8)
    step, batch = compile_step(MODEL, OPTIMIZER, mesh, 1, 2), put_batch(make_batch(), mesh)

    def run(limits) -> tuple[bool, StepMetrics]:
        """Whether the state changed, and the metrics."""
        state = init_state(MODEL, OPTIMIZER, mesh, 0)
        before = jax.device_get(state)
        after, metrics = step(state, batch, np.float32(1e-2), limits)
        pairs = zip(*map(jax.tree.leaves, (before, jax.device_get(after))), strict=True)
        return not all(np.array_equal(a, b) for a, b in pairs), metrics

    changed, free = run(NO_LIMITS)
    assert changed and free.applied
    loss, norm = float(free.loss), float(free.grad_norm)
    for limits, applied in (
        (Limits(loss, norm), True),
        (Limits(np.nextafter(np.float32(loss), np.float32(0)), np.inf), False),
        (Limits(np.inf, np.nextafter(np.float32(norm), np.float32(0))), False),
    ):
        changed, metrics = run(limits)
        assert changed == applied == bool(metrics.applied)
        assert (float(metrics.loss), float(metrics.grad_norm)) == (loss, norm)


def test_counts_of_a_step():
    batch = make_batch()
    batch["segment_ids"][0, 20:] = 0
    batch["loss_mask"][0, 20:] = False
    mesh = make_mesh(DATA8)
    step = compile_step(MODEL, OPTIMIZER, mesh, 1, 2)
    state = init_state(MODEL, OPTIMIZER, mesh, 0)
    _, m = step(state, put_batch(batch, mesh), np.float32(0), NO_LIMITS)
    pairs = sum(
        (batch["segment_ids"][r, s] == batch["segment_ids"][r, t]) & (t <= s)
        for r in range(8) for s in range(24) for t in range(24) if batch["segment_ids"][r, s]
    )  # fmt: skip
    assert m.document_pairs == pairs
    assert m.real_tokens == 8 * 24 - 4
    assert m.documents == 16


PIPE = MeshConfig(data=2, pipe=2, context=2, virtual_stages=2)


@pytest.mark.parametrize("config", [DATA8, PIPE], ids=["data", "pipe"])
def test_validation_gives_the_sum_of_losses(config):
    mesh = make_mesh(config)
    state, batch = init_state(MODEL, OPTIMIZER, mesh, 0), make_batch()
    total, count = compile_validation(MODEL, mesh)(state.params, put_batch(batch, mesh))
    loss, _, _ = gradients(init_params(MODEL, 0), batch)
    assert count == batch["loss_mask"].sum()
    assert total / count == pytest.approx(float(loss), rel=1e-5)


def test_batches_that_the_mesh_does_not_divide_are_refused():
    mesh = make_mesh(MeshConfig(data=4, context=2))
    step = compile_step(MODEL, OPTIMIZER, mesh, 4, 2)
    state = init_state(MODEL, OPTIMIZER, mesh, 0)
    with pytest.raises(UserError, match="8 rows is not divisible by mesh.data=4 x 4 micro-batches"):
        step(state, put_batch(make_batch(), mesh), np.float32(0))
    with pytest.raises(UserError, match="length 30 is not divisible by 4: mesh.context=2 cuts"):
        check_batch(8, 30, 1, mesh)


def test_meshes_that_do_not_fit_are_refused_by_name():
    with pytest.raises(UserError, match="mesh data 3 x pipe 1 x context 1 x tensor 1 needs 3 dev"):
        make_mesh(MeshConfig(data=3))
    mesh = make_mesh(MeshConfig(tensor=8))
    with pytest.raises(UserError, match=r"mesh.tensor=8 does not divide the model's \w+ \(2\)"):
        shardings(abstract_state(MODEL.model_copy(update={"heads": 8}), OPTIMIZER, mesh))
    # Two KV heads on eight tensor ranks need copies; sixteen would need none.
    model = MODEL.model_copy(update={"heads": 8})
    copies = make_mesh(MeshConfig(tensor=8, kv_heads="replicated"))
    shardings(abstract_state(model, OPTIMIZER, copies))
    with pytest.raises(UserError, match="to be a multiple of the model's kv_heads .16."):
        update = {"heads": 16, "kv_heads": 16}
        shardings(abstract_state(MODEL.model_copy(update=update), OPTIMIZER, copies))


def test_flops_by_hand():
    norms = 5 * 32
    embedding = 64 * 32
    assert define(MODEL).matmul_parameters() == define(MODEL).parameter_count() - norms - embedding
    flops = training_flops(MODEL, rows=2, length=10, document_pairs=50)
    products = 6 * define(MODEL).matmul_parameters() * 20
    per_pair = 12 * 2 * 4 * 8
    assert flops == {
        "full": products + per_pair * 200,
        "causal": products + per_pair * 110,
        "document": products + per_pair * 50,
    }
